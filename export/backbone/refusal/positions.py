"""Finds tables of learned positions: a backbone with one can't hold more tokens than the table has rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from ....runtime.errors import UnsupportedArchitectureError

_NAMES = ("wpe", "pos_emb", "embed_positions", "position_embed")


def position_rows(module: Any) -> int | None:
    """Return the number of positions that a causal LM has a learned vector for; None if it has no such table."""
    tokens = module.get_input_embeddings()
    rows = [
        child.num_embeddings - int(getattr(child, "offset", 0))
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding) and child is not tokens and name.rpartition(".")[2].startswith(_NAMES)
    ]
    return min(rows, default=None)


def check_positions(module: Any, capacity: int, num_heads: int) -> None:
    """Refuse a capacity beyond the table of positions, and a table too short for the steps that check an export.

    Raises:
        UnsupportedArchitectureError: names the table's rows and the capacity.
    """
    rows = position_rows(module)
    if rows is not None and capacity > rows:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} has learned {rows} positions, the capacity is {capacity}",
            hint=f"export with --capacity {rows} or less",
        )
    needed = 2 * num_heads + 3
    if rows is not None and rows < needed:
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} has learned {rows} positions; the export of {num_heads} heads is checked with {needed}",
            hint="choose a backbone with more positions, or fewer heads",
        )
