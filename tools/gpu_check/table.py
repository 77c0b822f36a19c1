"""Writes the merged report for a person: short, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..console import human_bytes, table


def describe_check(report: Mapping[str, Any]) -> str:
    """Describe the machine, then the state of each stage with the reason when it isn't ok, then the figures."""
    machine, stages = report["machine"], report["stages"]
    gpus = ", ".join(gpu.get("name", "?") for gpu in machine["gpu"]) or "no GPU that nvidia-smi shows"
    lines = [f"{gpus}; {machine['cpu']}, {machine['cores']} cores; {machine['date']}", ""]
    lines += [table([_state(name, stage) for name, stage in stages.items()], ["stage", "device", "status", "s"])]
    for name, stage in stages.items():
        reasons = ([stage["error"]["message"]] if stage["error"] else []) + [
            f"{what}: {why}" for kind in ("wrong", "skipped") for what, why in stage[kind].items()
        ]
        lines += [f"{name}: {reason[:200]}" for reason in reasons]
    for name, describe_stage in _SECTIONS.items():
        results = stages.get(name, {}).get("results")
        section = describe_stage(results) if results else ""
        lines += ["", section] if section else []
    return "\n".join(lines)


def _state(name: str, stage: Mapping[str, Any]) -> list[Any]:
    return [name, stage["device"], stage["status"].upper() if stage["status"] == "wrong" else stage["status"], stage["seconds"]]


