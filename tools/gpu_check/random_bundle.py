"""Makes a bundle of random weights where it is measured: graphs of full size, in fp16 and int8, over one small file of numbers.

All matrices of a type lie at the beginning of that file, so making a 7B writes 250 MiB. A GPU gets a copy of each matrix, in
places of their own: a step reads as many bytes as with a checkpoint. Nobody can say anything about text.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .shapes import Shapes

if TYPE_CHECKING:
    from ...export.backbone.record import Backbone
    from ...export.heads.module import HeadStack
    from ...runtime.files.bundle import Bundle
    from ...runtime.files.heads import HeadConfig

HEADS, TOP_K, MAX_ROWS = 5, 10, 64
PRECISIONS = {"fp16": "standard", "int8": "cuda-int8"}
"""Variants that a bundle has, by precision."""
_ONNX, _NUMBERS = "onnx", "random.bin"
_STEP, _HALF = 1 << 16, 2  # bytes


def heads_config(shapes: Shapes) -> HeadConfig:
    """Describe the heads: five, over the backbone's projection."""
    from ...runtime.files.heads import HeadConfig

    return HeadConfig("medusa", HEADS, 1, shapes.model.hidden_size, shapes.model.vocab_size, "shared")


def make_bundle(shapes: Shapes, folder: Path) -> tuple[Bundle, dict[str, float]]:
    """Write a bundle into the new folder ``folder``. Returns it, and the seconds that its parts took.

    Raises:
        ImportError: one of export's packages isn't there.
        TraceError: a library failed on the backbone's modules.
        OSError: the folder can't be written.
    """
    from ...export.graphs import HEADS_GRAPH, write_standard
    from ...runtime.executors import step_io
    from ...runtime.files.bundle import open_bundle, record_files
    from ...runtime.files.manifest import MANIFEST_NAME, HeadFacts, Limits, Manifest, TextFacts

    seconds: dict[str, float] = {}
    onnx = folder / _ONNX
    onnx.mkdir(parents=True)
    started = time.monotonic()
    numbers = _write_numbers(shapes, onnx / _NUMBERS)
    backbone = _backbone(shapes, numbers)
    stack = _heads(shapes, backbone, numbers)
    seconds["prepare"] = _since(started)
    started, capacity = time.monotonic(), max(shapes.lengths)
    rows = step_io.cache_rows(capacity, HEADS, MAX_ROWS)
    graphs = {"standard": write_standard(backbone, stack, rows, capacity, onnx)}
    seconds["trace"] = _since(started)
    started = time.monotonic()
    graphs[PRECISIONS["int8"]] = _write_int8(onnx / graphs["standard"], numbers)
    seconds["int8"] = _since(started)
    started, config = time.monotonic(), heads_config(shapes)
    manifest = Manifest(
        backbone=backbone.shape,
        heads=HeadFacts(config.kind, HEADS, TOP_K, config.projection, config.draft_vocab_size),
        limits=Limits(capacity, rows, MAX_ROWS, 1, min(256, capacity)),
        text=TextFacts(),
        dtype="float16",
        variants={name: f"{_ONNX}/{file}" for name, file in graphs.items()},
        heads_graph=f"{_ONNX}/{HEADS_GRAPH}",
        trees={"default": [[0]]},
        default_tree="default",
        files=record_files(folder),
        provenance={"weights": {"kind": "random"}},
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    seconds["hash"] = _since(started)
    return open_bundle(folder, check_hashes=False), seconds


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


def _write_numbers(shapes: Shapes, path: Path) -> Path:
    """Write fp16 numbers of random sign and mantissa, with magnitudes from 2^-7 to 2^-6: enough for the largest matrix."""
    model, rng = shapes.model, np.random.default_rng(0)
    largest = model.hidden_size * max(model.vocab_size, model.intermediate_size, model.query_size)
    with path.open("wb") as file:
        for first in range(0, largest + HEADS * _STEP, _STEP):
            bits = rng.integers(0, 1 << 16, min(_STEP, largest + HEADS * _STEP - first), np.uint16)
            file.write(((bits & 0x83FF) | (15 - 7) << 10).astype(np.uint16).tobytes())
    return path


def _backbone(shapes: Shapes, numbers: Path) -> Backbone:
    """Make the backbone without storage: its parameters lie at the beginning of ``numbers``."""
    import torch
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ...export.backbone.backbone import backbone_shape
    from ...export.backbone.linked import LinkedWeights, empty_module
    from ...export.backbone.record import Backbone
    from ...export.backbone.safetensors_header import StoredTensor

    model = shapes.model
    config: Any = getattr(transformers, f"{model.architecture.removesuffix('ForCausalLM')}Config")(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position,
        tie_word_embeddings=model.tied,
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = empty_module(config, torch.float16, mode)
    places = {
        name: StoredTensor(name, numbers, "F16", tuple(each.shape), 0, _HALF * each.numel())
        for name, each in module.named_parameters()
    }
    return Backbone(module, backbone_shape(module), torch.float16, LinkedWeights(mode, places, {}))


def _heads(shapes: Shapes, backbone: Backbone, numbers: Path) -> HeadStack:
    """Make the heads. Their matrices begin one after another, a little apart: a trace takes equal places for one tensor."""
    from ...export.backbone.safetensors_header import StoredTensor
    from ...export.heads.module import HeadStack
    from ...runtime.files.heads import HeadSet

    size = shapes.model.hidden_size
    tensors: dict[str, np.ndarray] = {}
    places = {}
    for head in range(HEADS):
        name = f"head.{head}.layer.0"
        stored = StoredTensor(f"{name}.weight", numbers, "F16", (size, size), head * _STEP, _HALF * size * size)
        tensors[f"{name}.weight"] = stored.mapped()
        tensors[f"{name}.bias"] = np.zeros(size, np.float32)
        places[tensors[f"{name}.weight"].ctypes.data] = stored
    projection = backbone.module.get_output_embeddings()
    return HeadStack(HeadSet(heads_config(shapes), tensors), projection, TOP_K, backbone.dtype, backbone.logits, places)


def _write_int8(standard: Path, numbers: Path) -> str:
    """Write the graph of ``standard`` in 8 bits; codes and scales lie at the beginning of ``numbers``, too."""
    import onnx_ir as ir

    from ...export.quantise.cuda import BLOCK, Matrix8, quantise_cuda
    from ...export.weights import BundleTensor, read_graph

    def store(matrix: Matrix8) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
        outputs, size = matrix.shape
        codes, scales = (outputs, size // BLOCK, BLOCK), (outputs, size // BLOCK)
        kinds = ((ir.DataType.UINT8, codes, outputs * size), (ir.DataType.FLOAT16, scales, _HALF * outputs * (size // BLOCK)))
        first, second = (
            BundleTensor(numbers.name, 0, nbytes, dtype, shape=ir.Shape(shape), name=matrix.name, base_dir=numbers.parent)
            for dtype, shape, nbytes in kinds
        )
        return first, second

    model = read_graph(standard)
    quantise_cuda(model, store)
    path = standard.with_name(f"step.{PRECISIONS['int8']}.onnx")
    ir.save(model, path)
    return path.name
