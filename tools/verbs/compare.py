"""``medusa-deploy compare``: what a variant, a quantised one for instance, lost against a reference, and what it won."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...runtime.session import Session
    from ..compare.paired_runs import Decoded
    from ..console import Progress

HELP = "quality and speed of one bundle or variant against a reference"

_PROSE_ROWS = 32


@dataclass(frozen=True, slots=True)
class QualityBudget:
    """What B may lose against A: perplexity may rise by so many percent, and mean acceptance length fall to this share.

    A divergence of B's speculative from its plain decoding that rounding doesn't explain is never within it.
    """

    max_perplexity_increase: float = 2.0
    min_acceptance_ratio: float = 0.98


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

    Both answer the prompts greedily, up to ``max_new_tokens`` or the end of the sequence; A's answers and the ``prose`` are then
    read by both. ``rows``: of the steps whose acceptance is counted (None: as many as A's tree has, as far as both take them).
    ``tolerance``: as in ``verify``. ``threads``: of the engines that compute layers. The report's keys are in docs/compare.md.

    Raises:
        VocabularyMismatchError: tokens of the one aren't those of the other.
        CapacityError: a prompt and its answer don't fit into a slot of both, or ``rows`` into a step.
        UsageError: nothing to measure.
        MissingDependencyError: onnx, which reads the graphs, isn't installed.
    """
    from ..compare.paired_hits import paired_hits
    from ..compare.paired_runs import TURNS, acceptance, greedy_agreement, take_turns
    from ..extras import require
    from ..measure.agreement import Agreement
    from ..measure.layer_errors import layer_errors

    require("calibrate")
    sessions = {"a": a, "b": b}
    rows = _check(sessions, prompts, max_new_tokens, rows)
    bar = progress or _silent()
    bar.phase("decoding", len(prompts) * len(sessions) * TURNS)
    sides = take_turns(sessions, prompts, rows=rows, max_new_tokens=max_new_tokens, tolerance=tolerance, progress=bar.update)
    speed = _speed(sides)  # which refuses prompts that nothing was answered to
    pairs = list(zip(prompts, sides["a"].answers, strict=True))
    bar.phase("reading answers with heads", len(pairs) * len(sessions))
    hits = paired_hits(sessions, pairs, bar.update)
    texts = [([*prompt, *answer], len(prompt)) for prompt, answer in pairs]
    most = min(session.manifest.limits.capacity for session in sessions.values())
    pieces = [(text[start : start + most], 1) for text in prose for start in range(0, len(text), most)]
    agreements = {}
    # A variant that quantises activations as it runs predicts otherwise in larger steps: answers are read as they are decoded.
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
    return {"verdict": judge(report, budget or QualityBudget()), **report}


def judge(report: Mapping[str, Any], budget: QualityBudget) -> dict[str, Any]:
    """Whether a report is within a budget, check by check. Perplexity is that of answers or of prose, whichever rose more."""
    read = [report[name] for name in ("answers", "prose") if report[name] is not None]
    increases = [part["perplexity"]["increase_percent"] for part in read]
    increase = max(increases, key=lambda found: (math.isnan(found), found))
    ratio, unexplained = report["acceptance"]["ratio"], report["exactness"]["b"]["unexplained"]
    checks = [
        ("perplexity_increase_percent", increase, budget.max_perplexity_increase, increase <= budget.max_perplexity_increase),
        ("acceptance_ratio", ratio, budget.min_acceptance_ratio, ratio >= budget.min_acceptance_ratio),
        ("unexplained_divergences", unexplained, 0, unexplained == 0),
    ]
    named = [dict(zip(("name", "value", "limit", "passed"), check, strict=True)) for check in checks]
    return {"passed": all(check["passed"] for check in named), "checks": named}


def _check(sessions: Mapping[str, Session], prompts: Sequence[list[int]], max_new_tokens: int, rows: int | None) -> int:
    """Refuse before the first step what would fail later; the number of rows to count acceptance with."""
    from ...runtime.errors import CapacityError, UsageError, VocabularyMismatchError
    from ..prompt_source import check_room

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
    import io

    from ..console import Progress

    return Progress("compare", stream=io.StringIO())


