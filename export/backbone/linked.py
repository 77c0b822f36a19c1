"""Loads a backbone without its weights: its graphs refer to the checkpoint's own shards.

Parameters are fake tensors (shapes and no storage). :mod:`..trace.link` replaces each in a traced graph by ONNX external data
that points into a safetensors file of the bundle.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...runtime.errors import CheckpointError, UnlinkableError
from ...runtime.files.heads import HeadSet
from .backbone import backbone_shape, freeze_rope, load_config, transformers_errors
from .checkpoint import STORED_DTYPES, Placed, Report, find_stored, place, write_tensors
from .gguf_file.metadata import GgufFile
from .gguf_file.weights import gguf_places, read_pieces
from .logits import find_logit_change
from .model_folder import check_unused, find_model, folder_notes
from .record import DTYPES, Backbone
from .safetensors_header import StoredTensor, read_header

CHECKED_LAYERS, MOST_CHECKED_LAYERS = 2, 8


@dataclass(frozen=True, slots=True)
class LinkedWeights:
    """Weights in the checkpoint's own files: the module's parameters are fake tensors of ``mode``.

    ``tensors``: each parameter's place by its name in the causal LM. ``files``: how each file came into the bundle.
    """

    mode: FakeTensorMode
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, str]

    def tracing(self) -> FakeTensorMode:
        """Enter the mode that the fake parameters belong to."""
        return self.mode

    def stored(self, parameter: str) -> StoredTensor:
        """Return the place of a parameter."""
        return self.tensors[parameter]


def load_linked_backbone(source: Path, dtype: str, capacity: int, folder: Path, report: Report) -> Backbone:
    """Load a backbone without weights, and bring the files that hold them into ``folder``.

    Raises:
        UnlinkableError: no folder of safetensors, names or types that transformers converts, or a missing tensor.
        CheckpointError: a damaged shard, other shapes than the config's, or values that aren't finite.
        UnsupportedArchitectureError: see :func:`.backbone.check_architecture`.
        OSError: ``folder`` can't be written.
    """
    found, gguf = find_model(source)
    if gguf is None:
        config, needed, notes = stored_parameters(source, dtype, capacity)
        placed = place(needed, DTYPES[dtype], folder, report)
    else:
        config, notes = load_config(source, capacity), []
        placed = _place_gguf(GgufFile(found / gguf), config, DTYPES[dtype], folder, report)
        needed = dict(placed.tensors)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = empty_module(config, DTYPES[dtype], mode)
    stored = {name: placed.tensors[tensor.name] for name, tensor in needed.items()}
    weights = LinkedWeights(mode, stored, placed.files)
    return Backbone(module, backbone_shape(module), DTYPES[dtype], weights, tuple(notes), find_logit_change(module))


def _place_gguf(file: GgufFile, config: Any, dtype: torch.dtype, folder: Path, report: Report) -> Placed:
    """Dequantise the weights of a GGUF file into a file of safetensors in ``folder``."""
    report(f"dequantising {file.path.name}")
    target = folder / "model.safetensors"
    write_gguf_tensors(file, config, dtype, target)
    return Placed(read_header(target), {target.name: f"dequantised to {STORED_DTYPES[dtype]}"})


def write_gguf_tensors(file: GgufFile, config: Any, dtype: torch.dtype, target: Path) -> None:
    """Dequantise the weights of a GGUF file into the safetensors file ``target``, a few rows at a time.

    Raises:
        CheckpointError: a tensor is missing, has no place in the model, another shape or type, or values that aren't finite.
        OSError: the file can't be written.
    """
    with transformers_errors(file.path):
        places = gguf_places(file, empty_module(config, dtype, None))
    tensors = {name: (file.tensors[stored].shape, read_pieces(file, config, stored)) for name, stored in places.items()}
    write_tensors(target, STORED_DTYPES[dtype], tensors)


def stored_parameters(source: Path, dtype: str, capacity: int) -> tuple[Any, dict[str, StoredTensor], list[str]]:
    """Read the config of a model folder, the place of each parameter of its causal LM, and what else it holds. Reads no weights.

    Raises:
        UnlinkableError, CheckpointError, UnsupportedArchitectureError: as :func:`load_linked_backbone`.
    """
    folder, _ = find_model(source)
    config = load_config(source, capacity)
    if getattr(config, "transformers_weights", None):
        raise UnlinkableError(
            f"config.json of {source} names its weights itself: {config.transformers_weights!r}",
            hint="such weights can't be linked: export with --weights copied",
        )
    available = find_stored(folder)
    module = empty_module(config, DTYPES[dtype], None)
    kept = sorted(set(module.state_dict()) - {name for name, _ in module.named_parameters(remove_duplicate=False)})
    if kept:
        raise UnlinkableError(
            f"{type(module).__name__} keeps {kept[0]} in its checkpoint beside weights", hint="export with --weights copied"
        )
    parameters = dict(module.named_parameters())
    missing = sorted(set(parameters) - set(available))
    if missing:
        raise UnlinkableError(
            f"{source} lacks {len(missing)} tensors of {type(module).__name__}, such as {missing[0]}",
            hint="check that config.json belongs to these weights and that the download is complete; or export with "
            "--weights copied, which also reads checkpoints with older names",
        )
    for name, parameter in parameters.items():
        if available[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{name} has the shape {list(available[name].shape)}, config.json says {list(parameter.shape)}",
                hint="check that config.json belongs to these weights",
            )
    _check_tied(module, available)
    named = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    notes = [*folder_notes(folder, config), *check_unused(module, set(available) - named, source)]
    return config, {name: available[name] for name in parameters}, notes


def _check_tied(module: nn.Module, available: Mapping[str, StoredTensor]) -> None:
    """Check that a tied weight that is stored under both names has the same numbers under both."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and name in available:
            one, two = (available[each].mapped().reshape(-1).view("u1") for each in (other, name))
            step = 1 << 24
            if len(one) != len(two) or any((one[at : at + step] != two[at : at + step]).any() for at in range(0, len(one), step)):
                raise UnlinkableError(
                    f"config.json says that {name} is {other}, and the checkpoint holds other numbers for it",
                    hint="set tie_word_embeddings to false in config.json if the checkpoint is right",
                )


