"""Tiny synthetic models that every test can afford: made once a session, on the machine that runs the tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from medusa_deploy.runtime.session import Session
from support.tiny import make_tiny_heads, make_tiny_model

# No deadline: a shared machine may stall any example.
settings.register_profile("medusa-deploy", deadline=None, max_examples=50)
settings.load_profile("medusa-deploy")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed weights of all tests lie in a folder of their own; commands that tests start use it, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDUSA_DEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama: hidden 64, 4 heads over 2 kv heads, vocabulary 128, tied, no tokenizer."""
    pytest.importorskip("transformers")
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three random Medusa heads for ``tiny_model``, through the backbone's own projection."""
    return make_tiny_heads(tmp_path_factory.mktemp("tiny") / "heads")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_model`` with ``tiny_heads``, exported: capacity 256, 4 slots, top-k 4, 16 rows, prefill chunk 16.

    Shared by all tests, so never written to: see ``bundle_copy``.
    """
    pytest.importorskip("onnxruntime")
    from medusa_deploy.export.exporter import export_bundle

    output = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(tiny_model, tiny_heads, output, capacity=256, batch=4, top_k=4, max_rows=16, prefill_chunk=16)
    return output


@pytest.fixture(scope="session")
def tiny_session(tiny_bundle: Path) -> Session:
    """``tiny_bundle`` loaded with one slot: the CPU variant."""
    from medusa_deploy.runtime import load

    return load(tiny_bundle, threads=1)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_bundle`` to tamper with."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
