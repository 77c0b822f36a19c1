"""``medusa-deploy doctor``: what this machine can run, and how to get what is missing."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import Any

from ..console import add_json_argument

HELP = "say what this machine can run and what is missing; exits with 1 when bundles can't run here"
PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "minijinja", "torch", "transformers", "onnx", "tensorrt",
    "tensorrt-rtx",
)  # fmt: skip
_OLDEST_PYTHON = (3, 11)
_LITTLE_MEMORY = 2 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Diagnose and print. Returns 1 when there are problems."""
    from ..console import emit

    report = diagnose()
    emit(report_text(report), report, args.json)
    return 0 if report["ok"] else 1


def diagnose() -> dict[str, Any]:
    """Gather facts and ``problems``, which keep the runtime from working here, each with a hint. ``ok`` without any."""
    from ... import __version__
    from ..extras import EXTRAS, install_command, missing, version
    from ..machine import available_cores, core_quota, cpu_features, cpu_model, memory_bytes

    total, available = memory_bytes()
    providers, failure = _providers()
    problems = _problems(providers, failure)
    notes = []
    if version("tokenizers") is None or version("minijinja") is None:
        notes.append(f"without tokenizers and minijinja bundles take token ids only; {install_command('cpu')}")
    cache, wrong = _cache()
    problems += wrong
    if 0 < available < _LITTLE_MEMORY:
        notes.append(f"{available >> 20} MiB of memory are available: enough for small models only")
    return {
        "ok": not problems,
        "problems": problems,
        "notes": notes,
        "medusa_deploy": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": available_cores(),
        "core_quota": core_quota(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "cache": cache,
        "packages": {name: version(name) for name in PACKAGES},
        "providers": providers,
        "extras": {extra: {"missing": missing(extra), "install": install_command(extra)} for extra in EXTRAS},
    }


def _providers() -> tuple[list[str], str]:
    """ONNX Runtime's execution providers, or the reason why there are none."""
    try:
        import onnxruntime
    except ImportError as error:
        return [], str(error)
    return list(onnxruntime.get_available_providers()), ""


def _cache() -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """The cache of packed weights, and what is wrong with its settings. None without numpy, which the runtime needs."""
    try:
        from ...runtime.errors import UsageError
        from ...runtime.files.cache import usage
    except ImportError:
        return None, []
    try:
        found = usage()
    except UsageError as error:
        return None, [{"problem": error.message, "hint": error.hint}]
    return {"folder": str(found.folder), "entries": found.entries, "bytes": found.nbytes, "most_bytes": found.most}, []


def _problems(providers: list[str], failure: str) -> list[dict[str, str]]:
    from ..extras import OLDEST, install_command, too_old, version

    install = install_command("cpu")
    found: list[tuple[str, str]] = []
    if sys.version_info < _OLDEST_PYTHON:
        wanted = ".".join(map(str, _OLDEST_PYTHON))
        found.append((f"Python {platform.python_version()} is older than {wanted}", f"use Python {wanted} or newer"))
    if version("numpy") is None:
        found.append(("numpy isn't installed", install))
    if failure:
        found.append((f"onnxruntime can't be imported: {failure}", install))
    elif "CPUExecutionProvider" not in providers:
        found.append((f"onnxruntime has no CPU provider, only {providers}", f"reinstall it: {install}"))
    for name, oldest in OLDEST.items():
        if too_old(name):
            wanted = ".".join(map(str, oldest))
            found.append((f"{name} {version(name)} is older than {wanted}", f"pip install '{name}>={wanted}'"))
    return [{"problem": problem, "hint": hint} for problem, hint in found]


def report_text(report: dict[str, Any]) -> str:
    """Write the report for a person."""
    from ..console import facts, human_bytes, table

    quota = f", limited to {report['core_quota']:g}" if report["core_quota"] is not None else ""
    memory = f"{human_bytes(report['memory_bytes'])}, {human_bytes(report['memory_available_bytes'])} available"
    cache = report["cache"] or {"folder": "unknown", "entries": 0, "bytes": 0, "most_bytes": 0}
    summary = facts(
        {
            "medusa-deploy": report["medusa_deploy"],
            "Python": report["python"],
            "platform": report["platform"],
            "CPU": f"{report['cpu']}, {report['cores']} cores{quota}",
            "features": " ".join(report["cpu_features"]) or "unknown",
            "memory": memory if report["memory_bytes"] else "unknown",
            "cache": f"{cache['folder']}: {human_bytes(cache['bytes'])} of at most {human_bytes(cache['most_bytes'])}",
            "providers": ", ".join(report["providers"]) or "none",
        }
    )
    packages = table([[name, version or "–"] for name, version in report["packages"].items()], ["package", "version"])
    extras = table(
        [
            [name, f"lacks {', '.join(extra['missing'])}", extra["install"]] if extra["missing"] else [name, "complete", ""]
            for name, extra in report["extras"].items()
        ],
        ["extra", "state", "install with"],
    )
    verdict = [f"error: {entry['problem']}\nhint: {entry['hint']}" for entry in report["problems"]]
    verdict += [f"note: {note}" for note in report["notes"]]
    return "\n".join([summary, "", packages, "", extras, "", *(verdict or ["Bundles run here."])])
