"""The shared arithmetic of all gradient scores: one replay, one backward, one walk over the head.

Source: arXiv 2605.04638 (SemGrad, ParaGrad, ExGrad, HybridGrad). Symbols as there: p_t the distribution that predicts
ŷ_t, ω_t = H(p_t) its entropy in nats (detached), W the head (V × d), H the final states (T × d),
ℓ(w) = −Σ_t w_t log p_t[ŷ_t].

With A_t = w_t (p_t − onehot(ŷ_t)), pulled back through whatever the head does besides W:
∂ℓ/∂W = Aᵀ H and ∂ℓ/∂H = A W. The first needs no backward and is summed in blocks of V, so that V × d is never held; the
second is where the backward through the deep half begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hallucination_guard.errors import ConfigurationError, ScoringError
from hallucination_guard.head import Head
from hallucination_guard.replay import Replay, Trace, replay
from hallucination_guard.types import Anchor, Generation, Prefix
from hallucination_guard.view import undisturbed

__all__ = [
    "GradientSettings",
    "Likelihoods",
    "Measured",
    "Reading",
    "Walk",
    "answer_states",
    "at_anchor",
    "check_felt",
    "loss_scale",
    "measure",
    "measure_where",
    "read_head",
    "walk_head",
]

_TRIES, _LESS = 5, 4  # for float16: how often the backward is run again, each time with 1/2⁴ of the size
_BLOCK = 2048  # words of the vocabulary at a time: block × 2d floats are held


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSettings:
    """What the paper and its code leave open.

    Args:
        layers: ``paper`` l = ⌊L/2⌋+1 … L−1; ``official`` (the published code) the last ⌊L/2⌋ of 0 … L−1.
        reduction: ``sum`` over the answer's tokens (the paper's formula) or ``mean`` (the published code).
        weighting: ``entropy`` w_t = ω_t, or ``none`` w_t = 1 (the ablation) for SemGrad.
    """

    layers: Literal["paper", "official"] = "paper"
    reduction: Literal["sum", "mean"] = "sum"
    weighting: Literal["entropy", "none"] = "entropy"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("layers", ("paper", "official")),
            ("reduction", ("sum", "mean")),
            ("weighting", ("entropy", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}", hint=f"one of {', '.join(map(repr, allowed))}"
                )

    def deep(self, depth: int) -> range:
        """The l whose h_{l,t*} count, for a model of L = ``depth`` layers.

        Raises:
            ConfigurationError: if there is none.
        """
        layers = range(depth // 2 + 1, depth) if self.layers == "paper" else range(max(1, depth - depth // 2), depth)
        if not layers:
            raise ConfigurationError(
                f"a model of {depth} layers has no layer in the deep half as the paper counts it",
                hint="layers='official' starts one layer earlier",
            )
        return layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihoods:
    """What the forward half of a pass gives for one example.

    Args:
        entropies: ω_t, length T.
        logprobs: log p_t[ŷ_t], length T.
        prefix: where what comes before t* was read.
    """

    entropies: tuple[float, ...]
    logprobs: tuple[float, ...]
    prefix: Prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Likelihoods):
    """What a whole pass gives for one example."""

    semgrad: float
    paragrad: float
    exgrad: float


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


def measure(model: Any, generations: Sequence[Generation], settings: GradientSettings) -> list[Measured]:
    """Score a batch of generations of any lengths with one backward.

    The examples are independent, so the gradient of the sum of their losses holds each one's own gradient, row by row.

    Args:
        model: a :class:`~hallucination_guard.model.WhiteBoxModel`.
        generations: each with an anchor and at least one answer token.
        settings: see :class:`GradientSettings`.
    """
    found = measure_where(model, generations, settings, lambda _: True)
    return [each for each in found if isinstance(each, Measured)]  # which is all


def measure_where(
    model: Any,
    generations: Sequence[Generation],
    settings: GradientSettings,
    wanted: Callable[[Likelihoods], bool],
) -> list[Likelihoods]:
    """Score a batch as :func:`measure` does, and stop after the forward where the gradient is not wanted.

    Args:
        model: as for :func:`measure`.
        generations: as for :func:`measure`.
        settings: as for :func:`measure`.
        wanted: whether the gradient of an example is, judging by its likelihoods.

    Returns:
        One an example, in order: :class:`Measured` where it was wanted.
    """
    layers = settings.deep(model.layout.depth)
    traces = [model.trace(generation, layers) for generation in generations]
    answers = [generation.response_token_ids for generation in generations]
    found: dict[int, Likelihoods] = {}
    readings: dict[int, Reading] = {}

    def look(at: int, states: Tensor | None) -> None:
        readings[at] = read_head(model.head, states, answers[at], logits=traces[at].logits)
        found[at] = _likelihoods(readings[at], traces[at].origin)
        if not wanted(found[at]):
            del readings[at]

    with undisturbed(model.model, grad=True):
        # Where the logits were kept, an answer whose gradient is not wanted needs no forward at all.
        for at, trace in enumerate(traces):
            if trace.logits is not None:
                look(at, None)
        run_of = [at for at in range(len(traces)) if at in readings or at not in found]
        if not run_of:
            return [found[at] for at in range(len(traces))]
        run = replay(model.model, model.layout, [traces[at] for at in run_of], layers)

        def states(row: int, at: int) -> Tensor:
            return run.final[row, _predicting(traces[at], answers[at])].detach().to(model.head.dtype)

        for row, at in enumerate(run_of):
            if at not in found:
                look(at, states(row, at))
        walks = {
            row: walk_head(
                model.head, states(row, at), answers[at], weighting=settings.weighting, reading=readings.pop(at)
            )
            for row, at in enumerate(run_of)
            if at in readings
        }
        chosen = [run_of[row] for row in walks]
        if chosen and 2 * len(chosen) < len(run_of):
            # A backward through this graph pays for every example. Both ways through a few cost less.
            del run
            run_of, walks = chosen, dict(enumerate(walks.values()))
            run = replay(model.model, model.layout, [traces[at] for at in run_of], layers)
        if chosen:
            norms = _norms(model, [generations[at] for at in run_of], [traces[at] for at in run_of], run, walks, layers)
    width = len(layers) * model.head.weight.shape[1]
    for at, (row, walk) in zip(chosen, walks.items(), strict=True):
        found[at] = _measured(found[at], walk, float(norms[row]) / width, len(answers[at]), settings)
    return [found[at] for at in range(len(traces))]


def _predicting(trace: Trace, answer: Sequence[int]) -> slice:
    """The positions whose logits predict ŷ_1 … ŷ_T, in the states from t* on."""
    stop = trace.states.shape[0]
    return slice(stop - len(answer), stop)


def _norms(
    model: Any,
    generations: Sequence[Generation],
    traces: Sequence[Trace],
    run: Replay,
    walks: Mapping[int, Walk],
    layers: range,
) -> Tensor:
    """The backward: for each example of ``run`` Σ_l ‖∂ℓ/∂h_{l,t*}‖₁, nil for those without a walk."""
    upstream = torch.zeros_like(run.final, dtype=model.head.dtype)
    for row, walk in walks.items():
        rows = _predicting(traces[row], generations[row].response_token_ids)
        upstream[row, rows] = walk.by_states.to(upstream)
    by_layer = at_anchor(run, upstream).abs().sum(dim=2)
    check_felt(model, generations, layers, by_layer, upstream)
    return by_layer.sum(dim=0)


def at_anchor(run: Replay, upstream: Tensor) -> Tensor:
    """The backward: ∂ℓ/∂h_{l,t*} (layers × B × d, float64, on the CPU) from ∂ℓ/∂H (B × S × d, float32 or more)."""
    exponent = loss_scale(upstream, run.final.dtype)
    for _ in range(_TRIES):
        scaled = torch.ldexp(upstream, exponent).to(run.final)
        found = run.at_anchor(torch.autograd.grad(run.final, run.states, grad_outputs=scaled, retain_graph=True))
        overflown = ~torch.isfinite(found).all(dim=2).all(dim=0)
        if run.final.dtype != torch.float16 or not overflown.any():
            break
        exponent[overflown.to(exponent.device)] -= _LESS
    return torch.ldexp(found, -exponent[:, 0].to(found))


def loss_scale(upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The exponents of 2 (… × 1 × 1) by which each ∂ℓ/∂H (… × S × d) is to be multiplied for a backward in ``dtype``.

    Numbers below 6e-8 are nil in float16 and above 65504 infinite, so there the largest is brought to about 1. Every
    other type has the range for it: 0.
    """
    size = upstream.abs().amax(dim=(-2, -1), keepdim=True)
    if dtype != torch.float16:
        return torch.zeros_like(size)
    return torch.where(size > 0, -torch.log2(size.clamp_min(torch.finfo(size.dtype).tiny)), 0.0).round()


