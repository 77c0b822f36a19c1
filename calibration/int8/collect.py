"""Runs a bundle on calibration data as a service would, and watches the activations of its matmuls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ... import __version__
from ...runtime.backends import ort_model
from ...runtime.errors import CalibrationError
from ...runtime.executors.ort import Bound, OrtExecutor, OrtModel
from ...runtime.executors.ort_base import fetched
from ...runtime.executors.step_plan import SlotRows, Wanted
from ...runtime.files.bundle import Bundle
from ...runtime.files.scales_file import model_digest
from ...runtime.session import Session
from ...runtime.text.prompts import prompts_digest
from .matmuls import Matmul, StepGraph
from .observations import Observations

Progress = Callable[[int, str], object]
_MOST_OBSERVED_BYTES = 256 << 20
SAVE_EVERY = 30.0


class Watcher(Protocol):
    """Looks at tensors [B, N, C] of every call, by name; they are valid until it returns.

    ``positions`` int64 [N]: of the call's rows in the text.
    """

    def take(self, values: Iterable[tuple[str, np.ndarray]], positions: np.ndarray, *, prefill: bool) -> None: ...


class ObservingExecutor(OrtExecutor):
    """Runs a graph with more outputs on the CPU, and shows them to ``watcher`` after every call.

    ``prompt_length``: a call whose rows begin before it is a prefill.
    """

    prompt_length = 0

    def __init__(
        self, model: OrtModel, graph: StepGraph, tensors: Mapping[str, bool], watcher: Watcher, threads: int | None
    ) -> None:
        """Load ``graph``, which is that of ``model``. ``tensors``: names in it; True if only the heads' outputs need a tensor."""
        self._step_graph = graph
        self._of_heads = tensors
        self.watcher = watcher
        super().__init__(model, threads)

    def _graph(self, path: Path, options: Any) -> str | bytes:
        if path != self.model.step:
            return super()._graph(path, options)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._step_graph.folder))
        return self._step_graph.with_outputs(self._of_heads)

    def _bind(self, rows: SlotRows) -> Bound:
        bound = super()._bind(rows)
        self._bind_added(bound, rows.wanted)
        return bound

    def _call(self, bound: Bound, rows: SlotRows, length: int) -> None:
        super()._call(bound, rows, length)
        added, outputs = self._added(rows.wanted), bound.io.get_outputs()
        by_name = dict(zip(added, outputs[len(outputs) - len(added) :], strict=True))
        values = (
            (name, by_name[name].numpy() if name in by_name else getattr(bound.outputs, name))
            for name in self._observed(rows.wanted)
        )
        self.watcher.take(values, length + rows.shape.depths, prefill=length < self.prompt_length)
        # Bindings are kept, one for each length of a chunk. Bound anew, they hold no values until their next call.
        self._bind_added(bound, rows.wanted)

    def _bind_added(self, bound: Bound, wanted: Wanted) -> None:
        for name in self._added(wanted):
            bound.io.bind_output(name)

    def _added(self, wanted: Wanted) -> list[str]:
        """The observed tensors that aren't outputs of a call anyway."""
        own = fetched(wanted)
        return [name for name in self._observed(wanted) if name not in own]

    def _observed(self, wanted: Wanted) -> list[str]:
        return [name for name, of_heads in self._of_heads.items() if wanted.heads or not of_heads]


