"""What a model folder says is what runs, or it is refused: code, weights in two places, tensors without a place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_deploy.export.backbone.backbone import load_backbone, load_config, read_module
from medusa_deploy.export.backbone.checkpoint import find_stored
from medusa_deploy.export.backbone.linked import stored_parameters
from medusa_deploy.export.backbone.model_folder import find_model
from medusa_deploy.export.backbone.tokenizer import eos_token_ids, write_text_files
from medusa_deploy.runtime.errors import CheckpointError, DeployError

Tensors = dict[str, torch.Tensor]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROJECTION = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change_config(folder: Path, name: str = "config.json", **fields: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def both_ways(folder: Path) -> list[list[str]]:
    """The notes of the copied and of the linked way to read weights."""
    return [list(load_backbone(folder, "fp32", 64).warnings), stored_parameters(folder, "fp32", 64)[2]]


def check_both_refuse(folder: Path, message: str) -> None:
    for read in (lambda: read_module(folder, "fp32"), lambda: stored_parameters(folder, "fp32", 64)):
        with pytest.raises(CheckpointError, match=message) as caught:
            read()
        assert caught.value.hint


# -- code ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the folder's code would write. Whoever asks a person fails."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return tmp_path / "ran"


def test_a_model_of_code_of_its_own_is_refused(folder: Path, ran: Path) -> None:
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(CheckpointError, match="auto_map.*never runs") as caught:
        load_config(folder, 64)
    assert caught.value.hint
    assert not ran.exists()


def test_code_beside_a_known_model_does_not_run_and_the_report_says_so(folder: Path, ran: Path) -> None:
    change_config(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    for notes in both_ways(folder):
        assert len(notes) == 1
        assert "transformers' own llama" in notes[0]
    assert not ran.exists()


def test_a_tokenizer_of_code_of_its_own_is_refused(folder: Path, ran: Path, tmp_path: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    change_config(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    (tmp_path / "output").mkdir()
    with pytest.raises(CheckpointError):
        write_text_files(folder, SimpleNamespace(to_dict=dict), tmp_path / "output")
    assert not ran.exists()


# -- weights ---------------------------------------------------------------------------------------------------------


def test_an_older_index_beside_a_single_file_changes_nothing(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "old.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "old.safetensors")}))
    assert {tensor.file.name for tensor in find_stored(folder).values()} == {WEIGHTS}
    loaded = read_module(folder, "fp32")[0].state_dict()
    assert torch.equal(loaded[f"{PROJECTION}.weight"], tensors[f"{PROJECTION}.weight"])
    for notes in both_ways(folder):
        assert len(notes) == 1
        assert INDEX in notes[0]


def test_weights_that_the_config_names_itself_are_not_linked(folder: Path) -> None:
    change_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        stored_parameters(folder, "fp32", 64)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{PROJECTION}.bias", (64,)),
        ("lm_head.bias", (8,)),
        ("model.layers.7.input_layernorm.weight", (64,)),
        (f"{PROJECTION}.weight_scale", ()),
        ("model.layers.0.self_attn.q_norm.weight", (16,)),
        ("model.norm.bias", (64,)),
    ],
)
def test_tensors_that_would_change_the_result_are_refused(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(shape)}))
    check_both_refuse(folder, f"1 tensors that its config.json has no place for, such as {name}")


def test_scales_of_8_bit_floats_are_a_quantised_format(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({f"{PROJECTION}.weight_scale_inv": torch.ones(1, 1)}))
    for read in (lambda: load_backbone(folder, "fp32", 64), lambda: stored_parameters(folder, "fp32", 64)):
        with pytest.raises(DeployError, match=r"weight_scale_inv.* is of the format FP8"):
            read()


def test_other_tensors_are_named_and_heads_and_frequencies_are_not(folder: Path) -> None:
    added = {
        "v_head.summary.weight": torch.ones(1, 64),
        "medusa_head.0.0.linear.bias": torch.ones(64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "module.medusa_heads.0.1.weight": torch.ones(64),
    }
    change_tensors(folder, lambda tensors: tensors.update(added))
    for notes in both_ways(folder):
        assert len(notes) == 1
        assert "1 tensors" in notes[0]
        assert "v_head.summary.weight" in notes[0]


def test_weights_of_integers_are_refused(folder: Path) -> None:
    name = f"{PROJECTION}.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: (tensors[name] * 50).to(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"{name} .*is I8"):
        read_module(folder, "fp32")


def test_an_adapter_is_no_model(folder: Path) -> None:
    change_config(folder, "adapter_config.json", base_model_name_or_path="elsewhere")
    check_both_refuse(folder, "PEFT adapter")


# -- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['{"eos_token_id": 2', '{"eos_token_id": "2"}', "[]", '{"eos_token_id": [1, true]}', "\xff"])
def test_a_damaged_generation_config_is_refused_before_weights_are_read(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text, "latin-1")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
        load_config(folder, 64)
    assert caught.value.hint


def test_end_ids_are_those_of_both_configs(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert eos_token_ids(folder, SimpleNamespace(to_dict=lambda: {"eos_token_id": 6})) == (5, 6, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert eos_token_ids(folder, SimpleNamespace(to_dict=dict)) == ()
    with pytest.raises(CheckpointError, match=r"config\.json is '2'"):
        eos_token_ids(folder, SimpleNamespace(to_dict=lambda: {"eos_token_id": "2"}))


# -- GGUF files ------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    for name in ("MODEL.GGUF", "sha256-0a1b", "model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF....")
        assert find_model(tmp_path / name) == (tmp_path, name)
    for name, message in (("broken.gguf", "doesn't begin"), ("model.onnx", "unknown kind")):
        (tmp_path / name).write_bytes(b"<html>")
        with pytest.raises(CheckpointError, match=message):
            find_model(tmp_path / name)


def test_a_folder_with_one_gguf_file_is_that_file_and_several_are_a_choice(tmp_path: Path) -> None:
    (tmp_path / "A.GGUF").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert find_model(tmp_path) == (tmp_path, "A.GGUF")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files: A\.GGUF, b\.gguf"):
        find_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_model(tmp_path) == (tmp_path, None)
