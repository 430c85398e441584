"""Texts: what of them is visible, and where their sentences are.

A token may hold the end of one sentence and the beginning of the next. It belongs to the sentence of its first visible
character: every token to exactly one, in order.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from html import unescape
from itertools import accumulate

__all__ = ["can_be_seen", "has_visible", "sentence_ends", "sentence_ranges", "sentence_starts", "whole_characters"]

_VISIBLE = "LNS"  # letters, numbers, symbols: what could be right or wrong; not marks, punctuation or what has no width
# Letters and symbols of Unicode that are drawn as nothing: fillers of Hangul, blank Braille, a note without a head; and
# what stands for an object that is not there.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\U0001d159\ufffc")
_HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|<[^<>]*+>", re.DOTALL)  # what a renderer of Markdown or HTML shows nothing of
# What may end a sentence, and the white space behind it. Possessive, and what ends none is consumed as well: a model
# that goes round in circles writes a thousand line breaks or full stops, and a look from each of them would cube them.
_END = re.compile(r"([.!?…]++[\"'”’»)\]*]*+|[。！？]++[」』”’）]*+|(?=\n))(\s*+)")
_WIDE = frozenset("。！？")  # they end a sentence without white space
_ABBREVIATION = re.compile(r"(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|cf|etc|approx|e\.g|i\.e)\.|(?:[A-Z]\.)++")
_NUMBERED = re.compile(r"\d{1,3}\.")  # the number of an item in a list
_SPACE = re.compile(r"\s*+")


def has_visible(text: str) -> bool:
    """Whether there is anything in it that could be right or wrong: letters, numbers or symbols."""
    return any(unicodedata.category(each)[0] in _VISIBLE for each in text)


def can_be_seen(text: str) -> bool:
    """Whether a reader sees anything of it, also where it is rendered: a comment or a tag alone is not seen."""
    return any(
        unicodedata.category(each)[0] in "LNPS" and each not in _BLANK for each in unescape(_HIDDEN.sub("", text))
    )


def sentence_starts(text: str) -> list[int]:
    """Where sentences begin; the first one at 0.

    A sentence ends with its full stop (and closing quotes) before white space, or with its line. Not so after an
    abbreviation, an initial or the number of a list's item, nor where the text goes on in lower case.
    """
    return [0, *_further_starts(text, 0, len(text.rstrip()))]


def _further_starts(text: str, begin: int, stop: int) -> Iterator[int]:
    """Where the sentences behind the first one of ``text[begin:]`` begin, each as soon as it is found.

    Every character is looked at a few times at most, whatever the text is.

    Args:
        text: the text.
        begin: where a sentence begins; nothing before it counts.
        stop: behind the last of the text that is not white space.
    """
    line = word = _SPACE.match(text, begin).end()  # type: ignore[union-attr]  # it matches anywhere
    for match in _END.finditer(text, line, stop):
        (core, space), until, end = match.groups(), match.end(1), match.end()
        if end < stop and (space or core[0] in _WIDE):
            goes_on = (
                core.startswith((".", "…"))
                and "\n" not in space
                and (
                    text[end].islower()
                    or _NUMBERED.fullmatch(text, line, until)
                    or _ABBREVIATION.fullmatch(_last_word(text[word:until]))
                )
            )
            if not goes_on:
                yield end
        if space:
            word = end
        if "\n" in space:
            line = end


def _last_word(text: str) -> str:
    """What stands behind the last white space or opening bracket of a text that ends with neither."""
    return text.rsplit(maxsplit=1)[-1].rpartition("(")[2]


def sentence_ranges(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The sentences of an answer as ranges of its tokens, which they divide among them.

    Args:
        texts: of the tokens, what each adds to the answer's text.
    """
    starts = [*sentence_starts("".join(texts)), math.inf]
    begins = [0]
    sentence = 0
    for index, first in _firsts(texts):
        if first >= starts[sentence + 1] and index:
            begins.append(index)
        while first >= starts[sentence + 1]:
            sentence += 1
    return tuple(zip(begins, [*begins[1:], len(texts)], strict=True)) if texts else ()


def sentence_ends(texts: Sequence[str], begin: int = 0) -> list[int]:
    """How many tokens there are up to the end of each sentence behind the first ``begin``, the last one left out.

    Each sentence is looked for in what follows the one before, so an end that is found stays where it is when the
    answer goes on.

    Args:
        texts: what each token adds to the answer's text.
        begin: where a sentence begins.
    """
    texts = texts[begin:]
    whole = "".join(texts)
    stop, places, firsts = len(whole.rstrip()), [0, *accumulate(map(len, texts))], _firsts(texts)
    ends: list[int] = []
    at = 0
    while (start := next(_further_starts(whole, at, stop), None)) is not None:
        index = next((index for index, first in firsts if first >= start), None)
        if index is None:
            break
        ends.append(begin + index)
        at = places[index]
    return ends


def _firsts(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Of each token with anything but white space its number, and where its first such character is in the text."""
    at = 0
    for index, text in enumerate(texts):
        if visible := text.lstrip():
            yield index, at + len(text) - len(visible)
        at += len(text)


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
