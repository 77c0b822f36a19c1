"""The planner's arithmetic against what export writes and executors allocate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import Session
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.heads import HeadConfig
from medusa_deploy.tools.sizing.capacity import (
    Backbone,
    Limits,
    backbone_of,
    cache_bytes,
    footprint,
    heads_of,
    matrix,
    workspace_bytes,
)
from medusa_deploy.tools.sizing.model_sizes import ModelShape, find_preset
from medusa_deploy.tools.sizing.source import source_of_bundle, source_of_model
from support.families import FAMILIES, make_config
from support.tiny import HEADS, HIDDEN, VOCAB

TINY = ModelShape("LlamaForCausalLM", 2, HIDDEN, 4, 2, 16, VOCAB, 128, 512, tied=True)
TINY_HEADS = HeadConfig("medusa", HEADS, 1, HIDDEN, VOCAB, "shared")


def test_planned_weights_are_those_that_an_export_stores(tiny_bundle: Path) -> None:
    from medusa_deploy.export.weights import ALIGNMENT

    expected, blocks = backbone_of(TINY), heads_of(TINY_HEADS).blocks
    bundle = source_of_bundle(tiny_bundle)
    assert bundle.heads == TINY_HEADS
    # So small a projection is folded into a second, transposed table, and the four equal norms of an untrained model into one.
    stored = expected.parameters + VOCAB * HIDDEN - 4 * HIDDEN
    constants = bundle.backbone.parameters - stored
    assert 0 <= constants <= 16, "rotary frequencies, epsilons and the mask's bias"
    files = open_bundle(tiny_bundle).manifest.files
    written = sum(record.size for name, record in files.items() if name.endswith((".bin", ".safetensors")))
    planned = 4 * (stored + blocks.parameters)  # the bundle is fp32
    inline = 4 * (HIDDEN + blocks.others + constants)  # vectors are small enough to stay in the graph
    assert planned - inline <= written <= planned + 32 * ALIGNMENT


def test_a_model_is_the_size_that_its_shape_says(tiny_model: Path) -> None:
    assert source_of_model(tiny_model).backbone == backbone_of(TINY)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_any_family_has_all_its_parameters_in_the_plan(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from medusa_deploy.export.estimate import empty_module

    config = make_config(FAMILIES[name])
    config.save_pretrained(tmp_path)
    source = source_of_model(tmp_path)
    assert source.backbone.parameters == sum(value.numel() for value in empty_module(config).parameters())
    assert source.backbone.shape.tied == config.tie_word_embeddings


def test_planned_caches_are_those_that_an_executor_allocates(tiny_bundle: Path, tiny_session: Session) -> None:
    limits = open_bundle(tiny_bundle).manifest.limits
    planned = cache_bytes(TINY, HEADS, Limits(limits.capacity, 1, limits.max_rows, limits.prefill_chunk))
    executor: Any = tiny_session.executor
    assert isinstance(executor.layout.rows, int)
    assert executor.caches.nbytes == 2 * planned  # the bundle is fp32, the plan fp16


def test_int8_weights_are_a_byte_and_a_scale_a_channel() -> None:
    weights = matrix(4096, 11008)
    assert weights.nbytes("fp16") == 2 * 4096 * 11008
    assert weights.nbytes("int8") == 4096 * 11008 + 2 * 4096
    small = matrix(8, 8)
    assert small.nbytes("int8") == small.nbytes("fp16") == 128


def test_a_tied_projection_takes_memory_in_int8_only() -> None:
    tied = backbone_of(TINY)
    assert tied.parts("fp16")["vocabulary projection"] == 0
    vocabulary = backbone_of(find_preset("smollm2-135m").shape)
    assert vocabulary.parts("int8")["vocabulary projection"] == 49152 * 576 + 2 * 49152
    assert vocabulary.parts("int8")["embedding"] == vocabulary.parts("fp16")["embedding"] == 2 * 49152 * 576


@pytest.mark.parametrize("kind", ["medusa", "grounded"])
@pytest.mark.parametrize(("projection", "tokens"), [("own", 1024), ("shared", 1024), ("pruned", 256)])
def test_heads_read_their_blocks_and_the_projection_that_they_use(kind: Any, projection: Any, tokens: int) -> None:
    backbone = backbone_of(ModelShape("LlamaForCausalLM", 2, 256, 4, 4, 64, 1024, 512, 512))
    heads = heads_of(HeadConfig(kind, 3, 1, 256, tokens, projection))
    blocks = 3 * (256 * (512 if kind == "grounded" else 256) + 256)
    own = {"own": 3 * 1024 * 256, "shared": 0, "pruned": 256 * 256}[projection]
    apart = 8 * 256 if projection == "pruned" else 0
    assert heads.nbytes("fp16") == 2 * (blocks + own) + apart
    again = 2 * 1024 * 256 if projection == "shared" else 0
    assert heads.read(backbone, "fp16") == heads.nbytes("fp16") + again


def vicuna() -> Backbone:
    return backbone_of(find_preset("7b").shape)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_more_tokens_slots_or_rows_never_take_less(precision: str) -> None:
    heads = heads_of(HeadConfig("medusa", 4, 1, 4096, 32000, "shared"))
    least = Limits(1024, 1, 16, 256)
    larger = [least.at(2048), least.at(batch=2), Limits(1024, 1, 64, 256), Limits(1024, 1, 16, 512)]
    base = footprint(vicuna(), heads, precision, least, 3, 0).total
    for limits in larger:
        assert footprint(vicuna(), heads, precision, limits, 3, 0).total >= base
        assert workspace_bytes(vicuna(), heads, limits, precision) >= workspace_bytes(vicuna(), heads, least, precision)


def test_the_parts_of_a_footprint_are_its_total() -> None:
    heads = heads_of(HeadConfig("medusa", 4, 1, 4096, 32000, "own"))
    taken = footprint(vicuna(), heads, "fp16", Limits(4096, 2, 64, 512), 6, 1000)
    others = taken.heads + taken.cache + taken.workspace + taken.engine + 1000
    assert taken.total == 2 * 6_738_415_616 + others
    assert taken.weights == "streamed"
