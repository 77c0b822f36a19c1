"""Numbers of a figure of bench reports: bars, speed-ups and parts of a step. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import UsageError
from .reports import is_gpu_check

_DTYPES = {"float32": "fp32", "float16": "fp16"}
_VARIANTS = {"cpu-int8": "8 bits", "cpu-int4": "4 bits"}
_SCHEMA = "give reports that medusa-deploy bench --json wrote"


@dataclass(frozen=True, slots=True)
class Bar:
    """Decoding in one way: ``stage`` 0 is plain, 1 and 2 are Medusa-1 and Medusa-2.

    ``speedup`` is against plain decoding in the same run, whose rate is ``plain_tokens_per_s``. ``lookup`` says that the prompt
    is looked up, too. ``tokens``: emitted by a step, on average.
    """

    stage: int
    lookup: bool
    tokens_per_s: float
    plain_tokens_per_s: float
    speedup: float
    tokens: float

    @property
    def cost(self) -> float:
        """Time of a step, on average, in plain steps."""
        return self.tokens / self.speedup

    @property
    def label(self) -> str:
        """The bar's name in the legend."""
        if not self.stage:
            return "without Medusa"
        return f"Medusa-{self.stage}{' + prompt lookup' if self.lookup else ''}"


@dataclass(frozen=True, slots=True)
class StepTime:
    """Parts of one step in milliseconds; ``backbone + added + host`` is the median step.

    ``backbone``: the engine's part of a plain step, one row. ``added``: the engine's time beyond it, for more rows and the heads.
    ``host``: the share of the wall time that the engine doesn't take.
    """

    label: str
    backbone: float
    added: float
    host: float
    tokens: float

    @property
    def total(self) -> float:
        """Milliseconds of the step."""
        return self.backbone + self.added + self.host


