"""The text of ``docs/families.md``, out of the report of ``families.py``. ``results_page.py`` writes it with the other pages."""

from __future__ import annotations

from collections import Counter
from typing import Any

from results_sections.markdown import ROOT, table, wrapped

COMMAND = "python benchmarks/results_page.py"
PAGE, REPORT = ROOT / "docs" / "families.md", ROOT / "benchmarks" / "results" / "families.json"
_SHOWN = {
    "not made": "not tried",
    "not tried": "not tried",
    "too slow": "too slow to tell",
    "crash": "crashes",
    "wrong tokens": "wrong",
}


def page(report: dict[str, Any]) -> str:
    """Return the text of ``docs/families.md``."""
    families: dict[str, dict[str, Any]] = report["families"]
    works = {name: each for name, each in families.items() if each["outcome"] == "works"}
    others = {name: each for name, each in families.items() if name not in works}
    counts = Counter(each["outcome"] for each in families.values())
    tokens = sum(each["tokens"] for each in works.values())
    wrong = sum(each.get("wrong", 0) for each in families.values())
    first = f"""# Families

transformers {report["transformers"]} registers {len(families)} families of causal language models. `benchmarks/families.py`
made a tiny random model of each, with sliding windows of 16 tokens where the family has windows, and exported it with a
capacity of {report["capacity"]}. It compared every greedy token with transformers' eager attention: plain and with a tree, on
the CPU graph and on the standard graph. `{COMMAND}` writes this page from
[its report](../benchmarks/results/families.json).

A refusal comes before a weight is loaded: `export` makes the model's modules without weights, looks at what they are, and runs
them once on tensors without numbers. Each layer must ask once for attention that transformers lets others compute.

{len(works)} families work: {tokens:,} tokens were compared, {wrong} were wrong. {counts["refused"]} are refused by name."""
    versions = [(name, each["architecture"], each["since"]) for name, each in works.items()]
    reasons = [(name, each["architecture"], _reason(each)) for name, each in others.items()]
    parts = [
        wrapped(first),
        "## What works",
        table(("family", "architecture", "works since"), versions, texts=3),
        "## What doesn't, and why",
        table(("family", "architecture", "why not"), reasons, texts=3),
    ]
    return "\n\n".join(parts) + "\n"


def _reason(result: dict[str, Any]) -> str:
    reason = result.get("reason", f"{result.get('wrong')} of {result.get('tokens')} tokens")
    shown = _SHOWN.get(result["outcome"])
    return (f"{shown}: {reason}" if shown else reason).replace("|", "\\|").replace("<", "&lt;")
