"""Facts that a measurement depends on: the machine, versions, and exactly which bundle."""

from __future__ import annotations

import platform
from typing import Any

from .. import __version__
from ..runtime.files.bundle import sha256
from ..runtime.files.manifest import MANIFEST_NAME, Manifest
from ..runtime.session import Session
from .extras import version
from .machine import measured_on


def environment(session: Session) -> dict[str, Any]:
    """Facts to keep beside numbers that were taken with ``session``."""
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
    """Name of the bundle's graph that the session runs; None where its executor runs no such graph."""
    step = getattr(getattr(session.executor, "model", None), "step", None)
    graphs = session.manifest.variants.items()
    return next((name for name, path in graphs if session.bundle.folder / path == step), None)


def rounds_activations(session: Session) -> bool:
    """Tell whether the session runs a quantised variant, whose products round what they read to 8 bits."""
    return variant(session) in session.manifest.provenance.get("quantised", {})


def plain_step_bytes(manifest: Manifest, variant: str | None = None) -> int | None:
    """Bytes of weights that a plain step of a variant for the CPU reads, as its export recorded; None without a record.

    Embedding tables are read by the row. Heads don't run in plain steps.
    """
    provenance = manifest.provenance
    facts = provenance if variant == "cpu" else provenance.get("quantised", {}).get(variant, {})
    known: int | None = facts.get("plain_step_bytes")
    return known
