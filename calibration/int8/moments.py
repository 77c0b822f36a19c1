"""Measures second moments of activations: with them GPTQ lets other inputs take back the error of one input's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ...runtime.errors import CalibrationError
from .collect import Calibrator, Progress

MOST_BYTES = 6 << 30
FEWEST_ROWS = 256
TILE = 2048
"""The most channels of a tile: of wider activations only the tiles along the diagonal are kept. A multiple of every block."""


class Moments:
    """Sums xᵀx over the rows x [C] of activations, by name: float32 tiles along the diagonal of [C, C]."""

    def __init__(self, channels: Mapping[str, int]) -> None:
        """Start with zeros. ``channels``: of each activation.

        Raises:
            CalibrationError: the matrices would take more than 6 GiB.
        """
        sizes = {name: [min(TILE, count - at) for at in range(0, count, TILE)] for name, count in channels.items()}
        size = sum(4 * tile**2 for tiles in sizes.values() for tile in tiles)
        if size > MOST_BYTES:
            raise CalibrationError(
                f"second moments of {len(channels)} activations take {size / 2**30:.1f} GiB",
                hint="4-bit weights of a model this large are rounded to the nearest: give --rounding nearest",
            )
        self.sums = {name: [np.zeros((tile, tile), np.float32) for tile in tiles] for name, tiles in sizes.items()}
        self.rows = dict.fromkeys(channels, 0)

    def take(self, values: Iterable[tuple[str, np.ndarray]], _positions: np.ndarray, *, prefill: bool) -> None:
        """Take in a prefill. Rows of steps don't count: many are drafted and rejected."""
        if not prefill:
            return
        for name, value in values:
            if name in self.sums:
                rows = value.reshape(-1, value.shape[-1]).astype(np.float32, copy=False)
                for at, total in zip(range(0, rows.shape[1], TILE), self.sums[name], strict=True):
                    part = rows[:, at : at + TILE]
                    np.add(total, part.T @ part, out=total)
                self.rows[name] += len(rows)

    def means(self) -> dict[str, list[np.ndarray]]:
        """Return E[xᵀx] of each activation with at least 256 rows, in tiles. The sums become the means.

        Raises:
            CalibrationError: none has them.
        """
        most = max(self.rows.values(), default=FEWEST_ROWS)
        if most < FEWEST_ROWS:
            raise CalibrationError(f"the data gave {most} rows, GPTQ needs {FEWEST_ROWS}", hint="give more or longer prompts")
        enough = [name for name, rows in self.rows.items() if rows >= FEWEST_ROWS]
        return {name: [np.divide(tile, np.float32(self.rows[name]), out=tile) for tile in self.sums[name]] for name in enough}


class StagedMoments(Mapping[str, Sequence[np.ndarray]]):
    """Moments by the weight's name, measured stage by stage: one stage's are in memory.

    Weights must be asked for in the order of their stages.
    """

    def __init__(self, stage_of: Mapping[str, int], stages: Iterator[Mapping[str, Sequence[np.ndarray]]]) -> None:
        """``stage_of``: index of each weight's stage. ``stages``: moments of each stage, measured as the iterator goes on."""
        self._stage_of, self._stages = stage_of, stages
        self._at, self._found = -1, dict[str, Sequence[np.ndarray]]()

    def __getitem__(self, weight: str) -> Sequence[np.ndarray]:
        wanted = self._stage_of[weight]
        assert wanted >= self._at, f"{weight} is asked for behind its stage"
        while self._at < wanted:
            self._found = {}  # leaves memory before the next stage's enter it
            self._found = dict(next(self._stages))
            self._at += 1
        return self._found[weight]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stage_of)

    def __len__(self) -> int:
        return len(self._stage_of)


def collect_moments(
    calibrator: Calibrator, texts: Sequence[Sequence[int]], progress: Progress = lambda _done, _note: None
) -> dict[str, list[np.ndarray]]:
    """Measure E[xᵀx] of the backbone's activations in prefills of ``texts`` (token ids): tiles by name of the weight.

    The vocabulary projection reads one row a prefill. With fewer than 256 rows it is left out.

    Raises:
        CalibrationError: fewer than 256 rows, or activations too large for their moments.
        CapacityError: a text doesn't fit into a slot.
    """
    matmuls = [matmul for matmul in calibrator.matmuls if not matmul.of_heads]
    moments = Moments({matmul.activation: matmul.channels for matmul in matmuls})
    for done, text in enumerate(texts, 1):
        calibrator.watch(text, 1, moments)
        progress(done, f"{max(moments.rows.values())} rows")
    means = moments.means()
    return {matmul.weight: means[matmul.activation] for matmul in matmuls if matmul.activation in means}
