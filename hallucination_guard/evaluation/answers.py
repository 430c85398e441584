"""One generation pass, scored batch by batch, stored, and read by everything else.

A batch is scored right after it is generated, while what generating kept for the gradient is still there; so all
single-pass scores of a data set cost one generation pass and a small share of it. Rows of like length go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from hallucination_guard.calibration.labelled import Beginning, Labelled
from hallucination_guard.errors import ConfigurationError, GuardError
from hallucination_guard.evaluation.data import Item, Prompting
from hallucination_guard.evaluation.judges import Judge
from hallucination_guard.evaluation.store import Store
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.beginnings import score_beginnings
from hallucination_guard.scoring.scorers import nothing_to_measure
from hallucination_guard.values import (
    Conditions,
    Generation,
    ModelIdentity,
    Score,
    Scorer,
    ScorerIdentity,
    States,
    StreamingScorer,
)

__all__ = ["P_TRUE", "Work", "answer", "answer_rows", "judge", "labelled", "p_true"]

P_TRUE = (
    "Somebody was asked a question and proposed an answer.\n"
    "Question: {query}\n"
    "Proposed answer: {answer}\n"
    "Is the proposed answer true or false?\n"
    "A: true\n"
    "B: false\n"
    "Reply with the letter only. The letter is:"
)
"""What the model is asked about its own answer; P(True) = P(A) / (P(A) + P(B)) for the first token of its reply."""

_LETTERS = ("A", "B")

Work: TypeAlias = Callable[[Iterable[Sequence[Item]]], Iterator[list[dict[str, Any]]]]
"""Turns batches of questions into rows."""


def answer(
    model: WhiteBoxModel,
    items: Sequence[Item],
    prompting: Prompting,
    store: Store,
    *,
    scorer: Scorer,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    beginnings: bool = False,
    done: Callable[[int], None] = lambda _: None,
    work: Work | None = None,
) -> None:
    """Answer (or read) and score what is not in ``store`` yet.

    A question that cannot be answered or scored becomes a row with its problem: it ends nothing and is counted.

    Args:
        model: a :class:`~hallucination_guard.WhiteBoxModel`.
        items: the questions.
        prompting: how they are asked.
        store: where rows are kept.
        scorer: gives all scores in one pass.
        max_new_tokens: of an answer.
        batch_size: questions that are answered together.
        beginnings: whether to score every beginning that ends with a sentence, too.
        done: told how many of ``items`` are finished.
        work: does :func:`answer_rows` on batches, in any order, and perhaps on one twice; here and one after the other
            by default.
    """

    def here(parts: Iterable[Sequence[Item]]) -> Iterator[list[dict[str, Any]]]:
        return (answer_rows(model, part, prompting, scorer, max_new_tokens, beginnings) for part in parts)

    rest = [item for item in items if item.id not in store.rows]
    finished = len(items) - len(rest)
    done(finished)
    for rows in (work or here)(batches(rest, prompting, batch_size)):
        new = [row for row in rows if row["id"] not in store.rows]
        store.add(new)
        finished += len(new)
        done(finished)


def batches(items: Iterable[Item], prompting: Prompting, size: int) -> Iterator[list[Item]]:
    """Longest first, so that a batch that does not fit into memory shows at once."""
    ordered = sorted(items, key=lambda each: -len(prompting(each.query)) - len(each.response or ""))
    for at in range(0, len(ordered), size):
        yield ordered[at : at + size]


def answer_rows(
    model: WhiteBoxModel,
    items: Sequence[Item],
    prompting: Prompting,
    scorer: Scorer,
    max_new_tokens: int,
    beginnings: bool,
) -> list[dict[str, Any]]:
    """The rows of one batch; a question that cannot be answered or scored has one with its problem."""
    try:
        generations = _generations(model, items, prompting, max_new_tokens)
        if beginnings:
            parts = [_parts(model, scorer, each) for each in generations]
            return [_row(*each) for each in zip(items, generations, [own[-1][1] for own in parts], parts, strict=True)]
        scores = scorer.batch(model, generations)
    except GuardError as error:
        # Whatever failed must name its own row: they are tried one by one.
        if len(items) == 1:
            return [{"id": items[0].id, "query": items[0].query, "problem": str(error)}]
        return [
            row for item in items for row in answer_rows(model, [item], prompting, scorer, max_new_tokens, beginnings)
        ]
    return [_row(*each) for each in zip(items, generations, scores, strict=True)]


def _generations(
    model: WhiteBoxModel, items: Sequence[Item], prompting: Prompting, max_new_tokens: int
) -> Sequence[Generation]:
    """Read what has an answer; generate the rest, together."""
    questions = {item.id: prompting.question(item.query) for item in items}
    found = {
        item.id: model.read(prompting(item.query), answer=item.response, question=questions[item.id])
        for item in items
        if item.response is not None
    }
    rest = [item for item in items if item.response is None]
    if rest:
        made = model.generate(
            [prompting(item.query) for item in rest],
            question=[questions[item.id] for item in rest],
            max_new_tokens=max_new_tokens,
            stop=prompting.stop,
        )
        found |= {item.id: generation for item, generation in zip(rest, made, strict=True)}
    return [found[item.id] for item in items]


def _parts(model: WhiteBoxModel, scorer: Scorer, generation: Generation) -> Sequence[tuple[int, Score]]:
    """Its beginnings and their scores, the whole last; the whole alone where one of them has no score."""
    if not isinstance(scorer, StreamingScorer):
        raise ConfigurationError(f"the scorer {scorer.identity.name!r} does not score beginnings")
    if reason := nothing_to_measure(generation):
        return [(len(generation.response_token_ids), Score.unscorable(reason, scorer=scorer.identity))]
    return score_beginnings(model, scorer, generation)


def _row(item: Item, generation: Generation, score: Score, parts: Sequence[tuple[int, Score]] = ()) -> dict[str, Any]:
    beginnings = [{"length": len(each.token_logprobs), "scores": dict(each.scores)} for _, each in parts if each.scores]
    return {
        "id": item.id,
        "query": item.query,
        "response": generation.content if generation.thinking else generation.text,
        "response_token_ids": list(generation.response_token_ids),
        "conditions": Conditions.of(generation).to_json_dict(),
        "length": len(score.token_logprobs) or len(generation.response_token_ids),
        "status": score.status,
        "reason": score.reason,
        "scores": dict(score.scores),
        "seconds": {"generate": generation.seconds, "score": score.seconds + sum(own.seconds for _, own in parts[:-1])},
        "problem": "",
        **({"beginnings": beginnings} if beginnings else {}),
        **({"states": score.states.to_json_dict()} if score.states is not None else {}),
    }


def judge(
    items: Sequence[Item], answers: Store, verdicts: Store, by: Judge, *, done: Callable[[int], None] = lambda _: None
) -> None:
    """Label every stored answer that has no label of this judge yet; one by one, since a judge may be interrupted."""
    for at, item in enumerate(items, start=1):
        row = answers.rows[item.id]
        if item.id not in verdicts.rows and not row["problem"]:
            found = by(item.query, row["response"], item.answers)
            verdicts.add([{"id": item.id, "judge": by.name, "correct": found.correct, "problem": found.problem}])
        done(at)


def labelled(
    items: Sequence[Item],
    answers: Store,
    labels: Mapping[str, bool],
    *,
    by: str,
    model: ModelIdentity,
    scorer: ScorerIdentity,
) -> list[Labelled]:
    """The answers that have a label, in the order of the items.

    Args:
        items: the questions.
        answers: from :func:`answer`.
        labels: by id; who is not among them is left out.
        by: who gave them.
        model: who answered.
        scorer: who measured.
    """
    found = []
    for item in items:
        row = answers.rows[item.id]
        if item.id in labels and not row["problem"]:
            found.append(
                Labelled(
                    id=item.id,
                    correct=labels[item.id],
                    judge=by,
                    scores=row["scores"],
                    reason=row["reason"],
                    length=row.get("length", len(row["response_token_ids"])),
                    model=model,
                    scorer=scorer,
                    conditions=Conditions.from_json_dict(row["conditions"]),
                    beginnings=tuple(Beginning(**each) for each in row.get("beginnings", ())),
                    states=States.from_json_dict(row["states"]) if "states" in row else None,
                    seconds=row["seconds"],
                )
            )
    return found


def p_true(model: WhiteBoxModel, query: str, response: str) -> float:
    """P(True): how far the model takes its own answer for true when asked, by one more forward pass.

    Raises:
        InputError: if the question does not fit into the context.
        ConfigurationError: if the tokenizer cannot tell the two letters apart by their first token.
    """
    import torch

    from hallucination_guard.model.view import undisturbed

    asked = P_TRUE.format(query=query, answer=response.strip())
    prompt = model.prompt(asked)
    letters = _first_tokens(model.tokenizer)
    with undisturbed(model.model, grad=False):
        ids = torch.tensor([prompt.token_ids], device=model.device)
        view = model.layout.view(model.model, {})
        final = model.layout.decoder_of(view)(input_ids=ids, use_cache=False).last_hidden_state[0, -1:]
        logits = model.head.logits(final)[0]
        mass = torch.stack([torch.logsumexp(logits[list(each)], dim=0) for each in letters])
        return float(torch.softmax(mass, dim=0)[0])


def _first_tokens(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens that a reply of each letter may begin with, with and without a space before it."""
    pairs = []
    for before in ("", " "):
        first = [tokenizer(before + letter, add_special_tokens=False)["input_ids"][0] for letter in _LETTERS]
        if len(set(first)) == len(_LETTERS):
            pairs.append(first)
    if not pairs:
        raise ConfigurationError("the tokenizer writes A and B with one first token", hint="leave P(True) out")
    return [tuple(sorted(set(each))) for each in zip(*pairs, strict=True)]
