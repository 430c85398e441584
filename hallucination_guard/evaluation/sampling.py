"""The yardsticks that need more answers: K of them are drawn for every question, and it is measured how they differ.

Predictive entropy, lexical dissimilarity, semantic entropy, SAR (arXiv 2307.01379) and EigenScore (arXiv 2402.03744),
and those that hold the answer against them (:mod:`hallucination_guard.evaluation.agreement`); all higher = less
certain, with likelihoods at temperature 1 whatever the samples were drawn at. docs/methods.md has the formulas.

An empty sample is a cluster of its own kind in the entropies over clusters and in ROUGE-L, and has no likelihood; with
fewer than two samples that have one, the answer has no sampling score, with a reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from hallucination_guard.evaluation.agreement import AGREEMENT, Answered, score_agreement
from hallucination_guard.evaluation.answers import batches
from hallucination_guard.evaluation.data import Item, Prompting
from hallucination_guard.evaluation.embedding import Embed
from hallucination_guard.evaluation.judges import rouge_l
from hallucination_guard.evaluation.matching import normal_form
from hallucination_guard.evaluation.sample import Sample
from hallucination_guard.evaluation.store import Store
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.values import Generation

__all__ = [
    "SAMPLED",
    "Sample",
    "clusters",
    "draw",
    "eigenscore",
    "lexical_dissimilarity",
    "sar",
    "score_samples",
    "semantic_entropy",
]

SAMPLED = (
    "predictive_entropy",
    "predictive_entropy_mean",
    "lexical_dissimilarity",
    "semantic_entropy",
    "semantic_entropy_count",
    "sar",
    "eigenscore",
    *AGREEMENT,
)
_RIDGE = 1e-3
_TEMPERATURE = 1e-3  # τ of SAR


def draw(
    model: WhiteBoxModel,
    items: Sequence[Item],
    prompting: Prompting,
    store: Store,
    *,
    k: int = 5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    done: Callable[[int], None] = lambda _: None,
) -> None:
    """Draw and read K answers to every question that has none in ``store`` yet.

    Args:
        model: a :class:`~hallucination_guard.WhiteBoxModel`.
        items: the questions.
        prompting: how they are asked.
        store: where rows are kept: texts, likelihoods, EigenScore, seconds.
        k: answers to each question.
        temperature: of drawing.
        top_p: nucleus of drawing.
        seed: of the first answer; the next has the next seed.
        max_new_tokens: of an answer.
        batch_size: questions that are answered together.
        done: told how many of ``items`` are finished.
    """
    rest = [item for item in items if item.id not in store.rows]
    finished = len(items) - len(rest)
    done(finished)
    for part in batches(rest, prompting, batch_size):
        began = time.perf_counter()
        prompts = [prompting(item.query) for item in part]
        questions = [prompting.question(item.query) for item in part]
        drawn: list[list[Generation]] = []
        for at in range(k):
            made = model.generate(
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed + at,
                stop=prompting.stop,
                question=questions,
            )
            for generation in made:
                generation.release()  # no gradient will be taken, and K traces a question are heavy
            drawn.append(made)
        rows = []
        for item, generations in zip(part, zip(*drawn, strict=True), strict=True):
            read = [_read(model, each) for each in generations]
            states = [state for _, state in read if state is not None]
            rows.append(
                {
                    "id": item.id,
                    "samples": [
                        {
                            "text": sample.text,
                            "token_ids": list(generation.response_token_ids) if sample.logprobs else [],
                            "without": list(sample.without),
                            "logprobs": list(sample.logprobs),
                            "sum_nll": sample.nll,
                            "mean_nll": sample.nll / len(sample.logprobs) if sample.logprobs else None,
                        }
                        for (sample, _), generation in zip(read, generations, strict=True)
                    ],
                    "eigenscore": eigenscore(np.stack(states)) if len(states) > 1 else None,
                }
            )
        seconds = (time.perf_counter() - began) / len(part)
        store.add([{**row, "seconds": seconds} for row in rows])
        finished += len(part)
        done(finished)


def _read(model: WhiteBoxModel, generation: Generation) -> tuple[Sample, Any]:
    """Likelihoods of a drawn answer and h_{⌊L/2⌋} at its last token, by one pass; nothing of an empty one."""
    import torch

    from hallucination_guard.model.view import tapped, undisturbed

    answer = generation.response_token_ids
    if not answer or not generation.text.strip():
        return Sample(text=""), None
    layout = model.layout
    seen: list[Any] = []
    middle = max(1, layout.depth // 2)

    def see(states: Any) -> None:
        seen.append(states[0, -1].double().cpu().numpy())

    view = layout.view(model.model, {middle - 1: tapped(layout.list_of(model.model)[middle - 1], see)})
    with undisturbed(model.model, grad=False):
        # The last token is fed too: its state is what EigenScore looks at.
        ids = torch.tensor([(*generation.prompt_token_ids, *answer)], device=model.device)
        final = layout.decoder_of(view)(input_ids=ids, use_cache=False).last_hidden_state[0, -len(answer) - 1 : -1]
        logp = torch.log_softmax(model.head.logits(final), dim=-1)
        logprobs = logp.gather(1, torch.tensor(answer, device=logp.device)[:, None])[:, 0]
    without = tuple(
        model.tokenizer.decode([*answer[:at], *answer[at + 1 :]], skip_special_tokens=True) for at in range(len(answer))
    )
    return Sample(text=generation.text, without=without, logprobs=tuple(logprobs.tolist())), seen[0]


def score_samples(
    query: str,
    samples: Sequence[Sample],
    *,
    answer: Answered,
    embed: Embed,
    by_meaning: float | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Every sampling score of one question but EigenScore, and the seconds each took; nothing if it cannot be had.

    Args:
        query: the question.
        samples: drawn for it.
        answer: that is being judged.
        embed: for SAR, CoCoA and semantic density, and for clusters where ``by_meaning`` is given.
        by_meaning: cosine similarity from which two samples mean the same; None to go by their words.
    """
    likely = [sample for sample in samples if sample.logprobs]
    if len(likely) < 2:
        return {}, {}
    seconds: dict[str, float] = {}
    scores: dict[str, float] = {}

    def timed(name: str, value: Callable[[], float]) -> None:
        began = time.perf_counter()
        scores[name] = value()
        seconds[name] = time.perf_counter() - began

    timed("predictive_entropy", lambda: math.fsum(each.nll for each in likely) / len(likely))
    timed("predictive_entropy_mean", lambda: math.fsum(each.nll / len(each.logprobs) for each in likely) / len(likely))
    timed("lexical_dissimilarity", lambda: lexical_dissimilarity([each.text for each in samples]))
    began = time.perf_counter()
    found = clusters(query, samples, embed=embed, by_meaning=by_meaning)
    shared = time.perf_counter() - began
    weights = [math.exp(-each.nll / len(each.logprobs)) if each.logprobs else 0.0 for each in samples]
    timed("semantic_entropy", lambda: semantic_entropy(found, weights))
    timed("semantic_entropy_count", lambda: semantic_entropy(found, [1.0] * len(samples)))
    seconds["semantic_entropy"] += shared
    seconds["semantic_entropy_count"] += shared
    timed("sar", lambda: sar(query, likely, embed=embed))
    began = time.perf_counter()
    scores |= score_agreement(query, answer, samples, embed=embed)
    seconds |= dict.fromkeys(AGREEMENT, time.perf_counter() - began)  # they share their embeddings
    return scores, seconds


