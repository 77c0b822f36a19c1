"""Clients of all kinds: those who read to the end, leave at any moment, reset their sockets or are in a hurry."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from support.raw_http import Connection, ask

PHASES = ("half a body", "queue", "prefill", "first token", "decode", "last tokens")
_LEAVES, _RESETS, _HURRIES = 0.35, 0.05, 0.05

Said = list[tuple[str, tuple[int, ...], str | None]]


@dataclass(frozen=True, slots=True)
class Question:
    """A request, and what is said to it when nobody else asks."""

    path: str
    body: dict[str, Any]
    alone: Said = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """What happened. ``wrong``: the first answers that weren't those of their solo runs."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str, problem: str | None = None) -> None:
        """Count an end; ``problem`` says what was wrong with it."""
        self.counts[what] += 1
        if problem is not None:
            self.counts["wrong"] += 1
            self.wrong = [*self.wrong, f"{what}: {problem}"][:10]


def questions(prompts: Sequence[str], tokens: int) -> list[Question]:
    """Ask greedily and with seeds, chats and completions, one answer or two, with stops and log-probabilities."""
    found = []
    for index, prompt in enumerate(prompts):
        chat = index % 2 == 0
        body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        body |= {"max_tokens": 4 + (index * 7) % tokens, "return_token_ids": True, "ignore_eos": index % 3 == 0}
        body |= {"temperature": 0} if index % 4 < 2 else {"temperature": 0.9, "seed": index, "top_p": 0.95}
        body |= {"n": 2} if index % 5 == 4 else {}
        body |= {"stop": ["e"]} if index % 7 == 6 else {}
        body |= {"frequency_penalty": 0.4} if index % 11 == 10 else {}
        found.append(Question("/v1/chat/completions" if chat else "/v1/completions", body))
    return found


async def answered_alone(port: int, asked: Sequence[Question]) -> list[Question]:
    """Ask each question while nobody else does."""
    found = []
    for question in asked:
        status, body = await ask(port, question.path, question.body)
        assert status == 200, body
        found.append(Question(question.path, question.body, _said(json.loads(body)["choices"])))
    return found


def _said(choices: list[dict[str, Any]]) -> Said:
    texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
    return [(text, tuple(each["token_ids"]), each["finish_reason"]) for text, each in zip(texts, choices, strict=True)]


class _Stream:
    """Puts the events of a stream together."""

    def __init__(self, choices: int) -> None:
        self.texts = [""] * choices
        self.ids: list[list[int]] = [[] for _ in range(choices)]
        self.reasons: list[str | None] = [None] * choices

    def add(self, event: dict[str, Any]) -> None:
        assert "error" not in event, event
        for choice in event["choices"]:
            place = choice["index"]
            self.texts[place] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            self.ids[place] += choice["token_ids"]
            self.reasons[place] = choice["finish_reason"] or self.reasons[place]

    @property
    def said(self) -> Said:
        return [(text, tuple(ids), reason) for text, ids, reason in zip(self.texts, self.ids, self.reasons, strict=True)]


def _differs(question: Question, said: Said) -> str | None:
    return None if said == question.alone else f"{said} instead of {question.alone} to {question.body}"


def _is_no_part(question: Question, said: Said) -> str | None:
    """Say whether an answer that was cut short isn't the beginning of the whole one."""
    for (text, ids, _), (whole, all_ids, _) in zip(said, question.alone, strict=True):
        if all_ids[: len(ids)] != ids or not whole.startswith(text):
            return _differs(question, said)
    return None


async def one_client(port: int, question: Question, chance: random.Random, tally: Tally) -> None:
    """Ask once, as a client whom ``chance`` chooses."""
    kind, body, stream = chance.random(), dict(question.body), chance.random() < 0.6
    if stream:
        body["stream"] = True
    if kind < _LEAVES + _RESETS:
        phase = chance.choice(PHASES)
        await _leaves(port, Question(question.path, body, question.alone), phase, chance, reset=kind >= _LEAVES, tally=tally)
        return
    hurried = kind < _LEAVES + _RESETS + _HURRIES
    if hurried:
        body["deadline"] = chance.choice([0.0005, 0.002, 0.01, 0.05, 0.2])
    async with Connection(port) as connection:
        await connection.send(question.path, json.dumps(body).encode())
        status = await connection.head()
        if status != 200:
            refused = json.loads(await connection.body())["error"]["code"]
            late = hurried and status == 408
            tally.note("late before the first token" if late else f"refused: {status}", None if late else refused)
            return
        if stream:
            parts = _Stream(body.get("n", 1))
            async for event in connection.events():
                parts.add(event)
            said = parts.said
        else:
            said = _said(json.loads(await connection.body())["choices"])
        if hurried and any(reason == "cancelled" for _, _, reason in said):
            tally.note("late", _is_no_part(question, said))
        else:
            tally.note("finished", _differs(question, said))


async def _leaves(port: int, question: Question, phase: str, chance: random.Random, *, reset: bool, tally: Tally) -> None:
    """Leave in ``phase``; what came until then must be the beginning of the whole answer."""
    streams, problem = bool(question.body.get("stream")), None
    sent = json.dumps(question.body).encode()
    try:
        async with Connection(port) as connection:
            await connection.send(question.path, sent, part=len(sent) // 2 if phase == "half a body" else None)
            if phase in ("prefill", "half a body"):
                await asyncio.sleep(chance.random() * 0.004)
            elif phase != "queue" and streams and await connection.head() == 200:
                wanted = max(len(ids) for _, ids, _ in question.alone)
                until = {"first token": 1, "decode": wanted // 2, "last tokens": wanted - 1}[phase]
                parts = _Stream(question.body.get("n", 1))
                async with aclosing(connection.events()) as events:  # type: ignore[type-var]
                    async for event in events:
                        parts.add(event)
                        if max(map(len, parts.ids)) >= until:
                            break
                problem = _is_no_part(question, parts.said)
            elif phase != "queue":
                await asyncio.sleep(chance.random() * 0.05)
            if reset:
                connection.reset()
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        problem = f"{type(error).__name__} in {phase}"
    tally.note(f"{'reset' if reset else 'left'} in {phase}", problem)


async def crowd(port: int, asked: Sequence[Question], count: int, at_once: int, seed: int, tally: Tally) -> None:
    """Let ``count`` clients ask, ``at_once`` at a time."""
    chance, left = random.Random(seed), iter(range(count))  # noqa: S311 - no secret

    async def clients() -> None:
        for _ in left:
            await one_client(port, chance.choice(asked), chance, tally)

    await asyncio.gather(*(clients() for _ in range(at_once)))
