"""Texts: what of them is visible, and where their sentences are.

A token may hold the end of one sentence and the beginning of the next. It belongs to the sentence of its first visible
character: every token to exactly one, in order.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

__all__ = ["has_visible", "sentence_ends", "sentence_ranges", "sentence_starts", "whole_characters"]

_VISIBLE = "LNS"  # letters, numbers, symbols: what could be right or wrong; not marks, punctuation or what has no width
# Possessive: a model that goes round in circles writes a thousand line breaks, and backtracking would cube them.
_END = re.compile(r"(?:[.!?…]++[\"'”’»)\]*]*+\s++|[。！？]++[」』”’）]*+\s*+|\n\s*+)(?=\S)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|cf|etc|approx|e\.g|i\.e|[A-Z]|(?:[A-Z]\.)+[A-Z])\.$"
)
_NUMBERED = re.compile(r"(?:^|\n)\s*\d{1,3}\.$")  # the number of an item in a list


def has_visible(text: str) -> bool:
    """Whether there is anything in it that could be right or wrong: letters, numbers or symbols."""
    return any(unicodedata.category(each)[0] in _VISIBLE for each in text)


def sentence_starts(text: str) -> list[int]:
    """Where sentences begin; the first one at 0.

    A sentence ends with its full stop (and closing quotes) before white space, or with its line. Not so after an
    abbreviation, an initial or the number of a list's item, nor where the text goes on in lower case.
    """
    starts = [0]
    for match in _END.finditer(text):
        until = text[: match.end()].rstrip()
        goes_on = _ABBREVIATION.search(until) or _NUMBERED.search(until) or text[match.end()].islower()
        if until and not (match.group()[0] in ".…" and "\n" not in match.group() and goes_on):
            starts.append(match.end())
    return starts


def sentence_ranges(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The sentences of an answer as ranges of its tokens, which they divide among them.

    Args:
        texts: of the tokens, what each adds to the answer's text.
    """
    starts = sentence_starts("".join(texts))
    begins = [0]
    at, sentence = 0, 0
    for index, text in enumerate(texts):
        visible = text.lstrip()
        if visible:
            first = at + len(text) - len(visible)
            now = sum(start <= first for start in starts) - 1
            if now > sentence and index:
                begins.append(index)
            sentence = max(sentence, now)
        at += len(text)
    return tuple(zip(begins, [*begins[1:], len(texts)], strict=True)) if texts else ()


def sentence_ends(texts: Sequence[str], begin: int = 0) -> list[int]:
    """How many tokens there are up to the end of each sentence behind the first ``begin``, the last one left out.

    Each sentence is looked for in what follows the one before, so an end that is found stays where it is when the
    answer goes on.

    Args:
        texts: what each token adds to the answer's text.
        begin: where a sentence begins.
    """
    ends: list[int] = []
    while len(ranges := sentence_ranges(texts[begin:])) > 1:
        begin += ranges[0][1]
        ends.append(begin)
    return ends


def whole_characters(stop: int, *, least: int, texts: Sequence[str], text_of: Callable[[int], str]) -> int:
    """The last place up to ``stop`` at which tokens end with a whole character; ``least`` if there is none.

    The token behind a sentence may hold a space and the first bytes of a character.

    Args:
        stop: a number of tokens.
        least: no fewer than these.
        texts: what each token adds to the answer's text.
        text_of: what so many tokens decode to; half a character as U+FFFD.
    """
    # Where the next character is of one byte, it begins with the next token.
    while stop > least and not "".join(texts[stop:])[:1].isascii():
        text = text_of(stop)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or text == "".join(texts[:stop]):
            break
        stop -= 1
    return stop