def empty_module(config: Any, dtype: torch.dtype, mode: FakeTensorMode | None) -> Any:
    """Make the causal LM of ``config`` without weights. Parameters are fake, or meta without a ``mode``; buffers are real."""
    from transformers import AutoModelForCausalLM

    def without_storage(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied one stays the same object
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(without_storage)  # type: ignore[arg-type]
    try:
        with transformers_errors(Path(config.name_or_path)):
            module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        hook.remove()
    module.eval()
    freeze_rope(module)
    if mode is not None:
        with mode:
            replace_parameters(module, {name: torch.empty(p.shape, dtype=dtype) for name, p in module.named_parameters()})
    return module


def replace_parameters(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give every parameter its tensor; shared parameters stay shared."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    new = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(child, name, new[names[id(parameter)]])


def first_layers(backbone: Backbone, layers: int = CHECKED_LAYERS) -> tuple[Backbone, Any]:
    """Cut the backbone to its first ``layers``, or to as many as have one of each kind, up to ``MOST_CHECKED_LAYERS``.

    Returns it twice: as it is traced, and as a torch module over the mapped weights.
    """
    weights = backbone.weights
    assert isinstance(weights, LinkedWeights)
    config = copy.deepcopy(backbone.module.config)
    kinds = list(getattr(config, "layer_types", None) or ())
    firsts = [kinds.index(kind) + 1 for kind in set(kinds)]
    layers = max([layers, *(first for first in firsts if first <= MOST_CHECKED_LAYERS)])
    config.num_hidden_layers = min(layers, backbone.shape.layers)
    if kinds:
        config.layer_types = kinds[: config.num_hidden_layers]
    module = empty_module(config, backbone.dtype, weights.mode)
    real = empty_module(config, backbone.dtype, None)
    mapped = {name: torch.from_numpy(weights.tensors[name].mapped()) for name, _ in real.named_parameters()}
    replace_parameters(real, mapped)
    return replace(backbone, module=module, shape=backbone_shape(module)), real


def prune_projection(backbone: Backbone, heads: HeadSet) -> HeadSet:
    """Give heads over a pruned vocabulary their rows of the backbone's projection, where the module has no numbers."""
    if heads.config.projection != "pruned" or "projection.weight" in heads.tensors:
        return heads
    projection = backbone.module.get_output_embeddings().weight
    name = next(name for name, parameter in backbone.module.named_parameters() if parameter is projection)
    stored = backbone.weights.stored(name)
    if stored is None:
        return heads
    rows = stored.mapped()[heads.tensors["token_map"]]
    return replace(heads, tensors={**heads.tensors, "projection.weight": rows})
