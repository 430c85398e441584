"""AnswerCheck: what the white box thinks of an agent's final answer, whatever model the agent has."""

from __future__ import annotations

from typing import Any

from smolagents import AgentMemory
from smolagents.memory import TaskStep

from hallucination_guard.errors import InputError
from hallucination_guard.guard import Guard, NotAnswered

__all__ = ["AnswerCheck"]


class AnswerCheck:
    """For ``final_answer_checks``: a final answer that the policy does not accept as it is goes back to the agent.

    smolagents checks no answer that it asks for after ``max_steps``: where nothing may leave undecided, the agent's
    model is a :class:`GuardedModel`.

    Args:
        guard: its model reads the answer as one to the task, its policy decides.
    """

    __name__ = "AnswerCheck"  # smolagents names a check that failed by it

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def __call__(self, final_answer: object, memory: AgentMemory, agent: Any = None) -> bool:
        """Whether the answer passes.

        Raises:
            NotAnswered: if not. smolagents asserts what is returned, and assertions can be switched off.
        """
        tasks = [step.task for step in memory.steps if isinstance(step, TaskStep)]
        if not tasks:
            raise InputError("the agent's memory has no task", hint="use the check in final_answer_checks")
        outcome = self.guard.review(tasks[-1], str(final_answer))
        # A check passes the answer on as it is: one with sentences to be marked or left out is not accepted so.
        if not outcome.accepted or outcome.attempts > 1 or outcome.retention not in (None, 1.0):
            raise NotAnswered(outcome)
        return True
