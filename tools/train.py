"""``medusa-deploy train``: Medusa-1 heads for a backbone by self-distillation, from prompts to a heads folder.

Four stages, each kept in the work folder and taken up again by the next run: export the backbone alone, let it answer the
prompts, train on the cached hidden states, count hit rates on prompts that training never saw.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..calibration.train import TrainConfig
    from ..runtime.session import Session

HELP = "train Medusa heads on the backbone's own answers"
RANKS = 10
_RATED_PATHS = 128


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What to train on. ``prompts`` and ``heldout`` None take the prompts that come with the package.

    ``slots``: answers generated at a time. ``tree_rows``: size of the tree that is stored with the heads.
    """

    model: Path
    output: Path
    work: Path
    prompts: Path | None = None
    heldout: Path | None = None
    max_new_tokens: int = 400
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
    parser.add_argument("--kind", choices=("grounded", "medusa"), default="grounded", help="form of the heads")
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-layers", type=int, default=1, help="residual blocks a head")
    parser.add_argument("--draft-vocab-size", type=int, default=4096, help="tokens that heads can propose")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16, for processors that have it")
    parser.add_argument("--max-new-tokens", type=int, default=400, help="length of an answer at most")
    parser.add_argument("--slots", type=int, default=48, help="answers generated at a time")
    parser.add_argument("--tree-rows", type=int, default=5, help="rows of the tree that is stored with the heads")
    parser.add_argument("--device", default="cpu", help="torch device that trains the heads")
    parser.add_argument("--force", action="store_true", help="replace HEADS")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Train and print the hit rates."""
    from .extras import quiet_libraries, require

    require("export")
    quiet_libraries()
    from ..calibration.train import TrainConfig
    from .console import emit

    same = ("model", "output", "prompts", "heldout", "max_new_tokens", "slots", "tree_rows", "device", "force")
    work = args.work or args.output.with_name(args.output.name + ".work")
    plan = TrainPlan(work=work, **{name: getattr(args, name) for name in same})
    config = TrainConfig(**{name: getattr(args, name) for name in TrainConfig.__dataclass_fields__})
    report = train(plan, config)
    emit(hit_rate_table(report["hit_rates"]), report, args.json)
    return 0


def train(plan: TrainPlan, config: TrainConfig) -> dict[str, Any]:
    """Train heads into ``plan.output`` and return the report that is stored with them.

    Raises:
        TrainingError: no data, or a work folder of another run.
        BundleExistsError: the output exists and ``plan.force`` is false.
        CheckpointError, UnsupportedArchitectureError: the backbone can't be exported.
    """
    from ..calibration.hit_rates import find_hits, platt_scaling, rates_by_path, rates_by_rank
    from ..calibration.examples import load_examples
    from ..calibration.train import train_heads
    from ..export.backbone import load_backbone
    from ..runtime.bundle import refuse_existing
    from ..runtime.heads_file import write_heads
    from ..runtime.session import load
    from ..runtime.tree import tree_of_paths
    from .console import Progress
    from .prompt_source import packaged_prompts

    refuse_existing(plan.output, force=plan.force)
    _claim(plan)
    session = load(_backbone_bundle(plan), slots=plan.slots, variant="cpu")
    tokens = {}
    for part, path in (("train", plan.prompts), ("heldout", plan.heldout)):
        tokens[part] = _answer(session, path or packaged_prompts(part), plan, config.seed, part)
    del session
    backbone = load_backbone(plan.model, "fp32", plan.capacity).module
    embedding, output_weight = backbone.get_input_embeddings().weight.detach(), backbone.get_output_embeddings().weight.detach()
    examples, heldout = (load_examples(plan.work / part, config.num_heads) for part in ("train", "heldout"))
    with Progress("training") as progress:
        heads = train_heads(
            examples,
            embedding,
            output_weight,
            config,
            checkpoint=plan.work / f"checkpoint-{config.kind}-{config.num_layers}.pt",
            device=plan.device,
            progress=lambda step, total, loss: progress.update(step, note=f"loss {loss:.3f}", total=total),
        )
    ranks = min(RANKS, heads.config.draft_vocab_size)
    found = {
        part: find_hits(heads, data, embedding, output_weight, ranks)
        for part, data in (("train", examples), ("heldout", heldout))
    }
    path_rates = rates_by_path(found["heldout"])
    tree = tree_of_paths(path_rates, plan.tree_rows)
    report = {
        "tokens": tokens,
        "training": asdict(config),
        "data": {part: json.loads((plan.work / part / "data.json").read_text("utf-8")) for part in ("train", "heldout")},
        "hit_rates": {part: rates_by_rank(hits, ranks).round(4).tolist() for part, hits in found.items()},
        "path_rates": [[list(path), round(path_rates[path], 5)] for path in tree_of_paths(path_rates, _RATED_PATHS).paths[1:]],
        "platt_scaling": platt_scaling(found["heldout"]),
        "tree": tree.choices(),
        "expected_acceptance_length": round(1 + sum(path_rates[path] for path in tree.paths[1:]), 3),
    }
    write_heads(heads, plan.output, report, force=plan.force)
    return report


def hit_rate_table(rates: dict[str, list[list[float]]]) -> str:
    """Top-1 and top-5 hit rate of each head, on training and on held-out answers."""
    from .console import table

    def cells(part: str, head: int) -> list[str]:
        return [f"{rates[part][head][0]:.3f}", f"{sum(rates[part][head][:5]):.3f}"]

    rows = [[str(head + 1), *cells("train", head), *cells("heldout", head)] for head in range(len(rates["train"]))]
    return table(rows, ["head", "train top-1", "train top-5", "held-out top-1", "held-out top-5"])


def _claim(plan: TrainPlan) -> None:
    """A work folder belongs to one model: refuse to mix its answers with another's."""
    from ..runtime.errors import TrainingError

    plan.work.mkdir(parents=True, exist_ok=True)
    path, owner = plan.work / "model.json", {"model": str(plan.model.resolve()), "capacity": plan.capacity, "slots": plan.slots}
    if not path.exists():
        path.write_text(json.dumps(owner) + "\n", "utf-8")
    elif (found := json.loads(path.read_text("utf-8"))) != owner:
        raise TrainingError(f"{plan.work} belongs to a run with {found}", hint="give another --work folder")


def _backbone_bundle(plan: TrainPlan) -> Path:
    from ..export.exporter import export_bundle
    from .console import Progress

    bundle = plan.work / "backbone"
    if not bundle.exists():
        with Progress("exporting the backbone") as progress:
            export_bundle(plan.model, None, bundle, batch=plan.slots, capacity=plan.capacity, report=progress.phase)
    return bundle


def _answer(session: Session, path: Path, plan: TrainPlan, seed: int, part: str) -> int:
    from ..calibration.distill import distill
    from ..runtime.prompts import read_prompts
    from .console import Progress

    prompts = [session.encode(line.request()) for line in read_prompts(path)]
    with Progress(f"answering {part} prompts", len(prompts)) as progress:
        return distill(
            session,
            prompts,
            plan.work / part,
            max_new_tokens=plan.max_new_tokens,
            seed=seed,
            progress=lambda done, total, tokens: progress.update(done, note=f"{tokens:,} tokens"),
        )
