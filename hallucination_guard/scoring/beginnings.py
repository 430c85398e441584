"""Longer and longer beginnings of one answer, each measured as if it were the whole, with what the ones before gave.

Source: as :mod:`hallucination_guard.scoring.gradients`. What the head says of a token (its likelihoods, a_t, and a_t W
where the backward begins) does not depend on what follows, and is computed once. The deep half runs again from t* for
each beginning: a graph that is extended by what is new has to be gone back through stretch by stretch, each time with
all weights, and that costs more than a forward over all tokens at once (docs/scoring.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from hallucination_guard.model.keeping import KeptTrace
from hallucination_guard.model.replay import Replay, Trace, replay
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings, Likelihoods, at_anchor, check_felt, measured_of
from hallucination_guard.scoring.head_walk import Reading, head_norms, pulled_states, read_head
from hallucination_guard.scoring.token_texts import token_texts
from hallucination_guard.values import Generation, Score, StreamingScorer
from hallucination_guard.values.text import has_visible, sentence_ends, whole_characters

__all__ = ["Beginnings", "score_beginnings"]

_MOST = 256 * 2**20  # bytes of A that are kept; beyond, the head is read again


class Beginnings:
    """Measures the beginnings of one answer, shorter ones first.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that draws it.
        settings: as for the scorers.
    """

    def __init__(self, model: WhiteBoxModel, settings: GradientSettings) -> None:
        self._model, self._settings = model, settings
        self._layers = settings.deep(model.layout.depth)
        self._readings: list[Reading] = []
        self._pulled: list[Tensor] = []  # a_t W of the tokens that a gradient was taken of (n × d)

    def __call__(self, generation: Generation, wanted: Callable[[Likelihoods], bool] | None = None) -> Likelihoods:
        """Measure a longer beginning.

        Args:
            generation: the beginning as an answer, with an anchor.
            wanted: whether the gradient is, judging by the likelihoods; None for always.

        Returns:
            :class:`~hallucination_guard.scoring.gradients.Measured` where it was wanted.

        Raises:
            AnchorError: if the generation has no anchor.
            ScoringError: if the gradient is zero although the answer is not certain.
        """
        trace = self._model.trace(generation, self._layers)
        answer = self._settings.counted(generation)
        with undisturbed(self._model.model, grad=True):
            run = None if trace.logits is not None else self._replayed(trace)
            self._read(trace, run, answer)
            likelihoods = Likelihoods(
                entropies=tuple(value for each in self._readings for value in each.entropies.tolist()),
                logprobs=tuple(value for each in self._readings for value in each.logprobs.tolist()),
                prefix=trace.origin,
            )
            if wanted is not None and not wanted(likelihoods):
                return likelihoods
            run = self._replayed(trace) if run is None else run
            states = self._states(run, len(answer))
            whole = self._whole(states, answer)
            semgrad = self._semgrad(run, whole, generation)
            [norms] = head_norms(self._model.head, [states], [whole])
        return measured_of(likelihoods, norms, semgrad, len(answer), self._settings)

    def _replayed(self, trace: Trace) -> Replay:
        return replay(self._model.model, self._model.layout, [trace], self._layers)

    def _states(self, run: Replay, tokens: int) -> Tensor:
        """H of the answer's tokens (T × d)."""
        return run.final[0, -tokens:].detach().to(self._model.head.dtype)

    def _read(self, trace: Trace, run: Replay | None, answer: tuple[int, ...]) -> None:
        """What the head says of the tokens that are new."""
        head, said = self._model.head, sum(len(each.entropies) for each in self._readings)
        if said == len(answer):
            return
        if trace.logits is not None:
            new = read_head(head, None, answer[said:], logits=trace.logits[said - len(answer) :])
        else:
            assert run is not None
            new = read_head(head, self._states(run, len(answer))[said:], answer[said:])
        self._readings.append(new)
        if sum(each.a.nbytes for each in self._readings) > _MOST:
            self._readings = [
                Reading(entropies=each.entropies, logprobs=each.logprobs, a=each.a[:0]) for each in self._readings
            ]

    def _whole(self, states: Tensor, answer: tuple[int, ...]) -> Reading:
        """What the head says of all tokens."""
        if any(each.a.numel() == 0 for each in self._readings):
            return read_head(self._model.head, states, answer)
        return Reading(
            entropies=torch.cat([each.entropies for each in self._readings]),
            logprobs=torch.cat([each.logprobs for each in self._readings]),
            a=torch.cat([each.a for each in self._readings]),
        )

    def _semgrad(self, run: Replay, whole: Reading, generation: Generation) -> float:
        """The mean of |∂ℓ/∂h_{l,t*}|, before it is divided by the tokens."""
        new = slice(sum(map(len, self._pulled)), None)
        if len(whole.entropies[new]):
            part = Reading(entropies=whole.entropies[new], logprobs=whole.logprobs[new], a=whole.a[new])
            self._pulled += pulled_states(self._model.head, [part])
        pulled = torch.cat(self._pulled)
        if self._settings.weighting == "entropy":
            pulled = pulled * whole.entropies[:, None]
        upstream = torch.zeros_like(run.final, dtype=pulled.dtype)
        upstream[0, -len(pulled) :] = pulled.to(upstream)
        by_layer = at_anchor(run, upstream).abs().sum(dim=2)  # (layers × 1)
        check_felt(self._model, [generation], self._layers, by_layer, upstream)
        return float(by_layer.sum()) / (len(self._layers) * run.final.shape[-1])


def score_beginnings(
    model: WhiteBoxModel, scorer: StreamingScorer, generation: Generation
) -> Sequence[tuple[int, Score]]:
    """Score an answer as a stream is scored: every beginning that ends with a sentence, and at last the whole.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that it belongs to.
        scorer: that can go on.
        generation: with an anchor; what was kept for scoring is handed over and forgotten.

    Returns:
        For each beginning, shortest first, its length in tokens and its score.
    """
    ids = generation.response_token_ids
    texts = token_texts(model.tokenizer, ids)
    calls, json = generation.written_calls, generation.settings.response_schema is not None
    sure = calls[0].start if calls else len(generation.text)  # calls are judged with the whole answer, and so is JSON
    stops: list[int] = []
    lengths = list(accumulate(map(len, texts)))
    for end in () if json else sentence_ends(texts):
        if lengths[end - 1] > sure:
            break
        stop = whole_characters(
            end,
            least=stops[-1] if stops else 0,
            texts=texts,
            text_of=lambda stop: str(model.tokenizer.decode(ids[:stop], skip_special_tokens=True)),
        )
        if stop > (stops[-1] if stops else 0) and has_visible("".join(texts[generation.thinking : stop])):
            stops.append(stop)
    kept = generation._trace.take() if generation._trace is not None else None
    score, found = scorer.beginnings(model), []
    for stop in [*stops, len(ids)]:
        trace = kept.until(stop, len(ids)) if isinstance(kept, Trace) else None
        whole = stop == len(ids)
        part = replace(
            generation,
            response_token_ids=ids[:stop],
            text=generation.text if whole else "".join(texts[:stop]),
            finish_reason=generation.finish_reason if whole else "open",
            written_calls=generation.written_calls if whole else (),
            _trace=KeptTrace(trace),
        )
        found.append((stop, score(part)))
    return found
