"""Models and heads by name, against a hub on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medusa_deploy.export.estimate import find_sources, plan_export
from medusa_deploy.export.hub import OWN_SILENCE, fetch_heads, fetch_model, hub_name
from medusa_deploy.runtime.errors import DownloadError, UsageError
from support.hub import COMMIT, Hub, serving

pytest.importorskip("huggingface_hub")
REPO = "maker/small-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the command line sets it for other libraries
        monkeypatch.setenv(OWN_SILENCE, "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


WHOLE = {"config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"read", "modeling_own.py": b"code", "big.gguf": b"GGUF"}
SHARDS = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two"}


def test_names_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = hub_name("Qwen/Qwen2.5-0.5B-Instruct-GGUF@main:qwen2.5-0.5b-instruct-q4_k_m.gguf")
    assert name is not None
    assert (name.repo, name.revision, name.file) == (
        "Qwen/Qwen2.5-0.5B-Instruct-GGUF", "main", "qwen2.5-0.5b-instruct-q4_k_m.gguf",
    )  # fmt: skip
    found = hub_name("a/b@refs/pr/3")
    assert found is not None
    assert found.revision == "refs/pr/3"
    for path in ("model", "/a/b", "./a/b", "../a/b", "a/b/c", "a/..", "a/b:../c", "a b/c", ""):
        assert hub_name(path) is None, path
    (tmp_path / "build" / "smollm2").mkdir(parents=True)
    assert hub_name("build/smollm2") is None, "what lies here counts"
    assert fetch_model("build/smollm2").origin is None


def test_a_model_is_fetched_without_code_and_other_forms_of_its_weights(hub: Hub) -> None:
    index = json.dumps({"weight_map": {}}).encode()
    hub.repositories[REPO] = {**WHOLE, **SHARDS, "model.safetensors.index.json": index, "onnx/model.onnx": b"", "x.bin": b""}
    found = fetch_model(REPO)
    assert files_of(found.path) == sorted([*SHARDS, "config.json", "model.safetensors.index.json", "tokenizer.json"])
    assert found.origin == {"hub": REPO, "revision": COMMIT}
    assert fetch_model(f"{REPO}@v1").origin == {"hub": REPO, "revision": COMMIT}


def test_a_dry_run_fetches_no_safetensors(hub: Hub) -> None:
    hub.repositories[REPO] = {**WHOLE, "model.safetensors": b"one"}
    assert files_of(fetch_model(REPO, weights=False).path) == ["config.json", "tokenizer.json"]
    assert "model.safetensors" in files_of(fetch_model(REPO).path)


def test_a_gguf_file_is_chosen_by_name_or_because_it_is_alone(hub: Hub) -> None:
    hub.repositories[REPO] = {"README.md": b"", "a-q4.gguf": b"GGUF4", "a-q8.gguf": b"GGUF8"}
    with pytest.raises(UsageError, match="holds 2 GGUF files") as caught:
        fetch_model(REPO)
    assert f"{REPO}:a-q4.gguf" in str(caught.value.hint)
    found = fetch_model(f"{REPO}:a-q8.gguf")
    assert found.path.read_bytes() == b"GGUF8"
    assert found.origin == {"hub": REPO, "revision": COMMIT, "file": "a-q8.gguf"}
    with pytest.raises(DownloadError, match=r"has no file b\.gguf"):
        fetch_model(f"{REPO}:b.gguf")
    del hub.repositories[REPO]["a-q4.gguf"]
    assert files_of(fetch_model(f"{REPO}@v1").path)[-1] == "a-q8.gguf"


@pytest.mark.parametrize(
    ("source", "message"),
    [("maker/other", "no such file or folder: maker/other; and the hub has no model"), (f"{REPO}@v7", "no revision v7")],
)
def test_what_the_hub_does_not_have_is_a_named_error(source: str, message: str, hub: Hub) -> None:
    hub.repositories[REPO] = {"README.md": b""}
    with pytest.raises(DownloadError, match=message):
        fetch_model(source)
    with pytest.raises(DownloadError, match="holds no weights"):
        fetch_model(REPO)
    with pytest.raises(DownloadError, match="holds nothing"):
        fetch_heads(REPO)
    hub.gated.add(REPO)
    with pytest.raises(DownloadError, match="is gated"):
        fetch_model(REPO)


def test_a_token_is_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token, hub.repositories[REPO] = "hf_secret", {"config.json": b"{}", "model.safetensors": b"one"}
    with pytest.raises(DownloadError, match="or hides it"):
        fetch_model(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert files_of(fetch_model(REPO).path) == ["config.json", "model.safetensors"]


def test_a_download_that_broke_off_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).bytes(25 << 20)
    hub.repositories[REPO] = {"config.json": b"{}", "model.safetensors": weights}
    hub.break_off_after = 11 << 20  # huggingface_hub keeps pieces of 10 MB
    found = fetch_model(REPO)
    assert (found.path / "model.safetensors").read_bytes() == weights


def test_a_download_that_fails_leaves_nothing_that_counts(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPO] = {"config.json": b"{}", "model.safetensors": bytes(1 << 16)}
    hub.break_off_after = 1 << 10
    with pytest.raises(DownloadError, match=r"model\.safetensors of maker/small-model can't be fetched"):
        fetch_model(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="isn't in the cache"):
        fetch_model(REPO)


def test_without_a_network_the_cache_answers_or_the_error_says_what_to_copy_where(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[REPO] = {"config.json": b"{}", "model.safetensors": b"one"}
    there = fetch_model(REPO)
    for gone in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1", OWN_SILENCE: ""}):
        for name, value in gone.items():
            monkeypatch.setenv(name, value)
        if OWN_SILENCE in gone:
            from huggingface_hub import constants

            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch_model(REPO) == there
        with pytest.raises(DownloadError, match=r"maker/other:a\.gguf isn't in the cache") as caught:
            fetch_model("maker/other:a.gguf")
        hint = str(caught.value.hint)
        assert "hf download maker/other a.gguf" in hint
        assert str(tmp_path / "cache" / "models--maker--other") in hint
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    with pytest.raises(DownloadError, match="isn't in the cache"):
        fetch_model(REPO)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert files_of(fetch_model(REPO).path) == ["config.json", "model.safetensors"], "the folder that was copied answers"


def test_heads_name_their_backbone(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    hub.add(REPO, tiny_model)
    config = {"medusa_num_heads": 1, "medusa_num_layers": 1, "base_model_name_or_path": REPO}
    hub.repositories["maker/medusa-heads"] = {"config.json": json.dumps(config).encode(), "medusa_lm_head.pt": b"pickle"}
    found, heads, notes = find_sources(None, "maker/medusa-heads", lambda phase: None)
    assert found.origin == {"hub": REPO, "revision": COMMIT}
    assert heads is not None
    assert files_of(heads.path) == ["config.json", "medusa_lm_head.pt"]
    assert notes == []
    hub.add("maker/finetuned", tiny_model)
    assert "and maker/finetuned was given" in find_sources("maker/finetuned", "maker/medusa-heads", lambda phase: None)[2][0]
    with pytest.raises(UsageError, match="no model is given"):
        find_sources(None, None, lambda phase: None)


def test_a_plan_takes_names(hub: Hub, tiny_model: Path, tiny_heads: Path) -> None:
    hub.add(REPO, tiny_model)
    hub.add("maker/heads", tiny_heads)
    plan = plan_export(REPO, "maker/heads")
    assert plan.parameters == plan_export(tiny_model, tiny_heads).parameters


@pytest.mark.slow
def test_a_bundle_remembers_where_its_model_came_from(hub: Hub, tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    from medusa_deploy.export.exporter import export_bundle
    from medusa_deploy.runtime.files.bundle import open_bundle

    hub.add(REPO, tiny_model)
    hub.add("maker/heads", tiny_heads)
    export_bundle(REPO, "maker/heads", tmp_path / "bundle", capacity=64, top_k=4, max_rows=8, prefill_chunk=16)
    provenance = open_bundle(tmp_path / "bundle").manifest.provenance
    assert provenance["model"] == {"hub": REPO, "revision": COMMIT}
    assert provenance["heads"]["origin"] == {"hub": "maker/heads", "revision": COMMIT}


def test_a_reference_and_a_build_take_names(hub: Hub, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_deploy.export import exporter
    from medusa_deploy.tools.cli import main
    from medusa_deploy.tools.exactness.reference import load_reference

    hub.add(REPO, tiny_model)
    reference = load_reference(f"{REPO}@v1", "float32")
    assert reference.facts["model"] == f"{REPO}@v1" and len(reference.generate([5, 6, 7], 3)) == 3
    asked: list[str] = []

    def export(model: str, *_arguments: object, **_options: object) -> None:
        asked.append(model)
        raise UsageError("far enough")

    monkeypatch.setattr(exporter, "export_bundle", export)
    monkeypatch.setattr("medusa_deploy.export.engines.build.check_engines", lambda *_arguments: None)
    assert main(["build", REPO, "--target", "sm_89", "-o", str(tmp_path / "bundle")]) == 1
    assert asked == [REPO]
