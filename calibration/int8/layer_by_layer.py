"""Calibrates a model that doesn't fit into memory: texts pass through one layer after the other, each loaded alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import CalibrationError
from ...runtime.executors import step_io
from ...runtime.executors.one_slot import prefill_rows
from ...runtime.executors.ort_base import CPU_PROVIDER, import_onnxruntime
from ...runtime.executors.step_arrays import StepInputs, visible_rows
from ...runtime.files.bundle import Bundle
from ...runtime.files.scales_file import Smoothing
from ...runtime.request import Request
from ...runtime.text.encoder import PromptEncoder
from .collect import SAVE_EVERY, Progress, run_facts, watched_matmuls
from .layer_cut import Stage, cut_layers
from .layer_progress import LayerProgress
from .matmuls import Matmul, StepGraph
from .moments import Moments, StagedMoments
from .observations import Observations
from .row_sample import SAMPLED_PROMPTS, RowSample, smooth_activation
from .takers import smoothable

LONGEST_TEXT = 512
_PLAIN_ROWS = 64  # rows of the last stage at a time: each has logits of the whole vocabulary


@dataclass(frozen=True, slots=True)
class Measured:
    """Holds what scales are made of. ``weights``: scales by (name, axis). ``smoothing``: by activation and grid."""

    seen: Observations
    weights: Mapping[tuple[str, int], np.ndarray]
    smoothing: Mapping[str, Mapping[str, Smoothing]]


class LayerCalibrator:
    """Runs a bundle's standard graph in stages over whole texts. Generates nothing: every token would need all layers.

    So drafted rows of a tree are not seen. In the last stage each token of a text is the root of a step of its own: projection
    and heads see what they see in plain decoding of that text. Memory: one stage's weights, and the hidden states of all texts.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Read the graph, without weights. ``threads``: of the engine; None takes all cores.

        Raises:
            MissingDependencyError: onnxruntime isn't installed.
            BundleIntegrityError: the graph can't be read.
            CalibrationError: no matmul has a constant weight, or the graph isn't a chain of layers.
        """
        self._ort = import_onnxruntime("cpu")
        self._threads = threads
        self.bundle, self.manifest = bundle, bundle.manifest
        self.graph = StepGraph(bundle)
        self.matmuls = watched_matmuls(bundle, self.graph)
        self.stages = cut_layers(self.graph, self.manifest.backbone.layers, self.matmuls)
        self.longest = min(LONGEST_TEXT, self.manifest.limits.capacity)
        self._encoder = PromptEncoder(self.manifest.text, self.manifest.backbone.vocab_size, bundle.path)
        backbone = self.manifest.backbone
        self._cache_shape = (backbone.kv_heads, self.manifest.limits.cache_rows, backbone.head_dim)

    @property
    def codec(self) -> Any:
        """The bundle's tokenizer, or None."""
        return self._encoder.codec

    def encode(self, request: Request) -> list[int]:
        """Turn a request's prompt into token ids."""
        return self._encoder.encode(request)

    def settings(self, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return everything that the result depends on, as JSON."""
        return {**run_facts(self.bundle, texts), "layer_by_layer": True, "longest_text": self.longest}

    def measure(
        self,
        texts: Sequence[Sequence[int]],
        alphas: Sequence[float | None],
        progress_file: Path | None = None,
        progress: Progress = lambda _done, _note: None,
    ) -> Measured:
        """Take the texts, token ids of at most ``longest`` each, through all stages. Without ``alphas`` nothing is smoothed.

        ``progress_file`` keeps the state behind a stage from time to time. A run with the same settings goes on behind that
        stage, with the same result. The caller removes the file. ``progress`` gets the number of stages done and a note.

        Raises:
            RangeError: an activation holds NaN or infinity, or a weight that no scale fits.
            QuantisationError: a weight holds NaN or infinity.
            CalibrationError: a text is empty or too long, or the progress file is damaged or of a run with other settings.
            OutputError: the progress file can't be written.
        """
        if not all(0 < len(text) <= self.longest for text in texts):
            raise CalibrationError("a text is empty or too long", hint=f"give texts of 1 to {self.longest} tokens")
        settings = {**self.settings(texts), "alphas": list(alphas)}
        run = LayerProgress(Observations.of(self.matmuls), [None] * len(texts))
        run.seen.prompts, run.seen.prefill_rows = len(texts), sum(map(len, texts))
        if progress_file is not None:
            run.resume(progress_file, settings, list(map(len, texts)))
        can_be_smoothed = smoothable(self.graph) if alphas else {}
        weights: dict[tuple[str, int], np.ndarray] = {}
        since = time.monotonic()
        for done, stage in enumerate(self.stages):
            name = "the last norm, projection and heads" if stage.after is None else f"layer {stage.layer}"

            def note(what: str, done: int = done, name: str = name) -> None:
                progress(done, f"{name}: {what}")

            rows = {}
            if done >= run.stages:
                rows = self._observe(stage, texts, run, [each for each in stage.activations if each in can_be_smoothed], note)
            note("scales of weights")
            for key in dict.fromkeys((matmul.weight, matmul.axis) for matmul in stage.matmuls):
                weights[key] = self.graph.weight_scales(*key)
            for activation, sampled in rows.items():
                note(f"smoothing {activation}")
                maxima = run.seen.observers[activation].channel_maxima
                run.smoothing[activation] = smooth_activation(self.graph, can_be_smoothed[activation], sampled, maxima, alphas)
            run.stages = max(run.stages, done + 1)
            progress(done + 1, name)
            if progress_file is not None and time.monotonic() - since >= SAVE_EVERY and done + 1 == run.stages:
                run.save(progress_file, settings)
                since = time.monotonic()
        order = dict.fromkeys((matmul.weight, matmul.axis) for matmul in self.matmuls)
        return Measured(run.seen, {key: weights[key] for key in order}, {name: run.smoothing[name] for name in can_be_smoothed})

    def _observe(
        self,
        stage: Stage,
        texts: Sequence[Sequence[int]],
        run: LayerProgress,
        sampled: Sequence[str],
        note: Callable[[str], None],
    ) -> dict[str, np.ndarray]:
        """Run a stage over all texts. The states of ``run`` become those behind it. Returns rows [R, C] of the ``sampled``."""
        samples = [RowSample(sampled if index < SAMPLED_PROMPTS else (), len(text)) for index, text in enumerate(texts)]
        for index, positions, values in self._walk(stage, texts, run.states):
            for name in stage.activations:
                run.seen.observers[name].observe(values[name])
            samples[index].take(((name, values[name]) for name in sampled), positions, prefill=True)
            note(f"text {index + 1} of {len(texts)}")
        found = {name: [rows for sample in samples for rows in sample.rows.get(name, [])] for name in sampled}
        return {name: np.concatenate(rows) for name, rows in found.items() if rows}

    def _walk(
        self, stage: Stage, texts: Sequence[Sequence[int]], states: list[np.ndarray | None]
    ) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
        """Run a stage over all texts: yield a text's index, positions of rows, and tensors by name. ``states`` move on."""
        if not stage.outputs:
            return
        session = self._open(stage)
        for index, text in enumerate(texts):
            for inputs, before in self._calls(stage, text, states[index]):
                values = self._run(session, stage, inputs, before)
                yield index, inputs.positions[0], values
                if stage.after is not None:
                    states[index] = values[stage.after]

    def projected_states(
        self, texts: Sequence[Sequence[int]], note: Callable[[str], None] = lambda _what: None
    ) -> list[np.ndarray]:
        """Return what the vocabulary projection reads at each token of each text: float32 [n, H]."""
        states: list[np.ndarray | None] = [None] * len(texts)
        found: list[list[np.ndarray]] = [[] for _ in texts]
        name = self.projection.activation
        for stage in self.stages:
            for index, _positions, values in self._walk(stage, texts, states):
                if stage.after is None:
                    found[index].append(values[name].reshape(-1, values[name].shape[-1]).astype(np.float32))
                note(f"layer {stage.layer}: text {index + 1} of {len(texts)}")
        return [np.concatenate(parts) for parts in found]

    @property
    def projection(self) -> Matmul:
        """The vocabulary projection."""
        return _own(self.stages[-1])[-1]

    def moments(self, texts: Sequence[Sequence[int]], note: Callable[[str], None] = lambda _what: None) -> StagedMoments:
        """Return E[xᵀx] of the backbone's activations over ``texts``, by the weight's name; see :class:`.moments.StagedMoments`.

        Each stage runs when the first of its weights is asked for.
        """
        stage_of = {matmul.weight: at for at, stage in enumerate(self.stages) for matmul in _own(stage)}
        return StagedMoments(stage_of, self._moments(texts, note))

    def _moments(
        self, texts: Sequence[Sequence[int]], note: Callable[[str], None]
    ) -> Iterator[Mapping[str, list[np.ndarray]]]:
        states: list[np.ndarray | None] = [None] * len(texts)
        for stage in self.stages:
            moments = Moments({matmul.activation: matmul.channels for matmul in _own(stage)})
            for index, positions, values in self._walk(stage, texts, states):
                moments.take(values.items(), positions, prefill=True)
                note(f"layer {stage.layer}: text {index + 1} of {len(texts)}")
            means = moments.means()
            del moments
            yield {matmul.weight: means[matmul.activation] for matmul in _own(stage) if matmul.activation in means}

    def _open(self, stage: Stage) -> Any:
        """Open a session with the stage's weights alone. It keeps no memory between calls."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.graph.folder))
        piece = self.graph.piece(stage.before, stage.outputs)
        return self._ort.InferenceSession(piece, options, providers=[CPU_PROVIDER])

    def _calls(
        self, stage: Stage, text: Sequence[int], state: np.ndarray | None
    ) -> Iterator[tuple[StepInputs, np.ndarray | None]]:
        """Yield inputs and hidden states [B, N, H] of the calls that take a text through a stage.

        A layer takes it as one prefill. Behind the layers each token has a slot of its own, [n, 1, H], in which it is the root.
        """
        ids = np.asarray(text, np.int64)
        if stage.after is not None:
            inputs = self._inputs(1, len(ids))
            inputs.fill(prefill_rows(0, ids), 0)
            yield inputs, state
            return
        assert state is not None, "a model has layers"
        for start in range(0, len(ids), _PLAIN_ROWS):
            part = slice(start, start + _PLAIN_ROWS)
            inputs = self._inputs(len(ids[part]), 1)
            inputs.tokens[:, 0], inputs.positions[:, 0] = ids[part], np.arange(len(ids))[part]
            inputs.ancestors[:] = True
            inputs.forced[:] = 1
            yield inputs, state[0, part, None]

    def _inputs(self, slots: int, rows: int) -> StepInputs:
        inputs = StepInputs.allocate(slots, rows, 1, self.manifest.heads.num_heads)
        for slot in range(slots):
            inputs.rest(0, index=slot)
        return inputs

    def _run(self, session: Any, stage: Stage, inputs: StepInputs, before: np.ndarray | None) -> dict[str, np.ndarray]:
        """Make one call. Caches are empty: the stage reads its own rows in them, and their size."""
        cache = np.zeros((len(inputs.tokens), *self._cache_shape), self.manifest.dtype)  # pages that nobody reads take no memory
        feeds = {}
        for name in (value.name for value in session.get_inputs()):
            if name == stage.before:
                feeds[name] = before
            elif name == step_io.COLUMNS:
                feeds[name] = np.arange(visible_rows(int(inputs.write_index.max()) + inputs.rows, self._cache_shape[1]))
            elif name.startswith("past_"):
                feeds[name] = cache
            else:
                feeds[name] = getattr(inputs, name)
        values = dict(zip(stage.outputs, session.run(stage.outputs, feeds), strict=True))
        if stage.before is not None:
            values[stage.before] = before
        return values


def _own(stage: Stage) -> list[Matmul]:
    """List the backbone's matmuls of a stage."""
    return [matmul for matmul in stage.matmuls if not matmul.of_heads]
