"""The scorers: what is measured under which name. Higher = less certain (but for ``min_token_logprob``).

Source: arXiv 2605.04638. SemGrad is the mean over the deep layers l and d dimensions of |∂ℓ(ω)/∂h_{l,t*}|, ParaGrad
the mean over V × d of |∂ℓ(ω)/∂W|, ExGrad the same with w_t = 1, HybridGrad (1 − e^(−ω̄)) · SemGrad + e^(−ω̄) · ParaGrad
with ω̄ the mean token entropy; Likelihood takes no gradient.

Each gradient scorer measures everything, since one pass gives everything; they differ in which number they are about.
Where the published code differs from the paper's formulas, this follows the formulas (docs/methods.md).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, TypeAlias

from hallucination_guard.errors import ScoringError
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.beginnings import Beginnings
from hallucination_guard.scoring.gradients import (
    GradientSettings,
    Likelihoods,
    Measured,
    Thinking,
    counted_tokens,
    measure,
)
from hallucination_guard.scoring.head_walk import Reading, answer_states, read_head
from hallucination_guard.values import Generation, Model, Prefix, Score, ScorerIdentity, States
from hallucination_guard.values.text import has_visible

__all__ = [
    "ExGrad",
    "HybridGrad",
    "Likelihood",
    "ParaGrad",
    "SemGrad",
    "cheap_scores",
    "check_own",
    "nothing_to_measure",
    "white_box",
]

_VERSION = "1"


@dataclass(frozen=True)
class _Scorer(ABC):
    """What all scorers share: empty answers are unscorable, and a number that is not finite is an error."""

    primary: ClassVar[str]

    @property
    def settings(self) -> dict[str, str]:
        """Every setting that changes a number. That thinking is left out goes without saying."""
        plain = {key: str(value) for key, value in asdict(self).items()}
        return {key: value for key, value in plain.items() if (key, value) != ("thinking", "left_out")}

    @property
    def identity(self) -> ScorerIdentity:
        """Name, version and settings: a calibration holds for exactly this."""
        return ScorerIdentity(name=self.primary, version=_VERSION, settings=self.settings)

    def __call__(self, model: Model, generation: Generation) -> Score:
        """Score one generation.

        Args:
            model: the :class:`~hallucination_guard.WhiteBoxModel` it belongs to.
            generation: from ``model.generate`` or ``model.read``.

        Raises:
            AnchorError: if a gradient is asked for and the generation has no anchor.
            ScoringError: if a number is not finite, or the generation is another model's.
        """
        return self.batch(model, [generation])[0]

    def batch(self, model: Model, generations: Sequence[Generation]) -> list[Score]:
        """Score several generations at once, each as it would be scored alone (within rounding)."""
        return self._scored(model, generations, self._measure)

    def beginnings(self, model: Model) -> Callable[[Generation], Score]:
        """A step that scores longer and longer beginnings of one answer, each as if it were the whole."""
        measure = self._grown(white_box(model))
        return lambda generation: self._scored(model, [generation], measure)[0]

    def _scored(self, model: Model, generations: Sequence[Generation], measure: _Measure) -> list[Score]:
        began = time.perf_counter()
        for generation in generations:
            check_own(model, generation)
        thinking: Thinking = getattr(self, "thinking", "counted")
        reasons = [nothing_to_measure(generation, thinking) for generation in generations]
        full = [each for each, reason in zip(generations, reasons, strict=True) if not reason]
        measured = iter(measure(white_box(model), full) if full else [])
        seconds = (time.perf_counter() - began) / max(1, len(generations))
        return [
            Score.unscorable(reason, scorer=self.identity)
            if reason
            else self._score(
                _with_thinking(next(measured), white_box(model), generation, thinking), generation, seconds
            )
            for generation, reason in zip(generations, reasons, strict=True)
        ]

    @abstractmethod
    def _measure(self, model: WhiteBoxModel, generations: Sequence[Generation]) -> list[_Numbers]:
        """The numbers of generations that have something to measure."""

    def _grown(self, model: WhiteBoxModel) -> _Measure:
        """How longer and longer beginnings are measured: here, each anew."""
        return self._measure

    def _score(self, numbers: _Numbers, generation: Generation, seconds: float) -> Score:
        for name, value in numbers.scores.items():
            if not math.isfinite(value):
                raise ScoringError(
                    f"{name} is {value!r}", hint="in float16 gradients overflow or vanish: use bfloat16 or float32"
                )
        return Score(
            status="scored",
            scorer=self.identity,
            scores=numbers.scores,
            anchor=generation.anchor if numbers.prefix else None,
            prefix=numbers.prefix,
            token_entropies=numbers.entropies,
            token_logprobs=numbers.logprobs,
            states=numbers.states,
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbers:
    scores: dict[str, float]
    entropies: tuple[float, ...]
    logprobs: tuple[float, ...]
    prefix: Prefix | None  # where what comes before t* was read; None of numbers that do not depend on t*
    states: States | None = None

    @classmethod
    def of(cls, reading: Reading, scores: Mapping[str, float]) -> _Numbers:
        """``scores`` that need no anchor, and the cheap ones."""
        entropies, logprobs = tuple(reading.entropies.tolist()), tuple(reading.logprobs.tolist())
        return cls(
            scores={**scores, **cheap_scores(entropies, logprobs)},
            entropies=entropies,
            logprobs=logprobs,
            prefix=None,
        )

    @classmethod
    def of_gradient(cls, measured: Measured) -> _Numbers:
        """All that one pass gives."""
        likelihood = cheap_scores(measured.entropies, measured.logprobs)
        share = math.exp(-likelihood["mean_token_entropy"])
        scores = {
            "semgrad": measured.semgrad,
            "paragrad": measured.paragrad,
            "exgrad": measured.exgrad,
            "hybridgrad": (1.0 - share) * measured.semgrad + share * measured.paragrad,
            **likelihood,
        }
        return cls(
            scores=scores,
            entropies=measured.entropies,
            logprobs=measured.logprobs,
            prefix=measured.prefix,
            states=measured.states,
        )


_Measure: TypeAlias = Callable[[WhiteBoxModel, Sequence[Generation]], list[_Numbers]]


@dataclass(frozen=True)
class _Gradient(GradientSettings, _Scorer):
    def _measure(self, model: WhiteBoxModel, generations: Sequence[Generation]) -> list[_Numbers]:
        return [_Numbers.of_gradient(each) for each in measure(model, generations, self)]

    def _grown(self, model: WhiteBoxModel) -> _Measure:
        grown = Beginnings(model, self)
        return lambda _, generations: [_numbers_of(grown(each)) for each in generations]


def _numbers_of(found: Likelihoods) -> _Numbers:
    assert isinstance(found, Measured)  # nothing was said of not wanting it
    return _Numbers.of_gradient(found)


class SemGrad(_Gradient):
    """How much the answer depends on the exact state at the question's meaning. See docs/methods.md."""

    primary = "semgrad"


