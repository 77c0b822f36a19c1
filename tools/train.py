"""``medusa-deploy train``: heads for a backbone by self-distillation, from prompts to a heads folder.

``--stage 1`` trains heads on the frozen backbone (Medusa-1), ``--stage 2`` the backbone with them (Medusa-2,
:mod:`.train_backbone`).
Four steps, each kept in the work folder and taken up again by the next run: export the backbone alone, let it answer the
prompts, train on the cached hidden states, count hit rates on prompts that training never saw.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..calibration.train import TrainConfig
    from ..runtime.heads import HeadSet
    from ..runtime.session import Session

HELP = "train Medusa heads on the backbone's own answers"
RANKS = 10
_RATED_PATHS = 128


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What to train on. ``prompts`` and ``heldout`` None take the prompts that come with the package.

    ``slots``: answers generated at a time. ``temperature``: of the answers to training prompts; 0 is greedy, as held-out answers
    always are. ``tree_rows``: size of the tree that is stored with the heads.
    """

    model: Path
    output: Path
    work: Path
    prompts: Path | None = None
    heldout: Path | None = None
    max_new_tokens: int = 400
    temperature: float = 0.0
    slots: int = 48
    capacity: int = 2048
    tree_rows: int = 5
    device: str = "cpu"
    force: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    from .console import add_json_argument

    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of safetensors, or a .gguf file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="HEADS", help="folder for the trained heads")
    parser.add_argument("--work", type=Path, help="folder for answers and checkpoints (default: HEADS.work)")
    parser.add_argument("--prompts", type=Path, help="JSONL of training prompts (default: those of the package)")
    parser.add_argument("--heldout", type=Path, help="JSONL of prompts that hit rates are measured on (default: the package's)")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=1, help="1: heads on the frozen backbone; 2: a LoRA adapter on it as well"
    )
    parser.add_argument("--heads", type=Path, help="heads to go on from (stage 2 needs them)")
    parser.add_argument("--kind", choices=("grounded", "medusa"), default="grounded", help="form of the heads")
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-layers", type=int, default=1, help="residual blocks a head")
    parser.add_argument("--draft-vocab-size", type=int, default=4096, help="tokens that heads can propose")
    parser.add_argument("--epochs", type=int, help="default: 8 in stage 1, 1 in stage 2")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, help="default: 2e-3 in stage 1; in stage 2 the adapter's, 5e-4")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16, for processors that have it")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter in stage 2")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens of a step in stage 2")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="stage 2 ends, its schedule complete, after so long")
    parser.add_argument("--max-new-tokens", type=int, default=400, help="length of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers to training prompts (default: greedy)")
    parser.add_argument("--slots", type=int, default=48, help="answers generated at a time")
    parser.add_argument("--tree-rows", type=int, default=5, help="rows of the tree that is stored with the heads")
    parser.add_argument("--device", default="cpu", help="torch device that trains the heads")
    parser.add_argument("--force", action="store_true", help="replace HEADS")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Train and print the hit rates."""
    from .extras import quiet_libraries, require

    require("export" if args.stage == 1 else "train")
    quiet_libraries()
    from ..calibration.train import TrainConfig
    from ..runtime.errors import UsageError
    from .console import emit

    same = ("model", "output", "prompts", "heldout", "max_new_tokens", "temperature", "slots", "tree_rows", "device", "force")
    work = args.work or args.output.with_name(args.output.name + ".work")
    plan = TrainPlan(work=work, **{name: getattr(args, name) for name in same})
    given = {name: value for name in ("epochs", "learning_rate") if (value := getattr(args, name)) is not None}
    shared = ("weight_decay", "dropout", "seed", "autocast")
    if args.stage == 1:
        names = ("kind", "num_heads", "num_layers", "draft_vocab_size", "batch_size", *shared)
        report = train(plan, TrainConfig(**{name: getattr(args, name) for name in names}, **given), args.heads)
        text = hit_rate_table(report["hit_rates"])
    else:
        from ..calibration.finetune import FinetuneConfig
        from .train_backbone import quality_table, train_backbone

        if args.heads is None:
            raise UsageError("the second stage needs heads to begin with", hint="give --heads: what the first stage made")
        chosen = ("rank", "batch_tokens", "time_limit", *shared)
        config = FinetuneConfig(alpha=2.0 * args.rank, **{name: getattr(args, name) for name in chosen}, **given)
        report = train_backbone(plan, args.heads, config)
        text = f"{hit_rate_table(report['hit_rates'])}\n\n{quality_table(report)}"
    emit(text, report, args.json)
    return 0


def train(plan: TrainPlan, config: TrainConfig, start: Path | None = None) -> dict[str, Any]:
    """Train heads into ``plan.output`` and return the report that is stored with them. ``start``: heads to go on from.

    Raises:
        TrainingError: no data, a work folder of another run, or ``start`` doesn't have the config's form.
        BundleExistsError: the output exists and ``plan.force`` is false.
        CheckpointError, UnsupportedArchitectureError: the backbone can't be exported.
    """
    from ..calibration.examples import load_examples
    from ..calibration.train import train_heads
    from ..export.backbone import load_backbone
    from ..runtime.bundle import refuse_existing
    from ..runtime.heads_file import read_heads_folder, write_heads
    from .console import Progress

    refuse_existing(plan.output, force=plan.force)
    before = None if start is None else read_heads_folder(start)
    claim(plan)
    _, tokens, _ = answer_prompts(backbone_bundle(plan, "backbone", None), plan, config.seed)
    backbone = load_backbone(plan.model, "fp32", plan.capacity).module
    with Progress("training") as progress:
        heads = train_heads(
            load_examples(plan.work / "train", config.num_heads),
            backbone.get_input_embeddings().weight.detach(),
            backbone.get_output_embeddings().weight.detach(),
            config,
            start=before,
            checkpoint=plan.work / f"checkpoint-{config.kind}-{config.num_layers}.pt",
            device=plan.device,
            progress=lambda step, total, loss: progress.update(step, note=f"loss {loss:.3f}", total=total),
        )
    report = {
        "tokens": tokens,
        "training": asdict(config),
        "data": {part: json.loads((plan.work / part / "data.json").read_text("utf-8")) for part in ("train", "heldout")},
        **measure_heads(heads, {part: plan.work / part for part in ("train", "heldout")}, backbone, plan.tree_rows),
    }
    write_heads(heads, plan.output, report, force=plan.force)
    return report


def measure_heads(heads: HeadSet, answers: Mapping[str, Path], backbone: Any, tree_rows: int) -> dict[str, Any]:
    """Hit rates on each folder of answers; paths, scaling and tree from those called ``heldout``.

    ``backbone``: the module whose embeddings the heads use.
    """
    from ..calibration.examples import load_examples
    from ..calibration.hit_rates import find_hits, platt_scaling
    from ..runtime.hits import path_rates, rank_rates
    from ..runtime.tree import expected_acceptance_length, tree_of_paths

    embedding, output_weight = backbone.get_input_embeddings().weight.detach(), backbone.get_output_embeddings().weight.detach()
    ranks = min(RANKS, heads.config.draft_vocab_size)
    found = {
        part: find_hits(heads, load_examples(folder, heads.config.num_heads), embedding, output_weight, ranks)
        for part, folder in answers.items()
    }
    rates = path_rates(found["heldout"].ranks)
    tree = tree_of_paths(rates, tree_rows)
    return {
        "hit_rates": {part: rank_rates(hits.ranks, ranks).round(4).tolist() for part, hits in found.items()},
        "path_rates": [[list(path), round(rates[path], 5)] for path in tree_of_paths(rates, _RATED_PATHS).paths[1:]],
        "platt_scaling": platt_scaling(found["heldout"]),
        "tree": tree.choices(),
        "expected_acceptance_length": round(expected_acceptance_length(tree, rates), 3),
    }


def hit_rate_table(rates: dict[str, list[list[float]]]) -> str:
    """Top-1 and top-5 hit rate of each head, on held-out answers and, where they were counted, on training answers."""
    from .console import table

    parts = [part for part in ("train", "heldout") if part in rates]
    rows = [
        [str(head + 1), *(f"{value:.3f}" for part in parts for value in (rates[part][head][0], sum(rates[part][head][:5])))]
        for head in range(len(rates["heldout"]))
    ]
    titles = {"train": "train", "heldout": "held-out"}
    return table(rows, ["head", *(f"{titles[part]} {top}" for part in parts for top in ("top-1", "top-5"))])


def claim(plan: TrainPlan) -> None:
    """A work folder belongs to one model: refuse to mix its answers with another's."""
    from ..runtime.errors import TrainingError

    plan.work.mkdir(parents=True, exist_ok=True)
    path, owner = plan.work / "model.json", {"model": str(plan.model.resolve()), "capacity": plan.capacity, "slots": plan.slots}
    if not path.exists():
        path.write_text(json.dumps(owner) + "\n", "utf-8")
    elif (found := json.loads(path.read_text("utf-8"))) != owner:
        raise TrainingError(f"{plan.work} belongs to a run with {found}", hint="give another --work folder")


