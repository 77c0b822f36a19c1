"""Weights in 8 bits: scales, rounding, the rewrite of a graph, and its error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from medusa_deploy.export.quantise.engine_weights import LARGEST, channel_scales, quantised
from medusa_deploy.runtime.errors import QuantisationError
from medusa_deploy.runtime.executors.executor import CacheLayout
from medusa_deploy.runtime.executors.ort import OrtModel
from medusa_deploy.runtime.executors.step_plan import Wanted
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle
from support.plans import prefill

pytest.importorskip("onnx_ir")

finite = st.floats(-60000, 60000, width=16)


@given(arrays(np.float16, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=finite), st.sampled_from([0, 1]))
def test_a_quantised_weight_is_off_by_half_a_step_at_most(weight: np.ndarray, axis: int) -> None:
    scales = channel_scales(weight, axis)
    steps = quantised(weight, scales, axis)
    assert scales.dtype == np.float16
    assert steps.dtype == np.int8
    assert np.abs(steps.astype(int)).max() <= LARGEST
    along = scales.astype(np.float64)[:, None] if axis == 0 else scales.astype(np.float64)[None]
    assert np.abs(steps * along - weight.astype(np.float64)).max(initial=0) <= along.max() / 2 * (1 + 1e-6)
    assert (np.abs(steps * along - weight.astype(np.float64)) <= along / 2 * (1 + 1e-6)).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = np.zeros((3, 4), np.float16)
    weight[1] = 2
    scales = channel_scales(weight, 0)
    assert scales[0] == scales[2] == 1
    assert (quantised(weight, scales, 0)[[0, 2]] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_value_that_is_not_finite_is_refused(value: float, axis: int) -> None:
    weight = np.ones((40, 40), np.float16)
    weight[7, 7] = value
    with pytest.raises(QuantisationError, match="channel 7"):
        channel_scales(weight, axis)


def product(kind: str, weight: np.ndarray) -> tuple[object, np.ndarray]:
    """A graph of one product in one of the layouts that exporters write, and the matrix [in, out] that it multiplies with."""
    import onnx
    from onnx import helper, numpy_helper

    half = onnx.TensorProto.FLOAT16
    nodes = {
        "MatMul [in, out]": [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "MatMul of a Transpose": [
            helper.make_node("Transpose", ["w"], ["t"], name="turn", perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"], name="product"),
        ],
        "Gemm": [helper.make_node("Gemm", ["x", "w"], ["y"], name="product")],
        "Gemm transB": [helper.make_node("Gemm", ["x", "w"], ["y"], name="product", transB=1)],
    }[kind]
    turned = kind in ("MatMul of a Transpose", "Gemm transB")
    inputs, outputs = (len(weight), weight.shape[1]) if not turned else weight.shape[::-1]
    x, y = helper.make_tensor_value_info("x", half, ["B", inputs]), helper.make_tensor_value_info("y", half, ["B", outputs])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return model, weight.T if turned else weight


@pytest.mark.parametrize("kind", ["MatMul [in, out]", "MatMul of a Transpose", "Gemm", "Gemm transB"])
def test_every_layout_of_a_product_is_quantised_along_its_outputs(kind: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    from medusa_deploy.export.quantise.engine_weights import write_quantised
    from medusa_deploy.export.weights import WeightsFile

    rng = np.random.default_rng(0)
    model, matrix = product(kind, rng.normal(size=(128, 160)).astype(np.float16))
    matrix = matrix * np.geomspace(0.01, 10, matrix.shape[1])  # outputs of very different sizes: scales must be theirs
    turned = matrix.astype(np.float16).T if kind in ("MatMul of a Transpose", "Gemm transB") else matrix.astype(np.float16)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(turned), "w"))  # type: ignore[attr-defined]
    onnx.save(model, tmp_path / "fp16.onnx")
    with WeightsFile(tmp_path / "int8.bin") as weights:
        report = write_quantised(tmp_path / "fp16.onnx", tmp_path / "int8.onnx", weights)
    assert report.weights == 1
    assert report.bytes_after == 128 * 160 + 2 * matrix.shape[1]
    assert (tmp_path / "int8.bin").stat().st_size == 128 * 160
    onnx.checker.check_model(tmp_path / "int8.onnx")
    x = rng.normal(size=(3, len(matrix))).astype(np.float16)
    [y] = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"x": x})
    exact = x.astype(np.float64) @ matrix
    error = np.abs(y - exact).max(0) / np.abs(matrix).max(0)
    assert error.max() < 0.2, "half a step of 1/127 over 128 products with values about 1: sigma is 0.026"
    assert error.max() > 1e-3, "nothing was quantised"


def last_logits(bundle: Bundle, graph: Path, prompts: np.ndarray) -> np.ndarray:
    """Logits float32 [prompts, V] after each prompt, by the device graph ``graph``."""
    import onnxruntime

    from medusa_deploy.export.proof.device_executor import DeviceGraphExecutor

    manifest = bundle.manifest
    shape, heads = manifest.backbone, manifest.heads
    layout = CacheLayout(shape.layers, 1, shape.kv_heads, manifest.limits.cache_rows, shape.head_dim, "float16")
    sizes = (heads.num_heads, heads.top_k, shape.hidden_size, shape.vocab_size)
    executor = DeviceGraphExecutor(OrtModel(graph, graph, layout, *sizes))
    # Optimised, ONNX Runtime rounds the activations of such products to 8 bits too, which TensorRT doesn't.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    executor._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = []
    for prompt in prompts:
        result = prefill(executor, 0, prompt, wanted=Wanted(logits=True))
        assert result.logits is not None
        found.append(result.logits[-1].astype(np.float32))
    return np.stack(found)


def half_precision_bundle(folder: Path) -> Bundle:
    """A tame random Llama of 2 layers whose every matrix is large enough to be quantised."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from medusa_deploy.export.exporter import export_bundle
    from support.families import SIZES

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 256, "vocab_size": 256, "intermediate_size": 256, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.04)).save_pretrained(folder / "model")
    options = {"dtype": "fp16", "capacity": 64, "top_k": 4, "max_rows": 4, "prefill_chunk": 16}
    export_bundle(folder / "model", None, folder / "bundle", **options)  # type: ignore[arg-type]
    return open_bundle(folder / "bundle")


