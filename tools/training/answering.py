"""Lets a backbone answer prompts for training, into a work folder whose parts the next run takes up again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...runtime.arguments import MAX_INTEGER, numbers, settle

if TYPE_CHECKING:
    from ...calibration.answers.answers import Answerer
    from ...runtime.text.encoder import PromptEncoder
    from ...runtime.text.prompts import PromptLine
    from .estimate import TimeEstimate

_CAPACITY = 2048


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """Settings of answering. ``prompts`` and ``heldout`` None take the prompts that come with the package.

    ``self_prompts``: the number of prompts that the backbone tries to write besides. ``temperatures``: each training prompt is
    answered once at each; 0 is greedy, as held-out answers always are. ``slots``: answers generated at a time. ``device``: on a
    CPU the runtime answers, elsewhere torch. ``autocast``: on a CPU torch answers the training prompts in bfloat16.
    """

    model: Path
    work: Path
    prompts: Path | None = None
    heldout: Path | None = None
    self_prompts: int = 0
    max_new_tokens: int = 400
    temperatures: tuple[float, ...] = (0.0,)
    slots: int = 48
    device: str = "cpu"
    seed: int = 0
    autocast: bool = False

    def __post_init__(self) -> None:
        settle(self, dict.fromkeys(("max_new_tokens", "slots"), (1, MAX_INTEGER)))
        temperatures = (0.0,) if self.temperatures is None else numbers("temperatures", self.temperatures)
        object.__setattr__(self, "temperatures", temperatures)


class Backbone(NamedTuple):
    """``answerer`` answers training prompts, ``exact`` held-out ones; ``encoder`` makes token ids of them."""

    answerer: Answerer
    exact: Answerer
    encoder: PromptEncoder


class Answered(NamedTuple):
    """By part (``train``, ``heldout``): its ``prompts``, one for each question, and the number of ``tokens`` answered."""

    prompts: dict[str, list[list[int]]]
    tokens: dict[str, int]


def claim(plan: AnswerPlan) -> None:
    """Mark the work folder as this model's, and refuse to mix its answers with another's.

    Raises:
        TrainingError: it belongs to another one.
    """
    from ...runtime.errors import TrainingError

    plan.work.mkdir(parents=True, exist_ok=True)
    path, owner = plan.work / "model.json", {"model": str(plan.model.resolve()), "slots": plan.slots}
    if not path.exists():
        path.write_text(json.dumps(owner) + "\n", "utf-8")
    elif (found := json.loads(path.read_text("utf-8"))) != owner:
        raise TrainingError(f"{plan.work} belongs to a run with {found}", hint="give another --work folder")


def open_backbone(plan: AnswerPlan, heads: Path | None = None) -> Backbone:
    """Open the model, with the adapter of ``heads`` merged if they are given, ready to answer many prompts at a time.

    A model with an adapter answers held-out prompts alone.
    """
    if plan.device != "cpu":
        return _in_torch(plan, heads)
    backbone = _in_runtime(plan, heads)
    return backbone._replace(answerer=_in_bfloat16(plan, backbone.encoder)) if plan.autocast and heads is None else backbone


def answer_prompts(backbone: Backbone, plan: AnswerPlan, estimate: TimeEstimate | None = None) -> Answered:
    """Let the backbone answer training and held-out prompts into the folders ``train`` and ``heldout``.

    ``estimate`` adds the time of the whole run to what is shown.
    """
    from ...calibration.answers.distill import GREEDY

    lines = [*_lines(plan, "train"), *_self_written(backbone, plan)]
    prompts, tokens = {}, {}
    prompts["train"], tokens["train"] = _answer(
        backbone.answerer, backbone.encoder, plan, lines, "train", plan.temperatures, plan.seed, estimate
    )
    prompts["train"] *= len(plan.temperatures)
    # Held-out answers are the same whatever training is done with.
    prompts["heldout"], tokens["heldout"] = _answer(
        backbone.exact, backbone.encoder, plan, _lines(plan, "heldout"), "heldout", GREEDY, 0
    )
    return Answered(prompts, tokens)


def heldout_count(plan: AnswerPlan) -> int:
    """Count the held-out prompts."""
    return len(_lines(plan, "heldout"))


def answer_heldout(backbone: Backbone, plan: AnswerPlan, folder: str) -> None:
    """Answer the held-out prompts greedily into another folder of the work folder, made anew."""
    import shutil

    from ...calibration.answers.distill import GREEDY

    shutil.rmtree(plan.work / folder, ignore_errors=True)
    _answer(backbone.exact, backbone.encoder, plan, _lines(plan, "heldout"), folder, GREEDY, 0)


def _answer(
    answerer: Answerer,
    encoder: PromptEncoder,
    plan: AnswerPlan,
    lines: list[PromptLine],
    folder: str,
    temperatures: tuple[float, ...],
    seed: int,
    estimate: TimeEstimate | None = None,
) -> tuple[list[list[int]], int]:
    from ...calibration.answers.distill import distill
    from ..console import Progress

    prompts = [encoder.encode(line.request()) for line in lines]
    with Progress(f"answering {folder} prompts", len(prompts) * len(temperatures)) as progress:

        def show(done: int, total: int, tokens: int) -> None:
            if estimate is not None and (words := estimate.first_words(done, total, tokens)):
                progress.say(words)
            note = f"{tokens:,} tokens" if estimate is None else estimate.note(done, total, tokens)
            progress.update(done, note=note)

        count = distill(
            answerer,
            prompts,
            plan.work / folder,
            max_new_tokens=plan.max_new_tokens,
            temperatures=temperatures,
            seed=seed,
            progress=show,
        )
    return prompts, count


def _lines(plan: AnswerPlan, part: str) -> list[PromptLine]:
    from ...runtime.text.prompts import read_prompts
    from ..prompt_source import packaged_prompts

    return read_prompts((plan.prompts if part == "train" else plan.heldout) or packaged_prompts(part))


def _self_written(backbone: Backbone, plan: AnswerPlan) -> list[PromptLine]:
    """Read the prompts that the backbone wrote, or let it write them; none of them is a held-out one."""
    from ...calibration.answers.self_prompts import write_self_prompts
    from ...runtime.text.prompts import read_prompts
    from ..console import Progress

    if not plan.self_prompts:
        return []
    path = plan.work / f"self-prompts-{plan.self_prompts}-{plan.seed}.jsonl"
    if not path.exists():
        heldout = [message["content"] for line in _lines(plan, "heldout") for message in line.messages or ()]
        with Progress("writing prompts", plan.self_prompts) as progress:
            write_self_prompts(
                backbone.answerer, backbone.encoder, plan.self_prompts, path,
                seed=plan.seed, known=heldout, progress=progress.update,
            )  # fmt: skip
    return read_prompts(path)


def _in_runtime(plan: AnswerPlan, heads: Path | None) -> Backbone:
    """Open a bundle in the work folder. One with ``heads`` is exported anew: they may be other ones than before."""
    from ...calibration.answers.distill import RuntimeAnswerer
    from ...export.exporter import export_bundle
    from ...runtime.session import load
    from ..console import Progress, warn

    bundle = plan.work / ("backbone" if heads is None else "tuned-bundle")
    if heads is not None or not bundle.exists():
        with Progress("exporting") as progress:
            export_bundle(plan.model, heads, bundle, batch=plan.slots, capacity=_CAPACITY, force=True, report=progress.phase)
    session = load(bundle, slots=plan.slots, variant="cpu", prefix_cache=False)
    warn(session.manifest.provenance.get("warnings", ()))
    answerer = RuntimeAnswerer(session)
    return Backbone(answerer, answerer, session.encoder)


def _in_bfloat16(plan: AnswerPlan, encoder: PromptEncoder) -> Answerer:
    """Open the model in torch beside the runtime, which has told what its text files lack."""
    from ...calibration.answers.torch_answerer import TorchAnswerer
    from ...export.backbone.adapter import backbone_digest
    from ...export.backbone.backbone import load_module

    module = load_module(plan.model, "fp32")
    eos = encoder.text.eos_token_ids
    return TorchAnswerer(module, backbone_digest(module), eos, plan.slots, plan.device, bfloat16=True)


def _in_torch(plan: AnswerPlan, heads: Path | None) -> Backbone:
    from ...calibration.answers.torch_answerer import TorchAnswerer
    from ...export.backbone.adapter import backbone_digest, merge_adapter
    from ...export.backbone.backbone import load_module
    from ...export.backbone.tokenizer import write_text_files
    from ...export.heads.layouts import read_heads
    from ...runtime.text.encoder import PromptEncoder
    from ..console import warn

    module = load_module(plan.model, "fp32")
    text_folder = plan.work / "text"
    text_folder.mkdir(exist_ok=True)
    text, warnings = write_text_files(plan.model, module.config, text_folder)
    warn(warnings)
    vocab_size = int(module.get_output_embeddings().weight.shape[0])
    adapter = None if heads is None else read_heads(heads).adapter
    weights = backbone_digest(module)
    if adapter is not None:
        module, weights = merge_adapter(module, adapter), "+".join([weights, *adapter.files.values()])
    answerer = TorchAnswerer(module, weights, text.eos_token_ids, plan.slots, plan.device, bfloat16=plan.autocast)
    return Backbone(answerer, answerer, PromptEncoder(text, vocab_size, text_folder.joinpath))
