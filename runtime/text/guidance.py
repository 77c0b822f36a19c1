"""Compiles grammars with llguidance, which is imported with the first one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GrammarError, MissingDependencyError
from ..grammar import AS_DUMPED, Grammar

if TYPE_CHECKING:
    from .encoder import PromptEncoder
    from .tokenizer import TextCodec

_LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # about 14 ms
    "step_max_items": 50_000,  # about 3 ms
    "max_lexer_states": 20_000,  # 1 to 2 kB each
    "max_grammar_size": 200_000,
}
_KEPT = 16
_SHOWN = 400


class GrammarCompiler:
    """Makes matchers for a bundle's tokenizer. It keeps the newest grammars compiled, and several threads may ask it."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._unspaced: dict[int, int] | None = None
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def unspaced(self) -> dict[int, int]:
        """Words with a space before them, and the same words without it: a string in JSON begins with the latter."""
        if self._unspaced is None:
            self._unspaced = {} if self._encoder.codec is None else self._encoder.codec.unspaced()
        return self._unspaced

    def matcher(self, grammar: Grammar, eos_token_ids: frozenset[int]) -> GuidanceMatcher:
        """Return a matcher at the beginning of ``grammar``. ``eos_token_ids``: tokens that end the answer.

        Raises:
            MissingDependencyError: llguidance isn't installed.
            GrammarError: the grammar is malformed, asks for what isn't supported, or exceeds a limit; or there is no tokenizer.
        """
        with self._lock:
            if (start := self._compiled.pop(grammar, None)) is None:
                start = self._compile(grammar)
            self._compiled[grammar] = start
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return GuidanceMatcher(start.deep_copy(), self._tokenizer.eos_token, eos_token_ids, self._encoder.vocab_size)

    def _compile(self, grammar: Grammar) -> Any:
        if self._encoder.codec is None:
            raise GrammarError("a grammar needs a tokenizer, and the bundle has none", hint="drop the grammar")
        try:
            import llguidance
        except ImportError:
            raise MissingDependencyError(
                "grammars need the package llguidance", hint="pip install 'medusa-deploy[guided]', or drop the grammar"
            ) from None
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(llguidance, self._encoder)
        make: Any = llguidance.LLMatcher
        limit: Any = llguidance.LLParserLimits
        try:
            if grammar.kind == "json_schema":
                source = make.grammar_from_json_schema(_object(grammar.source), overrides=AS_DUMPED)
            else:
                source = (make.grammar_from_regex if grammar.kind == "regex" else make.grammar_from_lark)(grammar.source)
            found = make(self._tokenizer, source, limits=limit(verbose_errors=False, **_LIMITS), log_level=0)
            found.compute_bitmask()  # some limits are exceeded by the first mask only
            reason = found.get_error()
        except ValueError as error:
            reason = str(error)
        if reason:
            raise GrammarError(
                f"{_NAMES[grammar.kind]} can't be used: {reason.strip()[:_SHOWN]}",
                hint="correct it, or leave out what isn't supported",
            )
        return found


def _object(schema: str) -> str:
    """Return the schema as an object: options can be applied to no other form."""
    return "{}" if schema.strip() == "true" else schema


_NAMES = {"json_schema": "the JSON schema", "regex": "the regular expression", "lark": "the grammar"}


def _tokenizer(llguidance: Any, encoder: PromptEncoder) -> Any:
    """Describe the vocabulary to llguidance: by the tokenizer's own file where it reads it, else by the bytes of each token."""
    codec, vocab_size, eos = encoder.codec, encoder.vocab_size, encoder.text.eos_token_ids
    if eos:
        try:
            return llguidance.LLTokenizer(codec.json(), n_vocab=vocab_size, eos_token=eos[0])
        except ValueError:  # a decoder that it doesn't know
            pass
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Spelt(codec, vocab_size)), n_vocab=vocab_size + 1)


class _Spelt:
    """The vocabulary as bytes. The end is a token of its own, behind all others."""

    def __init__(self, codec: TextCodec, vocab_size: int) -> None:
        self._codec = codec
        self.eos_token_id, self.bos_token_id = vocab_size, None
        self.tokens = [*[codec.token_bytes(token) for token in range(vocab_size)], b"<end of text>"]
        self.special_token_ids = [*codec.special_tokens, vocab_size]

    def __call__(self, text: str) -> list[int]:
        return self._codec.encode(text, add_special_tokens=False)


