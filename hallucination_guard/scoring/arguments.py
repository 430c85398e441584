"""The arguments of a tool call are an answer, too: what the model says of each one's own tokens.

An argument's span are the tokens in which its value is written: a string without the quotes around it, and with the
token that ends it, since stopping is a choice as well. From the likelihoods of these tokens come the cheap scores; from
one replay with a row for each argument comes SemGrad of its terms of the loss, as in
:mod:`hallucination_guard.scoring.spans`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from hallucination_guard.errors import ScoringError
from hallucination_guard.model.grammar import Constrained, grammar_for
from hallucination_guard.model.keeping import KeptTrace
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings
from hallucination_guard.scoring.head_walk import answer_states, read_head
from hallucination_guard.scoring.scorers import Likelihood, cheap_scores, check_own
from hallucination_guard.scoring.spans import measure_spans
from hallucination_guard.scoring.token_texts import token_texts
from hallucination_guard.values import JSON, FrozenDict, Generation, WrittenCall

__all__ = ["Argument", "argument_spans", "call_confidence", "score_arguments"]


Masked: TypeAlias = Literal["left_out", "kept"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument of one call, and how sure the model is of it.

    Args:
        call: which call of the answer, from 0.
        tool: its name.
        name: of the argument.
        value: that was given.
        start: its first token, counted from the answer's beginning.
        stop: the token after its last.
        scores: by name, over its tokens: ``sequence_nll``, ``mean_nll``, ``min_token_logprob``, ``mean_token_entropy``,
            ``max_token_entropy``, and ``semgrad`` where it was asked for.
    """

    call: int
    tool: str
    name: str
    value: JSON
    start: int
    stop: int
    scores: Mapping[str, float]


def argument_spans(texts: Sequence[str], written: WrittenCall) -> dict[str, tuple[int, int]]:
    """The tokens of each argument's value, (start, stop); see the module.

    Args:
        texts: what each token adds to the answer's text.
        written: a call in it.
    """
    ends = [0]
    for each in texts:
        ends.append(ends[-1] + len(each))
    whole = "".join(texts)
    spans = {}
    for name, (start, stop) in written.arguments.items():
        # The opening quote is the grammar's; a string is closed by its own last quote, a number by what follows it.
        first = start + (whole[start : start + 1] == '"')
        last = max(stop, first + 1) if whole[start : start + 1] == '"' else stop + 1
        touched = [at for at in range(len(texts)) if ends[at] < last and ends[at + 1] > first]
        if touched:
            spans[name] = (touched[0], touched[-1] + 1)
    return spans


def score_arguments(
    model: WhiteBoxModel,
    generation: Generation,
    *,
    gradient: bool = True,
    masked: Masked = "left_out",
    settings: GradientSettings = GradientSettings(),  # noqa: B008 - frozen
) -> tuple[Argument, ...]:
    """How sure the model is of each argument of each call in an answer; empty where it calls nothing.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that the generation belongs to.
        generation: with ``written_calls``.
        gradient: whether to take SemGrad of each span, too; needs an anchor.
        masked: what the grammar did not allow, of an answer that was drawn under one: ``left_out`` of the
            probabilities, or ``kept``. docs/methods.md has which tells more.
        settings: of the gradient.

    Raises:
        AnchorError: if a gradient is asked for and the generation has no anchor.
        ScoringError: if there is nothing to measure, a number is not finite, or the generation is another model's.
    """
    texts = token_texts(model.tokenizer, generation.response_token_ids)
    if "".join(texts) != generation.text:  # the marks of its calls are special tokens
        texts = token_texts(model.tokenizer, generation.response_token_ids, special=True)
    found = [
        (at, written.call.name, name, written.call.arguments[name], span)
        for at, written in enumerate(generation.written_calls)
        for name, span in argument_spans(texts, written).items()
    ]
    if not found:
        return ()
    check_own(model, generation)
    rows = _allowed_logits(model, generation) if masked == "left_out" else None
    if gradient:
        drawn = generation if rows is None else _with_logits(model, generation, rows, settings)
        read = measure_spans(model, drawn, [span for *_, span in found], settings)
        entropies, logprobs = read.entropies, read.logprobs
    elif rows is not None:
        reading = read_head(model.head, None, generation.response_token_ids, logits=rows)
        entropies, logprobs = tuple(reading.entropies.tolist()), tuple(reading.logprobs.tolist())
    else:
        whole = Likelihood(thinking="counted")(model, generation)
        entropies, logprobs = whole.token_entropies, whole.token_logprobs
    arguments = []
    for number, (at, tool, name, value, (start, stop)) in enumerate(found):
        scores = cheap_scores(entropies[start:stop], logprobs[start:stop])
        if gradient:
            scores["semgrad"] = read.alone[number]
        arguments.append(
            Argument(call=at, tool=tool, name=name, value=value, start=start, stop=stop, scores=FrozenDict(scores))
        )
    return tuple(arguments)


@torch.no_grad()
def _allowed_logits(model: WhiteBoxModel, generation: Generation) -> list[Tensor] | None:
    """The logits of each token (T rows of V), −∞ for what its grammar did not allow; None of an answer without one."""
    grammar = grammar_for(model.tokenizer, generation.settings)
    if grammar is None or generation.finish_reason == "read":
        return None
    answer = generation.response_token_ids
    with undisturbed(model.model, grad=False):
        view = model.layout.view(model.model, {})
        logits = model.head.logits(answer_states(model, view, generation).to(model.head.dtype))
    step = Constrained(model.tokenizer, grammar, begun=[()], vocabulary=model.vocabulary, end_ids=model.end_ids)
    rows = []
    for at in range(len(answer)):
        read = torch.tensor([[*generation.prompt_token_ids[-1:], *answer[:at]]])
        rows.append(step(read, logits[at : at + 1])[0])
    return rows


def _with_logits(
    model: WhiteBoxModel, generation: Generation, rows: Sequence[Tensor], settings: GradientSettings
) -> Generation:
    trace = model.trace(generation, settings.deep(model.layout.depth))
    return replace(generation, _trace=KeptTrace(replace(trace, logits=tuple(rows))))


def call_confidence(model: WhiteBoxModel) -> Callable[[Generation], list[float]]:
    """How sure the model is of each tool call of an answer, in [0, 1]; 1 of a call without arguments.

    It is the probability that the model gave to the value of the call's least likely argument, quotes left out, among
    what the grammar allowed if there was one: no calibrated probability of being right. docs/methods.md has what it
    tells apart.
    """

    def confidence(generation: Generation) -> list[float]:
        weakest = [0.0] * len(generation.written_calls)
        found = score_arguments(model, generation, gradient=False)
        for each in found:
            weakest[each.call] = max(weakest[each.call], each.scores["sequence_nll"])
        spans = Counter(each.call for each in found)
        if any(len(written.call.arguments) != spans[at] for at, written in enumerate(generation.written_calls)):
            raise ScoringError("an argument has no tokens of its own", hint="look at the tokenizer")
        return [math.exp(-each) for each in weakest]

    return confidence
