"""Can this model's gradient be trusted? Asked once, on loading, with a dozen tokens.

A quantised or patched model can answer perfectly and have a gradient that is zero everywhere; its scores would all read
"certain". An architecture can do something between final states and logits that the closed form does not know. So:

1. the logits from the replayed deep half and the head's formula are those of the model's own forward pass;
2. the gradient at every deep layer is finite and not zero;
3. along its own direction it is what a finite difference says (plain float32 and float64 weights only: below that, or
   where weights or activations are rounded to integers, a small step is lost in the rounding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hallucination_guard.errors import SelfTestFailed
from hallucination_guard.model.inside import Inside
from hallucination_guard.model.reading import trace_ids
from hallucination_guard.model.replay import Replay, Trace, replay
from hallucination_guard.model.view import undisturbed

__all__ = ["SelfTest", "self_test"]

_PREFIX, _ANSWER = 6, 6
_LOGIT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
_SLOPE_TOLERANCE = {torch.float64: 0.05, torch.float32: 0.05}  # norms and softmax compute in float32 in both
_STEPS = {torch.float64: (1e-3, 1e-4), torch.float32: (1e-2, 1e-3, 1e-4)}  # of the size of the state


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What was found.

    Args:
        logit_error: root mean square difference to the model's own logits, relative to their spread.
        gradient_norm: ℓ2 norm of the gradient over the deep layers at the anchor.
        slope_error: relative difference between gradient and finite difference; None below float32 and where quantised.
    """

    logit_error: float
    gradient_norm: float
    slope_error: float | None


def self_test(model: Inside) -> SelfTest:
    """Run the test on a :class:`~hallucination_guard.WhiteBoxModel`.

    Raises:
        SelfTestFailed: with what is wrong and what usually causes it.
    """
    if not model.deep_layers:
        raise SelfTestFailed(
            f"{model.name!r} has {model.layout.depth} layers", hint="a deep half needs at least three layers"
        )
    with undisturbed(model.model, grad=True):
        return _tested(model, model.deep_layers)


def _tested(model: Inside, layers: range) -> SelfTest:
    ids = _token_ids(model)
    view = model.layout.view(model.model, {})
    with torch.no_grad():
        out = view(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    own = out.logits[0, _PREFIX - 1 : -1].to(model.head.dtype)
    answer = ids[0, _PREFIX:]
    trace = trace_ids(model, ids[0].tolist(), _PREFIX - 3, layers)
    run = replay(model.model, model.layout, [trace], layers)
    logits = model.head.logits(run.final[0, -_ANSWER:].detach())
    # Not the largest: single bfloat16 logits are off by a fifth of the spread on a model that is in order.
    error = float((logits - own).square().mean().sqrt() / own.std().clamp_min(1e-12))
    if not error <= _LOGIT_TOLERANCE[torch.bfloat16 if _quantised(model.model) else model.model.dtype]:
        raise SelfTestFailed(
            f"the logits of {model.name!r} cannot be computed from its final states (relative difference {error:.2g})",
            hint="its head does more than a matrix, bias, scale and soft cap, or its cache cannot be cut at a token",
        )
    norms = _gradient(model, run, answer).norm(dim=1).tolist()
    if not all(map(math.isfinite, norms)):
        raise SelfTestFailed(
            f"the gradient of {model.name!r} is not finite", hint="load it in bfloat16 or float32 rather than float16"
        )
    if not all(norms):
        raise SelfTestFailed(
            f"the gradient of {model.name!r} is zero at some layer, so answers would look certain",
            hint="its quantised kernels have no backward: use weight-only quantisation or an unquantised model",
        )
    slope = _slope_error(model, trace, layers, answer)
    if slope is not None and not slope <= _SLOPE_TOLERANCE[model.model.dtype]:
        raise SelfTestFailed(
            f"the gradient of {model.name!r} differs from a finite difference by {slope:.2g} of its size",
            hint="some layer's backward is only an approximation of its forward",
        )
    return SelfTest(logit_error=error, gradient_norm=math.hypot(*norms), slope_error=slope)


def _quantised(model: nn.Module) -> bool:
    """Whether weights are stored in a coarser type than the model says: some kernels then round the states as well."""
    tensors = (*model.parameters(), *model.buffers())
    return getattr(model, "hf_quantizer", None) is not None or any(
        type(each) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or each.dtype in (torch.int8, torch.uint8)
        for each in tensors
    )


def _token_ids(model: Inside) -> Tensor:
    """A dozen different ids, spread over the vocabulary."""
    count = _PREFIX + _ANSWER
    ids = [(at * 7919 + 13) % model.vocabulary for at in range(1, count + 1)]
    return torch.tensor([ids], device=model.device)


def _loss(model: Inside, final: Tensor, answer: Tensor) -> Tensor:
    logp = torch.log_softmax(model.head.logits(final[0, -_ANSWER:]), dim=-1)
    return -logp.gather(1, answer.to(logp.device)[:, None]).sum()


def _gradient(model: Inside, run: Replay, answer: Tensor) -> Tensor:
    """∂ℓ/∂h_{l,t*} (layers × d, float64, on the CPU)."""
    loss = _loss(model, run.final, answer)
    if not loss.requires_grad:  # no operation on the way recorded itself
        return torch.zeros(len(run.states), run.final.shape[-1])
    wanted = [each for each in run.states if each.requires_grad]
    found = dict(zip(map(id, wanted), torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
    gradients = [found.get(id(each)) for each in run.states]
    whole = [torch.zeros_like(s) if g is None else g for s, g in zip(run.states, gradients, strict=True)]
    return run.at_anchor(whole)[:, 0]


def _slope_error(model: Inside, trace: Trace, layers: range, answer: Tensor) -> float | None:
    """Central differences of the loss along the first deep layer's gradient, against that gradient's norm.

    The smallest error of several steps: a long one meets the curvature, which is strong where a few dimensions make up
    most of a state (Gemma 3), a short one the rounding. A gradient that is wrong agrees with none.
    """
    if model.model.dtype not in _SLOPE_TOLERANCE or _quantised(model.model):
        return None
    run = replay(model.model, model.layout, [trace], layers)
    gradient = _gradient(model, run, answer)[0]
    norm = float(gradient.norm())
    state = trace.states[trace.row]
    direction = (gradient / max(norm, 1e-30)).to(state)
    errors = []
    for share in _STEPS[model.model.dtype]:
        step = float(state.norm()) * share
        losses = []
        for sign in (1.0, -1.0):
            moved = trace.states.clone()
            moved[trace.row] = state + sign * step * direction
            there = replace(trace, states=moved)
            with torch.no_grad():
                losses.append(float(_loss(model, replay(model.model, model.layout, [there], layers).final, answer)))
        errors.append(abs((losses[0] - losses[1]) / (2 * step) - norm) / max(norm, 1e-30))
    return min(errors)
