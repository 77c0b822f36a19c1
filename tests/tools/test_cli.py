"""The program: what it imports, how it ends, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import medusa_deploy
from medusa_deploy.runtime.errors import CapacityError, DeployError
from medusa_deploy.tools import cli

SOURCE = Path(medusa_deploy.__file__).parents[1]
HEAVY = ("numpy", "onnx", "onnxruntime", "tokenizers", "torch", "transformers")


def program(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "medusa_deploy", *arguments]
    return subprocess.run(command, env=environment, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload,no-any-return]


def modules_after(*arguments: str) -> set[str]:
    """What is imported once the program has run."""
    code = f"import sys\nfrom medusa_deploy.tools.cli import main\nmain({list(arguments)!r})\nprint('|', *sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return set(result.stdout.rpartition("|")[2].split())


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Makes ``medusa-deploy stub`` run a function."""

    def make(action: Callable[[], int]) -> None:
        module = types.ModuleType("medusa_deploy.tools.verbs.stub")
        module.HELP, module.add_arguments = "a stub", lambda parser: parser.add_argument("--flag")  # type: ignore[attr-defined]
        module.run = lambda args: action()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "medusa_deploy.tools.verbs.stub", module)
        monkeypatch.setattr(cli, "VERBS", (*cli.VERBS, cli.Verb("stub", "a stub")))

    return make


def raiser(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


def test_help_lists_every_verb_and_imports_none() -> None:
    modules = modules_after("--help")
    assert not modules.intersection(HEAVY)
    assert not {f"medusa_deploy.tools.verbs.{verb.name}" for verb in cli.VERBS} & modules


@pytest.mark.parametrize("name", ["export", "generate", "prepare", "inspect", "doctor"])
def test_help_of_a_verb_imports_that_verb_only(name: str) -> None:
    modules = modules_after(name, "--help")
    verbs = {f"medusa_deploy.tools.verbs.{verb.name}" for verb in cli.VERBS}
    assert verbs & modules == {f"medusa_deploy.tools.verbs.{name}"}
    assert not modules.intersection(HEAVY)


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_a_module_with_help_arguments_and_run(verb: cli.Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb.name, "--help"]) == cli.OK
    assert f"usage: medusa-deploy {verb.name}" in capsys.readouterr().out


def test_help_and_version_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr()
    assert all(f"  {verb.name} " in shown.out and verb.help in shown.out for verb in cli.VERBS)
    assert shown.err == ""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"medusa-deploy {medusa_deploy.__version__}\n"


def test_help_groups_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    groups: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.partition("verbs:\n")[2].splitlines():
        if line.isalpha():
            groups[line] = found = []
        elif line.startswith("  "):
            found.append(line.split()[0])
    assert groups == {
        "make": ["prepare", "export", "train", "build"],
        "tune": ["calibrate", "quantise", "tree"],
        "run": ["generate", "serve", "triton"],
        "check": ["verify", "bench", "compare", "inspect", "debug"],
        "advise": ["plan", "doctor", "demo", "figure"],
    }
    modules = {path.stem for path in (SOURCE / "medusa_deploy" / "tools" / "verbs").glob("*.py")} - {"__init__"}
    assert modules == {verb for verbs in groups.values() for verb in verbs}, "every verb stands in one group"


def test_help_takes_at_most_150_ms() -> None:
    spent = []
    for _ in range(5):
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        process = subprocess.Popen([sys.executable, "-m", "medusa_deploy", "--help"], env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        spent.append(used.ru_utime + used.ru_stime)
    assert min(spent) <= 0.15, "seconds of a processor, which other work on the machine doesn't change"


def test_without_a_verb_the_help_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "verbs:" in shown.err


def test_an_unknown_verb_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exprot", "model"]) == cli.USAGE
    assert "unknown verb 'exprot'; did you mean export?" in capsys.readouterr().err
    assert cli.main(["zzz"]) == cli.USAGE
    assert "verbs: prepare, export" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--nonsense"], ["stub", "--nonsense"], ["stub", "--fl", "1"], ["stub", "extra"]])
def test_unknown_options_and_abbreviations_are_usage_errors(
    arguments: list[str], verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(lambda: 0)
    assert cli.main(arguments) == cli.USAGE
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_code_of_a_verb_is_the_code_of_the_program(verb: Callable[[Callable[[], int]], None]) -> None:
    verb(lambda: 1)
    assert cli.main(["stub"]) == 1


def test_an_error_of_the_user_is_a_message_and_a_hint(
    verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raiser(CapacityError("300 tokens exceed the capacity of 256", hint="shorten the prompt")))
    assert cli.main(["stub"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "error: 300 tokens exceed the capacity of 256\nhint: shorten the prompt\n"


def test_no_hint_leaves_no_empty_line(verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raiser(DeployError("it broke")))
    cli.main(["stub"])
    assert capsys.readouterr().err == "error: it broke\n"


def test_anything_else_is_our_bug_with_a_traceback(
    verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raiser(ZeroDivisionError("inside")))
    assert cli.main(["stub"]) == cli.BUG
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "ZeroDivisionError: inside" in shown
    assert "report" in shown


def test_an_interrupt_ends_with_130(verb: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raiser(KeyboardInterrupt()))
    assert cli.main(["stub"]) == cli.INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--version"], ["doctor"]])
def test_a_reader_that_went_away_is_no_error_message(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as stdout:
        result = program(*arguments, stdout=stdout, stderr=subprocess.PIPE)
    assert result.stderr == ""
    assert result.returncode == cli.BROKEN_PIPE


def test_the_package_runs_as_a_module() -> None:
    result = program("--version", capture_output=True)
    assert (result.returncode, result.stdout) == (0, f"medusa-deploy {medusa_deploy.__version__}\n")
