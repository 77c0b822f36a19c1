"""bench --slots: every prompt answered once, honest arithmetic, complete reports; a long prompt among streams."""

from __future__ import annotations

import json
import re
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime import load
from medusa_deploy.runtime.errors import CapacityError, DeployError, UsageError
from medusa_deploy.runtime.request import Request
from medusa_deploy.runtime.session import Session
from medusa_deploy.tools import cli
from medusa_deploy.tools.prompt_source import random_prompts
from medusa_deploy.tools.slots.bench import slots_bench
from medusa_deploy.tools.slots.long_prompt import describe_long_prompt, long_prompt_bench
from medusa_deploy.tools.slots.report import chunks_after_first, describe, gaps, quantiles, summarise
from medusa_deploy.tools.slots.users import Answer, Block, serve

PROMPTS = random_prompts(128, 256, 6, seed=5)


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return load(tiny_bundle, threads=1, slots=4)


def answer(prompt: int, submitted: float, arrivals: list[float], sizes: list[int], token: int = 7) -> Answer:
    return Answer(prompt, submitted, [token] * sum(sizes), arrivals, sizes)


def test_so_many_users_ask_at_once_and_every_prompt_is_answered_in_full(session: Session):
    together: list[int] = []

    class Counting:
        rows, heads = 1, False
        running = 0

        def draft(self, candidates: Any) -> Any:
            from medusa_deploy.runtime.drafting.draft import NOTHING

            together.append(session.slots.slots - session.slots.free)
            return NOTHING

    block = serve(session, [Request(token_ids=prompt, max_new_tokens=9, drafting=Counting()) for prompt in PROMPTS], 3)
    assert [found.prompt for found in block.answers] == list(range(len(PROMPTS)))
    for found, prompt in zip(block.answers, PROMPTS, strict=True):
        assert found.tokens == session.generate(token_ids=prompt, max_new_tokens=9, speculative=False).token_ids
        assert sum(found.sizes) == len(found.tokens)
        assert found.arrivals == sorted(found.arrivals)
        assert found.submitted < found.arrivals[0]
    assert max(together) == 3
    assert block.seconds >= max(found.arrivals[-1] - found.submitted for found in block.answers)
    assert session.slots.free == 4


def test_a_refused_request_ends_the_block_and_frees_its_slots(session: Session):
    requests = [Request(token_ids=prompt, max_new_tokens=200) for prompt in PROMPTS[:2]]
    with pytest.raises(DeployError):
        serve(session, [*requests, Request(token_ids=PROMPTS[0], max_new_tokens=9999)], 3)
    assert session.slots.free == 4
    assert threading.active_count() == 1 or not [each for each in threading.enumerate() if "ThreadPool" in each.name]


def test_quantiles_are_values_that_were_measured():
    assert quantiles(range(1, 101)) == {"p50": 50, "p99": 99}
    assert quantiles([3.0]) == {"p50": 3.0, "p99": 3.0}


def test_a_chunk_of_k_tokens_is_one_gap_by_chunk_and_k_by_token():
    found = answer(0, 0.0, [1.0, 1.3, 1.5], [1, 3, 1])
    each = [(gap, size) for _, gap, size in chunks_after_first(found)]
    assert [gap for gap, _ in each] == pytest.approx([0.3, 0.2])
    report = gaps(each)
    assert report["chunk_gap_s"] == pytest.approx({"p50": 0.2, "p99": 0.3})
    assert report["token_gap_s"] == pytest.approx({"p50": 0.1, "p99": 0.2})
    assert report["tokens_per_chunk"] == 2
    assert found.first_token_seconds == 1.0
    assert found.tokens_per_s == pytest.approx(4 / 0.5)


def test_the_arithmetic_of_a_block():
    plain = Block([answer(0, 0.0, [1.0, 2.0], [1, 1]), answer(1, 0.0, [1.0, 1.5], [1, 1])], 2.0, 1.0)
    fast = Block([answer(0, 0.0, [0.5, 1.0], [1, 1]), answer(1, 0.0, [0.5, 1.0], [1, 1], token=8)], 1.0, 0.9)
    report = summarise({2: {"plain": [plain, plain], "chosen": [fast]}})
    [entry] = report["slots"]
    assert entry["slots"] == 2
    assert entry["plain"]["tokens_per_s"] == 2
    assert entry["plain"]["of_plain"] == 1
    assert entry["plain"]["steady_tokens_per_s"] == 2  # three of the tokens came before the first user was idle, at 1.5 s
    assert entry["chosen"]["of_plain"] == 2
    assert entry["plain"]["request_tokens_per_s"] == {"median": 1.5, "worst": 1.0}
    assert entry["plain"]["host_fraction"] == 0.5
    assert report["equal"] == {"prompts": 1, "of": 2, "different": [1]}
    assert "DIFFERENT output for prompt 2" in describe({**report, "rounds_activations": False})


