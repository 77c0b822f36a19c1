"""Exports a tiny random model of every causal language model that transformers registers, and holds it against transformers.

Each family runs in a process of its own, with a limit of time and of memory. It is made small (sliding windows of 16 tokens, a
capacity of 256), exported, and decoded: plainly and with a tree, on the CPU graph and on the standard graph, from prompts up to
several windows long. Every token is compared with transformers' eager attention over the whole sequence.

The report goes to ``results/families.json``, the table to ``docs/families.md``. What is done stays below ``--work``: a run that
was stopped goes on there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from family.models import CAPACITY, HIDDEN, VOCABULARY, families, make_config, save_weights
from family.page import PAGE, REPORT, page

from medusa_deploy import __version__
from medusa_deploy.runtime.errors import DeployError
from medusa_deploy.runtime.files.heads import HeadConfig, HeadSet
from medusa_deploy.runtime.files.heads_file import write_heads
from medusa_deploy.tools.console import write_json

HEADS, NEW_TOKENS = 3, 40
PROMPTS = (5, 40, 100)  # tokens
CHOICES = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
_PRELOAD = ["torch", "transformers", "onnxruntime", "medusa_deploy.export.exporter", "medusa_deploy.runtime"]
_PATIENCE = 10  # times the limit of processor time: what a busy machine may take by the clock
_NEAR = 1e-4  # of the largest logit: two tokens that close are a tie, which rounding decides


def random_heads(folder: Path) -> Path:
    """Write heads that stay close to the backbone's own prediction, so that some drafts are right."""
    rng, tensors = np.random.default_rng(0), {}
    for head in range(HEADS):
        tensors[f"head.{head}.layer.0.weight"] = rng.normal(0, 0.05, (HIDDEN, HIDDEN)).astype(np.float32)
        tensors[f"head.{head}.layer.0.bias"] = rng.normal(0, 0.05, HIDDEN).astype(np.float32)
    write_heads(HeadSet(HeadConfig("medusa", HEADS, 1, HIDDEN, VOCABULARY, "shared"), tensors), folder)
    return folder


def try_family(family: str, work: Path) -> dict[str, Any]:
    """Make, export and verify one family; return what the report says about it."""
    from medusa_deploy.export.backbone.backbone import load_config

    try:
        config = make_config(family)
        config.save_pretrained(work / "model")
    except Exception as error:
        return {"outcome": "not made", "reason": _line(error)}
    started = time.perf_counter()
    try:
        load_config(work / "model", CAPACITY)
    except DeployError as error:
        return {**_refusal(error, work), "outcome": "refused", "seconds": round(time.perf_counter() - started, 2)}
    try:
        save_weights(config, work / "model")
    except Exception as error:
        return {"outcome": "not made", "reason": _line(error)}
    try:
        return export_and_verify(work)
    except DeployError as error:
        return {**_refusal(error, work), "outcome": "fails by name"}


def export_and_verify(work: Path) -> dict[str, Any]:
    """Export the model of ``work``, and compare every token that its bundle decodes."""
    from medusa_deploy.export.exporter import export_bundle
    from medusa_deploy.runtime import load
    from medusa_deploy.runtime.tree import Tree

    heads, tree = random_heads(work / "heads"), Tree.from_choices(CHOICES)
    export_bundle(work / "model", heads, work / "bundle", capacity=CAPACITY, tree=tree, top_k=4, max_rows=8, prefill_chunk=32)
    compared = wrong = ties = 0
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCABULARY, length).tolist() for length in PROMPTS]
    logits_of = eager(work / "model")
    for variant in ("cpu", "standard"):
        session = load(work / "bundle", variant=variant, threads=1, prefix_cache=False)
        for prompt in prompts:
            for way in ({"speculative": False}, {"tree": tree}):
                tokens = session.generate(token_ids=prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, **way).token_ids
                logits = logits_of([*prompt, *tokens])[len(prompt) - 1 : -1]
                behind = logits.max(-1) - logits[np.arange(len(tokens)), tokens]
                compared += len(tokens)
                ties += int(((behind > 0) & (behind <= _NEAR * np.abs(logits).max())).sum())
                wrong += int((behind > _NEAR * np.abs(logits).max()).sum()) + NEW_TOKENS - len(tokens)
    return {"outcome": "wrong tokens" if wrong else "works", "tokens": compared, "wrong": wrong, "ties": ties}


