"""``medusa-deploy triton``: a model repository for Triton Inference Server."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a model repository for Triton Inference Server's Python backend"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    from ..console import positive_int

    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="REPOSITORY", help="folder to write")
    parser.add_argument("--name", help="the model's name (default: the bundle's folder)")
    parser.add_argument("--slots", type=positive_int, default=4, metavar="N", help="requests at a time (default: 4)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--max-waiting", type=positive_int, default=64, metavar="N", help="requests that may wait (default: 64)")
    parser.add_argument("--environment", metavar="PATH", help="a packed Python environment for Triton: EXECUTION_ENV_PATH")
    parser.add_argument("--force", action="store_true", help="replace the folder")


def run(args: argparse.Namespace) -> int:
    """Write the repository."""
    import re
    import shutil

    from ...runtime.errors import UsageError
    from ...runtime.files.bundle import open_bundle, staged_folder
    from ..extras import require

    require("serve")
    from ...runtime.serve.triton import MODEL, config_text

    bundle = open_bundle(args.bundle)
    name = args.name or args.bundle.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name) or name.startswith("."):
        raise UsageError(f"{name!r:.80} is no name of a model", hint="--name takes letters, digits, dots, dashes")
    if bundle.manifest.text.tokenizer is None:
        raise UsageError("the bundle has no tokenizer, and Triton's requests are text", hint="export with a tokenizer")
    parameters = {"slots": str(args.slots), "max_waiting": str(args.max_waiting)}
    parameters |= {} if args.threads is None else {"threads": str(args.threads)}
    parameters |= {} if args.environment is None else {"EXECUTION_ENV_PATH": args.environment}
    with staged_folder(args.output, force=args.force) as staging:
        version = staging / name / "1"
        version.mkdir(parents=True)
        (staging / name / "config.pbtxt").write_text(config_text(name, parameters), "utf-8")
        (version / "model.py").write_text(MODEL, "utf-8")
        shutil.copytree(args.bundle, version / "bundle")
    print(f"{args.output}: start it with tritonserver --model-repository {args.output}")
    return 0
