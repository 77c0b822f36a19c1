"""What a graph of a bundle takes on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx")

from medusa_deploy.runtime.files.bundle import open_bundle
from medusa_deploy.tools.measure.variant_size import variant_size
from support.tiny import HEADS, HIDDEN, VOCAB

PARAMETERS = VOCAB * HIDDEN + 2 * HIDDEN * (3 * HIDDEN + 3 * 128) + HEADS * HIDDEN * HIDDEN
"""Of the tiny model and its heads, without norms and biases."""


def test_sizes_count_what_a_graph_reads(tiny_bundle: Path):
    bundle = open_bundle(tiny_bundle)
    weights = bundle.manifest.files["onnx/weights.bin"].size
    for variant in ("standard", "cpu"):
        size = variant_size(bundle, variant)
        graph = bundle.manifest.files[bundle.manifest.variants[variant]].size
        assert size["files"] == {bundle.manifest.variants[variant]: graph, "onnx/weights.bin": weights}
        assert size["bytes"] == size["graph_bytes"] + size["weights_bytes"]
        assert 4 * PARAMETERS <= size["weights_bytes"] <= weights
