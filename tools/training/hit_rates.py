"""Measures how often trained heads are right, and which tree follows from that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...runtime.files.heads import HeadSet

TREE_ROWS = 5
"""Rows of the tree that is stored with the heads, unless another number is asked for."""
_RANKS = 10
_RATED_PATHS = 128


def measure_heads(
    heads: HeadSet, answers: Mapping[str, Path], backbone: Any, tree_rows: int, device: str = "cpu"
) -> dict[str, Any]:
    """Measure hit rates on each folder of answers. Paths, scaling and tree come from the one called ``heldout``.

    ``backbone`` is the module whose embeddings the heads use.
    """
    from ...calibration.hit_rates import find_hits, platt_scaling
    from ...calibration.training.examples import load_examples
    from ...export.backbone.logits import find_logit_change
    from ...runtime.drafting.hits import path_rates, rank_rates, replayed_acceptance_length
    from ...runtime.tree import tree_of_paths

    embedding, output_weight = backbone.get_input_embeddings().weight.detach(), backbone.get_output_embeddings().weight.detach()
    ranks, change = min(_RANKS, heads.config.draft_vocab_size), find_logit_change(backbone)
    found = {
        part: find_hits(
            heads, load_examples(folder, heads.config.num_heads), embedding, output_weight, ranks, device=device, change=change
        )
        for part, folder in answers.items()
    }
    rates = path_rates(found["heldout"].ranks)
    tree = tree_of_paths(rates, tree_rows)
    return {
        "hit_rates": {part: rank_rates(hits.ranks, ranks).round(4).tolist() for part, hits in found.items()},
        "path_rates": [[list(path), round(rates[path], 5)] for path in tree_of_paths(rates, _RATED_PATHS).paths[1:]],
        "platt_scaling": platt_scaling(found["heldout"]),
        "tree": tree.choices(),
        "expected_acceptance_length": round(replayed_acceptance_length(tree, found["heldout"].ranks), 3),
    }


def hit_rate_table(rates: dict[str, list[list[float]]]) -> str:
    """Table of each head's top-1 and top-5 hit rate: on held-out answers, and on training answers where they were counted."""
    from ..console import table

    parts = [part for part in ("train", "heldout") if part in rates]
    rows = [
        [str(head + 1), *(f"{value:.3f}" for part in parts for value in (rates[part][head][0], sum(rates[part][head][:5])))]
        for head in range(len(rates["heldout"]))
    ]
    titles = {"train": "train", "heldout": "held-out"}
    return table(rows, ["head", *(f"{titles[part]} {top}" for part in parts for top in ("top-1", "top-5"))])
