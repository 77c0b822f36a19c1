"""What the CPU graph's second passes merge, what they leave alone, and that neither changes what is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.graphs import opened

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ir: Any = pytest.importorskip("onnx_ir")
merge: Any = pytest.importorskip("medusa_deploy.export.passes.merge")

LAYERS = 2
HEAD, VISIBLE = 16, 20
# Two heads of queries and one of keys and values attend rows 4 … 6 of a slot, whose tokens are a tree's: two share a position.
ATTENTION = """
<ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]>
g (float[B,N,8] x, float[B,N,8] z, int64[B,N] positions, float[1,1,32,16] past_key, float[1,1,32,16] past_value, int32[B] last,
   float[1,1,N,20] mask, float[B,N,8] others) => (float[B,N,32] y, float[1,1,32,16] present_key, float[1,1,32,16] present_value)
<int64[1] two = {2}, int32 total = {20}>
{
  spread = Unsqueeze(positions, two)
  number = Cast <to = 1> (spread)
  angles = Mul(number, frequencies)
  cos = Cos(angles)
  sin = Sin(angles)
  product_q = MatMul(x, wq)
  product_k = MatMul(x, wk)
  product_v = MatMul(x, wv)
  q = Add(product_q, bq)
  k = Add(bk, product_k)
  v = Add(product_v, bv)
  rotated_q = RotaryEmbedding <interleaved = 0, num_heads = 2> (q, cos, sin)
  rotated_k = RotaryEmbedding <interleaved = 0, num_heads = 1> (k, cos, sin)
  attended, present_key, present_value = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, do_rotary = 0> (
    rotated_q, rotated_k, v, past_key, past_value, last, total, , , , mask)
  y = Identity(attended)
}
"""
NORM = """
<ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]>
g (float[B,N,8] x, float[B,N,8] z) => (float[B,N,8] y, float[B,N,8] again)
<float[8] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}, float[8] bias = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}>
{
  sum = Add(x, z)
  norm = SimplifiedLayerNormalization <axis = -1, epsilon = 0.01, stash_type = 1> (sum, w)
  y = Identity(norm)
  again = Mul(sum, z)
}
"""


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    weights = {}
    for name, out in (("q", 2 * HEAD), ("k", HEAD), ("v", HEAD)):
        shapes = {"w": (8, out), "t": (out, 8), "b": (out,)}
        weights |= {f"{kind}{name}": rng.normal(size=shape).astype(np.float32) for kind, shape in shapes.items()}
    return {**weights, "frequencies": (0.5 ** np.arange(HEAD // 2)).astype(np.float32).reshape(1, 1, -1)}


def _feeds(model: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"B": 1, "N": 3}
    feeds = {}
    for value in model.graph.input:
        dims = [sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.normal(size=dims).astype(np.float32)
    if "positions" in feeds:
        feeds |= {"positions": np.array([[5, 6, 6]]), "last": np.array([6], np.int32)}
        visible = np.arange(VISIBLE)[None] <= 4 + np.array([[0], [1], [1]])
        visible[2] = visible[2] & (np.arange(VISIBLE) != 5) | (np.arange(VISIBLE) == 6)
        feeds["mask"] = np.where(visible, 0, -65504).astype(np.float32)[None, None]
    return feeds


def _merged(text: str) -> Any:
    """The graph after the passes, which must not change the outputs."""
    before = onnx.parser.parse_model(text)
    used = {name for node in before.graph.node for name in node.input}
    used -= {name for node in before.graph.node for name in node.output}
    arrays = {name: array for name, array in _weights().items() if name in used}
    before.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(before))
    merge.merge(model)
    after = ir.to_proto(model)
    results = []
    for each in (before, after):
        session, feeds = opened(each), _feeds(before)
        results.append(session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()}))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    return after.graph


def _operators(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def _without_bias(text: str) -> str:
    for name in "qkv":
        text = text.replace(f"  {name} = Add", f"  unused_{name} = Add").replace(f"product_{name} = MatMul", f"{name} = MatMul")
    return "\n".join(line for line in text.splitlines() if "unused_" not in line)


def _transposed(text: str) -> str:
    for name in "qkv":
        text = text.replace(f"  product_{name} =", f"  w{name} = Transpose <perm = [1, 0]> (t{name})\n  product_{name} =", 1)
    return text


@pytest.mark.parametrize(
    ("change", "operators"),
    [
        (str, {"Concat": 2, "MatMul": 1, "Add": 1}),
        (_without_bias, {"Concat": 1, "MatMul": 1}),
        (_transposed, {"Concat": 2, "Transpose": 1, "MatMul": 1, "Add": 1}),
    ],
)
def test_queries_keys_and_values_become_one_product_that_the_attention_rotates(
    change: Callable[[str], str], operators: dict[str, int]
) -> None:
    graph = _merged(change(ATTENTION))
    assert _operators(graph) == {**operators, "GroupQueryAttention": 1, "Identity": 1}
    initializers = {tensor.name for tensor in graph.initializer}
    [weight] = [node for node in graph.node if node.op_type == "Concat" and node.name.endswith("/qkv/weight")]
    assert set(weight.input) <= initializers, "the form in which other passes find a merged matrix"
    [attention] = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert list(attention.input[1:3]) == ["", ""]
    assert attention.input[9] == "positions"


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("product_k = MatMul(x, wk)", "product_k = MatMul(z, wk)"),
        ("k = Add(bk, product_k)", "k = Identity(product_k)"),
        ("k = Add(bk, product_k)", "k0 = Add(bk, product_k)\n  k = Relu(k0)"),
        ("y = Identity(attended)", "twice = Concat <axis = 2> (v, v)\n  y = Add(attended, twice)"),
    ],
)
def test_products_that_are_no_group_stay(found: str, instead: str) -> None:
    text = ATTENTION.replace(found, instead)
    assert text != ATTENTION
    operators = _operators(_merged(text))
    assert operators["MatMul"] == 3
    assert "RotaryEmbedding" not in operators


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("cos = Cos(angles)", "added = Add(angles, others)\n  cos = Cos(added)"),
        ("(k, cos, sin)", "(k, sin, cos)"),
        ("rotated_k = RotaryEmbedding <interleaved = 0, num_heads = 1> (k, cos, sin)", "rotated_k = Identity(k)"),
        ("interleaved = 0, num_heads = 2", "interleaved = 1, num_heads = 2"),
        ("number = Cast <to = 1> (spread)", "n = Cast <to = 1> (spread)\n  d = Unsqueeze(two, two)\n  number = CumSum(n, one)"),
    ],
)
def test_other_rotations_stay_outside_the_attention(found: str, instead: str) -> None:
    text = ATTENTION.replace(found, instead)
    assert text != ATTENTION
    if "CumSum" in text:  # rows that depend on the rows before them: no function of one position
        text = text.replace("  d = Unsqueeze(two, two)\n", "").replace("int64[1] two", "int64 one = {1}, int64[1] two")
    graph = _merged(text)
    assert _operators(graph)["RotaryEmbedding"] == text.count("RotaryEmbedding")
    assert _operators(graph)["MatMul"] == 3


def test_a_sum_and_its_norm_become_one_operator() -> None:
    assert _operators(_merged(NORM)) == {"SkipSimplifiedLayerNormalization": 1, "Identity": 1, "Mul": 1}


@pytest.mark.parametrize(("found", "instead"), [("Add(x, z)", "Add(x, bias)"), ("Add(x, z)", "Sub(x, z)")])
def test_a_norm_of_something_else_stays(found: str, instead: str) -> None:
    assert _operators(_merged(NORM.replace(found, instead)))["SimplifiedLayerNormalization"] == 1


def test_the_cpu_graph_is_merged(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "onnx/step.cpu.onnx", load_external_data=False).graph
    merged = [node for node in graph.node if node.op_type == "Concat" and node.name.endswith("/qkv/weight")]
    assert len(merged) == LAYERS
    stored = {tensor.name for tensor in graph.initializer}
    assert {name for node in merged for name in node.input} <= stored
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    made = {output: node for node in graph.node for output in node.output}
    assert [made[node.input[0]].input[1] for node in attentions] == [node.output[0] for node in merged]
    products = sum(node.op_type == "MatMul" and "layers" not in node.name for node in graph.node)
    assert products == 5 * LAYERS + 2, "q+k+v, output, gate, up, down; the projection; the acceptance"
