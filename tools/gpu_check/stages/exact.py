"""Checks that executors are right here: tokens against the CPU's, speculative against plain decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...console import write_json
from ..executors import loaded_sessions
from ..options import Options
from ..report import Report, describe

if TYPE_CHECKING:
    from ....runtime.session import Session

EXPECTED = "expected.json"
_TOKENS = 32
_PROMPT_LENGTHS = (1, 7, 30, 70)
_MAX_BYTES = 16 << 20


def run(options: Options, report: Report) -> None:
    """Put ``results["torch"]``, ``results["expected"]`` and ``results["executors"][backend]``."""
    expected = _brought(options)
    cpu: Session | None = None
    found: dict[str, Any] = {}
    for backend, session in loaded_sessions(options, report):
        report.check_time(20)
        cpu = session if backend == "cpu" else cpu
        if expected is None:
            expected = _computed(session, backend)
            write_json(expected, options.out / EXPECTED)
        try:
            found[backend] = _executor(session, cpu, expected)
        except Exception as error:  # one executor's error must not hide the others' results
            report.wrong[f"executor {backend}"] = describe(error)
            continue
        if found[backend]["unexplained"]:
            report.wrong[f"executor {backend}"] = f"{found[backend]['unexplained']} divergences that rounding doesn't explain"
        report.put("executors", found)
    if expected is not None:
        report.put("expected", {"made_by": expected["made_by"], "prompts": len(expected["prompts"])})
    try:
        report.put("torch", _torch(options, report))
    except ImportError as error:
        report.skip("torch", error)


def _executor(session: Session, cpu: Session | None, expected: dict[str, Any]) -> dict[str, Any]:
    """Compare one executor's greedy plain decoding with the expected tokens, and its trees with plain decoding."""
    from ....runtime.tree import ROOT_ONLY
    from ...exactness.first_divergence import DivergenceFinder, Tally
    from ...exactness.rounding import tolerance_of
    from ...exactness.verify import verify
    from ...tree_set import trees_for

    prompts, count = expected["prompts"], expected["max_new_tokens"]
    finder, tally = DivergenceFinder(session, tolerance_of(session)), Tally()
    # The CPU's logits, where it can give them, say how far a different order of summation may lead.
    source: Any = ROOT_ONLY if cpu is None or cpu is session else _CpuLogits(cpu)
    for index, prompt in enumerate(prompts):
        run = session.generate(token_ids=prompt, max_new_tokens=count, ignore_eos=True, speculative=False)
        finder.add(tally, index, prompt, expected["tokens"][index], run.token_ids, None, source)
    trees = trees_for(session.manifest, ["chain", "published"]).trees
    trees = {name: tree for name, tree in trees.items() if tree.rows <= session.manifest.limits.max_rows}
    against_plain = verify(session, prompts, trees=trees, best_rows=True, max_new_tokens=count)
    engine, wall = _times(session, prompts[-1], count)
    return {
        "against_expected": tally.report(),
        "speculative_against_plain": against_plain["trees"],
        "unexplained": tally.report()["unexplained"] + against_plain["unexplained"],
        "plain_ms_per_step": 1e3 * wall,
        "host_fraction": 1 - engine / wall,
    }


def _times(session: Session, prompt: list[int], count: int) -> tuple[float, float]:
    """Seconds of a plain step: in the engine, and in all."""
    stats = session.generate(token_ids=prompt, max_new_tokens=count, ignore_eos=True, speculative=False).stats
    return stats.engine_seconds / stats.steps, stats.decode_seconds / stats.steps


@dataclass(frozen=True, slots=True)
class _CpuLogits:
    """Another implementation to compare logits with: the CPU executor."""

    session: Session

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [V] of the token after ``tokens``, float32."""
        from ...measure.probe import Probe

        with Probe(self.session) as probe:
            return probe.prefill(tokens)


def _brought(options: Options) -> dict[str, Any] | None:
    """Read the tokens that came with the bundle. The CPU executor made them where the bundle comes from."""
    from ....runtime.errors import PromptFileError
    from ....runtime.files.json_file import read_json_file

    path: Path | None = options.expected
    if path is None and options.bundle is not None and (options.bundle / EXPECTED).is_file():
        path = options.bundle / EXPECTED
    if path is None:
        return None
    hint = "make it with: --stages exact --device cpu --bundle BUNDLE"
    found = read_json_file(path, limit=_MAX_BYTES, error=PromptFileError, hint=hint)
    fields = {"prompts", "tokens", "max_new_tokens", "made_by"}
    if not isinstance(found, dict) or set(found) != fields or len(found["prompts"]) != len(found["tokens"]):
        raise PromptFileError(f"{path} doesn't hold {', '.join(sorted(fields))}", hint=hint)
    return cast("dict[str, Any]", found)


def _computed(session: Session, backend: str) -> dict[str, Any]:
    """Compute greedy tokens after random prompts."""
    rng, vocab = np.random.default_rng(0), session.manifest.backbone.vocab_size
    room = session.manifest.limits.capacity - _TOKENS
    prompts = [rng.integers(0, vocab, min(length, room)).tolist() for length in _PROMPT_LENGTHS]
    runs = [session.generate(token_ids=p, max_new_tokens=_TOKENS, ignore_eos=True, speculative=False) for p in prompts]
    return {
        "made_by": f"the {backend} executor",
        "max_new_tokens": _TOKENS,
        "prompts": prompts,
        "tokens": [run.token_ids for run in runs],
    }


def _torch(options: Options, report: Report) -> dict[str, Any]:
    """Run the captured torch reference on a tiny model in fp32.

    Each way, with and without heads, is compared with the CPU's plain tokens.
    """
    import torch

    with torch.no_grad():
        return _torch_ways(options, report)


def _torch_ways(options: Options, report: Report) -> dict[str, Any]:
    import torch

    from ..shapes import SIZES
    from ..torch_reference.clock import Clock
    from ..torch_reference.loop import Loop, generate
    from ..torch_reference.rig import MARGIN, published_tree, ways_of
    from ..torch_reference.step import TorchStep, empty_caches
    from ..torch_reference.weights import PROJECTIONS, moved, random_heads, random_weights

    prompt, count, visible = list(range(1, 20)), 64, 192
    weights = random_weights(SIZES["tiny"], "cpu", torch.float32, std=0.15)
    cpu = TorchStep(weights, empty_caches(weights, 1, visible), MARGIN)
    expected = generate(Loop(cpu, published_tree(1), visible), prompt, count)[0]
    here, clock = moved(weights, options.device), Clock(options.device)
    heads = {"none": None} | {kind: moved(random_heads(weights, kind), options.device) for kind in PROJECTIONS}
    entry: dict[str, Any] = {"device": options.device, "tokens": count, "ways": {}}
    for way, step in ways_of(here, empty_caches(here, 1, visible), options).items():
        entry["ways"][way] = found = {}
        for kind, of_kind in heads.items():
            report.check_time(10)
            try:
                loop = Loop(step, published_tree(1 if of_kind is None else 16), visible, of_kind)
                loop.prefill(np.array([prompt]))
                tokens, steps = generate(loop, prompt, count, clock.captured(loop.advance))
            except Exception as error:
                report.skip(f"torch, {way}", error)
                break
            found[kind] = {"equal": tokens == expected, "tokens_per_step": (count - 1) / steps}
            if tokens != expected:
                report.wrong[f"torch, {way}, heads {kind}"] = "its tokens are not the CPU's"
    return entry
