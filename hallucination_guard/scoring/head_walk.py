"""What the head says of an answer: likelihoods, the norm of ∂ℓ/∂W, and ∂ℓ/∂H where the backward begins.

Source: arXiv 2605.04638. Symbols as there: p_t the distribution that predicts ŷ_t, ω_t = H(p_t) its entropy in nats
(detached), W the head (V × d), H the final states (T × d), ℓ(w) = −Σ_t w_t log p_t[ŷ_t].

With A_t = w_t (p_t − onehot(ŷ_t)), pulled back through whatever the head does besides W: ∂ℓ/∂W = Aᵀ H and ∂ℓ/∂H = A W.
The norm of the first needs no backward and no V × d (:mod:`hallucination_guard.scoring.head_blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hallucination_guard.model.head import Head
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.head_blocks import weighted_norms
from hallucination_guard.values import Generation

__all__ = [
    "Reading",
    "Walk",
    "answer_states",
    "head_norms",
    "pulled_states",
    "read_head",
    "walk_head",
    "walk_heads",
]

_BLOCK = 2048  # words of the vocabulary at a time
_WORDS = 256  # the same for ∂ℓ/∂W, of which words × 2d floats are held


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Walk:
    """What the head says about one example: norms, likelihoods and ∂ℓ/∂H (T × d)."""

    paragrad: float
    exgrad: float
    entropies: Tensor
    logprobs: Tensor
    by_states: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """What the head says of each answer token.

    Args:
        entropies: ω_t, length T.
        logprobs: log p_t[ŷ_t], length T.
        a: p_t − onehot(ŷ_t) pulled back to W h_t (T × V); ∂(−log p_t[ŷ_t])/∂W is a_t h_tᵀ.
    """

    entropies: Tensor
    logprobs: Tensor
    a: Tensor


def answer_states(model: WhiteBoxModel, view: nn.Module, generation: Generation) -> Tensor:
    """H, the final states that predict the answer (T × d), by one pass over the whole sequence.

    Args:
        model: a :class:`~hallucination_guard.WhiteBoxModel`.
        view: of it; the caller says whether with a graph.
        generation: with at least one answer token.
    """
    answer = generation.response_token_ids
    ids = torch.tensor([(*generation.prompt_token_ids, *answer[:-1])], device=model.device)
    final: Tensor = model.layout.decoder_of(view)(input_ids=ids, use_cache=False).last_hidden_state
    return final[0, -len(answer) :]


@torch.no_grad()
def read_head(
    head: Head,
    states: Tensor | None,
    answer: Sequence[int],
    *,
    logits: Sequence[Tensor] | None = None,
    room: tuple[Tensor, Tensor] | None = None,
) -> Reading:
    """Likelihoods of an answer from its final states (T × d), and where the head's gradient begins.

    Args:
        head: of the model.
        states: H, the final states that predict the answer; may be None where the logits are at hand.
        answer: ŷ, length T.
        logits: of these states, a row of V for each token, where they are at hand.
        room: twice T × V in the head's dtype and where it is: A is written into the first, if it can be, and the second
            is overwritten.
    """
    into, scratch = room or (None, None)
    if logits is not None:
        here = into is not None and into.device == logits[0].device
        rows = torch.stack(list(logits), out=into if here else None).to(head.weight.device, head.dtype)
    else:
        assert states is not None
        rows = head.logits(states)
    logp = torch.log_softmax(rows, dim=-1, out=scratch)
    targets = torch.tensor(answer, device=logp.device)[:, None]
    logprobs = logp.gather(1, targets)[:, 0]
    # A soft cap wants the logits once more; else p takes their place.
    p = torch.exp(logp, out=rows if head.softcap is None else None)
    # p·log p is 0 where p is; a masked word (−∞) would make it NaN.
    entropies = -logp.clamp_min_(torch.finfo(logp.dtype).min).mul_(p).sum(dim=-1)
    a = p.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=p.dtype))
    return Reading(entropies=entropies, logprobs=logprobs, a=head.pulled_back(a, rows))


def walk_head(
    head: Head, states: Tensor, answer: Sequence[int], *, weighting: str = "entropy", reading: Reading | None = None
) -> Walk:
    """Everything that the head knows of one example, from its final states (T × d).

    Args:
        head: of the model.
        states: H, the final states that predict the answer.
        answer: ŷ, length T.
        weighting: whether ``by_states`` is of ℓ(ω) (``entropy``) or of ℓ(1) (``none``).
        reading: of these states, where it is at hand.
    """
    states = states.to(head.dtype)
    return walk_heads(head, [states], [reading or read_head(head, states, answer)], weighting=weighting)[0]


@torch.no_grad()
def walk_heads(
    head: Head, states: Sequence[Tensor], readings: Sequence[Reading], *, weighting: str = "entropy"
) -> list[Walk]:
    """The same for several examples in one walk over W, from their states and what was read of them."""
    if not readings:
        return []
    found = []
    for norms, reading, own in zip(
        head_norms(head, states, readings), readings, pulled_states(head, readings), strict=True
    ):
        weights = reading.entropies[:, None] if weighting == "entropy" else 1.0
        found.append(
            Walk(
                paragrad=norms[0],
                exgrad=norms[1],
                entropies=reading.entropies,
                logprobs=reading.logprobs,
                by_states=own * weights,
            )
        )
    return found


@torch.no_grad()
def head_norms(head: Head, states: Sequence[Tensor], readings: Sequence[Reading]) -> list[tuple[float, float]]:
    """ParaGrad and ExGrad of each example: the mean of |∂ℓ/∂W|, with w_t = ω_t and with w_t = 1."""
    return [_norms(head, own, reading) for own, reading in zip(states, readings, strict=True)]


def _norms(head: Head, states: Tensor, reading: Reading) -> tuple[float, float]:
    weights = torch.stack([reading.entropies, torch.ones_like(reading.entropies)])
    paragrad, exgrad = (weighted_norms(reading.a, states, weights, block=_WORDS) / head.weight.numel()).tolist()
    return paragrad, exgrad


@torch.no_grad()
def pulled_states(head: Head, readings: Sequence[Reading]) -> list[Tensor]:
    """A W of each example, with w_t = 1 (T × d)."""
    lengths, first = [len(each.entropies) for each in readings], readings[0].a
    by_states = first.new_zeros(sum(lengths), head.weight.shape[1])
    for begin in range(0, head.weight.shape[0], _BLOCK):
        parts = [reading.a[:, begin : begin + _BLOCK] for reading in readings]
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        by_states.addmm_(together, head.weight[begin : begin + _BLOCK].to(head.dtype))
    return list(torch.split(by_states, lengths))
