"""Scores of LM-Polygraph for answers that are given. Runs in an environment of its own, and imports nothing of ours.

    python lm_polygraph_side.py HANDOFF.jsonl MODEL_FOLDER SENTENCE_MODEL OUT.jsonl

Statistics and estimators are LM-Polygraph's own. Two things stand in for what cannot be had or would change the
answers: the model's ``generate`` reads the given tokens in one pass instead of drawing others, and a sentence-embedding
model, cosine cut off at 0, takes the place of the cross-encoder. ``SAR`` compares whole answers without the question,
as LM-Polygraph does; ``SAR, with question`` puts it before them, as the paper does. Resumable, row by row.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_polygraph import estimators
from lm_polygraph.model_adapters.whitebox_model_basic import WhiteboxModelBasic
from lm_polygraph.stat_calculators.cross_encoder_similarity import CrossEncoderSimilarityMatrixCalculator
from lm_polygraph.stat_calculators.entropy import EntropyCalculator
from lm_polygraph.stat_calculators.greedy_cross_encoder_similarity import GreedyCrossEncoderSimilarityMatrixCalculator
from lm_polygraph.stat_calculators.greedy_probs import GreedyProbsCalculator
from lm_polygraph.stat_calculators.sample import SamplingGenerationCalculator
from lm_polygraph.utils.generation_parameters import GenerationParameters
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

TOP = 15  # log probabilities a token that are handed on to UQLM


class Given(WhiteboxModelBasic):
    """A model that "generates" the answers it is told to, and keeps what generating would have kept."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        parameters = GenerationParameters(allow_newlines=True)  # else newlines are suppressed, which nobody else does
        super().__init__(model, tokenizer, {}, parameters, "CausalLM")
        self.prompt: list[int] = []
        self.answers: list[list[int]] = []
        self.seconds = 0.0

    def tokenize(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        """The prompt that is set, whatever the text."""
        ids = torch.tensor([self.prompt])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generate(self, **wanted: Any) -> Any:
        """The next of the answers, as ``transformers`` returns one that it has drawn."""
        began = time.perf_counter()
        answer = self.answers.pop(0)
        begin, end = len(self.prompt), len(self.prompt) + len(answer)
        ids = torch.tensor([[*self.prompt, *answer]])
        out = self.model(
            ids,
            use_cache=False,
            output_attentions=wanted.get("output_attentions", False),
            output_hidden_states=wanted.get("output_hidden_states", False),
        )
        logp = out.logits[0, begin - 1 : end - 1].float().log_softmax(-1)
        # As generating gives it: first the prompt, then one position a step.
        steps = [slice(0, begin), *(slice(at, at + 1) for at in range(begin, end - 1))]
        attentions = hidden = None
        if out.attentions is not None:
            attentions = [tuple(each[:, :, step, : step.stop] for each in out.attentions) for step in steps]
        if out.hidden_states is not None:
            hidden = tuple(tuple(each[:, step] for each in out.hidden_states) for step in steps)
        self.seconds += time.perf_counter() - began
        return SimpleNamespace(scores=tuple(logp[:, None]), sequences=ids, attentions=attentions, hidden_states=hidden)


class Cosine:
    """In the place of a cross-encoder: cosine of sentence embeddings in [0, 1]."""

    def __init__(self, folder: str) -> None:
        self.model, self.tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        self.question = ""  # put before texts that do not begin with it, and before
        self.samples: set[str] = set()  # these, which may repeat it
        self.known: dict[str, Any] = {}  # embeddings of this question's texts

    def predict(self, pairs: list[tuple[str, str]], batch_size: int = 32) -> Any:
        """The similarity of each pair."""
        del batch_size
        whole = [[self._with_question(text) for text in pair] for pair in pairs]
        texts = sorted({text for pair in whole for text in pair} - set(self.known))
        for at in range(0, len(texts), 32):
            part = texts[at : at + 32]
            self.known |= dict(zip(part, self._embedded(part).double().numpy(), strict=True))
        found = self.known
        return np.array([min(1.0, max(0.0, float(found[one] @ found[other]))) for one, other in whole])

    def _with_question(self, text: str) -> str:
        whole = text.startswith(self.question) and text not in self.samples
        return text if whole else f"{self.question} {text}"

    def _embedded(self, texts: list[str]) -> torch.Tensor:
        read = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        states = self.model(**read).last_hidden_state
        mask = read["attention_mask"][:, :, None].float()
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def scored(model: Given, cosine: Cosine, row: dict[str, Any]) -> dict[str, Any]:
    """Every score of one answer, with the seconds of each step."""
    began = time.perf_counter()
    model.prompt, model.answers, model.seconds = row["prompt_token_ids"], [row["token_ids"]], 0.0
    stats: dict[str, Any] = {"model": model}
    stats |= GreedyProbsCalculator()(stats, [row["prompt"]], model)
    stats |= EntropyCalculator()(stats, [row["prompt"]], model)
    singles = (
        estimators.MaximumSequenceProbability(),
        estimators.Perplexity(),
        estimators.MeanTokenEntropy(),
        estimators.SelfCertainty(),
        estimators.BoostedProbSequence(),
        estimators.RAUQ(),
    )
    scores = {str(each): float(each(stats)[0]) for each in singles}
    seconds = {"reading": model.seconds, "one pass": time.perf_counter() - began}
    samples = [each for each in row["samples"] if each["token_ids"]]
    if len(samples) > 1:
        began = time.perf_counter()
        model.answers = [each["token_ids"] for each in samples]
        stats |= SamplingGenerationCalculator(len(samples))(stats, [row["prompt"]], model)
        stats["input_texts"] = [row["query"]]
        stats["greedy_texts"] = [row["text"]]
        both, greedy = CrossEncoderSimilarityMatrixCalculator(), GreedyCrossEncoderSimilarityMatrixCalculator()
        for each in (both, greedy):
            each.crossencoder, each.crossencoder_setup = cosine, True
        cosine.question, cosine.samples, cosine.known = "", set(), {}
        stats |= both(stats, [row["prompt"]], model)
        stats |= greedy(stats, [row["prompt"]], model)
        sampled = (
            estimators.SAR(),
            estimators.CocoaMSP(),
            estimators.CocoaPPL(),
            estimators.CocoaMTE(),
            estimators.MonteCarloSequenceEntropy(),
            estimators.EigenScore(),
        )
        scores |= {str(each): float(each(stats)[0]) for each in sampled}
        seconds["samples"] = time.perf_counter() - began
        cosine.question, cosine.samples = row["query"], set(stats["sample_texts"][0])
        stats |= both(stats, [row["prompt"]], model)
        scores["SAR, with question"] = float(estimators.SAR()(stats)[0])
    logp = stats["greedy_log_probs"][0]
    return {
        "id": row["id"],
        "scores": scores,
        "seconds": seconds,
        "logprobs": [float(each) for each in stats["greedy_log_likelihoods"][0]],
        "top": [sorted(map(float, np.partition(each, -TOP)[-TOP:]), reverse=True) for each in logp],
        "sampled": [[float(each) for each in one] for one in stats.get("sample_log_likelihoods", [[]])[0]],
    }


def main() -> None:
    """Score what has no row yet."""
    handoff, folder, sentence, out = sys.argv[1:5]
    rows = [json.loads(line) for line in Path(handoff).read_text(encoding="utf-8").splitlines()]
    kept = Path(out).read_text(encoding="utf-8").splitlines() if Path(out).exists() else []
    done = {json.loads(line)["id"] for line in kept}
    if all(row["id"] in done for row in rows):
        return
    # Fast kernels give no attention weights.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    given, cosine = Given(model, AutoTokenizer.from_pretrained(folder)), Cosine(sentence)
    with torch.no_grad(), warnings.catch_warnings(), Path(out).open("a", encoding="utf-8") as file:
        warnings.simplefilter("ignore")
        for row in rows:
            if row["id"] not in done:
                file.write(json.dumps(scored(given, cosine, row)) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
