"""Sections about models that are larger than memory."""

from __future__ import annotations

from .markdown import GIB, MIB, change, exists, link, report, share, table

_FEW_BITS = tuple(
    f"few-bits-qwen2.5-coder-{size}-{kind}" for size in ("0.5b", "1.5b") for kind in ("int8", "int4", "int4-nearest")
)


def big_models() -> str:
    """Exports, engine builds and calibrations of a 7B and a 13B on a small machine."""
    names = {"7b": "big-7b", "13b": "big-13b"}
    rows = []
    for size, name in names.items():
        found = report(name)
        export, build = found["export"], found["build"]
        rows.append(
            (
                link(name, size),
                f"{found['weights_bytes'] / 1e9:.1f} GB",
                *(f"{part['seconds']:.1f} s" for part in (export, build)),
                f"{found['total_seconds']:.1f} s",
                f"{found['total_cpu_seconds']:.1f} s",
                *(f"{part['peak_rss_bytes'] / GIB:.1f} GiB" for part in (export, build)),
                f"{found['stored_plan_bytes']['step.plan.xz'] / 1e6:.2f} MB",
                f"{found['uncompressed_plan_bytes']['step.plan.xz'] / 1e6:.0f} MB",
            )
        )
    header = ("", "weights", "export", "build", "both", "CPU time", "export's peak RSS", "build's", "step plan", "unpacked")
    machine = report("big-7b")["machine"]
    return f"""## Big models

Random fp16 weights in Vicuna's shapes, four heads, exported with linked weights and built with streamed ones, on
{machine["processors"]} quiet cores and {machine["memory_bytes"] / GIB:.0f} GiB of memory
([method](../benchmarks/README.md#big_modelspy-checkpoints-of-7b-and-13b-on-a-small-machine)):

{table(header, rows)}

`calibrate --layer-by-layer` of the same 7B. The second row ran beside other work on both cores, so its seconds say little:

{table(("", "layers", "samples", "`--smooth`", "time", "CPU time", "peak RSS", "scales"), _calibrations())}"""


def few_bits() -> str:
    """What `export --precision` loses at 0.5B and 1.5B, and the memory of what it writes."""
    names = [name for name in _FEW_BITS if exists(name)]
    if not names:
        return ""
    rows = []
    for name in names:
        found = report(name)
        prose, prompts = found["quality"]["prose"], found["quality"]["prompts"]
        rounding = f", {found['quantised']['rounding']}" if found["variant"] == "cpu-int4" else ""
        rows.append(
            (
                link(name, f"{found['model']}, {found['variant']}{rounding}"),
                f"{found['bytes'] / GIB:.2f} GiB",
                f"{found['rss_bytes'] / found['weights_bytes']:.2f}",
                *(change(part["perplexity"]["increase_percent"]) for part in (prose, prompts)),
                *(share(part["argmax_agreement"]["share"]) for part in (prose, prompts)),
            )
        )
    header = ("", "on disk", "RSS ÷ weights", "perplexity of prose", "of chat prompts", "same likeliest token", "in chat prompts")
    found = report(names[0])["quality"]
    return f"""## Few bits at 0.5B and 1.5B

`export --precision` of Qwen2.5-Coder-Instruct (GGUF, Q4_K_M), against the same file in float32
([method](../benchmarks/README.md#few_bitspy-what-export---precision-loses)):
{found["prose"]["positions"]} positions of held-out prose and {found["prompts"]["positions"]} of held-out chat prompts.

{table(header, rows)}"""


def _calibrations() -> list[tuple[str, ...]]:
    rows = []
    for name in ("big-7b-calibrate", "big-7b-2-layers-calibrate"):
        found = report(name)
        spent = found["calibrate"]
        rows.append(
            (
                link(name, found["size"]),
                str(found["layers"]),
                f"{found['samples']} × {found['tokens']} tokens",
                found["smooth"],
                f"{spent['seconds']:.0f} s",
                f"{spent['cpu_seconds']:.0f} s",
                f"{spent['peak_rss_bytes'] / GIB:.2f} GiB",
                f"{found['scales_bytes'] / MIB:.1f} MiB",
            )
        )
    return rows
