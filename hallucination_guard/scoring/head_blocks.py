"""The norm of ∂ℓ/∂W = AᵀH without a product for words whose part of it two bounds tell closely enough.

With x = Σ_t w_t a_tv h_t, a word's row of ∂ℓ/∂W, its ℓ1 norm is at most Σ_t w_t |a_tv| ‖h_t‖₁ (the triangle inequality)
and at least |Σ_t w_t a_tv (y·h_t)| for every y of signs (‖x‖₁ = max y·x). With y = sign(h_s) of the tokens s that weigh
most, the second comes close wherever one token, or several that are alike, have most of the word, as in the long tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["weighted_norms"]

_SIGNS = 16  # tokens whose signs are tried
_BINS = 256  # of words, by how far apart their bounds are, from a share of 2⁻³⁰ of what may be left out
_BETWEEN = 0.2  # where between the bounds a norm is, as a rule: what is left of the error is a tenth of what it may be


def weighted_norms(a: Tensor, states: Tensor, weights: Tensor, *, block: int, least: float = 5e-5) -> Tensor:
    """Σ_vd |Σ_t w_t a_tv h_td| for each weighting w, in float64.

    It is within ``least`` of itself, and of rounding. In float64 every word is multiplied, and so it is where something
    is not finite: the norm of a broken answer must not be a guess.

    Args:
        a: A with w_t = 1 (T × V).
        states: H (T × d).
        weights: w (weightings × T), none below 0.
        block: words at a time, of which block · weightings · d floats are held.
        least: what may be left of the error, as a share of the norm.
    """
    if a.dtype == torch.float64:
        return _multiplied(a, states, weights, block)
    lower, upper = _bounds(a, states, weights)
    gap = (upper - lower).clamp_min_(0)
    open_ = (gap / lower.sum(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)).amax(dim=0)
    told = _smallest(open_, least / (1 - _BETWEEN))
    between = (lower.lerp_(upper, _BETWEEN) * told).sum(dim=1, dtype=torch.float64)
    # Many times faster than a[:, …] on a CPU.
    return between + _multiplied(a.index_select(1, (~told).nonzero()[:, 0]), states, weights, block)


def _smallest(open_: Tensor, most: float) -> Tensor:
    """Which words together stay below ``most``, the smallest ones first; none that is not a number."""
    # A sort would take a fifth of the time of all this. In one bin are words that differ by a twelfth at most.
    at = (open_ / most).log2_().mul_(_BINS / 30).add_(_BINS).nan_to_num_(nan=_BINS).clamp_(0, _BINS).long()
    sums = torch.zeros(_BINS + 1, dtype=torch.float64, device=open_.device).index_add_(0, at, open_.double())
    return at < (sums[:_BINS].cumsum(0) <= most).sum()


def _bounds(a: Tensor, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Between what each word's norm is (weightings × V)."""
    sizes, shares = a.abs(), weights * states.abs().sum(dim=1)
    upper = shares @ sizes
    most = (shares * sizes.sum(dim=1) / upper.sum(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)).amax(dim=0)
    del sizes  # as large as A
    signs = states[most.topk(min(_SIGNS, len(most))).indices].sign()
    along = (signs @ states.T) * weights[:, None]  # weightings × signs × T
    lower = torch.stack([(each @ a).abs_().amax(dim=0) for each in along])
    return lower, upper


def _multiplied(a: Tensor, states: Tensor, weights: Tensor, block: int) -> Tensor:
    # w_t belongs to A's row t; it may as well stand on H's, which is narrower. All gradients then are one product.
    weighted = torch.cat([states * weight[:, None] for weight in weights], dim=1).T
    product = weighted.new_empty(weighted.shape[0], block)
    norms = torch.zeros(weighted.shape[0], dtype=torch.float64, device=a.device)
    for part in torch.split(a, block, dim=1):
        # In a cache, where it is summed at once, and along what lies side by side.
        out = product[:, : part.shape[1]]
        torch.mm(weighted, part, out=out)
        norms += out.abs_().sum(dim=1)
    return norms.view(len(weights), -1).sum(dim=1)
