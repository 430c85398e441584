"""Whether the test of the risk keeps its word at all times together, and how many labels it takes.

    python benchmarks/anytime.py [--streams 1000] [--horizon 2000]

Streams of labels with a known risk. At the risk α itself the share of streams in which the alarm is *ever* raised
within the horizon must not exceed the level (but for the noise of so many streams, given as three standard errors), and
likewise of those in which the risk is *ever* said to be kept. Prints markdown; exit status 1 if the word is broken.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from rich.console import Console
from rich.progress import Progress

from hallucination_guard.calibration.anytime import Bets

Floats: TypeAlias = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """The next label of every stream, (streams,).

    Args:
        wrong: what the alarm takes it for.
        probability: with which it was asked for.
        worst: what the proof takes it for; None for the same.
    """

    wrong: Floats
    probability: Floats
    worst: Floats | None = None


Stream: TypeAlias = Callable[[np.random.Generator, int, int], Label]
"""From a generator, how many streams, and which label it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """When each stream said something, in labels; infinite where it never did.

    Args:
        alarm: that the risk is more than α.
        kept: that it was at most α so far.
    """

    alarm: Floats
    kept: Floats


def run(bets: Bets, stream: Stream, *, streams: int, horizon: int, seed: int = 0) -> Times:
    """Look after every label."""
    rng = np.random.default_rng(seed)
    wealth = bets.start()
    alarm, kept = np.full(streams, math.inf), np.full(streams, math.inf)
    for at in range(horizon):
        each = stream(rng, streams, at)
        wealth = bets.after(wealth, wrong=each.wrong, probability=each.probability, unless=each.worst)
        for times, e_value in ((alarm, wealth.peak), (kept, bets.shown(wealth))):
            times[(np.asarray(e_value) >= bets.needed) & np.isinf(times)] = at + 1
    return Times(alarm=alarm, kept=kept)


def steady(risk: float) -> Stream:
    """One risk, every answer labelled with the same probability."""
    return in_turns(risk, (1.0,))


