"""How good a score is at telling wrong answers from right ones, on labelled answers: metrics, judges, report."""

from hallucination_guard.evaluation.answers import P_TRUE, answer, judge, labelled, p_true
from hallucination_guard.evaluation.columns import Columns, columns
from hallucination_guard.evaluation.data import Item, Prompting, read_items
from hallucination_guard.evaluation.embedding import OwnStates, SentenceModel
from hallucination_guard.evaluation.judges import Contains, Embedding, Judgement, Rouge, llm_judge, rouge_l
from hallucination_guard.evaluation.metrics import Compared, Estimate, bootstrap, measure
from hallucination_guard.evaluation.publish import write_report
from hallucination_guard.evaluation.report import Report, make_report
from hallucination_guard.evaluation.store import Store

__all__ = [
    "P_TRUE",
    "Columns",
    "Compared",
    "Contains",
    "Embedding",
    "Estimate",
    "Item",
    "Judgement",
    "OwnStates",
    "Prompting",
    "Report",
    "Rouge",
    "SentenceModel",
    "Store",
    "answer",
    "bootstrap",
    "columns",
    "judge",
    "labelled",
    "llm_judge",
    "make_report",
    "measure",
    "p_true",
    "read_items",
    "rouge_l",
    "write_report",
]