def test_answers_of_one_chunk_leave_nothing_to_measure():
    with pytest.raises(UsageError, match="first chunk"):
        summarise({1: {"plain": [Block([answer(0, 0.0, [1.0], [1])], 1.0, 1.0)]}})


@pytest.mark.parametrize(
    ("slots", "options"),
    [((5,), {}), ((), {}), ((4,), {"prompts": PROMPTS[:3]}), ((1,), {"repeats": 0}), ((1,), {"max_new_tokens": 1})],
)
def test_what_cannot_be_measured_is_refused(session: Session, slots: tuple[int, ...], options: dict[str, Any]):
    with pytest.raises(UsageError):
        slots_bench(session, options.pop("prompts", PROMPTS), slots, **options)


def test_the_verb_reports_every_way_at_every_load(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output, page = tmp_path / "slots.json", tmp_path / "slots.html"
    options = ["--slots", "1,3", "--fixed-rows", "4", "--count", "3", "--max-new-tokens", "8", "--repeats", "2"]
    assert cli.main(["bench", str(tiny_bundle), *options, "--json", str(output), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "with 3 at a time" in shown.splitlines()[0]
    report = json.loads(output.read_text())
    assert report["equal"] == {"prompts": 3, "of": 3, "different": []}
    assert [entry["slots"] for entry in report["slots"]] == [1, 3]
    for entry in report["slots"]:
        assert list(entry) == ["slots", "plain", "rows_4", "chosen"]
        for way in ("plain", "rows_4", "chosen"):
            for name in ("first_token_s", "chunk_gap_s", "token_gap_s"):
                assert 0 < entry[way][name]["p50"] <= entry[way][name]["p99"]
            assert entry[way]["request_tokens_per_s"]["worst"] > 0
            assert len(entry[way]["seconds"]) == 2
        assert entry["plain"]["tokens_per_chunk"] == 1
        assert entry["rows_4"]["rows"] == 4
    html = page.read_text()
    for drawn in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(drawn)  # noqa: S314 what we drew ourselves
    assert html.count("<svg") == 4
    assert "<script" not in html

    assert cli.main(["bench", str(tiny_bundle), *options, "--html", str(page)]) == 1, "the page exists"
    assert page.read_text() == html


@pytest.mark.parametrize(
    "wrong",
    [
        ["--slots", "2", "--tree", "chain"],
        ["--slots", "2", "--temperature", "0.7"],
        ["--slots", "2", "--sweep"],
        ["--slots", "2,3", "--long-prompt", "64"],
        ["--slots", "9"],
        ["--long-prompt", "64", "--html", "page.html"],
        ["--html", "page.html"],
    ],
)
def test_options_that_do_not_go_together_are_refused(tiny_bundle: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", str(tiny_bundle), "--count", "4", *wrong]) == 1
    assert "hint:" in capsys.readouterr().err
    assert not Path("page.html").exists()


def test_a_long_prompt_comes_while_others_stream(session: Session):
    report = long_prompt_bench(session, PROMPTS, 100, streams=2, repeats=2)
    assert next(iter(report["ways"])) == "plain"
    assert report["prefill_chunk"] == 16
    for side in report["ways"].values():
        assert side["during"]["chunks"] >= 2 * 2 * 100 // 16, "each chunk of the prompt lets each stream go on by a step"
        assert side["during"]["longest_s"] >= side["during"]["chunk_gap_s"]["p99"]
        assert side["limit_s"] > side["chunk_s"] > 0
        assert side["met"] == (side["during"]["chunk_gap_s"]["p99"] <= side["limit_s"])
    assert "2 streams while a prompt of 100 tokens is read, 2 times" in describe_long_prompt(report)
    assert session.slots.free == 4


def test_streams_that_end_before_the_long_prompt_was_read_are_no_measurement(session: Session):
    crowded = [[1] * 252, [2] * 252]  # leave room for 4 tokens each
    with pytest.raises(UsageError, match="a stream ended after"):
        long_prompt_bench(session, crowded, 200, streams=2)
    assert session.slots.free == 4


def test_a_long_prompt_that_does_not_fit_is_refused(session: Session):
    with pytest.raises(CapacityError, match="the capacity is 256"):
        long_prompt_bench(session, PROMPTS, 256, streams=2)
    with pytest.raises(UsageError, match="4 streams and a prompt"):
        long_prompt_bench(session, PROMPTS, 64, streams=4)


def test_the_verb_measures_a_long_prompt(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--long-prompt", "48", "--slots", "2", "--count", "2", "--repeats", "1", "--json", "-"]
    assert cli.main(["bench", str(tiny_bundle), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["long_prompt"], report["streams"]) == (48, 2)
    assert {"plain", "chosen"} <= report["ways"].keys()
