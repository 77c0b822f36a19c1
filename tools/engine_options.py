"""Options of every verb that runs a bundle: they choose the engine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.session import Session


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--backend``, ``--target`` and ``--variant``."""
    parser.add_argument(
        "--backend", default="cpu", metavar="NAME", help="cpu (default), cuda, or an engine: tensorrt-rtx, tensorrt (never run)"
    )
    parser.add_argument("--target", metavar="TARGET", help="which engine, as build named it (default: this GPU's)")
    parser.add_argument("--variant", help="which of the bundle's graphs the CPU runs (default: the fastest that is exact)")


def load_session(args: argparse.Namespace, **options: Any) -> Session:
    """Load the bundle on the engine that the arguments name; ``options`` are those of ``load``.

    Without a prefix cache: what is measured must not depend on what ran before it.
    """
    from ..runtime import load

    options = {"backend": args.backend, "target": args.target, "variant": args.variant, "prefix_cache": False, **options}
    return load(args.bundle, threads=args.threads, **options)
