"""The second stage of ``medusa-deploy train``: a LoRA adapter on the backbone together with the heads (Medusa-2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .train import TREE_ROWS, measure_heads

if TYPE_CHECKING:
    from ..calibration.finetune import FinetuneConfig, StepReport
    from ..runtime.prompt_encoder import PromptEncoder
    from .answering import AnswerPlan

_SHOWN_ANSWERS = 4
_TUNED_ANSWERS = "tuned-heldout"


def train_backbone(
    plan: AnswerPlan, output: Path, config: FinetuneConfig, heads: Path, *, tree_rows: int = TREE_ROWS, force: bool = False
) -> dict[str, Any]:
    """Train an adapter and heads that begin as ``heads`` into ``output``; return the report that is stored with them.

    The training answers are the original backbone's, as in the first stage. Hits are counted on what the tuned backbone answers
    to the held-out prompts, as an engine with the adapter merged answers them; those before, on the backbone's own answers.

    Raises:
        TrainingError: no data, a work folder of another run, heads that already have an adapter, or a loss that diverged.
        HeadsError, HeadsMismatchError: the heads can't be read, or belong to another backbone.
        BundleExistsError: the output exists and ``force`` is false.
    """
    from ..calibration.answers import answers_in_order
    from ..calibration.finetune import finetune
    from ..calibration.sequences import load_sequences
    from ..export.adapter import backbone_digest
    from ..export.backbone import load_module
    from ..export.head_layouts import read_heads
    from ..runtime.bundle import refuse_existing
    from ..runtime.errors import TrainingError
    from ..runtime.heads_file import write_heads
    from .answering import answer_heldout, answer_prompts, claim, open_backbone
    from .console import Progress

    refuse_existing(output, force=force)
    start = read_heads(heads)
    if start.adapter is not None:
        raise TrainingError(f"{heads} already has an adapter", hint="begin with heads of the first stage")
    claim(plan)
    backbone = open_backbone(plan)
    encoder = backbone.encoder
    answered = answer_prompts(backbone, plan)
    del backbone  # what it takes to answer many prompts at a time is large
    own = answers_in_order(plan.work / "heldout")
    texts = {
        "prose": _prose(encoder),
        "the backbone's own answers": [
            (prompt + answer, len(prompt)) for prompt, answer in zip(answered.prompts["heldout"], own, strict=True)
        ],
    }
    module = load_module(plan.model, "fp32")
    perplexities = {"backbone": _perplexities(module, texts, plan.device)}
    before = measure_heads(start.heads, {"heldout": plan.work / "heldout"}, module, tree_rows, plan.device)
    sequences = load_sequences(plan.work / "train", answered.prompts["train"])
    digest = backbone_digest(module)
    with Progress("training") as progress:

        def show(report: StepReport) -> None:
            losses = " ".join(f"{loss:.2f}" for loss in report.head_losses)
            progress.update(report.step, note=f"KL {report.divergence:.3f}, heads {losses}", total=report.total)

        tuned = finetune(
            module, digest, start.heads, sequences, config,
            checkpoint=plan.work / "checkpoint-stage-2.pt", device=plan.device, progress=show,
        )  # fmt: skip
    perplexities["tuned"] = _perplexities(module, texts, plan.device)
    unmeasured = plan.work / "tuned"
    write_heads(tuned.heads, unmeasured, force=True, adapter=tuned.adapter)
    answer_heldout(open_backbone(plan, unmeasured), plan, _TUNED_ANSWERS)
    pairs = list(zip(own, answers_in_order(plan.work / _TUNED_ANSWERS), strict=True))
    report = {
        "stage": 2,
        "tokens": answered.tokens,
        "training": asdict(config),
        "curve": tuned.curve,
        "quality": perplexities,
        "before": {name: before[name] for name in ("hit_rates", "expected_acceptance_length")},
        "answers": [{"backbone": _text(encoder, one), "tuned": _text(encoder, other)} for one, other in pairs[:_SHOWN_ANSWERS]],
        **measure_heads(tuned.heads, {"heldout": plan.work / _TUNED_ANSWERS}, module, tree_rows, plan.device),
    }
    write_heads(tuned.heads, output, report, force=force, adapter=tuned.adapter)
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


def _prose(encoder: PromptEncoder) -> list[tuple[list[int], int]]:
    """The package's held-out paragraphs, all tokens but the first predicted; none where the backbone has no tokenizer."""
    from .. import calibration

    if encoder.codec is None:
        return []
    paragraphs = (files(calibration) / "text" / "heldout.txt").read_text("utf-8").split("\n\n")
    return [(encoder.codec.encode(paragraph.strip(), add_special_tokens=True), 1) for paragraph in paragraphs]


def _perplexities(module: Any, texts: Mapping[str, list[tuple[list[int], int]]], device: str) -> dict[str, float]:
    """Perplexity of each kind of text that there is; ``module`` comes back to the CPU."""
    from ..calibration.quality import perplexity

    module.to(device)
    found = {name: perplexity(module, part, device) for name, part in texts.items() if part}
    module.to("cpu")
    return found


def _text(encoder: PromptEncoder, tokens: list[int]) -> Any:
    return tokens if encoder.codec is None else encoder.codec.decode(tokens)
