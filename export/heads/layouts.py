"""Reads every published layout of Medusa heads, and our own.

====== ========================================== ====================================================================
layout from                                       names of a block; of a projection
====== ========================================== ====================================================================
a      the reference's heads alone                ``{h}.{l}.linear.weight``; ``{h}.{L}.weight``
b      the same, over the backbone's projection   ``{h}.{l}.linear.weight``; none
c      the reference's merged Medusa-2            a's names after ``medusa_head.``, among the backbone's
d      vLLM                                       ``blocks.{h}.layers.{l}.weight``; ``lm_heads.{h}.weight``; ``token_map``
e      NVIDIA Model Optimizer                     a's names after ``medusa_heads.``, with scales
f      TensorRT-LLM, one file a rank              ``medusa_heads.{h}.medusa_layers.{l}.linear.weight``;
                                                  ``medusa_heads.{h}.lm_head.weight``
g      this project                               :mod:`...runtime.files.heads_file`
====== ========================================== ====================================================================

Published configs are often wrong (medusa-vicuna's says 2 heads, its file holds 5), so tensors are counted, and a config
that disagrees is a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import HeadsError, HeadsMismatchError
from ...runtime.files.adapter_file import Adapter
from ...runtime.files.heads import HeadConfig, HeadSet, PlattScaling, Projection
from ...runtime.files.heads_file import (
    CONFIG_NAME,
    FORMAT,
    check_tensors,
    is_tensors_file,
    named_trees,
    open_heads_folder,
    platt_scaling,
    read_json,
)
from ...runtime.files.staging import check_path
from .names import HeadNames, find_names
from .tensors import TensorFiles, find_tensors

_OTHER_BACKBONE = "heads belong to the backbone that they were trained on: give that one, or its heads"


@dataclass(frozen=True, slots=True)
class ReadHeads:
    """Heads as read, with the records that came with them.

    ``layout``: its letter. ``trees``: choices by name. ``measured``: the maker's counts of hits, kept as they are.
    ``adapter``: the change of the backbone that the heads were trained with, or None.
    ``draft_vocab_size`` of the heads is 0 if they share a projection and don't tell the size of the vocabulary.
    """

    heads: HeadSet
    layout: str
    warnings: tuple[str, ...] = ()
    trees: Mapping[str, list[list[int]]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    platt_scaling: PlattScaling = ()
    adapter: Adapter | None = None

    @property
    def tree(self) -> list[list[int]] | None:
        """Choices of the tree that suits these heads, if they came with one."""
        return self.trees.get("default")


def read_heads(source: Path | str) -> ReadHeads:
    """Read heads from a folder or a file. Reads only the heads' tensors of a merged checkpoint.

    Raises:
        HeadsError: no heads, a damaged file, tensors missing, not finite, or all zero; a pickle that needs code.
        TreeError: a tree that came with them breaks a rule.
    """
    source = Path(source)
    check_path(source, HeadsError)
    folder = source if source.is_dir() else source.parent
    config, warnings = _config(folder)
    if config.get("format") == FORMAT and (source.is_dir() or is_tensors_file(source.name)):
        heads, adapter = open_heads_folder(folder)
        count = heads.config.num_heads
        measured: dict[str, Any] = {name: config[name] for name in ("hit_rates", "path_rates") if name in config}
        trees, scaling = named_trees(config, count), platt_scaling(config, count)
        return ReadHeads(heads, "g", trees=trees, measured=measured, platt_scaling=scaling, adapter=adapter)
    with find_tensors(source) as files:
        names = find_names(files.parts, source)
        heads = _assemble(files, names, config, warnings)
    check_tensors(heads)
    return ReadHeads(heads, names.layout, tuple(warnings))


def named_base(source: Path | str) -> str | None:
    """Return the backbone that published heads name as theirs: a name on a hub, or a path; None if they name none."""
    source = Path(source)
    base = _config(source if source.is_dir() else source.parent)[0].get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def check_fit(heads: HeadSet, *, hidden_size: int, vocab_size: int, top_k: int = 1) -> None:
    """Check that heads belong to a backbone of these sizes, and can give ``top_k`` candidates.

    Raises:
        HeadsMismatchError: names both numbers.
    """
    config, token_map = heads.config, heads.token_map
    if config.hidden_size != hidden_size:
        raise HeadsMismatchError(
            f"the heads have the hidden size {config.hidden_size}, the backbone {hidden_size}", hint=_OTHER_BACKBONE
        )
    if token_map is not None:
        if token_map.max() >= vocab_size:
            raise HeadsMismatchError(
                f"the heads' token_map goes up to token id {token_map.max()}, the backbone's vocabulary has {vocab_size} tokens",
                hint=_OTHER_BACKBONE,
            )
    elif config.draft_vocab_size not in ((0, vocab_size) if config.projection == "shared" else (vocab_size,)):
        raise HeadsMismatchError(
            f"the heads project to {config.draft_vocab_size} tokens, the backbone's vocabulary has {vocab_size}",
            hint=f"{_OTHER_BACKBONE}; where rows are only padding, say so by vocab_size in the heads' config.json",
        )
    draft = config.draft_vocab_size or vocab_size
    if top_k > draft:
        raise HeadsMismatchError(
            f"top-k is {top_k}, and the heads know {draft} tokens", hint=f"export with --top-k {draft} or less"
        )


def _config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the config beside the heads. Tensors decide what counts, so a broken config is a warning."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return {}, []
    try:
        return read_json(path), []
    except HeadsError as error:
        return {}, [f"the heads' config is ignored: {error.message}"]


def _assemble(files: TensorFiles, names: HeadNames, config: Mapping[str, Any], warnings: list[str]) -> HeadSet:
    heads, layers = names.count(warnings)
    tensors: dict[str, np.ndarray] = {}
    unbiased = 0
    for head in range(heads):
        for layer in range(layers):
            block = names.blocks.get((head, layer)) or names.blocks[head, 0]
            if "weight" not in block:
                raise HeadsError(
                    f"head {head} lacks the weight of layer {layer}", hint="the file is incomplete: convert it again"
                )
            weight = files.array(block["weight"], 2)
            unbiased += "bias" not in block
            tensors[f"head.{head}.layer.{layer}.weight"] = weight
            tensors[f"head.{head}.layer.{layer}.bias"] = (
                files.array(block["bias"], 1) if "bias" in block else np.zeros(weight.shape[0], weight.dtype)
            )
    if unbiased:
        warnings.append(f"{unbiased} of {heads * layers} blocks have no bias: taken as zero")
    hidden = int(tensors["head.0.layer.0.weight"].shape[-1])
    _compare(config, names.layout, heads, layers, hidden, warnings)
    projection, size = _project(files, names, heads, config, tensors, warnings)
    return HeadSet(HeadConfig("medusa", heads, layers, hidden, size, projection), tensors)


def _compare(config: Mapping[str, Any], layout: str, heads: int, layers: int, hidden: int, warnings: list[str]) -> None:
    """Warn where the config contradicts the tensors."""
    nested = config.get("medusa")
    fields = {**config, **nested} if isinstance(nested, dict) else config
    # vLLM's config describes the heads alone; in others num_hidden_layers and num_heads may be the backbone's.
    own = layout == "d"
    claims = (
        ("heads", heads, ("medusa_num_heads", "num_medusa_heads", *(["num_heads"] if own else []))),
        ("layers a head", layers, ("medusa_num_layers", "num_medusa_layers", *(["num_hidden_layers"] if own else []))),
        ("as the hidden size", hidden, ("hidden_size",)),
    )
    for what, counted, keys in claims:
        wrong = [key for key in keys if key in fields and fields[key] != counted]
        warnings.extend(f"the heads' config says {key} {fields[key]!r:.40}; their tensors have {counted} {what}" for key in wrong)


def _project(
    files: TensorFiles,
    names: HeadNames,
    heads: int,
    config: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    warnings: list[str],
) -> tuple[Projection, int]:
    """Add the projections and the token map to ``tensors``, and return the form and the size of the draft vocabulary.

    vLLM's ``token_map`` maps a draft index to a token id. It is unused when the config's truncated_vocab_size is vocab_size. It
    picks rows of a projection that has more rows. vLLM's original_lm_head: all heads share the backbone's projection.
    """
    vocab_size = config.get("vocab_size")
    vocab_size = vocab_size if isinstance(vocab_size, int) and vocab_size > 0 else 0
    if names.token_map is not None and vocab_size and config.get("truncated_vocab_size") == vocab_size:
        warnings.append(f"token_map is unused: the heads' config says truncated_vocab_size {vocab_size}, the whole vocabulary")
    elif names.token_map is not None:
        tensors["token_map"] = files.array(names.token_map, 1, integer=True)
    token_map = tensors.get("token_map")
    shares = names.layout == "d" and config.get("original_lm_head") is True
    if shares and names.projections:
        warnings.append("the heads' config says original_lm_head: the backbone's projection is used, not the file's copy of it")
    if shares or not names.projections:
        return ("shared", vocab_size) if token_map is None else ("pruned", len(token_map))
    rows = 0
    for head in range(heads):
        if head not in names.projections:
            raise HeadsError(
                f"head {head} has no projection, and {len(names.projections)} of {heads} heads have one",
                hint="the file is incomplete; heads that share the backbone's projection have none at all",
            )
        weight = files.array(names.projections[head], 2)
        rows = len(weight)
        if token_map is not None and rows > len(token_map):
            if token_map.max() >= rows or token_map.min() < 0:
                raise HeadsError(
                    f"token_map holds ids from {token_map.min()} to {token_map.max()}, a projection has {rows} rows",
                    hint="the files belong to different heads, or one is damaged: copy them again",
                )
            weight = weight[token_map]
        elif token_map is None and 0 < vocab_size < rows:
            weight = weight[:vocab_size]
        tensors[f"head.{head}.projection.weight"] = weight
    size = len(weight)
    if token_map is None and size < rows:
        warnings.append(
            f"projections have {rows} rows, the heads' config says vocab_size {vocab_size}: the rest is padding, dropped"
        )
    return "own", size
