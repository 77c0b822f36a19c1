"""The first stage of ``medusa-deploy train``: heads on the frozen backbone (Medusa-1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.arguments import flag, integer, optional_path, path, settings
from ...runtime.tree import MAX_ROWS
from .hit_rates import TREE_ROWS, measure_heads

if TYPE_CHECKING:
    from ...calibration.training.train import TrainConfig
    from ...runtime.files.heads import HeadSet
    from .answering import AnswerPlan

FORM = ("kind", "num_heads", "num_layers", "draft_vocab_size")
"""Fields of the heads' config that say what they compute; heads to go on from bring their own."""


def train(
    plan: AnswerPlan,
    output: Path | str,
    chosen: Mapping[str, Any],
    start: Path | str | None = None,
    *,
    tree_rows: int = TREE_ROWS,
    force: bool = False,
) -> dict[str, Any]:
    """Train heads into ``output`` and return the report that is stored with them.

    ``chosen`` holds the fields of ``TrainConfig`` that differ from the defaults. ``start`` are heads to go on from; they bring
    their form.

    Raises:
        TrainingError: no data, a work folder of another run, or ``start`` has another form than what was chosen, or an adapter.
        BundleExistsError: the output exists and ``force`` is false.
        CheckpointError, UnsupportedArchitectureError: the backbone can't be exported.
        UsageError: an argument of another type, or out of range.
    """
    from ...calibration.training.examples import load_examples
    from ...calibration.training.train import train_heads
    from ...export.backbone.backbone import backbone_shape, load_config, load_module
    from ...export.backbone.logits import find_logit_change
    from ...export.estimate import empty_module
    from ...runtime.files.bundle import refuse_existing
    from ...runtime.files.heads_file import write_heads
    from ..console import Progress
    from .answering import AnswerPlan, answer_prompts, claim, heldout_count, open_backbone
    from .estimate import TimeEstimate, time_steps

    plan = settings("plan", plan, AnswerPlan, required=True)
    output, start, force = path("output", output), optional_path("heads", start), flag("force", force)
    tree_rows = integer("tree_rows", tree_rows, TREE_ROWS, high=MAX_ROWS)
    refuse_existing(output, force=force)
    before, config = _start(start, chosen)
    claim(plan)
    with Progress("timing training steps"):
        hidden = backbone_shape(empty_module(load_config(plan.model, 1))).hidden_size
        step = time_steps(config, hidden, plan.device)
    tokens = answer_prompts(open_backbone(plan), plan, TimeEstimate(config, step, heldout_count(plan), plan.slots)).tokens
    backbone = load_module(plan.model, "fp32")
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
            change=find_logit_change(backbone),
        )
    answers = {part: plan.work / part for part in ("train", "heldout")}
    report = {
        "tokens": tokens,
        "training": asdict(config),
        "data": {part: json.loads((folder / "data.json").read_text("utf-8")) for part, folder in answers.items()},
        **measure_heads(heads, answers, backbone, tree_rows, plan.device),
    }
    write_heads(heads, output, report, force=force)
    return report


def _start(heads: Path | None, chosen: Mapping[str, Any]) -> tuple[HeadSet | None, TrainConfig]:
    """Read the heads to go on from, if there are any, and make the config of their form and what was chosen."""
    from ...calibration.training.train import TrainConfig
    from ...export.heads.layouts import read_heads
    from ...runtime.errors import TrainingError, UsageError

    known = TrainConfig.__dataclass_fields__
    if unknown := [name for name in chosen if name not in known]:
        raise UsageError(f"unknown settings {', '.join(map(str, unknown))}", hint=f"settings: {', '.join(known)}")
    if heads is None:
        return None, TrainConfig(**chosen)
    read = read_heads(heads)
    if read.adapter is not None:
        raise TrainingError(f"{heads} come with an adapter, and belong to the backbone with it", hint="leave --heads out")
    form = {name: getattr(read.heads.config, name) for name in FORM}
    return read.heads, TrainConfig(**{**form, **chosen})
