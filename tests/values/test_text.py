"""Where sentences are does not depend on how they are looked for, and looking takes time as long as the text."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard import Guard
from hallucination_guard.testing import ScriptedModel, ScriptedScorer
from hallucination_guard.values.text import sentence_ends, sentence_ranges, sentence_starts
from hallucination_guard_policies import AbstainBelow

# What a sentence is, in the fewest words, and far too slow for a text of a few pages.
END = re.compile(r"(?:[.!?…]++[\"'”’»)\]*]*+\s++|[。！？]++[」』”’）]*+\s*+|\n\s*+)(?=\S)")
ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|cf|etc|approx|e\.g|i\.e|[A-Z]|(?:[A-Z]\.)+[A-Z])\.$"
)
NUMBERED = re.compile(r"(?:^|\n)\s*\d{1,3}\.$")

PIECES = [
    *("The cat.", "Hello", "x", "A", "b", "É", "ß", "ﷺ", "中文。", "、", "👩‍👩‍👧", "\u0301", "- ", "```", "(", "*"),
    *("Mr.", "e.g.", "i.e.", "St", "Prof. ", "No.", "etc.", "A.", "B.C.", "A.A.A. ", "(Mr.", "a. B. c."),
    *("1.", "2. ", "12.", "1234.", "٣.", "3.14"),
    *(".", "!", "?", "...", "…", "。", "？", '"', "'", "”", "’", "」", "）", ")", "]"),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\r",
        "\x1c",
        "\x85",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\0",
    ),
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.characters()), max_size=20).map("".join)
TOKENS = st.lists(st.one_of(st.sampled_from(PIECES), st.text("aB.!\n 1(。", max_size=4)), max_size=20)


def specified_starts(text: str) -> list[int]:
    starts = [0]
    for match in END.finditer(text):
        until = text[: match.end()].rstrip()
        goes_on = ABBREVIATION.search(until) or NUMBERED.search(until) or text[match.end()].islower()
        if until and not (match.group()[0] in ".…" and "\n" not in match.group() and goes_on):
            starts.append(match.end())
    return starts


def specified_ranges(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    starts = specified_starts("".join(texts))
    begins, at, sentence = [0], 0, 0
    for index, text in enumerate(texts):
        if visible := text.lstrip():
            now = sum(start <= at + len(text) - len(visible) for start in starts) - 1
            if now > sentence and index:
                begins.append(index)
            sentence = max(sentence, now)
        at += len(text)
    return tuple(zip(begins, [*begins[1:], len(texts)], strict=True)) if texts else ()


def specified_ends(texts: Sequence[str], begin: int) -> list[int]:
    ends: list[int] = []
    while len(ranges := specified_ranges(texts[begin:])) > 1:
        begin += ranges[0][1]
        ends.append(begin)
    return ends


@given(TEXTS)
def test_sentences_begin_where_it_is_specified(text: str) -> None:
    assert sentence_starts(text) == specified_starts(text)


@given(TOKENS)
def test_tokens_are_divided_as_it_is_specified(texts: list[str]) -> None:
    assert sentence_ranges(texts) == specified_ranges(texts)


@given(TOKENS, st.integers(0, 5))
def test_the_ends_behind_a_token_are_those_specified(texts: list[str], begin: int) -> None:
    assert sentence_ends(texts, begin) == specified_ends(texts, begin)


SLOW: dict[str, Callable[[int], str]] = {
    "sentences": lambda size: "The cat sat. " * (size // 13),
    "line breaks": lambda size: "\n" * size + "The cat sat. " * (size // 20),
    "line breaks behind": lambda size: "One." + " \n" * size,
    "full stops": lambda size: "." * size + "x",
    "wide full stops": lambda size: "。" * size,
    "initials": lambda size: "A." * size + " B. C" * 10,
    "abbreviations": lambda size: "Mr. X " * (size // 6),
    "items": lambda size: "\n1. A" * (size // 5),
    "brackets": lambda size: "(" * size + ". X",
    "quotes": lambda size: "." + "'" * size + "x",
    "goes on": lambda size: "x. y " * (size // 5),
}


@pytest.mark.parametrize("find", [sentence_starts, sentence_ranges, sentence_ends], ids=lambda each: each.__name__)
@pytest.mark.parametrize("kind", SLOW)
def test_a_hundred_thousand_characters_are_looked_through_at_once(kind: str, find: Any, pace: float) -> None:
    text = SLOW[kind](100_000)
    began = time.process_time()
    find(text)  # a token a character
    assert time.process_time() - began < 1.0 * pace


@pytest.mark.parametrize("text", ["\n" * 1_000 + "cat. " * 20, "x" * 1_100], ids=["line breaks", "one word"])
def test_a_stream_that_goes_round_in_circles_is_gated_at_the_speed_of_its_tokens(text: str, pace: float) -> None:
    guard = Guard(ScriptedModel(text), scorer=ScriptedScorer(0.1), policy=AbstainBelow(score="hybridgrad", limit=0.5))
    began = time.process_time()
    *_, outcome = guard.stream("Who?")
    assert time.process_time() - began < 1.5 * pace
    assert outcome.text == text
