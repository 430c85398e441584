"""Does the learned score hold? Answers are generated and scored once, then read in every way that could sink it.

    python benchmarks/evidence.py --models demo gemma=FOLDER --sets sciq:3=FILE own=FILE … --work DIR [--quick]

Each set is evaluated on each model with ``hallucination-guard evaluate`` (a base model with five examples); what was
paid for stays in --work, so a run can be cut short. Then, from the labelled answers alone:

ranking    AUROC of the single scores, of all fused without a probe, of the probe alone and of the fused score with it,
           each answer by weights that never saw its question; against the best single score, paired by questions
controls   the same recipe on what the text alone shows (length, ending, TF-IDF), and with labels at random
transfer   fitted on one set, used on another; and how much of the other is found to be new
curves     n labelled answers, 50 times at random: the fused score on all others
coverage   on random splits of the questions: how many of the tested answers a certificate lets through, and how often
           its threshold is broken on answers that had no part in it; with labels as they are and shuffled

``sciq:3=FILE`` asks every question in three phrasings, its own and the first two of its ``paraphrases``. Rows whose ids
agree up to a ``~`` are of one question: they are never on both sides of a split, and intervals are over questions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from hallucination_guard.calibration import Labelled, read_labelled
from hallucination_guard.calibration.certificate import FIT_SHARE_FUSED, Certificate, Drafts, certify
from hallucination_guard.calibration.folds import fold_of
from hallucination_guard.calibration.fusion import Fusion, cross_fitted, fit_fusion, log_of, signals_of
from hallucination_guard.calibration.novelty import fit_novelty
from hallucination_guard.calibration.probe import fit_probe
from hallucination_guard.calibration.ranking import auroc, gain
from hallucination_guard.calibration.stack import fit_fused
from hallucination_guard.values import States

JUDGES = {"truthfulqa": "rouge"}
SHOTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The scored answers of one model to one set; ids are those of the questions."""

    model: str
    name: str
    answers: tuple[Labelled, ...]
    texts: tuple[str, ...]

    @property
    def wrong(self) -> np.ndarray:
        """1 for a wrong answer."""
        return np.array([not each.correct for each in self.answers])

    @property
    def ids(self) -> list[str]:
        """Of the questions."""
        return [each.id for each in self.answers]

    @property
    def states(self) -> list[States]:
        """Of the answers."""
        return [each.states for each in self.answers if each.states is not None]

    def column(self, name: str) -> np.ndarray:
        """The log of one signal."""
        return np.array([log_of(name, each.scores) for each in self.answers])

    @property
    def best_single(self) -> tuple[str, np.ndarray]:
        """The score that finds most of the wrong answers by itself, chosen on these very answers."""
        best = max(signals_of(self.answers), key=lambda name: auroc(self.column(name), self.wrong))
        return best, self.column(best)


def phrased(path: Path, phrasings: int, name: str, work: Path) -> Path:
    """The questions in so many phrasings: all in their own first, so that those shown as examples are asked once."""
    if phrasings == 1:
        return path
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = []
    for at in range(phrasings):
        for number, row in enumerate(rows):
            asked = [row["query"], *row["paraphrases"]]
            if at == 0 or (number >= SHOTS and at < len(asked)):
                own = {key: each for key, each in row.items() if key not in ("id", "query", "paraphrases")}
                mark = f"~{at}" if at else ""
                lines.append(json.dumps({"id": f"{name}-{number:04}{mark}", "query": asked[at], **own}) + "\n")
    work.mkdir(parents=True, exist_ok=True)
    (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return work / f"{name}.jsonl"


def evaluated(model: str, where: str, name: str, path: Path, work: Path, limit: int | None) -> Rows:
    """Answer and score what is not yet there; shell out, so that a run can be cut short and gone on with."""
    folder = work / f"{model}-{name}"
    judge = JUDGES.get(name, "contains")
    command = [
        *(sys.executable, "-m", "hallucination_guard.cli", "evaluate", "--data", str(path), "--output", str(folder)),
        *(
            "--model",
            where,
            "--judge",
            judge,
            "--shots",
            "0" if where == "demo" else str(SHOTS),
            "--max-new-tokens",
            "24",
        ),
        *("--batch-size", "8", "--resamples", "1000", "--scores", "paragrad"),
        *(() if limit is None else ("--limit", str(limit))),
    ]
    if not (folder / "answers.jsonl").exists() or limit is not None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    stored = {}
    for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "response" in row:
            stored[row["id"]] = row["response"]
    kept = [each for each in read_labelled(folder / "answers.jsonl") if each.status == "scored"]
    return Rows(
        model=model,
        name=name,
        answers=tuple(replace(each, id=each.id.split("~")[0]) for each in kept),
        texts=tuple(stored[each.id] for each in kept),
    )


def shown(values: Sequence[float] | np.ndarray, rows: Rows) -> str:
    """AUROC with the interval of a bootstrap over questions."""
    over = gain(values, np.zeros(len(rows.answers)), rows.wrong, rows.ids, level=0.95)  # a constant has .5
    return f"{0.5 + over.value:.3f} ({0.5 + over.low:.3f} to {0.5 + over.high:.3f})"


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def against(values: Any, single: np.ndarray, rows: Rows) -> str:
    """AUROC more than the best single score has, paired by questions."""
    return str(gain(values, single, rows.wrong, rows.ids, level=0.95))


def by_text(rows: Rows) -> np.ndarray:
    """What the text alone shows, through the same recipe: logits out of fold."""
    ends = np.array([each.conditions.endings[0] == "length" for each in rows.answers], float)
    length = np.log([max(each.length, 1) for each in rows.answers])
    parts, found = fold_of(rows.ids, 5), np.zeros(len(rows.answers))
    for part in range(5):
        inside, rest = parts == part, parts != part
        words = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=2)
        train = words.fit_transform([text for text, take in zip(rows.texts, rest, strict=True) if take]).toarray()
        test = words.transform([text for text, take in zip(rows.texts, inside, strict=True) if take]).toarray()
        x = [np.column_stack([a, 3 * ends[b], length[b]]) for a, b in ((train, rest), (test, inside))]
        fitted = LogisticRegression(C=1.0, max_iter=2000).fit(x[0], rows.wrong[rest])
        found[inside] = fitted.decision_function(x[1])
    return found


