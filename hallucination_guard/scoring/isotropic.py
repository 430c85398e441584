"""Isotropic: how far the answer's probability would move if the parameters did, the same in every direction.

Source: arXiv 2603.29466. There, one prediction has epistemic uncertainty ‖∇_θ p‖² (first order in θ, whose covariance
is taken to be isotropic; its unknown scale is left at 1) and aleatoric uncertainty p(1 − p), the Bernoulli variance.
The paper leaves open what p and θ are for an answer of T tokens. Here:

p_t   the probability of the answer token ŷ_t given everything before it: softmax at temperature 1, unfiltered, computed
      in float32, or float64 for a float64 model; the answer's value is the *mean* over its T tokens
θ     ``head``: W (V × d), a variable of its own, also where it is tied to the input embedding; no bias
      ``all``: every parameter of the model, whatever its ``requires_grad``; a tied one counts once, with the total
      derivative through all its uses

With a_t = p_t − onehot(ŷ_t), pulled back through soft cap and scale, and h_t the final state, ∂p_t[ŷ_t]/∂W is
−p_t[ŷ_t] a_t h_tᵀ: an outer product, whose norm is that of its factors: ‖·‖² = p_t[ŷ_t]² ‖a_t‖² ‖h_t‖². It needs one
forward pass, no backward and no V × d.

``all`` costs one forward pass with a graph over prompt and answer, whose activations stay until the end, and T backward
passes through all of it. A gradient is measured and freed as soon as it is whole, so what is held besides is about one
parameter's gradient; of a tied matrix the head's part waits in the engine until the embedding's part arrives.

None of this looks at t*: it works without an anchor.
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
            pass; ``all``: all parameters of the model, T backward passes. See the module's text.
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
            # In float64 the square of a small probability is still not nil.
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
