"""The second stage of ``medusa-deploy train``: a LoRA adapter on the backbone together with the heads (Medusa-2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..calibration.finetune import FinetuneConfig, StepReport
    from ..runtime.session import Session
    from .train import TrainPlan

_SHOWN_ANSWERS = 4


def train_backbone(plan: TrainPlan, heads: Path, config: FinetuneConfig) -> dict[str, Any]:
    """Train an adapter and heads that begin as ``heads`` into ``plan.output``; return the report that is stored with them.

    The training answers are the original backbone's, as in the first stage. Hits are counted on what the tuned backbone answers
    to the held-out prompts, as an engine with the adapter merged answers them.

    Raises:
        TrainingError: no data, a work folder of another run, heads that already have an adapter, or a loss that diverged.
        HeadsError, HeadsMismatchError: the heads can't be read, or belong to another backbone.
        BundleExistsError: the output exists and ``plan.force`` is false.
    """
    from ..calibration.finetune import finetune
    from ..calibration.sequences import load_sequences
    from ..export.adapter import backbone_digest
    from ..export.backbone import load_module
    from ..export.head_layouts import read_heads
    from ..runtime.bundle import refuse_existing
    from ..runtime.errors import TrainingError
    from ..runtime.heads_file import write_heads
    from .console import Progress
    from .train import answer_prompts, backbone_bundle, claim, measure_heads

    refuse_existing(plan.output, force=plan.force)
    start = read_heads(heads)
    if start.adapter is not None:
        raise TrainingError(f"{heads} already has an adapter", hint="begin with heads of the first stage")
    claim(plan)
    backbone = backbone_bundle(plan, "backbone", None)
    prompts, tokens, heldout_texts = answer_prompts(backbone, plan, config.seed)
    own = [(prompt + answer, len(prompt)) for prompt, answer in heldout_texts]
    texts = {"prose": _prose(backbone), "the backbone's own answers": own}
    del backbone  # its caches are large
    module = load_module(plan.model, "fp32")
    before = _quality(module, texts)
    sequences = load_sequences(plan.work / "train", prompts)
    digest = backbone_digest(module)
    with Progress("training") as progress:

        def show(report: StepReport) -> None:
            losses = " ".join(f"{loss:.2f}" for loss in report.head_losses)
            progress.update(report.step, note=f"KL {report.divergence:.3f}, heads {losses}", total=report.total)

        tuned = finetune(
            module, digest, start.heads, sequences, config,
            checkpoint=plan.work / "checkpoint-stage-2.pt", device=plan.device, progress=show,
        )  # fmt: skip
    after = _quality(module.to("cpu"), texts)
    unmeasured = plan.work / "tuned"
    write_heads(tuned.heads, unmeasured, force=True, adapter=tuned.adapter)
    merged = backbone_bundle(plan, "tuned-bundle", unmeasured)
    answers = _answers(merged, plan)
    report = {
        "stage": 2,
        "tokens": tokens,
        "training": asdict(config),
        "curve": tuned.curve,
        "quality": {"backbone": before, "tuned": after},
        "answers": [
            {"backbone": _text(merged, one), "tuned": _text(merged, other)}
            for (_, one), other in list(zip(heldout_texts, answers, strict=True))[:_SHOWN_ANSWERS]
        ],
        **measure_heads(tuned.heads, {"heldout": plan.work / "tuned-heldout"}, module, plan.tree_rows),
    }
    write_heads(tuned.heads, plan.output, report, force=plan.force, adapter=tuned.adapter)
    return report


def quality_table(report: dict[str, Any]) -> str:
    """Perplexities of backbone and tuned backbone."""
    from .console import table

    quality = report["quality"]
    rows = [
        [name, f"{quality['backbone'][name]:.3f}", f"{quality['tuned'][name]:.3f}",
         f"{quality['tuned'][name] / quality['backbone'][name] - 1:+.2%}"]
        for name in quality["backbone"]
    ]  # fmt: skip
    return table(rows, ["perplexity of", "backbone", "tuned", "change"])


def _prose(session: Session) -> list[tuple[list[int], int]]:
    """The package's held-out paragraphs, all tokens but the first predicted; none where the backbone has no tokenizer."""
    from .. import calibration

    if session.codec is None:
        return []
    paragraphs = (files(calibration) / "text" / "heldout.txt").read_text("utf-8").split("\n\n")
    return [(session.codec.encode(paragraph.strip(), add_special_tokens=True), 1) for paragraph in paragraphs]


def _quality(module: Any, texts: Mapping[str, list[tuple[list[int], int]]]) -> dict[str, float]:
    """Perplexity of each kind of text that there is."""
    from ..calibration.quality import perplexity

    return {name: perplexity(module, part) for name, part in texts.items() if part}


def _answers(session: Session, plan: TrainPlan) -> list[list[int]]:
    """What the tuned backbone answers to the held-out prompts, by prompt."""
    import shutil

    from ..calibration.distill import answers_by_prompt
    from .train import answer

    # A tuned backbone of another run may have answered before.
    shutil.rmtree(plan.work / "tuned-heldout", ignore_errors=True)
    answer(session, plan, "heldout", folder="tuned-heldout")
    found = answers_by_prompt(plan.work / "tuned-heldout")
    return [found[index] for index in sorted(found)]


def _text(session: Session, tokens: list[int]) -> Any:
    return tokens if session.codec is None else session.codec.decode(tokens)
