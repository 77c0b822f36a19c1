"""The numbers of a comparison: rates, ratios, agreement and what an install weighs."""

from __future__ import annotations

from pathlib import Path

import pytest
from peer import install as peer_install, report as peer_report
from peer.process import Run


def run_of(prompt: int, tokens: list[int], seconds: float, first: float | None = None, steps: int | None = None) -> Run:
    return Run(prompt, tokens, seconds, first, steps, other_cpus=0.0)


def test_rates_are_medians_over_prompts_of_medians_over_repeats() -> None:
    runs = [run_of(0, [1] * 11, s, first=s - 1.0, steps=5) for s in (1.1, 2.2, 100.0)] + [run_of(1, [1] * 11, 1.1, 0.1, 5)]
    figures = peer_report.summary(runs)
    assert figures["tokens_per_s"] == pytest.approx((5.0 + 10.0) / 2)
    assert figures["decode_tokens_per_s"] == pytest.approx(10.0)
    assert figures["mean_acceptance_length"] == pytest.approx(2.0)


def test_a_system_that_tells_no_first_token_has_no_decode_rate() -> None:
    figures = peer_report.summary([run_of(0, [1, 2], 1.0)])
    assert figures["decode_tokens_per_s"] is None
    assert "mean_acceptance_length" not in figures


def test_ratio_is_paired_by_prompt() -> None:
    ours = [run_of(0, [1] * 10, 1.0), run_of(1, [1] * 10, 2.0), run_of(2, [1] * 10, 4.0)]
    theirs = [run_of(0, [1] * 10, 1.5), run_of(1, [1] * 10, 3.0)]
    assert peer_report.ratio(ours, theirs) == pytest.approx(1.5)


def test_agreement_counts_identical_prompts_and_the_common_prefix() -> None:
    reference = [run_of(0, [1, 2, 3, 4], 1.0), run_of(1, [5, 6, 7, 8], 1.0)]
    found = peer_report.agreement([run_of(0, [1, 2, 3, 4], 1.0), run_of(1, [5, 6, 9, 8], 1.0)], reference)
    assert found == {"prompts": 2, "identical": 1, "prefix_share": 0.75}


def distribution(folder: Path, name: str, size: int, *requires: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (folder / f"{name}.py").write_bytes(b"#" * size)
    (info / "METADATA").write_text("\n".join([f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {line}" for line in requires)]))
    (info / "RECORD").write_text(f"{name}.py,,\n")


def test_an_install_weighs_what_it_requires_on_this_platform_with_its_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "peerone", 100, "peertwo>=1; python_version > '3'", "peerabsent", 'peerthree; extra == "fast"')
    distribution(tmp_path, "peertwo", 20, "peerone")
    distribution(tmp_path, "peerthree", 3)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peer_install.footprint(["peerone"]) == {"peerone": 100, "peertwo": 20}
    assert peer_install.footprint(["peerone[fast]"]) == {"peerone": 100, "peerthree": 3, "peertwo": 20}