class GuidanceMatcher:
    """One answer's place in a grammar; see :class:`..grammar.Matcher`.

    llguidance's matcher never leaves an error state, also where only a candidate led to it: then it is replaced by a copy of
    its beginning that takes the emitted tokens again.
    """

    def __init__(self, start: Any, inner_eos: int, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        """``start``: an LLMatcher at its beginning. ``inner_eos``: the token that it takes for the end."""
        self._start, self._inner = start, start.deep_copy()
        self._vocab_size, self._eos = vocab_size, eos_token_ids
        self._ends = [token for token in eos_token_ids if token < vocab_size]
        self._never = sorted({inner_eos, *self._ends})
        self._emitted: list[int] = []
        self._ahead: list[int] = []
        self._masks: dict[tuple[int, ...], np.ndarray] = {}

    def allowed(self, ahead: Sequence[int] = ()) -> np.ndarray:
        """See :class:`..grammar.Matcher`."""
        return np.unpackbits(self._packed(ahead), count=self._vocab_size, bitorder="little").view(bool)

    def admits(self, ahead: Sequence[int], token: int) -> bool:
        """See :class:`..grammar.Matcher`."""
        try:
            return not self.finished(ahead) and bool(self._packed(ahead)[token >> 3] >> (token & 7) & 1)
        except GrammarError:
            return False

    def only(self, ahead: Sequence[int] = ()) -> int | None:
        """See :class:`..grammar.Matcher`."""
        try:
            return None if self.finished(ahead) else _only(self._packed(ahead))
        except GrammarError:
            return None

    def finished(self, ahead: Sequence[int] = ()) -> bool:
        """See :class:`..grammar.Matcher`."""
        if ahead and ahead[-1] in self._eos:
            return True
        return self._go(ahead) and self._inner.is_stopped() and self._inner.is_accepting()

    def advance(self, tokens: Sequence[int]) -> None:
        """See :class:`..grammar.Matcher`."""
        kept = [token for token in tokens if token not in self._eos]
        went = self._go(kept)
        assert went or self._inner.is_error(), "a token was emitted that the grammar refuses"
        self._ahead = []
        self._emitted += kept
        self._masks.clear()

    # -- llguidance's matcher --------------------------------------------------------------------------------------

    def _go(self, ahead: Sequence[int]) -> bool:
        """Let the inner matcher stand behind ``ahead``; False where the grammar refuses it."""
        common = 0
        for here, wanted in zip(self._ahead, ahead, strict=False):
            if here != wanted:
                break
            common += 1
        if self._inner.is_error() or (common < len(self._ahead) and not self._inner.rollback(len(self._ahead) - common)):
            self._revive()
            common = 0
        del self._ahead[common:]
        rest = list(ahead[common:])
        if rest and any(token in self._never for token in rest):
            return False
        taken = self._inner.try_consume_tokens(rest) if rest else 0
        self._ahead += rest[:taken]
        return taken == len(rest)

    def _revive(self) -> None:
        self._inner, self._ahead = self._start.deep_copy(), []
        self._inner.consume_tokens(self._emitted)

    def _packed(self, ahead: Sequence[int]) -> np.ndarray:
        """Return the mask behind ``ahead`` as bits: drafting asks for a few tokens of many masks."""
        key = tuple(ahead)
        found = self._masks.get(key)
        if found is None:
            if not self._go(key):
                raise GrammarError("the answer left its grammar", hint="report this with the grammar")
            found = self._mask()
            if not found.any():
                raise GrammarError("the grammar allows no further token", hint="allow the text to end where it can't go on")
            self._masks[key] = found
        return found

    def _mask(self) -> np.ndarray:
        mask = np.zeros(-(-(self._vocab_size + 1) // 32) * 4, np.uint8)
        bits = self._inner.compute_bitmask()
        mask[: len(bits)] = np.frombuffer(bits, np.uint8)[: len(mask)]
        for token in self._never:
            mask[token >> 3] &= 255 ^ (1 << (token & 7))
        # Where no token spells a character, llguidance may answer for the place behind it, with one token or with several.
        first, accepting = _first(mask), self._inner.is_accepting()
        if (first is not None and not self._takes(first)) or not (accepting or mask.any()):
            mask = self._by_each_token(len(mask))
        if accepting:
            for token in self._ends:
                mask[token >> 3] |= 1 << (token & 7)
        return mask

    def _by_each_token(self, size: int) -> np.ndarray:
        """Ask for each token alone.

        llguidance spells forced bytes with the tokenizer, also the first half of a character. A vocabulary without bytes has no
        token for it, but may have the whole character.
        """
        error, ahead = self._inner.get_error(), list(self._ahead)
        if error:
            if not error.startswith("NoExtension"):
                raise GrammarError(f"the grammar exceeds a limit: {error.strip()[:_SHOWN]}", hint="simplify it")
            self._revive()
            self._go(ahead)
        taken = [token not in self._never and self._takes(token) for token in range(self._vocab_size)]
        mask = np.zeros(size, np.uint8)
        packed = np.packbits(np.array(taken, bool), bitorder="little")
        mask[: len(packed)] = packed
        return mask

    def _takes(self, token: int) -> bool:
        return bool(self._inner.validate_tokens([token]))


def _only(mask: np.ndarray) -> int | None:
    """Return the only token of a packed mask; None where there are none or several."""
    words = mask.view(np.uint32)
    place = int(words.argmax())
    word = int(words[place])
    alone = word and not word & (word - 1) and np.count_nonzero(words) == 1
    return 32 * place + word.bit_length() - 1 if alone else None


def _first(mask: np.ndarray) -> int | None:
    """Return the smallest token of a packed mask; None where there are none."""
    words = mask.view(np.uint32)
    place = int((words != 0).argmax())
    word = int(words[place])
    return 32 * place + (word & -word).bit_length() - 1 if word else None
