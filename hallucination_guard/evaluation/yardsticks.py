"""The yardsticks that one more forward pass gives: no samples, no gradient, no labels.

RAUQ (arXiv 2505.20045), Self-Certainty (arXiv 2502.18581) and BoostedProb (EMNLP 2025 main, 166); docs/methods.md has
the formulas. The same pass gives the states that SATRMD is fitted on (:mod:`hallucination_guard.evaluation.satrmd`).
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hallucination_guard.errors import InputError, ModelError
from hallucination_guard.evaluation.data import Item, Prompting
from hallucination_guard.model.white_box import WhiteBoxModel

__all__ = [
    "FORWARD",
    "Looked",
    "boosted",
    "look",
    "looked_at",
    "middle_third",
    "packed",
    "rauq",
    "state_layers",
    "unpacked",
]

Floats: TypeAlias = NDArray[np.float64]

FORWARD = ("rauq", "-self_certainty", "1-boostedprob")
"""Names of the scores of this pass, turned so that higher = less certain."""

_ALPHA = 0.2  # share of the token's own probability in RAUQ; the paper's
_JUMP, _LEAST = 0.3, 0.005  # a dominant token's lead over the next: as a share of it, and at all; the paper's
_LAYERS = 10  # at most, whose states are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What one pass over an answer shows.

    Args:
        scores: by the names in :data:`FORWARD`.
        states: h_l of each answer token at its own position (T × layers × d), float16.
    """

    scores: dict[str, float]
    states: NDArray[np.float16]

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.scores.values())) or not np.isfinite(self.states).all():
            raise ValueError(f"the scores {self.scores!r} or the states hold what is no finite number")


