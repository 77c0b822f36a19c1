"""What a bundle in few bits loses against its checkpoint, and what loading it takes.

    python benchmarks/few_bits.py REFERENCE BUNDLE --name qwen2.5-coder-0.5b --json benchmarks/results/few-bits-….json

REFERENCE is the same checkpoint, exported in float32. Both read the package's held-out prose and chat prompts: perplexity, KL
and agreement of the likeliest token at every position. Loading is measured in a process of its own. Quality doesn't depend on
what else the machine does; seconds do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from medusa_deploy.calibration.int8.layer_by_layer import LayerCalibrator
from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.runtime.session import Session, load
from medusa_deploy.tools.console import Progress, write_json
from medusa_deploy.tools.machine import measured_on
from medusa_deploy.tools.measure.agreement import Predictions
from medusa_deploy.tools.measure.probe import Probe
from medusa_deploy.tools.prompt_source import heldout_prose, prompts_for

ROWS = 32
_PROMPT = [1000, 2000, 3000, 4000]
_TOKENS = 16


def quality(reference: Path, few: Path, prompts: int, prose: int | None) -> dict[str, Any]:
    """Read the held-out texts with both bundles: the reference layer by layer, so that it needn't fit into memory."""
    session = load(few, check_hashes=False, prefix_cache=False)
    texts = {"prose": heldout_prose(session.encoder)[:prose], "prompts": prompts_for(session, None, prompts)}
    calibrator = LayerCalibrator(open_bundle(reference, check_hashes=False))
    together = [text[: calibrator.longest] for part in texts.values() for text in part]
    with Progress("the reference") as bar:
        states = iter(calibrator.projected_states(together, lambda note: bar.update(0, note)))
    report = {}
    for name, parts in texts.items():
        found = Predictions()
        with Progress(f"reading {name}", len(parts)) as bar:
            for done, text in enumerate(parts, 1):
                read(found, calibrator, next(states), session, text[: calibrator.longest])
                bar.update(done)
        whole = found.report()
        report[name] = {"texts": len(parts), **{key: whole[key] for key in ("positions", "perplexity", "argmax_agreement")}}
        report[name]["kl_nats"] = whole["kl_nats"]["mean"]
    return report


def read(found: Predictions, calibrator: LayerCalibrator, states: np.ndarray, session: Session, text: list[int]) -> None:
    """Predict each token of a text but the first. ``states``: what the reference's projection reads."""
    weight = calibrator.projection
    with Probe(session) as probe:
        probe.restart([])
        at = 0
        while at + 1 < len(text):
            rows = 1 << (min(ROWS, len(text) - 1 - at).bit_length() - 1)  # buffers are kept for each number
            blocks = calibrator.graph.weight_blocks(weight.weight, weight.axis)
            logits = np.concatenate([states[at : at + rows] @ block for block in blocks], axis=1)
            found.add(logits, probe.chain_logits(text[at : at + rows]), text[at + 1 : at + 1 + rows], at)
            at += rows


def loaded(bundle: Path) -> dict[str, Any]:
    """Load a bundle in this process and say what that took. ``rss_bytes``: behind the first tokens."""
    started, spent = time.perf_counter(), time.process_time()
    session = load(bundle)
    times = {"load_seconds": time.perf_counter() - started, "load_cpu_seconds": time.process_time() - spent}
    before = _resident()
    session.generate(token_ids=_PROMPT, max_new_tokens=_TOKENS, ignore_eos=True)
    return {**times, "rss_bytes_loaded": sum(before.values()), "rss_bytes": sum(_resident().values())}


def _resident() -> dict[str, int]:
    """Resident bytes of this process: its own (``RssAnon``) and pages of files (``RssFile``)."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssFile")))
    return {name: int(value.split()[0]) << 10 for name, value in fields.items()}


def main() -> int:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*", metavar="REFERENCE BUNDLE")
    parser.add_argument("--name", help="of the model")
    parser.add_argument("--prompts", type=int, default=48, help="held-out chat prompts to read (default: %(default)s)")
    parser.add_argument("--prose", type=int, default=None, help="pieces of prose to read (default: all)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", type=Path, help="load this bundle and print what that took, nothing else")
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(loaded(args.load)))
        return 0
    reference, few = args.bundles
    manifest = open_bundle(few, check_hashes=False).manifest
    (variant,) = manifest.variants
    facts = manifest.provenance["quantised"][variant]
    child = subprocess.run([sys.executable, __file__, "--load", str(few)], stdout=subprocess.PIPE, text=True, check=True)
    report = {
        **measured_on(),
        "model": args.name,
        "variant": variant,
        "bytes": sum(record.size for record in manifest.files.values()),
        "weights_bytes": sum(record.size for name, record in manifest.files.items() if name.endswith("weights.bin")),
        "quantised": {key: facts[key] for key in ("bits", "blocks", "products", "smoothed", "rescored", "rounding")},
        **json.loads(child.stdout),
        "quality": quality(reference, few, args.prompts, args.prose),
    }
    write_json(report, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
