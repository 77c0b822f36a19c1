"""Thousands of clients, of whom nearly half misbehave: nothing leaks, and every finished answer is that of its run alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from soak.chaos import Tally, answered_alone, crowd, questions
from support.documents import ROOT
from support.served import Served

_REAL = ROOT / "build" / "smollm2-bundle"


def _soak(bundle: Path, prompts: list[str], tokens: int, count: int, at_once: int) -> dict[str, Any]:
    """Let the clients come in five crowds, and look at the server before and after each of them."""
    server, tally = Served(bundle, 4, max_waiting=256), Tally()
    try:
        asked = asyncio.run(answered_alone(server.port, questions(prompts, tokens)))
        asyncio.run(crowd(server.port, asked, at_once, at_once, 0, Tally()))
        before = server.settled(lambda found: found["slots"] == found["waiting"] == 0)
        rss = []
        for part in range(5):
            asyncio.run(crowd(server.port, asked, count // 5, at_once, 1 + part, tally))
            after = server.settled(lambda found: all(found[name] <= before[name] for name in found if name != "rss"))
            rss.append(after["rss"])
    finally:
        code = server.stop()
    leaked = {name: after[name] - before[name] for name in ("slots", "waiting", "tasks", "descriptors")}
    ends = dict(sorted(tally.counts.items()))
    growth = round(rss[-1] / rss[0] - 1, 4)
    return {"requests": count, "ends": ends, "leaked": leaked, "rss_growth": growth, "exit_code": code, "wrong": tally.wrong}


def _check(found: dict[str, Any]) -> None:
    assert found["wrong"] == [] and found["exit_code"] == 0
    assert all(count <= 0 for count in found["leaked"].values()), found["leaked"]
    assert sum(found["ends"].values()) == found["requests"]


def test_clients_of_all_kinds(speaking_bundle: Path, amount: Callable[[int, int], int], figures: dict[str, Any]) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    prompts = [letters[index : index + 3 + 5 * (index % 7)] * (1 + index % 4) for index in range(40)]
    found = figures["load"] = _soak(speaking_bundle, prompts, 60, amount(400, 10_000), 24)
    _check(found)
    if found["requests"] >= 10_000:
        assert found["rss_growth"] < 0.01


@pytest.mark.model
@pytest.mark.skipif(not _REAL.is_dir(), reason="there is no build/smollm2-bundle")
def test_clients_of_a_real_model(amount: Callable[[int, int], int], figures: dict[str, Any]) -> None:
    text = "the sky is blue because light of short waves is scattered more than light of long ones"
    prompts = [f"Say in a few words what {text[5 * index : 5 * index + 20 + 3 * index]} means." for index in range(12)]
    found = figures["load, SmolLM2"] = _soak(_REAL, prompts, 24, amount(60, 600), 16)
    _check(found)
