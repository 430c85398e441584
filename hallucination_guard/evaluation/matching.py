"""Whether a text contains a reference answer, word by word: the judge that needs nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

__all__ = ["contains_match", "normal_form"]


def contains_match(answer: str, references: Sequence[str]) -> bool:
    """Right if the answer contains a reference, word by word, after lower-casing and dropping punctuation."""
    words = f" {normal_form(answer)} "
    return any(f" {normal} " in words for normal in map(normal_form, references) if normal)


def normal_form(text: str) -> str:
    """Lower case, without accents and punctuation, single blanks between the words."""
    plain = "".join(
        character
        for character in unicodedata.normalize("NFKD", text.casefold())
        if not unicodedata.combining(character)
    )
    return " ".join(re.findall(r"\w+", plain))
