"""The yardsticks that hold the answer itself against answers drawn beside it.

CoCoA (arXiv 2502.04964) multiplies how unlikely the answer is with how much the samples differ from it. Semantic
density (arXiv 2405.13845) is the share of the probability that lies near its meaning. The papers compare texts by
models of their own (a cross-encoder, entailment); here sentence embeddings take their place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hallucination_guard.evaluation.embedding import Embed
from hallucination_guard.evaluation.sample import Sample

__all__ = ["AGREEMENT", "Answered", "cocoa", "score_agreement", "semantic_density"]

Floats: TypeAlias = NDArray[np.float64]

AGREEMENT = ("cocoa", "cocoa_mean", "cocoa_entropy", "1-semantic_density")
"""CoCoA with the sequence NLL, the mean NLL and the mean token entropy; the density turned: higher = less certain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answer that samples are held against.

    Args:
        text: as a reader sees it; not empty.
        sequence_nll: −log p(y).
        mean_nll: the same by token.
        mean_token_entropy: ω̄.
    """

    text: str
    sequence_nll: float
    mean_nll: float
    mean_token_entropy: float

    def __post_init__(self) -> None:
        if not self.text.strip() or not all(map(math.isfinite, (self.sequence_nll, self.mean_nll))):
            raise ValueError(f"an answer is {self.text!r} with the NLL {self.sequence_nll!r}")

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """From a stored row with its scores."""
        names = ("sequence_nll", "mean_nll", "mean_token_entropy")
        return cls(text=row["response"], **{name: float(row["scores"][name]) for name in names})


def cocoa(uncertainty: float, similarity: Floats) -> float:
    """u(y) · mean_j (1 − s(y, y_j)).

    Args:
        uncertainty: u(y) ≥ 0 of the answer alone.
        similarity: s of the answer to each sample, in [0, 1].
    """
    return uncertainty * float(np.mean(1.0 - similarity))


def semantic_density(texts: Sequence[str], mean_nll: Sequence[float], cosine: Floats) -> float:
    """Σ_j q_j K_j / Σ_j q_j over different texts, the answer among them; in [0, 1], higher = more certain.

    q_j = p(y_j)^(1/T_j), and K = 1 − ‖v − v_j‖² with embeddings of norm ½, so that ‖v − v_j‖² = (1 − cos) / 2.

    Args:
        texts: the answer, then the samples; one that was said before does not count again.
        mean_nll: −log q of each.
        cosine: of the answer's meaning to that of each, itself among them.
    """
    firsts = [at for at, text in enumerate(texts) if text not in texts[:at]]
    least = min(mean_nll[at] for at in firsts)  # taken out, since likelihoods underflow and their ratio does not
    weights = np.array([math.exp(least - mean_nll[at]) for at in firsts])
    return float(weights @ (1.0 + cosine[firsts]) / 2.0 / weights.sum())


def score_agreement(query: str, answer: Answered, samples: Sequence[Sample], *, embed: Embed) -> dict[str, float]:
    """Every score of this file; CoCoA compares the answers alone, the density compares them behind the question.

    Args:
        query: the question.
        answer: to it.
        samples: drawn for it, some of them empty; at least one is not.
        embed: for the cosines.
    """
    said = [each for each in samples if each.logprobs]
    alone = embed([answer.text, *(each.text for each in said)])
    # An empty sample agrees with nothing.
    similarity = np.concatenate([np.clip(alone[1:] @ alone[0], 0.0, 1.0), np.zeros(len(samples) - len(said))])
    texts = [answer.text.strip(), *(each.text.strip() for each in said)]
    meant = embed([f"{query} {text}" for text in texts])
    mean_nll = [answer.mean_nll, *(each.nll / len(each.logprobs) for each in said)]
    return {
        "cocoa": cocoa(answer.sequence_nll, similarity),
        "cocoa_mean": cocoa(answer.mean_nll, similarity),
        "cocoa_entropy": cocoa(answer.mean_token_entropy, similarity),
        "1-semantic_density": 1.0 - semantic_density(texts, mean_nll, meant @ meant[0]),
    }
