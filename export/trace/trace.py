"""Traces the step module into an ONNX graph with abstract attention nodes, which :mod:`..passes.lower` replaces."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ...runtime.executors import step_io
from ..backbone.record import Backbone
from ..heads.module import HeadStack
from .failures import named_failures
from .link import link_weights
from .names import keep_names
from .quiet import quiet
from .step import HeadsModule, StepModule

OPSET = 24
# Example sizes of the trace. All differ, and none is 1, so that the exporter takes no dimension for a constant or for another.
_B, _N, _R, _T = 2, 5, 3, 24


@named_failures("traced")
def trace_step(backbone: Backbone, heads: HeadStack, rows: int, capacity: int) -> ir.Model:
    """Trace the step graph over caches of ``rows`` rows: abstract attention, dynamic B, N, R and T, constant S.

    Layers whose window is shorter than ``capacity`` tokens get a mask of their own.

    Raises:
        UnsupportedArchitectureError: the backbone's attention has terms that the step graph can't express.
        TraceError: the exporter failed.
    """
    with backbone.weights.tracing():
        model = _trace_step(backbone, heads, rows, capacity)
    link_weights(model, backbone, heads.places)
    return model


@named_failures("traced")
def trace_heads(backbone: Backbone, heads: HeadStack) -> ir.Model:
    """Trace the heads alone: ``hidden`` [B, H] and ``root`` int64 [B] to ``candidates`` and ``log_probs``."""
    with backbone.weights.tracing():
        model = _trace_heads(backbone, heads)
    link_weights(model, backbone, heads.places)
    return model


def _trace_step(backbone: Backbone, heads: HeadStack, rows: int, capacity: int) -> ir.Model:
    shape = backbone.shape
    margin = heads.config.num_heads
    dtype = backbone.dtype
    past = [torch.zeros(_B, shape.kv_heads, rows, shape.head_dim, dtype=dtype) for _ in range(2 * shape.layers)]
    arguments = (
        torch.ones(_B, _N, dtype=torch.int64),
        torch.arange(_N)[None].repeat(_B, 1),
        torch.ones(_B, _N, _N, dtype=torch.bool).tril(),
        torch.ones(_B, dtype=torch.int64),
        torch.full((_B,), margin),
        torch.arange(_T),
        torch.arange(_R)[None].repeat(_B, 1),
        torch.zeros(_B, margin, dtype=torch.int64),
        torch.zeros(_B, _N, dtype=torch.int64),
        past,
    )
    b, n, t, r = (torch.export.Dim(name) for name in ("B", "N", "T", "R"))
    rows_of = {0: b, 1: n}
    dynamic = (rows_of, rows_of, {0: b, 1: n, 2: n}, {0: b}, {0: b}, {0: t}, {0: b, 1: r}, {0: b}, rows_of, [{0: b}] * len(past))
    inputs = [step_io.TOKENS, step_io.POSITIONS, step_io.ANCESTORS, step_io.FORCED, step_io.WRITE_INDEX]
    inputs += [step_io.COLUMNS, step_io.LOGIT_ROWS, step_io.COMMIT, step_io.DRAFT_SLOTS, *step_io.past_names(shape.layers)]
    outputs = [step_io.LAST_ROW, step_io.NEXT_TOKEN, step_io.CANDIDATES, step_io.LOG_PROBS, step_io.LOGITS, step_io.HIDDEN]
    outputs += [*step_io.CLOSING, *step_io.present_names(shape.layers)]
    return _export(StepModule(backbone.module, heads, margin, capacity), arguments, dynamic, inputs, outputs)


def _trace_heads(backbone: Backbone, heads: HeadStack) -> ir.Model:
    module = HeadsModule(heads, backbone.module.get_input_embeddings())
    arguments = (torch.zeros(_B, backbone.shape.hidden_size, dtype=backbone.dtype), torch.ones(_B, dtype=torch.int64))
    b = torch.export.Dim("B")
    names = [step_io.ROOT_HIDDEN, step_io.ROOT_TOKEN], [step_io.CANDIDATES, step_io.LOG_PROBS]
    return _export(module, arguments, ({0: b}, {0: b}), *names)


def _export(module: nn.Module, arguments: tuple[object, ...], dynamic: object, inputs: list[str], outputs: list[str]) -> ir.Model:
    module.eval()
    fake = any(isinstance(parameter, FakeTensor) for parameter in module.parameters())
    with torch.no_grad(), quiet(), _without_collection():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,  # type: ignore[arg-type]
            input_names=inputs,
            output_names=outputs,
            optimize=not fake,  # folding needs numbers
            verbose=False,
        )
    assert program is not None
    model = program.model
    keep_names(model)
    return model


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Stop garbage collection: a trace's objects live as long as it does, and looking for cycles took an eighth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
            gc.collect()
