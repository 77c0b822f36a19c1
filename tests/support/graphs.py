"""Opens graphs that lie in memory."""

from __future__ import annotations

from typing import Any


def opened(model: Any, *, optimised: bool = True) -> Any:
    """A session of ONNX Runtime on the CPU for a model of onnx or of onnx_ir."""
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
