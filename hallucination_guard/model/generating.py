"""Generating: a batch of prompts, decoded together, and what of it is kept for scoring."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hallucination_guard.model.calling import format_of, written_calls, written_text
from hallucination_guard.model.decoding import Draw, KeptLogits, StopAtText, end_of_answer
from hallucination_guard.model.grammar import Constrained, grammar_for
from hallucination_guard.model.inside import Inside
from hallucination_guard.model.keeping import KeptTrace, Tap
from hallucination_guard.model.replay import Trace
from hallucination_guard.model.view import undisturbed
from hallucination_guard.values import Anchor, Generation, GenerationSettings, Prompt

__all__ = ["generate"]


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
    for at, prompt in enumerate(prompts):
        room = settings.max_new_tokens
        if inside.context is not None:
            room = min(room, inside.context - len(prompt.token_ids))
        rooms.setdefault(room, []).append(at)
    made: dict[int, Generation] = {}
    for room, group in rooms.items():
        asked = [_Asked(prompts[at], inside.anchor(prompts[at], questions[at]), questions[at]) for at in group]
        made |= zip(group, _together(inside, asked, room, settings), strict=True)
    return [made[at] for at in range(len(prompts))]


class _Asked(NamedTuple):
    prompt: Prompt
    anchor: Anchor | None
    question: str | None


def _together(inside: Inside, asked: Sequence[_Asked], room: int, settings: GenerationSettings) -> list[Generation]:
    """Prompts with room for the same number of tokens, decoded as one batch."""
    began = time.perf_counter()
    run = _decoded(inside, asked, room, settings)
    seconds = (time.perf_counter() - began) / len(asked)
    made = []
    identity = inside.identity
    form, tools = format_of(inside.tokenizer), () if settings.tool_choice == "none" else settings.tools or ()
    for row, (prompt, anchor, question) in enumerate(asked):
        length, ending = end_of_answer(inside.tokenizer, run.drawn[row], inside.end_ids, settings.stop or ())
        answer = tuple(run.drawn[row][:length])
        most = room if ending == "length" else settings.max_new_tokens  # the context may have cut it earlier
        text = written_text(inside.tokenizer, answer, calls=bool(tools))
        made.append(
            Generation(
                messages=prompt.messages,
                prompt_token_ids=prompt.token_ids,
                response_token_ids=answer,
                text=text,
                finish_reason=ending,
                settings=replace(settings, question=question, max_new_tokens=most),
                model=identity,
                anchor=anchor,
                written_calls=written_calls(form, text, tools, prompt_token_ids=prompt.token_ids),
                seconds=seconds,
                _trace=KeptTrace(run.trace(inside, row, prompt, anchor, answer)),
            )
        )
    return made


def _decoded(inside: Inside, asked: Sequence[_Asked], room: int, settings: GenerationSettings) -> _Run:
    draw, stop = Draw.of(settings), settings.stop or ()
    longest = max(len(each.prompt.token_ids) for each in asked)
    keep_from = min((longest + each.anchor.index for each in asked if each.anchor is not None), default=longest)
    if not inside.sliceable:
        keep_from = 0
    tap, kept = Tap(keep_from), KeptLogits(inside.model.dtype)
    view = inside.view_at(inside.deep_layers.start, tap)
    # Whatever the model's own generation_config says (a temperature, a repetition penalty) would be mixed in.
    view.__dict__["generation_config"] = config = _config(inside, room)
    # Without a config it keeps the whole prefix of sliding-window layers too; other kinds of layers need theirs.
    cache = DynamicCache() if inside.sliceable else None
    drawn_by = LogitsProcessorList([kept, *draw.processors(len(asked), inside.device)])
    if grammar := grammar_for(inside.tokenizer, settings):
        mask_by = Constrained(
            inside.tokenizer, grammar, rows=len(asked), vocabulary=inside.vocabulary, end_ids=inside.end_ids
        )
        drawn_by.insert(1, mask_by)
    with undisturbed(inside.model, grad=False):
        ids, mask = _left_padded(inside, [each.prompt.token_ids for each in asked], config.pad_token_id)
        out = view.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            past_key_values=cache,
            logits_processor=drawn_by,
            stopping_criteria=StoppingCriteriaList([StopAtText(inside.tokenizer, stop, longest)] if stop else []),
        )
    return _Run(
        drawn=out.sequences[:, longest:].tolist(),
        cache=cache,
        states=tap.states() if any(each.anchor for each in asked) else None,
        logits=kept,
        longest=longest,
        keep_from=keep_from,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """A batch that was decoded.

    Args:
        drawn: the ids of each row, up to where the longest answer ended.
        cache: keys and values of all layers; None where they cannot be cut at a position.
        states: h_{l₀} from column ``keep_from`` on; None where no row has an anchor.
        logits: those that were drawn from.
        longest: columns of the padded prompts.
        keep_from: the first column whose states were kept.
    """

    drawn: list[list[int]]
    cache: Any
    states: Tensor | None
    logits: KeptLogits
    longest: int
    keep_from: int

    def trace(
        self, inside: Inside, row: int, prompt: Prompt, anchor: Anchor | None, answer: tuple[int, ...]
    ) -> Trace | None:
        """What scoring needs of one row; None where there is nothing to score."""
        if anchor is None or self.states is None or not answer:
            return None
        at = len(prompt.token_ids) + anchor.index
        start = at if inside.sliceable else 0
        first = inside.deep_layers.start
        pads = self.longest - len(prompt.token_ids)
        part = slice(pads, pads + start)
        layers = () if self.cache is None else self.cache.layers[first:]
        begin, end = pads + start - self.keep_from, self.longest - self.keep_from + len(answer) - 1
        return Trace(
            ids=(*prompt.token_ids, *answer[:-1]),
            anchor=at,
            start=start,
            first=first,
            prefix=tuple((each.keys[row : row + 1, :, part], each.values[row : row + 1, :, part]) for each in layers),
            states=self.states[row, begin:end],
            logits=self.logits.rows(row, len(answer)),
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
