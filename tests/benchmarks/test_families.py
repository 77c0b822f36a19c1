"""benchmarks/families.py: ten families work, others are refused by name, and docs/families.md is what the report says."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
from family import page as families_page

REPORT = json.loads(families_page.REPORT.read_text("utf-8"))
TEN = ("llama", "qwen2", "qwen3", "phi3", "gemma", "granite", "olmo2", "glm4", "stablelm", "gpt2")
REFUSED = ("mixtral", "deepseek_v3", "gpt_oss", "mamba2", "lfm2", "bloom", "bart", "gptj")


@pytest.mark.slow
@pytest.mark.parametrize("family", TEN)
def test_a_family_decodes_what_transformers_does(family: str, tmp_path: Path) -> None:
    result = families.try_family(family, tmp_path)
    assert result["outcome"] == "works", result
    assert result["wrong"] == 0
    assert result["tokens"] == 2 * 2 * len(families.PROMPTS) * families.NEW_TOKENS


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_as_the_report_says(family: str, tmp_path: Path) -> None:
    result = families.try_family(family, tmp_path)
    assert result.pop("seconds") < 60  # the first import counts
    known = REPORT["families"][family]
    assert result == {name: known[name] for name in ("outcome", "error", "reason")}


def test_the_report_has_no_traceback_and_no_wrong_token() -> None:
    outcomes = {result["outcome"] for result in REPORT["families"].values()}
    assert outcomes <= {"works", "refused", "not made", "not tried", "fails by name"}
    assert sum(result.get("wrong", 0) for result in REPORT["families"].values()) == 0
    assert all(REPORT["families"][family]["outcome"] == "works" for family in TEN)


def test_every_family_of_the_report_is_in_the_page() -> None:
    page = families_page.page(REPORT)
    assert [name for name in REPORT["families"] if f"| {name} |" not in page] == []


def test_a_wrong_token_and_a_crash_show_in_the_page() -> None:
    broken = {
        "llama": {"architecture": "A", "outcome": "wrong tokens", "tokens": 480, "wrong": 7},
        "mamba": {"architecture": "B", "outcome": "crash", "reason": "exit code -9"},
    }
    page = families_page.page({**REPORT, "families": broken})
    assert "7 were wrong" in page
    assert "| llama | A | wrong: 7 of 480 tokens |" in page
    assert "| mamba | B | crashes: exit code -9 |" in page


def test_a_family_keeps_the_version_that_it_works_since() -> None:
    before = {"families": {"llama": {"outcome": "works", "since": "0.0.1"}, "gpt2": {"outcome": "refused"}}}
    assert families.since(before, "llama") == "0.0.1"
    assert families.since(before, "gpt2") == families.__version__ == families.since({}, "llama")
