"""benchmarks/results_page.py: docs/results.md and the README's table are what the reports say, and notice when they aren't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import results_page
from results_sections import markdown, speed

REPORTS = sorted(path.stem for path in markdown.RESULTS.glob("*.json"))
# The table of families is docs/families.md, and the reports of the GPU are tables of docs/gpu.md; path_heads.py reads the costs
# of the merged graph.
ELSEWHERE = {"families", "gpu-h200", "gpu-h200-tensorrt-rtx", "smollm2-grounded-merged"}


def test_the_page_and_the_readme_are_what_the_reports_say() -> None:
    assert results_page.stale() == [], f"run {results_page.COMMAND}"


def test_every_report_is_shown() -> None:
    page = results_page.page()
    assert [name for name in REPORTS if f"results/{name}.json" not in page] == sorted(ELSEWHERE & set(REPORTS))


@pytest.mark.parametrize("name", [name for name in REPORTS if name not in ELSEWHERE])
def test_a_figure_that_changes_in_a_report_changes_the_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(markdown.RESULTS, tmp_path / "results")
    monkeypatch.setattr(markdown, "RESULTS", tmp_path / "results")
    before = results_page.page()
    path = tmp_path / "results" / f"{name}.json"
    path.write_text(json.dumps(_shifted(json.loads(path.read_text("utf-8")))), "utf-8")
    assert results_page.page() != before
    assert results_page.PAGE in results_page.stale()


def _shifted(value: object) -> object:
    """The report with every fraction a hundredth larger."""
    if isinstance(value, dict):
        return {key: _shifted(found) for key, found in value.items()}
    if isinstance(value, list):
        return [_shifted(found) for found in value]
    if isinstance(value, float):
        return value * 1.01
    return value + 1 if type(value) is int and value > 10**6 else value


def test_only_the_part_between_the_comments_is_replaced() -> None:
    text = results_page.with_block("before\n<!-- results -->\nold\n<!-- end -->\nafter\n")
    assert text == f"before\n<!-- results -->\n{results_page.readme_block()}\n<!-- end -->\nafter\n"
    assert results_page.with_block(text) == text


def test_ratios_are_medians_over_prompts_that_both_answered() -> None:
    def system(*seconds: float) -> dict[str, object]:
        return {"runs": [{"prompt": prompt, "tokens": [0] * 12, "seconds": spent} for prompt, spent in enumerate(seconds)]}

    assert speed.ratio(system(1, 2, 4), system(2, 6, 40)) == pytest.approx(3)
    assert speed.ratio(system(1, 2, 4, 1), system(2, 6, 40)) == pytest.approx(3)


def test_paragraphs_are_wrapped_and_tables_are_not() -> None:
    row = "| " + "a " * 100 + "|"
    assert markdown.wrapped(f"# {'b ' * 80}\n\n{row}\n\nc\nd\n\n- e\n  f\n- g") == f"# {'b ' * 80}\n\n{row}\n\nc d\n\n- e f\n- g"
