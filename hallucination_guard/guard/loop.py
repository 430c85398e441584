"""The loop: draw, score, judge, decide, carry out, record; round by round until every prompt has an outcome.

It fails closed by construction: text leaves only in an Outcome, an Outcome is made only from a Decision, and a Decision
comes only from the policy, after its record was written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tenacity import Retrying, retry_if_result

from hallucination_guard.errors import CallError, GuardError, InputError, PolicyError, ScoringError
from hallucination_guard.guard.joined import Joined
from hallucination_guard.guard.judging import Judging
from hallucination_guard.guard.moves import Again, Ended, carry_out
from hallucination_guard.guard.progress import Draft, Progress
from hallucination_guard.guard.recording import Recorder
from hallucination_guard.guard.sentences import delivered
from hallucination_guard.guard.telemetry import evaluated
from hallucination_guard.values import Decision, Drawing, Generation, Model, Policy, Score, Scorer, Verdict

__all__ = ["Loop"]

# What the application makes of these is its own: they go to the standard logger, under one key of ``extra``.
_log = logging.getLogger("hallucination_guard")
_NUDGES = 2  # a redraw that repeats an earlier draft is drawn this often again, each time warmer
_FAR = 7919  # further than any number of redraws, so that no seed is used twice


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What takes part in one guarded call; fixed while it runs.

    Args:
        model: generates and reads.
        scorer: measures.
        judging: says what scores mean.
        policy: decides.
        recorder: writes down.
        max_attempts: after so many answers a policy's wish for another is an abstention.
        batch_size: prompts that are generated and scored together.
        joined: how it draws and scores beside other calls; None if it has the model for itself.
    """

    model: Model
    scorer: Scorer
    judging: Judging
    policy: Policy
    recorder: Recorder
    max_attempts: int
    batch_size: int
    joined: Joined | None = None

    def run(self, prompts: Sequence[Progress]) -> None:
        """Bring every prompt to an outcome."""
        another = Retrying(retry=retry_if_result(bool))  # it ends because every decision but two uses up an attempt
        try:
            another(self._round, prompts)
        except BaseException as error:
            self.recorder.interrupted(prompts, error)
            raise

    def _round(self, prompts: Sequence[Progress]) -> list[Progress]:
        """One attempt for every prompt without an outcome; those that want another."""
        for group in _alike([each for each in prompts if each.outcome is None]):
            for begin in range(0, len(group), self.batch_size):
                self._attempt(group[begin : begin + self.batch_size])
        return [each for each in prompts if each.outcome is None]

    def _attempt(self, group: list[Progress]) -> None:
        self.draw(group)
        for progress, score in zip(group, self.measure(group), strict=True):
            self.judge(progress, score)
            self.settle(progress)

    # ------------------------------------------------------------------------------------------------ drawing

    def draw(self, group: list[Progress]) -> None:
        """Take in the next answer of each prompt; they are drawn alike."""
        generations = [each.given for each in group if each.given is not None] or self._generate(group)
        stale = [progress for progress, each in zip(group, generations, strict=True) if _drawn_before(progress, each)]
        for progress, generation in zip(group, generations, strict=True):
            progress.begin(generation, self._unfinished("interrupted while scoring"))
        self._nudge(stale)

    def _nudge(self, stale: list[Progress]) -> None:
        """Draw redraws that repeat an earlier draft again, as far as the model has others to give."""
        for nudge in range(1, _NUDGES + 1):
            if not stale:
                return
            drawing = stale[0].drawing
            warmer = drawing | Drawing(
                seed=drawing["seed"] + _FAR * nudge, temperature=drawing["temperature"] * (1 + nudge / 2)
            )
            again = []
            for progress, other in zip(stale, self._generate(stale, warmer), strict=True):
                assert progress.newest is not None
                if _drawn_before(progress, other):
                    again.append(progress)
                progress.replace(replace(other, seconds=progress.newest.generation.seconds + other.seconds))
            stale = again

    def _generate(self, group: Sequence[Progress], drawing: Drawing | None = None) -> list[Generation]:
        drawing = group[0].drawing if drawing is None else drawing
        if self.joined is not None:
            unfinished = self._unfinished("interrupted before it was scored")
            return [self.joined.draw(each, drawing, unfinished=unfinished) for each in group]
        prompts, questions = [each.messages for each in group], [each.settings.question for each in group]
        if not any(questions):
            return list(self.model.generate(prompts, **drawing))
        return list(self.model.generate(prompts, question=questions, **drawing))

    def _unfinished(self, why: str) -> Verdict:
        return Verdict(score=Score.failed(why, scorer=self.scorer.identity))

    # ------------------------------------------------------------------------------------------------ scoring

    def measure(self, group: Sequence[Progress]) -> list[Score]:
        """The scores of the newest drafts. What was kept for scoring is forgotten."""
        generations = [each.newest.generation for each in group if each.newest is not None]
        scores = self._scores(group, generations)
        for generation in generations:
            generation.release()
        return scores

    def _scores(self, group: Sequence[Progress], generations: Sequence[Generation]) -> list[Score]:
        """Scores of what can be scored; why the rest cannot."""
        given = {at: each.unscorable for at, each in enumerate(group) if each.unscorable}
        rest = [each for at, each in enumerate(generations) if at not in given]
        found = iter(self.score(rest) if self.joined is None else self.joined.score(rest, self.score))
        for each in group:
            each.unscorable = ""
        return [
            Score.unscorable(given[at], scorer=self.scorer.identity) if at in given else next(found)
            for at in range(len(generations))
        ]

    def score(
        self,
        generations: Sequence[Generation],
        measure: Callable[[Model, Sequence[Generation]], list[Score]] | None = None,
    ) -> list[Score]:
        """Scores, or the words why there are none: any failure becomes a score that the policy must decide on.

        Args:
            generations: the answers.
            measure: how they are scored; as the scorer scores a batch by default.
        """
        identity = self.scorer.identity
        if not generations:
            return []
        try:
            scores = (measure or self.scorer.batch)(self.model, generations)
        except Exception as error:
            if len(generations) > 1:  # one that fails must not take the others with it
                return [self.score([each], measure)[0] for each in generations]
            _log_failure("scoring", error)
            return [Score.failed(self._in_words(error), scorer=identity)]
        if not isinstance(scores, list) or len(scores) != len(generations):
            return [Score.failed("the scorer did not give one score an answer", scorer=identity) for _ in generations]
        return [
            score
            if isinstance(score, Score) and score.scorer == identity
            else Score.failed("what the scorer gave is not a score of its own", scorer=identity)
            for score in scores
        ]

    def _in_words(self, error: Exception) -> str:
        """The kind of error: a message may quote prompt or answer, which the log need not be allowed to hold."""
        ours = type(self.scorer).__module__.partition(".")[0] == __package__.partition(".")[0]
        return error.message if ours and isinstance(error, ScoringError) else f"{type(error).__name__} while scoring"

    # --------------------------------------------------------------------------------- judging and carrying out

    def judge(self, progress: Progress, score: Score) -> None:
        """Say what the score means, and which draft the next decision is about."""
        assert progress.newest is not None
        generation = progress.newest.generation
        progress.generating += generation.seconds
        progress.scoring += score.seconds
        progress.tokens_in += len(generation.prompt_token_ids)
        progress.tokens_out += len(generation.response_token_ids)
        verdict = self.judging.verdict(score, conditions=progress.conditions(generation), attempt=progress.attempt)
        progress.newest = Draft(attempt=progress.attempt, generation=generation, verdict=verdict)
        if progress.judged is None or progress.redraw is None or progress.redraw.keep == "last":
            progress.judged = progress.newest
        else:
            progress.judged = min(progress.judged, progress.newest, key=lambda draft: self.judging.doubt(draft.verdict))

    def judge_again(self, progress: Progress) -> None:
        """Say what the score that was judged means now: since then there may be labels, or another calibration."""
        draft = progress.judged
        assert draft is not None
        verdict = self.judging.verdict(
            draft.verdict.score, conditions=progress.conditions(draft.generation), attempt=draft.attempt, notices=False
        )
        progress.judged = replace(draft, verdict=verdict)

    def settle(self, progress: Progress) -> Decision:
        """Let the policy decide on what was judged, carry it out and record it; what it decided."""
        assert progress.judged is not None
        decision = self.decide(progress, progress.judged.verdict)
        progress.rules.append(decision.rule)
        self.carry_out(progress, progress.judged, decision)
        return decision

    def decide(self, progress: Progress, verdict: Verdict) -> Decision:
        """What the policy says, within the guard's own limit of attempts."""
        decision = self.policy(verdict, progress.situation)
        if not isinstance(decision, Decision):
            raise PolicyError(f"the policy decided {decision!r}", hint="a policy gives a Decision, also to accept")
        if decision.action in ("retry", "retrieve") and progress.attempt >= self.max_attempts:
            return Decision(
                action="abstain",
                rule="max_attempts",
                reason=f"{progress.attempt} attempts were made and the policy wants another: {decision.reason}",
            )
        return decision

    def carry_out(self, progress: Progress, draft: Draft, decision: Decision) -> None:
        """Act, record, and end the call or set up its next attempt."""
        if decision.move is None:
            text = delivered(draft, decision) if decision.action == "accept" else None
            self.recorder.draft(progress, decision)
            self.end(progress, decision, text)
            return
        try:
            found = carry_out(decision.move, model=self.model, asked=progress.asked, settings=progress.settings)
            self._check_room(progress, found)
        except (CallError, InputError) as error:
            self._give_up(progress, decision, error)
            return
        self.recorder.draft(progress, decision)
        if isinstance(found, Again):
            progress.take_up(found)
            return
        if found.text is not None:
            self.recorder.escalated(progress, decision, answered_by=found.answered_by, answer=found.text)
        self.end(progress, decision, found.text)

    def _check_room(self, progress: Progress, found: Again | Ended) -> None:
        """See that the next prompt of a stream leaves room for what was released, after which it goes on.

        Raises:
            InputError: if it does not.
        """
        if not progress.released_ids or isinstance(found, Ended) or self.model.context is None:
            return
        prompt = self.model.prompt(found.messages or progress.messages, **progress.settings.offered)
        if len(prompt.token_ids) + len(progress.released_ids) >= self.model.context:
            raise InputError("the next prompt and what was released are longer than the context", hint="shorten it")

    def _give_up(self, progress: Progress, decision: Decision, error: GuardError) -> None:
        _log_failure(decision.action, error)
        closed = Decision(
            action="abstain",
            rule=f"{decision.action}_failed",
            reason=f"{error}; it was tried because {decision.reason}",
        )
        self.recorder.draft(progress, closed)
        self.end(progress, closed, None)

    def end(self, progress: Progress, decision: Decision, text: str | None) -> None:
        """The outcome, which ends the call; it is recorded already."""
        outcome = progress.end(decision, text)
        _log.info(
            "guard.decision",
            extra={
                "hallucination_guard": {
                    "request_id": outcome.request_id,
                    "decision": decision.action,
                    "rule": decision.rule,
                    "confidence": outcome.confidence,
                    "attempts": outcome.attempts,
                    "seconds": round(outcome.seconds["total"], 4),
                }
            },
        )
        evaluated(outcome, primary=self.scorer.primary)


def _drawn_before(progress: Progress, generation: Generation) -> bool:
    return progress.redraw is not None and generation.response_token_ids in progress.drawn


def _alike(prompts: Sequence[Progress]) -> list[list[Progress]]:
    """Prompts whose next attempts can be generated together."""
    groups: dict[str, list[Progress]] = {}
    for each in prompts:
        groups.setdefault(repr(sorted(each.drawing.items())), []).append(each)
    return list(groups.values())


def _log_failure(what: str, error: Exception) -> None:
    """The whole error for those who look: the record only names its kind."""
    _log.debug("guard.failure in %s", what, exc_info=error)
