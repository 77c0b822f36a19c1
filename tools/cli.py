"""The program ``medusa-deploy``: finds the verb, imports that verb's module only, and turns errors into exit codes.

Exit codes: 0 done; 1 something the user can fix; 2 wrong usage; 3 a bug of ours; 130 interrupted; 141 the reader of our output
went away.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any, NamedTuple, NoReturn

PROGRAM = "medusa-deploy"
OK, USER_ERROR, USAGE, BUG, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would keep silent that its help wasn't written."""

    def print_help(self, file: Any = None) -> None:
        (file or sys.stdout).write(self.format_help())


class Verb(NamedTuple):
    """One subcommand: its module in :mod:`medusa_deploy.tools.verbs` and its line in the program's help."""

    name: str
    help: str


# Static, so that the program's help imports no verb. Groups in the order in which a user meets them.
GROUPS = {
    "make": (
        Verb("prepare", "fetch a known model and convert it to a folder that export reads"),
        Verb("export", "trace a checkpoint with its Medusa heads into a bundle"),
        Verb("train", "train Medusa heads for a backbone by self-distillation"),
        Verb("build", "build TensorRT engines into a bundle"),
    ),
    "tune": (
        Verb("calibrate", "measure ranges of activations and weights, and write int8 scales"),
        Verb("quantise", "add a variant of 8-bit or 4-bit weights for the CPU to a bundle"),
        Verb("tree", "count the heads' hits and find the best candidate tree"),
    ),
    "run": (
        Verb("generate", "generate text from a bundle"),
        Verb("serve", "serve a bundle over HTTP, as OpenAI's clients expect it"),
        Verb("triton", "write a model repository for Triton Inference Server's Python backend"),
    ),
    "check": (
        Verb("verify", "compare speculative with plain decoding, token for token"),
        Verb("bench", "measure plain against Medusa decoding"),
        Verb("compare", "measure quality and speed of a bundle or variant against a reference"),
        Verb("inspect", "say what a bundle holds and check its files"),
        Verb("debug", "write a kit to debug an engine with polygraphy, or say which layer left first"),
    ),
    "advise": (
        Verb("plan", "say which size fits on which GPU, and what to run next"),
        Verb("doctor", "say what this machine can run and what is missing"),
        Verb("demo", "run the whole path on a real model: prepare, export, generate, verify, bench"),
        Verb("figure", "draw reports of bench: speed-ups, and where the time goes"),
    ),
}
VERBS = tuple(verb for verbs in GROUPS.values() for verb in verbs)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code; never raises."""
    arguments = sys.argv[1:] if argv is None else argv
    from .streams import prepare_streams, refused_output

    prepare_streams()
    try:
        try:
            code = _dispatch(arguments)
        except SystemExit as end:  # argparse: help, version and usage errors
            code = end.code if isinstance(end.code, int) else USAGE
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered can't be written; without this the interpreter complains about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        return _report(refused_output(error))
    return code


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else None
    verb = next((verb for verb in VERBS if verb.name == name), None)
    if verb is None:
        _top_level(arguments)
    module = importlib.import_module(f"{__package__}.verbs.{verb.name}")
    parser = _Parser(prog=f"{PROGRAM} {verb.name}", description=module.HELP, allow_abbrev=False)
    module.add_arguments(parser)
    return int(module.run(parser.parse_intermixed_args(arguments[1:])))


def _top_level(arguments: list[str]) -> NoReturn:
    """Answer whatever isn't a verb: help, version, or a usage error."""
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} VERB …",
        description="Medusa speculative decoding, from a checkpoint to production.",
        epilog=f"verbs:\n\n{_grouped()}\n\n{PROGRAM} VERB --help explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(USAGE)
    if arguments[0].startswith("-"):
        if parser.parse_args(arguments).version:
            from .. import __version__

            print(f"{PROGRAM} {__version__}")
            raise SystemExit(OK)
        parser.error("a verb is missing")
    import difflib

    near = difflib.get_close_matches(arguments[0], [verb.name for verb in VERBS], n=1)
    suggestion = f"did you mean {near[0]}?" if near else f"verbs: {', '.join(verb.name for verb in VERBS)}"
    parser.error(f"unknown verb {arguments[0]!r}; {suggestion}")


def _grouped() -> str:
    """The verbs of the help, a heading a group."""
    width = max(len(verb.name) for verb in VERBS)
    groups = ("\n".join([group, *(f"  {verb.name:<{width}}  {verb.help}" for verb in verbs)]) for group, verbs in GROUPS.items())
    return "\n\n".join(groups)


def _report(error: Exception) -> int:
    from ..runtime.errors import DeployError

    if isinstance(error, DeployError):
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return USER_ERROR
    import traceback

    traceback.print_exception(error)
    print(
        f"\nThis is a bug in {PROGRAM}. Please report it with the lines above, the command, and the output of: {PROGRAM} doctor",
        file=sys.stderr,
    )
    return BUG


if __name__ == "__main__":
    raise SystemExit(main())