def ranking(rows: Rows) -> Iterator[str]:
    """How well each score finds the wrong answers, and what a probe adds to it."""
    best, single = rows.best_single
    fused = np.log(cross_fitted(rows.answers, fit=fit_fused))
    _, probe = fit_probe(rows.states, rows.wrong.tolist(), rows.ids)
    columns: dict[str, Any] = {
        name: rows.column(name) for name in ("sequence_nll", "semgrad", "paragrad", "hybridgrad")
    }
    columns |= {
        f"best single score ({best})": single,
        "fused without a probe": np.log(cross_fitted(rows.answers, fit=fit_fusion)),
        "probe alone": probe,
        "fused, with a probe where it helps": fused,
        "text alone (control)": by_text(rows),
    }
    for name, values in columns.items():
        yield line(rows.model, rows.name, name, shown(values, rows), against(values, single, rows))
    rng = np.random.default_rng(0)
    by_question = dict(zip(sorted(set(rows.ids)), rng.permutation(len(set(rows.ids))), strict=True))
    order = np.argsort([by_question[each] for each in rows.ids], kind="stable")
    labels = rows.wrong[order]
    shuffled = replace(
        rows, answers=tuple(replace(a, correct=not w) for a, w in zip(rows.answers, labels, strict=True))
    )
    values = np.log(cross_fitted(shuffled.answers, fit=fit_fused))
    yield line(rows.model, rows.name, "fused, labels shuffled (control)", shown(values, shuffled), "")


def transfer(rows: Rows, other: Rows) -> str:
    """Fitted on one set, used on another."""
    fusion = fit_fused(rows.answers)
    forced, _ = fit_probe(rows.states, rows.wrong.tolist(), rows.ids)
    novelty = fit_novelty(rows.states, rows.ids)
    fused = [fusion.score(each.scores, each.states) for each in other.answers]
    alone = [forced.odds(each.states) for each in other.answers]
    far = [novelty is not None and novelty.distance(each.states) > novelty.limit for each in other.answers]
    _, single = other.best_single
    return line(
        rows.model,
        f"{rows.name} → {other.name}",
        shown(alone, other),
        shown(fused, other),
        against(fused, single, other),
        f"{np.mean(far):.0%}",
    )


