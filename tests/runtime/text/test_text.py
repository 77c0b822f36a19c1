"""Text becomes ids and text again: special tokens stay in place, streams emit whole characters, errors name broken files."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from medusa_deploy.runtime.errors import BundleError, MissingDependencyError, PromptError
from medusa_deploy.runtime.text.tokenizer import TextCodec

pytest.importorskip("tokenizers")
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SAMPLE = "Grüße aus Köln 👋🏽! 日本語のテキスト, naïve café — 3 × 4 = 12. The quick brown fox\n\tjumps over   the lazy dog."
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """A byte-level BPE like GPT-2's, with a begin-of-sequence token and leftover settings of its training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    return saved(tokenizer, tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """A BPE with byte fallback and leading spaces, laid out as in Llama 2's tokenizer.json."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz,.",
        "▁a",
        "▁b",
        "he",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [("▁", "a"), ("▁", "b"), ("h", "e")],
            unk_token="<unk>",  # noqa: S106
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return saved(tokenizer, tmp_path_factory.mktemp("sentencepiece"))


def saved(tokenizer: Tokenizer, folder: Path) -> TextCodec:
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(folder / "tokenizer.json")


def streamed(codec: TextCodec, ids: list[int], borders: list[int]) -> str:
    decoder, out = codec.decoder(), ""
    edges = [0, *sorted(border % (len(ids) + 1) for border in borders), len(ids)]
    for start, end in itertools.pairwise(edges):
        out += decoder.push(ids[start:end])
        assert codec.decode(ids).startswith(out), "a piece was taken back"
    return out + decoder.flush() + decoder.flush()


def test_literals_of_special_tokens_become_their_ids(byte_level: TextCodec) -> None:
    ids = byte_level.encode("<|im_start|>user\nHi<|im_end|>\n", add_special_tokens=False)
    assert ids[0] == 0 and ids.count(1) == 1 and ids.count(2) == 0


def test_a_plain_prompt_gets_the_tokenizers_own_special_tokens_once(byte_level: TextCodec) -> None:
    plain = byte_level.encode("Hi there")
    assert plain[0] == 2 and byte_level.encode("Hi there", add_special_tokens=False) == plain[1:]
    assert byte_level.encode("<s>Hi there", add_special_tokens=False) == plain


def test_settings_of_the_training_neither_cut_nor_pad_a_prompt(byte_level: TextCodec) -> None:
    assert byte_level.decode(byte_level.encode(SAMPLE)) == SAMPLE
    assert len(byte_level.encode("Hi", add_special_tokens=False)) <= 2


def test_special_tokens_are_no_text(byte_level: TextCodec) -> None:
    ids = byte_level.encode("<|im_start|>Hi<|im_end|>")
    assert byte_level.decode(ids) == "Hi"
    assert streamed(byte_level, ids, [1, 2]) == "Hi"


@given(st.text(max_size=40), st.lists(st.integers(0, 200), max_size=60))
def test_a_byte_level_stream_adds_up_to_the_whole(byte_level: TextCodec, text: str, borders: list[int]) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    assert streamed(byte_level, ids, borders) == byte_level.decode(ids) == byte_level.decode(byte_level.encode(text))
    assert streamed(byte_level, ids, list(range(len(ids)))) == text or any(special in text for special in SPECIAL)


@given(st.lists(st.integers(0, 319), max_size=60), st.lists(st.integers(0, 200), max_size=60))
def test_any_ids_stream_to_what_they_decode_to(byte_level: TextCodec, ids: list[int], borders: list[int]) -> None:
    assert streamed(byte_level, ids, borders) == byte_level.decode(ids)


@given(st.text("ab he,é€👋", max_size=30), st.lists(st.integers(0, 200), max_size=60))
def test_a_stream_keeps_leading_spaces_and_characters_made_of_bytes(
    sentencepiece: TextCodec, text: str, borders: list[int]
) -> None:
    ids = sentencepiece.encode(text)
    assert streamed(sentencepiece, ids, borders) == text
    assert streamed(sentencepiece, ids, list(range(len(ids)))) == text


