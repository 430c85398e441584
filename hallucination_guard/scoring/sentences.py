"""The sentences of an answer, each scored as a span of its tokens.

From the likelihoods of its own tokens come the cheap scores; from one replay with a row for each sentence SemGrad of
its terms of the loss, as in :mod:`hallucination_guard.scoring.spans`; from one forward of the deep half what a probe
reads. What else is measured of a sentence is one more name in ``scores``.

:class:`BySentence` is a scorer that does this beside another one, for a guard whose policy acts on sentences.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from hallucination_guard.errors import ScoringError
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings
from hallucination_guard.scoring.scorers import Likelihood, cheap_scores, check_own, nothing_to_measure, white_box
from hallucination_guard.scoring.spans import measure_spans
from hallucination_guard.scoring.states import span_states
from hallucination_guard.scoring.token_texts import token_texts
from hallucination_guard.values import Generation, Model, Score, Scorer, ScorerIdentity, Sentence, States
from hallucination_guard.values.text import has_visible, sentence_ranges, sentence_starts

__all__ = ["BySentence", "score_sentences"]

_VERSION = "1"
_NAMED = ("layers", "reduction", "weighting")  # the settings of a gradient, the first one also of states

_Places: TypeAlias = tuple[list[tuple[int, int]], list[tuple[int, int]]]
"""Of each sentence its tokens, and its characters in the content."""


def score_sentences(
    model: WhiteBoxModel,
    generation: Generation,
    *,
    gradient: bool = True,
    states: bool = False,
    settings: GradientSettings = GradientSettings(),  # noqa: B008 - frozen
) -> tuple[Sentence, ...]:
    """How sure the model is of each sentence of an answer, thinking left out.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that the generation belongs to.
        generation: an answer in prose.
        gradient: whether to take ``semgrad`` of each sentence and its ``semgrad_share`` of the answer's, too; needs an
            anchor.
        states: whether to read the ``states`` of each sentence, for a probe, by a forward of the deep half; needs an
            anchor.
        settings: of the gradient; its layers are also those of the states.

    Returns:
        The sentences in order; together they are ``generation.content``. Their scores over their own tokens:
        ``sequence_nll``, ``mean_nll``, ``min_token_logprob``, ``mean_token_entropy``, ``max_token_entropy``.

    Raises:
        AnchorError: if a gradient or states are asked for and the generation has no anchor.
        ScoringError: if there is nothing to measure, the answer is no prose, a number is not finite, or the generation
            is another model's.
    """
    check_own(model, generation)
    places = _found(model, generation)
    read: tuple[States, ...] = ()
    if states:
        read, generation = span_states(model, generation, places[0], settings.deep(model.layout.depth))
    return _with_states(_measured(model, generation, places, gradient=gradient, settings=settings), read)


@dataclass(frozen=True)
class BySentence:
    """Scores with ``scorer``, and the sentences of the answer beside it.

    The numbers of the whole answer, and so its identity, are those of ``scorer``: a calibration of it holds. An answer
    that is no prose (calls of tools, JSON by a schema) has a score and no sentences.

    Args:
        scorer: measures the answer.
        gradient: whether to take SemGrad of each sentence: another pass. Without it sentences cost nothing more.
        states: whether to read what a fused score of sentences needs: a forward of the deep half.
        settings: of the gradient; its layers are also those of the states.
    """

    scorer: Scorer
    gradient: bool = False
    states: bool = False
    settings: GradientSettings = GradientSettings()  # noqa: RUF009 - frozen

    @property
    def identity(self) -> ScorerIdentity:
        """That of the scorer."""
        return self.scorer.identity

    @property
    def primary(self) -> str:
        """What the scorer is about."""
        return self.scorer.primary

    @property
    def sentences(self) -> ScorerIdentity:
        """Of the scores of sentences: what a calibration of sentences is bound to."""
        return sentence_scorer(gradient=self.gradient, states=self.states, settings=self.settings)

    def batch(self, model: Model, generations: Sequence[Generation]) -> list[Score]:
        """One score a generation, in order."""
        white = white_box(model)
        read = [self._read(white, each) for each in generations]
        scores = self.scorer.batch(model, [generation for generation, _, _ in read])
        return [self._with(white, score, *each) for score, each in zip(scores, read, strict=True)]

    def _read(
        self, model: WhiteBoxModel, generation: Generation
    ) -> tuple[Generation, _Places | None, tuple[States, ...]]:
        """Where the sentences are and their states, first: the scorer uses up what was kept of drawing them."""
        if not self.states or nothing_to_measure(generation, "left_out") or _no_prose(generation):
            return generation, None, ()
        check_own(model, generation)
        places = _found(model, generation)
        states, generation = span_states(model, generation, places[0], self.settings.deep(model.layout.depth))
        return generation, places, states

    def _with(
        self,
        model: WhiteBoxModel,
        score: Score,
        generation: Generation,
        places: _Places | None,
        states: tuple[States, ...],
    ) -> Score:
        if score.status != "scored" or _no_prose(generation):
            return score
        places = places or _found(model, generation)
        own = len(generation.response_token_ids) - generation.thinking
        entropies, logprobs = score.token_entropies[-own:], score.token_logprobs[-own:]
        if self.gradient or len(entropies) != own:  # not every scorer says what it read of each token
            check_own(model, generation)
            found = _measured(model, generation, places, gradient=self.gradient, settings=self.settings)
        else:
            before = (0.0,) * generation.thinking
            found = _sentences(generation, places, before + entropies, before + logprobs)
        return replace(score, sentences=_with_states(found, states), sentence_scorer=self.sentences)


def sentence_scorer(
    *,
    gradient: bool,
    states: bool = False,
    settings: GradientSettings = GradientSettings(),  # noqa: B008 - frozen
) -> ScorerIdentity:
    """What scores sentences in this way."""
    names = _NAMED if gradient else _NAMED[:1] if states else ()
    named = {name: str(getattr(settings, name)) for name in names}
    if states:
        named["states"] = "True"  # what is not read leaves the identity as it was before it could be
    return ScorerIdentity(name="sentences", version=_VERSION, settings={"gradient": str(gradient), **named})


def by_settings(scorer: Scorer, settings: Mapping[str, str]) -> BySentence:
    """The scorer of sentences whose identity has these settings.

    Raises:
        ConfigurationError: if there is no such gradient.
    """
    gradient, states = (settings.get(name) == "True" for name in ("gradient", "states"))
    named: dict[str, Any] = {name: settings[name] for name in _NAMED if name in settings}
    return BySentence(scorer, gradient=gradient, states=states, settings=GradientSettings(**named))


def _with_states(found: tuple[Sentence, ...], states: tuple[States, ...]) -> tuple[Sentence, ...]:
    if not states:  # none were read
        return found
    return tuple(replace(each, states=own) for each, own in zip(found, states, strict=True))


def _measured(
    model: WhiteBoxModel, generation: Generation, places: _Places, *, gradient: bool, settings: GradientSettings
) -> tuple[Sentence, ...]:
    """By a pass of their own."""
    if not gradient:
        whole = Likelihood(thinking="counted")(model, generation)
        return _sentences(generation, places, whole.token_entropies, whole.token_logprobs)
    read = measure_spans(model, generation, places[0], settings)
    more = [{"semgrad": own, "semgrad_share": share} for own, share in zip(read.alone, read.shares, strict=True)]
    return _sentences(generation, places, read.entropies, read.logprobs, more)


def _no_prose(generation: Generation) -> str:
    if generation.written_calls:
        return "an answer with calls of tools is not scored by its sentences"
    if generation.settings.response_schema is not None:
        return "JSON by a schema has no sentences"
    return ""


def _found(model: WhiteBoxModel, generation: Generation) -> _Places:
    """Of each sentence its tokens, and its characters in the content."""
    reason = nothing_to_measure(generation, "left_out") or _no_prose(generation)
    if reason:
        raise ScoringError(reason, hint="look at the status of its score first")
    texts = token_texts(model.tokenizer, generation.response_token_ids)
    content = generation.content
    if not "".join(texts).endswith(content):
        raise ScoringError("the answer's tokens do not decode to its text", hint="look at the tokenizer")
    return locate(texts, generation.thinking, content)


def locate(texts: Sequence[str], thinking: int, content: str) -> _Places:
    """Of each sentence of ``content`` its tokens and its characters.

    Args:
        texts: what each token adds to the answer's text, which ends with the content.
        thinking: how many of them are not of the answer.
        content: not blank.
    """
    ranges = [(start + thinking, stop + thinking) for start, stop in sentence_ranges(texts[thinking:])]
    starts = sentence_starts(content)
    at = len(content) - len("".join(texts))  # of the first token; negative where something stands before the content
    firsts = []
    for text in texts:
        firsts.append(at + len(text) - len(text.lstrip()))
        at += len(text)
    begins = [0, *(starts[bisect_right(starts, firsts[start], lo=1) - 1] for start, _ in ranges[1:])]
    characters = list(zip(begins, [*begins[1:], len(content)], strict=True))
    # A beginning without anything visible ("---" in front of a list) is of the sentence that follows it.
    kept: list[tuple[tuple[int, int], tuple[int, int]]] = []
    blank: tuple[int, int] | None = None
    for (start, stop), (begin, end) in zip(ranges, characters, strict=True):
        if blank is not None:
            start, begin = blank
        if has_visible(content[begin:end]):
            kept.append(((start, stop), (begin, end)))
            blank = None
        else:
            blank = (start, begin)
    if blank is not None and kept:
        (start, _), (begin, _) = kept[-1]
        kept[-1] = ((start, ranges[-1][1]), (begin, len(content)))
    return [tokens for tokens, _ in kept], [own for _, own in kept]


def _sentences(
    generation: Generation,
    places: _Places,
    entropies: Sequence[float],
    logprobs: Sequence[float],
    more: Sequence[dict[str, float]] | None = None,
) -> tuple[Sentence, ...]:
    content = generation.content
    return tuple(
        Sentence(
            start=start,
            stop=stop,
            begin=begin,
            end=end,
            text=content[begin:end],
            scores={**cheap_scores(entropies[start:stop], logprobs[start:stop]), **(more[at] if more else {})},
        )
        for at, ((start, stop), (begin, end)) in enumerate(zip(*places, strict=True))
    )
