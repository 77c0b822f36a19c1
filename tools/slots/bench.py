"""Times a session that answers several prompts at a time: plainly, with fixed and with chosen rows, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...runtime.errors import UsageError
from ...runtime.request import Request
from ...runtime.session import Session
from ...runtime.tree import ROOT_ONLY
from ..environment import rounds_activations
from ..measure.timed_run import Way, in_turn
from ..prompt_source import check_room
from .report import summarise
from .users import Block, serve

Advance = Callable[[int, str], object]
_WARMUP_TOKENS = 16


def slots_bench(
    session: Session,
    prompts: Sequence[list[int]],
    slots: Sequence[int],
    *,
    fixed_rows: Sequence[int] = (),
    max_new_tokens: int = 128,
    repeats: int = 3,
    warmup: int = 1,
    progress: Advance = lambda _done, _note: None,
) -> dict[str, Any]:
    """Answer all prompts, N at a time for each N of ``slots``, in each of the ways of :func:`slot_ways`, ``repeats`` times.

    The ways follow each other at each N and take turns in going first. N users ask at once, and each asks the next prompt when
    its answer has ended, so the last answers of a block have less company.

    Figures of each way: ``tokens_per_s`` of all answers by the block's time, prefills included (median of repeats);
    ``steady_tokens_per_s``, until the first user has nothing left to ask, and ``of_plain``, its ratio to plain decoding's;
    ``request_tokens_per_s``, an answer's tokens after its first chunk by their time; ``first_token_s``, from asking to the
    first chunk; ``chunk_gap_s``, between one chunk and the next, as a user sees it; ``token_gap_s``, where a chunk of k tokens
    counts k times, each a k-th of its gap. ``tokens_per_chunk`` is a mean, as are ``rows`` of a step and
    ``mean_acceptance_length``. ``equal`` says whether each prompt got the same tokens in every block.

    Raises:
        CapacityError: a prompt doesn't fit.
        UsageError: nothing to measure, or fewer prompts or slots than are to be used at a time.
    """
    ways = slot_ways(session, fixed_rows)
    check_users(session, max(slots, default=0), prompts)
    if repeats < 1 or max_new_tokens < 2:
        raise UsageError(f"{repeats} repeats, {max_new_tokens} tokens", hint="at least 1 repeat and 2 tokens")
    check_room(session, list(prompts), max_new_tokens)
    for _ in range(warmup):
        for way in ways.values():
            serve(session, _requests(prompts[: max(slots)], way, min(max_new_tokens, _WARMUP_TOKENS)), max(slots))
    blocks: dict[int, dict[str, list[Block]]] = {count: {name: [] for name in ways} for count in slots}
    done = 0
    for repeat in range(repeats):
        for place, count in enumerate(slots):
            for name in in_turn(ways, repeat + place):
                progress(done, f"{count} at a time, {name}")
                blocks[count][name].append(serve(session, _requests(prompts, ways[name], max_new_tokens), count))
                progress(done := done + 1, f"{count} at a time, {name}")
    settings = {"prompts": len(prompts), "repeats": repeats, "max_new_tokens": max_new_tokens}
    machine = {"loaded_slots": session.slots.slots, "rounds_activations": rounds_activations(session)}
    return {**settings, **machine, **summarise(blocks)}


def slot_ways(session: Session, fixed_rows: Sequence[int] = ()) -> dict[str, Way]:
    """Ways to compare: ``plain``; ``rows_N`` in every step, N of ``fixed_rows`` or else of the bundle's tree; ``chosen``."""
    fixed = [rows for rows in fixed_rows or (session.tree.rows,) if rows > 1]
    ways = {"plain": Way(ROOT_ONLY), **{f"rows_{rows}": Way(rows=rows, lookup=True) for rows in fixed}}
    return ways | {"chosen": Way(lookup=True)}


def check_users(session: Session, users: int, prompts: Sequence[list[int]]) -> None:
    """Refuse before the first step what can't keep so many users busy.

    Raises:
        UsageError: there are fewer slots or prompts than users, or no users.
    """
    if not 1 <= users <= session.slots.slots:
        raise UsageError(f"{users} requests at a time, the session has {session.slots.slots} slots", hint="load more slots")
    if len(prompts) < users:
        raise UsageError(f"{len(prompts)} prompts for {users} requests at a time", hint=f"give at least {users} prompts: --count")


def _requests(prompts: Sequence[list[int]], way: Way, max_new_tokens: int) -> list[Request]:
    return [Request(token_ids=prompt, max_new_tokens=max_new_tokens, **way.options) for prompt in prompts]
