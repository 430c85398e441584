"""Isotropic: how far the answer's probability would move if the parameters did, the same in every direction.

Source: arXiv 2603.29466. Epistemic uncertainty is mean_t ‖∇_θ p_t‖², aleatoric mean_t p_t(1 − p_t), with p_t the
probability of ŷ_t at temperature 1. θ is the head W (V × d) as a variable of its own, or every parameter of the model.

For the head ∂p_t[ŷ_t]/∂W = −p_t[ŷ_t] a_t h_tᵀ with a_t = p_t − onehot(ŷ_t): an outer product, whose norm is that of its
factors, so one forward pass is enough. For all parameters it takes T backward passes over prompt and answer
(docs/methods.md). None of this looks at t*: it works without an anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from hallucination_guard.errors import ConfigurationError, ModelError
from hallucination_guard.model.view import undisturbed, with_parameters
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.head_walk import Reading, answer_states, read_head
from hallucination_guard.scoring.scorers import _Numbers, _Scorer
from hallucination_guard.values import Generation

__all__ = ["Isotropic"]


@dataclass(frozen=True, kw_only=True)
class Isotropic(_Scorer):
    """mean_t ‖∇_θ p_t‖² (epistemic) + mean_t p_t(1 − p_t) (aleatoric), p_t the probability of answer token t.

    Its scores are ``isotropic`` (the sum), ``isotropic_epistemic``, ``isotropic_aleatoric`` and the likelihoods.

    Args:
        parameters: θ. ``head``: the head's matrix as a variable of its own, in closed form at the price of a forward
            pass; ``all``: all parameters of the model, T backward passes. See docs/methods.md.
    """

    primary = "isotropic"

    parameters: Literal["head", "all"] = "head"

    def __post_init__(self) -> None:
        if self.parameters not in ("head", "all"):
            raise ConfigurationError(f"parameters is {self.parameters!r}", hint="one of 'head', 'all'")

    def _measure(self, model: WhiteBoxModel, generations: Sequence[Generation]) -> list[_Numbers]:
        results = []
        for generation in generations:
            generation.release()
            match self.parameters:
                case "head":
                    reading, squares = _of_head(model, generation)
                case "all":
                    reading, squares = _of_all(model, generation)
                case _:
                    assert_never(self.parameters)
            # In float64 the square of a small probability is still not zero.
            logp = reading.logprobs.cpu().double()
            epistemic = float(((2.0 * logp).exp() * squares).mean())
            aleatoric = float((logp.exp() * -torch.expm1(logp)).mean())
            scores = {
                "isotropic": epistemic + aleatoric,
                "isotropic_epistemic": epistemic,
                "isotropic_aleatoric": aleatoric,
            }
            results.append(_Numbers.of(reading, scores))
        return results


def _of_head(model: WhiteBoxModel, generation: Generation) -> tuple[Reading, Tensor]:
    """The reading, and ‖∂ log p_t[ŷ_t]/∂W‖² (T) in float64."""
    head = model.head
    with undisturbed(model.model, grad=False):
        states = answer_states(model, model.layout.view(model.model, {}), generation).to(head.dtype)
        reading = read_head(head, states, generation.response_token_ids)
        norms = [torch.linalg.vector_norm(each, dim=-1).cpu().double() for each in (reading.a, states)]
    return reading, (norms[0] * norms[1]) ** 2


def _of_all(model: WhiteBoxModel, generation: Generation) -> tuple[Reading, Tensor]:
    """The reading, and ‖∇ log p_t[ŷ_t]‖² (T) over all parameters, in float64.

    The parameters are leaves of our own on the same storage, so nothing is written on the caller's. They stand in a
    copy of all modules: ``torch.func.functional_call`` would put them into the caller's modules for the time of a call,
    where another thread could find them.

    Raises:
        ModelError: if not all weights are floating-point parameters of their own.
    """
    answer = generation.response_token_ids
    with undisturbed(model.model, grad=True):
        leaves = _leaves(model)
        view: Any = with_parameters(model.layout.view(model.model, {}), leaves)
        last = view.get_output_embeddings()
        head = replace(model.head, weight=last.weight, bias=last.bias)
        states = answer_states(model, view, generation)
        squares = []
        norm = _SquaredNorm()
        for leaf in leaves.values():
            leaf.register_post_accumulate_grad_hook(norm)  # type: ignore[no-untyped-call]  # torch's
        for at, token in enumerate(answer):
            # Of log p, not of p: a small factor p would drown the gradients behind it in narrow types.
            logp = torch.log_softmax(head.logits(states[at : at + 1]), dim=-1)[0, token]
            logp.backward(retain_graph=at + 1 < len(answer))  # type: ignore[no-untyped-call]  # torch's
            squares.append(norm.taken())
        reading = read_head(head, states.detach(), answer)
    return reading, torch.tensor(squares, dtype=torch.float64)


def _leaves(model: WhiteBoxModel) -> dict[int, Tensor]:
    """A leaf on the storage of every parameter, by the parameter's id; tied ones share one."""
    parameters = list(model.model.parameters())
    if getattr(model.model, "is_quantized", False) or not all(each.is_floating_point() for each in parameters):
        raise ModelError(
            f"the weights of {model.name!r} are quantised, so they have no gradient",
            hint="Isotropic(parameters='head') needs the head's alone",
        )
    return {id(each): each.detach().requires_grad_() for each in parameters}


class _SquaredNorm:
    """Adds up the squares of every gradient that is finished, and frees it at once."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def __call__(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self._parts.append(torch.linalg.vector_norm(leaf.grad, dtype=torch.float64) ** 2)
        leaf.grad = None

    def taken(self) -> float:
        """The sum since it was last taken; waiting for the device once a token, not once a parameter."""
        parts, self._parts = self._parts, []
        return float(torch.stack(parts).sum())
