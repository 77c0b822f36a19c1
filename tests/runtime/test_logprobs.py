"""Log-probabilities of emitted tokens, and stop strings inside an accepted run: both as plain decoding has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime import ROOT_ONLY, Generation, Request, SamplingParams
from medusa_deploy.runtime.errors import UsageError
from medusa_deploy.runtime.session import Session
from support.fake_executor import FakeSession, fake_session
from support.text import decode

FULL = {"rows": 12}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> FakeSession:
    return fake_session(2, text_folder=tmp_path_factory.mktemp("text"))


def test_log_probabilities_are_those_of_the_models_logits() -> None:
    session = fake_session()
    found = session.generate(token_ids=[3], max_new_tokens=40, logprobs=3, **FULL)
    assert found.token_ids == session.language.greedy([3], 40) and found.stats.mean_acceptance_length > 1.2
    assert found.logprobs is not None and [each.token_id for each in found.logprobs] == found.token_ids
    for place, each in enumerate(found.logprobs):
        logits = session.language.table[session.language.state([3, *found.token_ids[:place]])].astype(np.float64)
        wanted = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-wanted)[:3]
        assert each.logprob == pytest.approx(wanted[each.token_id], abs=1e-5)
        assert [token for token, _ in each.top] == order.tolist()
        assert [value for _, value in each.top] == pytest.approx(wanted[order].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(mode="sample", temperature=0.7, seed=5), SamplingParams(mode="typical", temperature=0.7)],
)
def test_a_chunk_has_one_entry_a_token(params: SamplingParams) -> None:
    session = fake_session()
    request = Request(token_ids=[3], max_new_tokens=30, logprobs=0, params=params, rows=12)
    chunks = list(session.submit(request).chunks())
    for chunk in chunks[:-1]:
        assert chunk.logprobs is not None and [each.token_id for each in chunk.logprobs] == chunk.token_ids
        assert all(each.top == () and each.logprob <= 0 for each in chunk.logprobs)
    assert max(len(chunk.token_ids) for chunk in chunks) > 1
    assert session.generate(token_ids=[3], max_new_tokens=2).logprobs is None


@pytest.mark.parametrize("wrong", [-1, 21, 1.5, True, "3"])
def test_a_number_of_log_probabilities_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="logprobs"):
        Request(token_ids=[1], logprobs=wrong)


def test_a_real_graph_gives_the_log_probabilities_of_plain_decoding(tiny_session: Session) -> None:
    def ask(**options: Any) -> Generation:
        return tiny_session.generate(token_ids=[5, 9, 7], max_new_tokens=24, logprobs=2, ignore_eos=True, **options)

    plain, drafted = ask(tree=ROOT_ONLY), ask(rows=8)
    assert plain.logprobs is not None and drafted.logprobs is not None and plain.token_ids == drafted.token_ids
    for one, other in zip(plain.logprobs, drafted.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4) and [t for t, _ in one.top] == [t for t, _ in other.top]


@given(start=st.integers(3, 127), length=st.integers(1, 3), place=st.integers(0, 30), include=st.booleans())
def test_a_stop_string_ends_text_ids_log_probabilities_and_counts_at_the_same_token(
    talking: FakeSession, start: int, length: int, place: int, include: bool
) -> None:
    stop = decode(talking.language.greedy([start], 40))[place : place + length] or "a"
    options: dict[str, Any] = {
        "token_ids": [start],
        "max_new_tokens": 40,
        "stop": (stop,),
        "include_stop": include,
        "logprobs": 1,
    }
    plain, drafted = talking.generate(**options, tree=ROOT_ONLY), talking.generate(**options, **FULL)
    assert (plain.text, plain.token_ids, plain.finish_reason) == (drafted.text, drafted.token_ids, drafted.finish_reason)
    assert plain.logprobs == drafted.logprobs and len(drafted.logprobs or []) == len(drafted.token_ids)
    assert drafted.stats.emitted + 1 == len(drafted.token_ids)  # the prefill emits one
    chunks = list(talking.submit(Request(**options, **FULL)).chunks())
    assert [token for chunk in chunks for token in chunk.token_ids] == plain.token_ids
    assert "".join(chunk.text for chunk in chunks) == plain.text
