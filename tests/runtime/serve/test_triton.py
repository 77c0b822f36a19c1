"""The model repository for Triton: its files, and its model against a stand-in of the documented backend interface."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from medusa_deploy.runtime import load
from medusa_deploy.tools import cli
from support import fake_triton
from support.fake_triton import InferenceRequest
from support.text import text_bundle


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_bundle(tiny_bundle, tmp_path_factory.mktemp("triton") / "my-model")


@pytest.fixture(scope="module")
def model(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    repository = tmp_path_factory.mktemp("repository") / "models"
    assert cli.main(["triton", str(bundle), "-o", str(repository), "--slots", "2", "--threads", "1", "--max-waiting", "3"]) == 0
    folder = repository / "my-model"
    text = (folder / "config.pbtxt").read_text("utf-8")
    for line in ('backend: "python"', "max_batch_size: 0", "decoupled: True", 'name: "my-model"', '"stream" data_type'):
        assert line in text
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
    sys.modules["triton_python_backend_utils"] = fake_triton.module()
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    parameters = {name: {"string_value": value} for name, value in (("slots", "2"), ("threads", "1"), ("max_waiting", "3"))}
    config = json.dumps({"name": "my-model", "parameters": parameters})
    made.initialize({"model_config": config, "model_repository": str(folder), "model_version": "1"})
    yield made
    made.finalize()
    del sys.modules["triton_python_backend_utils"]


def asked(text: str = "abc", *, stream: bool | None = None, **sampling: Any) -> InferenceRequest:
    tensors: dict[str, Any] = {"text_input": [text.encode()]}
    if stream is not None:
        tensors["stream"] = [stream]
    if sampling:
        tensors["sampling_parameters"] = [json.dumps(sampling).encode()]
    return InferenceRequest(**tensors)


def text_of(request: InferenceRequest) -> str:
    assert request.sender.final.wait(60)
    return "".join(response.outputs["text_output"][0].decode() for response in request.sender.sent)


def error_of(request: InferenceRequest) -> Any:
    assert request.sender.final.wait(60)
    assert request.sender.sent[-1].outputs == {}
    return request.sender.sent[-1].error


def test_streams_and_whole_answers_are_those_of_a_session(model: Any, bundle: Path) -> None:
    options = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    texts = ["abc", "hello", "xyz"]
    requests = [asked(text, stream=stream, **options) for text in texts for stream in (None, False, True)]
    for request in requests[:5], requests[5:]:  # five at a time: two slots, three may wait
        assert model.execute(request) is None
        for each in request:
            assert each.sender.final.wait(60)
    session = load(bundle, threads=1)
    expected = [session.generate(text, max_new_tokens=40, ignore_eos=True).text for text in texts]
    assert [text_of(request) for request in requests] == [text for text in expected for _ in range(3)]
    assert len(requests[1].sender.sent) == 1 and len(requests[2].sender.sent) > 5
    for request in requests:
        last = request.sender.sent[-1].outputs
        assert last["finish_reason"][0] == b"length"
        drafted, accepted = last["total_draft_tokens"][0], last["total_accepted_draft_tokens"][0]
        assert 0 <= accepted <= drafted and last["acceptance_rate"][0] == pytest.approx(accepted / drafted if drafted else 0)
        assert all(set(response.outputs) == {"text_output"} for response in request.sender.sent[:-1])


def test_several_answers_with_a_seed(model: Any) -> None:
    twice = [asked(max_tokens=9, temperature=1.0, seed=4, n=2) for _ in range(2)]
    model.execute(twice[:1])
    assert twice[0].sender.final.wait(60)
    model.execute(twice[1:])
    assert twice[1].sender.final.wait(60)
    first, second = (request.sender.sent[0].outputs["text_output"].tolist() for request in twice)
    assert len(first) == 2 and first == second and first[0] != first[1]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (InferenceRequest(stream=[True]), "text_input is missing"),
        (InferenceRequest(text_input=[b"a", b"b"]), "2 values"),
        (InferenceRequest(text_input=[b"\xff"]), "UTF-8"),
        (InferenceRequest(text_input=[b"a"], sampling_parameters=[b"{"]), "isn't JSON"),
        (InferenceRequest(text_input=[b"a"], sampling_parameters=[b"[]"]), "no object"),
        (asked(colour="blue"), "colour"),
        (asked(temperature=-1), "temperature"),
        (asked(max_tokens=100_000), "exceed"),
        (asked("a" * 400, max_tokens=1), "400 tokens"),
        (asked(n=2, stream=True, max_tokens=2), "one answer"),
        (asked(tools=[{"type": "function"}]), "tools"),
    ],
)
def test_what_is_wrong_is_an_error_in_the_response(model: Any, request_: InferenceRequest, words: str) -> None:
    model.execute([request_])
    error = error_of(request_)
    assert words in error.message() and error.code() == "INVALID_ARG"


def test_overload_is_unavailable_and_cancelling_frees_the_slot(model: Any) -> None:
    session = model._service.session
    requests = [asked(max_tokens=240, ignore_eos=True, stream=True) for _ in range(7)]
    run = session.executor.run
    try:
        session.executor.run = lambda plan: (time.sleep(0.02), run(plan))[1]
        model.execute(requests)
        codes = [error_of(request).code() for request in requests if request.sender.final.wait(0.5)]
        assert codes == ["UNAVAILABLE"] * 2
        running = [request for request in requests if not request.sender.final.is_set()]
        for request in running:
            request.sender.cancelled = True
        assert {error_of(request).code() for request in running} == {"CANCELLED"}
    finally:
        session.executor.run = run
    again = asked(max_tokens=5, ignore_eos=True)
    model.execute([again])
    assert text_of(again)
    assert session.slots.free == 2


def test_names_and_bundles_that_do_not_fit_are_refused(
    tiny_bundle: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["triton", str(tiny_bundle), "-o", str(tmp_path / "a")]) == 1
    assert cli.main(["triton", str(bundle), "-o", str(tmp_path / "b"), "--name", "../x"]) == 1
    (tmp_path / "c").mkdir()
    assert cli.main(["triton", str(bundle), "-o", str(tmp_path / "c")]) == 1
    told = capsys.readouterr().err
    assert "no tokenizer" in told and "no name of a model" in told and "exists" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