class ParaGrad(_Gradient):
    """How much the answer pulls at the head's weights, entropy-weighted. See docs/methods.md."""

    primary = "paragrad"


class ExGrad(_Gradient):
    """As :class:`ParaGrad`, every token counting the same. See docs/methods.md."""

    primary = "exgrad"


class HybridGrad(_Gradient):
    """SemGrad where the model hesitates, ParaGrad where it is sure. See docs/methods.md."""

    primary = "hybridgrad"


@dataclass(frozen=True)
class Likelihood(_Scorer):
    """Entropies and likelihoods without any gradient; works without an anchor."""

    primary = "sequence_nll"
    thinking: Thinking = "left_out"

    def _measure(self, model: WhiteBoxModel, generations: Sequence[Generation]) -> list[_Numbers]:
        results = []
        for generation in generations:
            generation.release()
            with undisturbed(model.model, grad=False):
                final = answer_states(model, model.layout.view(model.model, {}), generation)
                answer = counted_tokens(generation, self.thinking)
                reading = read_head(model.head, final[-len(answer) :], answer)
            results.append(_Numbers.of(reading, {}))
        return results


def cheap_scores(entropies: Sequence[float], logprobs: Sequence[float]) -> dict[str, float]:
    """The cheap scores; of these ``min_token_logprob`` alone is lower where the model is less certain."""
    return {
        "mean_token_entropy": math.fsum(entropies) / len(entropies),
        "max_token_entropy": max(entropies),
        "sequence_nll": -math.fsum(logprobs),
        "mean_nll": -math.fsum(logprobs) / len(logprobs),
        "min_token_logprob": min(logprobs),
    }


def white_box(model: Model) -> WhiteBoxModel:
    """``model``, whose inside can be seen.

    Raises:
        ScoringError: if it cannot.
    """
    if not isinstance(model, WhiteBoxModel):
        raise ScoringError(
            f"the inside of {model.name!r}, a {type(model).__name__}, cannot be seen",
            hint="wrap the local model: WhiteBoxModel(model, tokenizer)",
        )
    return model


def check_own(model: Model, generation: Generation) -> None:
    """See that ``generation`` is of ``model``.

    Raises:
        ScoringError: if it is another's.
    """
    own = model.identity
    if (generation.model.fingerprint, generation.model.structure) != (own.fingerprint, own.structure):
        raise ScoringError(
            f"the generation is of model {generation.model.name!r}, not of {model.name!r}",
            hint="model.read(messages, answer=...) scores another model's text with this one",
        )


def _with_thinking(numbers: _Numbers, model: WhiteBoxModel, generation: Generation, thinking: Thinking) -> _Numbers:
    """With the likelihood scores of the thinking beside those of the answer, where they are asked for."""
    if thinking != "apart" or not generation.thinking:
        return numbers
    with undisturbed(model.model, grad=False):
        final = answer_states(model, model.layout.view(model.model, {}), generation)
        reading = read_head(
            model.head, final[: generation.thinking], generation.response_token_ids[: generation.thinking]
        )
    own = cheap_scores(reading.entropies.tolist(), reading.logprobs.tolist())
    return replace(numbers, scores={**numbers.scores, **{f"thinking_{name}": value for name, value in own.items()}})


def nothing_to_measure(generation: Generation, thinking: Thinking = "counted") -> str:
    """Why this answer cannot be scored; empty if it can."""
    if not generation.response_token_ids:
        return "the answer is empty"
    if not counted_tokens(generation, thinking):
        return "the answer has nothing but its thinking"
    if not has_visible(generation.text[0 if thinking == "counted" else generation.spoken :]):
        return "the answer has no visible text, only special tokens, white space or punctuation"
    return ""
