"""The guarded call: a model whose answers leave only by decision of a policy, each attempt recorded before.

In go messages and the facts of the call; out comes an :class:`~hallucination_guard.values.Outcome`.
:class:`Guard` is the door; behind it are the loop, the progress of each prompt, the moves and the recorder. A framework
is handed a :class:`Reply`.
"""

from __future__ import annotations

from hallucination_guard.guard.guard import Guard
from hallucination_guard.guard.moves import with_passages
from hallucination_guard.guard.recording import Review
from hallucination_guard.guard.reply import ABSTENTION, KEY, NotAnswered, OnAbstain, Reply, Replying, verdict_of
from hallucination_guard.guard.steps import Kept, Steps

__all__ = [
    "ABSTENTION",
    "KEY",
    "Guard",
    "Kept",
    "NotAnswered",
    "OnAbstain",
    "Reply",
    "Replying",
    "Review",
    "Steps",
    "verdict_of",
    "with_passages",
]
