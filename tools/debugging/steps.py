"""Records inputs of real steps: the device graph answers a prompt in ONNX Runtime, and three of its calls are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.errors import UsageError

if TYPE_CHECKING:
    from ...runtime.files.bundle import Bundle

_QUESTION = "Why is the sky blue?"
STEPS = ("prefill", "plain", "tree")
Feeds = dict[str, np.ndarray]


def record_steps(bundle: Bundle, network: Path, prompt: str | Sequence[int] | None, new_tokens: int) -> dict[str, Feeds]:
    """Return the inputs of a prefill chunk, of a plain step, and of a step that verifies the bundle's tree, by name.

    ``network``: an ONNX file with the inputs and outputs of the bundle's device graph. The newest call of each kind is kept; a
    tree step that moves accepted rows comes before one that doesn't. A bundle without heads has no tree step.

    Raises:
        UsageError: the answer ended before a plain step.
    """
    from ...export.proof.device_executor import DeviceGraphExecutor
    from ...runtime.backends import ort_model
    from ...runtime.executors import step_io
    from ...runtime.session import Session

    kept: dict[str, Feeds] = {}

    def watch(feeds: Feeds) -> None:
        rows, forced = feeds[step_io.TOKENS].shape[1], int(feeds[step_io.FORCED].max())
        kind = "prefill" if forced > 1 else "plain" if rows == 1 else "tree"
        before = kept.get(kind)
        if before is None or feeds[step_io.KEPT_COUNT].max() >= before[step_io.KEPT_COUNT].max():
            kept[kind] = {name: value.copy() for name, value in feeds.items()}

    model = replace(ort_model(bundle, 1, "device"), step=network)
    executor = DeviceGraphExecutor(model, exact_options(), watch=watch)
    session = Session(bundle, executor, prefix_cache=False)
    if prompt is None:
        prompt = _QUESTION if session.codec is not None else [3 + 7 * place % 61 for place in range(16)]
    asked: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"token_ids": list(prompt)}
    asked |= {"max_new_tokens": new_tokens, "ignore_eos": True}
    session.generate(**asked, speculative=False)
    if session.tree.rows > 1:
        session.generate(**asked, tree=session.tree)
    if "plain" not in kept:
        raise UsageError("the answer has no plain step", hint="ask for more tokens")
    return {name: kept[name] for name in STEPS if name in kept}


def run_network(network: Path, feeds: Feeds, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Run an ONNX file once on the CPU. ``outputs``: names of any of its tensors, in their order."""
    import onnxruntime

    from ...export.weights import read_graph

    model = read_graph(network)
    have = {value.name for value in model.graph.outputs}
    values = {value.name: value for node in model.graph for value in node.outputs}
    added = [values[name] for name in outputs if name not in have]
    model.graph.outputs.extend(added)
    from onnx_ir import to_proto

    options = exact_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(network.parent))
    proto = to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    found = session.run(list(outputs), {name: value for name, value in feeds.items() if name in wanted})
    return dict(zip(outputs, found, strict=True))


def exact_options() -> Any:
    """Options of a session that executes quantising operators as they are written.

    Optimised, ONNX Runtime makes products of them that round activations, too.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    return options
