"""Longer and longer beginnings of one answer, each measured as if it were the whole, and nothing run twice.

Source: as :mod:`hallucination_guard.scoring.gradients`. ℓ is a sum over the answer's tokens, so ∂ℓ/∂h_{l,t*} of a
longer beginning is that of the shorter one and that of the new tokens' terms: the forward with its graph is extended
by what is new (:class:`~hallucination_guard.model.replay.Extended`), and one backward with the new tokens' terms is
added. It goes back through the graph of all tokens so far: that is what a beginning costs. ParaGrad and ExGrad are
norms of a sum and are taken over all tokens again, without any forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hallucination_guard.model.keeping import KeptTrace
from hallucination_guard.model.replay import Extended, Trace
from hallucination_guard.model.view import undisturbed
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings, Likelihoods, at_anchor, check_felt, measured_of
from hallucination_guard.scoring.head_walk import Reading, head_norms, pulled_states, read_head
from hallucination_guard.scoring.token_texts import token_texts
from hallucination_guard.values import Generation, Score, StreamingScorer
from hallucination_guard.values.text import has_visible, sentence_ranges, whole_characters

__all__ = ["Beginnings", "score_beginnings"]

_MOST = 256 * 2**20  # bytes of A that are kept; beyond, the head is read again


class Beginnings:
    """Measures the beginnings of one answer, shorter ones first.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that draws it; its cache can be cut at a position.
        settings: as for the scorers.
    """

    def __init__(self, model: WhiteBoxModel, settings: GradientSettings) -> None:
        self._model, self._settings = model, settings
        self._layers = settings.deep(model.layout.depth)
        self._run = Extended(model.model, model.layout, self._layers)
        self._readings: list[Reading] = []
        self._finals: list[Tensor] = []  # with their graph, whose tokens' terms were not derived yet
        self._hidden: list[Tensor] = []  # H of all tokens that have run
        self._derived = 0  # tokens whose terms are in the gradient
        self._doubt = 0.0
        self._gradient = torch.zeros(())

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
        answer, head = self._settings.counted(generation), self._model.head
        with undisturbed(self._model.model, grad=True):
            said = sum(len(each.entropies) for each in self._readings)
            if said < len(answer):
                if trace.logits is not None:
                    new = read_head(head, None, answer[said:], logits=trace.logits[said - len(answer) :])
                else:
                    self._extend(trace, generation)
                    new = read_head(head, self._states()[said:], answer[said:])
                self._readings.append(new)
                self._keep_within_bounds()
            likelihoods = Likelihoods(
                entropies=tuple(value for each in self._readings for value in each.entropies.tolist()),
                logprobs=tuple(value for each in self._readings for value in each.logprobs.tolist()),
                prefix=trace.origin,
            )
            if wanted is not None and not wanted(likelihoods):
                return likelihoods
            self._extend(trace, generation)
            states = self._states()
            whole = self._whole(states, answer)
            self._derive(whole, generation)
            [norms] = head_norms(head, [states], [whole])
        width = len(self._layers) * states.shape[-1]
        semgrad = float(self._gradient.abs().sum()) / width
        return measured_of(likelihoods, norms, semgrad, len(answer), self._settings)

    def _extend(self, trace: Trace, generation: Generation) -> None:
        """Run the forward over what is new."""
        before = self._run.length
        if before == len(trace.states):
            return
        final = self._run(trace)
        thinking = len(generation.response_token_ids) - len(self._settings.counted(generation))
        # The row that predicts the first token that counts.
        predicting = len(generation.prompt_token_ids) + thinking - 1 - trace.start
        self._finals.append(final)
        self._hidden.append(final[0, max(0, predicting - before) :].detach())

    def _states(self) -> Tensor:
        """H of all tokens that have run (T × d)."""
        return torch.cat(self._hidden).to(self._model.head.dtype)

    def _whole(self, states: Tensor, answer: tuple[int, ...]) -> Reading:
        """What the head says of all tokens."""
        if any(each.a.numel() == 0 for each in self._readings):
            return read_head(self._model.head, states, answer)
        return Reading(
            entropies=torch.cat([each.entropies for each in self._readings]),
            logprobs=torch.cat([each.logprobs for each in self._readings]),
            a=torch.cat([each.a for each in self._readings]),
        )

    def _keep_within_bounds(self) -> None:
        if sum(each.a.nbytes for each in self._readings) > _MOST:
            self._readings = [
                Reading(entropies=each.entropies, logprobs=each.logprobs, a=each.a[:0]) for each in self._readings
            ]

    def _derive(self, whole: Reading, generation: Generation) -> None:
        """Add ∂ℓ/∂h_{l,t*} of the terms that are not in it yet."""
        if not self._finals:
            return
        new = slice(self._derived, len(whole.entropies))
        part = Reading(entropies=whole.entropies[new], logprobs=whole.logprobs[new], a=whole.a[new])
        [pulled] = pulled_states(self._model.head, [part])
        if self._settings.weighting == "entropy":
            pulled = pulled * part.entropies[:, None]
        run = self._run.hanging(self._finals)
        upstream = torch.zeros_like(run.final, dtype=pulled.dtype)
        upstream[0, -len(pulled) :] = pulled.to(upstream)
        found = at_anchor(run, upstream, again=True)[:, 0]  # (layers × d)
        self._gradient = found if not self._derived else self._gradient + found
        self._doubt += float(upstream.abs().sum())
        self._derived = new.stop
        self._finals.clear()
        by_layer = self._gradient.abs().sum(dim=-1)[:, None]
        check_felt(self._model, [generation], self._layers, by_layer, torch.full((1, 1, 1), self._doubt))


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
    stops: list[int] = []
    for _, end in sentence_ranges(texts)[:-1]:
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
