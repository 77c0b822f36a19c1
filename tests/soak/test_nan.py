"""NaN at six points of a request ends that request alone, and the slot serves the next one as if nothing had been."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")

from medusa_deploy.runtime import load
from medusa_deploy.runtime.executors.step_plan import SlotResult, SlotRows, StepPlan, StepResult
from medusa_deploy.runtime.session import Session
from support.raw_http import ask
from support.server import drafting, serving
from support.text import encode

_MARK = "ZZQ"  # how the victim's prompt begins
_VICTIM = _MARK + "abcdefghijklmnopqrstuvwxyz" * 2  # several chunks of 16
POINTS = ("first chunk", "last chunk", "plain step", "heads", "accepted rows", "logits")


class _Poison:
    """Stands before an executor and makes NaN of the victim's results at one point, once it is armed."""

    def __init__(self, session: Session) -> None:
        self.point: str | None = None
        self.struck = 0
        self._run, self._slot, self._read = session.executor.run, -1, 0
        session.executor.run = self.run  # type: ignore[method-assign]

    def run(self, plan: StepPlan) -> StepResult:
        found = self._run(plan)
        if self.point is None:
            return found
        return StepResult(tuple([self._looked(rows, each) for rows, each in zip(plan.active, found.slots, strict=True)]))

    def _looked(self, rows: SlotRows, found: SlotResult | Exception) -> SlotResult | Exception:
        mark = encode(_MARK)
        if rows.tokens[: len(mark)].tolist() == mark:
            self._slot, self._read = rows.slot, 0
        if rows.slot != self._slot or isinstance(found, Exception):
            return found
        if rows.prefills:
            self._read += rows.count
        if not self._strikes(rows, found):
            return found
        self.struck, self._slot = self.struck + 1, -1
        outputs = {name: getattr(found, name) for name in ("log_probs", "logits", "hidden")}
        nan = {name: np.full_like(value, np.nan) for name, value in outputs.items() if value is not None}
        return replace(found, finite=False, **nan)

    def _strikes(self, rows: SlotRows, found: SlotResult) -> bool:
        decoding = not rows.prefills and self._read >= len(_VICTIM) - 1
        return {
            "first chunk": rows.prefills,
            "last chunk": rows.prefills and self._read >= len(_VICTIM) - 1,
            "plain step": decoding and rows.count == 1 and not rows.wanted.heads,
            "heads": decoding and rows.wanted.heads,
            "accepted rows": decoding and rows.count > 1 and found.last_row > 0,
            "logits": decoding and found.logits is not None,
        }[str(self.point)]


def _body(prompt: str, point: str) -> dict[str, Any]:
    sampled = {"temperature": 0.8, "seed": 5} if point == "logits" else {"temperature": 0}
    return {"prompt": prompt, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True, **sampled}


@pytest.mark.parametrize("point", POINTS)
def test_nan_ends_its_own_request(
    point: str, speaking_bundle: Path, amount: Callable[[int, int], int], figures: dict[str, Any]
) -> None:
    session = load(speaking_bundle, slots=3, threads=1, prefix_cache=False)
    drafting(session, 1 if point == "plain step" else 8)
    poison, mates = _Poison(session), ["mate one", "and mate two"]

    async def among_mates(port: int) -> list[tuple[int, Any]]:
        asked = [ask(port, "/v1/completions", _body(prompt, point)) for prompt in (*mates, _VICTIM)]
        return [(status, json.loads(body)) for status, body in await asyncio.gather(*asked)]

    with serving(session) as server:
        port = int(server.url.rpartition(":")[2])
        alone = [server.http.post("/v1/completions", json=_body(prompt, point)).json()["choices"] for prompt in (*mates, _VICTIM)]
        times = amount(2, 50)
        for index in range(times):
            poison.point = point
            *others, (status, error) = asyncio.run(among_mates(port))
            assert poison.struck == index + 1 and status == 500 and error["error"]["code"] == "NumericsError", error
            assert [answer["choices"] for _, answer in others] == alone[:2]
            poison.point = None
            after = asyncio.run(among_mates(port))
            assert [answer["choices"] for _, answer in after] == alone
        assert session.slots.free == 3
    figures.setdefault("nan", {})[point] = {"struck": times, "other answers equal": 5 * times}
