"""What the CPU graph's passes replace, what they leave alone, and that neither changes what is computed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.graphs import opened

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ir: Any = pytest.importorskip("onnx_ir")
fuse: Any = pytest.importorskip("medusa_deploy.export.passes.fuse")

NORM = """
<ir_version: 10, opset_import: ["" : 24]>
g (float[B,N,8] x, float[B,N,8] z, float[8] given, float[B,N,1] any) => (float[B,N,8] y)
<float[8] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}, float[1] two = {2.0}, float[1] three = {3.0}, int64[1] last = {-1},
 int64[1] middle = {-2}, float[1] eps = {0.01}>
{
  square = Pow(x, two)
  mean = ReduceMean(square, last)
  sum = Add(mean, eps)
  root = Sqrt(sum)
  inverse = Reciprocal(root)
  normal = Mul(x, inverse)
  scaled = Mul(w, normal)
  y = Identity(scaled)
}
"""
ROTARY = """
<ir_version: 10, opset_import: ["" : 24]>
g (float[B,N,8] rows, float[B,N,2] angles, float[B,N,2] others) => (float[B,N,8] y)
<int64[4] heads = {0, 0, 2, 4}, int64[3] merged = {0, 0, 8}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] one = {1},
 int64[1] end = {9223372036854775807}, int64[1] axis = {3}>
{
  split = Reshape(rows, heads)
  x = Transpose <perm = [0, 2, 1, 3]> (split)
  twice = Concat <axis = -1> (angles, angles)
  c = Cos(twice)
  s = Sin(twice)
  cos = Unsqueeze(c, one)
  sin = Unsqueeze(s, one)
  low = Slice(x, zero, two, axis, one)
  high = Slice(x, two, end, axis, one)
  minus = Neg(high)
  turned = Concat <axis = -1> (minus, low)
  direct = Mul(x, cos)
  crossed = Mul(turned, sin)
  sum = Add(direct, crossed)
  back = Transpose <perm = [0, 2, 1, 3]> (sum)
  y0 = Reshape(back, merged)
  y = Identity(y0)
}
"""


def _run(model: Any) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"B": 1, "N": 3}
    feeds = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        feeds[value.name] = rng.normal(size=[sizes.get(dim.dim_param, dim.dim_value) for dim in dims]).astype(np.float32)
    return list(opened(model).run(None, feeds))


def _fused(text: str) -> Counter[str]:
    """Operators after the passes, which must not change the outputs."""
    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.from_proto(before)
    fuse.fuse(model)
    after = ir.to_proto(model)
    for one, other in zip(_run(before), _run(after), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    return Counter(node.op_type for node in after.graph.node)


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("", ""),
        ("normal = Mul(x, inverse)", "normal = Mul(inverse, x)"),
        ("scaled = Mul(w, normal)", "scaled = Mul(normal, w)"),
        ("sum = Add(mean, eps)", "sum = Add(eps, mean)"),
    ],
)
def test_a_norm_becomes_one_operator(found: str, instead: str) -> None:
    assert _fused(NORM.replace(found, instead)) == {"SimplifiedLayerNormalization": 1, "Identity": 1}


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("Pow(x, two)", "Pow(x, three)"),
        ("Pow(x, two)", "Pow(z, two)"),
        ("ReduceMean(square, last)", "ReduceMean(square, middle)"),
        ("ReduceMean(square, last)", "ReduceSum(square, last)"),
        ("Add(mean, eps)", "Add(mean, any)"),
        ("Mul(w, normal)", "Mul(given, normal)"),
        ("Mul(w, normal)", "Mul(w, x)"),
    ],
)
def test_what_is_no_norm_stays(found: str, instead: str) -> None:
    absolute = NORM.replace("root = Sqrt(sum)", "positive = Abs(sum)\n  root = Sqrt(positive)") if "three" in instead else NORM
    text = absolute.replace(found, instead)
    assert text != absolute
    assert "SimplifiedLayerNormalization" not in _fused(text)


def test_a_rotation_of_rows_becomes_one_operator() -> None:
    assert _fused(ROTARY) == {"RotaryEmbedding": 1, "Cos": 1, "Sin": 1, "Identity": 1}


def test_cos_and_sin_are_made_once_for_many_rotations() -> None:
    second = "  direct2 = Mul(x, cos)\n  crossed2 = Mul(turned, sin)\n  sum2 = Add(direct2, crossed2)\n  added = Add(sum, sum2)\n"
    again = ROTARY.replace("(sum)", "(added)").replace("  back =", f"{second}  back =")
    operators = _fused(again)
    assert (operators["RotaryEmbedding"], operators["Cos"], operators["Sin"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("Concat <axis = -1> (angles, angles)", "Concat <axis = -1> (angles, others)"),
        ("Concat <axis = -1> (minus, low)", "Concat <axis = -1> (low, minus)"),
        ("Neg(high)", "Neg(low)"),
        ("Slice(x, zero, two, axis, one)", "Slice(x, two, end, axis, one)"),
        ("Slice(x, two, end, axis, one)", "Slice(x, zero, two, axis, one)"),
        ("Mul(x, cos)", "Mul(turned, cos)"),
    ],
)
def test_what_is_no_rotation_stays(found: str, instead: str) -> None:
    text = ROTARY.replace(found, instead)
    assert text != ROTARY
    assert "RotaryEmbedding" not in _fused(text)


def test_the_cpu_graph_has_none_of_the_patterns_left(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "onnx/step.cpu.onnx", load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["SimplifiedLayerNormalization"] == 1, "of the embedding; the others are merged with the sums before them"
    assert not {"Pow", "Neg", "Transpose", "RotaryEmbedding", "Cos", "Sin"} & set(operators)
