"""``medusa-deploy demo``: the whole path on a real model, from checkpoint to measured text. ``make demo`` runs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ...runtime.session import Chunk, Session
    from ...runtime.text.prompts import PromptLine

HELP = "the whole path on a real model: prepare, export, generate, verify, bench"

PROMPTS = 6
_MAX_NEW_TOKENS = 96
_BENCH_REPEATS = 2
_VERIFY_PROMPTS, _VERIFY_TOKENS = 4, 32
_DRAFTED, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def demo(root: Path, *, heads: Path | None = None, output: Path | None = None, screen: TextIO | None = None) -> dict[str, Any]:
    """Set up below ``root/build`` what isn't there, generate live, bench and verify; reports go to ``output``.

    ``heads`` None takes the repository's own. At the end a variant in 8 bits is made, and the variant that suits this machine is
    recommended. Returns the reports, under ``bench``, ``verify`` and ``recommend``.

    Raises:
        DeployError: the model can't be fetched, exported or run.
    """
    from ...runtime.session import load
    from ..console import Progress
    from ..making.demo_bundle import HEADS, INT8, ensure_bundle, ensure_int8

    with Progress("setting up") as bar:
        bundle = ensure_bundle(root / "build", heads or root / HEADS, bar)
        bar.phase("loading")
        session = load(bundle, prefix_cache=False)
    output, screen = output or root / "build" / "demo", screen or sys.stdout
    reports = show(session, pick_prompts(), output, screen)
    ensure_int8(root / "build", bundle)
    sessions = {"cpu": session, INT8: load(bundle, variant=INT8, check_hashes=False, prefix_cache=False)}
    return {**reports, "recommend": _recommend(sessions, pick_prompts(), output, screen)}


def show(session: Session, lines: Sequence[PromptLine], output: Path, screen: TextIO) -> dict[str, Any]:
    """Answer each prompt plainly and with Medusa, live; then bench and verify them, print and write the reports."""
    from ..console import Progress, write_json
    from ..environment import environment
    from ..exactness.verify import describe as describe_verify, verify
    from ..measure.bench import bench
    from ..measure.bench_report import describe as describe_bench
    from ..tree_set import trees_for

    colour = screen.isatty() and "NO_COLOR" not in os.environ
    for line in lines:
        _answer_twice(session, line, screen, colour=colour)
    prompts = [session.encode(line.request()) for line in lines]
    chosen = trees_for(session.manifest)
    few = prompts[:_VERIFY_PROMPTS]
    facts = environment(session)
    with Progress("bench", 3 * _BENCH_REPEATS * len(prompts)) as bar:
        timed = bench(session, prompts, max_new_tokens=_MAX_NEW_TOKENS, repeats=_BENCH_REPEATS, progress=bar.update)
        bar.phase("verify", len(few) * (3 + len(chosen.trees)))
        exact = verify(session, few, trees=chosen.trees, best_rows=True, max_new_tokens=_VERIFY_TOKENS, progress=bar.update)
    reports = {
        "bench": {"environment": facts, **timed},
        "verify": {"environment": facts, **exact, "notes": chosen.notes, "skipped": chosen.skipped},
    }
    screen.write(f"\n{describe_bench(reports['bench'])}\n\n{describe_verify(reports['verify'])}\n\n")
    for name, report in reports.items():
        write_json(report, output / f"{name}.json")
        screen.write(f"wrote {output / f'{name}.json'}\n")
    return reports


def _recommend(sessions: Mapping[str, Session], lines: Sequence[PromptLine], output: Path, screen: TextIO) -> dict[str, Any]:
    """Time and judge the variants, print the one that suits this machine, and write why."""
    from ..console import Progress, write_json
    from ..environment import environment
    from ..measure.recommend import describe, recommend

    first = next(iter(sessions.values()))
    prompts = [first.encode(line.request()) for line in lines]
    with Progress("variants", 2 * len(sessions) * len(prompts)) as bar:
        report = recommend(sessions, prompts, progress=bar.update)
    screen.write(f"{describe(report)}\n")
    complete = {"environment": environment(first), **report}
    write_json(complete, output / "recommend.json")
    screen.write(f"wrote {output / 'recommend.json'}\n")
    return complete


def pick_prompts(count: int = PROMPTS) -> list[PromptLine]:
    """The first held-out prompt of each of ``count`` categories."""
    from ..prompt_source import heldout_prompts

    by_category: dict[str | None, PromptLine] = {}
    for line in heldout_prompts():
        by_category.setdefault(line.category, line)
    return list(by_category.values())[:count]


def _answer_twice(session: Session, line: PromptLine, screen: TextIO, *, colour: bool) -> None:
    """Print one prompt, then its plain and its Medusa answer as they come."""
    question = line.messages[-1]["content"] if line.messages else line.prompt or ""
    prompt = session.encode(line.request())
    screen.write(f"\n── {line.category or 'prompt'} " + "─" * 60 + f"\n{question}\n")
    for name, speculative in (("plain", False), ("Medusa", True)):
        screen.write(f"\n{_styled(f'[{name}] ', _DIM, colour)}")
        painter = _Painter(session, screen, colour=colour and speculative)
        for chunk in session.stream(token_ids=prompt, speculative=speculative, max_new_tokens=_MAX_NEW_TOKENS):
            painter.write(chunk)
        stats = chunk.stats
        assert stats is not None
        length = stats.mean_acceptance_length
        summary = f"{stats.tokens_per_second:.1f} tokens/s, {stats.steps} steps, mean acceptance length {length:.2f}"
        screen.write(f"\n{_styled(summary, _DIM, colour)}\n")


class _Painter:
    """Writes chunks. With ``colour`` it marks the text of accepted drafted tokens: all of a step's but the last."""

    def __init__(self, session: Session, screen: TextIO, *, colour: bool) -> None:
        self._screen = screen
        self._decoder = session.codec.decoder() if colour and session.codec is not None else None
        self._hidden = frozenset(session.manifest.text.eos_token_ids)

    def write(self, chunk: Chunk) -> None:
        """Show what the chunk adds."""
        self._screen.write(chunk.text if self._decoder is None else self._painted(chunk, self._decoder))
        self._screen.flush()

    def _painted(self, chunk: Chunk, decoder: Any) -> str:
        if not chunk.token_ids:  # the end: the decoder gives the text that it held back
            return str(decoder.flush())
        last = len(chunk.token_ids) - 1
        shown = [(index, token) for index, token in enumerate(chunk.token_ids) if token not in self._hidden]
        return "".join(_styled(decoder.push([token]), _DRAFTED, index < last) for index, token in shown)


def _styled(text: str, style: str, on: bool) -> str:
    return f"{style}{text}{_RESET}" if on and text else text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("build", "demo"), help="folder for the reports (default: %(default)s)"
    )
    parser.add_argument(
        "--heads", type=Path, help="heads for SmolLM2 (default: those of the repository that is the current folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo in the current folder. Returns 1 when a divergence is unexplained."""
    from ..extras import quiet_libraries, require

    require("export")
    quiet_libraries()
    reports = demo(Path.cwd(), heads=args.heads, output=args.output)
    return 1 if reports["verify"]["unexplained"] else 0