def check_felt(
    model: Any, generations: Sequence[Generation], layers: range, by_layer: Tensor, upstream: Tensor
) -> None:
    """See that a gradient came back wherever one must.

    Args:
        model: a :class:`~hallucination_guard.model.WhiteBoxModel`.
        generations: B examples.
        layers: the l that were asked for.
        by_layer: ‖∂ℓ/∂h_{l,t*}‖₁ (layers × B), on the CPU.
        upstream: ∂ℓ/∂H (B × S × d).

    Raises:
        ScoringError: if the answer is uncertain and nothing comes back at t*.
    """
    doubtful = upstream.abs().sum(dim=(1, 2)).cpu() > 0
    steps = torch.tensor([-_anchor(generation).index - 1 for generation in generations])  # from t* to the first token
    felt = torch.tensor([model.layout.reach(model.model, level) for level in layers])[:, None] >= steps
    if ((by_layer == 0) & felt & doubtful).any():
        # Somewhere a backward is missing. 0 would say "certain".
        raise ScoringError("the gradient is nil although the answer is not certain", hint="load the model again")


def _anchor(generation: Generation) -> Anchor:
    assert generation.anchor is not None  # model.trace saw to it
    return generation.anchor


def _likelihoods(reading: Reading, prefix: Prefix) -> Likelihoods:
    entropies, logprobs = tuple(reading.entropies.tolist()), tuple(reading.logprobs.tolist())
    return Likelihoods(entropies=entropies, logprobs=logprobs, prefix=prefix)