@dataclass(frozen=True, slots=True)
class Group:
    """One model in one precision on one machine. ``model`` is its label; ``name`` tells it from other groups of that label.

    ``settings`` say what was measured and on which machine. ``notes`` are for the reader.
    """

    name: str
    model: str
    precision: str
    settings: str
    bars: tuple[Bar, ...]
    steps: tuple[StepTime, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FigureData:
    """All groups. ``shared`` holds their settings where they are the same; it is empty where each group needs its own."""

    groups: tuple[Group, ...]
    shared: str

    @property
    def below(self) -> list[str]:
        """Lines for the foot of a picture: what was measured and how, and notes."""
        notes = [note for group in self.groups for note in group.notes]
        precisions = {group.precision for group in self.groups}
        if self.shared:
            return [f"{precisions.pop()} · {self.shared}" if len(precisions) == 1 else self.shared, *notes]
        return [*(f"{group.name}: {group.precision} · {group.settings}" for group in self.groups), *notes]


def figure_data(
    reports: Mapping[Path, Any], labels: Mapping[Path, str] | None = None, stages: Mapping[Path, int] | None = None
) -> FigureData:
    """Build the figure of bench reports by file. Reports with one label and the same settings share a group.

    ``labels`` name models. A file without one is named by the ``label`` in it, else by its stem. ``stages`` are 1 or 2; without
    one the report says it, else 1.

    Raises:
        UsageError: no report, one of another schema or without steps, a label or stage for no report, or a stage twice.
    """
    labels, stages = labels or {}, stages or {}
    if not reports:
        raise UsageError("no report: there is nothing to draw", hint=_SCHEMA)
    for path in [*labels, *stages]:
        if path not in reports:
            raise UsageError(f"{path} is none of the reports", hint=f"reports: {', '.join(map(str, reports))}")
    parts: dict[tuple[str, str, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for path, report in reports.items():
        _check(path, report)
        stage = stages.get(path) or report["environment"]["bundle"].get("stage", 1)
        if stage not in (1, 2):
            raise UsageError(f"{path}: stage {stage!r} is neither 1 nor 2", hint="say which with --stage")
        model = labels.get(path) or str(report.get("label", path.stem))
        group = parts.setdefault((model, precision(report), settings(report)), [])
        if stage in (earlier for earlier, _ in group):
            raise UsageError(
                f"{path} is a second report of Medusa-{stage} for {model}",
                hint="tell them apart with --label FILE=NAME or --stage FILE=2",
            )
        group.append((stage, report))
    same, groups = {line for *_, line in parts}, []
    for (model, how, line), found in parts.items():
        others = [other for other in parts if other[0] == model]
        if len(others) == 1:
            name = model
        elif len({other[1] for other in others}) == len(others):
            name = f"{model}, {how}"
        else:  # the lines below the picture explain the numbers
            name = f"{model} ({others.index((model, how, line)) + 1})"
        groups.append(_group((name, model, how, line), sorted(found, key=lambda part: part[0])))
    return FigureData(tuple(groups), same.pop() if len(same) == 1 else "")


def precision(report: Mapping[str, Any]) -> str:
    """Name the precision that a report was measured in."""
    bundle = report["environment"]["bundle"]
    return _VARIANTS.get(bundle.get("variant")) or _DTYPES.get(bundle["dtype"], bundle["dtype"])


def settings(report: Mapping[str, Any]) -> str:
    """Describe a report's machine and prompts in a line."""
    environment = report["environment"]
    device = environment.get("gpu") or f"{environment['cpu']}, {environment['cores']} cores"
    how = f"sampled at temperature {report['temperature']:g}" if "temperature" in report else "greedy"
    return f"{device} · {how}, {report['prompts']} prompts, at most {report['max_new_tokens']} tokens, batch 1"


def _group(names: tuple[str, str, str, str], found: Sequence[tuple[int, Mapping[str, Any]]]) -> Group:
    """Make a group of reports by stage. ``names``: its first four fields."""
    plain = found[0][1]["plain"]
    bars = [Bar(0, False, plain["tokens_per_s"], plain["tokens_per_s"], 1.0, 1.0)]
    host = plain["ms_per_step"] * plain["host_fraction"]
    steps = [StepTime("plain step", plain["ms_per_step"] - host, 0.0, host, 1.0)]
    notes = []
    for stage, report in found:
        # Where steps run ahead of the host, `medusa` is a fixed tree, and only `best_rows` looks into the prompt.
        looked_up = "best_rows" if "best_rows" in report else "medusa"
        ways = {"heads_only": False, "medusa": looked_up == "medusa", "best_rows": True}
        if looked_up == "best_rows":
            del ways["heads_only"]
        own = report["plain"]["tokens_per_s"]
        for way, lookup in ways.items():
            if way in report:
                side = report[way]
                bars.append(Bar(stage, lookup, side["tokens_per_s"], own, side["speedup"], side["mean_acceptance_length"]))
        steps.append(_medusa_step(next(bar.label for bar in bars if bar.stage == stage and bar.lookup), report, looked_up))
        equal = report["equal"]
        if equal["different"]:
            which = f"{len(equal['different'])} of {equal['of']}"
            notes.append(f"{names[0]}, Medusa-{stage}: {which} outputs differ between the ways")
    return Group(*names, tuple(bars), tuple(steps), tuple(notes))


def _medusa_step(label: str, report: Mapping[str, Any], way: str) -> StepTime:
    plain, side = report["plain"], report[way]
    host = side["ms_per_step"] * side["host_fraction"]
    engine = side["ms_per_step"] - host
    # Noise can make the whole engine's part shorter than a plain step's: then the rows and heads added nothing measurable.
    backbone = min(engine, plain["ms_per_step"] * (1 - plain["host_fraction"]))
    return StepTime(label, backbone, engine - backbone, host, side["mean_acceptance_length"])


def _check(path: Path, report: Any) -> None:
    """Check that ``report`` is one of bench and has steps in it.

    Raises:
        UsageError: it isn't.
    """
    if is_gpu_check(report):
        raise UsageError(
            f"{path} is a report of gpu_check, which measures no acceptance: what it projects isn't drawn with what was measured",
            hint="draw it by itself, with --projection",
        )
    shape: dict[str, dict[str, type | tuple[type, ...]]] = {
        "environment": {"cpu": str, "cores": int, "bundle": dict},
        "plain": _SIDE,
        "medusa": _SIDE | _DRAFTING,
        "equal": {"different": list, "of": int},
    }
    for optional in ("heads_only", "best_rows"):
        if isinstance(report, Mapping) and optional in report:
            shape[optional] = _SIDE | _DRAFTING
    for part, fields in shape.items():
        holder = report.get(part) if isinstance(report, Mapping) else None
        for field, kind in fields.items():
            if not isinstance(holder, Mapping) or not isinstance(holder.get(field), kind):
                raise UsageError(f"{path} is no report of bench: it has no {part}.{field}", hint=_SCHEMA)
    if not isinstance(report["environment"]["bundle"].get("dtype"), str):
        raise UsageError(f"{path} is no report of bench: it has no environment.bundle.dtype", hint=_SCHEMA)
    for field in ("prompts", "max_new_tokens"):
        if not isinstance(report.get(field), int):
            raise UsageError(f"{path} is no report of bench: it has no {field}", hint=_SCHEMA)
    if not all(report[way]["steps"] and report[way]["tokens_per_s"] > 0 for way in shape if "steps" in shape[way]):
        raise UsageError(f"{path} holds no decode steps", hint="measure again with other prompts")


_NUMBER = (int, float)
_SIDE: dict[str, type | tuple[type, ...]] = {
    "tokens_per_s": _NUMBER, "ms_per_step": _NUMBER, "host_fraction": _NUMBER, "steps": int,
}  # fmt: skip
_DRAFTING: dict[str, type | tuple[type, ...]] = {"speedup": _NUMBER, "mean_acceptance_length": _NUMBER}
