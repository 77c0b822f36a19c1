"""The weights file: tensors that graphs share are stored once, where they can be mapped into memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.tiny import HEADS

ir: Any = pytest.importorskip("onnx_ir")
onnx: Any = pytest.importorskip("onnx")
weights_module: Any = pytest.importorskip("medusa_deploy.export.weights")

ALIGNMENT = weights_module.ALIGNMENT
BIG = np.arange(600, dtype=np.float32)
OTHER = BIG + 1
SMALL = np.arange(4, dtype=np.int64)


def _graph(tensors: dict[str, np.ndarray]) -> Any:
    """A model that returns its initializers."""
    values = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        for name, array in tensors.items()
    ]
    nodes = [ir.Node("", "Identity", [value], num_outputs=1) for value in values]
    outputs = []
    for node, (name, array) in zip(nodes, tensors.items(), strict=True):
        node.outputs[0].name, node.outputs[0].shape = f"{name}_out", ir.Shape(array.shape)
        node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        outputs.append(node.outputs[0])
    return ir.Model(ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 24}, name="g"), ir_version=10)


def _locations(path: Path) -> dict[str, dict[str, str]]:
    model = onnx.load(path, load_external_data=False)
    return {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer}


def _values(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_equal_tensors_of_several_graphs_are_stored_once(tmp_path: Path) -> None:
    with weights_module.WeightsFile(tmp_path / "weights.bin") as weights:
        weights.save(_graph({"a": BIG, "b": OTHER, "small": SMALL}), tmp_path / "one.onnx")
        weights.save(_graph({"c": OTHER.copy(), "d": BIG.copy(), "e": BIG.copy()}), tmp_path / "two.onnx")
    one, two = _locations(tmp_path / "one.onnx"), _locations(tmp_path / "two.onnx")
    assert one["a"] == two["d"] == two["e"]
    assert one["b"] == two["c"] != one["a"]
    assert one["small"] == {}, "small tensors stay in the graph"
    assert (tmp_path / "weights.bin").stat().st_size == ALIGNMENT + BIG.nbytes
    expected: dict[str, np.ndarray] = {"a": BIG, "b": OTHER, "small": SMALL}
    for name, array in expected.items():
        assert np.array_equal(_values(tmp_path / "one.onnx")[name], array)
    assert np.array_equal(_values(tmp_path / "two.onnx")["c"], OTHER)


@pytest.mark.parametrize("other", [BIG.view(np.int32), BIG.reshape(2, 300)], ids=["type", "shape"])
def test_equal_bytes_of_another_type_or_shape_read_back_as_what_they_were(tmp_path: Path, other: np.ndarray) -> None:
    with weights_module.WeightsFile(tmp_path / "weights.bin") as weights:
        weights.save(_graph({"a": BIG, "b": other}), tmp_path / "one.onnx")
    values = _values(tmp_path / "one.onnx")
    assert np.array_equal(values["a"], BIG) and np.array_equal(values["b"], other)
    assert (values["b"].dtype, values["b"].shape) == (other.dtype, other.shape)


def test_the_weights_of_a_bundle_are_aligned_and_shared(tiny_bundle: Path) -> None:
    folder = tiny_bundle / "onnx"
    found = {name: _locations(folder / name) for name in ("step.onnx", "step.cpu.onnx", "heads.onnx", "heads.cpu.onnx")}
    offsets = {name: {int(entry["offset"]) for entry in entries.values() if entry} for name, entries in found.items()}
    places = [entry for entries in found.values() for entry in entries.values() if entry]
    assert {entry["location"] for entry in places} == {"weights.bin"}
    assert all(int(entry["offset"]) % ALIGNMENT == 0 for entry in places)
    blocks = offsets["step.onnx"] - offsets["step.cpu.onnx"]
    assert len(blocks) == HEADS and blocks <= offsets["heads.onnx"], "both variants read the same weights but for the heads"
    own = offsets["step.cpu.onnx"] - offsets["step.onnx"]
    assert len(own) == 3, "and the CPU's two tables of its rotation and the codes of its heads, whose few scales are in the graph"
    assert len(offsets["heads.cpu.onnx"] & own) == 1, "codes that its other graph of the heads shares"
    assert offsets["heads.onnx"] <= offsets["step.onnx"], "the heads alone add nothing"
    ends = sorted({(int(entry["offset"]), int(entry["length"])) for entry in places})
    assert all(first + length <= second for (first, length), (second, _) in itertools.pairwise(ends))
    assert (folder / "weights.bin").stat().st_size == sum(ends[-1])


def test_graphs_name_no_file_of_the_machine_that_exported_them(tiny_bundle: Path):
    here = str(Path(weights_module.__file__).parent).encode()
    graphs = list((tiny_bundle / "onnx").glob("*.onnx"))
    assert len(graphs) >= 4
    for graph in graphs:
        data = graph.read_bytes()
        assert b"site-packages" not in data and here not in data and b"forward" not in data, graph.name
