"""Which tokens count in which words of ∂ℓ/∂W = AᵀH: a sum of outer products of which most entries are all but nil.

Leaving the entries (t, v) of a set R out of A changes Σ_vd |Σ_t w_t a_tv h_td| by at most Σ_R w_t |a_tv| ‖h_t‖₁, by the
triangle inequality. Words are ordered by their share of the norm, so that those that few tokens find possible come
together; in a block of words only those tokens are multiplied that are felt there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["felt_blocks"]


def felt_blocks(
    a: Tensor, weighted: Tensor, *, block: int, least: float = 1e-5
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The parts of A that are felt, a block of words at a time.

    For each weighting w, what is left out takes at most ``least`` · Σ_t w_t ‖a_t‖₁ ‖h_t‖₁ from the norm. In float64
    nothing is left out, and nothing of what is not finite: the norm of a broken answer must not be that of a part.

    Args:
        a: A with w_t = 1 (T × V).
        weighted: w_t ‖h_t‖₁ (weightings × T).
        block: words at a time.
        least: the share of the norm that may be left out.

    Yields:
        Some rows of some columns of ``a`` (t × at most ``block``), and which rows they are; None for all of them.
    """
    sizes = a.abs()
    whole = weighted * sizes.sum(dim=1)
    # Of each token, for the weighting under which it is the largest part: what is little of that is little of all.
    share = (weighted / whole.sum(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)).amax(dim=0)
    words = share @ sizes
    if a.dtype == torch.float64 or not bool(words.isfinite().all()):
        yield from ((part, None) for part in torch.split(a, block, dim=1))
        return
    del sizes  # as large as A
    ascending, order = words.sort()
    cut = int((ascending.cumsum(0, dtype=torch.float64) <= least / 2).sum())
    kept = a.index_select(1, order[cut:])  # many times faster than a[:, …] on a CPU
    begins = range(0, kept.shape[1], block)
    if not begins:
        return
    shares = torch.stack([kept[:, at : at + block].abs().sum(dim=1) for at in begins]) * share  # blocks × T
    ascending, order = shares.flatten().sort()
    left_out = order[: int((ascending.cumsum(0, dtype=torch.float64) <= least / 2).sum())]
    felt = torch.ones_like(shares, dtype=torch.bool)
    felt.view(-1)[left_out] = False
    rows = torch.split(felt.nonzero()[:, 1], felt.sum(dim=1).tolist())
    for at, some in zip(begins, rows, strict=True):
        part = kept[:, at : at + block]
        yield (part, None) if len(some) == len(part) else (part.index_select(0, some), some)
