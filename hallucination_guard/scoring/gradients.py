"""The shared arithmetic of all gradient scores: one walk over the head, one replay, one backward.

Source: arXiv 2605.04638 (SemGrad, ParaGrad, ExGrad, HybridGrad). Symbols as there: p_t the distribution that predicts
ŷ_t, ω_t = H(p_t) its entropy in nats (detached), W the head (V × d), H the final states (T × d),
ℓ(w) = −Σ_t w_t log p_t[ŷ_t].

∂ℓ/∂H comes from the walk over the head (:mod:`hallucination_guard.scoring.head_walk`); the backward through the deep
half begins there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from hallucination_guard.errors import ConfigurationError, ScoringError
from hallucination_guard.model.head import Head
from hallucination_guard.model.replay import Replay, Trace, replay
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.head_walk import Reading, Walk, read_head, walk_heads
from hallucination_guard.scoring.parts import ON_A_CPU, parts_of
from hallucination_guard.scoring.states import states_of
from hallucination_guard.values import Anchor, Generation, Prefix, States

__all__ = [
    "GradientSettings",
    "Likelihoods",
    "Measured",
    "Thinking",
    "at_anchor",
    "check_felt",
    "counted_tokens",
    "loss_scale",
    "measure",
    "measure_where",
    "measured_of",
]

_TRIES, _LESS = 5, 4  # for float16: how often the backward is run again, each time with 1/2⁴ of the size
_MOST = 32 * 2**20  # bytes of A that are held at a time


Thinking: TypeAlias = Literal["left_out", "counted", "apart"]


def counted_tokens(generation: Generation, thinking: Thinking) -> tuple[int, ...]:
    """The tokens of an answer that are scored."""
    return generation.response_token_ids[0 if thinking == "counted" else generation.thinking :]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSettings:
    """What the paper and its code leave open.

    Args:
        layers: ``paper`` l = ⌊L/2⌋+1 … L−1; ``official`` (the published code) the last ⌊L/2⌋ of 0 … L−1.
        reduction: ``sum`` over the answer's tokens (the paper's formula) or ``mean`` (the published code).
        weighting: ``entropy`` w_t = ω_t, or ``none`` w_t = 1 (the ablation) for SemGrad.
        thinking: of a reasoning model's thinking: ``left_out`` of all scores, ``counted`` like the answer, or
            ``apart``: left out, and its own likelihood scores under ``thinking_…``.
    """

    layers: Literal["paper", "official"] = "paper"
    reduction: Literal["sum", "mean"] = "sum"
    weighting: Literal["entropy", "none"] = "entropy"
    thinking: Thinking = "left_out"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("layers", ("paper", "official")),
            ("reduction", ("sum", "mean")),
            ("weighting", ("entropy", "none")),
            ("thinking", get_args(Thinking)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}", hint=f"one of {', '.join(map(repr, allowed))}"
                )

    def counted(self, generation: Generation) -> tuple[int, ...]:
        """ŷ: the tokens of an answer whose terms are in the loss, which are its last ones."""
        return counted_tokens(generation, self.thinking)

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
        states: for a probe; None where the deep half did not run.
    """

    entropies: tuple[float, ...]
    logprobs: tuple[float, ...]
    prefix: Prefix
    states: States | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Likelihoods):
    """What a whole pass gives for one example."""

    semgrad: float
    paragrad: float
    exgrad: float


def measure(model: WhiteBoxModel, generations: Sequence[Generation], settings: GradientSettings) -> list[Measured]:
    """Score a batch of generations of any lengths, those of like length with one backward.

    The examples are independent, so the gradient of the sum of their losses holds each one's own gradient, row by row.

    Args:
        model: a :class:`~hallucination_guard.WhiteBoxModel`.
        generations: each with an anchor and at least one answer token.
        settings: see :class:`GradientSettings`.
    """
    found = measure_where(model, generations, settings, None)
    return [each for each in found if isinstance(each, Measured)]  # which is all


