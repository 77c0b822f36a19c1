"""``medusa-deploy inspect``: the contents of a bundle, and whether its files are those of its manifest."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..console import add_json_argument

if TYPE_CHECKING:
    from ...runtime.files.bundle import Bundle
    from ...runtime.files.manifest import Manifest

HELP = "say what a bundle holds and check its files against its manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that export wrote")
    parser.add_argument("--no-hashes", action="store_true", help="check sizes only, not every file's sha256")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    from ..console import emit

    report = inspect_bundle(args.bundle, check_hashes=not args.no_hashes)
    emit(report_text(report), report, args.json)
    return 0


def inspect_bundle(bundle: Path | str, *, check_hashes: bool = True) -> dict[str, Any]:
    """Read the manifest's facts; sizes are bytes, and trees are measured.

    Raises:
        BundleError, BundleSchemaError, BundleIntegrityError: the bundle can't be used, and why.
    """
    from ...runtime.arguments import flag, path
    from ...runtime.files.bundle import open_bundle

    check_hashes = flag("check_hashes", check_hashes, default=True)
    opened = open_bundle(path("bundle", bundle), check_hashes=check_hashes)
    manifest = opened.manifest
    trees = {name: {"rows": tree.rows, "depth": tree.depth} for name in manifest.trees for tree in [manifest.tree(name)]}
    slot = cache_bytes(manifest)
    return {
        "bundle": str(opened.folder),
        "bytes": sum(record.size for record in manifest.files.values()),
        "hashes_checked": check_hashes,
        **{name: asdict(getattr(manifest, name)) for name in ("backbone", "heads", "limits", "text")},
        "dtype": manifest.dtype,
        "variants": dict(manifest.variants),
        "engines": {target: _engine(opened, name) for target, name in manifest.engines.items()},
        "default_tree": manifest.default_tree,
        "trees": trees,
        "cache_bytes_per_slot": slot,
        "cache_bytes": slot * manifest.limits.batch,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "provenance": dict(manifest.provenance),
        "schema_version": manifest.schema_version,
    }


def _engine(bundle: Bundle, name: str) -> dict[str, Any]:
    """Describe one engine: its record and its path, and its plans with the bytes of their files and of the plans."""
    from ...runtime.errors import BundleError
    from ...runtime.files.engine_record import check_record_size, parse_engine_record

    files = bundle.manifest.files
    try:
        check_record_size(name, files[name].size)
        record = parse_engine_record(bundle.path(name).read_bytes())
    except BundleError as error:  # the rest of the bundle can be described all the same
        return {"record": name, "unreadable": error.message}
    plans = {}
    for plan in (record.plan, record.heads_plan):
        stored = files.get(str(PurePosixPath(name).parent / plan))
        how = record.compression.get(plan)
        size = None if stored is None else stored.size
        plans[plan] = {"stored_bytes": size, "plan_bytes": how.plan_bytes if how else size, "compression": how and how.method}
    told = ("backend", "backend_version", "precision", "weights", "record_version")
    return {"record": name, **{field: getattr(record, field) for field in told}, "plans": plans}


def cache_bytes(manifest: Manifest) -> int:
    """Bytes of key and value caches that one slot takes."""
    import numpy as np

    return manifest.backbone.cache_bytes(manifest.limits.cache_rows, np.dtype(manifest.dtype).itemsize)


def report_text(report: dict[str, Any]) -> str:
    """Write the report for a person."""
    from ..console import facts, human_bytes, table

    backbone, heads, limits, text = (report[name] for name in ("backbone", "heads", "limits", "text"))
    made = report["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    draft = f"{heads['draft_vocab_size']} tokens" if heads["draft_vocab_size"] else "the backbone's vocabulary"
    summary = facts(
        {
            "bundle": f"{report['bundle']}  {human_bytes(report['bytes'])}, schema {report['schema_version']}",
            "backbone": f"{backbone['architecture']}, {backbone['layers']} layers, hidden {backbone['hidden_size']}, "
            f"{backbone['attention_heads']} heads / {backbone['kv_heads']} kv, vocabulary {backbone['vocab_size']}, "
            f"{report['dtype']}",
            "heads": f"{heads['num_heads']} {heads['kind']}, top-{heads['top_k']} of {draft}, {heads['projection']} projection",
            "limits": f"capacity {limits['capacity']}, {limits['batch']} slots, trees up to {limits['max_rows']} rows, "
            f"prefill chunk {limits['prefill_chunk']}",
            "cache": f"{human_bytes(report['cache_bytes_per_slot'])} a slot, {human_bytes(report['cache_bytes'])} for all",
            "text": _text_line(text),
            "variants": ", ".join(f"{name} ({path})" for name, path in report["variants"].items()),
            "engines": ", ".join(f"{target} ({engine['record']})" for target, engine in report["engines"].items()) or "none",
            "made by": f"{made.get('created_by', 'unknown')}{f' with {versions}' if versions else ''}",
        }
    )
    checks = [
        f"checked against the torch module: {name}: max logit error {check['max_logit_error']:.2e}, "
        f"argmax agreement {check['argmax_agreement']:.1%} over {check['rows']} rows"
        for name, check in made.get("check", {}).items()
    ]
    engines = [_engine_line(target, engine) for target, engine in report["engines"].items()]
    warnings = [f"warning: {warning}" for warning in made.get("warnings", [])]
    marks = {report["default_tree"]: " *"}
    trees = table(
        [[name + marks.get(name, ""), tree["rows"], tree["depth"]] for name, tree in report["trees"].items()],
        ["tree (* default)", "rows", "depth"],
    )
    checked = "sha256 checked" if report["hashes_checked"] else "sha256 not checked"
    files = table(
        [[name, human_bytes(record["size"]), record["sha256"][:12]] for name, record in report["files"].items()],
        ["file", "size", checked],
    )
    return "\n".join([summary, *engines, *checks, *warnings, "", trees, "", files])


def _engine_line(target: str, engine: dict[str, Any]) -> str:
    from ..console import human_bytes

    if "unreadable" in engine:
        return f"engine {target}: {engine['unreadable']}"
    plans = []
    for name, plan in engine["plans"].items():
        sizes = plan["stored_bytes"], plan["plan_bytes"]
        stored, unpacked = ("missing" if size is None else human_bytes(size) for size in sizes)
        plans.append(f"{name} {stored}{f', unpacked {unpacked}' if plan['compression'] else ''}")
    made = f"{engine['backend']} {engine['backend_version']}, {engine['precision']}, weights {engine['weights']}"
    return f"engine {target}: {made}; {'; '.join(plans)}"


def _text_line(text: dict[str, Any]) -> str:
    if text["tokenizer"] is None:
        return "none: token ids in and out"
    template = "with" if text["chat_template"] else "without"
    ends = ", ".join(map(str, text["eos_token_ids"])) or "none"
    return f"{text['tokenizer']}, {template} chat template, end of sequence {ends}"
