"""Runs the quantisers of onnxruntime.quantization on a bundle's standard graph, and the graphs that they write.

The standard graph is fed a whole text as one prefill: prompt and answer are rows of one chain, the caches before it are empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medusa_deploy.runtime.backends import ort_model
from medusa_deploy.runtime.executors import step_io
from medusa_deploy.runtime.files.bundle import Bundle
from quantiser.judge import Logits

Text = tuple[list[int], list[int]]
_COLUMNS_STEP = 64


class Graph:
    """The standard graph of a bundle: its inputs for a text, and the backbone's matmuls in it."""

    def __init__(self, bundle: Bundle) -> None:
        from medusa_deploy.export.quantise.w8a8 import parts
        from medusa_deploy.export.weights import read_graph

        self.path = bundle.path(bundle.manifest.variants["standard"])
        layout = ort_model(bundle, 1, "standard").layout
        cache = np.zeros((1, layout.kv_heads, layout.rows, layout.head_dim), layout.dtype)
        self._caches = dict.fromkeys(step_io.past_names(layout.layers), cache)
        self._margin = bundle.manifest.heads.num_heads
        found = parts(read_graph(self.path).graph)
        self.others = [name for name, part in found.items() if part != "backbone"]
        # Every seventh matmul of the backbone is a layer's down matmul; names of nodes don't say so.
        self.down = [name for name, part in found.items() if part == "backbone"][6::7]
        self.matmuls = len(found) - len(self.others)

    def inputs(self, text: Text) -> dict[str, np.ndarray]:
        """Make the inputs of one step that reads a prompt and its answer and computes the logits that the answer is chosen by."""
        prompt, answer = text
        tokens = [*prompt, *answer[:-1]]
        rows, margin = len(tokens), self._margin
        return {
            step_io.TOKENS: np.array([tokens], np.int64),
            step_io.POSITIONS: np.arange(rows, dtype=np.int64)[None],
            step_io.ANCESTORS: np.tril(np.ones((1, rows, rows), bool)),
            step_io.FORCED: np.array([rows], np.int64),
            step_io.WRITE_INDEX: np.array([margin], np.int64),
            step_io.COLUMNS: np.arange(-(-(margin + rows) // _COLUMNS_STEP) * _COLUMNS_STEP, dtype=np.int64),
            step_io.LOGIT_ROWS: np.arange(len(prompt) - 1, rows, dtype=np.int64)[None],
            step_io.COMMIT: np.arange(margin, dtype=np.int64)[None],
            **self._caches,
        }

    def logits(self, path: Path) -> Logits:
        """Return a function that computes a text's logits with the standard graph, or one made of it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # each cache of each layer is reported as copied
        # It moves a QuantizeLinear of int8 through a Reshape without its zero point, whose type is uint8 then, and loading fails.
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["QDQPropagationTransformer"]
        )

        def of(prompt: list[int], answer: list[int]) -> np.ndarray:
            result: np.ndarray = session.run([step_io.LOGITS], self.inputs((prompt, answer)))[0][0]
            return result

        return of


def quantise(graph: Graph, method: str, texts: Sequence[Text], output: Path, block: int) -> None:
    """Write the standard graph as a method of the library quantises it. The projection and the heads stay as they are.

    ``method``: a key of ``METHODS``.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    METHODS[method](graph, texts, output, block)


def _static(*, down: bool = True, **more: Any) -> Callable[[Graph, Sequence[Text], Path, int], None]:
    def write(graph: Graph, texts: Sequence[Text], output: Path, _block: int) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        extra = {"ActivationSymmetric": True, "WeightSymmetric": True, **more}
        quantize_static(
            str(graph.path),
            str(output),
            _reader(graph, texts),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=graph.others if down else [*graph.others, *graph.down],
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options=extra,
        )

    return write


def _few_bits(method: str) -> Callable[[Graph, Sequence[Text], Path, int], None]:
    def write(graph: Graph, texts: Sequence[Text], output: Path, block: int) -> None:
        import onnx
        from onnxruntime.quantization import matmul_nbits_quantizer as library

        configs = {
            "rtn": lambda: library.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False, bits=4),
            "rtn8": lambda: library.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=8),
            "hqq": lambda: library.HQQWeightOnlyQuantConfig(block_size=block, bits=4),
            "k-quant": library.KQuantWeightOnlyQuantConfig,
            "gptq": lambda: library.GPTQWeightOnlyQuantConfig(_reader(graph, texts)),
        }
        model = onnx.load(graph.path)
        bits = 8 if method == "rtn8" else 4
        made = library.MatMulNBitsQuantizer(
            model, bits=bits, block_size=block, nodes_to_exclude=graph.others, algo_config=configs[method]()
        )
        made.process()
        onnx.save(made.model.model, output, save_as_external_data=True, location=f"{output.stem}.bin")

    return write


def _reader(graph: Graph, texts: Sequence[Text]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(texts)

        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            return (graph.inputs(text) for text in texts)

        def __deepcopy__(self, _memo: Any) -> Any:
            return Reader()

        def get_next(self) -> dict[str, np.ndarray] | None:
            text = next(self._left, None)
            return None if text is None else graph.inputs(text)

    return Reader()


METHODS = {
    # Without this option the outputs of matmuls are quantised as well.
    "static": _static(OpTypesToExcludeOutputQuantization=["MatMul"]),
    "static-down": _static(down=False, OpTypesToExcludeOutputQuantization=["MatMul"]),
    "static-outputs": _static(),
    **{f"4-bit-{name}": _few_bits(name) for name in ("rtn", "hqq", "k-quant", "gptq")},
    "8-bit-rtn": _few_bits("rtn8"),
}
