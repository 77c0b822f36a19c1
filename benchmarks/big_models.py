"""Export and build checkpoints of real sizes on a small machine: seconds, peak memory, and what the plan holds.

    python -m benchmarks.big_models --work FOLDER --size 7b --json benchmarks/results/big-7b.json

makes a checkpoint of random fp16 weights, sharded as published ones are, with four Medusa heads; exports it with linked
weights, builds an engine with streamed weights, each in a process of its own, and removes what it made. Random weights
serve for time, memory and form: not for text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medusa_deploy.export.backbone.safetensors_header import header_bytes
from medusa_deploy.runtime.files.heads import HeadConfig
from medusa_deploy.runtime.files.heads_file import FORMAT, FORMAT_VERSION

HEADS = 4
_SHARD_BYTES = 5 << 30
_CHUNK = 16 << 20
_INDEX = "model.safetensors.index.json"
_GOAL_SECONDS = 300
_STEPS = ("export", "build")
_UNPACKED = "uncompressed_plan_bytes"


@dataclass(frozen=True)
class Size:
    """Shapes of a Llama without grouped queries."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int = 32000


SIZES = {"7b": Size(32, 4096, 11008, 32), "13b": Size(40, 5120, 13824, 40), "tiny": Size(3, 512, 1024, 4, 512)}


def tensor_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, in the order in which published checkpoints store them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        base = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{base}.self_attn.{name}_proj.weight"] = (size.hidden, size.hidden)
        shapes[f"{base}.mlp.gate_proj.weight"] = shapes[f"{base}.mlp.up_proj.weight"] = (size.intermediate, size.hidden)
        shapes[f"{base}.mlp.down_proj.weight"] = (size.hidden, size.intermediate)
        shapes[f"{base}.input_layernorm.weight"] = shapes[f"{base}.post_attention_layernorm.weight"] = (size.hidden,)
    shapes["model.norm.weight"] = (size.hidden,)
    shapes["lm_head.weight"] = (size.vocabulary, size.hidden)
    return shapes


def make_checkpoint(size: Size, folder: Path, seed: int = 0) -> None:
    """Write ``config.json``, the shards and, last, their index."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads, "vocab_size": size.vocabulary, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensor_shapes(size).items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and filled + nbytes > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    rng = np.random.default_rng(seed)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        print(f"writing {file_name}", file=sys.stderr, flush=True)
        _write(folder / file_name, shard, rng)
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(2 * math.prod(shape) for shard in shards for shape in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index), "utf-8")


def make_heads(size: Size, folder: Path, seed: int = 1) -> None:
    """Write four heads of one block each that share the backbone's vocabulary projection."""
    folder.mkdir(parents=True)
    config = HeadConfig("medusa", HEADS, 1, size.hidden, size.vocabulary, "shared")
    fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(config)}
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(HEADS):
        shapes[f"head.{head}.layer.0.weight"] = (size.hidden, size.hidden)
        shapes[f"head.{head}.layer.0.bias"] = (size.hidden,)
    _write(folder / "heads.safetensors", shapes, np.random.default_rng(seed))


