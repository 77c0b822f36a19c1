"""Standard streams of a process that aren't UTF-8, full or closed, and options anywhere among the positional arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import medusa_deploy
from medusa_deploy.tools import cli
from support.text import text_bundle

SOURCE = Path(medusa_deploy.__file__).parents[1]
ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(command: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a line of sh in which ``medusa`` stands for the program and ``$1``, ``$2`` … for the arguments."""
    line = f'medusa() {{ "{sys.executable}" -m medusa_deploy "$@"; }}; {command}'
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), **(environment or {})}
    return subprocess.run(
        ["sh", "-c", line, "sh", *arguments],
        env=variables,
        capture_output=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def talking(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a tokenizer, in a folder whose name isn't ASCII."""
    pytest.importorskip("tokenizers")
    return text_bundle(tiny_bundle, tmp_path_factory.mktemp("text") / "bundle é")


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ("plan --list", ASCII),
        ("plan --list", {"PYTHONIOENCODING": "latin-1"}),
        ("doctor", ASCII),
        ("--help", C_LOCALE),
        ('inspect "$1"', ASCII),
        ('inspect "$1"', C_LOCALE),
        ('generate "$1" À --raw -n 8', ASCII),
    ],
)
def test_text_goes_to_a_stdout_of_any_encoding(command: str, environment: dict[str, str], talking: Path) -> None:
    done = shell(f"medusa {command}", talking, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout and b"Traceback" not in done.stderr


def test_json_on_an_ascii_stdout_stays_json(talking: Path, tmp_path: Path) -> None:
    done = shell('medusa inspect "$1" --json -', talking, environment=ASCII)
    assert done.stdout.isascii() and json.loads(done.stdout)["bundle"] == str(talking)
    shell('medusa inspect "$1" --json "$2"', talking, tmp_path / "report.json", environment=ASCII)
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["bundle"] == str(talking)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
@pytest.mark.parametrize("verb", ["plan --list", "plan --list --json -", "--help", 'generate "$1" a --raw -n 2', "--version"])
@pytest.mark.parametrize("target", [">/dev/full", ">&-"])
def test_a_stdout_that_takes_nothing_is_a_named_error(verb: str, target: str, talking: Path) -> None:
    done = shell(f"medusa {verb} {target}", talking)
    assert done.returncode == cli.USER_ERROR
    assert done.stderr.startswith(b"error: can't write to standard output: ") or b"\nerror: can't write" in done.stderr


@pytest.mark.parametrize("verb", ["plan --list", 'generate "$1" a --raw -n 200 --ignore-eos'])
def test_a_reader_may_leave_early(verb: str, talking: Path) -> None:
    done = shell(f"medusa {verb} | head -c 1", talking)
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr
    assert len(done.stdout) == 1


def test_closed_stderr_and_stdin_are_no_bug(talking: Path) -> None:
    assert shell('medusa generate "$1" a --raw -n 2 2>&-', talking).returncode == 0
    done = shell('medusa generate "$1" -n 2 <&-', talking)
    assert done.returncode == cli.USER_ERROR and b"the prompt is empty" in done.stderr


def test_a_device_or_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = shell('medusa plan --list --json "$1" >/dev/null & cat "$1"; wait', pipe)
    assert json.loads(done.stdout) and pipe.is_fifo()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "target.json")
    assert shell('medusa plan --list --json "$1"', link).returncode == 0
    assert link.is_symlink() and json.loads((tmp_path / "target.json").read_text("utf-8"))


def test_a_path_that_is_not_utf8_is_named(tiny_bundle: Path, tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    names = {}
    for name, target in (("bundle", tiny_bundle), ("model", tiny_model), ("heads", tiny_heads)):
        names[name] = Path(os.fsdecode(os.fsencode(tmp_path / name) + b"\xff"))
        names[name].symlink_to(target)
    for command, name in (
        ('generate "$1" --token-ids 5', "bundle"),
        ('inspect "$1"', "bundle"),
        ('export "$1" --no-heads -o "$2/out"', "model"),
        ('export "$3" --heads "$1" -o "$2/out"', "heads"),
    ):
        done = shell(f"medusa {command}", names[name], tmp_path, tiny_model)
        assert done.returncode == cli.USER_ERROR, done.stderr
        assert f"{name}\\udcff' is not UTF-8".encode() in done.stderr
    assert not (tmp_path / "out").exists()


def test_options_stand_anywhere_among_the_positional_arguments(talking: Path) -> None:
    outputs = {
        shell(f"medusa generate {order}", talking).stdout
        for order in ('"$1" ab --raw -n 6', '--raw -n 6 "$1" ab', '-n 6 "$1" --raw ab', '"$1" --raw -n 6 -- ab')
    }
    assert len(outputs) == 1 and outputs != {b""}
