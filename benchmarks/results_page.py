"""Writes ``docs/results.md``, ``docs/families.md`` and the tables of the README and of ``docs/gpu.md`` out of the reports.

The reports lie in ``benchmarks/results``.

Usage: ``python benchmarks/results_page.py``, or with ``--check`` to compare instead of to write.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from family.page import PAGE as FAMILIES, REPORT as OF_FAMILIES, page as families_page
from results_sections import engines, model_sizes, quality, sizes, slots, speed
from results_sections.markdown import ROOT, report, wrapped

COMMAND = "python benchmarks/results_page.py"
PAGE, README, GPU = ROOT / "docs" / "results.md", ROOT / "README.md", ROOT / "docs" / "gpu.md"
START, END = "<!-- results -->", "<!-- end -->"
SECTIONS = (
    model_sizes.section,
    speed.medusa,
    speed.peers,
    slots.at_once,
    slots.beside,
    slots.long_prompts,
    speed.sampled,
    quality.exactness,
    speed.chosen_rows,
    speed.fixed_trees,
    quality.heads,
    quality.path_heads,
    quality.eight_bits,
    quality.four_bits,
    quality.libraries,
    sizes.few_bits,
    engines.precisions,
    sizes.big_models,
)


def page() -> str:
    """The text of ``docs/results.md``."""
    first = f"""# Results

`{COMMAND}` writes this page and the README's table from the reports in
[`benchmarks/results/`](../benchmarks/results). A test holds both to the reports. [concepts.md](concepts.md) explains the words,
[benchmarks/README.md](../benchmarks/README.md) how each report is made,
[gpu.md](gpu.md#measured-on-an-h200) what a GPU measured."""
    return "\n\n".join(wrapped(section) for section in (first, *filter(None, (section() for section in SECTIONS)))) + "\n"


def readme_block() -> str:
    """The README's table, and how it was measured; plain decoding beside another engine's."""
    peers = report(speed.PEERS)["systems"]
    plain, llama = peers["ours-plain"], peers["llama.cpp"]
    ratio = speed.ratio(llama, plain)
    beside = f"llama.cpp F32 has {ratio:.2f} times the speed of plain decoding (SmolLM2, with prefill)."
    return f"{model_sizes.readme_table()}\n\n{wrapped(beside)}"


def with_block(text: str, block: str) -> str:
    """A page whose part between the two comments is the current ``block``."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{block}\n{END}{after}"


def wanted_pages() -> dict[Path, str]:
    """All pages as the reports want them."""
    blocks = {README: readme_block(), GPU: engines.coverage()}
    whole = {PAGE: page(), FAMILIES: families_page(json.loads(OF_FAMILIES.read_text("utf-8")))}
    return whole | {path: with_block(path.read_text("utf-8"), block) for path, block in blocks.items()}


def stale() -> list[Path]:
    """The files that the reports have left behind."""
    return [path for path, text in wanted_pages().items() if not path.is_file() or path.read_text("utf-8") != text]


def main() -> int:
    """Write the pages, or say which is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a file isn't what the reports say")
    if parser.parse_args().check:
        for path in (found := stale()):
            print(f"{path.relative_to(ROOT)} isn't what the reports say: run {COMMAND}", file=sys.stderr)
        return 1 if found else 0
    for path, text in wanted_pages().items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
