"""Text from a bundle: what goes to which stream, which prompt is sent, and every way to ask wrongly."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_deploy import runtime
from medusa_deploy.runtime import Session
from medusa_deploy.runtime.errors import PromptError
from medusa_deploy.tools.cli import USAGE, USER_ERROR, main
from medusa_deploy.tools.verbs import generate as verb
from support.fake_executor import fake_session
from support.tiny import EOS

Load = Callable[[Session], None]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Makes the verb run on a session of ours."""

    def give(session: Session) -> None:
        monkeypatch.setattr(runtime, "load", lambda bundle, **options: session)

    return give


@pytest.fixture
def talking(tmp_path: Path, load: Load) -> Session:
    pytest.importorskip("tokenizers")
    pytest.importorskip("minijinja")
    session = fake_session(text_folder=tmp_path, eos_token_ids=(EOS,))
    load(session)
    return session


@pytest.fixture
def silent(load: Load) -> Session:
    """A session without a tokenizer."""
    session = fake_session()
    load(session)
    return session


def _run(*arguments: str) -> int:
    return main(["generate", "BUNDLE", *arguments])


def test_a_prompt_goes_through_the_chat_template(talking: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("Hi!", "--system", "Be kind.", "-n", "20", "--ignore-eos") == 0
    shown = capsys.readouterr()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"}]
    assert shown.out == talking.generate(messages=messages, max_new_tokens=20, ignore_eos=True).text + "\n"
    assert "20 tokens" in shown.err
    assert "mean acceptance length" in shown.err
    assert shown.err.rstrip().endswith("finish: length")


def test_raw_sends_the_text_itself(talking: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("Once", "--raw", "-n", "12", "--ignore-eos") == 0
    assert capsys.readouterr().out == talking.generate("Once", max_new_tokens=12, ignore_eos=True).text + "\n"


@pytest.mark.parametrize("arguments", [["-"], []])
def test_a_prompt_comes_from_stdin(
    arguments: list[str], talking: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n"))
    assert _run(*arguments, "--raw", "-n", "12") == 0
    assert capsys.readouterr().out == talking.generate("Once", max_new_tokens=12).text + "\n"


def test_plain_and_speculative_text_are_equal_and_plain_accepts_nothing(
    talking: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, reports = [], []
    for options in (["--plain"], ["--rows", "6"]):  # whether rows pay depends on measured times
        path = tmp_path / "report.json"
        assert _run("Hi!", "-n", "40", "--json", str(path), *options) == 0
        texts.append(capsys.readouterr().out)
        reports.append(json.loads(path.read_text("utf-8")))
    assert texts[0] == texts[1]
    assert reports[0]["mean_acceptance_length"] == 1.0
    assert reports[1]["steps"] < reports[0]["steps"]
    assert talking.slots.free == 1


def test_text_is_written_as_it_is_made(talking: Session) -> None:
    pieces: list[str] = []
    report = verb.generate(talking, write=pieces.append, prompt="Once", max_new_tokens=30, ignore_eos=True)
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == report["text"]


def test_json_on_stdout_is_all_there_is(talking: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("Hi!", "-n", "8", "--ignore-eos", "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    expected = talking.generate(messages=[{"role": "user", "content": "Hi!"}], max_new_tokens=8, ignore_eos=True)
    assert (report["text"], report["token_ids"], report["finish_reason"]) == (expected.text, expected.token_ids, "length")


def test_a_stop_text_ends_the_output(talking: Session, capsys: pytest.CaptureFixture[str]) -> None:
    whole = talking.generate("Once", max_new_tokens=40, ignore_eos=True).text
    stop = whole[20:22]
    assert _run("Once", "--raw", "-n", "40", "--ignore-eos", "--stop", stop, "--stop", "never!") == 0
    shown = capsys.readouterr()
    assert shown.out == whole[: whole.index(stop)] + "\n"
    assert "finish: stop" in shown.err


def test_equal_seeds_give_equal_text(talking: Session, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("5", "5", "6"):
        assert _run("Hi!", "-n", "30", "--mode", "sample", "--temperature", "1.5", "--seed", seed, "--ignore-eos") == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_bias_keeps_a_token_out(silent: Session, capsys: pytest.CaptureFixture[str]) -> None:
    first = silent.generate(token_ids=[4, 5], max_new_tokens=1).token_ids[0]
    assert _run("--token-ids", "4,5", "-n", "1", "--logit-bias", f"{first}=-1000") == 0
    assert int(capsys.readouterr().out) != first


def test_without_a_tokenizer_token_ids_go_in_and_out(silent: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--token-ids", "1,2, 3", "-n", "9") == 0
    expected = silent.generate(token_ids=[1, 2, 3], max_new_tokens=9).token_ids
    assert capsys.readouterr().out == " ".join(map(str, expected)) + "\n"


def test_the_default_length_is_what_the_capacity_leaves(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    load(fake_session(capacity=48))
    assert _run("--token-ids", ",".join(["7"] * 28)) == 0
    assert len(capsys.readouterr().out.split()) == 20
    assert _run("--token-ids", ",".join(["7"] * 28), "-n", "21") == USER_ERROR
    assert "28 prompt tokens + 21 new tokens exceed the capacity of 48" in capsys.readouterr().err


def test_a_tree_is_named_or_read_and_a_cut_one_is_said(
    silent: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tree.json"
    path.write_text("[[0], [1]]", "utf-8")
    report = tmp_path / "report.json"
    assert _run("--token-ids", "1", "-n", "5", "--tree", str(path), "--json", str(report)) == 0
    stats = json.loads(report.read_text("utf-8"))
    assert stats["rows"] == 3 * stats["steps"]
    capsys.readouterr()
    assert _run("--token-ids", "1", "-n", "5", "--tree", "published") == 0
    assert "note: the tree published is cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ([""], "the prompt is empty", "at least one"),
        (["Hi", "--token-ids", "1"], "--token-ids is a whole prompt", "leave out PROMPT"),
        (["Hi", "--raw", "--system", "x"], "--system needs a chat template", "--raw"),
        (["--token-ids", "1,999"], "token ids must be in 0 … 127", "tokenizer"),
        (["Hi", "--temperature", "0.5"], "temperature is 0.5", "sample"),
        (["Hi", "--top-k", "-1", "--mode", "sample"], "top_k is -1", "positive"),
        (["Hi", "--tree", "bush"], "no tree 'bush'", "chain"),
        (["Hi", "--stop", ""], "", ""),
    ],
)
def test_a_wrong_request_is_a_message_with_a_hint(
    arguments: list[str], message: str, hint: str, talking: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*arguments) == USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]
    assert talking.slots.free == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--token-ids", "1,x"],
        ["-n", "0"],
        ["--mode", "best"],
        ["--logit-bias", "3"],
        ["--seed", "x"],
        ["--plain", "--tree", "chain"],
        ["a", "b"],
    ],
)
def test_a_malformed_option_is_a_usage_error(arguments: list[str]) -> None:
    assert _run(*arguments) == USAGE


def test_text_for_a_bundle_of_token_ids_is_refused(silent: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert silent.codec is None
    assert _run("Hi") == USER_ERROR
    assert "--token-ids" in capsys.readouterr().err


def test_a_terminal_is_not_waited_for() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with pytest.raises(PromptError, match="no prompt"):
        verb.read_prompt(None, Terminal())
    assert verb.read_prompt("-", Terminal("typed\n")) == "typed"


def test_stdin_that_is_not_text_is_refused() -> None:
    with pytest.raises(PromptError, match="byte 3 is 0xff"):
        verb.read_prompt("-", io.TextIOWrapper(io.BytesIO(b"abc\xff"), "utf-8"))


def test_a_reader_that_goes_away_frees_the_slot(talking: Session) -> None:
    def gone(text: str) -> None:
        raise BrokenPipeError(len(text))

    with pytest.raises(BrokenPipeError):
        verb.generate(talking, write=gone, prompt="Once", max_new_tokens=5)
    assert talking.slots.free == 1


def test_a_missing_bundle_is_a_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", str(tmp_path / "none"), "Hi"]) == USER_ERROR
    assert "is not a bundle" in capsys.readouterr().err


def test_a_real_bundle_generates_its_greedy_tokens(
    tiny_bundle: Path, tiny_session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tiny_bundle), "--token-ids", "5 6 7", "-n", "24", "--ignore-eos", "--threads", "1"]) == 0
    expected = tiny_session.generate(token_ids=[5, 6, 7], max_new_tokens=24, ignore_eos=True, tree=runtime.ROOT_ONLY)
    assert capsys.readouterr().out.split() == [str(token) for token in expected.token_ids]


def test_an_answer_of_a_form(talking: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    (tmp_path / "schema.json").write_text('{"enum": ["red", "blue"]}', "utf-8")
    (tmp_path / "colour.lark").write_text('start: "red" | "blue"', "utf-8")
    forms = {'"red" "blue"': ("--json-schema", str(tmp_path / "schema.json")), "12 21 11 22": ("--regex", "[12]{2}")}
    forms["red blue"] = ("--grammar", str(tmp_path / "colour.lark"))
    for answers, form in forms.items():
        assert _run("Hi!", *form) == 0
        assert capsys.readouterr().out.strip() in answers.split()


def test_a_form_that_cannot_be_read_or_used(talking: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for form in (("--json-schema", str(tmp_path / "none")), ("--grammar", str(tmp_path / "bytes")), ("--regex", "(a")):
        assert _run("Hi!", *form) == USER_ERROR
        assert "Error" not in capsys.readouterr().out
