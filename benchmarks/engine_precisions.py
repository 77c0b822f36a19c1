"""Measures what each precision of an engine does to quality: the very networks that are built, run by ONNX Runtime on the CPU.

    python benchmarks/engine_precisions.py BUNDLE --answers FP32_BUNDLE --scales scales.json -o report.json

BUNDLE was exported with ``--dtype fp16``. Answers of held-out prompts, which FP32_BUNDLE decodes greedily, and held-out text are
read in one call each. QuantizeLinear and DequantizeLinear run as they are written. The reference is the fp16 network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medusa_deploy.calibration.distributions import kl_divergence, log_softmax
from medusa_deploy.calibration.int8.samples import categories_in_turn, read_samples
from medusa_deploy.export.engines.network import network_source
from medusa_deploy.export.quantise.w8a8 import DEFAULTS
from medusa_deploy.runtime import load
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.files.bundle import Bundle, open_bundle
from medusa_deploy.runtime.text.prompts import read_prompts
from medusa_deploy.tools.console import Progress
from medusa_deploy.tools.debugging.steps import exact_options
from medusa_deploy.tools.making.moments import measure_moments
from medusa_deploy.tools.prompt_source import packaged_prompts

WAYS: dict[str, tuple[str, dict[str, Any], bool, bool]] = {
    # name: precision, options, with scales, with moments
    "fp16": ("fp16", {}, False, False),
    "int8, weights": ("int8", {}, False, False),
    "int8, weights and activations": ("int8", {}, True, False),
    "int4, nearest": ("int4", {}, False, False),
    "int4, smoothed, nearest": ("int4", {}, True, False),
    "int4, GPTQ": ("int4", {}, False, True),
    "int4, smoothed, GPTQ": ("int4", {}, True, True),
    "int4, smoothed, GPTQ, blocks of 128": ("int4", {"block": 128}, True, True),
    "int4 with the projection, smoothed, GPTQ": ("int4", {"projection": "int4"}, True, True),
    "fp8, weights": ("fp8", {}, False, False),
    "fp8, weights and activations": ("fp8", {}, True, False),
    "fp8, GPTQ, weights and activations": ("fp8", {}, True, True),
    "fp8 with projection and heads, weights and activations": ("fp8", {"projection": "fp8", "heads": "fp8"}, True, False),
    "fp8, projection fp16": ("fp8", {"projection": "fp16"}, True, False),
}
"""Ways to build an engine, by the name in the report."""


class Network:
    """The step and the heads of one precision, as sessions of ONNX Runtime."""

    def __init__(self, bundle: Bundle, step: Path, heads: Path, threads: int | None) -> None:
        import onnxruntime

        self._manifest = bundle.manifest
        options = exact_options()
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        self._step = onnxruntime.InferenceSession(str(step), options, providers=providers)
        self._heads = onnxruntime.InferenceSession(str(heads), options, providers=providers)

    def read(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return logits float32 [N, V] and hidden states [N, H] of a text, read in one call."""
        manifest = self._manifest
        shape, margin, count = manifest.backbone, manifest.heads.num_heads, len(tokens)
        rows = manifest.limits.cache_rows
        assert count + 2 * margin <= rows, "the text fits into a slot"
        one, half = np.zeros(1, np.int64), np.dtype(manifest.dtype)
        feeds = {
            step_io.TOKENS: np.array([tokens], np.int64),
            step_io.POSITIONS: np.arange(count)[None],
            step_io.ANCESTORS: np.tri(count, dtype=bool)[None],
            step_io.FORCED: one + count,
            step_io.WRITE_INDEX: one + margin,
            step_io.COLUMNS: np.arange(min(rows, -(-(margin + count) // 64) * 64)),
            step_io.LOGIT_ROWS: np.arange(count)[None],
            step_io.KEPT: np.zeros((1, margin), np.int64),
            step_io.KEPT_COUNT: one,
            step_io.DRAFT_SLOTS: np.zeros((1, count), np.int64),
            step_io.HEAD_ROWS: np.zeros(0, np.int64),
        }
        for name, length in ((step_io.past_names, rows), (step_io.carried_names, 1)):
            feeds |= {each: np.zeros((1, shape.kv_heads, length, shape.head_dim), half) for each in name(shape.layers)}
        wanted = {value.name for value in self._step.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in wanted}
        logits, hidden = self._step.run([step_io.LOGITS, step_io.HIDDEN], feeds)
        return logits[0].astype(np.float32), hidden[0]

    def draft(self, hidden: np.ndarray, roots: np.ndarray) -> np.ndarray:
        """Return the heads' candidates [N, K, k] behind each state and root."""
        known = {step_io.ROOT_HIDDEN: hidden, step_io.ROOT_TOKEN: roots}
        feeds = {value.name: known[value.name] for value in self._heads.get_inputs()}
        candidates: np.ndarray = self._heads.run([step_io.CANDIDATES], feeds)[0]
        return candidates


def accepted_lengths(bundle: Bundle, text: Sequence[int], given: int, candidates: np.ndarray) -> list[int]:
    """Replay a text on the bundle's tree, from the first token of the answer on. Returns the tokens that each step emits."""
    tree, at, emitted = bundle.manifest.tree(), given, []
    while at < len(text):
        # The root stands at ``at``; heads read the state before it.
        right = {0}
        for row in range(1, tree.rows):
            head, rank = int(tree.slots[0][row - 1]), int(tree.slots[1][row - 1])
            place = at + 1 + head
            fits = place < len(text) and candidates[at - 1, head, rank] == text[place]
            if fits and int(tree.parents[row]) in right:
                right.add(row)
        depth = max(int(tree.depths[row]) for row in right)
        emitted.append(1 + depth)
        at += 1 + depth
    return emitted


def main() -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--answers", type=Path, help="bundle in fp32 of the same model, which answers (default: text alone)")
    parser.add_argument("--scales", type=Path, required=True)
    parser.add_argument("--moments-text", type=Path, help="plain text for GPTQ, where answering takes too long")
    parser.add_argument("--moments-samples", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--ways", default=None, help="names, by semicolons (default: all)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    ways = list(WAYS) if args.ways is None else [name.strip() for name in args.ways.split(";")]
    texts = _texts(args)
    reference: dict[int, np.ndarray] = {}
    found: dict[str, Any] = {}
    with Progress("start") as bar, tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".precisions-") as scratch:
        moments = None
        if any(WAYS[name][3] for name in ways):
            moments, _digest = measure_moments(bundle, args.moments_text, args.moments_samples, args.threads, bar)
        for name in dict.fromkeys(["fp16", *ways]):
            bar.phase(name)
            precision, options, scaled, gptq = WAYS[name]
            folder = Path(scratch) / "network"
            folder.mkdir()
            chosen = replace(DEFAULTS, **options, **({"scales": args.scales} if scaled else {}))
            with network_source(bundle, precision, "inside", folder, chosen, moments if gptq else None) as source:
                size = sum(path.stat().st_size for path in folder.iterdir())
                network = Network(bundle, source.step, source.heads, args.threads)
                found[name] = {**_measured(bundle, network, texts, reference), "network_bytes": size}
                del network
            with suppress(OSError):
                shutil.rmtree(folder)
            args.output.write_text(json.dumps(_report(args, bundle, texts, found), indent=1) + "\n", "utf-8")
    return 0


def _texts(args: argparse.Namespace) -> list[tuple[str, list[int], int]]:
    """List texts: kind, tokens, and the number of tokens that are given."""
    made: list[tuple[str, list[int], int]] = []
    if args.answers is not None:
        session = load(args.answers, threads=args.threads, check_hashes=False, prefix_cache=False)
        lines = categories_in_turn(read_prompts(packaged_prompts("heldout")))[: args.prompts]
        for line in lines:
            prompt = session.encode(line.request())
            answer = session.generate(token_ids=prompt, max_new_tokens=args.new_tokens).token_ids
            made.append(("answer", [*prompt, *answer], len(prompt)))
        del session
    session = load(args.answers or args.bundle, threads=args.threads, check_hashes=False, prefix_cache=False)
    heldout = Path(__file__).parents[1] / "calibration" / "text" / "heldout.txt"
    pieces = [piece for piece in read_samples(session, heldout, None, 64) if len(piece) >= 32]
    return made + [("text", piece, 1) for piece in pieces[: args.texts]]


def _measured(
    bundle: Bundle, network: Network, texts: Sequence[tuple[str, list[int], int]], reference: dict[int, np.ndarray]
) -> dict[str, Any]:
    """Read all texts. The first network's logits become the reference."""
    parts: dict[str, list[dict[str, np.ndarray]]] = {"answer": [], "text": []}
    emitted: list[int] = []
    is_first = not reference
    for number, (kind, tokens, given) in enumerate(texts):
        logits, hidden = network.read(tokens)
        labels = np.array(tokens[given:])
        mine = log_softmax(logits[given - 1 : -1])
        if is_first:
            reference[number] = mine.astype(np.float32)
        theirs = reference[number]
        rows = np.arange(len(labels))
        parts[kind].append(
            {
                "nll": -mine[rows, labels],
                "kl": np.maximum(kl_divergence(theirs, mine), 0.0),
                "same": mine.argmax(1) == theirs.argmax(1),
            }
        )
        if kind == "answer" and bundle.manifest.tree().rows > 1:
            roots = np.array([*tokens[1:], 0])
            emitted += accepted_lengths(bundle, tokens, given, network.draft(hidden, roots))
    report: dict[str, Any] = {kind: _summary(found) for kind, found in parts.items() if found}
    if emitted:
        report["tokens_a_step"] = float(np.mean(emitted))
        report["steps"] = len(emitted)
    return report


def _summary(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    together = {name: np.concatenate([part[name] for part in parts]) for name in ("nll", "kl", "same")}
    return {
        "positions": len(together["nll"]),
        "perplexity": float(np.exp(together["nll"].mean())),
        "kl_nats": float(together["kl"].mean()),
        "agreement": float(together["same"].mean()),
    }


def _report(
    args: argparse.Namespace, bundle: Bundle, texts: Sequence[tuple[str, list[int], int]], found: Mapping[str, Any]
) -> dict[str, Any]:
    import onnxruntime

    kinds = [kind for kind, _tokens, _given in texts]
    return {
        "bundle": bundle.folder.name,
        "parameters": bundle.manifest.provenance.get("parameters"),
        "answers": kinds.count("answer"),
        "texts": kinds.count("text"),
        "moments_samples": args.moments_samples,
        "runs_on": f"onnxruntime {onnxruntime.__version__}, CPU",
        "gpu": None,
        "ways": dict(found),
    }


if __name__ == "__main__":
    raise SystemExit(main())