def measure_where(
    model: WhiteBoxModel,
    generations: Sequence[Generation],
    settings: GradientSettings,
    wanted: Callable[[Likelihoods], bool] | None,
) -> list[Likelihoods]:
    """Score a batch as :func:`measure` does, and stop after the forward where the gradient is not wanted.

    Args:
        model: as for :func:`measure`.
        generations: as for :func:`measure`.
        settings: as for :func:`measure`.
        wanted: whether the gradient of an example is, judging by its likelihoods; None for always.

    Returns:
        One an example, in order: :class:`Measured` where it was wanted.
    """
    layers = settings.deep(model.layout.depth)
    traces = [model.trace(generation, layers) for generation in generations]
    found: dict[int, Likelihoods] = {}
    with undisturbed(model.model, grad=True):
        if wanted is not None:
            # Where the logits were kept, an answer whose gradient is not wanted needs no forward at all.
            for at, (trace, generation) in enumerate(zip(traces, generations, strict=True)):
                if trace.logits is not None:
                    answer = settings.counted(generation)
                    reading = read_head(model.head, None, answer, logits=trace.logits[-len(answer) :])
                    cheap = _likelihoods(reading, trace.origin)
                    if not wanted(cheap):
                        found[at] = cheap
        rest = [at for at in range(len(traces)) if at not in found]
        most = ON_A_CPU if model.device.type == "cpu" else None
        for part in parts_of([len(traces[at].states) for at in rest], most=most):
            own = [rest[at] for at in part]
            found |= zip(
                own,
                _together(model, [traces[at] for at in own], [generations[at] for at in own], settings, layers, wanted),
                strict=True,
            )
    return [found[at] for at in range(len(traces))]


def _together(
    model: WhiteBoxModel,
    traces: Sequence[Trace],
    generations: Sequence[Generation],
    settings: GradientSettings,
    layers: range,
    wanted: Callable[[Likelihoods], bool] | None,
) -> list[Likelihoods]:
    """One pass: forward, head, and a backward where it is wanted."""
    head = model.head
    run = replay(model.model, model.layout, traces, layers, whole=True)
    answers = [settings.counted(generation) for generation in generations]
    found: list[Likelihoods] = []
    walks: dict[int, Walk] = {}
    groups = list(_in_memory(answers, head))
    # Written over by the next group: memory that is new costs more than what is computed in it.
    most, longest = max(sum(len(answers[row]) for row in rows) for rows in groups), max(map(len, answers))
    room, scratch = (head.weight.new_empty(each, len(head.weight), dtype=head.dtype) for each in (most, longest))
    for rows in groups:
        states = [run.final[row, _predicting(traces[row], answers[row])].detach().to(head.dtype) for row in rows]
        lengths = [len(own) for own in states]
        readings = [
            read_head(
                head, own, answers[row], logits=_last(traces[row].logits, len(own)), room=(a, scratch[: len(own)])
            )
            for row, own, a in zip(rows, states, torch.split(room[: sum(lengths)], lengths), strict=True)
        ]
        found += [
            _likelihoods(
                reading,
                traces[row].origin,
                states_of(run, row, _own(traces[row], answers[row]), layers, model.layout.depth),
            )
            for row, reading in zip(rows, readings, strict=True)
        ]
        chosen = [at for at, row in enumerate(rows) if wanted is None or wanted(found[row])]
        walked = walk_heads(
            head, [states[at] for at in chosen], [readings[at] for at in chosen], weighting=settings.weighting
        )
        walks |= zip((rows[at] for at in chosen), walked, strict=True)
    if not walks:
        return found
    rows_of = list(walks)
    if 2 * len(walks) < len(traces):
        # A backward through this graph pays for every example. Both ways through a few cost less.
        del run
        traces, generations = [traces[row] for row in rows_of], [generations[row] for row in rows_of]
        run = replay(model.model, model.layout, traces, layers)
        walks = dict(enumerate(walks.values()))
    norms = _norms(model, generations, traces, run, walks, layers, settings)
    width = len(layers) * run.final.shape[-1]
    for row, at in zip(rows_of, walks, strict=True):
        semgrad = float(norms[at]) / width
        head_norms = (walks[at].paragrad, walks[at].exgrad)
        found[row] = measured_of(found[row], head_norms, semgrad, len(answers[row]), settings)
    return found


def _in_memory(answers: Sequence[Sequence[int]], head: Head) -> Iterator[range]:
    """The examples, as many at a time as may have their A (T × V) in memory together; at least one."""
    most = _MOST // (head.weight.shape[0] * head.dtype.itemsize)
    begin = tokens = 0
    for at, answer in enumerate(answers):
        if at > begin and tokens + len(answer) > most:
            yield range(begin, at)
            begin, tokens = at, 0
        tokens += len(answer)
    yield range(begin, len(answers))


