"""Whether thresholds for sentences keep their word, and what they leave of answers.

    python benchmarks/validity_sentences.py [RESPONSES.jsonl --score mean_nll] [--draws 1000] [--n 200]
    python benchmarks/validity_sentences.py --score fused [RESPONSES.jsonl]

The responses given, or made-up ones, are the whole population, so the share that keeps more than k wrong sentences at
a threshold is known exactly. Calibration sets are drawn from it with replacement. ``certified``: the share of draws
with more than α of the population's responses failing must not exceed δ; ``average``: the mean of those shares must
not exceed α; each but for three standard errors. Exit status 1 if one does. With ``fused`` every set fits its own
weights first, on some of its responses: seven minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from hallucination_guard.calibration import (
    FUSED,
    LabelledResponse,
    LabelledSentence,
    calibrate_sentences,
    read_responses,
)
from hallucination_guard.calibration.backoff import (
    Scored,
    average_rank,
    certified_rank,
    limits,
    retention,
    threshold_at,
)
from hallucination_guard.errors import GuardError
from hallucination_guard.values import Conditions, Guarantee, ModelIdentity, ScorerIdentity, States

ALPHAS, ALLOWED = (0.1, 0.2, 0.3, 0.5), (0, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What many thresholds of one kind did.

    Args:
        measured: ``certified``: share of draws whose threshold fails more than α of the population; ``average``: mean
            share of the population that fails.
        allowed: the most that it may be, noise included.
        kept: mean share of sentences kept; nothing where infeasible.
        empty: mean share of responses of which nothing is kept.
        infeasible: whether there is no threshold for this n.
    """

    guarantee: str
    alpha: float
    at_most: int
    measured: float
    allowed: float
    kept: float
    empty: float
    infeasible: bool

    @property
    def broken(self) -> bool:
        """Whether the word was not kept."""
        return self.measured > self.allowed


