"""A bundle opens only if it is whole, and is written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medusa_deploy.runtime.errors import (
    BundleError,
    BundleExistsError,
    BundleIntegrityError,
    BundleSchemaError,
    OutputError,
)
from medusa_deploy.runtime.files.bundle import open_bundle, record_files, staged_folder
from medusa_deploy.runtime.files.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from support.records import write_stub_bundle

GRAPH = "onnx/step.onnx"


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    return write_stub_bundle(tmp_path / "bundle")


def _tree_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _rename_in_manifest(folder: Path, old: str, new: str) -> None:
    """Makes the manifest call the file ``old`` by the name ``new``."""
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text("utf-8").replace(json.dumps(old), json.dumps(new)), "utf-8")


# -- reading -------------------------------------------------------------------------------------------------------


def test_a_whole_bundle_opens(stub: Path) -> None:
    opened = open_bundle(stub)
    assert opened.manifest.files == record_files(stub)
    assert opened.path(GRAPH) == stub / GRAPH
    assert MANIFEST_NAME not in opened.manifest.files


def test_every_tampered_byte_is_found(stub: Path) -> None:
    path = stub / GRAPH
    original = path.read_bytes()
    for index in range(len(original)):
        path.write_bytes(original[:index] + bytes([original[index] ^ 1]) + original[index + 1 :])
        with pytest.raises(BundleIntegrityError, match="step.onnx has sha256"):
            open_bundle(stub)
    open_bundle(stub, check_hashes=False)


def test_a_truncated_file_is_found_without_hashing(stub: Path) -> None:
    path = stub / GRAPH
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(BundleIntegrityError, match=f"has {len(data) - 1} bytes, the manifest says {len(data)}"):
        open_bundle(stub, check_hashes=False)


def test_a_missing_file_is_found(stub: Path) -> None:
    (stub / "onnx/weights.bin").unlink()
    with pytest.raises(BundleIntegrityError, match="weights.bin is missing"):
        open_bundle(stub, check_hashes=False)


def test_a_file_that_is_a_folder_is_refused(stub: Path) -> None:
    (stub / GRAPH).unlink()
    (stub / GRAPH).mkdir()
    with pytest.raises(BundleIntegrityError):
        open_bundle(stub)


def test_a_link_instead_of_a_file_is_refused(stub: Path, tmp_path: Path) -> None:
    (stub / GRAPH).rename(tmp_path / "elsewhere")
    (stub / GRAPH).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        open_bundle(stub)


def test_a_link_instead_of_a_folder_is_refused(stub: Path, tmp_path: Path) -> None:
    (stub / "onnx").rename(tmp_path / "elsewhere")
    (stub / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="symbolic link"):
        open_bundle(stub)


@pytest.mark.parametrize(
    "name", ["../outside", "onnx/../../outside", "/etc/hostname", "..\\outside", "..", "", ".", "a\0b", "x" * 5000]
)
def test_a_name_outside_the_bundle_is_refused(stub: Path, name: str) -> None:
    (stub.parent / "outside").write_bytes((stub / GRAPH).read_bytes())
    _rename_in_manifest(stub, GRAPH, name)
    with pytest.raises(BundleIntegrityError):
        open_bundle(stub)


def test_no_bundle_is_no_bundle(stub: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="doesn't exist"):
        open_bundle(tmp_path / "nowhere")
    (stub / MANIFEST_NAME).unlink()
    with pytest.raises(BundleError, match="has no manifest.json") as caught:
        open_bundle(stub)
    assert "export" in caught.value.hint


def test_a_manifest_over_the_size_limit_is_not_read(stub: Path) -> None:
    with (stub / MANIFEST_NAME).open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match=f"over the limit of {MAX_MANIFEST_BYTES}"):
        open_bundle(stub)


def test_a_truncated_manifest_is_refused(stub: Path) -> None:
    data = (stub / MANIFEST_NAME).read_bytes()
    (stub / MANIFEST_NAME).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleSchemaError, match="not JSON"):
        open_bundle(stub)


# -- writing -------------------------------------------------------------------------------------------------------


def test_a_staged_folder_becomes_the_output(tmp_path: Path) -> None:
    output = tmp_path / "new" / "output"
    with staged_folder(output) as staging:
        assert not output.exists()
        assert staging.parent == output.parent
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("content")
    assert _tree_of(output) == {"sub/file": b"content"}
    assert os.listdir(output.parent) == ["output"]
    assert output.stat().st_mode & 0o777 == 0o755


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(BundleExistsError, match="exists") as caught, staged_folder(output):
        pytest.fail("the block must not run")
    assert "--force" in caught.value.hint
    assert _tree_of(output) == {"old": b"old"}
    with staged_folder(output, force=True) as staging:
        (staging / "new").write_text("new")
    assert _tree_of(output) == {"new": b"new"}
    assert os.listdir(tmp_path) == ["output"]


def test_force_replaces_a_file(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_text("a file")
    with staged_folder(output, force=True) as staging:
        (staging / "new").write_text("new")
    assert _tree_of(output) == {"new": b"new"}
    assert os.listdir(tmp_path) == ["output"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_leaves_the_old_output_unchanged(tmp_path: Path, exists: bool, error: BaseException) -> None:
    output = tmp_path / "output"
    if exists:
        output.mkdir()
        (output / "old").write_text("old")
    with pytest.raises(type(error)), staged_folder(output, force=True) as staging:
        (staging / "half").write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["output"] * exists
    assert not exists or _tree_of(output) == {"old": b"old"}


def test_a_full_disk_is_a_named_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device") as caught, staged_folder(tmp_path / "output") as staging:
        (staging / "file").write_text("content")
    assert "nothing was left" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_a_full_disk_in_the_middle_of_a_file_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device"), staged_folder(tmp_path / "output") as staging:
        (staging / "whole").write_text("content")
        if not Path("/dev/full").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Path("/dev/full").write_bytes(b"content")
    assert os.listdir(tmp_path) == []


def test_a_failed_rename_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError), staged_folder(output, force=True) as staging:
        (staging / "new").write_text("new")
    assert _tree_of(output) == {"old": b"old"}
    assert os.listdir(tmp_path) == ["output"]


def test_a_parent_that_is_a_file_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError), staged_folder(tmp_path / "file" / "output"):
        pytest.fail("the block must not run")


_KILLED = """
import os, sys, time
from pathlib import Path
from medusa_deploy.runtime.files.bundle import staged_folder
with staged_folder(Path(sys.argv[1]), force=True) as staging:
    (staging / "half").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["output", "out[1]put"])
def test_a_killed_process_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", _KILLED, str(output)], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    assert [path.startswith(f".{name}.partial-") for path in os.listdir(tmp_path)] == [True]
    with staged_folder(output) as staging:
        (staging / "whole").write_text("whole")
    assert os.listdir(tmp_path) == [name]
    assert _tree_of(output) == {"whole": b"whole"}