def eager(model: Path) -> Any:
    """Return a function from tokens to transformers' logits [n, V] after each of them, by eager attention without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

    def logits(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy())

    return logits


def _refusal(error: DeployError, work: Path) -> dict[str, Any]:
    clean = error.message.replace(str(work / "model"), "the model")
    return {"error": type(error).__name__, "reason": clean}


def _line(error: Exception) -> str:
    from medusa_deploy.export.backbone.refusal.causes import first_lines

    return first_lines(error)


def child(family: str, work: Path, seconds: int, gigabytes: int) -> None:
    """Try one family in this process, and leave the result in ``work``. ``seconds``: of processor time."""
    import torch
    from transformers.utils import logging

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    try:
        result = try_family(family, work)
    except Exception as error:  # what the benchmark looks for
        (work / "traceback").write_text(traceback.format_exc(), "utf-8")
        result = {"outcome": "traceback", "reason": _line(error)}
    (work / "result.json").write_text(json.dumps(result), "utf-8")


def run_family(context: Any, family: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one family in a new process, or read what an earlier run found."""
    found = folder / "result.json"
    if args.known and not found.is_file():
        return {"outcome": "not tried", "reason": "the run was stopped before its turn"}
    if not found.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        process = context.Process(target=child, args=(family, folder, args.limit, args.memory))
        process.start()
        process.join(_PATIENCE * args.limit)
        slow = process.is_alive()
        if slow:
            process.kill()
            process.join()
        if not found.is_file() and (slow or process.exitcode == -signal.SIGXCPU):
            found.write_text(json.dumps({"outcome": "too slow", "reason": f"longer than {args.limit} s"}), "utf-8")
        elif not found.is_file():
            found.write_text(json.dumps({"outcome": "crash", "reason": f"exit code {process.exitcode}"}), "utf-8")
        for name in ("model", "heads", "bundle"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return dict(json.loads(found.read_text("utf-8")))


def since(before: dict[str, Any], family: str) -> str:
    """Return the version that a family works since: an earlier report's, or this one."""
    known = before.get("families", {}).get(family, {})
    return str(known.get("since", __version__)) if known.get("outcome") == "works" else __version__


def main() -> int:
    """Run all families, or those that are named; write report and table. Exit code 1: a traceback, a crash or a wrong token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="model types of transformers; all without this")
    parser.add_argument("--work", type=Path, default=Path("build/families"), help="results that a stopped run goes on from")
    parser.add_argument("--limit", type=int, default=180, help="seconds of processor time a family")
    parser.add_argument("--memory", type=int, default=12, help="GiB a family")
    parser.add_argument("--known", action="store_true", help="try no more families: write down what is known")
    args = parser.parse_args()
    import transformers

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    known = families()
    unknown = [family for family in args.family if family not in known]
    if unknown:
        parser.error(f"transformers {transformers.__version__} registers no causal language model {unknown[0]!r}")
    before = json.loads(REPORT.read_text("utf-8")) if REPORT.is_file() else {}
    results = {}
    for family in args.family or known:
        result = run_family(context, family, args.work / family, args)
        result = {"architecture": known[family], **result}
        if result["outcome"] == "works":
            result["since"] = since(before, family)
        results[family] = result
        print(f"{family:28} {result['outcome']:14} {result.get('reason', '')}", file=sys.stderr, flush=True)
    if not args.family:
        report = {"transformers": transformers.__version__, "version": __version__, "capacity": CAPACITY, "families": results}
        write_json(report, str(REPORT))
        PAGE.write_text(page(report), "utf-8")
    return int(any(result["outcome"] in ("traceback", "crash", "wrong tokens") for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
