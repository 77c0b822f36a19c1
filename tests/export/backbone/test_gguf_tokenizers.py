"""Tokenizers of GGUF files: rules of splitting by name, SentencePiece by scores, special tokens whole, all ends of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from medusa_deploy.export.backbone.gguf_file.metadata import GgufFile
from medusa_deploy.export.backbone.gguf_file.pre_tokenizers import RULES
from medusa_deploy.export.backbone.gguf_file.tokenizer import gguf_tokenizer
from medusa_deploy.export.backbone.gguf_file.tokens import stop_tokens
from medusa_deploy.export.backbone.tokenizer import write_text_files
from medusa_deploy.runtime.errors import CheckpointError
from support.gguf_files import bytes_vocabulary, write_file

pytest.importorskip("gguf")
NORMAL, UNKNOWN, CONTROL, OWN, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TENSORS = {"token_embd.weight": np.ones((4, 4), np.float32)}
MERGES = ("1 2", "12 3", "123 4", "Ċ Ċ", "a b", "ab C", "abC d", "' S", "' s", "Ġ a")


def byte_level(path: Path, pre: str | None, special: dict[str, int] | None = None, **fields: Any) -> GgufFile:
    """A file with a byte-level vocabulary; ``fields`` of ``tokenizer.ggml``."""

    def vocabulary(writer: Any) -> None:
        bytes_vocabulary(writer, pre, special or {"<s>": CONTROL, "</s>": CONTROL}, MERGES)
        add_fields(writer, fields)

    return GgufFile(write_file(path / "a.gguf", "llama", {}, TENSORS, vocabulary))


def add_fields(writer: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)


def built(file: GgufFile) -> Any:
    text = gguf_tokenizer(file)
    assert text is not None
    return Tokenizer.from_str(text)


def pieces(tokenizer: Any, text: str, *, special: bool = False) -> list[str]:
    tokens: list[str] = tokenizer.encode(text, add_special_tokens=special).tokens
    return tokens


# -- splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("smollm", "a\n\n1", ["a", "ĊĊ", "1"]),
        ("starcoder", "123", ["1", "2", "3"]),
        ("command-r", "123", ["1", "2", "3"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("gpt-4o", "1234", ["123", "4"]),
        ("tekken", "12", ["1", "2"]),
        ("gpt-2", "1234", ["1234"]),
        ("default", "1234", ["123", "4"]),
        ("falcon", "1234", ["123", "4"]),
        ("gpt-2", "a\n\n1", ["a", "Ċ", "Ċ", "1"]),
        ("qwen2", "a\n\n1", ["a", "ĊĊ", "1"]),
        ("gpt-2", "x'S", ["x", "'", "S"]),
        ("qwen2", "x'S", ["x", "'S"]),
        ("llama-bpe", "x'S", ["x", "'S"]),
        ("gpt-2", "x's", ["x", "'s"]),
        ("gpt-4o", "abCd", ["ab", "C", "d"]),
        ("llama-bpe", "abCd", ["abCd"]),
    ],
)
def test_text_is_split_by_the_rule_of_the_file(rule: str, text: str, expected: list[str], tmp_path: Path) -> None:
    tokenizer = built(byte_level(tmp_path, rule))
    assert pieces(tokenizer, text) == expected
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_keeps_every_byte(rule: str, tmp_path: Path) -> None:
    tokenizer = built(byte_level(tmp_path, rule))
    for text in ("It's  12 o'clock,\r\n\tÄrger… 数字12345 ١٢٣ a_b++ =>\n\n ", "", " ", "\n\n\n1", "🦙é́"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize("rule", [None, "viking", "deepseek-llm"])
def test_an_unknown_rule_is_refused_by_name(rule: str | None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"rule {rule!r}") as caught:
        gguf_tokenizer(byte_level(tmp_path, rule))
    assert caught.value.hint


def test_a_piece_that_is_a_token_stays_one_where_the_rule_says_so(tmp_path: Path) -> None:
    for rule, expected in (("llama-bpe", ["abx"]), ("qwen2", ["ab", "x"])):
        tokenizer = built(byte_level(tmp_path, rule, {"abx": NORMAL}))
        assert pieces(tokenizer, "abx") == expected


# -- special tokens --------------------------------------------------------------------------------------------------


def test_control_tokens_and_own_tokens_stay_whole(tmp_path: Path) -> None:
    special = {"<s>": CONTROL, "<|im_start|>": CONTROL, "<think>": OWN, "<｜User｜>": CONTROL, "plain": NORMAL}
    tokenizer = built(byte_level(tmp_path, "qwen2", special))
    assert pieces(tokenizer, "<|im_start|>a<think>b<｜User｜>") == ["<|im_start|>", "a", "<think>", "b", "<｜User｜>"]
    assert "plain" not in pieces(tokenizer, "plain")
    ids = tokenizer.encode("<|im_start|><think>", add_special_tokens=False).ids
    assert ids == [1, 2]
    assert tokenizer.decode(ids) == "<think>"


def test_a_prompt_begins_and_ends_as_the_file_says(tmp_path: Path) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    for rule, fields, expected in (
        ("gpt-2", {}, ["a"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("llama-bpe", {"add_bos_token": False}, ["a"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "a", "</s>"]),
    ):
        assert pieces(built(byte_level(tmp_path, rule, **ids, **fields)), "a", special=True) == expected


def test_every_id_that_ends_a_turn_or_an_answer_is_found(tmp_path: Path) -> None:
    special = dict.fromkeys(["<s>", "</s>", "<|eot_id|>", "<|im_end|>", "<x>", "<y>", "<z>"], CONTROL)
    file = byte_level(tmp_path, "llama-bpe", special, bos_token_id=0, eos_token_id=1, eot_token_id=4, eom_token_id=5)
    assert stop_tokens(file) == (1, 2, 3, 4, 5)
    with pytest.raises(CheckpointError, match="names the token 9999"):
        stop_tokens(byte_level(tmp_path, "llama-bpe", eos_token_id=9999))


@pytest.mark.parametrize(
    ("special", "fields", "expected"),
    [
        (["<PAD>"], {}, (0, 1)),
        (["[PAD]", "<REPO>", "[e~["], {}, (0, 1, 2, 3)),
        (["<PAD>"], {"fim_pad_token_id": 0}, (0,)),
        (["<|eot|>", "< EOT >", "<|end_of_turn|>", "<|end▁of▁sentence|>"], {}, (0,)),
        (["<|end|>"], {}, (0, 1)),
        (["<|end|>", "<|return|>", "<|call|>"], {}, (0, 2, 3)),
        (["<|end|>", "<|flush|>", "<|calls|>"], {}, (0, 2, 3)),
        (["<|end|>", "<|flush|>", "<|return|>"], {}, (0, 1, 2, 3)),
        (["</s>", "<|tool_response>"], {}, (0, 2)),
        (["<fim_prefix>", "<|code_suffix|>", "<MID>", "<|channel|>"], {}, (0,)),
    ],
)
def test_texts_end_an_answer_as_in_llama_cpp(
    special: list[str], fields: dict[str, int], expected: tuple[int, ...], tmp_path: Path
) -> None:
    file = byte_level(tmp_path, "qwen2", {"<x>": CONTROL, **dict.fromkeys(special, CONTROL)}, eos_token_id=0, **fields)
    assert stop_tokens(file) == expected


@pytest.mark.parametrize(
    ("text", "others", "whole"),
    [
        ("<fim_prefix>", [], True), ("▁<SUF>", [], True), ("<｜fim▁end｜>", [], True), ("[PAD]", [], True),
        ("<|channel|>", [], True), ("<|end|>", ["<|call|>", "<|return|>"], True), ("</s>", [], True),
        ("</s>", ["<|tool_response>"], False), ("<|eot|>", [], False),
    ],
)  # fmt: skip
def test_tokens_are_whole_by_their_text_whatever_their_type(text: str, others: list[str], whole: bool, tmp_path: Path) -> None:
    special = {"<x>": CONTROL, text: NORMAL, **dict.fromkeys(others, CONTROL)}
    file = byte_level(tmp_path, "qwen2", special, eos_token_id=0)
    assert (1 in built(file).encode(f"a{text}b", add_special_tokens=False).ids) == whole


def test_special_ids_that_no_token_has_are_refused(tmp_path: Path) -> None:
    for name in ("bos", "eos", "eot"):
        file = byte_level(tmp_path, "llama-bpe", **{f"{name}_token_id": 9999})
        with pytest.raises(CheckpointError, match=rf"tokens and names the token 9999 \({name}\)"):
            stop_tokens(file) if name == "eot" else gguf_tokenizer(file)


def test_empty_tokens_get_names_of_their_own(tmp_path: Path) -> None:
    def vocabulary(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "", ""])

    file = GgufFile(write_file(tmp_path / "a.gguf", "llama", {}, TENSORS, vocabulary))
    assert built(file).get_vocab() == {"a": 0, "[EMPTY_1]": 1, "[EMPTY_2]": 2}


def test_the_bundle_s_text_is_the_file_s_alone(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 77}')
    (tmp_path / "tokenizer.json").write_text("{")

    def vocabulary(writer: Any) -> None:
        bytes_vocabulary(writer, "qwen2", {"<s>": CONTROL, "<|im_end|>": CONTROL})
        add_fields(writer, {"bos_token_id": 0, "eos_token_id": 1})
        writer.add_chat_template("{{ messages[0].content }}")

    write_file(tmp_path / "a.gguf", "llama", {}, TENSORS, vocabulary)
    (tmp_path / "output").mkdir()
    facts, warnings = write_text_files(tmp_path, SimpleNamespace(), tmp_path / "output")
    assert (facts.eos_token_ids, facts.special_tokens) == ((1,), {"bos_token": "<s>", "eos_token": "<|im_end|>"})
    assert warnings == []
    assert (tmp_path / "output" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert json.loads((tmp_path / "output" / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_a_file_without_a_vocabulary_takes_token_ids_alone(tmp_path: Path) -> None:
    assert gguf_tokenizer(GgufFile(write_file(tmp_path / "a.gguf", "llama", {}, TENSORS))) is None


# -- SentencePiece ---------------------------------------------------------------------------------------------------

BYTES = {f"<0x{byte:02X}>": (BYTE, 0.0) for byte in range(256)}
PIECES = {
    "<unk>": (UNKNOWN, 0.0), "<s>": (CONTROL, 0.0), "</s>": (CONTROL, 0.0), **BYTES, "▁": (NORMAL, -9.0), "a": (NORMAL, -10.0),
    "b": (NORMAL, -11.0), "c": (NORMAL, -12.0), "bc": (NORMAL, -1.0), "ab": (NORMAL, -2.0), "▁a": (NORMAL, -3.0),
    "abc": (NORMAL, -4.0), "<end>": (OWN, 0.0),
}  # fmt: skip


def sentencepiece(
    path: Path,
    kind: str = "llama",
    *,
    name: str = "",
    named: bool = True,
    kinds: dict[str, int] | None = None,
    **fields: Any,
) -> GgufFile:
    """A file with PIECES. ``named``: it names the begin- and end-of-sequence tokens. ``kinds``: other types of tokens."""

    def vocabulary(writer: Any) -> None:
        writer.add_name(name)
        writer.add_tokenizer_model(kind)
        writer.add_token_list(list(PIECES))
        writer.add_token_types([(kinds or {}).get(piece, own) for piece, (own, _) in PIECES.items()])
        writer.add_token_scores([score for _, score in PIECES.values()])
        add_fields(writer, ({"bos_token_id": 1, "eos_token_id": 2} if named else {}) | fields)

    return GgufFile(write_file(path / "a.gguf", "llama", {}, TENSORS, vocabulary))


def test_neighbours_with_the_highest_score_merge_first(tmp_path: Path) -> None:
    tokenizer = built(sentencepiece(tmp_path))
    assert pieces(tokenizer, "abc") == ["▁a", "bc"]
    assert pieces(tokenizer, "ab") == ["▁", "ab"]
    assert pieces(tokenizer, "b abc", special=True) == ["<s>", "▁", "b", "▁a", "bc"]
    assert pieces(built(sentencepiece(tmp_path, add_space_prefix=False)), "abc bca") == ["abc", "▁", "bc", "a"]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", ["abc", " a  b", "é🦙\n\ta", "a b "])
def test_sentencepiece_gives_the_text_back(text: str, prefix: bool, tmp_path: Path) -> None:
    tokenizer = built(sentencepiece(tmp_path, add_space_prefix=prefix))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_what_is_no_token_becomes_bytes_and_own_tokens_stay_whole(tmp_path: Path) -> None:
    tokenizer = built(sentencepiece(tmp_path))
    assert pieces(tokenizer, "é<end>a") == ["▁", "<0xC3>", "<0xA9>", "<end>", "▁a"]


def test_phi_3_s_special_tokens_take_the_spaces_behind_them(tmp_path: Path) -> None:
    """llama.cpp knows Phi 3 by its name."""
    for name, expected in (("Llama", ["<end>", "▁", "▁a"]), ("Phi-3 Mini", ["<end>", "▁a"]), ("phi3", ["<end>", "▁a"])):
        ids = built(sentencepiece(tmp_path, name=name)).encode("<end> a", add_special_tokens=False).ids
        assert [list(PIECES)[number] for number in ids] == expected


def test_ids_of_sentencepiece_s_own_tokens_have_defaults(tmp_path: Path) -> None:
    file = sentencepiece(tmp_path, named=False, add_eos_token=True)
    assert pieces(built(file), "a", special=True) == ["<s>", "▁a", "</s>"]
    assert stop_tokens(file) == (2,)


def test_unused_tokens_are_made_by_merging(tmp_path: Path) -> None:
    file = sentencepiece(tmp_path, kinds={"abc": UNUSED, "bc": UNUSED}, add_space_prefix=False)
    assert pieces(built(file), "abc") == ["abc"]


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2"])
def test_other_kinds_of_tokenizers_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"kind '{kind}'"):
        gguf_tokenizer(sentencepiece(tmp_path, kind))


def test_damaged_vocabularies_are_refused(tmp_path: Path) -> None:
    def broken(change: Any) -> GgufFile:
        def vocabulary(writer: Any) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            change(writer)

        return GgufFile(write_file(tmp_path / "b.gguf", "llama", {}, TENSORS, vocabulary))

    for change, message in (
        (lambda writer: writer.add_token_list(["a", "b", "a"]), "two tokens 'a': 0 and 2"),
        (lambda writer: (writer.add_token_list(["a", "b"]), writer.add_token_merges(["a b"])), "merges 'a' and 'b'"),
        (lambda writer: (writer.add_token_list(["a", "b"]), writer.add_token_merges(["ab"])), "list of pairs"),
        (lambda writer: (writer.add_token_list(["a", "b"]), writer.add_token_types([1])), "list of 2 types"),
    ):
        with pytest.raises(CheckpointError, match=message):
            gguf_tokenizer(broken(change))
