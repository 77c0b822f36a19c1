"""Reports the GPU, driver and packages, and which executors can load."""

from __future__ import annotations

import importlib
from typing import Any

from ...extras import version
from ..executors import loaded_sessions
from ..machine import gpu_facts
from ..options import Options
from ..report import Report, describe

PACKAGES = (
    "numpy", "torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13",
    "cuda-bindings", "nvidia-cudnn-cu13", "nvidia-cublas", "onnx", "transformers", "tokenizers",
)  # fmt: skip
MODULES = ("numpy", "torch", "triton", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.bindings.runtime")


def run(options: Options, report: Report) -> None:
    """Put ``gpu``, ``packages``, ``imports``, ``torch``, ``onnxruntime``, ``tensorrt_rtx`` and ``executors``."""
    report.put("gpu", gpu_facts())
    report.put("packages", {name: version(name) for name in PACKAGES})
    imports = {name: _import(name) for name in MODULES}
    report.put("imports", imports)
    for name, question in (("torch", _torch), ("onnxruntime", _onnxruntime), ("tensorrt_rtx", _tensorrt_rtx)):
        if imports[name] == "ok":
            try:
                report.put(name, question())
            except Exception as error:  # a broken package is a finding
                report.skip(name, error)
    _say_whether_listed(report.results)
    if options.device == "cuda" and not report.results.get("torch", {}).get("cuda"):
        report.skip("cuda", "no torch that sees a GPU")
    executors = [backend for backend, _ in loaded_sessions(options, report)]
    report.put("executors", executors)


def _say_whether_listed(results: dict[str, Any]) -> None:
    """Note whether this GPU is among the ones that TensorRT-RTX knows."""
    sm, rtx = results.get("torch", {}).get("sm"), results.get("tensorrt_rtx")
    if sm is not None and rtx is not None:
        rtx["this_gpu"], rtx["this_gpu_is_listed"] = sm, sm.replace("sm_", "SM") in rtx["listed"]


def _import(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # missing libraries show as OSError, RuntimeError and others
        return describe(error)
    return "ok"


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.cuda.is_available(), "cuda_version": torch.version.cuda}
    if facts["cuda"]:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "name": properties.name,
            "sm": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "built_for": torch.cuda.get_arch_list(),
        }
    return facts


def _onnxruntime() -> dict[str, Any]:
    import onnxruntime

    return {
        "version": onnxruntime.__version__,
        "cuda_version": getattr(onnxruntime, "cuda_version", None),
        "providers": list(onnxruntime.get_available_providers()),
    }


def _tensorrt_rtx() -> dict[str, Any]:
    """SMs that this TensorRT-RTX builds for, and whether a small plan of each can be loaded on this GPU."""
    import tensorrt_rtx as trt

    listed = sorted(name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    return {"version": trt.__version__, "listed": listed, "loads": {name: _try_plan(trt, name) for name in listed}}


def _try_plan(trt: Any, capability: str) -> str:
    """Build one operator for ``capability`` and load it. Returns "loads", or TensorRT's message."""
    said: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                said.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    values = network.add_input("values", trt.float32, (16,))
    network.mark_output(network.add_activation(values, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return f"doesn't build: {' '.join(said)[:200]}"
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return f"doesn't load: {' '.join(said)[:200] or 'no reason given'}"
    return "loads" if engine.create_execution_context() is not None else f"loads, doesn't run: {' '.join(said)[:200]}"