def _write(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    with path.open("wb") as file:
        file.write(header_bytes({name: ("F16", shape) for name, shape in shapes.items()}))
        for name, shape in shapes.items():
            if "norm" in name:
                file.write(np.ones(shape, np.float16).tobytes())
                continue
            for bits in _random_bits(math.prod(shape), rng):
                file.write(bits.data)


def _random_bits(count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """fp16 numbers with random sign and mantissa and magnitudes from 2^-7 to 2^-6: as wide as trained weights are."""
    for first in range(0, count, _CHUNK):
        bits = np.frombuffer(rng.bytes(2 * min(_CHUNK, count - first)), np.uint16).copy()
        bits &= 0x83FF
        bits |= (15 - 7) << 10
        yield bits


def timed(arguments: list[str]) -> dict[str, Any]:
    """Run ``medusa-deploy`` in a process of its own and measure it."""
    command = [sys.executable, "-m", "medusa_deploy", *arguments]
    print(" ".join(["medusa-deploy", *arguments]), file=sys.stderr, flush=True)
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def measure(name: str, work: Path, target: str, keep: bool, rows: str | None) -> dict[str, Any]:
    """Make, export, build, and remove."""
    size = SIZES[name]
    base = work / f"big-{name}"
    model, heads, bundle = base / "model", base / "heads", base / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    weights = sum(2 * math.prod(shape) for shape in tensor_shapes(size).values())
    try:
        if not (model / _INDEX).is_file():  # else one that --keep left
            shutil.rmtree(base, ignore_errors=True)
            make_heads(size, heads)
            make_checkpoint(size, model)
        export = ["export", str(model), "--heads", str(heads), "-o", str(bundle)]
        export += ["--dtype", "fp16", "--weights", "linked"]
        report: dict[str, Any] = {"size": name, "layers": size.layers, "heads": HEADS, "weights_bytes": weights}
        report["export"] = timed(export)
        build = ["build", str(bundle), "--target", target, "--weights", "streamed"]
        report["build"] = timed(build + ([] if rows is None else ["--rows", rows]))
        for unit in ("seconds", "cpu_seconds"):
            report[f"total_{unit}"] = round(report["export"][unit] + report["build"][unit], 1)
        engine = bundle / "engines" / target
        plans = sorted(engine.glob("*.plan*"))
        report["stored_plan_bytes"] = {path.name: path.stat().st_size for path in plans}
        manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
        report["check"] = {key: manifest["provenance"][key] for key in ("check", "weights")}
        record = json.loads((engine / "engine.json").read_text("utf-8"))
        report["profiles"] = [profile["name"] for profile in record["profiles"]]
        logs = {name: {_UNPACKED if key == "plan_bytes" else key: each for key, each in log.items()}
                for name, log in record["logs"].items()}  # fmt: skip
        report[_UNPACKED] = {name: log[_UNPACKED] for name, log in logs.items()}
        report["fused_attention_calls_a_profile"] = record["logs"][record["plan"]]["attention_calls"] / len(record["profiles"])
        report["weight_inputs"] = len(record["weight_inputs"])
        report["builder"] = logs
        report["versions"] = {**manifest["provenance"]["versions"], record["backend"]: record["backend_version"]}
        return report
    finally:
        if not keep:
            shutil.rmtree(base, ignore_errors=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was before."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = [round(average, 1) for average in os.getloadavg()]
    return {"platform": platform.platform(), "processors": os.cpu_count(), "memory_bytes": memory, "load_averages": load}


def verdict(report: dict[str, Any]) -> str:
    """One line: whether export and build took five minutes at most, by the clock."""
    steps = ", ".join(f"{name} {report[name]['seconds']:.0f} s ({report[name]['cpu_seconds']:.0f} CPU s)" for name in _STEPS)
    fits = "fits" if report["total_seconds"] <= _GOAL_SECONDS else "does not fit"
    loads = "/".join(map(str, report["machine"]["load_averages"]))
    return f"{report['size']}: {steps}: {fits} in {_GOAL_SECONDS // 60} minutes, at load averages of {loads} before"


def leave(report: dict[str, Any], path: Path | None, verdict: str) -> None:
    """Print a report, and its verdict beside it; to ``path``, too, if there is one."""
    text = json.dumps(report, indent=1) + "\n"
    if path is not None:
        path.write_text(text, "utf-8")
    print(text, end="")
    print(verdict, file=sys.stderr)


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with room for a checkpoint (13.5 GB, 26 GB)")
    parser.add_argument("--size", choices=sorted(SIZES), default="7b")
    parser.add_argument("--target", default="sm_89")
    parser.add_argument("--rows", help="step sizes that get a profile (default: those of build)")
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and bundle; one that is there is used")
    args = parser.parse_args()
    before = machine()
    report = {"machine": before, **measure(args.size, args.work, args.target, args.keep, args.rows)}
    leave(report, args.json, verdict(report))


if __name__ == "__main__":
    main()
