"""Whether certificates keep their word, and what they cost in answers.

    python benchmarks/validity.py ANSWERS.jsonl [MORE.jsonl] [--draws 1000]

The labelled answers given are the whole population, so the error among the answered is known exactly. Calibration sets
are drawn from it with replacement and certified; the share of draws whose certified threshold has a true error above
α must not exceed δ (but for the noise of so many draws, given as three standard errors). The same with shuffled
labels: nothing below the base rate of errors may be certified more often than δ. Sets of 632 questions and more begin
at fixed starts where the score is a plain one; benchmarks/power.py compares those with others. Last, synthetic scores
whose best threshold is known: how much of the best possible coverage is certified.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from scipy.stats import binom

from hallucination_guard.calibration import FUSED, Labelled, read_labelled
from hallucination_guard.calibration.certificate import FIT_SHARE, Drafts, course, design
from hallucination_guard.calibration.fusion import matrix, optimum, prior_of, ranges, signals_of
from hallucination_guard.calibration.starts import furthest
from hallucination_guard.errors import GuardError

ALPHAS = (0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a thousand certificates for one score and one α did.

    Args:
        exceeded: share of the draws whose threshold has a true error above α.
        infeasible: share of the draws without a certificate.
        coverage: mean share of the population that is answered; nothing where infeasible.
        best: the largest share that any threshold answers with a true error of at most α.
    """

    score: str
    alpha: float
    exceeded: float
    infeasible: float
    coverage: float
    best: float


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Single drafts: scores, labels, and for the fused score the logs of the signals and what is believed of them."""

    scores: dict[str, np.ndarray]
    wrong: np.ndarray
    logs: np.ndarray
    prior: Sequence[float]


def population(answers: Sequence[Labelled], names: Sequence[str]) -> Population:
    """The scored first drafts."""
    first = [each for each in answers if each.attempt == 1 and each.status == "scored"]
    for name in names:
        if name != FUSED and any(name not in each.scores for each in first):
            raise SystemExit(f"not every answer has the score {name!r}; there are {', '.join(sorted(first[0].scores))}")
    return Population(
        {name: np.array([each.scores[name] for each in first]) for name in names if name != FUSED},
        np.array([not each.correct for each in first]),
        matrix(first) if FUSED in names else np.empty((len(first), 0)),
        prior_of(signals_of(first)) if FUSED in names else (),
    )


def fused(pool: Population, of: np.ndarray) -> np.ndarray:
    """Fused scores of all answers, the weights fitted on the answers ``of``; on one label alone nothing is known."""
    if len(set(pool.wrong[of])) < 2:
        return np.zeros(len(pool.logs))
    low, high, centre, scale = ranges(pool.logs[of])
    x = (pool.logs.clip(low, high) - centre) / scale
    weights, intercept = optimum(x[of], pool.wrong[of].astype(float), prior=pool.prior)
    return np.exp(x @ weights + intercept)


def drafts(scores: np.ndarray, wrong: np.ndarray) -> Drafts:
    """Single drafts, without the detour over tuples."""
    return Drafts(begins=scores, ends=np.full(len(scores), math.inf), wrong=wrong, questions=len(scores))


def certified(
    scores: np.ndarray,
    wrong: np.ndarray,
    of: np.ndarray,
    to: np.ndarray,
    *,
    alphas: Sequence[float],
    delta: float,
    spread: bool = False,
) -> list[float | None]:
    """The thresholds that ``certificate.certify`` would certify; None where infeasible."""
    grid, starts = course(drafts(scores[of], wrong[of]), questions=len(to), delta=delta, spread=spread)
    answered, errors = drafts(scores[to], wrong[to]).at(grid)
    last = (furthest(answered, errors, starts=starts, alpha=alpha, delta=delta) for alpha in alphas)
    return [None if each is None else float(grid[each]) for each in last]


def draw(
    pool: Population, name: str, *, alphas: Sequence[float], delta: float, n: int, rng: np.random.Generator
) -> list[tuple[bool, float] | None]:
    """One calibration set: for each α whether the true error exceeds it, and the share answered; None: infeasible."""
    share, spread = design(n, fused=name == FUSED)
    drawn = rng.integers(len(pool.wrong), size=n)
    of, to = drawn[: round(share * n)], drawn[round(share * n) :]
    scores = fused(pool, of) if name == FUSED else pool.scores[name]
    found: list[tuple[bool, float] | None] = []
    thresholds = certified(scores, pool.wrong, of, to, alphas=alphas, delta=delta, spread=spread)
    for alpha, threshold in zip(alphas, thresholds, strict=True):
        if threshold is None:
            found.append(None)
            continue
        passed = scores <= threshold
        found.append((bool(passed.any() and pool.wrong[passed].mean() > alpha), float(passed.mean())))
    return found


def validity(
    pool: Population,
    names: Sequence[str],
    *,
    alphas: Sequence[float] = ALPHAS,
    delta: float = 0.1,
    draws: int = 1000,
    n: int | None = None,
    seed: int = 0,
    done: Callable[[], Any] = lambda: None,
) -> Iterator[Result]:
    """Certify on many calibration sets and look up the true errors."""
    for name in names:
        rng = np.random.default_rng(seed)
        outcomes = []
        for _ in range(draws):
            outcomes.append(draw(pool, name, alphas=alphas, delta=delta, n=n or len(pool.wrong), rng=rng))
            done()
        everything = np.arange(len(pool.wrong))
        scores = fused(pool, everything) if name == FUSED else pool.scores[name]
        for at, alpha in enumerate(alphas):
            column = [row[at] for row in outcomes]
            yield Result(
                score=name,
                alpha=alpha,
                exceeded=sum(each is not None and each[0] for each in column) / draws,
                infeasible=sum(each is None for each in column) / draws,
                coverage=sum(each[1] for each in column if each is not None) / draws,
                best=best(scores, pool.wrong, alpha),
            )


def best(scores: np.ndarray, wrong: np.ndarray, alpha: float) -> float:
    """The largest share of answers that a threshold lets through with an error of at most α."""
    order = np.argsort(scores, kind="stable")
    rate = np.cumsum(wrong[order]) / np.arange(1, len(order) + 1)
    # Only where the score changes does a threshold fit in between.
    ends = np.append(np.diff(scores[order]) > 0, True)
    fine = np.flatnonzero(ends & (rate <= alpha))
    return 0.0 if not len(fine) else float(fine[-1] + 1) / len(order)


SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "s": lambda s: s,
    "s²": lambda s: s**2,
    "0.05 + 0.6 s": lambda s: 0.05 + 0.6 * s,
    "logistic, slope 8": lambda s: 1 / (1 + np.exp(-8 * (s - 0.5))),
    "logistic, slope 12": lambda s: 1 / (1 + np.exp(-12 * (s - 0.5))),
}
"""P(wrong | score) of scores that are uniform on [0, 1]."""


def efficiency(
    shape: Callable[[np.ndarray], np.ndarray], alpha: float, *, n: int = 1000, delta: float = 0.1, draws: int = 1000
) -> tuple[float, float, float]:
    """The best possible coverage, the median certified one, and the share of draws whose true error exceeds α."""
    even = (np.arange(100_000) + 0.5) / 100_000
    risk = np.cumsum(shape(even)) / np.arange(1, len(even) + 1)
    possible = float(even[risk <= alpha].max(initial=0.0))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        scores = rng.random(n)
        wrong = rng.random(n) < shape(scores)
        order, cut = np.arange(n), round(FIT_SHARE * n)
        threshold = certified(scores, wrong, order[:cut], order[cut:], alphas=[alpha], delta=delta)[0]
        found.append(0.0 if threshold is None else min(max(threshold, 0.0), 1.0))
    exceeded = np.mean([each > 0 and np.interp(each, even, risk) > alpha for each in found])
    return possible, float(np.median(found)), float(exceeded)


def attainable(shape: Callable[[np.ndarray], np.ndarray], alpha: float, *, n: int = 1000, delta: float = 0.1) -> float:
    """The largest λ that one exact test with all n answers passes at least every second time, were λ known before."""
    even = (np.arange(1000) + 0.5) / 1000
    risk = np.cumsum(shape(even)) / np.arange(1, len(even) + 1)
    answered = np.round(n * even).astype(int)
    most = np.array([np.sum(binom.cdf(np.arange(k + 1), k, alpha) <= delta) - 1 for k in answered])
    fine = np.flatnonzero(binom.cdf(most, answered, risk) >= 0.5)
    return float(even[fine[-1]]) if len(fine) else 0.0


def main() -> int:
    """Print the tables; exit status 1 if a certificate breaks its word."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS.jsonl", help="labelled, as evaluate writes")
    parser.add_argument("--scores", nargs="+", default=["hybridgrad", "semgrad", "paragrad", "sequence_nll", FUSED])
    parser.add_argument("--alpha", type=float, nargs="+", default=list(ALPHAS))
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--n", type=int, help="size of a calibration set (default: as large as the population)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        pools = {str(each): population(read_labelled(each), arguments.scores) for each in arguments.answers}
    except GuardError as error:
        print(error, file=sys.stderr)
        return 2
    allowed = arguments.delta + 3 * math.sqrt(arguments.delta * (1 - arguments.delta) / arguments.draws)
    broken = 0
    console = Console(stderr=True)
    settings = {"delta": arguments.delta, "draws": arguments.draws, "n": arguments.n, "seed": arguments.seed}
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("drawing", total=len(pools) * 2 * len(arguments.scores) * arguments.draws)
        for title, pool in pools.items():
            base = float(pool.wrong.mean())
            print(f"\n{title}: {len(pool.wrong)} answers, {base:.1%} of them wrong; at most {allowed:.3f} may exceed α")
            print(f"{'score':<14}{'α':>5}{'exceeded':>10}{'infeasible':>12}{'coverage':>10}{'best':>7}")
            for each in validity(
                pool, arguments.scores, alphas=arguments.alpha, done=lambda: bar.advance(task), **settings
            ):
                broken += each.exceeded > allowed
                print(
                    f"{each.score:<14}{each.alpha:5g}{each.exceeded:10.3f}{each.infeasible:12.3f}"
                    f"{each.coverage:10.3f}{each.best:7.3f}{'  TOO OFTEN' if each.exceeded > allowed else ''}"
                )
            below = [alpha for alpha in arguments.alpha if alpha < base]
            shuffled = replace(pool, wrong=np.random.default_rng(arguments.seed).permutation(pool.wrong))
            print(f"labels shuffled; α below the base rate: {', '.join(map(str, below)) or 'none'}")
            for each in validity(shuffled, arguments.scores, alphas=below, done=lambda: bar.advance(task), **settings):
                broken += each.exceeded > allowed
                print(
                    f"{each.score:<14}{each.alpha:5g}{each.exceeded:10.3f}{each.infeasible:12.3f}"
                    f"{each.coverage:10.3f}{each.best:7.3f}{'  TOO OFTEN' if each.exceeded > allowed else ''}"
                )
    print(f"\nuniform scores, n = 1,000, δ = {arguments.delta:g}: certified share of the best possible coverage")
    print("(one test: with all answers at one threshold, were it known which; no method can be expected to do better)")
    print(f"{'P(wrong | s)':<20}{'α':>5}{'best':>7}{'one test':>10}{'median':>8}{'share':>7}{'exceeded':>10}")
    for name, shape in SHAPES.items():
        for alpha in (0.1, 0.2, 0.3, 0.4):
            possible, median, exceeded = efficiency(shape, alpha, delta=arguments.delta, draws=arguments.draws)
            broken += exceeded > allowed
            single = attainable(shape, alpha, delta=arguments.delta)
            print(
                f"{name:<20}{alpha:5g}{possible:7.3f}{single:10.3f}{median:8.3f}"
                f"{median / possible:7.2f}{exceeded:10.3f}{'  TOO OFTEN' if exceeded > allowed else ''}"
            )
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
