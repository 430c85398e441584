"""Certificates: a threshold below which, of the answers let through, at most a share α is wrong.

Learn-then-Test by fixed sequence (arXiv 2110.01052) with exact binomial p-values. The *fit* part of the labelled
questions chooses a grid of thresholds λ and where on it to begin, or starts.py fixes where; the *test* part tries, from
there on and towards more permissive λ, the hypothesis "of the answers with score ≤ λ more than α are wrong", and the
last λ refuted is certified:

    P( P(wrong | answered) > α ) ≤ δ    over the draw of the test part, for any score, monotone or not.

What is certified is a policy: an example is the sequence of attempts at one question, and the answer let through at λ
is the first whose score is ≤ λ. docs/methods.md has the argument.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hallucination_guard.calibration.needed import Needed
from hallucination_guard.calibration.starts import SPREAD_FROM, Start, furthest, spread_over
from hallucination_guard.errors import ConfigurationError, MissingExtra
from hallucination_guard.values import JSON, Policy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]
    Ints: TypeAlias = NDArray[np.int64]

__all__ = [
    "FIT_SHARE",
    "FIT_SHARE_FUSED",
    "FIT_SHARE_SPREAD",
    "METHOD",
    "METHOD_SPREAD",
    "Certificate",
    "Drafts",
    "Infeasible",
    "certify",
    "course",
    "design",
    "drafts_hash",
    "path",
    "policy_hash",
    "split",
    "upper_bound",
    "walk",
]

METHOD = "Learn-then-Test, fixed sequence, exact binomial"
METHOD_SPREAD = "Learn-then-Test, fixed starts with fallback, exact binomial"
"""Where the starts are fixed beforehand and hand their budget on; see :mod:`.starts`."""
FIT_SHARE = 0.2
"""Of the questions go into the choice of the grid. Tried: .1, .15, .2, .3 on seven shapes of risk at n = 1,000; the
certified coverage differs by at most three hundredths, and with a tenth the beginning is more often a bad one."""
FIT_SHARE_FUSED = 0.4
"""… where a fused score is fitted on that part as well: ten weights want more answers than a beginning does."""
FIT_SHARE_SPREAD = 0.05
"""… where the starts are fixed: the grid needs scores and no labels."""

_GRID = 512
_PRIOR = 2.0  # answers at the overall error rate that are added to the estimate: three right ones are not "no risk"
# The beginning is judged as if the test part were half as large: the fit part's estimate has an error too, and a
# stretch that is short and was lucky must not look the safest. Tried 1, .5, .3, .2: 1 certifies small α a little more
# often and begins badly where a score knows little, .2 the other way round.
_CAUTION = 0.5
_BEYOND = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the upper half's width: thresholds past all scores of the fit part


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Certificate(_Part):
    """Of the answers let through at ``threshold`` at most a share ``alpha`` is wrong, said with 1 − ``delta``.

    Args:
        id: hash of all the rest.
        alpha: α.
        delta: δ.
        score: name of the score, or ``fused``.
        threshold: λ; answers with a score up to here are let through.
        policy: hash of the policy whose attempts were certified; None for single drafts.
        covers: hash of model, scorer, weights of the score and conditions of the answers.
        n: questions tested; those of the fit part are not among them.
        answered: how many of them λ lets through.
        errors: how many of those are wrong.
        bound: Clopper–Pearson upper bound of the risk at λ, level 1 − δ; at most α.
        fitted: questions of the fit part.
        data: hash of what was certified on.
        date: ISO, UTC.
        method: how.
    """

    id: str = ""
    alpha: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    score: str
    threshold: float
    policy: str | None = None
    covers: str = ""
    n: int = Field(ge=1)
    answered: int = Field(ge=1)
    errors: int = Field(ge=0)
    bound: float = Field(ge=0, le=1)
    fitted: int = Field(ge=1)
    data: str = ""
    date: str
    method: str = METHOD

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if not self.errors <= self.answered <= self.n:
            raise ValueError(f"{self.errors} wrong of {self.answered} answered of {self.n} tested cannot be")
        # The walk compares p-values, which round otherwise than the bound does.
        if not self.errors / self.answered <= self.bound <= self.alpha + 1e-9:
            raise ValueError(
                f"{self.errors} wrong of {self.answered} with the bound {self.bound:g} do not show alpha {self.alpha:g}"
            )
        return self

    @model_validator(mode="after")
    def _is_called_by_its_content(self) -> Self:
        plain = self.model_dump(exclude={"id"})
        found = hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]
        if self.id not in ("", found):
            raise ValueError(f"the certificate is called {self.id!r} and its content has the hash {found!r}")
        object.__setattr__(self, "id", found)  # frozen from here on
        return self

    @property
    def coverage(self) -> float:
        """The share of the tested questions that λ answers."""
        return self.answered / self.n


class Infeasible(_Part):
    """There is no certificate for this α: no threshold could be shown to keep it.

    Args:
        alpha: what was asked for.
        delta: δ.
        score: of the certificate that there is not.
        policy: likewise.
        nearest: the smallest α, in hundredths, with which the walk would have left its beginning; None if there is
            none. The error at that beginning is at most this with 1 − δ, but an α chosen after looking at it is not
            certified: decide on it, and certify it on data that has not been looked at.
        n: questions tested.
        needed: labels with which it is expected to become feasible; None where nobody asked.
    """

    alpha: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    score: str
    policy: str | None = None
    nearest: float | None = None
    n: int = Field(ge=0)
    needed: Needed | None = None

    def in_words(self) -> str:
        """One sentence."""
        hint = (
            "and no other either" if self.nearest is None else f"the smallest that looks feasible is {self.nearest:g}"
        )
        said = f"alpha {self.alpha:g} is INFEASIBLE on {self.n} answers with {self.score!r}; {hint}"
        if self.needed is None:
            return said
        if self.needed.expected is None and self.needed.fewest is None:
            return f"{said}; no number of labels up to {self.needed.up_to:,} is expected to make it feasible"
        if self.needed.expected is not None and self.needed.expected <= self.n:
            return f"{said}; {self.needed.in_words()} are expected to do, so this draw was unlucky: label new questions"
        return f"{said}; expected to become feasible: with {self.needed.in_words()}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drafts:
    """Sequences of attempts as a threshold sees them: from which λ to which λ an attempt is the one let through.

    Attempt j passes first for λ in [score_j, lowest score before it).

    Args:
        begins: λ from which each attempt is let through.
        ends: λ from which an earlier attempt is let through instead; infinite for the first attempts.
        wrong: whether it is wrong.
        questions: how many questions there are, answered or not.
    """

    begins: NDArray[Any]
    ends: NDArray[Any]
    wrong: NDArray[Any]
    questions: int

    @classmethod
    def of(cls, sequences: Iterable[Sequence[tuple[float | None, bool]]]) -> Self:
        """Of (score, correct) pairs in the order of the attempts; a score of None never passes."""
        import numpy as np

        begins, ends, wrong, questions = [], [], [], 0
        for sequence in sequences:
            questions += 1
            lowest = math.inf
            for score, correct in sequence:
                if score is not None and score < lowest:
                    begins.append(float(score))
                    ends.append(lowest)
                    wrong.append(not correct)
                    lowest = float(score)
        return cls(
            begins=np.array(begins, float), ends=np.array(ends, float), wrong=np.array(wrong, bool), questions=questions
        )

    def at(self, grid: Floats) -> tuple[Ints, Ints]:
        """How many questions each threshold answers, and how many of those wrongly."""

        def passed(mask: Ints) -> Ints:
            import numpy as np

            begun = np.searchsorted(np.sort(self.begins[mask]), grid, side="right")
            ended = np.searchsorted(np.sort(self.ends[mask]), grid, side="right")
            return np.asarray(begun - ended)

        wrong = passed(self.wrong)
        return wrong + passed(~self.wrong), wrong


def certify(
    fit: Drafts,
    test: Drafts,
    *,
    alphas: Iterable[float],
    delta: float = 0.1,
    score: str,
    policy: str | None = None,
    covers: str = "",
    data: str = "",
    date: str | None = None,
    spread: bool = False,
) -> tuple[Certificate | Infeasible, ...]:
    """Certify thresholds for several α, smallest first.

    Args:
        fit: chooses the grid and its beginning; must share no question with ``test``.
        test: tells.
        alphas: error rates among the answered, each in (0, 1).
        delta: the probability with which each certificate may fail, in (0, 1).
        score: name of the score, for the certificate.
        policy: hash of the policy whose attempts these are; None for single drafts.
        covers: hash of what else the certificates are bound to.
        data: hash of what was certified on.
        date: ISO; today by default.
        spread: whether to begin at fixed starts; only a test part of 600 questions and more does. To be decided
            before the labels are looked at, as :func:`design` does.

    Raises:
        ConfigurationError: on an α or δ out of range.
        MissingExtra: if scipy is not installed.
    """
    chosen = sorted(set(alphas))
    for name, value in (*(("alpha", alpha) for alpha in chosen), ("delta", delta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
            raise ConfigurationError(f"{name} is {value!r}", hint="give a share above 0 and below 1, for example 0.1")
    _stats()
    grid, starts = course(fit, questions=test.questions, delta=delta, spread=spread)
    answered, wrong = test.at(grid)
    method = METHOD_SPREAD if spread and test.questions >= SPREAD_FROM else METHOD
    found: list[Certificate | Infeasible] = []
    for alpha in chosen:
        last = furthest(answered, wrong, starts=starts, alpha=alpha, delta=delta)
        if last is None:
            nearest = _nearest(answered, wrong, starts, delta)
            found.append(
                Infeasible(alpha=alpha, delta=delta, score=score, policy=policy, nearest=nearest, n=test.questions)
            )
            continue
        found.append(
            Certificate(
                alpha=alpha,
                delta=delta,
                score=score,
                threshold=float(grid[last]),
                policy=policy,
                covers=covers,
                n=test.questions,
                answered=int(answered[last]),
                errors=int(wrong[last]),
                bound=upper_bound(int(wrong[last]), int(answered[last]), delta=delta),
                fitted=fit.questions,
                data=data,
                date=date or datetime.now(UTC).date().isoformat(),
                method=method,
            )
        )
    return tuple(found)


def _nearest(answered: Ints, wrong: Ints, starts: Sequence[Start], delta: float) -> float | None:
    """The smallest α, in hundredths, with which some start passes its first threshold."""
    at = [each.at for each in starts if each.at < len(answered)]
    apart = [Start(at=place, share=each.share) for place, each in enumerate(starts[: len(at)])]
    hundredths = (each / 100 for each in range(1, 100))
    return next(
        (a for a in hundredths if furthest(answered[at], wrong[at], starts=apart, alpha=a, delta=delta) is not None),
        None,
    )


def design(questions: int, *, fused: bool) -> tuple[float, bool]:
    """How to use so many questions: the share of the fit part, and whether to begin at fixed starts.

    A fused score needs a large fit part anyway, and its labels place one beginning better than several fixed ones are.
    """
    if fused:
        return FIT_SHARE_FUSED, False
    if questions - round(FIT_SHARE_SPREAD * questions) >= SPREAD_FROM:
        return FIT_SHARE_SPREAD, True
    return FIT_SHARE, False


def course(fit: Drafts, *, questions: int, delta: float, spread: bool) -> tuple[Floats, tuple[Start, ...]]:
    """The grid of thresholds and the starts on it.

    Args:
        fit: the fit part.
        questions: of the test part.
        delta: δ.
        spread: whether to begin at fixed starts, if the test part is large enough.
    """
    if not spread or questions < SPREAD_FROM:
        grid, begin = path(fit, questions=questions, delta=delta)
        return grid, (Start(at=begin, share=1.0),)
    grid = _grid(fit)
    return grid, spread_over(fit.at(grid)[0], questions=fit.questions)


def path(fit: Drafts, *, questions: int, delta: float) -> tuple[Floats, int]:
    """The grid of thresholds and where on it to begin, from the fit part alone.

    Args:
        fit: the fit part.
        questions: of the test part, whose *number* may be known.
        delta: δ.
    """
    import numpy as np

    grid = _grid(fit)
    if not len(grid):
        return grid, 0
    answered, wrong = fit.at(grid)
    rate = (wrong + _PRIOR * fit.wrong.mean()) / (answered + _PRIOR)
    expected = _CAUTION * answered * questions / fit.questions
    promised = _stats().beta.ppf(1.0 - delta, expected * rate + 1.0, np.maximum(expected * (1.0 - rate), 1e-9))
    return grid, int(np.argmin(promised))


def _grid(fit: Drafts) -> Floats:
    import numpy as np

    if not len(fit.begins):
        return np.empty(0)
    scores = np.sort(fit.begins)
    top, width = scores[-1], scores[-1] - np.median(scores)
    # Between the scores of the fit part as well as on them: the test part can tell finer steps than the fit part has.
    inside = np.quantile(scores, np.linspace(0.0, 1.0, _GRID))
    return np.asarray(np.unique(np.concatenate([inside, top + width * np.array(_BEYOND)])))


def walk(answered: Ints, wrong: Ints, *, begin: int, alpha: float, delta: float) -> int | None:
    """The last threshold that the walk from one beginning passes; None if it does not pass the first."""
    return furthest(answered, wrong, starts=(Start(at=begin, share=1.0),), alpha=alpha, delta=delta)


def upper_bound(errors: int, answered: int, *, delta: float) -> float:
    """The Clopper–Pearson upper bound: the largest risk that ``errors`` of ``answered`` do not refute at level δ."""
    return 1.0 if errors >= answered else float(_stats().beta.ppf(1.0 - delta, errors + 1, answered - errors))


def split(ids: Iterable[str], *, share: float, seed: int = 0) -> tuple[frozenset[str], frozenset[str]]:
    """Questions for the fit part and for the test part, at random.

    The order comes from a hash of each id and the seed: neither scores nor labels nor the order of the rows have a
    say, as the certificate wants it.
    """
    names = set(ids)
    ordered = sorted(names, key=lambda each: (hashlib.sha256(f"{seed}\0{each}".encode()).digest(), each))
    cut = max(1, round(share * len(ordered)))
    return frozenset(ordered[:cut]), frozenset(ordered[cut:])


def policy_hash(policy: Policy) -> str:
    """SHA-256 over the canonical JSON of what the policy says of itself: what the audit log calls its hash."""
    return _hashed(policy.describe())


def drafts_hash(policy: Policy) -> str:
    """The same without thresholds, name and version: policies that make the same further attempts share it.

    So the attempts that are certified may be collected with a threshold that nothing passes (``confidence: 1``).
    """
    return _hashed(_without_thresholds(policy.describe()))


def _without_thresholds(value: JSON) -> JSON:
    if isinstance(value, Mapping):
        left_out = {"below", "above"} | ({"id", "version"} if value.get("policy") == "Document" else set())
        return {key: _without_thresholds(each) for key, each in value.items() if key not in left_out}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_thresholds(each) for each in value]
    return value


def _hashed(plain: JSON) -> str:
    written = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(written.encode()).hexdigest()


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtra(
            "certifying needs scipy", hint="pip install 'hallucination-guard-semgrad[calibrate]'"
        ) from None
    return stats
