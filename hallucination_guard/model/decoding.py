"""Drawing tokens without touching anybody's random state, and stopping at a text.

``transformers`` samples with the global generator. Here a draw is the argmax of logits plus Gumbel noise from a
generator of its own, one for each row, which has the same distribution: the same seed gives the same answer alone, in
a batch, and beside other threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from hallucination_guard.errors import InputError
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.values import FinishReason, GenerationSettings

__all__ = ["Draw", "KeptLogits", "StopAtText", "end_of_answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How the next token is chosen.

    Args:
        temperature: 0 for greedy decoding.
        top_p: nucleus, in (0, 1].
        seed: of every row's generator.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature!r}", hint="0 is greedy, 1 the model's own distribution")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p!r}", hint="a share of the probability, above 0 and at most 1")

    @classmethod
    def of(cls, settings: GenerationSettings) -> Draw:
        """What the settings say of it, where they say something."""
        given = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def processors(self, rows: int, device: torch.device) -> LogitsProcessorList:
        """To be followed by an argmax."""
        chain = LogitsProcessorList()
        if self.temperature > 0.0:
            chain.append(TemperatureLogitsWarper(self.temperature))
            if self.top_p < 1.0:
                chain.append(TopPLogitsWarper(self.top_p))
            chain.append(_GumbelNoise(self.seed, rows, device))
        return chain


class KeptLogits(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Keeps the logits of every step as they are, so that scoring need not compute them again.

    Only float32 ones: those of a half-precision head are rounded more than scoring allows, and ``transformers`` rounds
    those of a float64 head. Beyond ``most`` bytes none are kept: scoring one answer takes about as much.

    Args:
        dtype: of the model.
        most: bytes in all.
    """

    def __init__(self, dtype: torch.dtype, *, most: int) -> None:
        self._steps: list[Tensor] | None = [] if dtype == torch.float32 else None
        self._left = most

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` (B × V), unchanged."""
        if self._steps is not None:
            self._left -= scores.nbytes
            if self._left < 0 or scores.dtype != torch.float32:
                self._steps = None
            else:
                self._steps.append(scores)
        return scores

    def rows(self, row: int, length: int) -> tuple[Tensor, ...] | None:
        """Those of one example's first ``length`` steps, V each; None if they were not kept."""
        return None if self._steps is None else tuple(step[row] for step in self._steps[:length])


class _GumbelNoise(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, seed: int, rows: int, device: torch.device) -> None:
        self._generators = [torch.Generator(device=device).manual_seed(seed) for _ in range(rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B × V) whose argmax is a draw."""
        waits = torch.stack(
            [
                torch.empty_like(row).exponential_(generator=own)
                for row, own in zip(scores, self._generators, strict=True)
            ]
        )
        return scores - waits.clamp_min(torch.finfo(scores.dtype).tiny).log()  # −log Exp(1) is Gumbel


class StopAtText(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Stops a row as soon as its answer contains one of ``texts``."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._texts, self._from = tokenizer, tuple(texts), prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        """Which rows (B) are done."""
        answers = self._tokenizer.batch_decode(input_ids[:, self._from :], skip_special_tokens=True)
        done = [any(text in answer for text in self._texts) for answer in answers]
        return torch.tensor(done, device=input_ids.device)


def end_of_answer(
    tokenizer: Tokenizer, ids: Sequence[int], end_ids: frozenset[int], texts: Sequence[str]
) -> tuple[int, FinishReason]:
    """How many of the drawn ids are the answer, and how it ended.

    The answer ends before the first end token, and before the token in which a stop text begins.
    """

    def text() -> str:
        return str(tokenizer.decode(ids[:length], skip_special_tokens=True))

    length = next((at for at, drawn in enumerate(ids) if drawn in end_ids), len(ids))
    ending: FinishReason = "stop" if length < len(ids) else "length"
    begins = [at for stop in texts if (at := text().find(stop)) >= 0]
    while begins and length and len(text()) > min(begins):
        length, ending = length - 1, "stop_text"
    return length, ending
