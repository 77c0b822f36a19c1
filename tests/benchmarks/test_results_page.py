"""benchmarks/results_page.py: docs/results.md and the README's table are what the reports say, and notice when they aren't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import results_page
from results_sections import engines, markdown, slots, speed

REPORTS = sorted(path.stem for path in markdown.RESULTS.glob("*.json"))
# The table of families is docs/families.md, and the reports of the GPU are tables of docs/gpu.md; path_heads.py reads the costs
# of the merged graph.
ELSEWHERE = {"engine-builds", "families", "gpu-h200", "gpu-h200-tensorrt-rtx", "smollm2-grounded-merged", "soak"}


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
    text = results_page.with_block("before\n<!-- results -->\nold\n<!-- end -->\nafter\n", "new")
    assert text == "before\n<!-- results -->\nnew\n<!-- end -->\nafter\n"
    assert results_page.with_block(text, "new") == text


def test_cells_of_the_table_of_gpus_link_to_their_evidence_or_are_dashes() -> None:
    rows = [line.strip("| ").split(" | ") for line in engines.coverage().splitlines()[2:]]
    assert {row[0] for row in rows} >= {"cuda", "tensorrt-rtx", "tensorrt", "torch reference"}
    for row in rows:
        for cell in row[3:]:
            assert cell == "–" or (markdown.ROOT / "docs" / cell[cell.index("(") + 1 : -1]).is_file(), row
    [full] = [row for row in rows if row[0] == "tensorrt"]
    assert full[3:] == ["–"] * 4, "the package tensorrt has never run"
    assert all(row[4:] == ["–"] * 3 for row in rows if row[0] == "tensorrt-rtx" and row[1].startswith("sm_"))


def test_a_wrong_token_on_a_gpu_changes_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(markdown.RESULTS, tmp_path / "results")
    monkeypatch.setattr(markdown, "RESULTS", tmp_path / "results")
    path = tmp_path / "results" / "gpu-h200.json"
    report = json.loads(path.read_text("utf-8"))
    report["stages"]["exact"]["results"]["executors"]["cuda"]["against_expected"]["unexplained"] = 1
    path.write_text(json.dumps(report), "utf-8")
    assert "[no](../benchmarks/results/gpu-h200.json)" in engines.coverage()
    assert results_page.GPU in results_page.stale()


def test_ratios_are_medians_over_prompts_that_both_answered() -> None:
    def system(*seconds: float) -> dict[str, object]:
        return {"runs": [{"prompt": prompt, "tokens": [0] * 12, "seconds": spent} for prompt, spent in enumerate(seconds)]}

    assert speed.ratio(system(1, 2, 4), system(2, 6, 40)) == pytest.approx(3)
    assert speed.ratio(system(1, 2, 4, 1), system(2, 6, 40)) == pytest.approx(3)


def test_paragraphs_are_wrapped_and_tables_are_not() -> None:
    row = "| " + "a " * 100 + "|"
    assert markdown.wrapped(f"# {'b ' * 80}\n\n{row}\n\nc\nd\n\n- e\n  f\n- g") == f"# {'b ' * 80}\n\n{row}\n\nc d\n\n- e f\n- g"


SIDE = {
    "tokens_per_s": 79.5,
    "steady_tokens_per_s": 81.23,
    "of_plain": 1.5,
    "request_tokens_per_s": {"median": 20.5, "worst": 10.25},
    "first_token_s": {"p50": 0.125, "p99": 0.5},
    "chunk_gap_s": {"p50": 0.05, "p99": 0.0625},
}
AT_ONCE = {
    "prompts": 16,
    "max_new_tokens": 128,
    "repeats": 3,
    "equal": {"prompts": 16, "of": 16, "different": []},
    "slots": [{"slots": 4, "plain": SIDE, "rows_5": SIDE, "chosen": SIDE}],
}
DURING = {"chunk_gap_s": {"p50": 0.25, "p99": 0.375}}
LONG_WAY = {"before": SIDE, "during": DURING, "limit_s": 0.5, "first_token_s": 2.5, "met": True}
LONG = {"long_prompt": 1500, "streams": 4, "repeats": 10, "prefill_chunk": 256, "ways": {"plain": LONG_WAY}}


def peer_entry(label: str, tokens_per_s: float, precision: str = "fp32") -> dict[str, object]:
    same = {"prompts": 16, "identical": 15, "prefix_share": 0.99}
    known = {"label": label, "precision": precision, "status": "measured", "versions": {"package": "1.2"}}
    return {**known, "tokens_per_s": tokens_per_s, "agreement": same}


BESIDE = {
    "settings": {"prompts": 16, "max_new_tokens": 128, "threads": 2, "ignore_eos": False},
    "slots": [
        {
            "slots": count,
            "best": {"fp32": {"peer": "theirs", "of_best_peer": {"ours-plain": 1.5}}},
            "systems": {
                "theirs": peer_entry("Theirs", 100.0 * count),
                "ours-plain": peer_entry("Ours", 150.0 * count),
                "absent": {"label": "Absent", "precision": "fp32", "status": "not installed", "reason": "pip install it"},
            },
        }
        for count in (4, 8)
    ],
}


def test_sections_of_several_requests_follow_their_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    sections = (slots.at_once, slots.long_prompts, slots.beside)
    assert [section() for section in sections] == ["", "", ""]
    for name, found in (("slots-fp32", AT_ONCE), ("long-prompt-int8", LONG), (slots.PEERS, BESIDE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found), "utf-8")
    assert "| 4 | rows chosen in each step | 81.2 | 1.50 | 20.5 | 10.2 | 125 | 50 | 62 |" in slots.at_once()
    assert "8 bits" not in slots.at_once()
    assert "| 8 bits | plain | 50 | 62 | 250 | 375 | 500 | 2500 | yes |" in slots.long_prompts()
    told = slots.beside()
    assert "| Ours | package 1.2 | 600.0 | 1.50 | 15 of 16 | 1200.0 | 1.50 | 15 of 16 |" in told
    assert "Absent" not in told
