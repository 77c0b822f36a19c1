"""Runs a model without weights on the arguments of a step, and looks at what its attention is asked to do.

Nothing is computed: all tensors are on the ``meta`` device. What the step graph needs of transformers' modules shows here in
a fraction of a second: each layer asks once for attention over its own keys and values, with nothing added to the logits but the
mask, and the projection reads what the decoder returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from ....runtime.errors import UnsupportedArchitectureError
from .causes import deepest, first_lines, place

_IMPLEMENTATION = "medusa_deploy_rehearsal"
_ITSELF = "computes its attention in a way that transformers offers no replacement for"
_B, _N, _T = 2, 5, 24
_HINT = "the step graph expresses decoders whose every layer asks once for plain attention; choose another backbone"
# Arguments of an attention call that change its arithmetic beyond what the graph has: what a user calls them.
_CHANGES = {"s_aux": "sinks", "sinks": "sinks", "position_bias": "a position bias", "head_mask": "masked heads"}


@dataclass(frozen=True, slots=True)
class Call:
    """Records one call of the attention: its layer, the module that asked, and shapes.

    ``query``, ``key``, ``value``: [B, heads, N, D_h]. ``mask``: [B, 1, N, T], or () for none. ``changes``: of ``_CHANGES``.
    """

    layer: int
    module: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: tuple[int, ...]
    changes: tuple[str, ...]


class _PassingCache(Cache):
    """Passes a step's rows through, as the cache of the trace does."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


_calls: list[list[Call]] = []


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    changes = tuple(name for name in _CHANGES if kwargs.get(name) is not None)
    mask = () if attention_mask is None else tuple(attention_mask.shape)
    shapes = (tuple(query.shape), tuple(key.shape), tuple(value.shape), mask)
    _calls[-1].append(Call(int(getattr(module, "layer_idx", -1)), type(module).__name__, *shapes, changes))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def rehearse(module: Any) -> Call:
    """Return what each layer of a module without weights (on ``meta``) asks for, if the step graph can say it.

    Raises:
        UnsupportedArchitectureError: names the family, the module, and what it does.
    """
    family = f"{module.config.model_type} ({type(module).__name__})"
    _still_rotations(module)
    calls: list[Call] = []
    ends: dict[str, Tensor] = {}
    try:
        with _recording(module, calls), _watching(module, ends), torch.no_grad():
            tokens = torch.ones(_B, _N, dtype=torch.int64, device="meta")
            mask = torch.zeros(_B, 1, _N, _T, device="meta", dtype=module.get_input_embeddings().weight.dtype)
            module(
                input_ids=tokens,
                position_ids=torch.ones_like(tokens),
                attention_mask=mask,
                past_key_values=_PassingCache(),
                use_cache=True,
            )
    except Exception as error:  # a module raises whatever it raises
        where = place(error, module)
        if not calls and "Attention" in where:  # it took a mask over all columns for one over the step's own rows
            raise UnsupportedArchitectureError(f"{family} {_ITSELF}: {where}", hint=_HINT) from error
        raise UnsupportedArchitectureError(
            f"{family} doesn't run on the arguments of a step: {where} raises {first_lines(deepest(error))}",
            hint=_HINT,
        ) from error
    found = _fault(calls, getattr(module.config, "num_hidden_layers", None)) or _end_fault(ends)
    if found is not None:
        raise UnsupportedArchitectureError(f"{family} {found}", hint=_HINT)
    return calls[0]


def _still_rotations(module: Any) -> None:
    """Let no rotation look at the positions: those that depend on the length compare numbers, and there are none."""
    for child in module.modules():
        kind = getattr(child, "rope_type", None)
        if kind is not None:
            child.rope_type = dict.fromkeys(kind, "static") if isinstance(kind, dict) else "static"


@contextmanager
def _recording(module: Any, calls: list[Call]) -> Iterator[None]:
    AttentionInterface.register(_IMPLEMENTATION, _record)
    previous = module.config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    module.set_attn_implementation(_IMPLEMENTATION)
    _calls.append(calls)
    try:
        yield
    finally:
        _calls.pop()
        module.config._attn_implementation = previous  # noqa: SLF001


@contextmanager
def _watching(module: Any, ends: dict[str, Tensor]) -> Iterator[None]:
    """Keep what the decoder returns and what the projection reads."""

    def decoded(_module: nn.Module, _arguments: Any, output: Any) -> None:
        ends["decoded"] = output[0]

    def projected(_module: nn.Module, arguments: Any) -> None:
        ends["projected"] = arguments[0]

    handles = [
        module.get_decoder().register_forward_hook(decoded),
        module.get_output_embeddings().register_forward_pre_hook(projected),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fault(calls: list[Call], layers: int | None) -> str | None:
    changed = next((call for call in calls if call.changes), None)
    if changed is not None:
        return f"has {_CHANGES[changed.changes[0]]} in its attention ({changed.module})"
    asked = [call.layer for call in calls]
    if not asked:
        return _ITSELF
    if layers is None or sorted(set(asked)) != list(range(layers)):
        return f"asks for attention in {len(set(asked))} of its {layers} layers"
    if len(asked) != layers:
        return f"asks for attention {len(asked)} times in {layers} layers ({calls[0].module})"
    masked = next((call for call in calls if call.mask != (_B, 1, _N, _T)), None)
    if masked is not None:
        return f"makes a mask of its own: shape {list(masked.mask)} for {[_B, 1, _N, _T]} ({masked.module})"
    shapes = {(call.query[1], call.query[3], call.key[1], call.key[3], call.value[1], call.value[3]) for call in calls}
    first = calls[0]
    if len(shapes) > 1:
        return f"has layers with attention of {len(shapes)} sizes, and all caches have one"
    if first.key != first.value or first.query[3] != first.key[3]:
        sizes = f"{first.query[3]}, {first.key[3]} and {first.value[3]} numbers a head"
        return f"has queries, keys and values of {sizes} in {first.module}"
    if first.key[2] != first.query[2]:
        return f"attends to {first.key[2]} rows in a step of {first.query[2]} ({first.module})"
    return None


def _end_fault(ends: dict[str, Tensor]) -> str | None:
    if "decoded" not in ends or "projected" not in ends:
        return "doesn't compute its logits by one projection of what its decoder returns"
    read, returned = ends["projected"], ends["decoded"]
    while read._is_view() and read is not returned:  # noqa: SLF001 - a slice of rows is what it was cut from
        read = read._base  # type: ignore[assignment]  # noqa: SLF001
    if read is returned or returned._base is read:  # noqa: SLF001
        return None
    return "changes what its decoder returns before the projection reads it"