class Calibrator:
    """Watches a bundle while it answers: prompts are prefilled, then decoded greedily on the bundle's default tree.

    So the rows are those that an engine computes, rejected ones included. The tree is fixed: numbers of rows that are chosen by
    time would differ in every run. ``matmuls``: the watched ones. If the tree is its root alone, no heads run, and their matmuls
    aren't watched.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Load the bundle's standard graph. ``threads``: of the engine; None takes all cores.

        Raises:
            MissingDependencyError: onnxruntime isn't installed.
            BundleIntegrityError: the graph can't be read.
            CalibrationError: no matmul in it has a constant weight.
        """
        self.bundle = bundle
        self.graph = StepGraph(bundle)
        self.matmuls = watched_matmuls(bundle, self.graph)
        tensors = {matmul.activation: matmul.of_heads for matmul in self.matmuls}
        watcher = Observations.of(self.matmuls)
        self._executor = ObservingExecutor(ort_model(bundle, 1, "standard"), self.graph, tensors, watcher, threads)
        limits = bundle.manifest.limits
        # All activations of a call are in memory at once, so a call of a large model gets fewer rows.
        chunk = max(1, min(limits.prefill_chunk, _MOST_OBSERVED_BYTES // _row_bytes(self.matmuls)))
        manifest = replace(bundle.manifest, limits=replace(limits, prefill_chunk=chunk))
        self.session = Session(Bundle(bundle.folder, manifest), self._executor, prefix_cache=False)

    def settings(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> dict[str, Any]:
        """Return everything that a run's observations depend on, as JSON."""
        facts = run_facts(self.bundle, prompts)
        return {**facts, "max_new_tokens": max_new_tokens, "tree": self.session.tree.choices()}

    def collect(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        progress_file: Path | None = None,
        progress: Progress = lambda _done, _note: None,
    ) -> Observations:
        """Answer the prompts, given as token ids, and return the observations of every activation.

        ``progress_file`` keeps the observations from time to time, and when the run is interrupted. A run with the same settings
        goes on behind the last prompt in it, with the same result. The caller removes the file. ``progress`` gets the number of
        prompts done and a note.

        Raises:
            RangeError: an activation holds NaN or infinity.
            CalibrationError: the progress file is damaged or of a run with other settings.
            CapacityError: a prompt and its answer don't fit into a slot.
            OutputError: the progress file can't be written.
        """
        settings = self.settings(prompts, max_new_tokens)
        total = Observations.of(self.matmuls)
        if progress_file is not None:
            total.resume(progress_file, settings)
        saved, since = total.prompts, time.monotonic()
        try:
            for prompt in prompts[total.prompts :]:
                total.merge(self._observe(prompt, max_new_tokens))
                progress(total.prompts, f"{total.prefill_rows} prefill rows, {total.tree_rows} tree rows")
                if progress_file is not None and time.monotonic() - since >= SAVE_EVERY:
                    total.save(progress_file, settings)
                    saved, since = total.prompts, time.monotonic()
        except BaseException:
            if progress_file is not None and total.prompts > saved:
                total.save(progress_file, settings)
            raise
        return total

    def _observe(self, prompt: Sequence[int], max_new_tokens: int) -> Observations:
        """Observe one prompt and its answer. A run that is interrupted keeps whole prompts only."""
        seen = Observations.of(self.matmuls)
        self.watch(prompt, max_new_tokens, seen)
        seen.prompts = 1
        return seen

    def watch(self, prompt: Sequence[int], max_new_tokens: int, watcher: Watcher) -> None:
        """Answer one prompt and show ``watcher`` the activations of the matmuls."""
        self._executor.watcher, self._executor.prompt_length = watcher, len(prompt)
        self.session.generate(token_ids=prompt, max_new_tokens=max_new_tokens, tree=self.session.tree)


def watched_matmuls(bundle: Bundle, graph: StepGraph) -> list[Matmul]:
    """List the matmuls of a bundle's graph that are calibrated: those of the heads only if the tree has rows for them.

    Raises:
        CalibrationError: there is no matmul with a constant weight.
    """
    heads_run = bundle.manifest.tree().rows > 1
    matmuls = [matmul for matmul in graph.matmuls if heads_run or not matmul.of_heads]
    if not matmuls:
        raise CalibrationError("no matrix product in the step graph has a constant weight", hint="export the bundle again")
    return matmuls


def run_facts(bundle: Bundle, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the facts that every way of calibrating records of its run: model, data and versions."""
    import onnxruntime

    return {
        "model_sha256": model_digest(bundle.manifest),
        "data_sha256": prompts_digest(prompts),
        "prompts": len(prompts),
        "versions": {"medusa_deploy": __version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__},
    }


def _row_bytes(matmuls: Sequence[Matmul]) -> int:
    """Count the bytes of all observed activations, float32, in a call of one row."""
    return 4 * sum({matmul.activation: matmul.channels for matmul in matmuls}.values())
