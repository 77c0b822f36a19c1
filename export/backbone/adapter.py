"""Merges the adapter that heads of the second stage were trained with into the backbone, before the trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import HeadsError, HeadsMismatchError, MissingDependencyError
from ...runtime.files.adapter_file import SAMPLE, WEIGHTS_NAME, Adapter, digest_backbone

_PREFIX = "base_model.model."
_OTHER = "an adapter changes the backbone that it was trained on: give that one, or heads of this one"


def backbone_digest(module: nn.Module) -> str:
    """Digest a backbone by :func:`...runtime.files.adapter_file.digest_backbone`; the dtype of its weights doesn't change it."""
    return digest_backbone(
        (name, tuple(parameter.shape), parameter.detach().flatten()[:SAMPLE].float().cpu().numpy())
        for name, parameter in module.named_parameters()
    )


def merge_adapter(module: Any, adapter: Adapter) -> Any:
    """Merge the adapter into the weights of ``module`` (float32) and return the module.

    Raises:
        HeadsMismatchError: the adapter belongs to another backbone.
        HeadsError: its file is damaged, or holds NaN or infinite values.
        MissingDependencyError: peft isn't installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "merging an adapter needs peft, not installed here", hint="install with: pip install 'medusa-deploy[train]'"
        ) from error
    tensors = _read_tensors(adapter)
    _check_tensors(module, adapter, tensors)
    found = backbone_digest(module)
    if found != adapter.backbone:
        raise HeadsMismatchError(
            f"the adapter changes a backbone with the digest {adapter.backbone[:16]}…, this one has {found[:16]}…",
            hint=_OTHER,
        )
    config = peft.LoraConfig(
        r=adapter.shape.rank, lora_alpha=adapter.shape.alpha, target_modules=list(adapter.shape.targets)  # type: ignore[arg-type]
    )
    model = peft.PeftModel(module, config)
    peft.set_peft_model_state_dict(model, tensors)
    return model.merge_and_unload()


def _read_tensors(adapter: Adapter) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter.folder / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise HeadsError(f"{path} can't be read: {error}", hint="the file is damaged or truncated: copy it again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise HeadsError(f"{name} in {path} holds NaN, infinite or integer values", hint="train the adapter again")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _check_tensors(module: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Check that the adapter has exactly the tensors that its config asks of this backbone, in its shapes."""
    rank = adapter.shape.rank
    expected: dict[str, tuple[int, ...]] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and name.rsplit(".", 1)[-1] in adapter.shape.targets:
            expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, child.in_features)
            expected[f"{_PREFIX}{name}.lora_B.weight"] = (child.out_features, rank)
    different = sorted(expected.keys() ^ tensors.keys())
    if different:
        where = "lacks" if different[0] in expected else "holds"
        raise HeadsMismatchError(
            f"the adapter {where} {different[0]}: it has {len(tensors)} tensors, this backbone takes {len(expected)}", hint=_OTHER
        )
    for name, shape in expected.items():
        has = tuple(tensors[name].shape)
        if has != shape:
            raise HeadsMismatchError(f"the adapter's {name} has shape {has}, expected {shape}", hint=_OTHER)
