"""The server on Ray Serve: replicas of one application, each with a session of its own. Needs the extra ``ray``.

``serve run medusa_deploy.runtime.serve.ray_app:application bundle=/srv/my-bundle replicas=2`` starts it, as does
``medusa-deploy serve BUNDLE --ray``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as fields_of, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError, UsageError
from ..files.manifest import MANIFEST_NAME
from .limits import read_keys
from .service import Options, Service

if TYPE_CHECKING:
    from starlette.applications import Starlette

_ROUTER = f"{__package__}.ray_router:SessionRouter"
_HEALTH_SECONDS = 5.0
_KINDS: dict[type, Any] = {bool: {"true": True, "1": True, "false": False, "0": False}.__getitem__}


class Replica:
    """One replica: loads the bundle, serves it, and is replaced when its engine hangs."""

    def __init__(self, bundle: str, options: Options, load_options: Mapping[str, Any]) -> None:
        from .. import load

        self.service = Service(options)
        self.service.open(load(bundle, **load_options))

    def __serve_build_asgi_app__(self) -> Starlette:
        """Ray calls this after the constructor. The name is Ray's."""
        from .app import create_app

        return create_app(self.service)

    def __del__(self) -> None:
        """Ray calls this when it stops the replica."""
        if (service := getattr(self, "service", None)) is not None and service.spans is not None:
            service.spans.close()

    def check_health(self) -> None:
        """Raise where a step takes longer than it may: then Ray replaces the replica.

        Raises:
            RuntimeError: the engine hangs.
        """
        if self.service.stalled:
            raise RuntimeError(f"a step takes longer than {self.service.options.stall_seconds:g} s")


def application(arguments: Mapping[str, Any]) -> Any:
    """Return the application for ``serve.run``. All values may be texts, as ``serve run`` hands them over.

    ``bundle``: its folder, on every node. ``replicas``: how many there are at least; ``most_replicas``: at most, by requests
    under way. ``slots``, ``threads``: of each replica. ``api_keys``: a file of keys. Others are fields of
    :class:`.service.Options`. Requests with the same header ``x-session-id`` go to the same replica, whose slots hold the rows of
    the session's earlier prompts.

    Raises:
        MissingDependencyError: Ray isn't installed.
        UsageError: an argument isn't known, or has a wrong value.
    """
    try:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    except ImportError:
        raise MissingDependencyError("Ray isn't installed", hint="pip install 'medusa-deploy[ray]'") from None
    given = dict(arguments)
    bundle = Path(str(given.pop("bundle", ""))).resolve()
    if not (bundle / MANIFEST_NAME).is_file():
        raise UsageError(f"{bundle} is no bundle", hint="serve run medusa_deploy.runtime.serve.ray_app:application bundle=FOLDER")
    slots, threads, least = (_count(given, name, default) for name, default in (("slots", 4), ("threads", 1), ("replicas", 2)))
    most = _count(given, "most_replicas", least)
    load_options = {"slots": slots, "threads": threads, **given.pop("load_options", {})}
    options = _options(given, bundle.name)
    if most < least:
        raise UsageError(f"at most {most} replicas, at least {least}", hint="give most_replicas of at least replicas")
    scaling = AutoscalingConfig(min_replicas=least, initial_replicas=least, max_replicas=most, target_ongoing_requests=slots)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="medusa-deploy",
        max_ongoing_requests=slots + options.max_waiting + slots,  # those beyond the first two are told 429
        max_queued_requests=max(1, options.max_waiting) * most,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=options.drain_seconds,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        ray_actor_options={"num_cpus": threads},
        **({"num_replicas": least} if most == least else {"autoscaling_config": scaling}),
    )
    return deployment.bind(str(bundle), options, load_options)


def _count(given: dict[str, Any], name: str, default: int) -> int:
    value = str(given.pop(name, default))
    if not value.isdecimal() or not 1 <= int(value) <= 10_000:
        raise UsageError(f"{name} is {value!r:.80}", hint="give a number from 1")
    return int(value)


def _options(given: dict[str, Any], name: str) -> Options:
    """Return what is left as the server's options: texts become numbers where the default is one."""
    known = {each.name: each for each in fields_of(Options)}
    options = Options(name=name)
    if (keys := given.pop("api_keys", None)) is not None:
        options = replace(options, keys=read_keys(Path(str(keys))))
    for key, value in given.items():
        if key not in known or key == "keys":
            raise UsageError(f"there is no argument {key!r:.80}", hint=f"known: {', '.join(sorted(known))}")
        default = known[key].default
        kind: Any = float if default is None and key == "deadline" else int if default is None else type(default)
        try:
            read = _KINDS.get(kind, kind) if isinstance(value, str) else lambda value: value
            options = replace(options, **{key: read(value)})
        except (ValueError, KeyError):
            raise UsageError(f"{key} is {value!r:.80}", hint=f"give a {kind.__name__}") from None
    return options