def curve(rows: Rows, n: int, times: int) -> str:
    """Labels that a user has to give."""
    best, single = rows.best_single
    names = np.array(sorted(set(rows.ids)))
    n = min(n, 4 * len(names) // 5)
    gains, probes = [], 0
    for seed in range(times):
        rng = np.random.default_rng(seed)
        some = set(rng.choice(names, size=n, replace=False).tolist())
        seen: set[str] = set()
        train = [each for each in rows.answers if each.id in some and not (each.id in seen or seen.add(each.id))]  # type: ignore[func-returns-value]
        rest = np.array([each.id not in some for each in rows.answers])
        test = [each for each, take in zip(rows.answers, rest, strict=True) if take]
        if len({each.correct for each in train}) < 2:
            continue
        fusion = fit_fused(train)
        probes += fusion.probe is not None
        values = [fusion.score(each.scores, each.states) for each in test]
        gains.append(auroc(values, rows.wrong[rest]) - auroc(single[rest], rows.wrong[rest]))
    low, high = np.quantile(gains, [0.05, 0.95])
    mean = f"{np.mean(gains):+.3f} ({low:+.3f} to {high:+.3f})"
    return line(rows.model, rows.name, n, mean, f"{probes / len(gains):.0%}", best)


def drafts(values: Sequence[float], answers: Sequence[Labelled]) -> Drafts:
    """Single drafts."""
    return Drafts.of([(value, each.correct)] for value, each in zip(values, answers, strict=True))


def coverage(rows: Rows, times: int, *, shuffle: bool = False) -> Iterator[str]:
    """Certificates with and without a probe on the same random splits; half of the questions stay out of both parts."""
    names = sorted(set(rows.ids))
    ways: dict[str, Any] = {"without a probe": fit_fusion, "with": fit_fused}
    alphas = (0.4, 0.5, 0.6)
    answered: dict[tuple[str, float], list[float]] = {(way, alpha): [] for way in ways for alpha in alphas}
    broken: dict[tuple[str, float], list[bool]] = {key: [] for key in answered}
    for seed in range(times):
        rng = np.random.default_rng(seed)
        order = rng.permutation(names).tolist()
        first = {each.id: each for each in reversed(rows.answers)}  # one answer a question: certificates count those
        own = [first[name] for name in order]
        if shuffle:
            labels = rng.permutation([each.correct for each in own]).tolist()
            own = [replace(each, correct=label) for each, label in zip(own, labels, strict=True)]
        cut = round(FIT_SHARE_FUSED * len(own))
        fit, test = own[:cut], own[cut:]
        halves = (test[::2], test[1::2])
        for way, fitted in ways.items():
            try:
                fusion: Fusion = fitted(fit)
            except Exception as error:  # too few of a kind in this part: no certificate either
                print(f"{way}: {error}", file=sys.stderr)
                continue
            read = [[fusion.score(a.scores, a.states) for a in part] for part in (fit, test, *halves)]
            full = certify(drafts(read[0], fit), drafts(read[1], test), alphas=alphas, score="fused")
            half = certify(drafts(read[0], fit), drafts(read[2], halves[0]), alphas=alphas, score="fused")
            for alpha, whole, part in zip(alphas, full, half, strict=True):
                answered[way, alpha].append(whole.coverage if isinstance(whole, Certificate) else 0.0)
                passed = [
                    not each.correct
                    for value, each in zip(read[3], halves[1], strict=True)
                    if isinstance(part, Certificate) and value <= part.threshold
                ]
                broken[way, alpha].append(bool(passed) and float(np.mean(passed)) > alpha)
    for alpha in alphas:
        old, new = (np.mean(answered[way, alpha]) for way in ways)
        kept = [f"{np.mean(broken[way, alpha]):.3f}" for way in ways]
        what = "labels shuffled" if shuffle else "labels as they are"
        ratio = f"{new / old:.2f}" if old else "–"
        yield line(rows.model, f"{rows.name}, {what}", f"{alpha:g}", f"{old:.3f}", f"{new:.3f}", ratio, *kept)


def main() -> int:
    """Evaluate, read, print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["demo"], metavar="NAME=FOLDER")
    parser.add_argument("--sets", nargs="+", required=True, metavar="NAME[:PHRASINGS]=FILE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="A tenth of the rows, and five resamplings.")
    options = parser.parse_args()
    times = 5 if options.quick else options.times
    models = dict(each.split("=", 1) if "=" in each else (each, each) for each in options.models)
    sets = {}
    for each in options.sets:
        named, _, path = each.partition("=")
        name, _, phrasings = named.partition(":")
        sets[name] = phrased(Path(path), int(phrasings or 1), name, options.work)
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    for model, where in models.items():
        limits = {name: 100 if options.quick else None for name in sets}
        found = [evaluated(model, where, name, path, options.work, limits[name]) for name, path in sets.items()]
        for rows in found:
            say(f"\n{model}, {rows.name}: {len(rows.answers)} answers to {len(set(rows.ids))} questions, "
                f"{rows.wrong.mean():.0%} wrong; judge {rows.answers[0].judge}\n")  # fmt: skip
            say("| model | set | score | AUROC (95 %) | against the best single score |\n|---|---|---|---|---|")
            for each in ranking(rows):
                say(each)
        say("\n| model | fitted on → used on | probe alone | fused | fused against the best single score | new |")
        say("|---|---|---|---|---|---|")
        for one in found:
            for other in found:
                if one is not other:
                    say(transfer(one, other))
        first = found[0]
        say("\n| model | set | labelled | fused minus best single (90 % of draws) | with a probe | best single |")
        say("|---|---|---|---|---|---|")
        for n in (50, 100, 200, 400):
            say(curve(first, n, times))
        say("\n| model | set | α | coverage without a probe | with | ratio | broken on others, without | with |")
        say("|---|---|---|---|---|---|---|---|")
        for shuffle in (False, True):
            for each in coverage(first, 2 * times, shuffle=shuffle):
                say(each)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
