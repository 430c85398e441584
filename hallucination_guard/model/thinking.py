"""Thinking: the part of an answer in which a reasoning model talks to itself, by its family's marks.

Sources: the chat templates of Qwen 3, DeepSeek R1, SmolLM 3 and GLM (``<think>``), Magistral (``[THINK]``), Seed
(``<seed:think>``) and gpt-oss (its channel ``analysis``). Some templates open the mark in the prompt. It stands at the
beginning of an answer; what is not closed has not ended. What is left out of a score for it is left out of what is let
through as well: any model can be made to write such marks.
"""

from __future__ import annotations

from collections.abc import Sequence

from hallucination_guard.model.tokenizer import Tokenizer

__all__ = ["thinking_tokens"]

_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


def thinking_tokens(tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> int:
    """How many tokens at the beginning of an answer are thinking, its marks included; 0 where there is none.

    Args:
        tokenizer: of the model.
        prompt: as the template wrote it, which may open the mark.
        ids: of the answer; of one that is still thinking all of them are.
    """
    whole = str(tokenizer.decode(ids))
    for begin, end in _MARKS:
        if whole.lstrip().startswith(begin) or prompt.rstrip().endswith(begin):
            at = whole.find(end)
            return len(ids) if at < 0 else _reaching(tokenizer, ids, at + len(end))
    return 0


def _reaching(tokenizer: Tokenizer, ids: Sequence[int], characters: int) -> int:
    """How many tokens it takes to write so many characters."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(ids[:middle])) >= characters:
            high = middle
        else:
            low = middle + 1
    return low
