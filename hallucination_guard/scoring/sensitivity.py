"""Which words of the question the answer is most sensitive to.

s_t = mean over the d dimensions of |∂ℓ(ω)/∂h_{l₀,t}| for every position t of the prompt, l₀ being the first deep layer:
at t* this is the part that l₀ has in SemGrad. The derivative is total, as there: what the answer reads from t through
any later position counts. A word's sensitivity is the sum over its tokens, the ℓ1 norm of their states taken together.

Here the graph has to span the whole prompt, so this costs a forward and a backward of the deep half over P + T tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from hallucination_guard.errors import AnchorError, ScoringError
from hallucination_guard.model.anchor import end_of_user_text, offsets_of
from hallucination_guard.model.replay import replay
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings, loss_scale
from hallucination_guard.scoring.head_walk import walk_head
from hallucination_guard.scoring.scorers import check_own, nothing_to_measure
from hallucination_guard.values import Generation, question_of

__all__ = ["Word", "prompt_sensitivity", "question_sensitivity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A word of the question.

    Args:
        text: up to the next white space.
        start: its first character in the question without the white space around.
        tokens: its positions in the prompt; a token that holds parts of two words belongs to the first.
        sensitivity: Σ s_t over them; see the module.
    """

    text: str
    start: int
    tokens: tuple[int, ...]
    sensitivity: float


def question_sensitivity(
    model: WhiteBoxModel,
    generation: Generation,
    settings: GradientSettings = GradientSettings(),  # noqa: B008 - frozen
) -> tuple[Word, ...]:
    """The words of the last user message and how sensitive the answer is to each.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that the generation belongs to.
        generation: from ``model.generate`` or ``model.read``; it needs no anchor.
        settings: as for the scorers.

    Raises:
        AnchorError: if the message cannot be found in the prompt again.
        ScoringError: if there is nothing to measure, a number is not finite, or the generation is another model's.
    """
    prompt = model.prompt(generation.messages, **generation.settings.offered)
    question = question_of(generation.messages).strip()
    limit = end_of_user_text(model.tokenizer, prompt)
    begin = prompt.text.rfind(question, 0, limit)
    if begin < 0 or prompt.token_ids != generation.prompt_token_ids:
        raise AnchorError(
            f"{question[:60]!r} does not stand in the prompt as it was said",
            hint="prompt_sensitivity gives the numbers token by token",
        )
    offsets = offsets_of(model.tokenizer, prompt)
    by_token = prompt_sensitivity(model, generation, settings)
    words = []
    free = 0  # tokens before this one are some word's
    for match in re.finditer(r"\S+", question):
        first, last = begin + match.start(), begin + match.end()
        own = tuple(
            at
            for at, (start, stop) in enumerate(offsets)
            if at >= free and start < stop and start < last and stop > first
        )
        free = own[-1] + 1 if own else free
        total = math.fsum(by_token[at] for at in own)
        words.append(Word(text=match.group(), start=match.start(), tokens=own, sensitivity=total))
    return tuple(words)


def prompt_sensitivity(
    model: WhiteBoxModel,
    generation: Generation,
    settings: GradientSettings = GradientSettings(),  # noqa: B008 - frozen
) -> tuple[float, ...]:
    """s_t of every token of the prompt.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that the generation belongs to.
        generation: from ``model.generate`` or ``model.read``; it needs no anchor.
        settings: as for the scorers.

    Raises:
        ScoringError: if there is nothing to measure, a number is not finite, or the generation is another model's.
    """
    check_own(model, generation)
    reason = nothing_to_measure(generation)
    if reason:
        raise ScoringError(reason, hint="an answer without visible text is sensitive to nothing")
    answer = generation.response_token_ids
    ids = (*generation.prompt_token_ids, *answer)
    first = settings.deep(model.layout.depth).start
    layers = range(first, first + 1)
    with undisturbed(model.model, grad=True):
        run = replay(model.model, model.layout, [model.trace_ids(ids, 0, layers)], layers)
        final = run.final[0, -len(answer) :].detach()
        walk = walk_head(model.head, final, answer, weighting=settings.weighting)
        upstream = torch.zeros_like(run.final, dtype=walk.by_states.dtype)
        upstream[0, -len(answer) :] = walk.by_states.to(upstream)
        exponent = loss_scale(upstream, run.final.dtype)
        scaled = torch.ldexp(upstream, exponent).to(run.final)
        (gradient,) = torch.autograd.grad(run.final, run.states, grad_outputs=scaled)
    scale = 1.0 if settings.reduction == "sum" else 1.0 / len(answer)
    found = torch.ldexp(gradient[0, : len(generation.prompt_token_ids)].to(torch.float64), -exponent[0])
    found = found.abs().mean(dim=-1) * scale
    if not torch.isfinite(found).all():
        raise ScoringError(
            "the gradient at the prompt is not finite",
            hint="in float16 gradients overflow or vanish: use bfloat16 or float32",
        )
    return tuple(found.tolist())
