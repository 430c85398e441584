"""Reading: an answer that something else wrote, and one pass over prompt and answer without a graph."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Unpack, cast

import torch
from transformers import DynamicCache

from hallucination_guard.errors import InputError
from hallucination_guard.model.anchor import NO_ANCHOR
from hallucination_guard.model.calling import format_of, prose_of, written_calls, written_text
from hallucination_guard.model.heard import Reading
from hallucination_guard.model.inside import Inside
from hallucination_guard.model.keeping import KeptTrace, Tap, most_kept
from hallucination_guard.model.literal import literal_ids
from hallucination_guard.model.products import Products, RowOf
from hallucination_guard.model.replay import Trace
from hallucination_guard.model.thinking import thinking_tokens
from hallucination_guard.model.view import undisturbed
from hallucination_guard.values import Generation, GenerationSettings, Messages, Offered, checked_text
from hallucination_guard.values.protocols import Compute

__all__ = ["kept_trace", "place", "read", "reading_of", "trace_ids"]


def read(
    inside: Inside,
    messages: Messages,
    answer: str | Sequence[int],
    *,
    question: str | None,
    **offered: Unpack[Offered],
) -> Generation:
    """Take an answer that something else wrote; see :meth:`WhiteBoxModel.read`."""
    prompt = inside.prompt(messages, **offered)
    ids, text = _answer(inside, answer, calls=bool(prompt.tools))
    thinking = thinking_tokens(inside.tokenizer, prompt.text, ids)
    spoken = len(written_text(inside.tokenizer, ids[:thinking], calls=bool(prompt.tools))) if thinking else 0
    length = len(prompt.token_ids) + len(ids)
    if inside.context is not None and length > inside.context:
        raise InputError(
            f"prompt and answer have {length} tokens and the context of {inside.name!r} holds {inside.context}",
            hint="shorten them: nothing is cut silently",
        )
    return Generation(
        messages=prompt.messages,
        prompt_token_ids=prompt.token_ids,
        response_token_ids=ids,
        text=text,
        finish_reason="read",
        settings=GenerationSettings.of({"question": question, **offered}),
        model=inside.identity,
        anchor=inside.anchor(prompt, question),
        written_calls=written_calls(
            format_of(inside.tokenizer), text, prompt.tools, prompt_token_ids=prompt.token_ids, begin=spoken
        ),
        thinking=thinking,
        spoken=spoken,
        _trace=KeptTrace(None),
    )


def reading_of(
    inside: Inside,
    messages: Messages,
    *,
    question: str | None,
    compute: Compute,
    **offered: Unpack[Offered],
) -> Reading:
    """How an answer is read while it is written; see :meth:`WhiteBoxModel.follow`."""
    prompt, tokenizer = inside.prompt(messages, **offered), inside.tokenizer
    settings = GenerationSettings.of({"question": question, **offered})
    calls = bool(prompt.tools)

    def ids_of(text: str) -> tuple[int, ...]:
        inside.check_length(len(text), "the answer")
        return literal_ids(tokenizer, checked_text(text, "the answer"))

    return Reading(
        ids=ids_of,
        text=lambda ids: written_text(tokenizer, ids, calls=calls),
        check=lambda ids: inside.check_ids(ids, "the answer"),
        read=lambda ids: read(inside, messages, ids, question=question, **offered),
        unread=lambda text, ending: Generation.unread(
            prompt, text, settings=settings, model=inside.identity, finish_reason=ending
        ),
        prose=lambda text: prose_of(format_of(tokenizer), text) if calls else len(text),
        end_ids=inside.end_ids,
        most=None if inside.context is None else inside.context - len(prompt.token_ids),
        compute=compute,
    )


def _answer(inside: Inside, answer: str | Sequence[int], *, calls: bool) -> tuple[tuple[int, ...], str]:
    """Its token ids, and what they say."""
    tokenizer = inside.tokenizer
    if isinstance(answer, str):
        inside.check_length(len(answer), "the answer")
        ids = literal_ids(tokenizer, checked_text(answer, "the answer"))
        if _letters(tokenizer.decode(ids)) != _letters(answer):
            # What the tokenizer has no tokens for was not scored, so it is not part of the answer either.
            return ids, str(tokenizer.decode(ids, skip_special_tokens=True))
        return ids, answer
    if isinstance(answer, Sequence) and not isinstance(answer, bytes | bytearray):
        given = tuple(cast("Sequence[int]", answer))
        if given:
            inside.check_ids(given, "the answer")
        return given, written_text(tokenizer, given, calls=calls)
    raise InputError(f"the answer is {answer!r}", hint="give its text or its token ids")


def place(generation: Generation) -> tuple[tuple[int, ...], int]:
    """The ids of prompt and answer, and the position of t* in them.

    Raises:
        AnchorError: if the generation has no anchor.
    """
    if generation.anchor is None:
        raise NO_ANCHOR
    ids = (*generation.prompt_token_ids, *generation.response_token_ids)
    return ids, len(generation.prompt_token_ids) + generation.anchor.index


def kept_trace(generation: Generation, layers: range) -> Trace | None:
    """What was kept of generating, if it is still there and of these layers; it is handed over and forgotten.

    Raises:
        AnchorError: if the generation has no anchor.
    """
    ids, anchor = place(generation)
    kept = generation._trace.take() if isinstance(generation._trace, KeptTrace) else None
    # A generation that was edited since does not match what was kept of the original.
    fits = kept is not None and (kept.first, kept.anchor, kept.ids) == (layers.start, anchor, ids[:-1])
    return kept if fits else None


def trace_ids(inside: Inside, ids: Sequence[int], anchor: int, layers: range, *, products: bool = False) -> Trace:
    """What the deep half needs to run again, by one pass without a graph.

    Args:
        inside: the model.
        ids: of prompt and answer.
        anchor: the position of t*.
        layers: the deep half.
        products: whether to keep them; not for a replay with other states.
    """
    start = anchor if inside.sliceable else 0
    prefixes, seen, begun = inside.prefixes if start else None, None, 0
    cache = DynamicCache() if start else None
    if prefixes is not None:
        seen = inside.seen
        cache, begun = prefixes.cache(ids, start, of=seen)
    tap, kept = Tap(start - begun), Products(start - begun, most=most_kept(1)) if products else None
    view = inside.view_at(layers.start, tap, kept)
    with undisturbed(inside.model, grad=False):
        tokens = torch.tensor([list(ids)], device=inside.device)
        mask = torch.ones_like(tokens)
        inside.layout.decoder_of(view)(
            input_ids=tokens[:, begun:], attention_mask=mask, past_key_values=cache, use_cache=cache is not None
        )
    if prefixes is not None and cache is not None and inside.seen == seen:  # else it was changed while it was read
        prefixes.keep(ids, cache, of=seen)
    deep = () if cache is None else cache.layers[layers.start :]
    tapped = tap.row(0)
    return Trace(
        ids=tuple(ids[:-1]),
        anchor=anchor,
        start=start,
        first=layers.start,
        prefix=tuple((each.keys[:, :, :start], each.values[:, :, :start]) for each in deep),
        states=tapped[:-1],
        after=tapped[-1:],
        products=dict if kept is None else RowOf(kept, 0, 0, len(tapped)),
        origin="reread" if inside.sliceable else "whole",
    )


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())
