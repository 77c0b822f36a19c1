"""Exports a model, and holds its greedy tokens against transformers over prompts longer than its windows.

``MODEL`` is a folder or a GGUF file. The bundle decodes plainly and with rows that it chooses itself. Every token is compared
with transformers' eager attention over the whole sequence, in float32. A token whose logit is behind the largest by less than
10⁻⁴ of it is a tie, which rounding decides.

The report goes to ``results/long-prompts-NAME.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from medusa_deploy.tools.console import write_json

RESULTS = Path(__file__).parent / "results"
TEXT = Path(__file__).parents[1] / "docs"
WAYS: tuple[dict[str, Any], ...] = ({"speculative": False}, {})
_NEAR = 1e-4  # of the largest logit


def prompts(bundle: Path, lengths: list[int]) -> list[list[int]]:
    """Return prompts of so many tokens: parts of the documents, or random tokens where the model has no tokenizer."""
    from medusa_deploy.runtime.files.bundle import open_bundle
    from medusa_deploy.runtime.text.tokenizer import TextCodec

    facts = open_bundle(bundle).manifest
    if not (bundle / "tokenizer.json").is_file():
        rng = np.random.default_rng(0)
        return [rng.integers(3, facts.backbone.vocab_size, length).tolist() for length in lengths]
    codec = TextCodec(bundle / "tokenizer.json")
    text = "\n".join(path.read_text("utf-8") for path in sorted(TEXT.glob("*.md")))
    return [codec.encode(text[20_000 * number : 20_000 * number + 8 * length])[:length] for number, length in enumerate(lengths)]


def compare(model: Path, bundle: Path, lengths: list[int], count: int) -> list[dict[str, Any]]:
    """Decode ``count`` tokens after each prompt; return what was compared."""
    import torch

    from medusa_deploy.export.backbone.backbone import load_module
    from medusa_deploy.runtime import load

    session = load(bundle)
    asked = prompts(bundle, lengths)
    answers = []
    for prompt in asked:
        runs = [session.generate(token_ids=prompt, max_new_tokens=count, ignore_eos=True, **way) for way in WAYS]
        answers.append([run.token_ids for run in runs])
    del session
    module = load_module(model, "fp32")
    module.set_attn_implementation("eager")
    found = []
    for prompt, (plain, drafted) in zip(asked, answers, strict=True):
        with torch.no_grad():
            logits = module(torch.tensor([prompt + plain]), use_cache=False).logits[0, len(prompt) - 1 : -1].float().numpy()
        behind = logits.max(-1) - logits[np.arange(count), plain]
        limit = _NEAR * float(np.abs(logits).max())
        found.append({
            "prompt": len(prompt), "tokens": count, "distinct": len(set(plain)), "wrong": int((behind > limit).sum()),
            "ties": int(((behind > 0) & (behind <= limit)).sum()), "same when drafted": plain == drafted,
        })  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Export, compare and write the report. Exit code 1: a wrong token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", required=True, help="of the model, for the report")
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--prompts", default="400,600,900", help="lengths in tokens")
    parser.add_argument("--tokens", type=int, default=48, help="after each prompt")
    args = parser.parse_args()
    from medusa_deploy.export.exporter import export_bundle

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export = export_bundle(args.model, None, bundle, capacity=args.capacity)
        found = compare(args.model, bundle, [int(length) for length in args.prompts.split(",")], args.tokens)
    report = {"model": args.name, "capacity": args.capacity, "prompts": found}
    write_json(report | {name: export[name] for name in ("check", "warnings")}, str(RESULTS / f"long-prompts-{args.name}.json"))
    return int(any(each["wrong"] or not each["same when drafted"] for each in found))


if __name__ == "__main__":
    raise SystemExit(main())
