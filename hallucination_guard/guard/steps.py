"""A guarded call a step at a time, for a program that keeps it in between: draw, score, decide, and again.

Each step takes what the one before gave, as plain JSON, and needs nothing else: it may run in another process, with the
same model. What is kept holds drafts that nobody has decided on, and so may the frames of an error. A call in one go
(:class:`Guard`) has no such moment, and scores faster: a draft that was kept as text is read again for its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from hallucination_guard.errors import ConfigurationError
from hallucination_guard.guard.guard import Guard
from hallucination_guard.guard.kept import keep, restore
from hallucination_guard.guard.progress import Progress
from hallucination_guard.values import JSON, Call, Messages, Outcome, Verdict, as_messages

__all__ = ["Kept", "Steps"]

Kept: TypeAlias = Mapping[str, JSON]
"""A call between two steps, as plain JSON. It holds drafts."""


class Steps:
    """The steps of a guard's calls.

    Args:
        guard: whose they are; each step looks at it anew.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def begin(self, messages: Messages, *, request_id: str, call: Call) -> Kept:
        """A call of which nothing has been generated.

        Args:
            messages: the prompt.
            request_id: under which every attempt is recorded.
            call: the facts of the call.

        Raises:
            InputError: if the prompt cannot be used.
        """
        self.guard._loop()  # what cannot work together is refused before anything is kept
        asked, settings = as_messages(messages), self.guard.generation
        self.guard.model.prompt(asked, **settings.offered)
        return keep(Progress(asked=asked, messages=asked, settings=settings, call=call, request_id=request_id))

    def draw(self, kept: Kept) -> Kept:
        """Generate the next draft. One that is interrupted is recorded, as in any guarded call."""
        loop, progress = self.guard._loop(), self._restored(kept)
        try:
            loop.draw([progress])
        except BaseException as error:
            loop.recorder.interrupted([progress], error)
            raise
        return keep(progress)

    def score(self, kept: Kept) -> tuple[Kept, Verdict]:
        """Measure the newest draft; its verdict."""
        loop, progress = self.guard._loop(), self._restored(kept)
        [score] = loop.measure([progress])
        loop.judge(progress, score)
        assert progress.newest is not None
        return keep(progress), progress.newest.verdict

    def decide(self, kept: Kept) -> tuple[Kept, Outcome]:
        """Decide on what was scored, as it is judged now, carry it out and record it.

        Returns:
            What is kept for another attempt, and the outcome. Where its decision is ``retry`` or ``retrieve`` it lets
            nothing through, and the call goes on with :meth:`draw`.

        Raises:
            AuditError: if the log cannot be written. Nothing was decided then, and the step can be taken again.
        """
        loop, progress = self.guard._loop(), self._restored(kept)
        loop.judge_again(progress)
        judged = replace(progress)  # a retrieval forgets what was judged
        decision = loop.settle(progress)
        outcome = progress.outcome or judged.end(decision, None)
        return keep(replace(progress, outcome=None)), outcome

    def _restored(self, kept: Kept) -> Progress:
        progress = restore(kept)
        if progress.newest is not None and progress.newest.generation.model != self.guard.model.identity:
            raise ConfigurationError(
                f"a draft of {progress.newest.generation.model.name!r} was kept, and the guard's model is another one",
                hint="go on with the model that the call began with, or ask again",
            )
        score = None if progress.judged is None else progress.judged.verdict.score
        if score is not None and score.status == "scored":
            own = (self.guard.scorer.identity, getattr(self.guard.scorer, "sentences", None))
            if (score.scorer, score.sentence_scorer) != (own[0], own[1] if score.sentences else None):
                raise ConfigurationError(
                    "a draft was scored by another scorer than the guard's",
                    hint="go on with the scorer that it began with",
                )
        return progress
