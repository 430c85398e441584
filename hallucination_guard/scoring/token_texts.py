"""What each token of an answer adds to its text.

A token may hold part of a character, so what it adds is found by decoding every prefix of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hallucination_guard.model.tokenizer import Tokenizer

__all__ = ["token_texts"]


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


def _shared(prefix: str, whole: str) -> int:
    """How many characters both begin with."""
    if whole.startswith(prefix):
        return len(prefix)
    both = enumerate(zip(prefix, whole, strict=False))
    return next((at for at, (one, other) in both if one != other), min(len(prefix), len(whole)))
