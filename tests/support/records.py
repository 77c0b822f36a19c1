"""A manifest that needs no files, and a bundle that needs no export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medusa_deploy.runtime.executors.step_io import cache_rows
from medusa_deploy.runtime.files.backbone import BackboneShape
from medusa_deploy.runtime.files.bundle import record_files
from medusa_deploy.runtime.files.manifest import MANIFEST_NAME, FileRecord, HeadFacts, Limits, Manifest, TextFacts
from medusa_deploy.runtime.tree import Tree, chain
from support.tiny import EOS, HEADS, HIDDEN, VOCAB

TOP_K = 4


def manifest(
    *, capacity: int = 256, batch: int = 4, max_rows: int = 16, prefill_chunk: int = 16, tree: Tree | None = None
) -> Manifest:
    """A manifest of the tiny model's sizes."""
    files = ("onnx/step.onnx", "onnx/step.cpu.onnx", "onnx/heads.onnx", "onnx/weights.bin", "onnx/step.device.onnx")
    return Manifest(
        backbone=BackboneShape("TinyForCausalLM", 2, HIDDEN, 4, 2, 16, VOCAB),
        heads=HeadFacts("medusa", HEADS, TOP_K, "shared", VOCAB, ((0.7, -1.0),) * HEADS),
        limits=Limits(capacity, cache_rows(capacity, HEADS, max_rows), max_rows, batch, prefill_chunk),
        text=TextFacts(eos_token_ids=(EOS,)),
        dtype="float32",
        variants={"standard": files[0], "cpu": files[1], "device": files[4]},
        heads_graph=files[2],
        trees={"default": (tree or chain(HEADS)).choices()},
        default_tree="default",
        files={name: FileRecord(1, "0" * 64) for name in files},
        provenance={"created_by": "a test"},
    )


def write_stub_bundle(folder: Path) -> Path:
    """A bundle that opens and can't run: its graphs are a few bytes each."""
    plain = manifest()
    for name in plain.files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"the bytes of {name}".encode())
    complete = replace(plain, files=record_files(folder))
    (folder / MANIFEST_NAME).write_text(complete.to_json(), "utf-8")
    return folder