def in_turns(risk: float, rates: tuple[float, ...], *, labels: int = 50) -> Stream:
    """One risk, and a rate that changes after so many labels."""

    def draw(rng: np.random.Generator, streams: int, at: int) -> Label:
        rate = rates[at // labels % len(rates)]
        return Label(wrong=rng.random(streams) < risk, probability=np.full(streams, rate))

    return draw


def changing(before: float, after: float, *, at_label: int) -> Stream:
    """A risk that changes."""

    def draw(rng: np.random.Generator, streams: int, at: int) -> Label:
        return steady(before if at < at_label else after)(rng, streams, at)

    return draw


def chosen(easy: tuple[float, float], hard: tuple[float, float]) -> Stream:
    """Answers half easy, half hard, each (risk, probability of being asked for): labels are of either in proportion."""

    def draw(rng: np.random.Generator, streams: int, at: int) -> Label:
        of_hard = rng.random(streams) < hard[1] / (easy[1] + hard[1])
        risk, probability = (np.where(of_hard, *pair) for pair in zip(hard, easy, strict=True))
        return Label(wrong=rng.random(streams) < risk, probability=probability)

    return draw


def held_back(risk: float, *, wrong: bool) -> Stream:
    """A labeller who does not give half of the labels of one kind: the alarm assumes the best, the proof the worst."""

    def draw(rng: np.random.Generator, streams: int, at: int) -> Label:
        truth, missing = rng.random(streams) < risk, rng.random(streams) < 0.5
        missing &= truth == wrong
        return Label(wrong=truth & ~missing, worst=truth | missing, probability=np.ones(streams))

    return draw


def unweighted(stream: Stream) -> Stream:
    """The same labels, taken for a sample at one rate: what goes wrong without weights."""

    def draw(rng: np.random.Generator, streams: int, at: int) -> Label:
        return Label(wrong=stream(rng, streams, at).wrong, probability=np.ones(streams))

    return draw


def spread(times: Floats, since: int = 0) -> str:
    """Median and the time by which 80 % have spoken, and the share that ever does if that is not all."""
    late = times[times > since] - since
    ever = np.isfinite(late).mean()
    shown = ["–" if math.isinf(each) else f"{each:.0f}" for each in np.quantile(late, [0.5, 0.8], method="higher")]
    return f"{shown[0]} (80 %: {shown[1]})" + ("" if ever == 1 else f", {ever:.1%} within the horizon")


def main() -> int:
    """Print the tables; exit status 1 if a false alarm or a false proof comes too often."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--horizon", type=int, default=2000, help="labels a stream")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = {"streams": arguments.streams, "horizon": arguments.horizon, "seed": arguments.seed}
    level = 0.05
    allowed = level + 3 * math.sqrt(level * (1 - level) / arguments.streams)
    one = Bets(alpha=0.1, level=level)
    floored = Bets(alpha=0.1, level=level, floor=0.2)
    hard_more, easy_more = chosen((0.05, 0.2), (0.15, 1.0)), chosen((0.05, 1.0), (0.15, 0.2))
    weighed: list[tuple[str, Bets, Stream, bool]] = [
        *((f"risk = α = {alpha:g}", Bets(alpha=alpha, level=level), steady(alpha), True) for alpha in (0.05, 0.1, 0.3)),
        ("risk .1, rate in turns 1, .5, .2", floored, in_turns(0.1, (1.0, 0.5, 0.2)), True),
        ("risk .05 or .15, the risky asked 5 × as often", floored, hard_more, True),
        ("… taken for a sample at one rate", one, unweighted(hard_more), False),
        ("risk .05 or .15, the safe asked 5 × as often", floored, easy_more, True),
        ("… taken for a sample at one rate", one, unweighted(easy_more), False),
        ("risk .1, half of the wrong labels held back", one, held_back(0.1, wrong=True), True),
        ("risk .1, half of the right labels held back", one, held_back(0.1, wrong=False), True),
    ]
    speed: list[tuple[str, Bets, Stream, int]] = [
        *((f"risk {risk:g}", one, steady(risk), 0) for risk in (0.3, 0.2, 0.15)),
        *(
            (f"risk .05, from label 501 on {risk:g}", one, changing(0.05, risk, at_label=500), 500)
            for risk in (0.3, 0.2)
        ),
        ("risk .2, rate in turns 1, .5, .2", floored, in_turns(0.2, (1.0, 0.5, 0.2)), 0),
        ("risk .2, floor .2 and rate 1 throughout", floored, in_turns(0.2, (1.0,)), 0),
    ]
    proofs: list[tuple[str, Bets, Stream]] = [
        *((f"risk {risk:g}", one, steady(risk)) for risk in (0.05, 0.02)),
        ("risk .05, at level .1", Bets(alpha=0.1, level=0.1), steady(0.05)),
        ("risk .05, rate in turns 1, .5, .2", floored, in_turns(0.05, (1.0, 0.5, 0.2))),
    ]
    console = Console(stderr=True)
    broken = 0
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("streams", total=len(weighed) + len(speed) + len(proofs))
        print(f"{arguments.streams:,} streams of {arguments.horizon:,} labels, looked at after each; level {level:g}:")
        print(f"at most {allowed:.3f} may be false, three standard errors included.\n")
        print("| answers whose risk is α on average | false alarm ever | false proof ever |\n|---|---|---|")
        for name, bets, stream, counts in weighed:
            found = run(bets, stream, **size)
            shares = [float(np.isfinite(each).mean()) for each in (found.alarm, found.kept)]
            broken += counts and max(shares) > allowed
            too_often = " **too often**" if counts and max(shares) > allowed else ""
            print(f"| {name} | {shares[0]:.3f} | {shares[1]:.3f}{too_often} |", flush=True)
            bar.advance(task)
        print("\n| α = .1 | labels to the alarm, median |\n|---|---|")
        for name, bets, stream, since in speed:
            print(f"| {name} | {spread(run(bets, stream, **size).alarm, since)} |", flush=True)
            bar.advance(task)
        print("\n| α = .1 | labels to the proof, median |\n|---|---|")
        for name, bets, stream in proofs:
            print(f"| {name} | {spread(run(bets, stream, **size).kept)} |", flush=True)
            bar.advance(task)
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
