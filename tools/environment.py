"""What a measurement depends on: machine, versions, and exactly which bundle."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from .. import __version__
from ..runtime.bundle import sha256
from ..runtime.manifest import MANIFEST_NAME, Manifest
from ..runtime.session import Session
from .extras import version
from .machine import measured_on


def environment(session: Session) -> dict[str, Any]:
    """The facts to keep beside numbers taken with ``session``."""
    manifest = session.manifest
    return {
        **measured_on(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "medusa_deploy": __version__,
        "onnxruntime": version("onnxruntime"),
        "numpy": version("numpy"),
        "bundle": {
            # The manifest lists every file's sha256, so its own stands for the whole bundle.
            "manifest_sha256": sha256(session.bundle.path(MANIFEST_NAME)),
            "architecture": manifest.backbone.architecture,
            "dtype": manifest.dtype,
            "variant": variant(session),
            "stage": 2 if manifest.provenance.get("adapter") else 1,  # an adapter belongs to heads of the second stage
            "heads": f"{manifest.heads.num_heads} {manifest.heads.kind}, {manifest.heads.projection} projection",
        },
    }


def variant(session: Session) -> str | None:
    """Which of the bundle's graphs the session runs."""
    step = getattr(getattr(session.executor, "model", None), "step", None)
    graphs = session.manifest.variants.items()
    return next((name for name, path in graphs if session.bundle.folder / path == step), None)


def plain_step_bytes(manifest: Manifest, variant: str | None = None) -> int:
    """Bytes of weights that a plain step reads: the weights file without the embedding table and the heads.

    Tables are read by the row, heads don't run in plain steps. Padding between tensors is counted in: 1 to 2 % of a small model.
    Of a quantised ``variant``, the weights of its products.
    """
    known: int | None = manifest.provenance.get("quantised", {}).get(variant, {}).get("plain_step_bytes")
    if known is not None:
        return known
    size = np.dtype(manifest.dtype).itemsize
    hidden, heads = manifest.backbone.hidden_size, manifest.heads
    blocks = heads.num_heads * hidden * hidden * (2 if heads.kind == "grounded" else 1)
    projections = {"own": heads.num_heads, "pruned": 1}.get(heads.projection, 0) * heads.draft_vocab_size * hidden
    stored = sum(record.size for name, record in manifest.files.items() if name.endswith(".bin"))
    return max(0, stored - (manifest.backbone.vocab_size * hidden + blocks + projections) * size)