def backbone_bundle(plan: TrainPlan, name: str, heads: Path | None) -> Session:
    """The bundle ``name`` in the work folder, loaded to answer many prompts at a time; exported where there is none.

    One with ``heads`` is exported anew: they may be other ones than before.
    """
    from ..export.exporter import export_bundle
    from ..runtime.session import load
    from .console import Progress

    bundle = plan.work / name
    if heads is not None or not bundle.exists():
        with Progress(f"exporting {name}") as progress:
            export_bundle(
                plan.model, heads, bundle, batch=plan.slots, capacity=plan.capacity, force=True, report=progress.phase
            )
    return load(bundle, slots=plan.slots, variant="cpu")


def answer_prompts(
    session: Session, plan: TrainPlan, seed: int
) -> tuple[list[list[int]], dict[str, int], list[tuple[list[int], list[int]]]]:
    """Let the backbone answer both prompt files into the work folder.

    Returns the training prompts, the number of answered tokens of each part, and the held-out prompts with their answers.
    """
    from ..calibration.distill import answers_by_prompt

    prompts, tokens = {}, {}
    for part in ("train", "heldout"):
        prompts[part], tokens[part] = answer(session, plan, part, seed)
    answers = answers_by_prompt(plan.work / "heldout")
    return prompts["train"], tokens, [(prompt, answers[index]) for index, prompt in enumerate(prompts["heldout"])]


def answer(
    session: Session, plan: TrainPlan, part: str, seed: int = 0, folder: str | None = None
) -> tuple[list[list[int]], int]:
    """Answer one prompt file into a folder of the work folder (None: ``part``). Returns prompts and the number of tokens."""
    from ..calibration.distill import distill
    from ..runtime.prompts import read_prompts
    from .console import Progress
    from .prompt_source import packaged_prompts

    path = (plan.prompts if part == "train" else plan.heldout) or packaged_prompts(part)
    prompts = [session.encode(line.request()) for line in read_prompts(path)]
    with Progress(f"answering {part} prompts", len(prompts)) as progress:
        count = distill(
            session,
            prompts,
            plan.work / (folder or part),
            max_new_tokens=plan.max_new_tokens,
            temperature=plan.temperature if part == "train" else 0.0,
            seed=seed,
            progress=lambda done, total, tokens: progress.update(done, note=f"{tokens:,} tokens"),
        )
    return prompts, count
