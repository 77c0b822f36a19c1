"""Calibrate a checkpoint of 7B layer by layer on a small machine: seconds and peak memory.

    python benchmarks/calibrate_big.py --work FOLDER --size 7b --json benchmarks/results/big-7b-calibrate.json

makes the checkpoint of random fp16 weights and the heads of ``big_models``, exports them with linked weights, calibrates the
bundle on random tokens in a process of its own, and removes what it made. Random weights serve for time and memory: their
scales say nothing. ``--layers`` cuts the model, for a quick look: the peak is that of one layer, or of what follows the last.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from big_models import HEADS, SIZES, Size, leave, machine, make_checkpoint, make_heads, tensor_shapes, timed

_GOAL_BYTES = 6 << 30


def measure(size: Size, base: Path, samples: int, tokens: int, smooth: str) -> dict[str, Any]:
    """Make what isn't there in ``base``, and calibrate."""
    model, heads, bundle, data, scales = (base / name for name in ("model", "heads", "bundle", "data.jsonl", "scales.json"))
    report: dict[str, Any] = {"layers": size.layers, "heads": HEADS, "samples": samples, "tokens": tokens, "smooth": smooth}
    report["weights_bytes"] = sum(2 * math.prod(shape) for shape in tensor_shapes(size).values())
    if not (bundle / "manifest.json").is_file():  # else one that --keep left
        shutil.rmtree(base, ignore_errors=True)
        make_heads(size, heads)
        make_checkpoint(size, model)
        export = ["export", str(model), "--heads", str(heads), "-o", str(bundle), "--dtype", "fp16", "--weights", "linked"]
        report["export"] = timed(export)
    texts = np.random.default_rng(2).integers(3, size.vocabulary, (samples, tokens)).tolist()
    data.write_text("".join(json.dumps({"token_ids": text}) + "\n" for text in texts), "utf-8")
    command = [
        "calibrate",
        str(bundle),
        "--data",
        str(data),
        "--layer-by-layer",
        "--smooth",
        smooth,
        "-o",
        str(scales),
        "--force",
    ]
    report["calibrate"] = timed(command)
    written = json.loads(scales.read_text("utf-8"))
    report["activations"], report["products"] = len(written["activations"]), len(written["layers"])
    report["scales_bytes"] = scales.stat().st_size
    report["versions"] = written["provenance"]["versions"]
    return report


def verdict(report: dict[str, Any]) -> str:
    """One line: the peak, against 6 GiB."""
    took, peak = report["calibrate"]["seconds"], report["calibrate"]["peak_rss_bytes"]
    fits = "stays within" if peak <= _GOAL_BYTES else "exceeds"
    return f"{report['layers']} layers: {took:.0f} s, a peak of {peak / (1 << 30):.2f} GiB {fits} {_GOAL_BYTES >> 30} GiB"


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with room for a checkpoint (13.5 GB, 26 GB)")
    parser.add_argument("--size", choices=sorted(SIZES), default="7b")
    parser.add_argument("--layers", type=int, help="make so many instead of the size's")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each sample (default: %(default)s)")
    parser.add_argument("--smooth", default="auto", help="as calibrate takes it (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and bundle; a bundle that is there is used")
    args = parser.parse_args()
    before, size = machine(), SIZES[args.size]
    size = replace(size, layers=args.layers or size.layers)
    base = args.work / f"calibrate-{args.size}-{size.layers}"
    try:
        report = {"machine": before, "size": args.size, **measure(size, base, args.samples, args.tokens, args.smooth)}
    finally:
        if not args.keep:
            shutil.rmtree(base, ignore_errors=True)
    leave(report, args.json, verdict(report))


if __name__ == "__main__":
    main()
