"""A mark is put where it is read, and nothing but marks is added to the text."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hallucination_guard.scoring.sentences import locate
from hallucination_guard.values import Edit, Sentence, edited
from hallucination_guard.values.text import has_visible

MARK = " [unverified]"
LINES = st.sampled_from(
    [
        *("```", "~~~", "````", "```text moons", "~~~~ One. Two", "```x``` is code.", "moons ```", "- ```js", "1. ~~~"),
        *("> ```", "   ```", "    ```", "12345. ```", "It has moons.", "x = 1", "", "- a", "> a", "\t"),
    ]
)
TEXTS = st.lists(LINES, min_size=1, max_size=8).map("\n".join).filter(has_visible)


def sentences_of(text: str) -> tuple[Sentence, ...]:
    tokens, characters = locate(text, 0, text)  # a token a character
    return tuple(
        Sentence(start=start, stop=stop, begin=begin, end=end, scores={"mean_nll": 1.0})
        for (start, stop), (begin, end) in zip(tokens, characters, strict=True)
    )


def marked(text: str, *doubtful: int) -> str:
    own = sentences_of(text)
    return edited(text, own, Edit(manner="mark", doubtful=doubtful, sentences=len(own), marker=MARK))


def shown(text: str) -> str:
    return re.sub(r"<[^>]*>", "", MarkdownIt("commonmark").render(text))


@pytest.mark.parametrize(
    ("text", "doubtful", "left"),
    [
        ("It has moons. Nine.", 0, "It has moons. [unverified] Nine."),
        ("See:\n```text moons\nNine.\n```\nBye.", 1, "See:\n\n[unverified]\n\n```text moons\nNine.\n```\nBye."),
        ("See:\n```text moons\nNine.\n```\nBye.", 2, "See:\n```text moons\nNine. [unverified]\n```\nBye."),
        ("See:\n```text moons\nNine.\n```\nBye.", 3, "See:\n```text moons\nNine.\n```\n\n[unverified]\n\nBye."),
        ("~~~\nNine.\n~~~  \n", 0, "[unverified]\n\n~~~\nNine.\n~~~  \n"),
        ("~~~\nNine.\n~~~  \n", 2, "~~~\nNine.\n~~~  \n\n[unverified]\n"),
        ("```\r\nNine.\r\n```", 2, "```\r\nNine.\r\n```\n\n[unverified]"),
        ("- ```js\n  a\n  ```", 0, "[unverified]\n\n- ```js\n  a\n  ```"),
        ("- ```js\n  a\n  ```", 2, "- ```js\n  a\n  ```\n\n  [unverified]"),
        ("> ```\n> a\n> ```", 2, "> ```\n> a\n> ```\n\n> [unverified]"),
        ("````\n```\n````", 1, "````\n```\n\n[unverified]\n\n````"),
        ("```x``` is code.", 0, "```x``` is code. [unverified]"),
    ],
)
def test_a_mark_leaves_the_line_of_a_fence_as_it_is(text: str, doubtful: int, left: str) -> None:
    assert marked(text, doubtful) == left


def test_every_sentence_on_the_line_of_a_fence_has_its_mark() -> None:
    assert marked("~~~ One. Two\nx\n~~~", 0, 1).split("~~~")[0].split() == ["[unverified]", "[unverified]"]


@given(TEXTS, st.data())
def test_every_mark_is_shown_and_nothing_else_is_added(text: str, data: st.DataObject) -> None:
    own = sentences_of(text)
    doubtful = sorted(data.draw(st.sets(st.integers(0, len(own) - 1))))
    found = marked(text, *doubtful)
    assert shown(found).count("[unverified]") == len(doubtful)
    rest = iter(found)
    assert all(each in rest for each in text)  # in order
    assert re.sub(r"[\s>]", "", found.replace("[unverified]", "")) == re.sub(r"[\s>]", "", text)


def test_a_text_of_many_sentences_and_fences_is_marked_at_once(pace: float) -> None:
    text = "See:\n```\nNine.\n```\n" * 5_000
    began = time.process_time()
    found = marked(text, *range(len(sentences_of(text))))
    assert time.process_time() - began < 1.5 * pace
    assert found.count("[unverified]") == 20_000
