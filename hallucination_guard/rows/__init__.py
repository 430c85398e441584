"""A file of prompts or answers, scored row by row, so that one bad line ends nothing and an interruption costs nothing.

In go lines of JSON (:func:`read_lines`), a model and a scorer; out come rows in batches (:func:`score_lines`).
:class:`Partial` keeps finished rows beside the output until all are there.
"""

from __future__ import annotations

from hallucination_guard.rows.partial import Partial
from hallucination_guard.rows.rows import Line, Rows, planned, read_lines, score_batch, score_lines

__all__ = ["Line", "Partial", "Rows", "planned", "read_lines", "score_batch", "score_lines"]
