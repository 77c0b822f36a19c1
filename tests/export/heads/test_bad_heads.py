from __future__ import annotations

import io
import json
import pickle  # noqa: TID251 (to make what must be refused)
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_deploy.export.heads.layouts import check_fit, read_heads
from medusa_deploy.runtime.errors import HeadsError, HeadsMismatchError
from support.published_heads import (
    HIDDEN,
    VOCAB,
    Source,
    random_source,
    reference_names,
    save,
    save_shards,
    trtllm_names,
    vllm_names,
)

# -- bad heads -----------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> dict[str, Any]:
    tensors = {**reference_names(random_source(layers=2)), **{name.replace("_", "."): value for name, value in changes.items()}}
    return {name: value for name, value in tensors.items() if value is not None}


NAN = torch.full((HIDDEN, HIDDEN), torch.nan)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.embed_tokens.weight": torch.ones(2, 2)}, "holds no Medusa heads: 1 tensors, such as model.embed"),
        ({}, "holds no Medusa heads: 0 tensors"),
        (reference_names(Source([], random_source().projections)), "holds no Medusa heads"),
        (changed(**{"0_0_linear_weight": NAN}), r"head\.0\.layer\.0\.weight holds NaN"),
        (changed(**{"0_2_weight": torch.zeros(VOCAB, HIDDEN)}), r"head\.0\.projection\.weight is all zero"),
        (
            changed(**{"0_1_linear_weight": None, "0_1_linear_bias": None}),
            r"head 1 of 3 has the layers \[0, 1\], head 0 has \[0\]",
        ),
        (changed(**{"0_0_linear_weight": None}), "head 0 lacks the weight of layer 0"),
        (changed(**{"1_0_linear_weight": None, "1_0_linear_bias": None}), r"head 1 of 3 has the layers \[1\]"),
        (changed(**{"2_2_weight": None}), "head 2 has no projection, and 2 of 3 heads have one"),
        (changed(**{"0_2_weight": None, "0_5_weight": torch.ones(VOCAB, HIDDEN)}), r"numbered \[2, 5\]"),
        (changed(**{"0_0_linear_weight": torch.ones(HIDDEN, HIDDEN + 1)}), "has shape"),
        (changed(**{"0_0_linear_weight": torch.ones(HIDDEN)}), "expected 2 axes"),
        (changed(**{"0_0_linear_weight": torch.ones(())}), "expected 2 axes"),
        (changed(**{"0_0_linear_weight": torch.ones(0, 0)}), "expected 2 axes"),
        (changed(**{"0_2_weight": torch.ones(VOCAB, HIDDEN - 1)}), "has shape"),
        (changed(**{"2_2_weight": torch.ones(VOCAB - 1, HIDDEN)}), "has shape"),
        (changed(**{"0_2_bias": torch.ones(VOCAB)}), "0.2.bias, which no known layout"),
        (changed(**{"0_0_linear_weight.zero": torch.ones(VOCAB)}), "which no known layout"),
        (changed(**{"900000000_0_linear_weight": torch.ones(2, 2)}), "belongs to head 900000000"),
        ({**changed(), **vllm_names(random_source())}, "mixes names of the layouts a, d"),
    ],
)
def test_bad_heads_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    save(tmp_path, "medusa_lm_head.safetensors", tensors)
    with pytest.raises(HeadsError, match=message):
        read_heads(tmp_path)


@pytest.mark.parametrize(
    ("token_map", "message"),
    [
        (torch.arange(10) + VOCAB, "a projection has 40 rows"),
        (torch.zeros(10, dtype=torch.int64), "twice"),
        (torch.ones(10), "is float32"),
        (torch.ones(10, 1, dtype=torch.int64), "expected 1 axes"),
        (torch.ones(0, dtype=torch.int64), "expected 1 axes"),
        (torch.ones(10, dtype=torch.bool), "is bool"),
    ],
)
def test_a_bad_token_map_is_refused(tmp_path: Path, token_map: Any, message: str) -> None:
    save(tmp_path, "model.safetensors", {**vllm_names(random_source()), "token_map": token_map})
    with pytest.raises(HeadsError, match=message):
        read_heads(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.0.linear.weight": torch.ones(HIDDEN, HIDDEN, dtype=torch.float8_e4m3fn)}, "float8_e4m3fn and has no scale"),
        ({"0.0.linear.weight": torch.ones(HIDDEN, HIDDEN, dtype=torch.uint8)}, "uint8, a quantisation"),
        ({"0.0.linear.weight": torch.ones(HIDDEN, HIDDEN, dtype=torch.int64)}, "is int64"),
        ({"0.0.linear.weight_scale": torch.ones(1)}, "float32 with a scale"),
        (
            {
                "0.0.linear.weight": torch.ones(HIDDEN, HIDDEN, dtype=torch.float8_e4m3fn),
                "0.0.linear.weight_scale": torch.ones(HIDDEN // 4, 4),
            },
            r"scales of the shape \(4, 4\)",
        ),
    ],
)
def test_quantised_weights_that_arent_understood_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save(tmp_path, "medusa_lm_head.safetensors", {**reference_names(random_source()), **change})
    with pytest.raises(HeadsError, match=message) as caught:
        read_heads(tmp_path)
    assert caught.value.hint


