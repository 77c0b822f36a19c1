"""Tokens become text: special tokens are no text, but stop strings find them."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_deploy.runtime.text.output import TextOutput
from medusa_deploy.runtime.text.stops import StopChecker
from medusa_deploy.runtime.text.tokenizer import TextCodec
from support.text import encode, write_text_files

pytest.importorskip("tokenizers")
PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tmp_path_factory.mktemp("text")
    write_text_files(folder)
    return TextCodec(folder / "tokenizer.json")


def read(
    codec: TextCodec, tokens: list[int], stop: str, *, include: bool = False, eos: tuple[int, ...] = (), step: int = 1
) -> str:
    """Return the text of ``tokens``, ``step`` at a time, with | at the end if the stop string was found."""
    output = TextOutput(codec, StopChecker([stop] if stop else [], include_stop=include), frozenset(eos))
    text = "".join(output.push(tokens[start : start + step]) for start in range(0, len(tokens), step)) + output.flush()
    return text + "|" * output.stopped


@pytest.mark.parametrize("step", [1, 2, 9])
def test_a_stop_string_that_is_a_special_token_stops(codec: TextCodec, step: int) -> None:
    tokens = [*encode("Hi"), PAD, *encode("there"), BOS, *encode("no")]
    assert read(codec, tokens, "<s>", step=step) == "Hithere|"
    assert read(codec, tokens, "<s>", include=True, step=step) == "Hithere<s>|"
    assert read(codec, tokens, "e<s>n", step=step) == "Hither|"
    assert read(codec, tokens, "<s>x", step=step) == "Hithereno", "a mark is no text where no stop string ends"
    assert read(codec, tokens, "", step=step) == "Hithereno"


def test_special_tokens_that_no_stop_string_holds_do_not_part_one(codec: TextCodec) -> None:
    assert read(codec, [*encode("a"), PAD, *encode("b")], "ab") == "|"


def test_the_end_of_the_answer_is_found_as_a_stop_string_too(codec: TextCodec) -> None:
    assert read(codec, [*encode("Hi"), EOS], "</s>", eos=(EOS,)) == "Hi|"
    assert read(codec, [*encode("Hi"), EOS], "</s>", eos=(EOS,), include=True) == "Hi</s>|"


def test_without_a_tokenizer_there_is_no_text() -> None:
    output = TextOutput(None, StopChecker([]), frozenset())
    assert output.push([5]) + output.flush() == "" and not output.stopped


def test_bytes_before_a_stop_token_come_out_before_it(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path / "tokenizer.json")
    assert read(codec, [*"é".encode(), 256, 65], "<end>") == "é|"
