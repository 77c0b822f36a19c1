"""Finds out what a causal LM does to its logits behind the vocabulary projection: a scale, a soft cap, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import UnsupportedArchitectureError
from .refusal.causes import first_lines

_POINTS = (0.0, 1e-3, -1.0, 2.5, -7.0, 40.0, -90.0, 600.0, -1e9, 1e9)
_EXACT = 1e-6
_NO_CAP = 1e6  # a scale below 1/1000 isn't known; a cap above this changes nothing


@dataclass(frozen=True, slots=True)
class LogitChange:
    """Turns what the projection makes into the model's logits: ``cap · tanh(scale · x / cap)``, without a cap ``scale · x``.

    ``scale`` > 0, so the greedy choice is the projection's.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the model's logits."""
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


NO_CHANGE = LogitChange()


def find_logit_change(module: Any) -> LogitChange:
    """Run a causal LM's own code around its projection, with numbers in place of hidden states and of logits.

    Reads no weight: parameters may be fake. Configs name scales and caps in many ways, and some have fields that nobody reads.

    Raises:
        UnsupportedArchitectureError: the code does something else than to scale and cap, or turns the order of logits around.
    """
    points = torch.tensor(_POINTS, dtype=torch.float64)
    before, after = _around(module, points)
    cap = float(after[-1])
    found = LogitChange(float(after[1] / points[1]), cap if 0 < cap < _NO_CAP else None)
    if not (found.scale > 0 and before > 0 and torch.allclose(after, found(points), rtol=_EXACT, atol=_EXACT)):
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} changes its logits behind the projection by more than a scale and a soft cap",
            hint="the step graph ends with the projection, a scale and a cap; choose another backbone",
        )
    return LogitChange(float(f"{found.scale * before:.7g}"), None if found.cap is None else float(f"{found.cap:.7g}"))


def _around(module: Any, points: Tensor) -> tuple[float, Tensor]:
    """Return by what hidden states are multiplied before the projection, and what becomes of logits ``points`` behind it."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Decoded(BaseModelOutputWithPast):  # type: ignore[misc]
        """Has nothing but hidden states: some models read attentions or routers, too."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    projection, received = module.get_output_embeddings(), list[Tensor]()
    hidden = torch.ones(1, 1, module.get_input_embeddings().weight.shape[1], dtype=torch.float64)

    def decode(*_args: Any, **_options: Any) -> Any:
        return Decoded(last_hidden_state=hidden)

    def project(state: Tensor) -> Tensor:
        received.append(state)
        return points[None, None]

    try:
        with _standing_in(module.get_decoder(), decode), _standing_in(projection, project), torch.no_grad():
            logits = module(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits[0, 0]
        (state,) = received
        scale = float(state.flatten()[0])
        same = state.shape == hidden.shape and bool((state == scale).all()) and logits.shape == points.shape
    except Exception as error:  # whatever the code needs that isn't there
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} isn't a decoder followed by a projection: {first_lines(error)}",
            hint="the step graph ends with the projection, a scale and a cap; choose another backbone",
        ) from error
    biased = getattr(projection, "bias", None) is not None and scale != 1
    if not same or biased:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} changes hidden states between its decoder and its projection by more than a scale",
            hint="the step graph projects what the decoder returns; choose another backbone",
        )
    return scale, logits.double()


@contextlib.contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward`` answer for a module."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.forward = own
