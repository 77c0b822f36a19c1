"""Adds a LoRA adapter (arXiv 2106.09685) to a backbone with peft, and takes it out as the files that peft reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...runtime.errors import TrainingError
from ...runtime.files.adapter_file import AdapterFiles, LoraShape, lora_config


def add_adapter(module: Any, rank: int, alpha: float) -> LoraShape:
    """Put an adapter on every linear layer but the output projection. It changes nothing yet, and it alone can be trained.

    Raises:
        TrainingError: the backbone has no such layers.
    """
    import peft

    output = module.get_output_embeddings()
    layers = [name for name, child in module.named_modules() if isinstance(child, nn.Linear) and child is not output]
    linear = {name.rsplit(".", 1)[-1] for name in layers}
    if not linear:
        raise TrainingError(f"{type(module).__name__} has no linear layers to adapt", hint="train heads alone: --stage 1")
    shape = LoraShape(rank, alpha, tuple(sorted(linear)))
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(shape.targets)), module  # type: ignore[arg-type]
    )
    return shape


def adapter_parameters(module: Any) -> nn.ParameterList:
    """Return the parameters of ``module`` that are trained, in its order."""
    return nn.ParameterList([parameter for parameter in module.parameters() if parameter.requires_grad])


def adapter_files(module: Any, shape: LoraShape, backbone: str) -> AdapterFiles:
    """Return the adapter in half precision. ``backbone``: digest of the backbone before training.

    Raises:
        TrainingError: a weight overflows.
    """
    import peft
    from safetensors.torch import save

    tensors = {}
    for name, tensor in peft.get_peft_model_state_dict(module).items():
        half = tensor.detach().cpu().half().contiguous()
        if not torch.isfinite(half).all():
            raise TrainingError(f"{name} overflows in half precision", hint="lower --learning-rate")
        tensors[f"base_model.model.{name}"] = half
    return AdapterFiles(lora_config(shape), save(tensors, {"format": "pt"}), backbone)


def keep_share(module: Any, share: float) -> None:
    """Scale the change that the module's adapter makes to the backbone by ``share``."""
    from peft.tuners.lora import LoraLayer

    for child in module.modules():
        if isinstance(child, LoraLayer):
            for name in child.scaling:
                child.set_scale(name, share)
