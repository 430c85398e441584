"""SemGrad by span: which sentence of an answer depends on the exact state at the question's meaning.

ℓ is a sum over tokens, so its gradient g = ∂ℓ/∂h_{l,t*} is the sum Σ_s g_s over the spans of any partition. With the
mean over deep layers and dimensions, share(s) = mean sign(g)·g_s, and the shares add up to SemGrad exactly (negative
where a span pulls the other way); semgrad(s) = mean |g_s| is what the span would score if only its terms counted.

All spans come from one replay and one backward with a row for each. docs/methods.md has inequalities and rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hallucination_guard.errors import InputError, ScoringError
from hallucination_guard.model.replay import Replay, Trace, replay
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings, check_felt, loss_scale
from hallucination_guard.scoring.head_walk import read_head, walk_head
from hallucination_guard.scoring.scorers import check_own, nothing_to_measure
from hallucination_guard.scoring.token_texts import token_texts
from hallucination_guard.values import Generation
from hallucination_guard.values.text import sentence_ranges

__all__ = ["Measures", "Span", "measure_spans", "semgrad_by_span"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of an answer and what it weighs; see the module for the formulas.

    Args:
        text: as the tokens decode.
        start: its first token, counted from the answer's beginning.
        stop: the token after its last.
        semgrad: of this span's terms of the loss alone; ≥ 0.
        share: its part of the whole answer's SemGrad; the shares of a partition add up to it. May be negative.
    """

    text: str
    start: int
    stop: int
    semgrad: float
    share: float


def semgrad_by_span(
    model: WhiteBoxModel,
    generation: Generation,
    spans: Sequence[tuple[int, int]] | None = None,
    settings: GradientSettings = GradientSettings(),  # noqa: B008 - frozen
) -> tuple[Span, ...]:
    """SemGrad of each span of an answer.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that the generation belongs to.
        generation: from ``model.generate`` or ``model.read``, with an anchor.
        spans: (start, stop) in tokens of the answer; they may overlap and leave tokens out. By default its sentences.
        settings: as for the scorers.

    Raises:
        AnchorError: if the generation has no anchor.
        InputError: if a span is empty or not inside the answer.
        ScoringError: if there is nothing to measure, a number is not finite, or the generation is another model's.
    """
    check_own(model, generation)
    reason = nothing_to_measure(generation)
    if reason:
        raise ScoringError(reason, hint="an answer without visible text has no spans")
    texts = token_texts(model.tokenizer, generation.response_token_ids)
    ranges = sentence_ranges(texts) if spans is None else _checked(spans, len(texts))
    found = measure_spans(model, generation, ranges, settings)
    return tuple(
        Span(text="".join(texts[start:stop]), start=start, stop=stop, semgrad=own, share=part)
        for (start, stop), own, part in zip(ranges, found.alone, found.shares, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What one pass gives of S spans of an answer of T tokens.

    Args:
        alone: semgrad(s), length S.
        shares: share(s), length S.
        entropies: H(p_t) in nats, length T.
        logprobs: log p_t[ŷ_t], length T.
    """

    alone: tuple[float, ...]
    shares: tuple[float, ...]
    entropies: tuple[float, ...]
    logprobs: tuple[float, ...]


def measure_spans(
    model: WhiteBoxModel, generation: Generation, ranges: Sequence[tuple[int, int]], settings: GradientSettings
) -> Measures:
    """SemGrad of spans, by one replay and one backward; ``ranges`` are in tokens of the answer.

    Raises:
        AnchorError: if the generation has no anchor.
        ScoringError: if a number is not finite.
    """
    layers = settings.deep(model.layout.depth)
    trace = model.trace(generation, layers)
    with undisturbed(model.model, grad=True):
        return _measure(model, generation, trace, ranges, settings, layers)


def _checked(spans: Sequence[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    for each in spans:
        if len(each) != 2 or not 0 <= each[0] < each[1] <= length:
            raise InputError(
                f"the span {each!r} is not in an answer of {length} tokens",
                hint="give (start, stop) with 0 <= start < stop <= the number of tokens",
            )
    if not spans:
        raise InputError("no spans were given", hint="leave them out for the sentences of the answer")
    return tuple((start, stop) for start, stop in spans)


def _measure(
    model: WhiteBoxModel,
    generation: Generation,
    trace: Trace,
    ranges: Sequence[tuple[int, int]],
    settings: GradientSettings,
    layers: range,
) -> Measures:
    answer = generation.response_token_ids
    length = len(answer)
    run = replay(model.model, model.layout, [trace], layers)
    states = run.final[0, -length:].detach().to(model.head.dtype)
    reading = read_head(model.head, states, answer, logits=trace.logits)
    walk = walk_head(model.head, states, answer, weighting=settings.weighting, reading=reading)
    chosen = torch.zeros(len(ranges), length, dtype=walk.by_states.dtype, device=walk.by_states.device)
    for row, (start, stop) in enumerate(ranges):
        chosen[row, start:stop] = 1
    rest = 1 - chosen.sum(dim=0, keepdim=True)  # what is in no span, less what is in several: then g is the rows' sum
    if rest.any():
        chosen = torch.cat([chosen, rest])
    upstream = torch.zeros(len(chosen), *run.final.shape, dtype=walk.by_states.dtype, device=run.final.device)
    upstream[:, 0, -length:] = (chosen[:, :, None] * walk.by_states).to(upstream)
    exponent = loss_scale(upstream, run.final.dtype)
    found = _backward(run, torch.ldexp(upstream, exponent).to(run.final))
    # (rows × layers × d); the layers may be on several devices
    by_row = torch.stack([each[:, 0, trace.row].to(torch.float64).cpu() for each in found], dim=1)
    by_row = torch.ldexp(by_row, -exponent[:, 0].cpu())
    whole = by_row.sum(dim=0)
    check_felt(model, [generation], layers, whole.abs().sum(dim=-1)[:, None], upstream.sum(dim=0))
    scale = 1.0 if settings.reduction == "sum" else 1.0 / length
    own = by_row[: len(ranges)]
    alone = (own.abs().mean(dim=(1, 2)) * scale).tolist()
    shares = ((whole.sign() * own).mean(dim=(1, 2)) * scale).tolist()
    for name, value in (*(("semgrad", each) for each in alone), *(("share", each) for each in shares)):
        if not math.isfinite(value):
            raise ScoringError(
                f"the {name} of a span is {value!r}",
                hint="in float16 gradients overflow or vanish: use bfloat16 or float32",
            )
    return Measures(
        alone=tuple(alone),
        shares=tuple(shares),
        entropies=tuple(reading.entropies.tolist()),
        logprobs=tuple(reading.logprobs.tolist()),
    )


def _backward(run: Replay, upstream: Tensor) -> tuple[Tensor, ...]:
    """∂/∂h_l for every row of ``upstream`` (rows × 1 × S × d): a tensor of its shape a layer."""
    try:
        return torch.autograd.grad(
            run.final, run.states, grad_outputs=upstream, is_grads_batched=True, retain_graph=True
        )
    except RuntimeError:
        # vmap says so (NotImplementedError is one too) for an operation whose backward it cannot batch, and so does a
        # device without memory for all rows at once. Anything else is raised again below.
        rows = [torch.autograd.grad(run.final, run.states, grad_outputs=row, retain_graph=True) for row in upstream]
        return tuple(torch.stack(each) for each in zip(*rows, strict=True))
