"""Weights as network inputs: the same numbers from the same files, merged where one value meets several matrices."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from medusa_deploy.export.engines.einsum import merged_name
from medusa_deploy.export.engines.network import check_source
from medusa_deploy.export.engines.streamed import WeightStreamer, weight_arrays
from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.runtime.errors import BundleIntegrityError, UsageError
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle
from medusa_deploy.runtime.files.weight_inputs import WeightInput, WeightPiece, parse_weight_inputs
from support.families import FAMILIES, make_family
from support.tiny import HEADS

pytestmark = pytest.mark.slow  # each export of this kind traces twice

OPTIONS: dict[str, Any] = {"capacity": 64, "batch": 2, "top_k": 4, "max_rows": 8, "prefill_chunk": 16}
GRAPHS = ("onnx/step.device.onnx", "onnx/heads.onnx")


@pytest.fixture(scope="module")
def linked(tiny_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("streamed") / "bundle"
    export_bundle(tiny_model, tiny_heads, output, weights="linked", **OPTIONS)
    return open_bundle(output)


@pytest.fixture(scope="module")
def copied(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def feeds(model: Any) -> dict[str, np.ndarray]:
    """Two slots with five rows each over caches of random numbers."""
    rng = np.random.default_rng(0)
    sizes = {"B": 2, "N": 5, "R": 5, "T": 40, "P": 3}
    values: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [axis.dim_value or sizes.get(axis.dim_param, 3) for axis in kind.shape.dim]
        if kind.elem_type == onnx.TensorProto.INT64:
            values[value.name] = rng.integers(0, 4, shape)
        elif kind.elem_type == onnx.TensorProto.BOOL:
            values[value.name] = np.broadcast_to(np.tril(np.ones(shape[-2:], bool)), shape).copy()
        else:
            values[value.name] = rng.normal(0, 1, shape).astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    fixed = {
        "columns": np.arange(40),
        "head_rows": np.zeros(1, np.int64),
        "write_index": np.array([12, 20]),
        "kept_count": np.array([1, 2]),
        "forced": np.array([5, 5]),
    }
    return {**values, **{name: value for name, value in fixed.items() if name in values}}


def run(model: Any, values: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """All outputs; ``folder`` holds what the model refers to."""
    path = folder / "run.onnx"
    onnx.save(model, path)
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return dict(zip([each.name for each in session.get_outputs()], session.run(None, values), strict=True))
    finally:
        path.unlink()


def results(
    bundle: Bundle, graph: str, streamer: WeightStreamer, tmp_path: Path, weights: Any = None
) -> list[dict[str, np.ndarray]]:
    """Outputs of the bundle's graph, and of what was made of it with ``weights`` (by default the record's) as inputs."""
    original = onnx.load(bundle.path(graph), load_external_data=False)
    values = feeds(original)
    expected = run(original, values, bundle.path(graph).parent)
    streamed = streamer.stream(graph)
    assert not any(tensor.external_data for tensor in streamed.graph.initializer), "it stands alone"
    names = {value.name for value in streamed.graph.input}
    arrays = weight_arrays(bundle, weights or streamer.inputs)
    given = {name: array for name, array in arrays.items() if name in names}
    assert names == values.keys() | given.keys()
    return [expected, run(streamed, {**values, **given}, tmp_path)]


def agree(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> bool:
    same = expected.keys() == found.keys()
    return same and all(np.allclose(expected[name], found[name], rtol=1e-4, atol=1e-4) for name in expected)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", ["linked", "copied"])
@pytest.mark.parametrize("merge", [True, False])
def test_a_streamed_network_computes_what_the_graph_does(
    kind: str, graph: str, merge: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    assert agree(*results(bundle, graph, WeightStreamer(bundle, merge=merge), tmp_path))


def test_biases_and_grouped_queries_survive_the_merge(tmp_path: Path) -> None:
    model = make_family(FAMILIES["qwen2: tied, QKV bias"], tmp_path / "model")
    export_bundle(model, None, tmp_path / "bundle", weights="linked", **OPTIONS)
    bundle = open_bundle(tmp_path / "bundle")
    streamer = WeightStreamer(bundle)
    assert agree(*results(bundle, GRAPHS[0], streamer, tmp_path))
    rows = {weight.shape[0] for weight in streamer.inputs if "q_proj+k_proj+v_proj" in weight.name}
    assert rows == {64 + 32 + 32}


def test_matrices_of_one_value_are_one_input(linked: Bundle) -> None:
    streamer = WeightStreamer(linked)
    model = streamer.stream(GRAPHS[0])
    shapes = {weight.name: (weight.shape, len(weight.pieces)) for weight in streamer.inputs}
    assert shapes["decoder.layers.1.self_attn.q_proj+k_proj+v_proj.weight"] == ((128, 64), 3)
    assert shapes["decoder.layers.0.mlp.gate_proj+up_proj.weight"] == ((256, 64), 2)
    assert shapes["heads.blocks.0+1+2.0.weight"] == ((HEADS * 64, 64), HEADS)
    assert Counter(pieces for _, pieces in shapes.values()) == {3: 3, 2: 2, 1: 5}, "output and down of each layer, one vocabulary"
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["Einsum"] == 2 * 4 + 2 + 1
    moved = {name for node in model.graph.node if node.op_type == "Transpose" for name in node.input}
    assert not moved & {weight.name for weight in streamer.inputs}, "no weight is transposed in a step"
    before = len(streamer.inputs)
    streamer.stream(GRAPHS[1])
    assert len(streamer.inputs) == before, "the heads alone use the same weights"


def test_a_wrong_order_or_place_of_pieces_shows(linked: Bundle, tmp_path: Path) -> None:
    streamer = WeightStreamer(linked)
    streamer.stream(GRAPHS[0])
    merged = next(weight for weight in streamer.inputs if "gate_proj+up_proj" in weight.name)
    single = next(weight for weight in streamer.inputs if "o_proj" in weight.name)
    [piece] = single.pieces
    for wrong in (
        replace(merged, pieces=merged.pieces[::-1]),
        replace(single, pieces=(piece._replace(offset=piece.offset + 4),)),
    ):
        weights = [wrong if weight.name == wrong.name else weight for weight in streamer.inputs]
        assert not agree(*results(linked, GRAPHS[0], WeightStreamer(linked), tmp_path, weights))


def test_places_outside_the_bundles_files_are_refused(bundle_copy: Path) -> None:
    opened = open_bundle(bundle_copy)
    path = bundle_copy / "onnx" / "step.device.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    for key, value in (("offset", str(1 << 40)), ("location", "../../secret.bin"), ("length", "4")):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        place = next(each for each in changed.graph.initializer if each.name == tensor.name).external_data
        next(entry for entry in place if entry.key == key).value = value
        onnx.save(changed, path)
        with pytest.raises(BundleIntegrityError):
            WeightStreamer(opened).stream(GRAPHS[0])


def test_int8_with_streamed_weights_is_refused(linked: Bundle) -> None:
    with pytest.raises(UsageError, match="int8"):
        check_source(linked, "int8", "streamed")


def test_a_record_of_weight_inputs_is_checked() -> None:
    good = {"name": "w", "dtype": "float16", "shape": [4, 2], "pieces": [["onnx/a", 0, 8], ["onnx/b", 64, 8]]}
    pieces = (WeightPiece("onnx/a", 0, 8), WeightPiece("onnx/b", 64, 8))
    assert parse_weight_inputs([good]) == (WeightInput("w", "float16", (4, 2), pieces),)
    for change in (
        {"pieces": [["onnx/a", 0, 8]]}, {"pieces": []}, {"dtype": "text"}, {"shape": [-4, -2]}, {"pieces": [["../a", 0, 16]]},
        {"pieces": [["/a", 0, 16]]}, {"pieces": [["a", -1, 16]]},
    ):  # fmt: skip
        with pytest.raises((KeyError, TypeError, ValueError)):
            parse_weight_inputs([{**good, **change}])
    with pytest.raises(ValueError, match="one name"):
        parse_weight_inputs([good, good])


def test_names_of_merged_weights_are_short() -> None:
    assert merged_name(["l.0.q.weight", "l.0.k.weight"]) == "l.0.q+k.weight"
    assert merged_name(["b.0.0.weight", "b.1.0.weight"]) == "b.0+1.0.weight"
    assert merged_name(["a", "b"]) == "a+b"
    assert merged_name(["a.x", "a.b.x"]) == "a.x+b.x"
