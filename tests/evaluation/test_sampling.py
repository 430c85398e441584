"""Scores of samples against closed forms and against their definitions written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hallucination_guard.errors import InputError, ModelError
from hallucination_guard.evaluation import Item, OwnStates, Prompting, SentenceModel, Store
from hallucination_guard.evaluation.agreement import Answered
from hallucination_guard.evaluation.sample import Sample
from hallucination_guard.evaluation.sampling import (
    SAMPLED,
    _read,
    clusters,
    draw,
    eigenscore,
    lexical_dissimilarity,
    sar,
    score_samples,
    semantic_entropy,
)
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import Likelihood
from hallucination_guard.testing import tiny_tokenizer

ANSWER = Answered(text="Paris", sequence_nll=1.0, mean_nll=1.0, mean_token_entropy=0.5)


def sample(text: str, *logprobs: float) -> Sample:
    return Sample(text=text, without=tuple(f"{text} but {at}" for at in range(len(logprobs))), logprobs=logprobs)


class _Table:
    """Unit vectors at random, the same text always the same."""

    name = "table"

    def __call__(self, texts: Sequence[str]) -> Any:
        rows = [np.random.default_rng(list(text.encode())).normal(size=8) + 1.0 for text in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows])


class _Same:
    """All texts are one."""

    name = "same"

    def __call__(self, texts: Sequence[str]) -> Any:
        return np.tile([1.0, 0.0], (len(texts), 1))


class TestSemanticEntropy:
    def test_is_nil_for_one_meaning_and_log_k_for_k(self) -> None:
        assert semantic_entropy([0, 0, 0], [1.0, 2.0, 3.0]) == pytest.approx(0.0)
        assert semantic_entropy([0, 1, 2, 3], [1.0] * 4) == pytest.approx(math.log(4))

    def test_goes_by_weight(self) -> None:
        expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert semantic_entropy([0, 1, 0], [1.0, 1.0, 2.0]) == pytest.approx(expected)

    def test_the_same_words_are_one_cluster(self) -> None:
        assert clusters("?", [sample("Paris."), sample("Lyon"), sample("paris"), Sample(text="")]) == [0, 1, 0, 2]

    def test_like_embeddings_are_one_cluster_but_for_an_empty_answer(self) -> None:
        answers = [sample("Paris"), sample("Lyon"), Sample(text="")]
        assert clusters("?", answers, embed=_Same(), by_meaning=0.9) == [0, 0, 1]


class TestLexical:
    def test_is_nil_where_all_say_the_same_and_one_where_none_do(self) -> None:
        assert lexical_dissimilarity(["Paris", "paris."]) == 0.0
        assert lexical_dissimilarity(["", ""]) == 0.0
        assert lexical_dissimilarity(["Paris", "Lyon", ""]) == 1.0

    def test_is_the_mean_over_pairs(self) -> None:
        assert lexical_dissimilarity(["a", "a", "b"]) == pytest.approx(2 / 3)


class TestSar:
    def test_is_its_definition_written_out(self) -> None:
        embed = _Table()
        samples = [sample("Paris", -0.1, -2.0), sample("Lyon", -1.0), sample("Nice", -0.3, -0.2, -4.0)]

        def similar(one: str, other: str) -> float:
            a, b = embed([one, other])
            return min(1.0, max(0.0, float(a @ b)))

        shifted = []
        for each in samples:
            relevance = [1 - similar(f"who? {each.text}", f"who? {text}") for text in each.without]
            pairs = zip(relevance, each.logprobs, strict=True)
            shifted.append(-sum(r / sum(relevance) * logp for r, logp in pairs))
        total = 0.0
        for j, each in enumerate(samples):
            others = sum(
                similar(f"who? {each.text}", f"who? {other.text}") * math.exp(-shifted[k])
                for k, other in enumerate(samples)
                if k != j
            )
            total -= math.log(math.exp(-shifted[j]) + others / 0.001)
        assert sar("who?", samples, embed=embed) == pytest.approx(total / 3)

    def test_where_no_token_matters_more_all_matter_alike(self) -> None:
        samples = [sample("a", -1.0, -3.0), sample("b", -2.0, -2.0)]
        expected = -math.log(math.exp(-2.0) + math.exp(-2.0) / 0.001)
        assert sar("who?", samples, embed=_Same()) == pytest.approx(expected)


class TestEigenScore:
    def test_samples_that_agree_score_lower(self) -> None:
        states = np.random.default_rng(0).normal(size=(5, 64))
        assert eigenscore(np.tile(states[:1], (5, 1)) + 0.01 * states) < eigenscore(states)

    def test_uncorrelated_states_have_the_mean_log_variance(self) -> None:
        states = np.array([[1.0, -1.0, 1.0, -1.0], [2.0, 2.0, -2.0, -2.0]])
        variances = [4 / 3, 16 / 3]  # over d − 1
        expected = sum(math.log(each + 0.001) for each in variances) / 2
        assert eigenscore(states) == pytest.approx(expected)

    def test_is_finite_for_one_state_twice(self) -> None:
        state = np.random.default_rng(0).normal(size=16)
        variance = state.var(ddof=1)
        expected = (math.log(0.001) + math.log(2 * variance + 0.001)) / 2
        assert eigenscore(np.stack([state, state])) == pytest.approx(expected)


class TestDrawing:
    def test_draws_k_answers_and_draws_none_twice(
        self, tiny: WhiteBoxModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        items = [Item(id=str(at), query=f"Who is {at}?", answers=("me",)) for at in range(3)]
        store = Store(tmp_path / "samples.jsonl", {})
        settings: Any = {"k": 3, "max_new_tokens": 5, "batch_size": 2}
        draw(tiny, items[:2], Prompting.of(tiny), store, **settings)
        prompts: list[str] = []
        real = tiny.generate
        monkeypatch.setattr(tiny, "generate", lambda asked, **more: (prompts.extend(asked), real(asked, **more))[1])
        draw(tiny, items, Prompting.of(tiny), store, **settings)
        assert set(prompts) == {Prompting.of(tiny)("Who is 2?")}
        for row in store.rows.values():
            texts = [each["text"] for each in row["samples"]]
            assert len(texts) == 3
            assert len(set(texts)) > 1
            assert [len(each["token_ids"]) for each in row["samples"]] == [
                len(each["logprobs"]) for each in row["samples"]
            ]
            assert isinstance(row["eigenscore"], float)
            assert row["seconds"] > 0

    def test_likelihoods_are_those_of_the_scorer(self, tiny: WhiteBoxModel) -> None:
        generation = tiny.generate("Who?", max_new_tokens=6, temperature=1.0)
        read, state = _read(tiny, generation)
        assert read.logprobs == pytest.approx(Likelihood()(tiny, generation).token_logprobs, rel=1e-4)
        ids = torch.tensor([(*generation.prompt_token_ids, *generation.response_token_ids)])
        with torch.no_grad():
            states = tiny.model(ids, output_hidden_states=True).hidden_states[3]  # six layers: the third is the middle
        assert state == pytest.approx(states[0, -1].double().numpy(), rel=1e-4, abs=1e-5)

    def test_what_is_left_without_a_token(self, tiny: WhiteBoxModel) -> None:
        read, _ = _read(tiny, tiny.read("Who?", answer="abc"))
        assert read.without == ("bc", "ac", "ab")

    def test_every_score_is_there_with_its_seconds(self) -> None:
        samples = [sample("Paris", -0.1), sample("Lyon", -1.0, -2.0), Sample(text="")]
        scores, seconds = score_samples("who?", samples, answer=ANSWER, embed=_Table())
        assert set(scores) == set(seconds) == {*SAMPLED} - {"eigenscore"}
        assert scores["predictive_entropy"] == pytest.approx((0.1 + 3.0) / 2)
        assert scores["predictive_entropy_mean"] == pytest.approx((0.1 + 1.5) / 2)

    def test_with_one_likelihood_there_is_no_score(self) -> None:
        samples = [sample("Paris", -0.1), Sample(text="")]
        assert score_samples("who?", samples, answer=ANSWER, embed=_Table()) == ({}, {})

    def test_a_sample_that_is_not_finite_can_not_be_built(self) -> None:
        with pytest.raises(ValueError, match="log prob"):
            sample("a", math.nan)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random encoder, as a folder."""
    from transformers import BertConfig, BertModel

    folder = str(tmp_path_factory.mktemp("bert"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        )
    model.save_pretrained(folder)
    tiny_tokenizer(chat_template=None).save_pretrained(folder)
    return folder


class TestEmbedding:
    @pytest.fixture(params=["own", "sentence"])
    def embed(self, request: pytest.FixtureRequest, tiny: WhiteBoxModel, bert: str) -> Any:
        return OwnStates(tiny) if request.param == "own" else SentenceModel.from_pretrained(bert)

    def test_a_text_has_one_unit_vector_whatever_stands_beside_it(self, embed: Any) -> None:
        texts = ["Paris", "The capital of France, a city on the Seine", "x"]
        together = embed(texts)
        assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(3))
        for vector, text in zip(together, texts, strict=True):
            assert vector == pytest.approx(embed([text])[0], abs=1e-5)

    def test_many_texts_come_in_order(self, embed: Any) -> None:
        texts = [f"text {at}" for at in range(40)]
        assert embed(texts)[35] == pytest.approx(embed(texts[35:36])[0], abs=1e-5)

    def test_an_empty_text_is_refused(self, embed: Any) -> None:
        with pytest.raises(InputError, match="empty"):
            embed(["Paris", " "])

    def test_own_states_are_the_mean_of_the_middle_layer(self, tiny: WhiteBoxModel) -> None:
        ids = torch.tensor([tiny.tokenizer("Paris", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            mean = tiny.model(ids, output_hidden_states=True).hidden_states[3][0].double().mean(dim=0).numpy()
        assert OwnStates(tiny)(["Paris"])[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)

    def test_a_sentence_model_is_the_mean_of_its_last_states(self, bert: str) -> None:
        embed = SentenceModel.from_pretrained(bert)
        read = embed._tokenizer("Paris", return_tensors="pt")
        with torch.no_grad():
            mean = embed._model(**read).last_hidden_state[0].double().mean(dim=0).numpy()
        assert embed(["Paris"])[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)

    def test_a_model_that_is_not_there_is_named(self, tmp_path: Any) -> None:
        with pytest.raises(ModelError, match="nowhere"):
            SentenceModel.from_pretrained(str(tmp_path / "nowhere"))