def made_up(kind: str, *, responses: int = 4000, seed: int = 0) -> list[Scored]:
    """Responses of 1 to 9 sentences: some are about what the model knows, others are not, and so are their scores.

    Args:
        kind: ``telling``, ``weak`` or ``blind`` scores; ``coarse`` ones have many ties.
        responses: how many.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    slope = {"telling": 2.0, "weak": 0.5, "blind": 0.0, "coarse": 1.0}[kind]
    made: list[Scored] = []
    for _ in range(responses):
        base = rng.normal(-0.5, 1.2)
        doubt = base + rng.normal(0, 1, size=rng.integers(1, 10))
        wrong = rng.random(len(doubt)) < 1 / (1 + np.exp(-doubt))
        score = slope * doubt + rng.normal(0, 1, size=len(doubt)) + 0.3 * rng.normal()
        if kind == "coarse":
            score = np.round(score)
        made.append([(float(s), None if rng.random() < 0.1 else not w) for s, w in zip(score, wrong, strict=True)])
    return made


def validity(
    pool: Sequence[Scored], *, n: int, delta: float, draws: int, alphas: Sequence[float] = ALPHAS, seed: int = 0
) -> Iterator[Result]:
    """Fit on many calibration sets and look up what fails in the population."""
    flat = np.sort([score for each in pool for score, _ in each])
    least = np.sort([min(score for score, _ in each) for each in pool])
    for k in ALLOWED:
        own = np.array(limits(pool, at_most=k))
        ordered = np.sort(own)
        for guarantee in get_args(Guarantee):
            for alpha in alphas:
                certified = guarantee == "certified"
                rank = certified_rank(n, alpha=alpha, delta=delta) if certified else average_rank(n, alpha=alpha)
                if not rank:
                    yield Result(
                        guarantee=guarantee,
                        alpha=alpha,
                        at_most=k,
                        measured=0.0,
                        allowed=delta if certified else alpha,
                        kept=0.0,
                        empty=1.0,
                        infeasible=True,
                    )
                    continue
                rng = np.random.default_rng(seed)
                drawn = (own[rng.integers(len(own), size=n)].tolist() for _ in range(draws))
                thresholds = np.array([threshold_at(each, rank) for each in drawn])
                failing = np.searchsorted(ordered, thresholds, side="right") / len(own)
                kept = np.searchsorted(flat, thresholds, side="right") / len(flat)
                empty = 1 - np.searchsorted(least, thresholds, side="right") / len(least)
                yield _result((guarantee, k, alpha), failing, kept, empty, delta=delta)


def validity_fused(
    pool: Sequence[LabelledResponse], *, n: int, delta: float, draws: int, alphas: Sequence[float] = ALPHAS
) -> Iterator[Result]:
    """The same for thresholds of fused scores: each set fits its weights, and the population is read by these."""
    rng = np.random.default_rng(0)
    found = defaultdict(list)
    for _ in range(draws):
        drawn = [replace(pool[at], id=f"q{place}") for place, at in enumerate(rng.integers(len(pool), size=n))]
        fitted = calibrate_sentences(drawn, score=FUSED, alphas=alphas, at_most=ALLOWED, delta=delta)
        read: list[Scored] = [
            [(fitted.value(own.scores, own.states), own.correct) for own in each.sentences] for each in pool
        ]
        own_limits = {k: np.array(limits(read, at_most=k)) for k in ALLOWED}
        for each in fitted.thresholds:
            kept = retention(read, each.threshold)
            failing = float((own_limits[each.at_most] <= each.threshold).mean())
            found[each.guarantee, each.at_most, each.alpha].append((failing, kept.sentences, kept.empty))
    for key, rows in found.items():
        yield _result(key, *np.array(rows).T, delta=delta)


def _result(
    key: tuple[Guarantee, int, float], failing: np.ndarray, kept: np.ndarray, empty: np.ndarray, *, delta: float
) -> Result:
    guarantee, k, alpha = key
    certified, draws = guarantee == "certified", len(failing)
    noise = math.sqrt(delta * (1 - delta) / draws) if certified else float(failing.std()) / math.sqrt(draws)
    return Result(
        guarantee=guarantee,
        alpha=alpha,
        at_most=k,
        measured=float((failing > alpha).mean() if certified else failing.mean()),
        allowed=(delta if certified else alpha) + 3 * noise,
        kept=float(kept.mean()),
        empty=float(empty.mean()),
        infeasible=False,
    )


def with_states(*, responses: int = 800, seed: int = 0) -> list[LabelledResponse]:
    """Responses of 1 to 5 sentences whose states know more of what is wrong than their likelihoods do."""
    rng = np.random.default_rng(seed)
    towards = rng.normal(size=8) / math.sqrt(8)
    made = []
    for at in range(responses):
        base, sentences = rng.normal(-0.5, 1.2), []
        for _ in range(rng.integers(1, 6)):
            doubt = base + rng.normal()
            mean, last = (rng.normal(size=8) + doubt * towards for _ in range(2))
            nll = math.exp(0.5 * doubt + rng.normal())
            correct = None if rng.random() < 0.1 else bool(rng.random() > 1 / (1 + math.exp(-doubt)))
            states = States(layers=(1,), mean=tuple(mean), last=tuple(last))
            scores = {"mean_nll": nll, "sequence_nll": nll * int(rng.integers(3, 9))}
            sentences.append(LabelledSentence(scores=scores, correct=correct, states=states))
        made.append(
            LabelledResponse(
                id=f"q{at}",
                judge="made up",
                sentences=tuple(sentences),
                model=ModelIdentity(name="m", fingerprint="f", dtype="float32", template="t"),
                scorer=ScorerIdentity(name="sentences", version="1", settings={"states": "True"}),
                conditions=Conditions(frame="f", endings=("stop",)),
            )
        )
    return made


def main() -> int:
    """Print the tables; exit status 1 if a threshold breaks its word."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("responses", type=Path, nargs="*", metavar="RESPONSES.jsonl")
    parser.add_argument("--score", default="mean_nll")
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--n", type=int, default=200, help="size of a calibration set")
    options = parser.parse_args()
    settings = {"n": options.n, "delta": options.delta, "draws": options.draws}
    broken = 0
    try:
        given = {f"{path}, {options.score}": read_responses(path) for path in options.responses}
        if options.score == FUSED:
            for title, pool in (given or {"made-up responses, fused": with_states()}).items():
                broken += _print(title, _scored(pool, None), validity_fused(pool, **settings))
        else:
            scored = {title: _scored(pool, options.score) for title, pool in given.items()}
            scored = scored or {f"{kind} scores": made_up(kind) for kind in ("telling", "weak", "blind", "coarse")}
            for title, pairs in scored.items():
                broken += _print(title, pairs, validity(pairs, **settings))
    except GuardError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"a sentence has no score {error}", file=sys.stderr)
        return 2
    return int(broken > 0)


def _scored(pool: Sequence[LabelledResponse], score: str | None) -> list[Scored]:
    """The sentences of each response by one score, 0 where there is none yet."""
    return [[(own.scores[score] if score else 0.0, own.correct) for own in each.sentences] for each in pool]


def _print(title: str, pool: Sequence[Scored], results: Iterator[Result]) -> int:
    """The table; how many broke their word."""
    labels, broken = [correct for each in pool for _, correct in each], 0
    print(f"\n{title}: {len(pool)} responses, {labels.count(False) / len(labels):.1%} of their sentences wrong")
    print(f"{'guarantee':<11}{'k':>3}{'α':>6}{'measured':>10}{'allowed':>9}{'kept':>7}{'empty':>7}")
    for each in results:
        broken += each.broken
        said = "  INFEASIBLE" if each.infeasible else "  TOO OFTEN" if each.broken else ""
        print(
            f"{each.guarantee:<11}{each.at_most:>3}{each.alpha:6g}{each.measured:10.3f}{each.allowed:9.3f}"
            f"{each.kept:7.3f}{each.empty:7.3f}{said}"
        )
    return broken


if __name__ == "__main__":
    raise SystemExit(main())
