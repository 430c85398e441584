"""The demo's calibration: fitted on other questions than the demo's, asked as the demo's policy asks them."""

from __future__ import annotations

from collections.abc import Iterator

from hallucination_guard.calibration import Calibration, fit_calibration
from hallucination_guard.demo.documents import documents
from hallucination_guard.demo.questions import Question, shipped
from hallucination_guard.errors import CalibrationMismatch
from hallucination_guard.evaluation.matching import contains_match
from hallucination_guard.guard.moves import with_passages
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.values import Generation, Message, Score, as_messages, question_of
from hallucination_guard_policies.retrieve import TEMPLATE

__all__ = ["MAX_NEW_TOKENS", "SCORE", "calibrated", "fit", "prompts_to_fit"]

MAX_NEW_TOKENS = 24
SCORE = "paragrad"
"""Of the scores that one pass gives, the one that separates right from wrong best on the calibration questions."""
_BATCH = 16


def prompts_to_fit() -> list[tuple[Question, tuple[Message, ...]]]:
    """The calibration questions, each with and, where documents are found, after retrieval: as the rag pack asks."""
    search = documents()
    prompts = []
    for question in shipped("calibration"):
        plain = as_messages(question.query)
        prompts.append((question, plain))
        if found := search.invoke(question_of(plain)):
            prompts.append((question, with_passages(plain, found, TEMPLATE)))
    return sorted(prompts, key=lambda each: len(each[1][0].content))  # a batch is as slow as its longest prompt


def fit(model: WhiteBoxModel) -> Iterator[int | Calibration]:
    """Fit a calibration on other questions than the demo's; yields how far it is, then the calibration."""
    scorer, prompts = HybridGrad(), prompts_to_fit()
    scores: list[Score] = []
    correct: list[bool] = []
    answers: list[Generation] = []
    for begin in range(0, len(prompts), _BATCH):
        part = prompts[begin : begin + _BATCH]
        generations = model.generate([messages for _, messages in part], max_new_tokens=MAX_NEW_TOKENS)
        answers += generations
        scores += scorer.batch(model, generations)
        correct += [
            contains_match(each.text, question.answers) for each, (question, _) in zip(generations, part, strict=True)
        ]
        yield min(begin + _BATCH, len(prompts))
    yield fit_calibration(scores, correct, generations=answers, score=SCORE)


def calibrated(model: WhiteBoxModel) -> Calibration | None:
    """The shipped calibration if it was fitted on this very model, else None: it then has to be fitted here."""
    calibration = Calibration.of_demo()
    try:
        calibration.check(model.identity, HybridGrad().identity)
    except CalibrationMismatch:
        return None
    return calibration