def _speed(sides: Mapping[str, Decoded]) -> dict[str, Any]:
    """Of both, and B's rates as a share of A's."""
    each = {name: side.speed() for name, side in sides.items()}
    ratios = {f"{way}_ratio": each["b"][way]["tokens_per_s"] / each["a"][way]["tokens_per_s"] for way in ("plain", "medusa")}
    return {**each, **ratios}


def _sizes(sessions: Mapping[str, Session]) -> dict[str, Any]:
    from ..environment import variant
    from ..measure.variant_size import variant_size

    each = {name: variant_size(session.bundle, str(variant(session))) for name, session in sessions.items()}
    return {**each, "ratio": each["b"]["bytes"] / each["a"]["bytes"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    from ..console import add_json_argument, non_negative, positive_int
    from ..prompt_source import add_prompt_arguments

    budget = QualityBudget()
    parser.add_argument("bundle_a", type=Path, metavar="BUNDLE_A", help="the reference")
    parser.add_argument("bundle_b", type=Path, metavar="BUNDLE_B", help="what is compared with it; may be the same bundle")
    for side in ("a", "b"):
        parser.add_argument(
            f"--variant-{side}", metavar="NAME", help=f"which graph of BUNDLE_{side.upper()} runs (default: the fastest that can)"
        )
    add_prompt_arguments(parser)
    parser.add_argument("--limit", dest="count", type=int, help=argparse.SUPPRESS)  # another name of --count
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens per prompt (default: %(default)s)")
    parser.add_argument(
        "--rows", type=positive_int, metavar="N", help="rows of the steps whose acceptance is counted (default: A's tree's)"
    )
    parser.add_argument(
        "--max-perplexity-increase",
        type=non_negative,
        default=budget.max_perplexity_increase,
        metavar="PCT",
        help="the most that B's perplexity may be above A's, in percent (default: %(default)g)",
    )
    parser.add_argument(
        "--min-acceptance-ratio",
        type=non_negative,
        default=budget.min_acceptance_ratio,
        metavar="X",
        help="the least that B's mean acceptance length may be, as a share of A's (default: %(default)g)",
    )
    parser.add_argument("--tolerance", type=non_negative, metavar="X", help="as of verify (default: by dtype)")
    parser.add_argument("--seed", type=int, default=0, help="of random prompts (default: %(default)s)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="engine threads (default: all cores)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page that needs no other file")
    parser.add_argument("--force", action="store_true", help="replace the files of --html and --json")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, write the reports; 1 when B is over its budget."""
    from ...runtime import load
    from ...runtime.files.bundle import refuse_existing, write_whole
    from ..compare.page import page
    from ..compare.table import describe
    from ..console import STDOUT, Progress, emit
    from ..environment import environment
    from ..extras import require
    from ..prompt_source import heldout_prose, prompts_for

    for output in (args.html, None if args.json in (None, STDOUT) else Path(args.json)):
        if output is not None:
            refuse_existing(output, force=args.force)
    require("calibrate")
    with Progress("loading") as bar:
        a = load(args.bundle_a, variant=args.variant_a, threads=args.threads)
        b = load(args.bundle_b, variant=args.variant_b, threads=args.threads)
        facts = {"a": environment(a), "b": environment(b)}
        machine = {name: fact for name, fact in facts["a"].items() if name != "bundle"} | {"threads": args.threads}
        report = compare(
            a,
            b,
            prompts_for(a, args.prompts, args.count, args.seed),
            prose=heldout_prose(a.encoder),
            max_new_tokens=args.max_new_tokens,
            rows=args.rows,
            tolerance=args.tolerance,
            budget=QualityBudget(args.max_perplexity_increase, args.min_acceptance_ratio),
            threads=args.threads,
            progress=bar,
        )
    names = {"a": args.bundle_a.resolve().name, "b": args.bundle_b.resolve().name}
    sides = {side: {"name": names[side], **facts[side]["bundle"]} for side in names}
    report = {"environment": {**machine, **sides}, **report}
    if args.html is not None:
        write_whole(args.html, page(report).encode())
    emit(describe(report), report, args.json)
    return 0 if report["verdict"]["passed"] else 1
