"""One evaluation from questions to scores: what was paid for is kept in a folder, so that a run can be continued."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from hallucination_guard.errors import CalibrationError
from hallucination_guard.evaluation.agreement import Answered
from hallucination_guard.evaluation.answers import P_TRUE, Work, answer, judge, p_true
from hallucination_guard.evaluation.data import Item, Prompting
from hallucination_guard.evaluation.embedding import Embed
from hallucination_guard.evaluation.judges import Judge
from hallucination_guard.evaluation.sample import Sample
from hallucination_guard.evaluation.sampling import SAMPLED, draw, score_samples
from hallucination_guard.evaluation.satrmd import NAME as SATRMD
from hallucination_guard.evaluation.satrmd import cross_fitted
from hallucination_guard.evaluation.store import Store
from hallucination_guard.evaluation.yardsticks import FORWARD, looked_at, state_layers, unpacked
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.values import JSON, Scorer

__all__ = ["Progress", "Run"]

Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows how far something is: from what it is and how many there are to the function that is told how many are done."""


@dataclass(slots=True, kw_only=True)
class Run:
    """What one run has at hand and what it has found.

    Args:
        folder: where it is kept.
        model: that answers.
        scorer: that measures.
        items: the questions.
        prompting: how they are asked.
        binding: what the answers depend on.
        max_new_tokens: of an answer.
        batch_size: rows at once, at most.
        progress: shows how far it is.
        beginnings: whether to score every beginning that ends with a sentence, too.
        work: answers and scores batches somewhere else, see :data:`~.answers.Work`.
        extra: further scores, by name and question.
        seconds: of an answer, for scores that have a price of their own.
        costs: seconds of each part of the work, in all.
        notes: sentences that belong under the report's tables.
    """

    folder: Path
    model: WhiteBoxModel
    scorer: Scorer
    items: Sequence[Item]
    prompting: Prompting
    binding: Mapping[str, JSON]
    max_new_tokens: int
    batch_size: int
    progress: Progress
    beginnings: bool = False
    work: Work | None = None
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def store(self, name: str, **more: JSON) -> Store:
        """The file that keeps rows of one kind."""
        return Store(self.folder / f"{name}.jsonl", {**self.binding, **more})

    def is_answered(self) -> bool:
        """Whether every question is answered and scored already."""
        rows = self.store("generations").rows
        return all(item.id in rows for item in self.items)

    def answered(self) -> Store:
        """Every question answered and scored."""
        answers = self.store("generations")
        with self.progress("answering and scoring", len(self.items)) as done:
            answer(
                self.model,
                self.items,
                self.prompting,
                answers,
                scorer=self.scorer,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                beginnings=self.beginnings,
                done=done,
                work=self.work,
            )
        for part in ("generate", "score"):
            rows = (answers.rows[item.id] for item in self.items)
            self.costs[part] = sum(row["seconds"][part] for row in rows if not row["problem"])
        return answers

    def labelled(self, answers: Store, by: Judge | None) -> tuple[dict[str, bool], list[str]]:
        """The labels by id, and why others have none; ``by`` is None where they are given with the questions."""
        if by is None:
            return {item.id: bool(item.correct) for item in self.items}, []
        verdicts = self.store(f"labels-{_slug(by.name)}", judge=by.name)
        with self.progress("judging", len(self.items)) as done:
            judge(self.items, answers, verdicts, by, done=done)
        found = {item.id: verdicts.rows[item.id] for item in self.items if not answers.rows[item.id]["problem"]}
        labels = {key: row["correct"] for key, row in found.items() if row["correct"] is not None}
        return labels, [row["problem"] for row in found.values() if row["correct"] is None]

    def add_p_true(self, items: Sequence[Item], answers: Store) -> None:
        """Ask the model whether its answers are true."""
        store = self.store("p_true", p_true=P_TRUE)
        with self.progress("asking whether it is true", len(items)) as done:
            for at, item in enumerate(items, start=1):
                if item.id not in store.rows:
                    began = time.perf_counter()
                    value = p_true(self.model, item.query, answers.rows[item.id]["response"])
                    store.add([{"id": item.id, "p_true": value, "seconds": time.perf_counter() - began}])
                done(at)
        spent = sum(store.rows[item.id]["seconds"] for item in items)
        self.extra["1-p_true"] = {item.id: 1.0 - store.rows[item.id]["p_true"] for item in items}
        self.costs["P(True)"], self.seconds["1-p_true"] = spent, spent / len(items) if items else 0.0
        self.notes.append(f"1-p_true: the model was asked {P_TRUE!r}; P(True) = P(A) / (P(A) + P(B)).")

    def add_yardsticks(self, items: Sequence[Item], answers: Store, labels: Mapping[str, bool]) -> None:
        """Read every answer once more, and learn SATRMD from its states.

        Args:
            items: the questions.
            answers: to them.
            labels: whether each is right.
        """
        store = self.store("yardsticks", scores=list(FORWARD), layers=list(state_layers(self.model.layout.depth)))
        with self.progress("reading them once more", len(items)) as done:
            for at, item in enumerate(items, start=1):
                if item.id not in store.rows:
                    store.add([looked_at(self.model, item, self.prompting, answers.rows[item.id])])
                done(at)
        rows = {item.id: store.rows[item.id] for item in items}
        spent = sum(row["seconds"] for row in rows.values())
        self.costs["reading them once more"] = spent
        for name in FORWARD:
            self.extra[name] = {key: row["scores"][name] for key, row in rows.items()}
            self.seconds[name] = spent / max(1, len(items))
        wrong = {key: not labels[key] for key in sorted(rows)}
        # Fitting takes a while, and another judge or --limit has other labels: a file for each.
        mark = hashlib.sha256(json.dumps(wrong).encode()).hexdigest()[:8]
        fitted = self.store(f"{SATRMD}-{mark}", yardsticks=store.path.name)
        try:
            if not fitted.rows:
                began = time.perf_counter()
                found = cross_fitted({key: unpacked(row["states"]) for key, row in rows.items()}, wrong)
                share = (time.perf_counter() - began) / len(found)
                fitted.add([{"id": key, SATRMD: value, "seconds": share} for key, value in found.items()])
        except CalibrationError as error:
            self.notes.append(f"No {SATRMD}: {error}.")
        else:
            self.extra[SATRMD] = {key: fitted.rows[key][SATRMD] for key in rows}
            self.costs[f"fitting {SATRMD}"] = sum(fitted.rows[key]["seconds"] for key in rows)
            self.seconds[SATRMD] = spent / max(1, len(items))
            self.notes.append(
                f"{SATRMD}: of every answer by what was fitted on the labels of the other 4 of 5 folds. Its seconds "
                "are those of the one pass that it shares with rauq, self-certainty and boostedprob."
            )

    def add_samples(self, items: Sequence[Item], answers: Store, *, k: int, embed: Embed, own: bool) -> None:
        """Draw k more answers each, and compare them with each other and with the answer.

        Args:
            items: the questions.
            answers: to them.
            k: answers to each.
            embed: embeds texts.
            own: whether by the model's own states, for want of a sentence model.
        """
        settings = {"k": k, "temperature": 1.0, "top_p": 1.0, "seed": 0, "rows": 2}  # since they hold token ids
        store = self.store("samples", samples=settings)
        with self.progress(f"drawing {k} answers each", len(items)) as done:
            draw(
                self.model,
                items,
                self.prompting,
                store,
                k=k,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                done=done,
            )
        by_meaning = None if own else 0.9
        bound: dict[str, JSON] = {"embedding": embed.name, "by_meaning": by_meaning, "scores": list(SAMPLED)}
        scores = self.store("sampled", samples=settings, **bound)
        with self.progress("comparing them", len(items)) as done:
            for at, item in enumerate(items, start=1):
                if item.id not in scores.rows:
                    row = store.rows[item.id]
                    samples = [
                        Sample(text=each["text"], without=tuple(each["without"]), logprobs=tuple(each["logprobs"]))
                        for each in row["samples"]
                    ]
                    found, seconds = score_samples(
                        item.query,
                        samples,
                        answer=Answered.of(answers.rows[item.id]),
                        embed=embed,
                        by_meaning=by_meaning,
                    )
                    if row["eigenscore"] is not None:
                        found["eigenscore"], seconds["eigenscore"] = row["eigenscore"], 0.0
                    scores.add([{"id": item.id, "scores": found, "seconds": seconds}])
                done(at)
        drawing = sum(store.rows[item.id]["seconds"] for item in items)
        self.costs[f"drawing and reading {k} answers each"] = drawing
        self.costs["comparing them"] = sum(sum(scores.rows[item.id]["seconds"].values()) for item in items)
        for name in SAMPLED:
            having = {item.id: scores.rows[item.id] for item in items if name in scores.rows[item.id]["scores"]}
            self.extra[name] = {key: row["scores"][name] for key, row in having.items()}
            spent = sum(row["seconds"][name] for row in having.values()) + drawing
            self.seconds[name] = spent / max(1, len(items))
        meaning = "the same words after normalising" if own else f"or similarity ≥ {by_meaning} by {embed.name}"
        self.notes.append(
            f"Scores of samples: {k} answers at temperature 1, seed 0; likelihoods at temperature 1. Clusters of "
            f"semantic_entropy: {meaning}. Similarities of sar, cocoa and semantic_density: {embed.name}"
            f"{', since no sentence model was given: a makeshift' if own else ''}. eigenscore: the model's own middle "
            "layer. The seconds of each hold the drawing, which they share."
        )


def _slug(name: str) -> str:
    plain = re.sub(r"[^a-z0-9.]+", "-", name.casefold()).strip("-")[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
