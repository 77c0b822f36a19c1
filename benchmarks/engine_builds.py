"""Builds one bundle for GPU architectures and precisions, and records what the plans hold. No GPU is needed, none runs a plan.

    python benchmarks/engine_builds.py BUNDLE --name MODEL --scales scales.json --ways sm_89:int4,sm_89:fp8 -o report.json

Ways that the report has already stay; the bundle isn't changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from medusa_deploy.export.engines.builder_process import BuildRequest, build_plan
from medusa_deploy.export.engines.network import network_source
from medusa_deploy.export.engines.options import profiles_for, step_axes, step_sizes
from medusa_deploy.export.quantise.w8a8 import DEFAULTS, PrecisionOptions
from medusa_deploy.runtime.files.bundle import open_bundle


def main() -> int:
    """Build each way and write the report behind each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", required=True, help="the model's, in the report")
    parser.add_argument("--scales", type=Path)
    parser.add_argument("--ways", required=True, help="TARGET:PRECISION[:streamed], by commas")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    bundle = open_bundle(args.bundle, check_hashes=False)
    report = json.loads(args.output.read_text("utf-8")) if args.output.exists() else {"builds": []}
    report["versions"] = {"tensorrt-rtx": importlib.metadata.version("tensorrt-rtx")}
    done = {(entry["model"], entry["target"], entry["precision"], entry["weights"]) for entry in report["builds"]}
    rows = [int(each) for each in args.rows.split(",")]
    for way in args.ways.split(","):
        target, precision, *streamed = way.split(":")
        weights = "streamed" if streamed else "inside"
        if (args.name, target, precision, weights) in done:
            continue
        options = DEFAULTS if precision == "fp16" or args.scales is None else PrecisionOptions(args.scales)
        print(f"{target} {precision} {weights}", flush=True)
        with tempfile.TemporaryDirectory(prefix=".builds-", dir=args.output.parent) as scratch:
            network, plan = Path(scratch) / "network", Path(scratch) / "step.plan"
            network.mkdir()
            with network_source(bundle, precision, weights, network, options) as source:
                made = sum(path.stat().st_size for path in network.iterdir())
                profiles = profiles_for(bundle.manifest, rows, precision=precision)
                axes = step_axes(bundle.manifest.backbone.layers) | {weight.name: "." for weight in source.weight_inputs}
                sizes = tuple(step_sizes(profile) for profile in profiles)
                step = BuildRequest("tensorrt-rtx", target, str(source.step.absolute()), str(plan.absolute()), axes, sizes)
                log = build_plan(step, lambda *_progress: True).log
        entry: dict[str, Any] = {
            "model": args.name,
            "target": target,
            "precision": precision,
            "weights": weights,
            "activations": "8 bits" if options.scales is not None and precision in ("int8", "fp8") else "fp16",
            "profiles": [profile.name for profile in profiles],
            "plan_bytes": log.plan_bytes,
            "network_bytes": made,
            "peak_rss_bytes": log.peak_rss_bytes,
            "attention_calls": log.attention_calls,
            "constants": dict(log.constants),
            "products": {name: count for name, count in log.kernels.items() if name.startswith("product") or name.endswith("Fc")},
        }
        report["builds"].append(entry)
        args.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        print(json.dumps({name: entry[name] for name in ("plan_bytes", "peak_rss_bytes", "constants")}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
