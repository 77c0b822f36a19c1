"""The second stage of ``medusa-deploy train``: a LoRA adapter on the backbone together with the heads (Medusa-2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.arguments import flag, integer, number, path, settings
from ...runtime.tree import MAX_ROWS
from .hit_rates import TREE_ROWS, measure_heads

if TYPE_CHECKING:
    from ...calibration.training.finetune import FinetuneConfig, StepReport, Tuned
    from ...runtime.files.heads import HeadSet
    from ...runtime.text.encoder import PromptEncoder
    from .answering import AnswerPlan

QUALITY_BUDGET = 0.02
_SHOWN_ANSWERS = 4
_JUDGED_ANSWERS = 64
_TUNED_ANSWERS = "tuned-heldout"


def train_backbone(
    plan: AnswerPlan,
    output: Path | str,
    config: FinetuneConfig,
    heads: Path | str,
    *,
    quality_budget: float = QUALITY_BUDGET,
    tree_rows: int = TREE_ROWS,
    force: bool = False,
) -> dict[str, Any]:
    """Train an adapter and heads that begin as ``heads`` into ``output``; return the report that is stored with them.

    The training answers are the original backbone's, as in the first stage. Of what was learnt, a share is kept: the largest
    one that raises the perplexity of the backbone's own answers to training prompts by no more than ``quality_budget``.

    Hits are counted on the tuned backbone's answers to the held-out prompts, as an engine with the adapter merged gives them. The
    hits before are counted on the backbone's own answers.

    Raises:
        TrainingError: no data, a work folder of another run, heads that already have an adapter, or a loss that diverged.
        HeadsError, HeadsMismatchError: the heads can't be read, or belong to another backbone.
        BundleExistsError: the output exists and ``force`` is false.
    """
    from ...calibration.answers.answers import answers_in_order
    from ...calibration.answers.sequences import load_sequences
    from ...calibration.training.finetune import FinetuneConfig, finetune
    from ...export.backbone.adapter import backbone_digest
    from ...export.backbone.backbone import load_module
    from ...export.backbone.logits import find_logit_change
    from ...export.heads.layouts import read_heads
    from ...runtime.errors import TrainingError
    from ...runtime.files.bundle import refuse_existing
    from ...runtime.files.heads_file import write_heads
    from ..console import Progress
    from ..prompt_source import heldout_prose
    from .answering import AnswerPlan, answer_heldout, answer_prompts, claim, open_backbone

    plan = settings("plan", plan, AnswerPlan, required=True)
    config = settings("config", config, FinetuneConfig)
    output, heads, force = path("output", output), path("heads", heads), flag("force", force)
    quality_budget = number("quality_budget", quality_budget, QUALITY_BUDGET)
    tree_rows = integer("tree_rows", tree_rows, TREE_ROWS, high=MAX_ROWS)
    refuse_existing(output, force=force)
    start = read_heads(heads)
    if start.adapter is not None:
        raise TrainingError(f"{heads} already has an adapter", hint="begin with heads of the first stage")
    claim(plan)
    backbone = open_backbone(plan)
    encoder = backbone.encoder
    answered = answer_prompts(backbone, plan)
    del backbone  # answering many prompts at a time takes much memory
    own = answers_in_order(plan.work / "heldout")
    texts = {
        "prose": [(tokens, 1) for tokens in heldout_prose(encoder)],
        "the backbone's own answers": [
            (prompt + answer, len(prompt)) for prompt, answer in zip(answered.prompts["heldout"], own, strict=True)
        ],
    }
    module = load_module(plan.model, "fp32")
    perplexities = {"backbone": _perplexities(module, texts, plan.device)}
    judged = _judged(plan, answered.prompts["train"])
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
            change=find_logit_change(module),
        )  # fmt: skip
    tuned, share = _within_budget(module, start.heads, tuned, judged, quality_budget, plan.device)
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
        "kept": {"share": share, "quality_budget": quality_budget},
        "quality": perplexities,
        "before": {name: before[name] for name in ("hit_rates", "expected_acceptance_length")},
        "answers": [{"backbone": _text(encoder, one), "tuned": _text(encoder, other)} for one, other in pairs[:_SHOWN_ANSWERS]],
        **measure_heads(tuned.heads, {"heldout": plan.work / _TUNED_ANSWERS}, module, tree_rows, plan.device),
    }
    write_heads(tuned.heads, output, report, force=force, adapter=tuned.adapter)
    return report


def quality_table(report: dict[str, Any]) -> str:
    """Table of the perplexities of backbone and tuned backbone."""
    from ..console import table

    quality = report["quality"]
    rows = [
        [name, f"{quality['backbone'][name]:.3f}", f"{quality['tuned'][name]:.3f}",
         f"{quality['tuned'][name] / quality['backbone'][name] - 1:+.2%}"]
        for name in quality["backbone"]
    ]  # fmt: skip
    return table(rows, ["perplexity of", "backbone", "tuned", "change"])


def _within_budget(
    module: Any, start: HeadSet, tuned: Tuned, judged: list[tuple[list[int], int]], budget: float, device: str
) -> tuple[Tuned, float]:
    """Keep the share of ``tuned`` that raises the perplexity of ``judged`` by no more than ``budget``. Returns both.

    ``module`` follows.

    Raises:
        TrainingError: that is nearly nothing.
    """
    from ...calibration.training.adapter import keep_share
    from ...calibration.training.interpolate import interpolate, share_within
    from ...calibration.training.quality import perplexity
    from ...runtime.errors import TrainingError

    def level(share: float) -> float:
        keep_share(module, share)
        return perplexity(module, _shown(f"judging a share of {share:.2f}", judged), device)

    module.to(device)

    untouched = level(0.0)
    share = share_within(budget, lambda share: level(share) / untouched - 1)
    if not share:
        raise TrainingError(
            f"hardly any of what was learnt stays within a quality budget of {budget:.1%}",
            hint="train with a smaller --heads-weight, or allow more with --quality-budget",
        )
    keep_share(module.to("cpu"), share)
    return interpolate(start, tuned, share), share


def _judged(plan: AnswerPlan, prompts: list[list[int]]) -> list[tuple[list[int], int]]:
    """Training answers that decide how much of the adapter to keep: some of those at the lowest temperature.

    ``prompts`` has one for each question; a temperature's questions follow those of the one before.
    """
    from ...calibration.answers.answers import iter_shards

    each = len(prompts) // len(plan.temperatures)
    lowest = plan.temperatures.index(min(plan.temperatures))
    found = [
        (prompts[answer.question] + answer.tokens.tolist(), len(prompts[answer.question]))
        for shard in iter_shards(plan.work / "train")
        for answer in shard
        if answer.question // each == lowest
    ]
    return found[:: max(1, len(found) // _JUDGED_ANSWERS)]


def _perplexities(module: Any, texts: Mapping[str, list[tuple[list[int], int]]], device: str) -> dict[str, float]:
    """Perplexity of each kind of text that there is. ``module`` comes back to the CPU."""
    from ...calibration.training.quality import perplexity

    module.to(device)
    found = {name: perplexity(module, _shown(f"reading {name}", part), device) for name, part in texts.items() if part}
    module.to("cpu")
    return found


def _shown(what: str, texts: Sequence[tuple[list[int], int]]) -> Iterator[tuple[list[int], int]]:
    from ..console import Progress

    with Progress(what, len(texts)) as bar:
        for done, text in enumerate(texts, 1):
            yield text
            bar.update(done)


def _text(encoder: PromptEncoder, tokens: list[int]) -> Any:
    return tokens if encoder.codec is None else encoder.codec.decode(tokens)