@given(st.lists(st.integers(0, 289), max_size=40), st.lists(st.integers(0, 200), max_size=60))
def test_any_ids_of_a_byte_fallback_tokenizer_stream_to_what_they_decode_to(
    sentencepiece: TextCodec, ids: list[int], borders: list[int]
) -> None:
    assert streamed(sentencepiece, ids, borders) == sentencepiece.decode(ids)
    assert streamed(sentencepiece, ids, list(range(len(ids)))) == sentencepiece.decode(ids)


def test_a_run_of_bytes_is_text_at_its_end_and_special_tokens_do_not_end_it(sentencepiece: TextCodec) -> None:
    first, second = 3 + 0xC3, 3 + 0xA9  # é
    decoder = sentencepiece.decoder()
    assert [decoder.push([token]) for token in (first, second, 2, first)] == [""] * 4
    (letter,) = sentencepiece.encode("a")
    assert decoder.push([letter]) == sentencepiece.decode([first, second, first, letter])


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_bytes_that_are_no_characters_cost_the_same_each(kind: str, request: pytest.FixtureRequest) -> None:
    codec: TextCodec = request.getfixturevalue(kind)
    byte = codec.encode("🦊", add_special_tokens=False)[-1]
    decoded: list[int] = []
    decode = codec.decode
    codec.decode = lambda ids: (decoded.append(len(ids)), decode(ids))[1]  # type: ignore[method-assign]
    try:
        decoder = codec.decoder()
        text = "".join(decoder.push([byte]) for _ in range(1000)) + decoder.flush()
    finally:
        del codec.decode
    assert text == "\ufffd" * 1000
    assert sum(decoded) < 40_000, "each id is decoded a bounded number of times"


def test_a_character_waits_for_its_last_byte(byte_level: TextCodec) -> None:
    decoder = byte_level.decoder()
    out = [decoder.push([token]) for token in byte_level.encode("a🦊b", add_special_tokens=False)]
    assert [piece for piece in out if piece] == ["a", "🦊", "b"] and len(out) > 3
    assert decoder.flush() == ""


def test_bytes_that_never_become_a_character_come_out_at_the_end(byte_level: TextCodec) -> None:
    ids = byte_level.encode("a🦊", add_special_tokens=False)[:-1]
    decoder = byte_level.decoder()
    assert decoder.push(ids) == "a"
    assert decoder.flush() == "\ufffd" and decoder.flush() == ""


def test_ids_without_a_token_are_no_text(byte_level: TextCodec) -> None:
    assert byte_level.decode([100_000]) == "" and byte_level.decoder().push([100_000]) == ""


@pytest.mark.parametrize("text", ["half a pair \ud83d", b"bytes", None, 5], ids=repr)
def test_a_prompt_that_is_no_text_is_refused(byte_level: TextCodec, text: str) -> None:
    with pytest.raises(PromptError):
        byte_level.encode(text)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"version": "1.0", "model": {"type": "Nothing"}})], ids=repr)
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        TextCodec(path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        TextCodec(tmp_path / "tokenizer.json")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError) as caught:
        TextCodec(tmp_path / "tokenizer.json")
    assert "medusa-deploy[cpu]" in caught.value.hint


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_bytes_of_tokens_are_those_of_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    codec: TextCodec = request.getfixturevalue(kind)
    ids = codec.encode(SAMPLE, add_special_tokens=False)
    spelt = b"".join(codec.token_bytes(token) for token in ids).decode()
    assert (spelt.removeprefix(" ") if kind == "sentencepiece" else spelt) == codec.decode(ids)
    assert any(len(codec.token_bytes(token)) > 1 for token in ids) and codec.token_bytes(1 << 20) == b""
    literals = {token: literal.encode() for token, literal in codec.special_tokens.items()}
    assert {token: codec.token_bytes(token) for token in literals} == literals
