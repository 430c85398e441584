"""Control tokens in texts: what a user or a passage writes is text, also where it spells a token of the template.

A tokenizer reads ``<|im_start|>`` in a message as the token that begins a turn, and a passage could write turns of its
own. So a text that spells such a token is tokenised apart, as the letters that it is, by a copy of the tokenizer that
knows no control tokens: the flag for it is kept on the tokenizer itself, which other threads use. A text without them
takes the usual way and has the usual ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from threading import Lock
from typing import TypeAlias
from weakref import WeakKeyDictionary

from hallucination_guard.errors import InputError
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.values import Message

__all__ = ["Encoded", "Spans", "encoded", "literal_ids", "literal_spans", "spelt_control"]

Spans: TypeAlias = tuple[tuple[int, int], ...]
"""Which characters of a rendered prompt are text, whatever they spell: (start, stop)."""

Encoded: TypeAlias = tuple[tuple[int, ...], list[tuple[int, int]]]
"""Token ids, and the characters that each stands for."""

_MARK = "Zq7xK{}Kx7qZ"  # stands for a text while its place is looked for: no template changes letters and digits
_CONTROLS: WeakKeyDictionary[Tokenizer, tuple[int, tuple[str, ...]]] = WeakKeyDictionary()
_COPIES: WeakKeyDictionary[Tokenizer, tuple[int, Tokenizer]] = WeakKeyDictionary()
_COPIES_LOCK = Lock()


def spelt_control(tokenizer: Tokenizer, text: str) -> str:
    """A control token that the text spells; empty if it spells none."""
    return next((each for each in _controls(tokenizer) if each in text), "")


def _controls(tokenizer: Tokenizer) -> tuple[str, ...]:
    size = len(tokenizer)  # some tokenizers have thousands of them, and listing them takes milliseconds
    known = _CONTROLS.get(tokenizer)
    if known is None or known[0] != size:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = tuple(str(each) for each in added.values() if each.special and str(each))
        known = _CONTROLS[tokenizer] = (size, special)
    return known[1]


def literal_spans(
    tokenizer: Tokenizer, turns: Sequence[Message], render: Callable[[Sequence[Message]], str], text: str
) -> Spans:
    """Where in the rendered ``text`` those texts stand that spell control tokens.

    Raises:
        InputError: if a role spells one, or the template changes such a text, so that it cannot be told from its own.
    """
    marked: list[Message] = []
    bodies: list[str] = []
    for turn in turns:
        if control := spelt_control(tokenizer, turn.role):
            raise InputError(f"the role {turn.role!r} spells the control token {control!r}", hint="a role is a word")
        if spelt_control(tokenizer, turn.content):
            marked.append(replace(turn, content=_MARK.format(len(bodies))))
            bodies.append(turn.content)
        else:
            marked.append(turn)
    if not bodies:
        return ()
    spans: list[tuple[int, int]] = []
    rest, at = render(marked), 0
    for number, body in enumerate(bodies):
        before, mark, rest = rest.partition(_MARK.format(number))
        after = rest.partition(_MARK.format(number + 1))[0]
        begin = at + len(before)
        written = next((each for each in (body, body.strip()) if text.startswith(before + each + after, at)), None)
        if not mark or written is None:
            raise InputError(
                f"the chat template changes a text that spells the control token {spelt_control(tokenizer, body)!r}",
                hint="take the token out of the text",
            )
        at = begin + len(written)
        spans.append((begin, at))
    return tuple(spans)


def encoded(tokenizer: Tokenizer, text: str, spans: Spans) -> Encoded:
    """Ids of a rendered prompt, with the characters in ``spans`` taken as text."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    ends = [0, *(edge for span in spans for edge in span), len(text)]
    for number, (begin, end) in enumerate(pairwise(ends)):
        if begin < end:
            reader = _literal(tokenizer) if number % 2 else tokenizer
            split = {"split_special_tokens": True} if number % 2 else {}
            part = reader(text[begin:end], add_special_tokens=False, return_offsets_mapping=True, **split)
            ids += part["input_ids"]
            offsets += [(begin + start, begin + stop) for start, stop in part["offset_mapping"]]
    return tuple(ids), offsets


def literal_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of an answer's text, taken as text."""
    if not spelt_control(tokenizer, text):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(_literal(tokenizer)(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that is never asked for anything but text."""
    size = len(tokenizer)
    with _COPIES_LOCK:
        known = _COPIES.get(tokenizer)
        if known is None or known[0] != size:
            known = _COPIES[tokenizer] = (size, copy.deepcopy(tokenizer))
    return known[1]
