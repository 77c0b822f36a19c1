"""bench --serve: a real server is driven, honest arithmetic, complete reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.tools import cli
from medusa_deploy.tools.slots.http_client import Server, Stream
from medusa_deploy.tools.slots.open_loop import Load, Target, summary


def stream(due: float, arrivals: list[float], sizes: list[int], *, queued: float | None = None) -> Stream:
    return Stream(due, 200, arrivals, sizes, queued, finished=True)


def test_goodput_counts_answers_that_kept_both_targets_among_all_that_came() -> None:
    kept, late, slow = stream(0, [0.5, 0.7], [1, 2], queued=0.2), stream(0, [1.5, 1.6], [1, 1]), stream(0, [0.5, 1.5], [1, 2])
    refused, failed = Stream(0, 429), Stream(0)
    found = summary(Load([kept, late, slow, refused, failed], [0.01, 0.04], 2.0), Target(1.0, 0.1))
    assert (found["requests"], found["finished"], found["refused"], found["failed"]) == (5, 3, 1, 1)
    assert found["goodput_per_s"] == 0.5 and found["goodput_share"] == 0.2 and found["slowest_health_s"] == 0.04
    assert found["tokens_per_s"] == 4.0 and found["queue_s"] == {"p50": 0.2, "p99": 0.2}
    assert found["first_token_s"] == {"p50": 0.5, "p99": 1.5}
    assert found["token_gap_s"]["p99"] == 0.5, "a piece of two tokens counts twice, each with half of its gap"


def test_without_an_answer_there_are_no_quantiles() -> None:
    found = summary(Load([Stream(0)], [], 1.0), Target())
    assert found["first_token_s"] is None and found["token_gap_s"] is None and found["goodput_per_s"] == 0


@pytest.mark.parametrize("url", ["localhost:80", "https://x", "ftp://x", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        Server(url)


def test_a_real_server_is_driven(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", str(tiny_bundle), "--serve", "--rates", "5,20", "--seconds", "1", "--streams", "6", "--count", "4"]
    html = tmp_path / "page.html"
    asked += ["--max-new-tokens", "12", "--threads", "1", "--repeats", "1"]
    assert cli.main([*asked, "--html", str(html), "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [load["rate"] for load in report["loads"]] == [5, 20]
    for load in (*report["loads"], report["crowd"]):
        assert load["requests"] == load["finished"] > 0 and load["failed"] == load["refused"] == 0
        assert 0 < load["first_token_s"]["p50"] <= load["first_token_s"]["p99"] and load["token_gap_s"] and load["queue_s"]
        assert 0 < load["slowest_health_s"] < 30 and 0 <= load["goodput_share"] <= 1
    assert report["crowd"]["fairness"] >= 1 and report["one_stream"]["in_process_s"] > 0
    assert "<svg" in html.read_text("utf-8") and "under load" in html.read_text("utf-8")


def test_options_that_do_not_fit_are_refused(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(tiny_bundle), "--serve", "--sweep"]) == 1
    assert "--sweep can't be measured with --serve" in capsys.readouterr().err
