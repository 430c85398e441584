"""The demo: a small model that makes things up, with and without a guard, on questions with known answers.

In go the package's own questions and documents; out comes a row a question and a summary. :class:`BM25Retriever`, the
search over a file or folder of documents, is also what ``ask --documents`` uses. Nothing is imported until a name is
used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hallucination_guard._lazy import lazily

if TYPE_CHECKING:
    from hallucination_guard.demo.bm25 import BM25Retriever
    from hallucination_guard.demo.compare import Row, Summary, run, summarise
    from hallucination_guard.demo.fitting import calibrated, fit, prompts_to_fit
    from hallucination_guard.demo.questions import Question, shipped

_HOME = {
    "BM25Retriever": "bm25",
    "Question": "questions",
    "Row": "compare",
    "Summary": "compare",
    "calibrated": "fitting",
    "fit": "fitting",
    "prompts_to_fit": "fitting",
    "run": "compare",
    "shipped": "questions",
    "summarise": "compare",
}

__getattr__ = lazily(__name__, _HOME)

__all__ = [
    "BM25Retriever",
    "Question",
    "Row",
    "Summary",
    "calibrated",
    "fit",
    "prompts_to_fit",
    "run",
    "shipped",
    "summarise",
]


def __dir__() -> list[str]:
    return __all__
