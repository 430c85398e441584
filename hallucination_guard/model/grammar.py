"""Drawing under a grammar: what it does not allow next is masked before a token is drawn.

The mask is llguidance's (extra ``grammar``). The logits that are kept for scoring are those before it; the scores of
arguments leave what it does not allow out (docs/methods.md has the measurement).
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hallucination_guard.errors import InputError, MissingExtra, ModelError
from hallucination_guard.model.calling import call_grammar, json_grammar
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.values import GenerationSettings

__all__ = ["Constrained", "grammar_for"]

_TOKENIZERS: WeakKeyDictionary[Tokenizer, tuple[tuple[object, ...], Any]] = WeakKeyDictionary()
_LOCK = Lock()


def grammar_for(tokenizer: Tokenizer, settings: GenerationSettings) -> str | None:
    """The grammar that these settings ask for; None where the answer is free."""
    if settings.response_schema is not None:
        return json_grammar(settings.response_schema)
    choice = settings.tool_choice or "auto"
    if not settings.tools or choice == "none" or (choice == "auto" and not settings.strict_tools):
        return None
    return call_grammar(tokenizer, settings.tools, choice)


class Constrained(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Masks the words that a grammar does not allow next, for each row of a batch on its own.

    Args:
        tokenizer: of the model; a fast one.
        grammar: in llguidance's Lark.
        begun: for each row of the batch, the ids with which its answer begins already.
        vocabulary: V.
        end_ids: tokens that end an answer.

    Raises:
        MissingExtra: without llguidance.
        InputError: if the schema cannot be made a grammar, or the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammar: str,
        *,
        begun: Sequence[Sequence[int]],
        vocabulary: int,
        end_ids: frozenset[int],
    ) -> None:
        self._ends = sorted(end_ids)
        inner = _tokenizer(tokenizer, vocabulary, self._ends)
        from llguidance import LLMatcher

        if why := LLMatcher.validate_grammar(grammar, inner):
            raise InputError(
                f"no grammar can be made of the schema: {str(why).splitlines()[0][:200]}",
                hint="leave out what JSON Schema has beyond types, enums, bounds and patterns",
            )
        self._matchers: list[Any] = [LLMatcher(inner, grammar) for _ in begun]
        for matcher, ids in zip(self._matchers, begun, strict=True):
            if ids and not matcher.consume_tokens(list(ids)):
                raise InputError(f"the answer's beginning is not in the grammar: {matcher.get_error()[:200]}")
        self._begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` (B × V), −∞ where a word is not allowed. The argument stays as it is."""
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        for row, matcher in enumerate(self._matchers):
            last = int(input_ids[row, -1])
            if self._begun and not matcher.is_stopped() and not matcher.consume_token(last):
                raise ModelError(
                    f"the grammar was left at token {last}", hint="its own words could quote what was drawn; ask again"
                )
            if matcher.is_stopped():
                allowed[row, self._ends] = True
            else:
                bias = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
                allowed[row, : len(bias)] = bias != 0
        self._begun = True
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))


def _tokenizer(tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]) -> Any:
    """Llguidance's own copy: reading a vocabulary takes about a second, so it is kept."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise MissingExtra(
            "decoding under a grammar needs llguidance", hint="pip install 'hallucination-guard-semgrad[grammar]'"
        ) from None
    key = (len(tokenizer), vocabulary, *ends)
    with _LOCK:
        known = _TOKENIZERS.get(tokenizer)
        if known is None or known[0] != key:
            try:
                made = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))
            except ValueError as error:
                raise InputError(f"no grammar for this tokenizer: {error}", hint="load its fast version") from None
            known = _TOKENIZERS[tokenizer] = (key, made)
    return known[1]
