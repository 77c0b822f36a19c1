"""Compares two bundles, or two variants of one: what B lost against A in quality, and what it won in speed and size."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime.arguments import MAX_INTEGER, integer, number, settings
from ...runtime.errors import CapacityError, UsageError, VocabularyMismatchError
from ...runtime.session import Session
from ..console import Progress
from ..environment import variant
from ..extras import require
from ..measure.agreement import Agreement
from ..measure.layer_errors import layer_errors
from ..measure.variant_size import variant_size
from ..prompt_source import check_room
from .budget import QualityBudget, judge
from .hits import paired_hits
from .runs import TURNS, Decoded, acceptance, greedy_agreement, take_turns

_PROSE_ROWS = 32


def compare(
    a: Session,
    b: Session,
    prompts: Sequence[list[int]],
    *,
    prose: Sequence[list[int]] = (),
    max_new_tokens: int = 64,
    rows: int | None = None,
    tolerance: float | None = None,
    budget: QualityBudget | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure ``b`` against ``a``: two sessions of the CPU with one vocabulary.

    Both sides answer the prompts greedily, up to ``max_new_tokens`` or the end of the sequence. Then both read A's answers and
    the ``prose``. Acceptance is counted in steps of ``rows`` rows; None takes as many as A's tree has, as far as both sides
    take them. ``tolerance`` is that of ``verify``. Engines that compute layers use ``threads``. docs/compare.md lists the
    report's keys.

    Raises:
        VocabularyMismatchError: tokens of the one aren't those of the other.
        CapacityError: a prompt and its answer don't fit into a slot of both, or ``rows`` into a step.
        UsageError: nothing to measure.
        MissingDependencyError: onnx, which reads the graphs, isn't installed.
    """
    require("calibrate")
    max_new_tokens, rows = integer("max_new_tokens", max_new_tokens, 64), integer("rows", rows, None, low=-MAX_INTEGER)
    tolerance, threads = number("tolerance", tolerance, None), integer("threads", threads, None)
    budget = settings("budget", budget, QualityBudget)
    sessions = {"a": a, "b": b}
    rows = _check(sessions, prompts, max_new_tokens, rows)
    bar = progress or _silent()
    bar.phase("decoding", len(prompts) * len(sessions) * TURNS)
    sides = take_turns(sessions, prompts, rows=rows, max_new_tokens=max_new_tokens, tolerance=tolerance, progress=bar.update)
    speed = _speed(sides)  # refuses prompts without an answer
    pairs = list(zip(prompts, sides["a"].answers, strict=True))
    bar.phase("reading answers with heads", len(pairs) * len(sessions))
    hits = paired_hits(sessions, pairs, bar.update)
    texts = [([*prompt, *answer], len(prompt)) for prompt, answer in pairs]
    most = min(session.manifest.limits.capacity for session in sessions.values())
    pieces = [(text[start : start + most], 1) for text in prose for start in range(0, len(text), most)]
    agreements = {}
    # Where activations are quantised as a graph runs, larger steps predict otherwise: answers are read row by row, as decoded.
    for name, part, most_rows in (("answers", texts, 1), ("prose", pieces, _PROSE_ROWS)):
        bar.phase(f"reading {name}", len(part))
        agreement = Agreement(a, b, most_rows)
        for done, (text, given) in enumerate(part, 1):
            agreement.read(text, given)
            bar.update(done)
        agreements[name] = agreement.report() if part else None
    bar.phase("layers", 2)
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "rows": rows,
        **agreements,
        "greedy": greedy_agreement(sides["a"], sides["b"], prompts, max_new_tokens),
        "heads": hits,
        "acceptance": acceptance(sides["a"], sides["b"]),
        "exactness": {name: side.exactness() for name, side in sides.items()},
        "layers": layer_errors(a, b, [text for text, _ in texts], threads, bar.update),
        "speed": speed,
        "size": _sizes(sessions),
    }
    return {"verdict": judge(report, budget), **report}


def _check(sessions: Mapping[str, Session], prompts: Sequence[list[int]], max_new_tokens: int, rows: int | None) -> int:
    """Refuse before the first step what would fail later. Returns the number of rows to count acceptance with."""
    vocabularies = [session.manifest.backbone.vocab_size for session in sessions.values()]
    tokenizers = [
        session.manifest.files[session.manifest.text.tokenizer].sha256
        for session in sessions.values()
        if session.manifest.text.tokenizer is not None
    ]
    if len(set(vocabularies)) > 1 or len(set(tokenizers)) > 1:
        sizes = " and ".join(map(str, vocabularies))
        what = f"vocabularies of {sizes} tokens" if len(set(vocabularies)) > 1 else f"other tokenizers for their {sizes} tokens"
        raise VocabularyMismatchError(
            f"the bundles have {what}", hint="compare bundles of one model: the same checkpoint with other weights or types"
        )
    if not prompts or max_new_tokens < 2:
        raise UsageError(f"{len(prompts)} prompts, {max_new_tokens} tokens", hint="at least 1 prompt and 2 tokens")
    for session in sessions.values():
        check_room(session, list(prompts), max_new_tokens)
    most = min(session.max_rows for session in sessions.values())
    if rows is not None and not 1 <= rows <= most:
        raise CapacityError(f"{rows} rows, the bundles take 1 to {most}", hint="give other --rows")
    return min(next(iter(sessions.values())).tree.rows, most) if rows is None else rows


def _silent() -> Progress:

    return Progress("compare", stream=io.StringIO())


def _speed(sides: Mapping[str, Decoded]) -> dict[str, Any]:
    """Rates of both sides, and B's as a share of A's."""
    each = {name: side.speed() for name, side in sides.items()}
    ratios = {f"{way}_ratio": each["b"][way]["tokens_per_s"] / each["a"][way]["tokens_per_s"] for way in ("plain", "medusa")}
    return {**each, **ratios}


def _sizes(sessions: Mapping[str, Session]) -> dict[str, Any]:

    each = {name: variant_size(session.bundle, str(variant(session))) for name, session in sessions.items()}
    return {**each, "ratio": each["b"]["bytes"] / each["a"]["bytes"]}
