"""How many labels buy how much certified coverage, with which starts; and what "α on average" does.

    python benchmarks/power.py [--draws 1000] [--wrong 0.4]

Right answers score N(0, 1) and wrong ones N(d, 1), d by the AUROC, so the true error rate of every threshold is known.
One start chosen by the fit part, fixed starts as ``calibrate`` has them, and five equal ones are compared on the same
answers: mean certified coverage (infeasible: 0), share of draws with a certificate, share whose true error exceeds α.
AUROC .5 is what shuffled labels give. Exit status 1 if a share is above δ, or a mean above α, by three standard errors.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from hallucination_guard.calibration.certificate import FIT_SHARE, FIT_SHARE_SPREAD, Drafts, course, design
from hallucination_guard.calibration.on_average import keep_on_average
from hallucination_guard.calibration.starts import SPREAD_FROM, Start, furthest

ALPHAS = (0.1, 0.2)
FIVE = (0.05, 0.12, 0.22, 0.35, 0.5)

Chosen = Callable[[Drafts, Drafts, float], tuple[np.ndarray, Sequence[Start]]]


@dataclass(frozen=True, slots=True)
class Binormal:
    """A population: AUROC of the score and share of wrong answers."""

    auroc: float
    wrong: float

    @property
    def apart(self) -> float:
        """d, how far wrong answers score above right ones."""
        return float(math.sqrt(2.0) * ndtri(self.auroc))

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Scores and whether each answer is wrong."""
        wrong = rng.random(n) < self.wrong
        return rng.normal(size=n) + self.apart * wrong, wrong

    def at(self, threshold: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coverage and true error rate among the answered."""
        bad = self.wrong * ndtr(np.asarray(threshold) - self.apart)
        covered = bad + (1.0 - self.wrong) * ndtr(threshold)
        return covered, bad / np.maximum(covered, 1e-300)

    def best(self, alpha: float) -> float:
        """The oracle's coverage."""
        covered, rate = self.at(np.linspace(-8.0, 8.0, 40_001))
        return float(covered[rate <= alpha].max(initial=0.0))


def one(fit: Drafts, test: Drafts, delta: float) -> tuple[np.ndarray, Sequence[Start]]:
    """The fit part's own beginning."""
    return course(fit, questions=test.questions, delta=delta, spread=False)


def fixed(fit: Drafts, test: Drafts, delta: float) -> tuple[np.ndarray, Sequence[Start]]:
    """What ``calibrate`` does: fixed starts where there are questions enough."""
    return course(fit, questions=test.questions, delta=delta, spread=True)


def five(fit: Drafts, test: Drafts, delta: float) -> tuple[np.ndarray, Sequence[Start]]:
    """Five fixed starts with a fifth of δ each."""
    grid, _ = course(fit, questions=max(test.questions, SPREAD_FROM), delta=delta, spread=True)
    answered = fit.at(grid)[0]
    places = sorted({int(np.searchsorted(answered, share * fit.questions)) for share in FIVE})
    return grid, [Start(at=at, share=1.0 / len(places)) for at in places]


PROCEDURES: dict[str, tuple[Callable[[int], float], Chosen]] = {
    "one start, fit .2": (lambda n: FIT_SHARE, one),
    "as calibrate": (lambda n: design(n, fused=False)[0], fixed),
    "five, fit .05": (lambda n: FIT_SHARE_SPREAD, five),
}


def singles(scores: np.ndarray, wrong: np.ndarray) -> Drafts:
    """Single drafts."""
    return Drafts(begins=scores, ends=np.full(len(scores), math.inf), wrong=wrong, questions=len(scores))


def compared(
    pool: Binormal, n: int, *, delta: float, draws: int, seed: int = 0
) -> dict[tuple[str, float], tuple[float, float, float]]:
    """By procedure and α: mean coverage, share feasible, share whose true error exceeds α."""
    rng = np.random.default_rng(seed)
    sums = {(name, alpha): np.zeros(3) for name in PROCEDURES for alpha in ALPHAS}
    for _ in range(draws):
        scores, wrong = pool.draw(n, rng)
        for name, (share, starts_of) in PROCEDURES.items():
            cut = round(share(n) * n)
            fit, test = singles(scores[:cut], wrong[:cut]), singles(scores[cut:], wrong[cut:])
            grid, starts = starts_of(fit, test, delta)
            answered, errors = test.at(grid)
            for alpha in ALPHAS:
                last = furthest(answered, errors, starts=starts, alpha=alpha, delta=delta)
                if last is not None:
                    covered, rate = pool.at(grid[last])
                    sums[name, alpha] += [covered, 1.0, rate > alpha]
    return {key: tuple(total / draws) for key, total in sums.items()}


def averaged(pool: Binormal, n: int, alpha: float, *, draws: int, seed: int = 0) -> tuple[float, float, float, float]:
    """Mean true error (0 where nothing is let through), its standard error, share above α, mean coverage."""
    rng = np.random.default_rng(seed)
    rates, coverages = np.zeros(draws), np.zeros(draws)
    for at in range(draws):
        scores, wrong = pool.draw(n, rng)
        [kept] = keep_on_average(scores.tolist(), (~wrong).tolist(), alphas=[alpha], questions=n, score="s")
        if kept.threshold is not None:
            coverages[at], rates[at] = pool.at(kept.threshold)
    return (
        float(rates.mean()),
        float(rates.std() / math.sqrt(draws)),
        float((rates > alpha).mean()),
        float(coverages.mean()),
    )


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--wrong", type=float, default=0.4)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--n", type=int, nargs="+", default=[300, 600, 1000, 2000])
    parser.add_argument("--auroc", type=float, nargs="+", default=[0.5, 0.65, 0.75, 0.85])
    arguments = parser.parse_args()
    delta, draws, broken = arguments.delta, arguments.draws, 0
    allowed = delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    print(f"{arguments.wrong:.0%} wrong, δ = {delta:g}, {draws} draws; at most {allowed:.3f} may exceed α")
    print("mean certified coverage / share feasible / share exceeding α")
    print("| AUROC | α | n | best | " + " | ".join(PROCEDURES) + " |")
    print("|---" * (4 + len(PROCEDURES)) + "|")
    for auroc in arguments.auroc:
        pool = Binormal(auroc, arguments.wrong)
        tables = {n: compared(pool, n, delta=delta, draws=draws) for n in arguments.n}
        for alpha in ALPHAS:
            for n, found in tables.items():
                cells = [found[name, alpha] for name in PROCEDURES]
                broken += sum(each[2] > allowed for each in cells)
                said = " | ".join(f"{a:.3f} / {b:.2f} / {c:.3f}" for a, b, c in cells)
                print(f"| {auroc} | {alpha} | {n} | {pool.best(alpha):.3f} | {said} |", flush=True)
    print("\nα on average: (wrong + 1) / (answered + 1) ≤ α")
    print("| AUROC | α | n | best | mean true error | exceeding α | mean coverage |")
    print("|---" * 7 + "|")
    for auroc in arguments.auroc:
        pool = Binormal(auroc, arguments.wrong)
        for alpha in ALPHAS:
            for n in (100, 300, 1000):
                rate, error, above, covered = averaged(pool, n, alpha, draws=draws)
                broken += rate > alpha + 3 * error
                print(
                    f"| {auroc} | {alpha} | {n} | {pool.best(alpha):.3f} | {rate:.3f} ± {error:.3f} | {above:.2f} "
                    f"| {covered:.3f} |",
                    flush=True,
                )
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