# -- bad files -----------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="no such heads") as caught:
        read_heads(tmp_path / "nowhere")
    assert caught.value.hint
    with pytest.raises(HeadsError, match="holds no tensors"):
        read_heads(tmp_path)
    (tmp_path / "heads.gguf").touch()
    with pytest.raises(HeadsError, match="unknown kind"):
        read_heads(tmp_path / "heads.gguf")


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize("size", [0, 5, 8, 64, -1])
def test_truncated_files_are_refused(tmp_path: Path, name: str, size: int) -> None:
    file = tmp_path / name
    if file.suffix == ".pt":
        torch.save(reference_names(random_source()), file)
    else:
        save(tmp_path, name, reference_names(random_source()))
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(HeadsError, match="can't be read") as caught:
        read_heads(tmp_path)
    assert "truncated" in caught.value.hint


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "medusa_lm_head.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(HeadsError, match="can't be read"):
        read_heads(tmp_path)


class _Runs:
    """A pickle of this calls ``exec`` when it is loaded the ordinary way."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    file = tmp_path / "medusa_lm_head.pt"
    torch.save({**reference_names(random_source()), "extra": _Runs()}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(HeadsError, match="holds more than tensors") as caught:
        read_heads(tmp_path)
    assert "safetensors" in caught.value.hint
    file.write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(HeadsError, match="holds more than tensors|can't be read"):
        read_heads(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {"0.0.linear.weight": [1.0]},
        {0: torch.ones(2)},
        {"state_dict": {"0.0.linear.weight": torch.ones(2, 2)}},
        {"0.0.linear.weight": torch.ones(1).expand(1 << 20, 1 << 20)},
        {"0.0.linear.weight": torch.ones(2, 2).to_sparse()},
    ],
    ids=["list", "numbers", "integer names", "nested", "larger than its storage", "sparse"],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(HeadsError, match="not a dict of tensors"):
        read_heads(tmp_path)


def test_a_pickle_compressed_inside_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(reference_names(random_source()), buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(tmp_path / "medusa_lm_head.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(HeadsError, match="compressed inside"):
        read_heads(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/hostname", "a/b.safetensors", "..", "a\\b", ""])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    weight_map = {"medusa_head.0.0.linear.weight": file}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(HeadsError, match="isn't a file of its folder"):
        read_heads(tmp_path)


@pytest.mark.parametrize("index", ["{}", "{", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_a_damaged_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(HeadsError, match="weight_map|not JSON"):
        read_heads(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    save_shards(tmp_path, reference_names(random_source(), "medusa_head."), lambda name: "bias" in name)
    (tmp_path / "model-00001.safetensors").unlink()
    with pytest.raises(HeadsError, match=r"model-00001\.safetensors can't be read"):
        read_heads(tmp_path)
    save(tmp_path, "model-00001.safetensors", {"other": torch.ones(1)})
    with pytest.raises(HeadsError, match=r"doesn't give medusa_head\.0\.0\.linear\.bias"):
        read_heads(tmp_path)


def test_a_missing_rank_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, "rank1.safetensors", trtllm_names(random_source()))
    with pytest.raises(HeadsError, match=r"holds the ranks \[1\]"):
        read_heads(tmp_path)
    (tmp_path / "rank1.safetensors").unlink()
    halves = {name: tensor.chunk(2)[0] for name, tensor in trtllm_names(random_source()).items()}
    save(tmp_path, "rank0.safetensors", halves)
    with pytest.raises(HeadsError, match=r"has shape \(8, 16\), expected \(16, 16\)"):
        read_heads(tmp_path)


def test_two_files_with_the_same_tensors_are_ambiguous(tmp_path: Path) -> None:
    for name in ("first.safetensors", "second.safetensors"):
        save(tmp_path, name, reference_names(random_source()))
    with pytest.raises(HeadsError, match="both hold"):
        read_heads(tmp_path)
    assert read_heads(tmp_path / "second.safetensors").layout == "a"


# -- fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "sizes", "message"),
    [
        (random_source(), {"hidden_size": 32}, "hidden size 16, the backbone 32"),
        (random_source(), {"vocab_size": VOCAB + 1}, "project to 40 tokens, the backbone's vocabulary has 41"),
        (random_source(rows=48), {}, "project to 48 tokens, the backbone's vocabulary has 40"),
        (random_source(draft=10), {"vocab_size": 9}, r"goes up to token id \d+, the backbone's vocabulary has 9"),
        (random_source(draft=10), {"top_k": 11}, "top-k is 11, and the heads know 10 tokens"),
    ],
)
def test_heads_of_another_backbone_are_refused(tmp_path: Path, source: Source, sizes: dict[str, int], message: str) -> None:
    save(tmp_path, "model.safetensors", vllm_names(source))
    heads = read_heads(tmp_path).heads
    with pytest.raises(HeadsMismatchError, match=message) as caught:
        check_fit(heads, **{"hidden_size": HIDDEN, "vocab_size": VOCAB, **sizes})
    assert caught.value.hint
