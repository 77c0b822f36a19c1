"""One call of a packed CPU graph: the rows of several slots, encoded, and their results, decoded (:mod:`.step_io`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import step_io
from .cpu_inputs import fill_mask
from .ort_base import OrtModel, fetched
from .step_arrays import slot_result, visible_rows
from .step_plan import SlotResult, SlotRows, Wanted

SPARE_ROWS = 64
"""Rows of the cache that places without a slot use."""


class PackedStep:
    """Inputs and outputs of a graph with ``places`` for slots, and their binding, where some slot wants ``wanted``.

    A slot keeps its place while it takes part, so that its caches are bound once. Places without a slot compute one row, which
    nobody reads, over a spare cache. Arrays whose shape stays are filled again; others are made and bound anew.
    """

    def __init__(
        self,
        session: Any,
        value: Callable[[np.ndarray], Any],
        model: OrtModel,
        places: int,
        wanted: Wanted,
        caches: Sequence[Sequence[Any]],
    ) -> None:
        """``value``: makes an OrtValue over an array. ``caches``: the OrtValues of each slot, and of the spare cache last."""
        self._model, self._value, self._caches = model, value, caches
        self._margin, self._places = model.num_heads, places
        self._io = session.io_binding()
        self._inputs = {each.name for each in session.get_inputs()}
        self._windows = step_io.mask_windows(sorted({name.split("@")[0] for name in self._inputs}))
        self._outputs = fetched(wanted)
        self._arrays: dict[str, np.ndarray] = {}
        self._slots: list[int | None] = [None] * places
        self._spare = [False] * places  # whether the place's arrays are those of an idle place
        self._last_rows = [self._array(step_io.of_slot(step_io.LAST_ROWS, place), (1,), np.int32) for place in range(places)]
        self._visible = [self._array(step_io.of_slot(step_io.VISIBLE, place), (), np.int32) for place in range(places)]
        self._rows_of_slot = self._array(step_io.ROWS_OF_SLOT, (places,), np.int64)
        for name, answer in ((step_io.HEADS_WANTED, wanted.heads), (step_io.LOGITS_WANTED, wanted.logits)):
            self._array(name, (), bool)[()] = answer
        for place in range(places):
            self._bind_caches(place, None)

    @property
    def binding(self) -> Any:
        """What ONNX Runtime runs."""
        return self._io

    def fill(self, active: Sequence[SlotRows], lengths: Sequence[int]) -> None:
        """Encode the rows of the active slots. ``lengths``: rows that each slot keeps."""
        at = self._take_places(active)
        self._order = [at.get(place) for place in range(self._places)]
        counts = [1 if rows is None else rows.count for rows in self._order]
        kept = [0 if rows is None else 1 if rows.prefills else rows.count for rows in self._order]
        self._first, self._first_kept = _starts(counts), _starts(kept)
        total, logits = sum(counts), sum(kept)
        self._rows_of_slot[:] = counts
        tokens = self._array(step_io.TOKENS, (1, total), np.int64)[0]
        positions = self._array(step_io.POSITIONS, (1, total), np.int64)[0]
        logit_rows = self._array(step_io.LOGIT_ROWS, (1, logits), np.int64)[0]
        parents = self._array(step_io.PARENTS, (1, total), np.int64)[0]
        paths = self._array(step_io.PATHS, (1, total, logits), np.float32)[0]
        own = self._array(step_io.OWN_ROWS, (self._places, logits), np.float32)
        parents[:], paths[:], own[:] = 0, 0, step_io.OTHERS_ROW
        for place, rows in enumerate(self._order):
            first, first_kept = self._first[place], self._first_kept[place]
            last = first + counts[place]
            if rows is None:
                tokens[first] = positions[first] = 0
                self._rest(place)
                continue
            length = lengths[rows.slot]
            tokens[first:last] = rows.tokens
            np.add(rows.shape.depths, length, out=positions[first:last])
            self._look(place, rows, length)
            last_kept = first_kept + kept[place]
            own[place, first_kept:last_kept] = 0
            logit_rows[first_kept:last_kept] = range(last - kept[place], last)
            if rows.count > 1 and not rows.prefills:
                np.add(rows.shape.parents[1:], first_kept, out=parents[first + 1 : last])
                paths[first:last, first_kept:last_kept] = rows.shape.on_path
        self._make_room(logits)

    def results(self, active: Sequence[SlotRows], seconds: float) -> list[SlotResult]:
        """The results of these slots. Arrays are views, valid until the next call."""
        place_of = {rows.slot: place for place, rows in enumerate(self._order) if rows is not None}
        return [self._result(place_of[rows.slot], rows, seconds) for rows in active]

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _take_places(self, active: Sequence[SlotRows]) -> dict[int, SlotRows]:
        """Give each active slot a place: the one that it has, or the first that no active slot has."""
        taking_part = {rows.slot: rows for rows in active}
        at = {place: taking_part.pop(slot) for place, slot in enumerate(self._slots) if slot in taking_part}
        free = (place for place in range(self._places) if place not in at)
        for rows in taking_part.values():
            place = next(free)
            self._bind_caches(place, rows.slot)
            at[place] = rows
        for place in free:
            if self._slots[place] is not None:
                self._bind_caches(place, None)
        return at

    def _bind_caches(self, place: int, slot: int | None) -> None:
        self._slots[place] = slot
        layers = self._model.layout.layers
        values = self._caches[-1 if slot is None else slot]
        for past, present, value in zip(step_io.past_names(layers), step_io.present_names(layers), values, strict=True):
            self._io.bind_ortvalue_input(step_io.of_slot(past, place), value)
            self._io.bind_ortvalue_output(step_io.of_slot(present, place), value)

    def _look(self, place: int, rows: SlotRows, length: int) -> None:
        """Say what the rows of a slot behind ``length`` kept ones may look at."""
        start = self._margin + length
        visible = visible_rows(start + rows.count, self._model.layout.rows)
        self._spare[place] = False
        self._visible[place][()] = visible
        self._last_rows[place][0] = start + rows.count - 1
        for name, window in self._windows.items():
            fill_mask(self._mask(name, place, rows.count, visible), rows.shape, self._margin, start, window)

    def _rest(self, place: int) -> None:
        """Let a place without a slot look at its own row."""
        if self._spare[place]:
            return
        self._spare[place] = True
        self._visible[place][()] = SPARE_ROWS
        self._last_rows[place][0] = self._margin
        for name in self._windows:
            self._mask(name, place, 1, SPARE_ROWS)[0, self._margin] = 0

    def _mask(self, name: str, place: int, count: int, visible: int) -> np.ndarray:
        """The mask [N, T] of a place; the margin is hidden in it."""
        named, shape = step_io.of_slot(name, place), (1, 1, count, visible)
        known = self._arrays.get(named)
        mask = self._array(named, shape, self._model.layout.dtype)
        if mask is not known:
            mask[..., : self._margin] = step_io.HIDDEN_BIAS
        rows: np.ndarray = mask[0, 0]
        return rows

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The array that is bound to the input or output ``name``, of this shape."""
        found = self._arrays.get(name)
        if found is None or found.shape != shape:
            self._arrays[name] = found = np.zeros(shape, dtype)
            if name in self._inputs:
                self._io.bind_ortvalue_input(name, self._value(found))
            elif name in self._outputs:
                self._io.bind_ortvalue_output(name, self._value(found))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    # -- outputs ---------------------------------------------------------------------------------------------------

    def _make_room(self, logits: int) -> None:
        """Bind the outputs, for so many rows with logits."""
        model, places = self._model, self._places
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            step_io.LAST_ROW: ((places,), np.int64),
            step_io.NEXT_TOKEN: ((places,), np.int64),
            step_io.CANDIDATES: ((places, model.num_heads, model.top_k), np.int64),
            step_io.LOG_PROBS: ((places, model.num_heads, model.top_k), np.float32),
            step_io.LOGITS: ((1, logits, model.vocab_size), model.layout.dtype),
            step_io.HIDDEN: ((1, logits, model.hidden_size), model.layout.dtype),
        }
        for name in self._outputs:
            self._array(name, *shapes[name])

    def _result(self, place: int, rows: SlotRows, seconds: float) -> SlotResult:
        first = self._first_kept[place]
        kept = (0, slice(first, first + (1 if rows.prefills else rows.count)))
        found = {name: self._arrays[name] for name in self._outputs}
        parts = {name: found[name][place] for name in (step_io.CANDIDATES, step_io.LOG_PROBS) if name in found}
        parts |= {name: found[name][kept] for name in (step_io.LOGITS, step_io.HIDDEN) if name in found}
        return slot_result(
            rows,
            seconds,
            last_row=int(found[step_io.LAST_ROW][place]) - self._first[place],
            next_token=int(found[step_io.NEXT_TOKEN][place]),
            candidates=parts.get(step_io.CANDIDATES),
            log_probs=parts.get(step_io.LOG_PROBS),
            logits=parts.get(step_io.LOGITS),
            hidden=parts.get(step_io.HIDDEN),
        )


def _starts(counts: Sequence[int]) -> list[int]:
    """Where each of several runs begins, laid one after another."""
    return [sum(counts[:index]) for index in range(len(counts))]
