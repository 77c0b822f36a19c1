"""Says how much a variant may lose, and whether a report of ``compare`` keeps to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class QualityBudget:
    """The most that B may lose against A.

    Perplexity may rise by ``max_perplexity_increase`` percent. Mean acceptance length may fall to the share
    ``min_acceptance_ratio``. A divergence of B's speculative from its plain decoding must be explained by rounding.
    """

    max_perplexity_increase: float = 2.0
    min_acceptance_ratio: float = 0.98


def judge(report: Mapping[str, Any], budget: QualityBudget) -> dict[str, Any]:
    """Check a report against a budget, item by item.

    The perplexity is that of the answers or of the prose, whichever rose more.
    """
    read = [report[name] for name in ("answers", "prose") if report[name] is not None]
    increases = [part["perplexity"]["increase_percent"] for part in read]
    increase = max(increases, key=lambda found: (math.isnan(found), found))
    ratio, unexplained = report["acceptance"]["ratio"], report["exactness"]["b"]["unexplained"]
    checks = [
        ("perplexity_increase_percent", increase, budget.max_perplexity_increase, increase <= budget.max_perplexity_increase),
        ("acceptance_ratio", ratio, budget.min_acceptance_ratio, ratio >= budget.min_acceptance_ratio),
        ("unexplained_divergences", unexplained, 0, unexplained == 0),
    ]
    named = [dict(zip(("name", "value", "limit", "passed"), check, strict=True)) for check in checks]
    return {"passed": all(check["passed"] for check in named), "checks": named}