@pytest.mark.slow
def test_the_step_graph_in_int8_is_the_fp16_graph_with_rounded_weights(tmp_path: Path) -> None:
    import onnx_ir as ir

    from medusa_deploy.export.engines.network import network_source

    bundle = half_precision_bundle(tmp_path)
    graph = bundle.path(bundle.manifest.variants["device"])
    (tmp_path / "scratch").mkdir()
    prompts = np.random.default_rng(1).integers(3, 256, (16, 24))
    with network_source(bundle, "int8", "inside", tmp_path / "scratch") as source:
        int8 = last_logits(bundle, source.step, prompts)
        assert source.heads.is_file()
    fp16 = last_logits(bundle, graph, prompts)
    # The same by another way: fp16 weights that were rounded before the graph reads them.
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.size >= 1 << 14:
            weight = value.const_value.numpy()
            if any(node.op_type == "MatMul" for node, _ in value.uses()):
                scales = channel_scales(weight, 1).astype(np.float32)
                weight = (np.rint(weight / scales) * scales).astype(np.float16)
            value.const_value = ir.tensor(weight, name=value.name)
    ir.save(model, tmp_path / "rounded.onnx")
    rounded = last_logits(bundle, tmp_path / "rounded.onnx", prompts)
    largest = np.abs(fp16).max()
    assert np.abs(int8 - rounded).max() < 0.01 * largest
    assert 0.002 * largest < np.abs(int8 - fp16).max() < 0.05 * largest
    assert (int8.argmax(-1) == fp16.argmax(-1)).mean() >= 0.8


def test_weights_are_quantised_one_at_a_time(tmp_path: Path) -> None:
    """24 matrices of 8 MiB: the process that rewrites them never holds more than a few."""
    import onnx
    from onnx import helper

    half, names = onnx.TensorProto.FLOAT16, [f"w{index}" for index in range(24)]
    nodes = [helper.make_node("MatMul", [f"x{index}", name], [f"x{index + 1}"]) for index, name in enumerate(names)]
    x, y = (helper.make_tensor_value_info(name, half, ["B", 2048]) for name in ("x0", "x24"))
    tensors = []
    for index, name in enumerate(names):
        tensor = onnx.TensorProto(name=name, data_type=half, dims=[2048, 2048])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "all.bin", "offset": index << 23, "length": 1 << 23}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    rng = np.random.default_rng(0)
    with (tmp_path / "all.bin").open("wb") as file:
        for _ in names:
            file.write(rng.normal(size=1 << 22).astype(np.float16).tobytes())
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), tmp_path / "fp16.onnx")
    program = (
        "import sys; sys.path[:] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from medusa_deploy.export.quantise.engine_weights import write_quantised\n"
        "from medusa_deploy.export.weights import WeightsFile\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "import onnx_ir; before = peak(); folder = Path(sys.argv[2])\n"
        "with WeightsFile(folder / 'w.bin') as w: write_quantised(Path(sys.argv[1]), folder / 'int8.onnx', w)\n"
        "print(peak() - before)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "fp16.onnx", tmp_path, *sys.path], capture_output=True, text=True, check=True
    )
    grown = int(said.stdout) >> 10
    assert grown < 100, f"{grown} MiB for weights of 192 MiB"
