"""``medusa-deploy generate``: text from a bundle, as it is made."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..console import STDOUT, add_json_argument, positive_int
from ..engine_options import add_engine_arguments, load_session

if TYPE_CHECKING:
    from ...runtime import Grammar
    from ...runtime.session import Chunk, Session
    from ...runtime.tree import Tree

HELP = "generate text from a bundle; it is printed as it is made"
_MAX_NEW_TOKENS = 256
_SAMPLING = (
    "mode", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "typical_epsilon", "typical_delta", "seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that export wrote")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help='a user message; "-" reads it from stdin')
    parser.add_argument("--system", metavar="TEXT", help="a system message before it")
    parser.add_argument(
        "--raw", action="store_true", help="no chat template: PROMPT is the text itself (default where there is none)"
    )
    parser.add_argument("--token-ids", type=_token_ids, metavar="IDS", help="the prompt as token ids, such as 1,2,3")
    parser.add_argument(
        "-n", "--max-new-tokens", type=positive_int, metavar="N", help=f"default: {_MAX_NEW_TOKENS}, or what fits"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="don't end at an end-of-sequence token")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="answer in JSON of this schema; needs llguidance")
    form.add_argument("--regex", metavar="REGEX", help="answer with a text that this regular expression describes")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="answer with a text of this Lark grammar")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--plain", action="store_true", help="decode without speculation")
    how.add_argument("--tree", metavar="TREE", help="the same rows in every step: a tree by name, or a JSON file of choices")
    how.add_argument("--rows", type=positive_int, metavar="N", help="rows of a step, the root included (default: as many as pay)")
    parser.add_argument("--no-lookup", action="store_true", help="draft from the heads alone, not from what the text repeats")
    add_engine_arguments(parser)
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: all cores)")
    parser.add_argument("--no-hashes", action="store_true", help="don't read the whole bundle to check it first")
    sampling = parser.add_argument_group("choice of tokens")
    sampling.add_argument(
        "--mode", choices=("greedy", "sample", "typical"), help="greedy (default); sample: lossless; typical: Medusa's, lossy"
    )
    sampling.add_argument("--temperature", type=float)
    sampling.add_argument("--top-k", type=int, help="0 is off")
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--min-p", type=float)
    sampling.add_argument("--repetition-penalty", type=float)
    sampling.add_argument("--presence-penalty", type=float)
    sampling.add_argument("--frequency-penalty", type=float)
    sampling.add_argument("--logit-bias", action="append", default=[], type=_bias, metavar="ID=BIAS", help="may be repeated")
    sampling.add_argument("--typical-epsilon", type=float)
    sampling.add_argument("--typical-delta", type=float)
    sampling.add_argument("--seed", type=int)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, print the text as it comes, and sum up on stderr."""
    from ..console import say, write_json

    prompt = None if args.token_ids is not None else read_prompt(args.prompt)
    session = load_session(args, check_hashes=not args.no_hashes)
    streams = args.json != STDOUT
    report = generate(session, write=_write if streams else lambda text: None, **_options(session, args, prompt))
    if streams:
        print()
    say(summary(report))
    if args.json is not None:
        write_json(report, args.json)
    return 0


def generate(session: Session, *, write: Callable[[str], object], **options: Any) -> dict[str, Any]:
    """Generate with :meth:`Session.stream` and hand every piece of text to ``write`` as it comes. Returns text and statistics.

    A bundle without a tokenizer writes token ids, with spaces between them. ``options`` are the fields of ``Request``.
    """
    text: list[str] = []
    token_ids: list[int] = []
    last: Chunk | None = None
    with contextlib.closing(session.stream(**options)) as chunks:  # type: ignore[type-var]
        for chunk in chunks:
            text.append(chunk.text)
            if session.codec is not None:
                write(chunk.text)
            elif chunk.token_ids:
                write((" " if token_ids else "") + " ".join(map(str, chunk.token_ids)))
            token_ids += chunk.token_ids
            last = chunk
    assert last is not None
    stats = last.stats
    assert stats is not None
    return {
        "text": "".join(text) if session.codec is not None else None,
        "token_ids": token_ids,
        "finish_reason": last.finish_reason,
        "tokens_per_s": stats.tokens_per_second,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "host_fraction": stats.host_fraction,
        **asdict(stats),
    }


