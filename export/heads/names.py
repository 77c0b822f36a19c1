"""Recognises the tensors of a heads checkpoint by their names in all published layouts (the table in :mod:`.layouts`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...runtime.errors import HeadsError

MAX_HEADS = 64
MAX_LAYERS = 64
_REFERENCE = re.compile(r"(?P<prefix>medusa_heads?\.)?(?P<head>\d+)\.(?P<layer>\d+)\.(?P<linear>linear\.)?(?P<kind>weight|bias)")
_VLLM_BLOCK = re.compile(r"(?:medusa_heads\.)?blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<kind>weight|bias)")
_VLLM_PROJECTION = re.compile(r"(?:medusa_heads\.)?lm_heads\.(?P<head>\d+)\.weight")
_VLLM_TOKEN_MAP = re.compile(r"(?:medusa_heads\.)?token_map")
_TRTLLM_BLOCK = re.compile(r"medusa_heads\.(?P<head>\d+)\.medusa_layers\.(?P<layer>\d+)\.linear\.(?P<kind>weight|bias)")
_TRTLLM_PROJECTION = re.compile(r"medusa_heads\.(?P<head>\d+)\.lm_head\.weight")
# A weight is read together with its scale. Scales of activations have no use once weights are floating point again.
_SCALE = re.compile(r".*\.(?:input_scale|weight_scale|weights_scaling_factor|activation_scaling_factor)")
# What torch's wrappers put into the names of a state_dict: data parallel, compiled, sharded and checkpointed modules.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HEAD_LIKE = re.compile(r"medusa_heads?\.|\d+\.\d+\.|blocks\.\d+\.layers\.|lm_heads\.")


@dataclass(slots=True)
class HeadNames:
    """Names of the tensors of one set of heads.

    ``blocks``: (head, layer) to kind (``weight``, ``bias``) to name. ``projections``: head to name. ``numbers``: head to the
    layer number in that name, where a layout has one. ``layouts``: the letters of the layouts found so far.
    """

    layouts: set[str] = field(default_factory=set)
    blocks: dict[tuple[int, int], dict[str, str]] = field(default_factory=dict)
    projections: dict[int, str] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    token_map: str | None = None

    @property
    def layout(self) -> str:
        """The layout's letter."""
        (letter,) = self.layouts
        return "b" if letter == "a" and not self.projections else letter

    def count(self, warnings: list[str]) -> tuple[int, int]:
        """Count the heads and the layers of a head.

        Raises:
            HeadsError: a head or a layer is missing, or there are more than ``MAX_HEADS`` or ``MAX_LAYERS``.
        """
        heads = sorted({head for head, _ in self.blocks} | set(self.projections))
        if heads[-1] >= MAX_HEADS:
            raise HeadsError(
                f"a tensor belongs to head {heads[-1]}; heads 0 to {MAX_HEADS - 1} are read", hint="this file is no set of heads"
            )
        per_head = {head: sorted(layer for owner, layer in self.blocks if owner == head) for head in range(heads[-1] + 1)}
        for head, layers in per_head.items():
            if not layers or layers != list(range(len(layers))) or len(layers) != len(per_head[0]):
                raise HeadsError(
                    f"head {head} of {len(per_head)} has the layers {layers}, head 0 has {per_head[0]}",
                    hint="the file is incomplete: download or convert it again",
                )
        return len(per_head), self._layers(len(per_head[0]), warnings)

    def _layers(self, stored: int, warnings: list[str]) -> int:
        """Count a head's layers by its projection's number: the reference stores a block once that all layers share."""
        number = self.numbers.get(0, stored)
        if any(other != number for other in self.numbers.values()) or number > MAX_LAYERS or stored not in (number, 1):
            raise HeadsError(
                f"{stored} layers a head are stored, and projections are numbered {sorted(set(self.numbers.values()))}",
                hint="a projection's number is that of the layers before it: the file is incomplete",
            )
        if number > stored:
            warnings.append(f"one block a head is stored for {number} layers: all of them use it")
        return number


def unwrapped(name: str) -> str:
    """Take the names of torch's wrappers out of a tensor's name: ``module.``, ``_orig_mod.`` and so on."""
    return _WRAPPERS.sub("", name)


def find_names(names: Mapping[str, object], source: Path) -> HeadNames:
    """Find the heads' names among a checkpoint's.

    Raises:
        HeadsError: no heads, names of several layouts, or an unknown name among the heads'.
    """
    found = HeadNames()
    for name in names:
        if not _SCALE.fullmatch(name) and not _place(name, found) and _HEAD_LIKE.match(name):
            raise HeadsError(
                f"{source} holds {name}, which no known layout of heads has", hint="known layouts are those of docs/design.md"
            )
    if not found.blocks:
        raise HeadsError(
            f"{source} holds no Medusa heads: {len(names)} tensors, such as {next(iter(names), 'none')}",
            hint="give the folder or the file of the heads, in one of the layouts of docs/design.md",
        )
    if len(found.layouts) > 1:
        raise HeadsError(f"{source} mixes names of the layouts {', '.join(sorted(found.layouts))}", hint="give one set of heads")
    return found


def _place(name: str, found: HeadNames) -> bool:
    """Add a name to ``found``; return False if it is none of the heads' names."""
    if match := _REFERENCE.fullmatch(name):
        head, layer = int(match["head"]), int(match["layer"])
        if not match["linear"] and (match["kind"] == "bias" or head in found.projections):
            return False
        if match["linear"]:
            found.blocks.setdefault((head, layer), {})[match["kind"]] = name
        else:
            found.projections[head], found.numbers[head] = name, layer
        found.layouts.add({"medusa_head.": "c", "medusa_heads.": "e"}.get(match["prefix"], "a"))
    elif match := _VLLM_BLOCK.fullmatch(name) or _TRTLLM_BLOCK.fullmatch(name):
        found.blocks.setdefault((int(match["head"]), int(match["layer"])), {})[match["kind"]] = name
        found.layouts.add("d" if match.re is _VLLM_BLOCK else "f")
    elif match := _VLLM_PROJECTION.fullmatch(name) or _TRTLLM_PROJECTION.fullmatch(name):
        found.projections[int(match["head"])] = name
        found.layouts.add("d" if match.re is _VLLM_PROJECTION else "f")
    elif _VLLM_TOKEN_MAP.fullmatch(name):
        found.token_map = name
    else:
        return False
    return True
