"""GGUF files: what can't be mapped, and what is damaged, is refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_deploy.export.backbone.backbone import load_module
from medusa_deploy.export.backbone.gguf_file.config import FAMILIES
from medusa_deploy.export.backbone.gguf_file.metadata import GgufFile
from medusa_deploy.runtime.errors import CheckpointError, DeployError, UnsupportedArchitectureError
from support.gguf_files import GEMMA3, WIDE, random_model, sizes_of, tensors_of, write_file, write_model

pytest.importorskip("gguf")


def check_refused(path: Path, message: str, error: type[DeployError] = UnsupportedArchitectureError) -> None:
    with pytest.raises(error, match=message) as caught:
        load_module(path, "fp32")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_count": 8}, "mixture of experts: llama.expert_count is 8"),
        ({"attention__scale": 0.5}, r"isn't read: llama\.attention\.scale is 0\.5"),
        ({"attention__causal": False}, r"llama\.attention\.causal is False"),
        ({"rope__dimension_count": 8}, r"rope\.dimension_count is 8, a head has 16"),
        ({"attention__value_length": 8}, "keys of a.gguf have 16 numbers a head, values 8"),
        ({"rope__scaling__type": "longrope"}, "longrope scaling without its tensors"),
        ({"rope__scaling__type": "ntk"}, "ntk scaling"),
        ({"rope__scaling__attn_factor": 1.5}, "attention factor of 1.5"),
        ({"rope__scaling__yarn_beta_fast": 16.0}, r"isn't read: llama\.rope\.scaling\.yarn_beta_fast is 16"),
        ({"rope__scaling__yarn_attn_factor": 1.5}, r"yarn_attn_factor is 1\.5"),
        ({"attention__key_length": 32}, "keys of a.gguf have 32 numbers a head, values 16"),
    ],
)
def test_fields_that_cannot_be_mapped_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    check_refused(write_model(tmp_path / "a.gguf", random_model("LlamaConfig"), "llama", **fields), message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_logit_softcapping": 3.0}, r"isn't read: gemma3\.attn_logit_softcapping is 3"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__attn_factor": 1.5}, "factor of 1.5"),
    ],
)
def test_what_gemma_3_can_t_compute_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = random_model("Gemma3TextConfig", **GEMMA3)
    check_refused(write_model(tmp_path / "a.gguf", model, "gemma3", **WIDE, attention__sliding_window=16, **fields), message)


@pytest.mark.parametrize("pattern", [[True], [1, 0, 1, 0, 1, 0, 1], True, "2"])
def test_a_pattern_of_windows_that_says_nothing_is_refused(pattern: Any, tmp_path: Path) -> None:
    fields = {**WIDE, "attention__sliding_window": 16, "attention__sliding_window_pattern": pattern}
    path = write_model(tmp_path / "a.gguf", random_model("Gemma3TextConfig", **GEMMA3), "gemma3", **fields)
    check_refused(path, "sliding_window_pattern is .*7 flags", CheckpointError)


@pytest.mark.parametrize(("architecture", "config"), [("qwen2", "Qwen2Config"), ("phi3", "Phi3Config")])
def test_frequencies_are_read_only_where_llama_cpp_reads_them(architecture: str, config: str, tmp_path: Path) -> None:
    more = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_model(tmp_path / "a.gguf", random_model(config), architecture, more=more)
    check_refused(path, "no place for, such as rope_freqs.weight", CheckpointError)


def test_sizes_that_differ_between_layers_are_refused(tmp_path: Path) -> None:
    model = random_model("LlamaConfig")
    path = write_model(tmp_path / "a.gguf", model, "llama", feed_forward_length=[96, 64])
    check_refused(path, "differs between layers", CheckpointError)


def test_an_unknown_architecture_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gguf", "clip", {}, {"v.weight": np.ones((2, 2), np.float32)})
    check_refused(path, f"architecture 'clip'.*{', '.join(FAMILIES)}")


def test_tensors_that_are_missing_too_many_or_of_another_shape_are_refused(tmp_path: Path) -> None:
    model = random_model("LlamaConfig")
    sizes, tensors = sizes_of(model), tensors_of(model, "llama")
    for name, changed, message in (
        ("a", {**tensors, "blk.0.attn_q.bias": np.ones(64)}, "lacks blk.0.attn_k.bias"),
        ("b", {**tensors, "blk.2.attn_q.weight": np.ones((64, 64))}, "no place for, such as blk.2.attn_q.weight"),
        ("c", {**tensors, "blk.0.attn_q.weight": np.ones((32, 64))}, "has the shape .32, 64., its metadata says .64, 64."),
        ("d", {**tensors, "rope_freqs.weight": np.ones(4)}, "rope_freqs.weight of d.gguf holds 4 numbers"),
        ("e", {**tensors, "rope_freqs.weight": np.zeros(8)}, "expected 8 above 0"),
    ):
        check_refused(write_file(tmp_path / f"{name}.gguf", "llama", sizes, changed), message, CheckpointError)


def test_damaged_files_and_parts_are_refused(tmp_path: Path) -> None:
    model = random_model("LlamaConfig")
    whole = write_model(tmp_path / "a.gguf", model, "llama").read_bytes()
    (tmp_path / "b.gguf").write_bytes(whole[:2000])
    check_refused(tmp_path / "b.gguf", "can't be read", CheckpointError)
    part = write_file(tmp_path / "c.gguf", "llama", sizes_of(model), {}, lambda writer: writer.add_uint16("split.count", 3))
    check_refused(part, "one of 3 parts", CheckpointError)
    check_refused(write_file(tmp_path / "d.gguf", "llama", {}, {}), r"attention\.head_count .* is None", CheckpointError)


def test_a_damaged_header_is_a_named_error(tmp_path: Path) -> None:
    """Cuts and changed bytes: whatever they make of counts, types and texts, no other error comes out."""
    path = tmp_path / "a.gguf"
    sizes = {"block_count": 1, "name": "text", "list": [1, 2, 3]}
    whole = write_file(path, "llama", sizes, {"token_embd.weight": np.ones((4, 32), np.float32)}).read_bytes()
    assert GgufFile(path).get("llama.list") == [1, 2, 3]
    np.testing.assert_array_equal(GgufFile(path).array("token_embd.weight"), np.ones((4, 32)))
    for cut in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="can't be read|isn't|is None"):
            GgufFile(path).array("token_embd.weight")
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole) - 512)] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            file = GgufFile(path)
            for name in file.tensors:
                file.array(name)
