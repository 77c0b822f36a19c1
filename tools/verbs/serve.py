"""``medusa-deploy serve``: a bundle behind HTTP."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import positive_int
from ..engine_options import add_engine_arguments, load_session

if TYPE_CHECKING:
    from ...runtime.session import Session

HELP = "serve a bundle over HTTP, as OpenAI's clients expect it; a page to chat with is at /"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that export wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, help="default: 8000; 0 takes a free one")
    parser.add_argument("--name", help="the model's name for clients (default: the bundle's folder)")
    parser.add_argument("--slots", type=positive_int, metavar="N", help="requests at a time (default: 4, or what fits)")
    add_engine_arguments(parser)
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: all cores)")
    parser.add_argument("--no-hashes", action="store_true", help="don't read the whole bundle to check it first")
    many = parser.add_argument_group("on Ray Serve")
    many.add_argument("--ray", action="store_true", help="serve from replicas on a Ray cluster, or on one of this machine alone")
    many.add_argument("--replicas", type=positive_int, default=2, metavar="N", help="at least (default: 2)")
    many.add_argument("--most-replicas", type=positive_int, metavar="N", help="at most, by requests under way (default: no more)")
    limits = parser.add_argument_group("who may ask, and for how much")
    limits.add_argument("--api-keys", type=Path, metavar="FILE", help="a file of API keys, one a line (default: none is needed)")
    limits.add_argument("--max-waiting", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    limits.add_argument("--max-concurrency", type=positive_int, default=256, metavar="N", help="HTTP requests (default: 256)")
    limits.add_argument("--max-body", type=positive_int, default=2 << 20, metavar="BYTES", help="of a request (default: 2 MiB)")
    limits.add_argument("--max-tokens", type=positive_int, metavar="N", help="new tokens of a request (default: what fits)")
    limits.add_argument("--max-stops", type=positive_int, default=16, metavar="N", help="stop strings (default: 16)")
    limits.add_argument("--deadline", type=_seconds, metavar="SECONDS", help="of a request, from its arrival (default: none)")
    behaviour = parser.add_argument_group("behaviour")
    behaviour.add_argument("--stall", type=_seconds, default=60.0, metavar="SECONDS", help="a step that hangs (default: 60)")
    behaviour.add_argument(
        "--drain", type=_seconds, default=30.0, metavar="SECONDS", help="for running requests after SIGTERM (default: 30)"
    )
    behaviour.add_argument("--no-prefix-cache", action="store_true", help="read every prompt from its first token on")
    behaviour.add_argument("--otel", action="store_true", help="send a span of each request, as the OTEL_* variables say")
    behaviour.add_argument("--acceptance-metrics", action="store_true", help="report the acceptance of every answer in it")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    from ..extras import require

    if args.ray:
        return _run_on_ray(args)
    require("serve")
    import logging

    from ...runtime.serve.limits import JsonLines, read_keys
    from ...runtime.serve.server import serve
    from ...runtime.serve.service import Options

    keys = frozenset() if args.api_keys is None else read_keys(args.api_keys)
    options = Options(
        name=args.name or args.bundle.resolve().name,
        keys=keys,
        max_waiting=args.max_waiting,
        max_concurrency=args.max_concurrency,
        max_body_bytes=args.max_body,
        max_tokens=args.max_tokens,
        max_stops=args.max_stops,
        deadline=args.deadline,
        stall_seconds=args.stall,
        drain_seconds=args.drain,
        acceptance_metrics=args.acceptance_metrics,
        otel=_otel(args),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    loggers = [logging.getLogger(name) for name in ("medusa_deploy.serve", "uvicorn.error", "asyncio", "opentelemetry")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    loggers[0].setLevel(logging.INFO)
    for logger in loggers[1:]:
        logger.setLevel(logging.WARNING)
    if not keys and args.host not in ("127.0.0.1", "::1", "localhost"):
        loggers[0].warning("anybody who reaches this address may use the server: give --api-keys")
    try:
        serve(partial(_load, args), options, host=args.host, port=args.port)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
    return 0


def _run_on_ray(args: argparse.Namespace) -> int:
    """Serve from replicas until SIGINT."""
    from ..extras import require

    require("ray")
    from ray import serve as ray_serve

    from ...runtime.serve.ray_app import application

    load_options = {"backend": args.backend, "target": args.target, "variant": args.variant}
    load_options |= {"check_hashes": not args.no_hashes, "prefix_cache": not args.no_prefix_cache}
    given = {"replicas": args.replicas, "most_replicas": args.most_replicas, "slots": args.slots, "threads": args.threads}
    given |= {"name": args.name, "api_keys": args.api_keys, "max_tokens": args.max_tokens, "deadline": args.deadline}
    given |= {"max_waiting": args.max_waiting, "max_concurrency": args.max_concurrency, "max_body_bytes": args.max_body}
    given |= {"max_stops": args.max_stops, "stall_seconds": args.stall, "drain_seconds": args.drain}
    given |= {"bundle": args.bundle, "load_options": load_options, "acceptance_metrics": args.acceptance_metrics}
    given |= {"otel": _otel(args)}
    made = application({name: value for name, value in given.items() if value is not None})
    ray_serve.start(http_options={"host": args.host, "port": args.port})
    ray_serve.run(made, name=args.name or args.bundle.resolve().name, route_prefix="/", blocking=True)
    return 0


def _otel(args: argparse.Namespace) -> bool:
    """Whether requests are traced: told to, or the environment names a collector and the package is there."""
    from ...runtime.serve.spans import wanted
    from ..extras import install_command, missing, require

    if args.otel:
        require("otel")
    if args.otel or not wanted():
        return bool(args.otel)
    if absent := missing("otel"):
        print(f"note: OTEL_* variables are set, and spans need {', '.join(absent)}: {install_command('otel')}", file=sys.stderr)
    return not absent


def _load(args: argparse.Namespace) -> Session:
    from ...runtime.backends import most_slots
    from ...runtime.files.bundle import open_bundle

    slots = args.slots or min(4, most_slots(open_bundle(args.bundle, check_hashes=False), args.backend, args.variant))
    return load_session(args, slots=slots, check_hashes=not args.no_hashes, prefix_cache=not args.no_prefix_cache)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
