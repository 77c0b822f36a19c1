"""Tables, JSON reports and progress."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from medusa_deploy.runtime.errors import OutputError
from medusa_deploy.tools.console import Progress, emit, facts, human_bytes, human_seconds, positive_int, table, write_json


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class GoneTerminal(Terminal):
    """A terminal whose other end was closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(len(text))


@dataclass(frozen=True)
class Fact:
    path: Path
    values: tuple[int, ...]


# -- text ----------------------------------------------------------------------------------------------------------


def test_a_table_aligns_numbers_to_the_right_and_text_to_the_left() -> None:
    text = table([["plain", 12.5, None], ["medusa", 1234.5678, "≥ 3"]], ["mode", "tokens/s", "n"])
    assert text == (
        "mode    tokens/s    n\n"
        "──────  ────────  ───\n"
        "plain       12.5\n"
        "medusa      1235  ≥ 3"
    )  # fmt: skip


def test_a_table_without_rows_has_headers() -> None:
    assert table([], ["a", "b"]).splitlines()[0] == "a  b"


def test_facts_stand_in_columns() -> None:
    assert facts({"a": 1, "long name": "x", "none": ""}) == "a          1\nlong name  x\nnone"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (538090408, "513 MiB"), (17 << 30, "17.00 GiB")]
)
def test_bytes_read_by_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (59.9, "59.9 s"), (245, "4:05"), (3723, "1:02:03")])
def test_seconds_read_by_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_a_positive_integer_is_at_least_one(text: str) -> None:
    assert positive_int("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="not an integer from 1"):
        positive_int(text)


# -- JSON ----------------------------------------------------------------------------------------------------------


def test_reports_hold_records_paths_numpy_values_and_no_nan(tmp_path: Path) -> None:
    report = {"fact": Fact(Path("a/b"), (1, 2)), "array": np.arange(3), "scalar": np.float32(0.5), "nan": float("nan"), 3: np.inf}
    write_json(report, tmp_path / "new" / "report.json")
    read = json.loads((tmp_path / "new" / "report.json").read_text("utf-8"))
    assert read == {"fact": {"path": "a/b", "values": [1, 2]}, "array": [0, 1, 2], "scalar": 0.5, "nan": None, "3": None}


def test_a_report_on_stdout_replaces_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    emit("for a person", {"a": 1}, "-")
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    emit("for a person", {"a": 1}, None)
    assert capsys.readouterr().out == "for a person\n"


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json({"version": 1}, path)
    with pytest.raises(TypeError):
        write_json({"version": object()}, path)
    assert json.loads(path.read_text("utf-8")) == {"version": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_over_a_folder_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't write") as caught:
        write_json({}, tmp_path)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


# -- progress ------------------------------------------------------------------------------------------------------


def test_progress_of_short_work_is_silent_where_nobody_watches() -> None:
    stream = io.StringIO()
    with Progress("working", 3, stream) as progress:
        progress.update(3, "note")
        progress.phase("more")
    assert stream.getvalue() == ""


def test_long_work_leaves_a_line_now_and_then_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    with Progress("training", 1000, stream) as progress:
        for step in range(100):
            now = float(step)
            progress.update(step, "loss 2.5")
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["30/1000", "60/1000", "90/1000"]
    assert lines[0] == "training  30/1000  1/s  ETA 16:10  loss 2.5"


def test_progress_shows_how_far_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 200, 2))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    stream = Terminal()
    with Progress("answering", 40, stream) as progress:
        progress.update(10)
        progress.update(20, "note")
    shown = stream.getvalue()
    assert "answering  10/40" in shown
    assert "20/40" in shown
    assert "/s  ETA" in shown
    assert "note" in shown
    assert shown.endswith("\n")


def test_progress_does_not_count_what_an_earlier_run_did(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = Terminal()
    with Progress("training", None, stream) as progress:
        now = 1.0
        progress.update(900, total=1000)
        now = 11.0
        progress.update(910)
    assert "910/1000  1/s  ETA 1:30" in stream.getvalue()


def test_phases_end_with_their_time() -> None:
    stream = Terminal()
    with Progress("first", stream=stream) as progress:
        progress("second")
    lines = [line.split("\r")[-1] for line in stream.getvalue().removesuffix("\n").split("\n")]
    assert [line.split("  ")[0] for line in lines] == ["first", "second"]


def test_a_line_is_never_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with Progress("a label that goes on", 3, stream) as progress:
        progress.update(3, "x" * 100)
    assert max(len(part.removesuffix("\x1b[K")) for part in stream.getvalue().splitlines()) <= 19


def test_a_terminal_that_went_away_does_not_stop_the_work() -> None:
    with Progress("working", 2, GoneTerminal()) as progress:
        progress.update(1)
        progress.update(2)
        done = True
    assert done
