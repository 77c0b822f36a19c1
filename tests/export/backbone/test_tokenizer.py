"""A bundle's text is the checkpoint's own: its file byte for byte, or a conversion that does the same, or a refusal by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig

from medusa_deploy.export.backbone import sentencepiece_check, tokenizer_files
from medusa_deploy.export.backbone.tokenizer import write_text_files
from medusa_deploy.runtime.errors import CheckpointError, MissingDependencyError
from medusa_deploy.runtime.files.manifest import TextFacts
from medusa_deploy.runtime.text.template import ChatTemplate
from medusa_deploy.runtime.text.tokenizer import TextCodec

CONFIG = LlamaConfig(eos_token_id=2)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
HELLO = [{"role": "user", "content": "Hi"}]


def byte_level(folder: Path, settings: dict[str, Any]) -> Path:
    """Write a tokenizer that splits digits, as SmolLM2's does, with its settings. Return the folder."""
    vocab = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "12"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocab)}, [("Ċ", "Ċ"), ("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def written(folder: Path) -> tuple[TextFacts, list[str], Path]:
    """Write the text files of ``folder`` beside it. Return facts, warnings and where they are."""
    output = folder.parent / "out"
    output.mkdir()
    return *write_text_files(folder, CONFIG, output), output


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "LlamaTokenizerFast", "Unheard0f"])
def test_the_checkpoints_file_is_taken_byte_for_byte_whatever_class_is_named(tmp_path: Path, name: str) -> None:
    source = byte_level(tmp_path / "model", {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"})
    facts, warnings, output = written(source)
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes() and not warnings
    codec = TextCodec(output / "tokenizer.json")
    assert len(codec.encode("12")) == 2 and len(codec.encode("a\n\n1")) == 3
    assert facts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"} and facts.eos_token_ids == (2,)


def test_code_beside_a_tokenizer_json_is_not_asked_about(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "model", {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
    _, _, output = written(source)
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_tokens_that_only_the_settings_have_are_added_and_named(tmp_path: Path) -> None:
    added = {"263": {"content": "<tool>", "special": True}, "264": {"content": "<more>", "special": False}}
    source = byte_level(tmp_path / "model", {"added_tokens_decoder": added})
    _, warnings, output = written(source)
    codec = TextCodec(output / "tokenizer.json")
    assert codec.encode("<tool><more>12")[:2] == [263, 264] and len(codec.encode("12")) == 2
    assert len(warnings) == 1 and "2 tokens" in warnings[0] and "<tool>" in warnings[0]


def test_added_tokens_get_the_next_free_ids_as_transformers_gives_them(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "model", {"added_tokens_decoder": {"300": {"content": "<b>"}, "299": {"content": "<a>"}}})
    assert TextCodec(written(source)[2] / "tokenizer.json").encode("<a><b>") == [263, 264]


def test_a_template_reads_all_special_tokens(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% if pad_token is defined %}{{ pad_token }}{% endif %}{{ unk_token }}{{ image_token }}"
        "{% if sep_token is defined %}sep{% endif %}"
        "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {**names, "extra_special_tokens": {"image_token": "<image>"}, "chat_template": template}
    facts, _, output = written(byte_level(tmp_path / "model", settings))
    assert facts.special_tokens == {**names, "image_token": "<image>"}
    source = (output / "chat_template.jinja").read_text("utf-8")
    assert ChatTemplate(source, facts.special_tokens).render(HELLO) == "<s><pad><unk><image>Hi</s>"


def test_of_several_templates_the_default_is_taken_and_the_others_are_named(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    _, warnings, output = written(byte_level(tmp_path / "model", {"chat_template": templates}))
    assert (output / "chat_template.jinja").read_text() == "A"
    assert len(warnings) == 1 and "tool_use" in warnings[0]


def test_a_template_that_renders_otherwise_is_left_out_and_named(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "model", {"chat_template": "{% macro m(a) %}{{ varargs }}{% endmacro %}{{ m(1, 2) }}"})
    facts, warnings, output = written(source)
    assert facts.chat_template is None and not (output / "chat_template.jinja").exists()
    assert len(warnings) == 1 and "a chat of user" in warnings[0]


def test_a_folder_without_a_tokenizer_says_that_the_bundle_takes_ids(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    facts, warnings, _ = written(tmp_path / "model")
    assert facts == TextFacts(eos_token_ids=(2,)) and "token ids only" in warnings[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": '{"tokenizer_class": "ByT5Tokenizer"}'}, "ByT5Tokenizer"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "no vocabulary"),
        ({"x.tiktoken": "IQ== 0", "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["t.Q", null]}}'}, "Python code"),
        ({"tokenizer.json": "{"}, "not a tokenizer"),
        ({"tokenizer_config.json": "["}, "not JSON"),
        ({"tokenizer_config.json": "[]"}, "not an object"),
        ({"tokenizer.model": "\n\x7f broken"}, "not a SentencePiece model"),
    ],
    ids=str,
)
def test_what_has_no_tokenizer_json_is_refused_by_name(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "model").mkdir()
    for name, text in files.items():
        (tmp_path / "model" / name).write_text(text, "utf-8")
    with pytest.raises(CheckpointError, match=message) as caught:
        written(tmp_path / "model")
    assert caught.value.hint


# -- tekken and tiktoken --------------------------------------------------------------------------------------------------

TOKENS = [*(bytes([byte]) for byte in range(256)), b"ab", b" ab", b"12", b"abC", b"Cd", b"\n\n"]
TEKKEN = (  # Mistral's rule
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tekken(folder: Path, settings: dict[str, Any] | None = None, *, padding: int = 3) -> Path:
    """A tekken.json with 3 special tokens in 5 places; ``padding``: tokens that its config doesn't count."""
    tokens = [*TOKENS, *(bytes([byte, byte]) for byte in range(padding))]
    size = {"default_vocab_size": len(TOKENS) + 5, "default_num_special_tokens": 5, "num_vocab_tokens": len(tokens)}
    special = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(["<unk>", "<s>", "</s>"])]
    encoded = [base64.b64encode(token).decode() for token in tokens]
    listed = [{"rank": rank, "token_bytes": token, "token_str": None} for rank, token in enumerate(encoded)]
    config = {"pattern": TEKKEN, "version": "v3", **size}
    folder.mkdir()
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": listed, "special_tokens": special}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_tekken_reads_text_as_mistral_common_does(tmp_path: Path, name: str | None) -> None:
    """The ids are those that mistral-common 1.13 gives, the begin-of-sequence token in front among them."""
    facts, warnings, output = written(tekken(tmp_path / "model", None if name is None else {"tokenizer_class": name}))
    assert not warnings and facts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    codec = TextCodec(output / "tokenizer.json")
    for text, ids in {
        "ab": [1, 261],
        " ab ab": [1, 262, 262],
        "abCd": [1, 261, 265],
        "12\n\n": [1, 54, 55, 266],
        "é\x00\x00": [1, 200, 174, 5, 5],
        "a</s>": [1, 102, 2],
    }.items():
        assert codec.encode(text) == ids, text
    assert codec.decode(codec.encode("abCd é 12\n\n")) == "abCd é 12\n\n"


def tiktoken(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    folder.mkdir()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(TOKENS)]
    (folder / name).write_text("\n".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_tiktoken_s_format_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match="tiktoken") as caught:
        written(tiktoken(tmp_path / "model", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer"}))
    assert "pip install tiktoken" in caught.value.hint


def test_llama_3_s_format_reads_text_as_tiktoken_does(tmp_path: Path) -> None:
    package = pytest.importorskip("tiktoken")
    _, _, output = written(tiktoken(tmp_path / "model", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer"}))
    rule = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ranks = {token: rank for rank, token in enumerate(TOKENS)}
    own = package.Encoding("own", pat_str=rule, mergeable_ranks=ranks, special_tokens={})
    codec = TextCodec(output / "tokenizer.json")
    for text in ("ab abCd 12345\n\nx", "It's  a\r\n\t b", "Grüße 日本 ١٢٣ ½ 👋🏽", "", "def f(x):\n    return {'a': 1}\n"):
        assert codec.encode(text) == own.encode(text), text


@pytest.mark.parametrize(
    ("name", "tokenizer_class", "message"),
    [
        ("qwen.tiktoken", "LlamaTokenizer", r"lacks \d+ of 262 tokens of its file"),
        ("tokenizer.model", "Qwen2Tokenizer", "nothing says how its tokenizer splits text"),
    ],
)
def test_a_vocabulary_that_transformers_doesn_t_read_is_refused(
    tmp_path: Path, name: str, tokenizer_class: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "tokenizer.model":
        pytest.importorskip("tiktoken")
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(CheckpointError, match=message) as caught:
        written(tiktoken(tmp_path / "model", name, {"tokenizer_class": tokenizer_class}))
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "AA== x", "not base64! 1", "AA=="])
def test_a_damaged_file_of_tiktoken_is_a_named_error(tmp_path: Path, text: str) -> None:
    folder = tiktoken(tmp_path / "model", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer"})
    (folder / "tokenizer.model").write_text(text)
    with pytest.raises(CheckpointError):
        written(folder)


# -- SentencePiece models alone ----------------------------------------------------------------------------------------

PIECES = ["▁", "a", "b", "▁a", "aa", "▁▁", "ab", "▁ab", "aab"]


def sentencepiece(folder: Path, kind: int = 2, **changes: Any) -> Path:
    """Write a SentencePiece model (``kind`` 1: unigram, 2: BPE) and settings. ``changes``: of its normalizer or its settings."""
    from transformers.utils import sentencepiece_model_pb2_new as proto

    model = proto.ModelProto()
    bytes_ = [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    own = [(piece, changes.pop("piece_type", 1) if piece == "aab" else 1) for piece in PIECES]
    for index, (piece, each) in enumerate([("<unk>", 2), ("<s>", 3), ("</s>", 3), *bytes_, *own]):
        model.pieces.add(piece=piece, score=0 if each != 1 else -(index - 258), type=each)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = kind, True
    model.normalizer_spec.remove_extra_whitespaces = False
    for name in [name for name in changes if hasattr(model.normalizer_spec, name)]:
        setattr(model.normalizer_spec, name, changes.pop(name))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **changes}), "utf-8")
    return folder


def pieces(folder: Path, text: str) -> list[str]:
    """Return the tokens of a text, the first bytes of ``<0x..>`` as they are."""
    codec = TextCodec(folder / "tokenizer.json")
    names = dict(enumerate(["<unk>", "<s>", "</s>"])) | {259 + i: p for i, p in enumerate(PIECES)}
    return [names.get(token, f"<0x{token - 3:02X}>") for token in codec.encode(text)]


def test_a_model_alone_reads_text_as_sentencepiece_does(tmp_path: Path) -> None:
    """The pieces are those that sentencepiece 0.2 gives; ``<s>`` is transformers'."""
    facts, warnings, output = written(sentencepiece(tmp_path / "model"))
    assert not warnings and facts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert pieces(output, "ab") == ["<s>", "▁ab"]
    assert pieces(output, " ab") == ["<s>", "▁", "▁ab"]
    assert pieces(output, "aaab é") == ["<s>", "▁a", "aab", "▁", "<0xC3>", "<0xA9>"]
    assert pieces(output, "</s>a") == ["<s>", "</s>", "▁a"]
    codec = TextCodec(output / "tokenizer.json")
    assert codec.decode(codec.encode("  ab é\n")) == "  ab é\n"


def test_without_legacy_only_the_first_word_gets_a_space(tmp_path: Path) -> None:
    _, _, output = written(sentencepiece(tmp_path / "model", legacy=False, add_bos_token=False, add_eos_token=True))
    assert pieces(output, "ab</s>a") == ["▁ab", "</s>", "a", "</s>"]
    assert pieces(output, " ab") == ["▁", "▁ab", "</s>"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": 3}, "model type is 3"),
        ({"escape_whitespaces": False}, "leaves spaces"),
        ({"piece_type": 5}, "unused pieces"),
        ({"piece_type": 4}, "user-defined"),
        ({"remove_extra_whitespaces": True, "legacy": False}, "drops spaces"),
    ],
    ids=str,
)
def test_a_model_that_no_tokenizer_json_expresses_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        written(sentencepiece(tmp_path / "model", **changes))


@pytest.mark.parametrize("changes", [{"precompiled_charsmap": b"table"}, {"tokenizer_class": "T5Tokenizer"}], ids=str)
def test_a_conversion_that_must_be_compared_names_the_package(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentencepiece_check.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match="sentencepiece") as caught:
        written(sentencepiece(tmp_path / "model", **changes))
    assert "pip install sentencepiece" in caught.value.hint


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_trained_model_reads_every_text_as_sentencepiece_does(tmp_path: Path, kind: str, legacy: bool) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    text, folder = tmp_path / "text.txt", tmp_path / "model"
    text.write_text(Path(sentencepiece_check.__file__).read_text("utf-8") + Path(__file__).read_text("utf-8"), "utf-8")
    folder.mkdir()
    trainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=900, model_type=kind, byte_fallback=True,
        minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}), "utf-8")
    written(folder)  # compares hundreds of texts


def test_a_conversion_that_reads_a_text_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece_check.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(sentencepiece_check, "disagreement", lambda _model, _tokenizer: "'a' has the ids [1] and [2]")
    with pytest.raises(CheckpointError, match=r"converted exactly.*\[1\] and \[2\]"):
        written(sentencepiece(tmp_path / "model"))
