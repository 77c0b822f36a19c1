"""Reads the subject of a plan (a known size, a model's folder or a bundle) as weights by part, with limits to start from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.files.heads import HeadConfig
from .capacity import Backbone, Limits, Weights, backbone_of, heads_of, matrix
from .model_sizes import EDGE, LARGE, ModelShape, find_preset

if TYPE_CHECKING:
    from ...runtime.files.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Source:
    """The subject of a plan.

    ``kind``: ``size``, ``model`` or ``bundle``. ``argument``: its name in commands. ``heads``: a bundle's own heads, else None.
    """

    kind: str
    name: str
    argument: str
    backbone: Backbone
    limits: Limits
    rows: tuple[int, ...]
    heads: HeadConfig | None = None


def source_of_size(name: str) -> Source:
    """Take a preset.

    Raises:
        UsageError: no such size.
    """
    preset = find_preset(name)
    limits = Limits(preset.capacity, 1, preset.rows[-1], preset.prefill_chunk)
    return Source("size", f"{preset.name} ({preset.checkpoint})", "MODEL", backbone_of(preset.shape), limits, preset.rows)


def source_of_model(folder: Path) -> Source:
    """Read a folder or GGUF file that export reads, or a name on a hub. Its config decides; its weights stay on disk.

    Raises:
        CheckpointError, UnsupportedArchitectureError: no such model, or one that can't be exported.
        MissingDependencyError: export's packages aren't installed.
    """
    from ..extras import quiet_libraries, require

    require("export")
    quiet_libraries()
    from ...export.backbone.backbone import backbone_shape, load_config
    from ...export.estimate import empty_module
    from ...export.hub import fetch_model

    config = load_config(fetch_model(folder, weights=False).path, 1)
    module = empty_module(config)
    backbone_sizes = backbone_shape(module)
    shape = ModelShape(
        **asdict(backbone_sizes),
        intermediate_size=int(getattr(config, "intermediate_size", 4 * backbone_sizes.hidden_size)),
        max_position=int(config.max_position_embeddings),
        tied=module.get_input_embeddings().weight is module.get_output_embeddings().weight,
    )
    tables = {id(module.get_input_embeddings().weight), id(module.get_output_embeddings().weight)}
    layers = norm = Weights()
    for name, parameter in module.named_parameters():
        if id(parameter) in tables:
            continue
        if re.search(r"\.\d+\.", name):
            layers += _weights(tuple(parameter.shape))
        else:
            norm += _weights(tuple(parameter.shape))
    backbone = Backbone(shape, layers, norm)
    large = backbone.parameters > 5 * 10**9
    rows, chunk = LARGE if large else EDGE
    limits = Limits(min(4096 if large else 2048, shape.max_position), 1, rows[-1], chunk)
    return Source("model", f"{folder} ({shape.architecture})", str(folder), backbone, limits.at(), rows)


def source_of_bundle(folder: Path) -> Source:
    """Read a bundle: the tensors of its standard graph, its own heads and limits.

    Raises:
        BundleError: no bundle.
        MissingDependencyError: export's packages aren't installed.
    """
    from ..extras import require

    require("export")
    from ...runtime.files.bundle import open_bundle

    bundle = open_bundle(folder, check_hashes=False)
    manifest = bundle.manifest
    step = _tensors(bundle.path(manifest.graph("standard")))
    blocks = [re.fullmatch(r"heads\.blocks\.0\.(\d+)\.bias", name) for name in _tensors(bundle.path(manifest.heads_graph))]
    facts, limits = manifest.heads, manifest.limits
    config = HeadConfig(
        facts.kind,  # type: ignore[arg-type] # a manifest's kinds and projections were checked when it was written
        facts.num_heads,
        sum(1 for found in blocks if found) or 1,
        manifest.backbone.hidden_size,
        facts.draft_vocab_size,
        facts.projection,  # type: ignore[arg-type]
    )
    backbone = _bundle_backbone(manifest, step, config)
    rows = tuple(sorted({1, manifest.tree().rows, *(rows for rows in (8, 16, 32, 64) if rows <= limits.max_rows)}))
    name = f"{folder} ({manifest.backbone.architecture})"
    chosen = Limits(limits.capacity, limits.batch, limits.max_rows, limits.prefill_chunk)
    return Source("bundle", name, str(folder), backbone, chosen, rows, config)


def _bundle_backbone(manifest: Manifest, step: Mapping[str, tuple[int, ...]], config: HeadConfig) -> Backbone:
    """Subtract the heads' tensors from the graph's: folded constants lose their names, but not their sizes.

    A tied projection that was folded into its own matrix counts as its own: the plan is for the tensors of the graph.
    """
    hidden, vocab = manifest.backbone.hidden_size, manifest.backbone.vocab_size
    tables = [dims for dims in step.values() if sorted(dims) == sorted((vocab, hidden))]
    own = config.num_heads if config.projection == "own" and config.draft_vocab_size == vocab else 0
    tied = len(tables) - own == 1
    total = Weights()
    for dims in step.values():
        total += _weights(dims)
    heads = heads_of(config)
    head_weights = heads.blocks + heads.projections
    other = (max(dims) for dims in step.values() if len(dims) == 2 and not {vocab, config.draft_vocab_size} & set(dims))
    intermediate = max(other, default=0)
    capacity = manifest.limits.capacity
    shape = ModelShape(**asdict(manifest.backbone), intermediate_size=intermediate, max_position=capacity, tied=tied)
    norm, table = Weights(others=hidden), matrix(vocab, hidden)
    tables_in_graph = 1 if tied else 2
    layers = Weights(
        total.matrices - head_weights.matrices - tables_in_graph * table.matrices,
        max(0, total.channels - head_weights.channels - tables_in_graph * table.channels),
        max(0, total.others - head_weights.others - norm.others - tables_in_graph * table.others),
    )
    return Backbone(shape, layers, norm)


def _weights(dims: tuple[int, ...]) -> Weights:
    """Count the elements of one tensor; the first axis of a matrix is taken for its output channels."""
    if len(dims) == 2:
        return matrix(*dims)
    size = 1
    for dim in dims:
        size *= dim
    return Weights(others=size)


def _tensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of a graph's floating-point tensors, one name for each place in the weights, without their data."""
    import onnx

    graph: Any = onnx.load(path, load_external_data=False).graph
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    places = {}
    for tensor in graph.initializer:
        if tensor.data_type in floating:
            where = {entry.key: entry.value for entry in tensor.external_data}
            places[where.get("location"), where.get("offset", tensor.name)] = (tensor.name, tuple(tensor.dims))
    return dict(places.values())
