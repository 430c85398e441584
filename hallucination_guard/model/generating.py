"""Generating: a batch of prompts, decoded together, and what of it is kept for scoring."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hallucination_guard.model.calling import format_of, written_calls, written_text
from hallucination_guard.model.decoding import Draw, KeptLogits, StopAtText, end_of_answer
from hallucination_guard.model.grammar import Constrained, grammar_for
from hallucination_guard.model.inside import Inside
from hallucination_guard.model.keeping import KeptTrace, Tap, most_kept
from hallucination_guard.model.products import Products, RowOf
from hallucination_guard.model.replay import Trace
from hallucination_guard.model.thinking import thinking_tokens
from hallucination_guard.model.view import turn_of, undisturbed
from hallucination_guard.values import Anchor, FinishReason, Generation, GenerationSettings, ModelIdentity, Prompt

__all__ = ["Asked", "Decoding", "generate", "generation_of", "room_for"]


def generate(
    inside: Inside,
    prompts: Sequence[Prompt],
    questions: Sequence[str | None],
    *,
    settings: GenerationSettings,
) -> list[Generation]:
    """One answer a prompt, in order; see :meth:`WhiteBoxModel.generate`.

    Args:
        inside: the model.
        prompts: what it reads.
        questions: for each prompt, the part of it whose last token is t*, or None.
        settings: how they are drawn, every one of them said; the answers are shorter where the context ends earlier.
    """
    assert settings.max_new_tokens is not None
    # A prompt with little room left in the context must not cut its neighbours' answers short.
    rooms: dict[int, list[int]] = {}
    asked: dict[int, Asked] = {}
    for at, prompt in enumerate(prompts):
        asked[at] = Asked(prompt, inside.anchor(prompt, questions[at]), questions[at])
        rooms.setdefault(room_for(inside, asked[at], settings.max_new_tokens), []).append(at)
    made: dict[int, Generation] = {}
    for room, group in rooms.items():
        made |= zip(group, _together(inside, [asked[at] for at in group], room, settings), strict=True)
    return [made[at] for at in range(len(prompts))]


class Asked(NamedTuple):
    """One row of a batch.

    Args:
        prompt: what is read.
        anchor: t* of it; None where the caller did not name the question.
        question: the part of the prompt whose last token is t*, if it was named.
        begin: ids with which the answer begins: they are read, not drawn.
    """

    prompt: Prompt
    anchor: Anchor | None
    question: str | None
    begin: tuple[int, ...] = ()

    @property
    def read(self) -> tuple[int, ...]:
        """What is read before a token is drawn."""
        return (*self.prompt.token_ids, *self.begin)


def room_for(inside: Inside, asked: Asked, most: int) -> int:
    """How many tokens can be drawn after what is read: ``most``, or less where the context ends earlier."""
    return most if inside.context is None else min(most, inside.context - len(asked.read))


def _together(inside: Inside, asked: Sequence[Asked], room: int, settings: GenerationSettings) -> list[Generation]:
    """Prompts with room for the same number of tokens, decoded as one batch."""
    began = time.perf_counter()
    run = Decoding(inside, asked, settings)
    rows = run(room)
    seconds = (time.perf_counter() - began) / len(asked)
    made = []
    identity = inside.identity
    for row, each in enumerate(asked):
        length, ending = end_of_answer(inside.tokenizer, rows[row], inside.end_ids, settings.stop or ())
        answer = tuple(rows[row][:length])
        made.append(
            generation_of(
                inside,
                each,
                answer,
                ending=ending,
                settings=settings,
                most=room if ending == "length" else None,  # the context may have cut it earlier
                model=identity,
                seconds=seconds,
                trace=run.trace(row, answer),
            )
        )
    return made


def generation_of(
    inside: Inside,
    asked: Asked,
    answer: tuple[int, ...],
    *,
    ending: FinishReason,
    settings: GenerationSettings,
    most: int | None,
    model: ModelIdentity,
    seconds: float,
    trace: Trace | None,
) -> Generation:
    """An answer that was drawn, as a value.

    Args:
        inside: the model.
        asked: what it is an answer to.
        answer: its ids.
        ending: how it ended.
        settings: how it was drawn.
        most: its length at most, where that is not the settings' own.
        model: which model drew it.
        seconds: that it took.
        trace: what was kept of it.
    """
    prompt, anchor, question, _ = asked
    tools = () if settings.tool_choice == "none" else settings.tools or ()
    text = written_text(inside.tokenizer, answer, calls=bool(tools))
    form, ids = format_of(inside.tokenizer), prompt.token_ids
    thinking = thinking_tokens(inside.tokenizer, prompt.text, answer)
    spoken = len(written_text(inside.tokenizer, answer[:thinking], calls=bool(tools)))
    calls = () if ending == "open" else written_calls(form, text, tools, prompt_token_ids=ids, begin=spoken)
    return Generation(
        messages=prompt.messages,
        prompt_token_ids=ids,
        response_token_ids=answer,
        text=text,
        finish_reason=ending,
        settings=replace(settings, question=question, max_new_tokens=settings.max_new_tokens if most is None else most),
        model=model,
        anchor=anchor,
        written_calls=calls,
        thinking=thinking,
        spoken=spoken,
        seconds=seconds,
        _trace=KeptTrace(trace),
    )


class Decoding:
    """A batch that is decoded, and what is kept of it, from its first token on.

    Args:
        inside: the model.
        asked: a row each.
        settings: how tokens are drawn.
    """

    def __init__(self, inside: Inside, asked: Sequence[Asked], settings: GenerationSettings) -> None:
        self._inside, self._asked, self._settings = inside, asked, settings
        self._longest = max(len(each.read) for each in asked)
        self._keep_from = min((self._place(each) for each in asked if each.anchor is not None), default=self._longest)
        if not inside.sliceable:
            self._keep_from = 0
        most = most_kept(len(asked))
        self._tap, self._kept = Tap(self._keep_from), KeptLogits(inside.model.dtype, most=most)
        self._products = Products(self._keep_from, most=most)
        # Without a config it keeps the whole prefix of sliding-window layers too; other kinds of layers need theirs.
        self._cache = DynamicCache() if inside.sliceable else None
        self._has_read = False  # every layer, what comes before the first token that is drawn

    def _place(self, asked: Asked) -> int:
        """The column of t*."""
        assert asked.anchor is not None
        return self._longest - len(asked.begin) + asked.anchor.index

    def __call__(self, room: int) -> list[list[int]]:
        """Decode; the ids that were drawn, up to where the longest answer ended.

        Args:
            room: tokens to be drawn at most.
        """
        inside, stop = self._inside, self._settings.stop or ()
        view = inside.view_at(inside.deep_layers.start, self._tap, self._products)
        # Whatever the model's own generation_config says (a temperature, a repetition penalty) would be mixed in.
        view.__dict__["generation_config"] = config = _config(inside, room)
        drawn_by = self._processors()
        ended_by = [StopAtText(inside.tokenizer, stop, self._longest)] if stop else []
        with undisturbed(inside.model, grad=False):
            ids, mask = _left_padded(inside, [each.read for each in self._asked], config.pad_token_id)
            out = view.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                past_key_values=self._cache,
                logits_processor=drawn_by,
                stopping_criteria=StoppingCriteriaList(ended_by),
            )
        self._has_read = True
        drawn: list[list[int]] = out.sequences[:, self._longest :].tolist()
        return drawn

    def steps(self, room: int) -> Iterator[list[int]]:
        """Decode step by step; of each step the id that was drawn for each row, also for those that have ended.

        What ``transformers`` does in its own loop, without its bookkeeping. Nothing is switched off between steps.

        Args:
            room: tokens to be drawn at most.
        """
        inside = self._inside
        view, drawn_by = inside.view_at(inside.deep_layers.start, self._tap, self._products), self._processors()
        turn = turn_of(inside.model)
        with undisturbed(inside.model, grad=False, turn=turn):
            read, mask = _left_padded(inside, [each.read for each in self._asked], _config(inside, room).pad_token_id)
        accepted = signature(type(view).forward).parameters
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        given, past = read, self._cache
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for _ in range(room):
            placed = {"position_ids": positions} if "position_ids" in accepted else {}
            with undisturbed(inside.model, grad=False, turn=turn):
                out = view(
                    input_ids=given, attention_mask=mask, past_key_values=past, use_cache=True, **placed, **last_only
                )
                drawn = drawn_by(read, out.logits[:, -1].to(copy=True, dtype=torch.float32)).argmax(dim=-1)
                given = drawn[:, None]
                read, past = torch.cat([read, given], dim=1), out.past_key_values
                mask = torch.cat([mask, torch.ones_like(given)], dim=1)
                positions = positions[:, -1:] + 1
            self._has_read = True
            yield drawn.tolist()

    def _processors(self) -> LogitsProcessorList:
        """What comes between the logits and the argmax."""
        inside, settings = self._inside, self._settings
        chain = LogitsProcessorList([self._kept, *Draw.of(settings).processors(len(self._asked), inside.device)])
        if grammar := grammar_for(inside.tokenizer, settings):
            mask_by = Constrained(
                inside.tokenizer,
                grammar,
                begun=[each.begin for each in self._asked],
                vocabulary=inside.vocabulary,
                end_ids=inside.end_ids,
            )
            chain.insert(1, mask_by)
        return chain

    def trace(self, row: int, answer: tuple[int, ...]) -> Trace | None:
        """What scoring needs of an answer, or of its beginning; None where there is nothing to score.

        While the batch is decoded another thread may ask, for tokens that have been drawn.
        """
        asked, inside = self._asked[row], self._inside
        if asked.anchor is None or not answer or not self._has_read:
            return None  # an answer that begins with what was said already may be asked for before that was read
        prompt = len(asked.prompt.token_ids)
        at = prompt + asked.anchor.index
        start = at if inside.sliceable else 0
        first = inside.deep_layers.start
        pads = self._longest - len(asked.read)
        part = slice(pads, pads + start)
        layers = () if self._cache is None else self._cache.layers[first:]
        begin, end = pads + start - self._keep_from, pads + prompt + len(answer) - 1 - self._keep_from
        tapped = self._tap.row(row)
        return Trace(
            ids=(*asked.prompt.token_ids, *answer[:-1]),
            anchor=at,
            start=start,
            first=first,
            prefix=tuple((each.keys[row : row + 1, :, part], each.values[row : row + 1, :, part]) for each in layers),
            states=tapped[begin:end],
            after=tapped[end : end + 1] if tapped.shape[0] > end else None,
            logits=None if asked.begin else self._kept.rows(row, len(answer)),
            products=RowOf(self._products, row, begin, min(end + 1, tapped.shape[0])),
            origin="kept" if inside.sliceable else "whole",
        )


def _config(inside: Inside, room: int) -> GenerationConfig:
    ends, pad = sorted(inside.end_ids), inside.tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=room,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else next(iter(ends), 0),
        bos_token_id=inside.tokenizer.bos_token_id,
        return_dict_in_generate=True,
    )


def _left_padded(inside: Inside, rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=inside.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=inside.device)
    return ids, mask