def _last(logits: Sequence[Tensor] | None, tokens: int) -> Sequence[Tensor] | None:
    return None if logits is None else logits[-tokens:]


def _predicting(trace: Trace, answer: Sequence[int]) -> slice:
    """The positions whose logits predict ŷ_1 … ŷ_T, in the states from t* on."""
    stop = trace.states.shape[0]
    return slice(stop - len(answer), stop)


def _own(trace: Trace, answer: Sequence[int]) -> slice:
    """The positions of the answer's tokens, as far as they were read; of a single unread one, what predicts it."""
    stop = trace.entering.shape[0]
    begin = trace.states.shape[0] - len(answer) + 1
    return slice(min(begin, stop - 1), stop)


def _norms(
    model: WhiteBoxModel,
    generations: Sequence[Generation],
    traces: Sequence[Trace],
    run: Replay,
    walks: Mapping[int, Walk],
    layers: range,
    settings: GradientSettings,
) -> Tensor:
    """The backward: for each example of ``run`` Σ_l ‖∂ℓ/∂h_{l,t*}‖₁, 0 for those without a walk."""
    upstream = torch.zeros_like(run.final, dtype=model.head.dtype)
    for row, walk in walks.items():
        rows = _predicting(traces[row], settings.counted(generations[row]))
        upstream[row, rows] = walk.by_states.to(upstream)
    by_layer = at_anchor(run, upstream).abs().sum(dim=2)
    check_felt(model, generations, layers, by_layer, upstream)
    return by_layer.sum(dim=0)


def at_anchor(run: Replay, upstream: Tensor) -> Tensor:
    """The backward: ∂ℓ/∂h_{l,t*} (layers × B × d, float64, on the CPU) from ∂ℓ/∂H (B × S × d, float32 or more)."""
    half = run.final.dtype == torch.float16
    exponent = loss_scale(upstream, run.final.dtype)
    for _ in range(_TRIES if half else 1):
        scaled = torch.ldexp(upstream, exponent).to(run.final)
        gradients = torch.autograd.grad(run.final, run.states, grad_outputs=scaled, retain_graph=half)
        found = run.at_anchor(gradients)
        overflown = ~torch.isfinite(found).all(dim=2).all(dim=0)
        if not overflown.any():
            break
        exponent[overflown.to(exponent.device)] -= _LESS
    return torch.ldexp(found, -exponent[:, 0].to(found))


def loss_scale(upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The exponents of 2 (… × 1 × 1) by which each ∂ℓ/∂H (… × S × d) is to be multiplied for a backward in ``dtype``.

    Numbers below 6e-8 are 0 in float16 and above 65504 infinite, so there the largest is brought to about 1. Every
    other type has the range for it: 0.
    """
    size = upstream.abs().amax(dim=(-2, -1), keepdim=True)
    if dtype != torch.float16:
        return torch.zeros_like(size)
    return torch.where(size > 0, -torch.log2(size.clamp_min(torch.finfo(size.dtype).tiny)), 0.0).round()


def check_felt(
    model: WhiteBoxModel, generations: Sequence[Generation], layers: range, by_layer: Tensor, upstream: Tensor
) -> None:
    """See that a gradient came back wherever one must.

    Args:
        model: a :class:`~hallucination_guard.WhiteBoxModel`.
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
        raise ScoringError("the gradient is zero although the answer is not certain", hint="load the model again")


def _anchor(generation: Generation) -> Anchor:
    assert generation.anchor is not None  # model.trace saw to it
    return generation.anchor


def _likelihoods(reading: Reading, prefix: Prefix, states: States | None = None) -> Likelihoods:
    entropies, logprobs = tuple(reading.entropies.tolist()), tuple(reading.logprobs.tolist())
    return Likelihoods(entropies=entropies, logprobs=logprobs, prefix=prefix, states=states)


def measured_of(
    likelihoods: Likelihoods, norms: tuple[float, float], semgrad: float, length: int, settings: GradientSettings
) -> Measured:
    """All that one pass gives of an answer of ``length`` tokens; ``norms`` are ParaGrad and ExGrad of the sum."""
    share = 1.0 if settings.reduction == "sum" else 1.0 / length
    return Measured(
        semgrad=semgrad * share,
        paragrad=norms[0] * share,
        exgrad=norms[1] * share,
        entropies=likelihoods.entropies,
        logprobs=likelihoods.logprobs,
        prefix=likelihoods.prefix,
        states=likelihoods.states,
    )
