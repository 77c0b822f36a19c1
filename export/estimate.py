"""Estimates what an export would write and what running it would take. Reads configs and heads, and no backbone weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runtime.arguments import choice, integer, optional_path, shown
from ..runtime.errors import UnlinkableError, UsageError
from ..runtime.executors import step_io
from ..runtime.files.adapter_file import Adapter
from ..runtime.files.backbone import BackboneShape
from ..runtime.files.heads import HeadConfig, HeadSet
from ..runtime.tree import MAX_ROWS, ROOT_ONLY, Tree, chain
from .backbone.backbone import backbone_shape, load_config
from .backbone.checkpoint import placed_bytes
from .backbone.linked import stored_parameters
from .backbone.model_folder import find_model
from .backbone.record import DTYPES
from .backbone.refusal.positions import check_positions
from .heads.layouts import ReadHeads, check_fit, named_base, read_heads
from .hub import Fetched, fetch_heads, fetch_model, hub_name
from .quantise.cpu_heads import narrow_size
from .quantise.few_bits import few_bits_bytes
from .quantise.screen import screen_size
from .weights import ALIGNMENT

DEFAULT_TREE = "default"
COPIED_BYTES = 1 << 30
"""Backbones of up to so many bytes are copied unless linking is asked for: they fit memory, and copies have the best layout."""

WEIGHTS = ("auto", "linked", "copied")
_LARGEST = {"capacity": 1 << 24, "batch": 4096, "top_k": 1024, "max_rows": MAX_ROWS, "prefill_chunk": 1 << 16}
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin")
_TEXT_FILES = ("tokenizer.json", "chat_template.jinja")
# Measured on Llama graphs, over all variants of the step graph.
_GRAPH_BYTES_PER_LAYER = 27_000


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Sizes in bytes. ``weights_bytes`` and ``bundle_bytes`` are estimates: constant folding adds and drops small tensors.

    ``linked_bytes``: size of the checkpoint's files that would become the bundle's; ``weights_bytes`` leaves them out.
    """

    architecture: str
    layers: int
    hidden_size: int
    vocab_size: int
    parameters: int
    num_heads: int
    head_parameters: int
    tree_rows: int
    tree_depth: int
    weights_bytes: int
    linked_bytes: int
    bundle_bytes: int
    cache_rows: int
    cache_bytes_per_slot: int
    cache_bytes: int
    warnings: tuple[str, ...]


