"""The demo's calibration: fitted on other questions than the demo's, asked as the demo's policy asks them."""

from __future__ import annotations

from collections.abc import Iterator

from hallucination_guard.calibration import Calibration, Labelled, calibrate
from hallucination_guard.calibration.certificate import policy_hash
from hallucination_guard.demo.documents import documents
from hallucination_guard.demo.questions import Question, shipped
from hallucination_guard.errors import CalibrationMismatch
from hallucination_guard.evaluation.matching import contains_match
from hallucination_guard.guard.moves import with_passages
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.values import Conditions, Message, as_messages, question_of
from hallucination_guard_policies import load_policy
from hallucination_guard_policies.retrieve import TEMPLATE

__all__ = ["MAX_NEW_TOKENS", "SCORE", "calibrated", "fit", "prompts_to_fit"]

MAX_NEW_TOKENS = 24
SCORE = "fused"
"""All scores that one pass gives and a probe in one: it tells right from wrong best on the calibration questions."""
_BATCH = 16


def prompts_to_fit() -> list[tuple[Question, int, tuple[Message, ...]]]:
    """The calibration questions, each asked at once and, where documents are found, with them: as the rag pack asks.

    Returns:
        The question, which attempt of the pack it is, and the prompt.
    """
    search = documents()
    prompts = []
    for question in shipped("calibration"):
        plain = as_messages(question.query)
        prompts.append((question, 1, plain))
        if found := search.invoke(question_of(plain)):
            prompts.append((question, 2, with_passages(plain, found, TEMPLATE)))
    return sorted(prompts, key=lambda each: len(each[2][0].content))  # a batch is as slow as its longest prompt


def fit(model: WhiteBoxModel) -> Iterator[int | Calibration]:
    """Fit a calibration on other questions than the demo's; yields how far it is, then the calibration."""
    scorer, prompts = HybridGrad(), prompts_to_fit()
    policy = load_policy("rag", retriever=documents())
    labelled: list[Labelled] = []
    for begin in range(0, len(prompts), _BATCH):
        part = prompts[begin : begin + _BATCH]
        generations = model.generate([messages for *_, messages in part], max_new_tokens=MAX_NEW_TOKENS)
        for (question, attempt, _), made, score in zip(
            part, generations, scorer.batch(model, generations), strict=True
        ):
            labelled.append(
                Labelled(
                    id=question.id,
                    attempt=attempt,
                    correct=contains_match(made.text, question.answers),
                    judge="contains",
                    scores=score.scores,
                    reason=score.reason,
                    length=len(made.response_token_ids),
                    model=made.model,
                    scorer=score.scorer,
                    conditions=Conditions.of(made),
                    states=score.states,
                    policy=policy_hash(policy),
                )
            )
        yield min(begin + _BATCH, len(prompts))
    yield calibrate(sorted(labelled, key=lambda each: (each.id, each.attempt)), score=SCORE, policy=policy)


def calibrated(model: WhiteBoxModel) -> Calibration | None:
    """The shipped calibration if it was fitted on this very model, else None: it then has to be fitted here."""
    calibration = Calibration.of_demo()
    try:
        calibration.check(model.identity, HybridGrad().identity)
    except CalibrationMismatch:
        return None
    return calibration
