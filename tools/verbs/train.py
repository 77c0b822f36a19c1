"""``medusa-deploy train``: heads for a backbone by self-distillation, from prompts to a heads folder.

``--stage 1`` trains heads on the frozen backbone (Medusa-1, :mod:`..training.heads`).
``--stage 2`` trains the backbone with them (Medusa-2, :mod:`..training.backbone`).
Each stage has three steps: the backbone answers the prompts (:mod:`..training.answering`), training reads the cached hidden
states, and hit rates are counted on prompts that training never saw. The work folder keeps each step's result for the next run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training.heads import FORM
from ..training.hit_rates import TREE_ROWS

HELP = "train Medusa heads on the backbone's own answers"
_CHOICES = {
    1: (*FORM, "batch_size"),
    2: ("rank", "alpha", "heads_weight", "batch_tokens", "time_limit", "quality_budget"),
}
"""Options of one stage alone: fields of its config, and arguments of its function."""
_SHARED_CHOICES = ("epochs", "learning_rate", "weight_decay", "dropout", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import add_json_argument, non_negative

    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of safetensors, a .gguf file, or org/name of a hub")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="HEADS", help="folder for the trained heads")
    parser.add_argument("--work", type=Path, help="folder for answers and checkpoints (default: HEADS.work)")
    parser.add_argument("--prompts", type=Path, help="JSONL of training prompts (default: those of the package)")
    parser.add_argument("--heldout", type=Path, help="JSONL of prompts that hit rates are measured on (default: the package's)")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=1, help="1: heads on the frozen backbone; 2: a LoRA adapter on it as well"
    )
    parser.add_argument("--heads", type=Path, help="heads to go on from (stage 2 needs them)")
    parser.add_argument("--epochs", type=int, help="default: 8 in stage 1, 1 in stage 2")
    parser.add_argument("--learning-rate", type=float, help="default: 2e-3 in stage 1; in stage 2 the adapter's, 5e-4")
    parser.add_argument("--weight-decay", type=float, help="default: 0.01 in stage 1, 0 in stage 2")
    parser.add_argument("--dropout", type=float, help="of the heads' inputs (default: 0.1)")
    parser.add_argument("--seed", type=int, help="of training and of sampled answers (default: 0)")
    parser.add_argument("--autocast", action="store_true", help="answer and train in bfloat16, for devices that have it")
    first = parser.add_argument_group("stage 1")
    first.add_argument("--kind", choices=("grounded", "medusa"), help="form of the heads (default: grounded)")
    first.add_argument("--num-heads", type=int, help="default: 4")
    first.add_argument("--num-layers", type=int, help="residual blocks a head (default: 1)")
    first.add_argument("--draft-vocab-size", type=int, help="tokens that heads can propose (default: 4096)")
    first.add_argument("--batch-size", type=int, help="positions of a step (default: 512)")
    second = parser.add_argument_group("stage 2")
    second.add_argument("--rank", type=int, help="of the adapter (default: 16)")
    second.add_argument("--alpha", type=float, help="the adapter's changes are scaled by alpha / rank (default: twice the rank)")
    second.add_argument("--heads-weight", type=float, help="λ0, of the heads' losses against the divergence (default: 0.2)")
    second.add_argument("--batch-tokens", type=int, help="tokens of a step (default: 1024)")
    second.add_argument("--time-limit", type=float, metavar="MINUTES", help="training ends, its schedule complete, after so long")
    second.add_argument(
        "--quality-budget",
        type=non_negative,
        metavar="SHARE",
        help="keep as much of the adapter as raises the perplexity of the backbone's own answers by no more (default: 0.02)",
    )
    answers = parser.add_argument_group("answers")
    answers.add_argument("--self-prompts", type=int, default=0, metavar="N", help="let a chat model try to write N more prompts")
    answers.add_argument("--max-new-tokens", type=int, default=400, help="length of an answer at most (default: %(default)s)")
    answers.add_argument(
        "--temperatures",
        type=_temperatures,
        default=(0.0,),
        metavar="T,T",
        help="one answer to each training prompt at each; 0, the default, is greedy, as held-out answers always are",
    )
    answers.add_argument("--slots", type=int, default=48, help="answers generated at a time (default: %(default)s)")
    parser.add_argument("--tree-rows", type=int, default=TREE_ROWS, help="rows of the tree that is stored with the heads")
    parser.add_argument("--device", default="cpu", help="torch device that trains; any but cpu answers, too")
    parser.add_argument("--force", action="store_true", help="replace HEADS")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Train and print the hit rates."""
    from ..extras import quiet_libraries, require

    require("export" if args.stage == 1 else "train")
    quiet_libraries()
    from ...calibration.training.finetune import FinetuneConfig
    from ...export.hub import fetch_model
    from ...runtime.errors import UsageError
    from ..console import emit, say
    from ..training.answering import AnswerPlan
    from ..training.backbone import quality_table, train_backbone
    from ..training.heads import train
    from ..training.hit_rates import hit_rate_table

    fields = [name for name in AnswerPlan.__dataclass_fields__ if name not in ("work", "seed")]
    work = args.work or args.output.with_name(args.output.name + ".work")
    plan = AnswerPlan(work=work, seed=args.seed or 0, **{name: getattr(args, name) for name in fields})
    given = _given(args, (*_CHOICES[args.stage], *_SHARED_CHOICES)) | {"autocast": args.autocast}
    if foreign := _given(args, _CHOICES[3 - args.stage]):
        raise UsageError(
            f"--{next(iter(foreign)).replace('_', '-')} belongs to the other stage, this is stage {args.stage}",
            hint="see the groups of: medusa-deploy train --help",
        )
    plan = replace(plan, model=fetch_model(plan.model, say).path)
    keep = {"tree_rows": args.tree_rows, "force": args.force}
    if args.stage == 1:
        report = train(plan, args.output, given, args.heads, **keep)
        text = hit_rate_table(report["hit_rates"])
    else:
        if args.heads is None:
            raise UsageError("the second stage needs heads to begin with", hint="give --heads: what the first stage made")
        if "rank" in given:
            given = {"alpha": 2.0 * given["rank"]} | given
        if "quality_budget" in given:
            keep["quality_budget"] = given.pop("quality_budget")
        report = train_backbone(plan, args.output, FinetuneConfig(**given), args.heads, **keep)
        text = f"{hit_rate_table(report['hit_rates'])}\n\n{quality_table(report)}"
    emit(text, report, args.json)
    return 0


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _temperatures(text: str) -> tuple[float, ...]:
    """An argparse type: numbers from 0, with commas between them."""
    from ..console import non_negative

    return tuple(non_negative(part) for part in text.split(","))