def plan_export(
    model: Path | str | None,
    heads: Path | str | None,
    *,
    dtype: str = "fp32",
    weights: str = "auto",
    capacity: int = 2048,
    batch: int = 1,
    tree: Tree | None = None,
    top_k: int = 10,
    max_rows: int = 64,
    bits: int | None = None,
) -> ExportPlan:
    """Check what :func:`.exporter.export_bundle` checks before it loads weights, and size what it would write.

    Weights of safetensors on a hub stay there; they count as linked. ``bits``: of the layers, for a bundle in few bits alone.

    Raises:
        DownloadError: a name on a hub that can't be fetched.
        CheckpointError, UnsupportedArchitectureError: the backbone's config can't be read or expressed.
        HeadsError, HeadsMismatchError, TreeError: heads or tree don't fit.
    """
    dtype, weights = checked_choices(dtype, weights, tree)
    capacity, batch = checked_limit("capacity", capacity, 2048), checked_limit("batch", batch, 1)
    top_k, max_rows = checked_limit("top_k", top_k, 10), checked_limit("max_rows", max_rows, 64)
    found, found_heads, notes = find_sources(model, heads, lambda phase: None, weights=False)
    source = found.path
    read = None if found_heads is None else read_heads(found_heads.path)
    module, head_config, trees = check_before_weights(source, read, weights, capacity, tree, top_k)
    shape = backbone_shape(module)
    default = trees[DEFAULT_TREE]
    rows = step_io.cache_rows(capacity, head_config.num_heads, tree_rows(max_rows, trees, head_config.num_heads))
    item = DTYPES[dtype].itemsize
    sizes = [parameter.numel() for parameter in module.parameters()]
    head_sizes = [shape.hidden_size**2] if read is None else _head_sizes(read.heads)
    if weights == "auto":
        weights = by_size(module, dtype)
    copied = weights == "copied" or (read is not None and read.adapter is not None)
    linked = 0 if copied else _linked_bytes(source, dtype, capacity, weights, sizes)
    written = head_sizes if linked else [*sizes, *head_sizes]
    written_bytes = sum(-(-size * item // ALIGNMENT) * ALIGNMENT for size in written)
    if dtype == "fp32":  # the CPU graph stores these for itself
        written_bytes += narrow_size(head_config) + screen_size((shape.vocab_size, shape.hidden_size))
    if bits is not None:
        tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
        linked, written_bytes = 0, few_bits_bytes(shape, sum(sizes), bits, tied=tied) + narrow_size(head_config)
    text = sum((source / name).stat().st_size for name in _TEXT_FILES if (source / name).is_file())
    slot = shape.cache_bytes(rows, item)
    return ExportPlan(
        architecture=shape.architecture,
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        parameters=sum(sizes),
        num_heads=head_config.num_heads if read is not None else 0,
        head_parameters=0 if read is None else sum(tensor.size for tensor in read.heads.tensors.values()),
        tree_rows=default.rows,
        tree_depth=default.depth,
        weights_bytes=written_bytes,
        linked_bytes=linked,
        bundle_bytes=linked + written_bytes + shape.layers * _GRAPH_BYTES_PER_LAYER + text,
        cache_rows=rows,
        cache_bytes_per_slot=slot,
        cache_bytes=slot * batch,
        warnings=(*notes, *(read.warnings if read is not None else ())),
    )


def find_sources(
    model: Path | str | None, heads: Path | str | None, report: Callable[[str], object], *, weights: bool = True
) -> tuple[Fetched, Fetched | None, list[str]]:
    """Find model and heads, on a hub if they are names there. Returns both, and notes for the user.

    Heads may name their backbone. Then the model may be left out, and one of another name is worth a note.

    Raises:
        UsageError: no model, and no heads that name one; or something that is neither a path nor a name.
        DownloadError: see :func:`.hub.fetch_model`.
    """
    model, heads = _source("model", model), _source("heads", heads)
    of_heads = None if heads is None else fetch_heads(heads, report)
    base = None if of_heads is None else named_base(of_heads.path)
    if model is None and base is None:
        raise UsageError("no model is given, and no heads that name theirs", hint="give MODEL: a folder, a file or org/name")
    source = base if model is None else model
    assert source is not None
    found = fetch_model(source, report, weights=weights)
    asked, named = (None if each is None else hub_name(each) for each in (source, base))
    notes = []
    if asked is not None and named is not None and asked.repo != named.repo:
        notes.append(f"the heads name {named.repo} as their backbone, and {asked.repo} was given")
    return found, of_heads, notes


def _source(name: str, value: Any) -> Path | str | None:
    """Return what may be a path or a name on a hub. A string stays one: ``./org/name`` is no name, and ``org/name`` is.

    Raises:
        UsageError: it is neither.
    """
    found = optional_path(name, value)
    return value if isinstance(value, str) else found


def _linked_bytes(model: Path, dtype: str, capacity: int, weights: str, sizes: list[int]) -> int:
    """Sum the sizes of the files that linked weights would bring into the bundle; 0 if ``auto`` would copy the weights.

    ``sizes``: numbers of the backbone's parameters. A folder without weights counts as one whose weights are linked.
    """
    absent = not any(next(model.glob(pattern), None) for pattern in _WEIGHT_FILES)
    if find_model(model)[1] is not None or (absent and weights == "auto"):
        return sum(sizes) * DTYPES[dtype].itemsize
    try:
        needed = stored_parameters(model, dtype, capacity)[1].values()
    except UnlinkableError:
        if weights == "linked":
            raise
        return 0
    return placed_bytes(needed, DTYPES[dtype])


def by_size(module: Any, dtype: str) -> str:
    """Say what ``auto`` means for a backbone: ``copied`` up to ``COPIED_BYTES``, and above ``auto``, linked where it can be."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return "copied" if parameters * DTYPES[dtype].itemsize <= COPIED_BYTES else "auto"


def check_before_weights(
    model: Path, read: ReadHeads | None, weights: str, capacity: int, tree: Tree | None, top_k: int
) -> tuple[Any, HeadConfig, dict[str, Tree]]:
    """Check by the model's config alone that an export's parts fit together: reading the weights of a large model takes minutes.

    Returns the module without weights, the form of the heads and the bundle's trees.

    Raises:
        CheckpointError, UnsupportedArchitectureError: the backbone's config can't be read or expressed.
        HeadsMismatchError, TreeError, UsageError: heads, tree, top-k, weights or capacity don't fit.
    """
    config = load_config(model, capacity)
    module = empty_module(config)
    shape = backbone_shape(module)
    if read is not None:
        refuse_linked_adapter(weights, read.adapter)
        check_fit(read.heads, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size, top_k=top_k)
    elif top_k > shape.vocab_size:
        raise UsageError(f"top_k is {top_k}, and the vocabulary has {shape.vocab_size} tokens", hint="give a smaller --top-k")
    head_config = identity_config(shape) if read is None else read.heads.config
    check_positions(module, capacity, head_config.num_heads)
    return module, head_config, bundle_trees(tree, read, head_config.num_heads, top_k)


def identity_config(shape: BackboneShape) -> HeadConfig:
    """The form of the one head that stands in for heads where a backbone is exported alone."""
    return HeadConfig("medusa", 1, 1, shape.hidden_size, shape.vocab_size, "shared")


def _head_sizes(heads: HeadSet) -> list[int]:
    """Count the elements of each tensor that a graph stores for these heads, with the rows copied from the projection."""
    sizes = [tensor.size for tensor in heads.tensors.values()]
    config = heads.config
    if config.projection == "pruned" and "projection.weight" not in heads.tensors:
        sizes.append(config.draft_vocab_size * config.hidden_size)
    return sizes


def refuse_linked_adapter(weights: str, adapter: Adapter | None) -> None:
    """Refuse to merge an adapter into linked weights: they stay as the checkpoint has them.

    Raises:
        UsageError: an adapter comes with linked weights.
    """
    if weights == "linked" and adapter is not None:
        raise UsageError(
            "these heads need an adapter merged into the backbone, and linked weights stay as the checkpoint has them",
            hint="export with --weights copied, or take heads that were trained on the frozen backbone",
        )


def checked_choices(dtype: str | None, weights: str | None, tree: Tree | None) -> tuple[str, str]:
    """Return the dtype and the kind of weights of an export, by default fp32 and auto.

    Raises:
        UsageError: names the argument, its value and what it may be.
    """
    if not isinstance(tree, (Tree, type(None))):
        raise UsageError(f"tree is {shown(tree)}", hint="tree is a Tree: Tree.from_choices makes one")
    return choice("dtype", dtype, tuple(DTYPES), "fp32"), choice("weights", weights, WEIGHTS, "auto")


def checked_limit(name: str, value: int | None, default: int) -> int:
    """Return a limit of an export, or ``default`` for None.

    Raises:
        UsageError: it is no integer, below 1, or beyond what a step graph can have.
    """
    return integer(name, value, default, high=_LARGEST[name])


def empty_module(config: Any) -> Any:
    """Make the transformers module without weights: its parameters have shapes and no storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def bundle_trees(tree: Tree | None, read: ReadHeads | None, num_heads: int, top_k: int) -> dict[str, Tree]:
    """Collect a bundle's trees by name.

    ``default`` is ``tree``, else the tree that came with the heads, else a chain. ``chain`` is a chain over all heads.

    Raises:
        TreeError: a tree that the heads can't fill.
    """
    trees = {} if read is None else {name: Tree.from_choices(choices) for name, choices in read.trees.items()}
    if tree is not None:
        trees[DEFAULT_TREE] = tree
    if read is not None:
        trees.setdefault("chain", chain(num_heads))
    trees.setdefault(DEFAULT_TREE, ROOT_ONLY if read is None else chain(min(num_heads, 4)))
    for each in trees.values():
        each.check_fits(num_heads, top_k)
    return trees


def tree_rows(max_rows: int, trees: dict[str, Tree], num_heads: int) -> int:
    """Rows that a bundle must allow: the largest of ``max_rows``, its trees, and the tree that checks the export."""
    return max(max_rows, 2 * num_heads + 1, *(tree.rows for tree in trees.values()))
