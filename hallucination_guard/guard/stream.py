"""The stream gate: an answer leaves sentence by sentence, each only after the answer up to its end was let through.

Each beginning of the answer is scored, judged and decided on like an answer of its own, and recorded before it leaves.
One that is not let through ends the stream by the policy's decision, or goes on otherwise: a further draft keeps what
was released and begins after it. So what a reader has is always the beginning of one answer.

A certificate for streams is of the greatest doubt over all beginnings (``calibrate --for stream``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from hallucination_guard.errors import ModelError, PolicyError
from hallucination_guard.guard.in_a_thread import ReaderGone
from hallucination_guard.guard.loop import Loop
from hallucination_guard.guard.progress import Draft, Progress
from hallucination_guard.values import (
    Decision,
    Event,
    Generation,
    Heard,
    Live,
    Model,
    Provisional,
    Released,
    Score,
    Scorer,
    StreamingModel,
    StreamingScorer,
    Verdict,
)
from hallucination_guard.values.text import has_visible, sentence_ends, whole_characters

__all__ = ["Streaming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """What takes part in one guarded stream.

    Args:
        loop: scores, judges, decides, carries out and records, as for a call.
        model: draws answers that can be read while they are drawn.
        gone: whether the reader is gone.
        provisional: whether text is shown before it is decided on, as the policy allows.
    """

    loop: Loop
    model: StreamingModel
    gone: Callable[[], bool]
    provisional: bool = False

    def __call__(self, progress: Progress, heard: Heard | None = None) -> Iterator[Event]:
        """Bring a prompt to its outcome, which is the last event.

        Args:
            progress: of the prompt.
            heard: its first draft, where something else is writing it.

        Raises:
            ReaderGone: if the reader is; the draft is recorded as interrupted.
        """
        progress.streamed = True
        if heard is not None:
            yield from self._attempt(progress, heard, lambda: heard.unscorable)
        while progress.outcome is None:
            drawn = self.model.stream(
                progress.messages,
                begin=progress.released_ids,
                gone=self.gone,
                question=progress.settings.question,
                **progress.drawing,
            )
            yield from self._attempt(progress, drawn, lambda: "")

    def _attempt(self, progress: Progress, live: Live, unscorable: Callable[[], str]) -> Iterator[Event]:
        try:
            yield from self._draft(progress, live, unscorable)
        except BaseException as error:
            try:
                live.leave()
            finally:
                self._cut_off(progress, live)
                self.loop.recorder.interrupted([progress], error)
            raise
        live.leave()

    def _draft(self, progress: Progress, live: Live, unscorable: Callable[[], str]) -> Iterator[Event]:
        """One draft, as far as it is let through."""
        unfinished = Verdict(score=Score.failed("interrupted while scoring", scorer=self.loop.scorer.identity))
        progress.begin(live.beginning(len(progress.released_ids)), unfinished)
        if self.provisional:
            self._announce(progress)
        measure, scoring, begin = _Measure(self.loop.scorer, self.model), 0.0, len(progress.released_ids)
        for step in self._steps(progress, live):
            if isinstance(step, Provisional):
                yield step
                continue
            generation = step
            self._check_model(progress, generation)
            progress.replace(generation)
            if why := unscorable():
                score = Score.unscorable(why, scorer=self.loop.scorer.identity)
            else:
                [score] = live.compute(partial(self.loop.score, [generation], measure))
            scoring += score.seconds
            decision = self._decide(progress, generation, score)
            goes_on = decision.action == "accept" and generation.finish_reason == "open"
            if not goes_on:
                _count(progress, generation, scoring, begin)
            if decision.action != "accept":
                self._end_otherwise(progress, decision)
                break
            yield self._released(progress, generation, decision, goes_on=goes_on)
        if progress.outcome is not None:
            yield progress.outcome

    def _check_model(self, progress: Progress, generation: Generation) -> None:
        """See that the model is still the one that the draft began with, and that the calibration was fitted on.

        Raises:
            ModelError: if it was changed in the middle of an answer.
            CalibrationMismatch: if the calibration is of another one.
        """
        assert progress.newest is not None
        if generation.model != progress.newest.generation.model:
            raise ModelError(
                f"the model {generation.model.name!r} was changed while it answered",
                hint="ask again: nothing more leaves",
            )
        if (calibration := self.loop.judging.calibration) is not None:
            calibration.check(generation.model, self.loop.scorer.identity)

    def _cut_off(self, progress: Progress, live: Live) -> None:
        """What was drawn beyond the beginning that was judged last has no verdict: it is recorded without one."""
        if progress.newest is None or progress.recorded == progress.attempt:
            return
        drawn = live.beginning()
        if drawn.response_token_ids != progress.newest.generation.response_token_ids:
            unfinished = Verdict(
                score=Score.failed("interrupted before it was scored", scorer=self.loop.scorer.identity)
            )
            progress.newest = Draft(attempt=progress.attempt, generation=drawn, verdict=unfinished)

    def _announce(self, progress: Progress) -> None:
        """Write down, before anything is shown, that text is shown which nobody has decided on."""
        assert progress.newest is not None
        blind = Verdict(score=Score.unscorable("shown before it is decided on", scorer=self.loop.scorer.identity))
        draft = progress.newest
        progress.newest = Draft(attempt=draft.attempt, generation=draft.generation, verdict=blind)
        decision = Decision(action="accept", rule="provisional", reason="the policy lets text be shown undecided")
        self.loop.recorder.part(progress, decision, start=0, stop=0, text="")
        progress.newest = draft

    def _steps(self, progress: Progress, live: Live) -> Iterator[Generation | Provisional]:
        """The answer up to the end of each further sentence, as soon as that is known, and at last the whole."""
        done = seen = len(progress.released_ids)
        whole = progress.settings.response_schema is not None  # JSON is no sentences
        shown, begins = progress.released, True
        while True:

            def ready(seen: int = seen, shown: str = shown) -> bool:
                return bool(_ends(live, seen, whole=whole)) or (self.provisional and _further(live, shown, whole) != "")

            live.wait(ready)
            if self.gone():
                raise ReaderGone("the reader left the stream")
            ended = live.ended
            if self.provisional and (text := _further(live, shown, whole)):
                yield Provisional(text=text, begins=begins)
                shown, begins = shown + text, False
            for end in _ends(live, seen, whole=whole):
                seen, texts = end, live.texts()
                stop = whole_characters(end, least=done, texts=texts, text_of=lambda stop: live.beginning(stop).text)
                beginning = live.beginning(stop)
                # While it thinks, there is nothing to decide on.
                if stop > done and has_visible(beginning.content):
                    yield beginning
                    done = stop
            if ended is not None:
                yield live.beginning()
                return

    def _decide(self, progress: Progress, generation: Generation, score: Score) -> Decision:
        """What the policy says of the answer up to here.

        Raises:
            PolicyError: if it marks or leaves out sentences: what has left cannot be edited, and a policy that wraps
                one that edits need not say so beforehand.
        """
        judging = self.loop.judging
        first = progress.judged is None and not progress.released_ids
        verdict = judging.verdict(
            score,
            conditions=progress.conditions(generation),
            attempt=progress.attempt,
            at_least=progress.doubt,
            notices=first and progress.attempt == 1,
        )
        progress.newest = progress.judged = Draft(attempt=progress.attempt, generation=generation, verdict=verdict)
        decision = self.loop.decide(progress, verdict)
        if decision.edit is not None:
            raise PolicyError(
                f"the rule {decision.rule!r} edits the sentences of an answer that leaves sentence by sentence",
                hint="call the guard instead; a policy that edits says edits = True",
            )
        if decision.action == "accept":
            progress.doubt = judging.value(score, at_least=progress.doubt)
        else:
            progress.rules.append(decision.rule)
        return decision

    def _released(self, progress: Progress, generation: Generation, decision: Decision, *, goes_on: bool) -> Released:
        """Record it, and what leaves of it.

        Raises:
            ModelError: if it does not begin with what was released.
        """
        assert progress.newest is not None
        text = _rest(progress, generation)
        if goes_on:
            start, stop = len(progress.released_ids), len(generation.response_token_ids)
            self.loop.recorder.part(progress, decision, start=start, stop=stop, text=text)
            progress.release(generation, text)
        else:
            self.loop.recorder.draft(progress, decision)
            progress.release(generation, text)
            self.loop.end(progress, decision, progress.released)
        audit_id = progress.audit_ids[-1] if progress.audit_ids else ""
        return Released(text=text, verdict=progress.newest.verdict, audit_id=audit_id)

    def _end_otherwise(self, progress: Progress, decision: Decision) -> None:
        assert progress.judged is not None
        self.loop.carry_out(progress, progress.judged, decision)


class _Measure:
    """How the beginnings of one draft are scored; made with the first, so that what fails is a score that failed."""

    def __init__(self, scorer: Scorer, model: Model) -> None:
        self._scorer, self._model = scorer, model
        self._grown: Callable[[Generation], Score] | None = None

    def __call__(self, model: Model, generations: Sequence[Generation]) -> list[Score]:
        """The score of one further beginning."""
        if not isinstance(self._scorer, StreamingScorer):
            return self._scorer.batch(model, generations)
        if self._grown is None:
            self._grown = self._scorer.beginnings(self._model)
        return [self._grown(each) for each in generations]


def _sure(live: Live) -> tuple[int, tuple[str, ...]]:
    """How many characters may leave before the answer is whole, and what each token adds to the text.

    Another thread may be drawing: each look is at least as far on as the one before, and the end is looked for last.
    """
    sure, texts = live.prose(), live.texts()
    if live.ended is not None and (called := live.beginning(len(texts)).written_calls):
        sure = min(sure, called[0].start)  # calls are decided on with the whole answer
    return sure, texts


def _ends(live: Live, seen: int, *, whole: bool) -> list[int]:
    """Where sentences beyond ``seen`` tokens end, as far as it is certain; the end of the answer is none of them."""
    if whole or not sentence_ends(live.texts(), seen):  # this is asked at every token
        return []
    sure, texts = _sure(live)
    lengths = list(accumulate(map(len, texts)))
    return [stop for stop in sentence_ends(texts, seen) if lengths[stop - 1] <= sure]


def _further(live: Live, shown: str, whole: bool) -> str:
    """What of the answer can be shown beyond what was; nothing of thinking, of calls and of JSON."""
    if whole:
        return ""
    sure, texts = _sure(live)
    lengths = list(accumulate(map(len, texts)))
    content = live.beginning(sum(length <= sure for length in lengths)).content
    text = content[len(shown) :] if content.startswith(shown) else ""
    return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text


def _rest(progress: Progress, generation: Generation) -> str:
    text, released = generation.content, progress.released
    if text.startswith(released):
        return text[len(released) :]
    # Without its calls, an answer is stripped of the space around it.
    if generation.written_calls and text.startswith(released.strip()):
        space = released[len(released.rstrip()) :]
        return text[len(released.strip()) :].removeprefix(space)
    raise ModelError("the answer does not begin with what was released", hint="its tokenizer rewrites earlier text")


def _count(progress: Progress, generation: Generation, scoring: float, begin: int) -> None:
    progress.generating += max(0.0, generation.seconds - scoring)
    progress.scoring += scoring
    progress.tokens_in += len(generation.prompt_token_ids)
    progress.tokens_out += len(generation.response_token_ids) - begin
