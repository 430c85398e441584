"""Which tokens of an answer are which sentence.

A token may hold part of a character, or the end of one sentence and the beginning of the next. So what a token adds to
the text is found by decoding every prefix of the answer, and a token belongs to the sentence of its first visible
character: every token to exactly one, in order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from hallucination_guard.model.tokenizer import Tokenizer

__all__ = ["sentence_ranges", "sentence_starts", "token_texts"]

# Possessive: a model that goes round in circles writes a thousand line breaks, and backtracking would cube them.
_END = re.compile(r"(?:[.!?…]++[\"'”’»)\]*]*+\s++|[。！？]++[」』”’）]*+\s*+|\n\s*+)(?=\S)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|cf|etc|approx|e\.g|i\.e|[A-Z]|(?:[A-Z]\.)+[A-Z])\.$"
)
_NUMBERED = re.compile(r"(?:^|\n)\s*\d{1,3}\.$")  # the number of an item in a list


def token_texts(tokenizer: Tokenizer, ids: Sequence[int], *, special: bool = False) -> tuple[str, ...]:
    """What each token adds to the decoded text; nothing where it holds a character's beginning only.

    Args:
        tokenizer: of the model.
        ids: of the answer.
        special: whether special tokens are part of the text.
    """
    whole = tokenizer.decode(ids, skip_special_tokens=not special)
    ends = [0]
    for stop in range(1, len(ids)):
        prefix = tokenizer.decode(ids[:stop], skip_special_tokens=not special)
        # Half a character decodes to a mark of its own, which is no part of the whole.
        ends.append(max(ends[-1], _shared(prefix, whole)))
    ends.append(len(whole))
    return tuple(whole[start:stop] for start, stop in pairwise(ends))[: len(ids)]


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


def _shared(prefix: str, whole: str) -> int:
    """How many characters both begin with."""
    if whole.startswith(prefix):
        return len(prefix)
    both = enumerate(zip(prefix, whole, strict=False))
    return next((at for at, (one, other) in both if one != other), min(len(prefix), len(whole)))


def sentence_ranges(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """The sentences of an answer as ranges of its tokens, which they divide among them.

    Args:
        texts: of the tokens, see :func:`token_texts`.
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