def summary(report: dict[str, Any]) -> str:
    """Describe the cost of the generation in one line."""
    return (
        f"{len(report['token_ids'])} tokens  {report['tokens_per_s']:.1f} tokens/s  "
        f"mean acceptance length {report['mean_acceptance_length']:.2f} over {report['steps']} steps  "
        f"{report['rows'] / max(report['steps'], 1):.1f} rows a step, {report['plain_steps']} plain  "
        f"prefill {report['prompt_tokens']} tokens in {report['prefill_seconds']:.2f} s  finish: {report['finish_reason']}"
    )


def read_prompt(prompt: str | None, stdin: TextIO | None = None) -> str:
    """Read the prompt: the argument, or stdin for ``-`` and where a pipe stands in for the argument.

    Raises:
        PromptError: nothing there, or not UTF-8.
    """
    from ...runtime.errors import PromptError

    stdin = stdin or sys.stdin
    if prompt is None and stdin.isatty():
        raise PromptError("no prompt", hint='give PROMPT, --token-ids, or "-" to read stdin')
    if prompt in (None, "-"):
        try:
            prompt = stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise PromptError(f"stdin is not UTF-8: byte {error.start} is {byte:#04x}", hint="convert it") from None
    if not prompt:
        raise PromptError("the prompt is empty", hint="give at least one character")
    return prompt


def _options(session: Session, args: argparse.Namespace, prompt: str | None) -> dict[str, Any]:
    """Fields of the request that the arguments ask for."""
    from ...runtime import ROOT_ONLY, Request, SamplingParams

    given: dict[str, Any] = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    params = SamplingParams(**given, logit_bias=dict(args.logit_bias))
    options: dict[str, Any] = {**_prompt_option(session, args, prompt), "params": params, "stop": tuple(args.stop)}
    options |= {"ignore_eos": args.ignore_eos, "lookup": False if args.no_lookup else None, "rows": args.rows}
    options["grammar"] = _grammar(args)
    options["tree"] = ROOT_ONLY if args.plain else _tree(session, args.tree)
    room = session.manifest.limits.capacity - len(session.encode(Request(**options)))
    options["max_new_tokens"] = args.max_new_tokens or max(1, min(_MAX_NEW_TOKENS, room))
    return options


def _grammar(args: argparse.Namespace) -> Grammar | None:
    from ...runtime import Grammar
    from ...runtime.errors import GrammarError

    if args.regex is not None:
        return Grammar("regex", args.regex)
    path = args.json_schema or args.grammar
    if path is None:
        return None
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8")
        raise GrammarError(f"can't read {path}: {reason}", hint="name a text file") from None
    return Grammar("lark" if args.json_schema is None else "json_schema", text)


def _prompt_option(session: Session, args: argparse.Namespace, prompt: str | None) -> dict[str, Any]:
    from ...runtime.errors import PromptError

    if args.token_ids is not None:
        if args.prompt is not None or args.system is not None:
            raise PromptError("--token-ids is a whole prompt", hint="leave out PROMPT and --system")
        return {"token_ids": args.token_ids}
    if session.codec is None:
        raise PromptError("the bundle has no tokenizer", hint="give the prompt by --token-ids 1,2,3")
    if args.raw or session.manifest.text.chat_template is None:
        if args.system is not None:
            raise PromptError("--system needs a chat template", hint="leave out --raw, or put the text into PROMPT")
        return {"prompt": prompt}
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return {"messages": [*system, {"role": "user", "content": prompt}]}


def _tree(session: Session, name: str | None) -> Tree | None:
    from ..console import say
    from ..tree_set import trees_for

    if name is None:
        return None
    chosen = trees_for(session.manifest, [name])
    for note in chosen.notes.values():
        say(f"note: the tree {name} is {note}")
    return next(iter(chosen.trees.values()))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS such as 13=-2.5") from None
