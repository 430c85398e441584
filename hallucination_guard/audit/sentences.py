"""The sentences of a record, as a verdict carries them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from hallucination_guard.values import JSON, Backoff, Sentence

__all__ = ["Held", "of_sentences"]


class Held(TypedDict):
    """Which thresholds hold for the sentences of an answer, by the fields of a verdict."""

    backoffs: tuple[Backoff, ...]
    sentences_uncovered: str


def of_sentences(plain: Mapping[str, JSON] | None) -> tuple[tuple[Sentence, ...], Held]:
    """The sentences, without their text, and what holds for them.

    Raises:
        ValueError: on a value that cannot be; also ``TypeError`` and ``KeyError`` on another shape.
    """
    if plain is None:
        return (), Held(backoffs=(), sentences_uncovered="")
    kept: Mapping[str, Any] = plain
    sentences = tuple(Sentence(**each) for each in kept["scored"])
    return sentences, Held(
        backoffs=tuple(Backoff(**each) for each in kept["backoffs"]), sentences_uncovered=kept["uncovered"]
    )
