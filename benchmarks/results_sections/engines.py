"""Engines: what was built, loaded, exact and measured on which GPU in which precision, and what precisions do to quality."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .markdown import exists, link, report, table

PRECISIONS, BUILDS = "engine-precisions-smollm2", "engine-builds"
GPUS = {"gpu-h200": "H200"}
"""Reports of ``gpu_check`` by name, and the GPU that each is of."""
_NONE = "–"


def coverage() -> str:
    """The table of docs/gpu.md: a cell is a link to its evidence, or a dash."""
    rows = [*_built(), *_ran()]
    rows.append(("tensorrt", "any", "any", _NONE, _NONE, _NONE, _NONE))
    return table(("backend", "GPU", "precision", "built", "loaded", "exact", "measured"), rows, texts=7)


def _built() -> Iterator[tuple[str, ...]]:
    """One row a precision of TensorRT-RTX, with the architectures that it was built for. No GPU has loaded one."""
    if not exists(BUILDS):
        return
    found: dict[tuple[str, str], list[str]] = {}
    for entry in report(BUILDS)["builds"]:
        name = entry["precision"] if entry["activations"] == "fp16" else f"{entry['precision']}, activations too"
        found.setdefault((name, entry["weights"]), []).append(entry["target"])
    for (precision, weights), targets in found.items():
        placed = precision if weights == "inside" else f"{precision}, weights streamed"
        ordered = ", ".join(sorted(set(targets), key=lambda name: int(name[3:])))
        yield "tensorrt-rtx", ordered, placed, link(BUILDS, "yes"), _NONE, _NONE, _NONE


def _ran() -> Iterator[tuple[str, ...]]:
    """Rows of the GPUs that ``gpu_check`` ran on."""
    for name, gpu in GPUS.items():
        stages = report(name)["stages"]
        results = {stage: found.get("results", {}) for stage, found in stages.items() if found.get("device") == "cuda"}
        exact, filled = results.get("exact", {}).get("executors", {}), results.get("cuda-7b", {})
        for backend in ("cuda", "tensorrt-rtx", "tensorrt"):
            found = exact.get(backend)
            if found is None:
                continue
            agreed = found["against_expected"]["unexplained"] == 0 and found["against_expected"]["tokens_compared"] > 0
            curve = results.get("curve", {}).get("executors", {}).get(backend) or (backend == "cuda" and filled.get("fp16"))
            yield backend, gpu, "fp16", _NONE, link(name, "yes"), link(name, "yes" if agreed else "no"), _cell(name, curve)
        few = filled.get("int8")
        yield "cuda", gpu, "int8, weights", _NONE, _cell(name, few), _NONE, _cell(name, few)
        if exists(f"{name}-tensorrt-rtx"):
            plans = report(f"{name}-tensorrt-rtx")
            small = [found for key, found in plans.items() if key.startswith("small:")]
            loaded = any(found["deserialized"] for found in small)
            text = "yes" if loaded else "refused"
            evidence = f"{name}-tensorrt-rtx"
            yield "tensorrt-rtx", gpu, "fp16", link(evidence, "yes"), link(evidence, text), _NONE, _NONE
        reference = results.get("sizes", {})
        if any(size in reference for size in ("7b", "13b")):
            yield "torch reference", gpu, "fp16", _NONE, link(name, "yes"), link(name, "yes"), link(name, "yes")


def _cell(name: str, found: Any) -> str:
    return link(name, "yes") if found else _NONE


def precisions() -> str:
    """What each precision does to the predictions of the very network that is built, in ONNX Runtime on the CPU."""
    if not exists(PRECISIONS):
        return ""
    found = report(PRECISIONS)
    rows = []
    base = found["ways"]["fp16"]
    for name, way in found["ways"].items():
        answer, text = way["answer"], way["text"]
        rows.append(
            (
                name,
                f"{answer['kl_nats']:.4f}",
                f"{100 * answer['agreement']:.1f} %",
                f"{100 * (answer['perplexity'] / base['answer']['perplexity'] - 1):+.1f} %",
                f"{100 * (text['perplexity'] / base['text']['perplexity'] - 1):+.1f} %",
                f"{way['tokens_a_step']:.3f}",
            )
        )
    header = ("precision", "KL, nats", "same token", "perplexity, answers", "perplexity, text", "tokens a step")
    positions, text_positions = base["answer"]["positions"], base["text"]["positions"]
    return f"""## Precisions of engines

SmolLM2-135M-Instruct, against fp16 ({link(PRECISIONS)}). The networks are those that TensorRT-RTX is given, QuantizeLinear and
DequantizeLinear included; ONNX Runtime ran them on the CPU, and **no GPU did**. KL, agreement and the first perplexity are over
{positions} positions of {found["answers"]} held-out answers, the second perplexity over {text_positions} of held-out text.
Tokens a step replay the answers on the bundle's tree with the heads of that precision. So few positions say no more than the
size of an effect. Not measured: {"; ".join(found["missing"]) or "nothing that is offered"}.

{table(header, rows)}"""
