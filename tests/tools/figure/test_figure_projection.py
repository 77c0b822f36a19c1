"""figure --projection: measured overhead at a published acceptance, never beside measured bars; refused if it doesn't add up."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from medusa_deploy.runtime.errors import BundleExistsError, UsageError
from medusa_deploy.tools.cli import OK, USER_ERROR, main
from medusa_deploy.tools.figure.projection import TITLE, describe_projection, draw_projection, projection_data
from medusa_deploy.tools.gpu_check.stages.overhead import PUBLISHED, SOURCE, project
from medusa_deploy.tools.verbs.figure import draw_figure, draw_projected

ROOT = Path(__file__).parents[3]
BENCH = ROOT / "benchmarks" / "results" / "smollm2-grounded.json"
H200 = ROOT / "benchmarks" / "results" / "gpu-h200.json"
COMMITTED = ROOT / "docs" / "projection.svg"
ONE, TWO = Path("one.json"), Path("two.json")


def entry(size: str, overheads: dict[str, float], *, rows: str = "64") -> dict[str, Any]:
    """What the stage ``overhead`` keeps of a size."""
    heads = {kind: {"8": {"ms": 5.1, "overhead": 1.02}, rows: {"ms": 5 * o, "overhead": o}} for kind, o in overheads.items()}
    found: dict[str, Any] = {"dtype": "float16", "length": 512, "plain": {"ms": 5.0}, "heads": heads, "notes": []}
    return found | ({"projection": project(PUBLISHED[size], heads)} if size in PUBLISHED else {})


def gpu_check(gpu: str = "GPU A", **changes: Any) -> dict[str, Any]:
    """A report of gpu_check: 7b with all kinds of heads, 13b with one, 8b without a published acceptance."""
    results = {
        "7b": entry("7b", {"own": 1.4, "shared": 1.25, "pruned": 1.2}),
        "8b": entry("8b", {"own": 1.5}),
        "13b": entry("13b", {"pruned": 1.17}),
        **changes,
    }
    return {"machine": {"gpu": [{"name": gpu}]}, "stages": {"overhead": {"status": "ok", "device": "cuda", "results": results}}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gpu_check.json"
    path.write_text(json.dumps(gpu_check()))
    return path


def texts(svg: str) -> list[str]:
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_a_bar_is_the_published_acceptance_over_the_measured_overhead() -> None:
    seven, thirteen = projection_data({ONE: gpu_check()}).sizes
    assert [(bar.kind, bar.overhead) for bar in seven.bars] == [("own", 1.4), ("shared", 1.25), ("pruned", 1.2)]
    assert [bar.speedup_if_so for bar in seven.bars] == pytest.approx([3.47 / 1.4, 3.47 / 1.25, 3.47 / 1.2])
    assert [(bar.kind, bar.speedup_if_so) for bar in thirteen.bars] == [("pruned", pytest.approx(3.51 / 1.17))]


def test_the_picture_says_what_was_measured_and_what_was_not() -> None:
    shown = texts(draw_projection(projection_data({ONE: gpu_check()}), "svg").decode())
    assert TITLE in shown
    assert f"Tokens a step: {SOURCE}." in shown
    assert "8b, GPU A: measured, but no acceptance is published for it." in shown
    assert {"speed-up, if it were so", "2.78×", "3.47 ÷ 1.25", "7b, GPU A", "13b, GPU A"} <= {*shown}
    assert not [text for text in shown if "tokens/s" in text or "How fast" in text]


def test_machines_can_be_named(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(gpu_check("GPU B")))
    data = draw_projected([file, other], tmp_path / "p.png", labels={other: "mine"})
    assert [size.name for size in data.sizes] == ["7b, GPU A", "13b, GPU A", "7b, mine", "13b, mine"]
    with pytest.raises(UsageError, match="none of the reports"):
        projection_data({ONE: gpu_check()}, {TWO: "mine"})


def test_measured_and_projected_are_never_drawn_together(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figure.svg"
    for options, hint in (([], "with --projection"), (["--projection"], "without --projection")):
        assert main(["figure", *options, str(BENCH), str(file), "-o", str(output)]) == USER_ERROR
        said = capsys.readouterr().err
        assert "isn't drawn with what was" in said and hint in said
    with pytest.raises(UsageError, match="is a report of gpu_check"):
        draw_figure([file], output)
    assert main(["figure", "--projection", str(file), "--stage", f"{file}=2", "-o", str(output)]) == USER_ERROR
    assert not output.exists()


def changed(**changes: Any) -> dict[str, Any]:
    size = entry("7b", {"own": 1.4})
    size["projection"] |= changes
    return gpu_check(**{"7b": size, "13b": {}})


@pytest.mark.parametrize(
    "broken",
    [
        {"stages": {}},
        {"stages": {"overhead": None}},
        gpu_check() | {"machine": {"gpu": []}},
        gpu_check(**{"7b": entry("8b", {"own": 1.2}), "13b": {}}),
        gpu_check(**{"7b": entry("7b", {"own": 1.2}, rows="32"), "13b": {}}),
        changed(measured=True),
        changed(speedup_if_so={"own": 3.0}),
        changed(tokens_per_step=0),
        changed(speedup_if_so={"own": 0}),
    ],
)
def test_what_holds_no_projection_is_refused_by_name(broken: Any) -> None:
    with pytest.raises(UsageError, match=r"two\.json holds no projection") as caught:
        projection_data({ONE: gpu_check(), TWO: broken})
    assert "gpu_check" in caught.value.hint


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_pictures_are_written_whole_and_the_same_every_time(suffix: str, file: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / f"{name}{suffix}" for name in ("first", "second"))
    for picture in (first, second):
        draw_projected([file], picture)
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(BundleExistsError):
        draw_projected([file], first)


def test_the_verb_prints_what_it_drew(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figure.json"
    assert main(["figure", "--projection", str(file), "-o", str(tmp_path / "figure.svg"), "--json", str(written)]) == OK
    shown = capsys.readouterr().out
    assert TITLE in shown and "3.47 tokens a step, published ÷ 1.20, measured = 2.89× if so" in shown
    assert json.loads(written.read_text("utf-8"))["measured"] is False


def test_the_committed_projection_says_what_the_committed_measurement_gives() -> None:
    committed, measured = COMMITTED.read_text("utf-8"), json.loads(H200.read_text("utf-8"))
    data = projection_data({H200: measured})
    [described] = re.findall(r'<desc id="desc">(.*?)</desc>', committed, re.DOTALL)
    assert unescape(described) == describe_projection(data)
    # Ticks are matplotlib's choice and may change with its version; everything else is ours.
    shown, ours = (
        [text for text in texts(svg) if not re.fullmatch(r"[\d.]+", text)]
        for svg in (committed, draw_projection(data, "svg").decode())
    )
    assert shown == ours
    assert TITLE in shown and f"Tokens a step: {SOURCE}." in shown
    for size, tokens in PUBLISHED.items():
        for kind, rows in measured["stages"]["overhead"]["results"][size]["heads"].items():
            bar = rows["64"]["ms"] / measured["stages"]["overhead"]["results"][size]["plain"]["ms"]
            assert {f"{tokens / bar:.2f}×", f"{tokens:.2f} ÷ {bar:.2f}"} <= {*shown}, kind