def _sizes_of(results: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Entries of model sizes; the results hold others, too."""
    return {size: entry for size, entry in results.items() if isinstance(entry, Mapping) and field in entry}


def _doctor(results: Mapping[str, Any]) -> str:
    lines = []
    for name in ("torch", "onnxruntime", "tensorrt_rtx"):
        facts = results.get(name)
        if facts is None:
            lines.append(f"{name}: {results.get('imports', {}).get(name, 'not tried')}")
            continue
        said = [facts["version"], facts.get("sm"), ", ".join(facts.get("providers", ()))]
        if name == "tensorrt_rtx":
            loads = [sm for sm, what in facts["loads"].items() if what == "loads"]
            listed = {True: "is listed", False: "is not listed"}.get(facts.get("this_gpu_is_listed", ""), "")
            said += [f"{facts.get('this_gpu', '')} {listed}".strip(), f"plans that load here: {', '.join(loads) or 'none'}"]
        lines.append(f"{name}: {'; '.join(str(part) for part in said if part)}")
    return "\n".join([*lines, f"executors that load the bundle: {', '.join(results.get('executors', ())) or 'none'}"])


def _exact(results: Mapping[str, Any]) -> str:
    rows = []
    for backend, entry in results.get("executors", {}).items():
        expected = entry["against_expected"]
        plain, unexplained = f"{entry['plain_ms_per_step']:.2f}", entry["unexplained"]
        host = f"{entry['host_fraction']:.1%}"
        rows.append([backend, expected["tokens_compared"], expected["divergences"], unexplained, plain, host])
    headers = ["exact: executor", "tokens", "divergences", "unexplained", "plain ms a step", "host"]
    return table(rows, headers) if rows else ""


def _memory(results: Mapping[str, Any]) -> str:
    rows = []
    for size, entry in _sizes_of(results, "weights_bytes").items():
        cache = next(value for name, value in entry.items() if name.startswith("cache_bytes_of_"))
        heads = [human_bytes(entry["heads_bytes"][kind]) for kind in ("own", "shared", "pruned")]
        rows.append([size, human_bytes(entry["weights_bytes"]), human_bytes(cache), *heads])
    return table(rows, ["memory: size", "weights", "cache of 4096", "heads own", "shared", "pruned"]) if rows else ""


def _curve(results: Mapping[str, Any]) -> str:
    sizes = _sizes_of(results, "lengths")
    counts = sorted({int(n) for entry in sizes.values() for times in entry["lengths"].values() for n in times})
    rows = [
        [size, length, *(f"{times[str(n)]['ms']:.3f}" if str(n) in times else None for n in counts)]
        for size, entry in sizes.items()
        for length, times in entry["lengths"].items()
    ]
    return table(rows, ["curve: ms, size", "visible", *(f"{n} rows" for n in counts)]) if rows else ""


def _batch(results: Mapping[str, Any]) -> str:
    counts = sorted({int(n) for entry in results.values() for by_slots in entry["rows"].values() for n in by_slots})
    rows = [
        [backend, count, *(f"{by_slots[str(n)]['ms']:.2f}" if str(n) in by_slots else None for n in counts)]
        for backend, entry in results.items()
        for count, by_slots in entry["rows"].items()
    ]
    return table(rows, ["batch: ms, executor", "rows a slot", *(f"{n} slots" for n in counts)]) if rows else ""


def _sizes(results: Mapping[str, Any]) -> str:
    shares = ("of_read_bandwidth", "host_fraction")
    rows = [
        [size, length, f"{found['tokens_per_s']:.1f}", f"{found['gb_s']:.0f}", *(f"{found[share]:.1%}" for share in shares)]
        for size, entry in _sizes_of(results, "lengths").items()
        for length, found in entry["lengths"].items()
    ]
    return table(rows, ["sizes: plain", "visible", "tokens/s", "GB/s", "of a copy's", "host"]) if rows else ""


def _overhead(results: Mapping[str, Any]) -> str:
    sizes = _sizes_of(results, "heads")
    counts = sorted({int(n) for entry in sizes.values() for by_rows in entry["heads"].values() for n in by_rows})
    rows = [
        [size, kind, *(f"{by_rows[str(n)]['overhead']:.2f}×" if str(n) in by_rows else None for n in counts)]
        for size, entry in sizes.items()
        for kind, by_rows in entry["heads"].items()
    ]
    lines = [table(rows, ["overhead: size", "heads", *(f"{n} rows" for n in counts)])] if rows else []
    for size, entry in sizes.items():
        guess = entry.get("projection", {})
        said = ", ".join(f"{kind} {value:.2f}×" for kind, value in guess.get("speedup_if_so", {}).items())
        if said:
            lines.append(f"projection, NOT measured, {size} at {guess['tokens_per_step']} tokens a step: {said}")
            lines.append(f"  acceptance: {guess['acceptance_source']}")
    return "\n".join(lines)


def _breakdown(results: Mapping[str, Any]) -> str:
    parts = ("step", "attention", "projections", "mlp", "vocabulary", "cache writes", "rest", "heads own, one row")
    rows = [
        [size, count, *(f"{found[part]:.3f}" if part in found else None for part in parts)]
        for size, entry in _sizes_of(results, "host").items()
        for count, found in entry["rows"].items()
    ]
    lines = [table(rows, ["breakdown: ms, size", "rows", *parts])] if rows else []
    for size, entry in _sizes_of(results, "host").items():
        said = ", ".join(f"{name} {found['host_fraction']:.1%}" for name, found in entry["host"].items())
        lines += [f"host fraction, {size}: {said}"] if said else []
    return "\n".join(lines)


def _cuda_7b(results: Mapping[str, Any]) -> str:
    found = {precision: entry for precision, entry in results.items() if isinstance(entry, Mapping) and "load_s" in entry}
    counts = sorted({int(n) for entry in found.values() for n in entry["rows"]})
    rows, lines = [], []
    for precision, entry in found.items():
        graph, nodes = entry.get("cuda_graph", {}), entry.get("nodes", {})
        by_kind = {
            "step": {n: f"{each['ms']:.2f}" for n, each in entry["rows"].items()},
            "bound": {n: f"{each['bound_ms']:.2f}" for n, each in entry["rows"].items() if each["bound_ms"] is not None},
            "CUDA graph": {n: f"{ms:.2f}" for n, ms in graph.get("ms", {}).items() if graph["captured"]},
        }
        rows += [[precision, kind, *(by_count.get(str(n)) for n in counts)] for kind, by_count in by_kind.items()]
        said = [f"loaded in {entry['load_s']} s", *(f"{count} nodes on {provider}" for provider, count in nodes.items())]
        said += [f"{max(each['copied_bytes'] for each in entry['rows'].values())} bytes copied a step at most"]
        said += [f"attention: {kernel['name'][:60]}" for kernel in entry.get("profile", {}).get("1", {}).get("attention", ())[:2]]
        said += [] if graph.get("captured", True) else [f"no CUDA graph: {graph['reason'][:100]}"]
        lines += [f"{precision}: {part}" for part in said]
    size = results.get("made", {}).get("size", "")
    return "\n".join([table(rows, [f"cuda-7b: ms, {size}", "", *(f"{n} rows" for n in counts)]), *lines]) if rows else ""


_SECTIONS = {
    "doctor": _doctor,
    "exact": _exact,
    "memory": _memory,
    "curve": _curve,
    "batch": _batch,
    "sizes": _sizes,
    "overhead": _overhead,
    "breakdown": _breakdown,
    "cuda-7b": _cuda_7b,
}