def lexical_dissimilarity(texts: Sequence[str]) -> float:
    """1 − mean ROUGE-L over pairs; two empty texts are alike."""
    pairs = list(combinations(texts, 2))
    alike = math.fsum(1.0 if normal_form(one) == normal_form(other) else rouge_l(one, other) for one, other in pairs)
    return 1.0 - alike / len(pairs)


def clusters(
    query: str, samples: Sequence[Sample], *, embed: Embed | None = None, by_meaning: float | None = None
) -> list[int]:
    """The cluster of each sample: the first whose first member means the same, else a new one."""
    words = [normal_form(sample.text) for sample in samples]
    alike = np.equal.outer(np.array(words), np.array(words))
    if by_meaning is not None and embed is not None:
        full = [at for at, each in enumerate(words) if each]
        if full:
            vectors = embed([f"{query} {samples[at].text}" for at in full])
            alike[np.ix_(full, full)] |= vectors @ vectors.T >= by_meaning
    firsts: list[int] = []
    found = []
    for at in range(len(samples)):
        home = next((cluster for cluster, first in enumerate(firsts) if alike[first, at]), None)
        if home is None:
            firsts.append(at)
            home = len(firsts) - 1
        found.append(home)
    return found


def semantic_entropy(found: Sequence[int], weights: Sequence[float]) -> float:
    """Entropy in nats over clusters, each having the weight of its samples."""
    total = math.fsum(weights)
    mass: dict[int, float] = {}
    for cluster, weight in zip(found, weights, strict=True):
        mass[cluster] = mass.get(cluster, 0.0) + weight / total
    return -math.fsum(share * math.log(share) for share in mass.values() if share > 0.0)


def sar(query: str, samples: Sequence[Sample], *, embed: Embed) -> float:
    """Shifting attention to relevance. See docs/methods.md."""
    # One call for all texts of the question: the whole answers, then each answer without each of its tokens.
    whole = [f"{query} {each.text}" for each in samples]
    without = [f"{query} {text}" for each in samples for text in each.without]
    vectors = embed([*whole, *without])
    answers, cut = vectors[: len(whole)], vectors[len(whole) :]
    token_sar = []
    begin = 0
    for sample, vector in zip(samples, answers, strict=True):
        stop = begin + len(sample.logprobs)
        relevance = 1.0 - np.clip(cut[begin:stop] @ vector, 0.0, 1.0)
        begin = stop
        total = relevance.sum()
        # Where no token matters more than another they all matter alike.
        shares = relevance / total if total > 0 else np.full(len(relevance), 1.0 / len(relevance))
        token_sar.append(float(-(shares * np.array(sample.logprobs)).sum()))
    likelihood = np.exp(-np.array(token_sar))
    alike = np.clip(answers @ answers.T, 0.0, 1.0)
    np.fill_diagonal(alike, 0.0)
    return float(-np.log(likelihood + alike @ likelihood / _TEMPERATURE).mean())


def eigenscore(states: Any) -> float:
    """(1/K) log det(Σ + 0.001·I) of K states (K × d). See docs/methods.md."""
    covariance = np.atleast_2d(np.cov(np.asarray(states, dtype=np.float64)))
    _, logdet = np.linalg.slogdet(covariance + _RIDGE * np.eye(len(covariance)))
    return float(logdet / len(covariance))
