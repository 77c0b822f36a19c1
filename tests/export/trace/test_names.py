"""Matrix products keep the names of their modules through optimisation and lowering, and graphs name no file of a machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from medusa_deploy.export.exporter import export_bundle
from medusa_deploy.export.trace.names import LAYER, ROLE, joined_names
from support.tiny import HEADS

SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OTHERS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def onnx_folder(tiny_bundle: Path) -> Path:
    return tiny_bundle / "onnx"


def named(path: Path) -> Counter[tuple[str | None, str]]:
    """Count the named nodes of a graph and its branches by layer and role."""
    found: Counter[tuple[str | None, str]] = Counter()

    def look(graph: Any) -> None:
        for node in graph.node:
            names = {entry.key: entry.value for entry in node.metadata_props}
            if ROLE in names:
                found[names.get(LAYER), names[ROLE]] += 1
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    look(attribute.g)

    look(onnx.load(path, load_external_data=False).graph)
    return found


@pytest.mark.parametrize("graph", ["step.onnx", "step.device.onnx"])
def test_every_product_of_a_lowered_graph_has_its_modules_name(onnx_folder: Path, graph: str) -> None:
    found = named(onnx_folder / graph)
    layers = {(str(layer), role): 1 for layer in range(2) for role in (*SEPARATE, *OTHERS)}
    assert {key: found[key] for key in layers} == layers
    assert found[None, "projection"] == 1
    assert sum(count for (_, role), count in found.items() if role.startswith("heads.blocks")) == HEADS


def test_joined_products_of_the_cpu_graph_have_all_names(onnx_folder: Path) -> None:
    found = named(onnx_folder / "step.cpu.onnx")
    for layer in ("0", "1"):
        assert found[layer, "+".join(SEPARATE)] == 1
        assert all(found[layer, role] == 1 for role in OTHERS)
    assert found[None, "projection"] == 1


def test_graphs_name_no_file_of_the_machine_that_made_them(onnx_folder: Path) -> None:
    for path in onnx_folder.glob("*.onnx"):
        written = path.read_bytes()
        assert b".py" not in written, path.name
        assert b"stack_trace" not in written, path.name


def test_a_family_with_merged_projections_keeps_their_names(tmp_path: Path) -> None:
    from support.families import FAMILIES, make_family

    model = make_family(FAMILIES["phi3: fused QKV, partial rotary"], tmp_path / "model")
    export_bundle(model, None, tmp_path / "bundle", capacity=64, max_rows=8, prefill_chunk=16)
    found = named(tmp_path / "bundle" / "onnx" / "step.onnx")
    assert found["0", "self_attn.qkv_proj"] == found["1", "mlp.gate_up_proj"] == 1


def test_a_joined_name_has_a_layer_only_if_all_parts_share_it() -> None:
    one, two, other = {LAYER: "1", ROLE: "a"}, {LAYER: "1", ROLE: "b"}, {LAYER: "2", ROLE: "c"}
    assert joined_names([one, two]) == {LAYER: "1", ROLE: "a+b"}
    assert joined_names([one, other]) == {ROLE: "a+c"}
    assert joined_names([{}, {}]) == {}
