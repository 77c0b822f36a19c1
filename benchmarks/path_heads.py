"""Heads that see the drafted tokens before theirs, beside grounded heads that don't, on held-out answers.

Usage: ``python benchmarks/path_heads.py MODEL --heads HEADS --work FOLDER --json benchmarks/results/path-heads.json``

``pairwise`` heads see the token just before theirs, so candidates of all heads could leave one engine call; heads of the kind
``path`` see all drafted tokens, as Hydra's do (arXiv 2402.05109). ``FOLDER`` is one that ``medusa-deploy train --work`` filled on
a CPU: its answers ``train`` teach the new inputs, on ``heldout`` decoding is replayed. No engine runs; a step takes as long as
``--costs`` says, whatever its heads see.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from paths.replay import Proposer, Recorded, halves, path_hits, tokens_per_step
from paths.training import FrozenHeads, PathHeads, Schedule, train_inputs

from medusa_deploy.calibration.answers.sequences import load_sequences
from medusa_deploy.calibration.hit_rates import Hits, platt_scaling
from medusa_deploy.calibration.training.examples import Examples, load_examples
from medusa_deploy.export.backbone.backbone import load_module
from medusa_deploy.runtime.drafting.hits import NO_LABEL
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.files.heads_file import read_heads_folder
from medusa_deploy.runtime.text.encoder import PromptEncoder
from medusa_deploy.runtime.text.prompts import read_prompts
from medusa_deploy.tools.console import write_json
from medusa_deploy.tools.prompt_source import packaged_prompts

SEEN = {"grounded": (), "pairwise": (-1,), "path": (-3, -2, -1)}
"""Which tokens before its own a head sees, of those after the root."""
ROWS = (3, 4, 6, 8, 16)
TOP_K = 10


def places(kind: str, head: int) -> list[int]:
    """The tokens that this head sees, from 0, the one after the root."""
    return [head + back for back in SEEN[kind] if head + back >= 0]


def recorded(work: Path, vocab_size: int) -> list[Recorded]:
    """The held-out answers in ``work``, in the order of their examples."""
    bundle = open_bundle(work / "backbone")
    encoder = PromptEncoder(bundle.manifest.text, vocab_size, bundle.folder.joinpath)
    prompts = [encoder.encode(line.request()) for line in read_prompts(packaged_prompts("heldout"))]
    answers, first = [], 0
    for sequence in load_sequences(work / "heldout", prompts):
        answers.append(Recorded(sequence.prompt.tolist(), sequence.tokens.tolist(), first))
        first += len(sequence.tokens)
    return answers


def measure(
    answers: Sequence[Recorded], proposer: Proposer, labels: np.ndarray, costs: Mapping[str, float], rows: Sequence[int]
) -> dict[str, Any]:
    """Rates behind the tokens that came, and what replayed steps emit; each half of the answers scaled by the other."""
    hits = path_hits(proposer, labels)
    scalings = [tuple(platt_scaling(Hits(hits.ranks[other], hits.log_probs[other]))) for _, other in halves(answers)]
    tested = hits.ranks != NO_LABEL
    report: dict[str, Any] = {
        f"top_{best}": (((hits.ranks >= 0) & (hits.ranks < best)).sum(0) / tested.sum(0)).round(4).tolist() for best in (1, 5)
    }
    whole = [
        (hits.ranks[:, :depth] == 0).all(1).sum() / (labels[:, depth - 1] >= 0).sum() for depth in range(1, labels.shape[1] + 1)
    ]
    report |= {"top_1_of_whole_paths": np.round(whole, 4).tolist(), "platt_scaling": scalings}
    for name, lookup in (("heads", False), ("heads_and_lookup", True)):
        lengths = {size: tokens_per_step(answers, proposer, scalings, size, lookup=lookup) for size in rows}
        report[name] = {
            str(size): {"tokens_per_step": round(length, 4), "speedup": round(length / (costs[str(size)] + costs["heads"]), 4)}
            for size, length in lengths.items()
        }
    return report


def trained(heads: FrozenHeads, kind: str, head: int, examples: Examples, shortlists: Any, known: dict[Any, Any]) -> Any:
    """New inputs of one head, or None where it sees none; equal inputs are trained once."""
    seen = places(kind, head)
    key = head, *seen
    if seen and key not in known:
        weight, loss = train_inputs(heads, head, seen, examples, shortlists[:, head], Schedule())
        print(f"{kind}: head {head + 1}, loss {loss:.3f}", file=sys.stderr)
        known[key] = seen, weight
    return known.get(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--heads", type=Path, required=True, help="grounded heads of one block")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--costs", type=Path, default=Path("benchmarks/results/smollm2-grounded-merged.json"), help="of bench")
    parser.add_argument("--shortlist", type=int, default=64, help="candidates of a head that are ranked anew")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    module = load_module(args.model, "fp32")
    embedding, output = (layer.weight.detach() for layer in (module.get_input_embeddings(), module.get_output_embeddings()))
    record = read_heads_folder(args.heads)
    heads = FrozenHeads(record, embedding, output)
    costs = json.loads(args.costs.read_text("utf-8"))["medusa"]["costs"]
    examples, heldout = (load_examples(args.work / part, heads.count) for part in ("train", "heldout"))
    shortlists, _ = heads.shortlist(examples.hidden, examples.roots, args.shortlist)
    answers = recorded(args.work, len(embedding))
    known: dict[Any, Any] = {}
    kinds: dict[str, Any] = {}
    report = {
        "tokens": {"train": len(examples.roots), "heldout": len(heldout.roots)},
        "heads_sha256": record.digest(), "schedule": asdict(Schedule()), "shortlist": args.shortlist, "top_k": TOP_K,
        "costs": costs, "kinds": kinds,
    }  # fmt: skip
    for kind in SEEN:
        inputs = [trained(heads, kind, head, examples, shortlists, known) for head in range(heads.count)]
        proposer = PathHeads(heads, inputs, heldout, args.shortlist, TOP_K)
        kinds[kind] = measure(answers, proposer, heldout.labels.numpy(), costs, ROWS)
        print(kind, kinds[kind])
        write_json(report, args.json)


if __name__ == "__main__":
    main()