def _measured(
    likelihoods: Likelihoods, walk: Walk, semgrad: float, length: int, settings: GradientSettings
) -> Measured:
    share = 1.0 if settings.reduction == "sum" else 1.0 / length
    return Measured(
        semgrad=semgrad * share,
        paragrad=walk.paragrad * share,
        exgrad=walk.exgrad * share,
        entropies=likelihoods.entropies,
        logprobs=likelihoods.logprobs,
        prefix=likelihoods.prefix,
    )


def answer_states(model: Any, view: Any, generation: Generation) -> Tensor:
    """H, the final states that predict the answer (T × d), by one pass over the whole sequence.

    Args:
        model: a :class:`~hallucination_guard.model.WhiteBoxModel`.
        view: of it; the caller says whether with a graph.
        generation: with at least one answer token.
    """
    answer = generation.response_token_ids
    ids = torch.tensor([(*generation.prompt_token_ids, *answer[:-1])], device=model.device)
    final: Tensor = model.layout.decoder_of(view)(input_ids=ids, use_cache=False).last_hidden_state
    return final[0, -len(answer) :]


@torch.no_grad()
def read_head(
    head: Head, states: Tensor | None, answer: Sequence[int], *, logits: Sequence[Tensor] | None = None
) -> Reading:
    """Likelihoods of an answer from its final states (T × d), and where the head's gradient begins.

    Args:
        head: of the model.
        states: H, the final states that predict the answer; may be None where the logits are at hand.
        answer: ŷ, length T.
        logits: of these states, a row of V for each token, where they are at hand.
    """
    if logits is not None:
        rows = torch.stack(list(logits)).to(head.dtype)
    else:
        assert states is not None
        rows = head.logits(states)
    logp = torch.log_softmax(rows, dim=-1)
    targets = torch.tensor(answer, device=logp.device)[:, None]
    logprobs = logp.gather(1, targets)[:, 0]
    p = logp.exp()
    # p·log p is 0 where p is; a masked word (−∞) would make it NaN.
    entropies = -torch.linalg.vecdot(p, logp.clamp_min_(torch.finfo(logp.dtype).min))
    a = p.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=p.dtype))
    return Reading(entropies=entropies, logprobs=logprobs, a=head.pulled_back(a, rows))


@torch.no_grad()
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
    reading = reading or read_head(head, states, answer)
    a, entropies = reading.a, reading.entropies
    # ω_t belongs to A's row t; it may as well stand on H's, which is narrower. Both gradients then are one product
    # (2d × V, transposed, so that each is one stretch of memory), and a block of it is summed while it is at hand.
    both = torch.cat([states * entropies[:, None], states], dim=1).T.contiguous()
    norms = torch.zeros(2, dtype=torch.float64, device=both.device)
    by_states = torch.zeros_like(states)
    block = both.new_empty(len(both), min(_BLOCK, a.shape[1]))
    for begin in range(0, a.shape[1], _BLOCK):
        part = a[:, begin : begin + _BLOCK]
        if part.shape[1] < block.shape[1]:
            block = both.new_empty(len(both), part.shape[1])
        torch.mm(both, part, out=block)
        norms += block.abs_().view(2, -1).sum(dim=1)
        by_states.addmm_(part, head.weight[begin : begin + _BLOCK].to(head.dtype))
    if weighting == "entropy":
        by_states *= entropies[:, None]
    paragrad, exgrad = (norms / head.weight.numel()).tolist()
    return Walk(
        paragrad=paragrad,
        exgrad=exgrad,
        entropies=entropies,
        logprobs=reading.logprobs,
        by_states=by_states,
    )