def middle_third(depth: int) -> range:
    """The layers l (1 … L) that RAUQ looks at: ⌊L/3⌋ … ⌈2L/3⌉ counted from 0, as its authors take them."""
    return range(depth // 3 + 1, min(math.ceil(2 * depth / 3) + 1, depth) + 1)


def state_layers(depth: int) -> tuple[int, ...]:
    """The layers l (1 … L) whose states are kept: evenly spaced, the last among them."""
    count = min(_LAYERS, depth)
    return tuple(sorted({depth - round(at * depth / count) for at in range(count)}))


def look(model: WhiteBoxModel, prompt: Sequence[int], answer: Sequence[int]) -> Looked:
    """Read an answer once more, with plain attention; the model is not changed.

    Args:
        model: a :class:`~hallucination_guard.WhiteBoxModel`.
        prompt: token ids of all that is before the answer.
        answer: its token ids.

    Raises:
        InputError: if there is no answer.
        ModelError: if the attention cannot be looked at, or a number is not finite.
    """
    import torch

    from hallucination_guard.model.attention import plainly_attending
    from hallucination_guard.model.view import undisturbed

    if not answer:
        raise InputError("there is no answer to look at", hint="leave unscorable answers out")
    depth = model.layout.depth
    begin, end = len(prompt), len(prompt) + len(answer)
    wanted, kept = set(middle_third(depth)), set(state_layers(depth))
    before: dict[int, Floats] = {}
    states: dict[int, Any] = {}

    def attention(level: int, weights: Any) -> None:
        if level in wanted:
            # The state that predicts ŷ_t has read ŷ_{t−1}, so "attention to the token before" lies on the diagonal.
            own = torch.diagonal(weights[0], dim1=-2, dim2=-1)[:, begin : end - 1]
            before[level] = own.double().cpu().numpy()

    def state(level: int, found: Any) -> None:
        if level in kept:
            states[level] = found[0, begin:end].float().cpu().numpy()

    with undisturbed(model.model, grad=False):
        view = plainly_attending(model.model, model.layout, attention=attention, states=state)
        ids = torch.tensor([(*prompt, *answer)], device=model.device)
        final = model.layout.decoder_of(view)(input_ids=ids, use_cache=False).last_hidden_state[0, begin - 1 : end - 1]
        logp = torch.log_softmax(model.head.logits(final), dim=-1)
        chosen = torch.tensor(answer, device=logp.device)
        own = logp.gather(1, chosen[:, None])[:, 0].double().cpu().numpy()
        certainty = float(-logp.double().mean() - math.log(logp.shape[-1]))
        top = logp.topk(min(math.ceil(1 / _LEAST) + 1, logp.shape[-1]), dim=-1)  # no lead of _LEAST comes after these
        mass = [boosted(*each) for each in zip(np.exp(own), answer, *_pairs(top), strict=True)]
    if not before:
        raise ModelError(
            f"no layer of the middle third of {model.name!r} has attention", hint="it has no RAUQ: leave this out"
        )
    scores = {
        "rauq": rauq(own, [before[level] for level in sorted(before)]),
        "-self_certainty": -certainty,
        "1-boostedprob": 1.0 - float(np.mean(mass)),
    }
    # float16 ends at 65,504, and some models have states beyond; they would all be cut to one number.
    stacked = np.stack([states[level] for level in sorted(states)], axis=1)
    if not np.abs(stacked).max() < np.finfo(np.float16).max:
        raise ModelError(f"states of {model.name!r} are beyond float16", hint="SATRMD cannot be had of it")
    return Looked(scores=scores, states=stacked.astype(np.float16))


def looked_at(model: WhiteBoxModel, item: Item, prompting: Prompting, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row to be kept of a stored answer: scores, states, seconds.

    Args:
        model: that answered.
        item: the question.
        prompting: how it was asked.
        row: the answer's own.
    """
    began = time.perf_counter()
    ids = row["response_token_ids"]
    # Thinking that the scorer left out is context.
    begin = len(ids) - row["length"]
    seen = look(model, (*model.prompt(prompting(item.query)).token_ids, *ids[:begin]), ids[begin:])
    seconds = time.perf_counter() - began
    return {"id": item.id, "scores": seen.scores, "states": packed(seen.states), "seconds": seconds}


def _pairs(top: Any) -> tuple[Any, Any]:
    return top.values.double().exp().cpu().numpy(), top.indices.cpu().numpy()


def rauq(logprobs: Floats, attention: Sequence[Floats], *, alpha: float = _ALPHA) -> float:
    """Recurrent attention-based uncertainty: the greatest over layers of −mean log c_t.

    Args:
        logprobs: log p_t[ŷ_t] of the T tokens.
        attention: by layer, a (heads × T−1): the attention of the state that predicts ŷ_t to ŷ_{t−1}.
        alpha: share of p_t in c_t = α·p_t + (1−α)·a·c_{t−1}; c_1 = p_1.
    """
    p = np.exp(logprobs)
    found = []
    for weights in attention:
        # The head that attends most to the token before, over the whole answer.
        head = weights[int(np.argmax(weights.mean(axis=1)))] if weights.shape[1] else np.zeros(0)
        confidence = [float(p[0])]
        for at in range(1, len(p)):
            confidence.append(alpha * float(p[at]) + (1.0 - alpha) * float(head[at - 1]) * confidence[-1])
        found.append(-float(np.log(confidence).mean()))
    return max(found)


def boosted(own: float, token: int, probabilities: Floats, tokens: NDArray[np.int64]) -> float:
    """BoostedProb of one token: the mass of the dominant tokens if it is one of them, else its own probability.

    Args:
        own: p[ŷ].
        token: ŷ.
        probabilities: the greatest, falling.
        tokens: whose they are.
    """
    lead = probabilities[:-1] - probabilities[1:]
    ends = np.flatnonzero((lead > _JUMP * probabilities[:-1]) & (lead > _LEAST))
    if len(ends) and token in tokens[: ends[-1] + 1]:
        return float(probabilities[: ends[-1] + 1].sum())
    return float(own)


def packed(states: NDArray[np.float16]) -> dict[str, Any]:
    """States as JSON."""
    return {"shape": list(states.shape), "float16": base64.b64encode(states.tobytes()).decode()}


def unpacked(row: dict[str, Any]) -> NDArray[np.float16]:
    """The states that :func:`packed` wrote."""
    return np.frombuffer(base64.b64decode(row["float16"]), dtype=np.float16).reshape(row["shape"])
