"""Times plain against Medusa decoding on one engine, prompt by prompt, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...runtime.arguments import integer, integers, number
from ...runtime.errors import UsageError
from ...runtime.sampling import SamplingParams
from ...runtime.session import Session
from ...runtime.tree import ROOT_ONLY, Tree
from ..environment import plain_step_bytes, rounds_activations, variant
from ..prompt_source import check_room
from .bench_report import summarise
from .timed_run import TimedRun, Way, in_turn, timed_run

Advance = Callable[[int, str], object]
_WARMUP_TOKENS = 16


def bench(
    session: Session,
    prompts: Sequence[list[int]],
    *,
    rows: int | None = None,
    fixed_rows: Sequence[int] = (),
    tree: Tree | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 128,
    repeats: int = 3,
    warmup: int = 1,
    progress: Advance = lambda _done, _note: None,
) -> dict[str, Any]:
    """Decode every prompt in several ways, ``repeats`` times: greedily, or sampled at a ``temperature`` with one ``seed``.

        plain       one row a step, no heads
        medusa      as sessions draft by default, with ``rows`` rows a step (None: as many as pay, in each step)
        heads_only  the same without prompt lookup
        rows_N      N rows in every step, for each N of ``fixed_rows``
        fixed_tree  the rows of ``tree`` in every step, if it is given
        typical     Medusa's lossy acceptance, if tokens are sampled

    Where steps run ahead of the host and no ``rows`` are given, ``medusa`` is the bundle's tree, as sessions draft there, and
    ``best_rows`` is what ``medusa`` is elsewhere.

    The ways follow each other on each prompt and take turns in going first, so that other work of the machine hits them all.
    Rates are of decoding: tokens after the first, over the wall time of the steps. A prompt's time is the median of its
    repeats. A way's rate is all prompts' tokens over all prompts' time, and ``speedup`` is the ratio of two such rates.
    ``median_speedup`` is the median of the prompts' own ratios: text that repeats itself raises the first more than the second.

    In the report ``rows`` is the mean over steps, and ``rows_histogram`` counts the steps with 0, 1, 2 … rows. ``plain_steps``
    and ``probes`` are counted as in the session's ``Stats``; ``trust`` and ``costs`` are those of the last run.
    ``progress(done, note)`` follows each of the prompts × repeats × ways runs.

    Raises:
        CapacityError, TreeError: a prompt or the tree doesn't fit.
        UsageError: nothing to measure.
    """
    rows, fixed_rows = integer("rows", rows, None), () if fixed_rows is None else integers("fixed_rows", fixed_rows)
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 128)
    repeats, warmup = integer("repeats", repeats, 3, low=0), integer("warmup", warmup, 1, low=0)
    temperature, seed = number("temperature", temperature, 0.0), integer("seed", seed, 0, low=0)
    if not prompts or repeats < 1 or max_new_tokens < 2:
        raise UsageError(
            f"{len(prompts)} prompts, {repeats} repeats, {max_new_tokens} tokens", hint="at least 1 prompt, 1 repeat and 2 tokens"
        )
    check_room(session, list(prompts), max_new_tokens)
    ways = ways_of(session, rows, fixed_rows, tree, temperature, seed)
    for _ in range(warmup):
        for way in ways.values():
            timed_run(session, prompts[0], way, min(max_new_tokens, _WARMUP_TOKENS))
    runs: dict[str, list[list[TimedRun]]] = {name: [[] for _ in prompts] for name in ways}
    done = 0
    for repeat in range(repeats):
        for index, prompt in enumerate(prompts):
            for name in in_turn(ways, repeat + index):
                runs[name][index].append(timed_run(session, prompt, ways[name], max_new_tokens))
                progress(done := done + 1, f"prompt {index + 1}, {name}")
    report = session_report(session, runs)
    if tree is not None:
        report["fixed_tree"]["choices"] = tree.choices()
    sampled = {"temperature": temperature, "seed": seed} if temperature > 0 else {}
    return {"prompts": len(prompts), "repeats": repeats, "max_new_tokens": max_new_tokens, **sampled, **report}


def session_report(session: Session, runs: Mapping[str, Sequence[Sequence[TimedRun]]]) -> dict[str, Any]:
    """Summarise the runs of a session, see :func:`.bench_report.summarise`, with what follows from the graph that it ran."""
    report = summarise(runs)
    seconds = report["plain"]["ms_per_step"] / 1e3
    read = plain_step_bytes(session.manifest, variant(session))
    report["bandwidth_gb_s"] = None if read is None else read / seconds / 1e9
    report["rounds_activations"] = rounds_activations(session)
    return report


def ways_of(
    session: Session,
    rows: int | None,
    fixed_rows: Sequence[int] = (),
    tree: Tree | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Way]:
    """Ways that :func:`bench` compares, by name."""
    best, heads_only = (Way(rows=rows, lookup=lookup) for lookup in (True, False))
    ways = {"plain": Way(ROOT_ONLY), "medusa": best, "heads_only": heads_only}
    if rows is None and session.executor.abilities.ahead:
        heads_only = Way(rows=session.tree.rows)  # without a number, these sessions take the tree
        ways = {"plain": Way(ROOT_ONLY), "medusa": Way(session.tree), "best_rows": best, "heads_only": heads_only}
    ways |= {f"rows_{number}": Way(rows=number, lookup=True) for number in fixed_rows}
    if tree is not None:
        ways["fixed_tree"] = Way(tree)
    return _sampled(ways, temperature, seed) if temperature > 0 else ways


def _sampled(ways: Mapping[str, Way], temperature: float, seed: int) -> dict[str, Way]:
    """The ways at a temperature, where equal seeds give equal text; and typical acceptance, where they don't."""
    sampled = SamplingParams("sample", temperature=temperature, seed=seed)
    typical = Way(lookup=True, params=SamplingParams("typical", temperature=temperature))
    return {**{name: replace(way, params=sampled) for name, way in ways.items()}, "typical": typical}
