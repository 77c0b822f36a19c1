"""Loads a backbone through transformers, reads its sizes, and refuses what the step graph can't express."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...runtime.errors import CheckpointError, DeployError, UnsupportedArchitectureError
from ...runtime.files.backbone import BackboneShape
from .adapter import merge_adapter
from .gguf_file.config import gguf_config
from .gguf_file.metadata import GgufFile
from .gguf_file.weights import load_gguf_module
from .logits import find_logit_change
from .model_folder import NO_CODE, check_types, check_unused, find_model, folder_notes, stop_ids, token_ids
from .record import DTYPES, Backbone
from .refusal.causes import LoadReports, first_lines, kept_reports
from .refusal.refusals import refuse, skeleton
from .refusal.rehearsal import rehearse

if TYPE_CHECKING:
    from ...runtime.files.adapter_file import Adapter

# Position encodings by what their frequencies depend on: nothing, or the length of a long sequence.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def load_backbone(source: Path, dtype: str, capacity: int, adapter: Adapter | None = None) -> Backbone:
    """Load a folder of safetensors (or a GGUF file, or a folder with one) in ``dtype`` for tracing.

    ``adapter``: low-rank changes. They are merged in float32, before the weights become ``dtype``.

    Raises:
        CheckpointError: no such model, or non-finite weights.
        HeadsError, HeadsMismatchError: the adapter is damaged, or belongs to another model.
        UnsupportedArchitectureError: positions that depend on the length within ``capacity``, …
    """
    load_config(source, capacity)
    module, notes = read_module(source, dtype if adapter is None else "fp32")
    if adapter is not None:
        module = merge_adapter(module, adapter)
        for parameter in module.parameters():  # buffers such as position frequencies stay float32
            parameter.data = parameter.data.to(DTYPES[dtype])
    _check_finite(module)
    freeze_rope(module)
    return Backbone(module, backbone_shape(module), DTYPES[dtype], warnings=tuple(notes), logits=find_logit_change(module))


def load_module(source: Path, dtype: str) -> Any:
    """Load the module of a model as transformers runs it, in evaluation mode.

    Raises:
        CheckpointError: no such model, tensors are missing or have other shapes than the config says, or the config has no place
            for some.
    """
    return read_module(source, dtype)[0]


def read_module(source: Path, dtype: str) -> tuple[Any, list[str]]:
    """Load a module as :func:`load_module` does, with what its folder holds and doesn't run."""
    from transformers import AutoModelForCausalLM

    folder, gguf = find_model(source)
    if gguf is not None:
        file = GgufFile(folder / gguf)
        with transformers_errors(source):
            return load_gguf_module(file, gguf_config(file), DTYPES[dtype]), []
    with transformers_errors(source):
        check_types(folder)
        module, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, ignore_mismatched_sizes=True, **NO_CODE
        )
    module.eval()
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"{source} holds {len(mismatched)} tensors in other shapes than {type(module).__name__} has, such as {name}: "
            f"{list(stored)}, and config.json says {list(expected)}",
            hint="check that config.json belongs to these weights",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} tensors of {type(module).__name__}, such as {missing[0]}",
            hint="check that config.json belongs to these weights and that the download is complete",
        )
    return module, [*folder_notes(folder, module.config), *check_unused(module, info["unexpected_keys"], source)]


def load_config(source: Path, capacity: int) -> Any:
    """Load the config of a model and check its architecture; the weights stay on disk.

    Raises:
        CheckpointError: no such model.
        UnsupportedArchitectureError: see :func:`.refusal.refusals.refuse` and :func:`check_architecture`.
    """
    from transformers import AutoConfig

    folder, gguf = find_model(source)
    with transformers_errors(source):
        if gguf is None:
            config = AutoConfig.from_pretrained(folder, **NO_CODE)
            token_ids(getattr(config, "eos_token_id", None), "config.json")
            stop_ids(folder)
            refuse(config, folder)
        else:
            config = gguf_config(GgufFile(folder / gguf))
        check_architecture(config, capacity)
    return config


@contextlib.contextmanager
def transformers_errors(source: Path) -> Iterator[None]:
    """Silence the progress bars and notes of transformers, and turn its exceptions into CheckpointError."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    reports = LoadReports()
    try:
        with kept_reports(reports), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DeployError:
        raise
    except Exception as error:  # transformers raises whatever its readers raise
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{source} can't be read without running Python code that it names (auto_map), and export never runs such code",
                hint="take a checkpoint of a model that transformers knows; a tokenizer needs a tokenizer.json",
            ) from error
        raise CheckpointError(
            f"transformers can't load {source}: {first_lines(error, 4, reports.text)}",
            hint="check that the folder has config.json and *.safetensors (or a .gguf file) and that the download is complete",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_architecture(config: Any, capacity: int) -> None:
    """Refuse settings that the step graph would compute wrongly.

    Raises:
        UnsupportedArchitectureError: names the setting, its value and the capacity.
    """
    foreign = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if foreign or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitectureError(
            f"{config.model_type} has {', '.join(sorted(foreign)) or 'an encoder'}",
            hint="the step graph expresses decoders with full attention",
        )
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind == "longrope" and "short_factor" in rope and rope["short_factor"] == rope.get("long_factor"):
            continue
        if kind in _LENGTH_DEPENDENT_ROPE:
            limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            limit = int(limit or config.max_position_embeddings)
            if capacity > limit:
                raise UnsupportedArchitectureError(
                    f"{config.model_type} changes its {kind} position frequencies beyond {limit} tokens, the capacity is "
                    f"{capacity}",
                    hint=f"export with --capacity {limit} or less",
                )
        elif kind not in _STATIC_ROPE:
            raise UnsupportedArchitectureError(
                f"{config.model_type} uses the position encoding {kind!r}", hint=f"supported: {', '.join(_STATIC_ROPE)}"
            )


def _ropes(config: Any) -> list[dict[str, Any]]:
    """List the parameters of a config's rotations: one for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in rope.values() if isinstance(each, dict)]
    return nested if nested and "rope_type" not in rope else [rope]


def backbone_shape(module: Any) -> BackboneShape:
    """Read the sizes of attention from what the modules do, and the vocabulary's from the projection's rows.

    Configs have fields that their models don't read.
    """
    config = module.config
    asked = rehearse(skeleton(config))
    return BackboneShape(
        architecture=type(module).__name__,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_heads=asked.query[1],
        kv_heads=asked.key[1],
        head_dim=asked.key[3],
        vocab_size=int(module.get_output_embeddings().weight.shape[0]),
    )


def _check_finite(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{name} holds NaN or infinite values", hint="the checkpoint is damaged, or overflows in this --dtype"
            )


def freeze_rope(module: torch.nn.Module) -> None:
    """Keep the update of length-dependent frequencies out of the trace: within the checked capacity they never change."""
    for child in module.modules():
        kind = getattr(child, "rope_type", None)
        if isinstance(kind, dict):  # by kind of layer
            child.rope_type = {name: "static" if each in _LENGTH_DEPENDENT_ROPE else each for name, each in kind.items()}  # type: ignore[assignment]
        elif kind in _LENGTH_DEPENDENT_ROPE:
            child.rope_type = "static"  # type: ignore[assignment]
