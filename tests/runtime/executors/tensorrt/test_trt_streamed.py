"""An engine whose weights are inputs, read from the bundle's own files, decodes as one that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import Session
from medusa_deploy.runtime.files.weight_inputs import WeightInput, WeightPiece
from medusa_deploy.runtime.tree import chain
from support.fake_cuda import FakeRuntime
from support.fake_engine import add_fake_engine, load_fake
from support.fake_trt import FakeTrt


def _with_streamed_weights(graph: Path, network: Path) -> list[WeightInput]:
    """Write ``graph`` with its large initializers as inputs; what they held, as pieces of the bundle's files."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(graph, load_external_data=False)
    weights = []
    for tensor in list(model.graph.initializer):
        where = {entry.key: entry.value for entry in tensor.external_data}
        if int(where.get("length", 0)) >= 4096 and tensor.data_type == onnx.TensorProto.FLOAT:
            offset, nbytes = int(where.get("offset", 0)), int(where["length"])
            half = nbytes // 2  # in two pieces, as merged weights are
            place = f"onnx/{where['location']}"
            pieces = WeightPiece(place, offset, half), WeightPiece(place, offset + half, nbytes - half)
            weights.append(WeightInput(tensor.name, "float32", tuple(tensor.dims), pieces))
            model.graph.initializer.remove(tensor)
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, network)
    return weights


def test_weights_that_are_inputs_come_from_the_bundles_files(
    bundle_copy: Path, tiny_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = bundle_copy / "onnx" / "streamed.onnx"
    weights = _with_streamed_weights(bundle_copy / "onnx" / "step.device.onnx", network)
    assert len(weights) > 5
    add_fake_engine(bundle_copy, network=network, packed=True, weight_inputs=weights)
    session = load_fake(bundle_copy, monkeypatch, FakeTrt(FakeRuntime()))
    for prompt in ([1, 2, 3], [8] * 20):
        options: dict[str, Any] = {"token_ids": prompt, "max_new_tokens": 40, "tree": chain(3)}
        assert session.generate(**options).token_ids == tiny_session.generate(**options).token_ids
