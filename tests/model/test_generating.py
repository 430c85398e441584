"""What is drawn, when it ends, and that a seed is a seed."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from hallucination_guard import WhiteBoxModel
from hallucination_guard.errors import InputError
from hallucination_guard.model.decoding import Draw, end_of_answer
from hallucination_guard.testing import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2")
QUESTIONS = ["Who?", "What is the capital of France, and of Spain?", "Name a red fruit."]


def white_box(family: str = "llama", **sizes: Any) -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(family, **sizes), tiny_tokenizer())


class TestGreedy:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_what_transformers_itself_says(self, family: str) -> None:
        white = white_box(family)
        generation = white.generate("Who?", max_new_tokens=10)
        ids = torch.tensor([generation.prompt_token_ids])
        own = white.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        answer = own[0, ids.shape[1] :].tolist()
        assert list(generation.response_token_ids) == answer[: answer.index(2) if 2 in answer else None]

    def test_does_not_follow_the_models_own_generation_config(self) -> None:
        white = white_box()
        expected = white.generate("Who?", max_new_tokens=10)
        white.model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, min_length=50)
        assert white.generate("Who?", max_new_tokens=10).response_token_ids == expected.response_token_ids

    def test_does_not_hang_on_the_seed(self, tiny: WhiteBoxModel) -> None:
        assert tiny.generate("Who?", seed=1).text == tiny.generate("Who?", seed=2).text


class TestSampling:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_same_seed_gives_the_same_alone_and_in_a_batch(self, family: str) -> None:
        white = white_box(family)
        settings = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.95, "seed": 5}
        together = [each.response_token_ids for each in white.generate(QUESTIONS, **settings)]
        assert together == [white.generate(each, **settings).response_token_ids for each in QUESTIONS]

    def test_another_seed_gives_another_answer(self, tiny: WhiteBoxModel) -> None:
        drawn = {tiny.generate("Who?", temperature=1.0, seed=seed, max_new_tokens=8).text for seed in range(5)}
        assert len(drawn) == 5

    def test_does_not_hang_on_the_global_random_state(self, tiny: WhiteBoxModel) -> None:
        first = tiny.generate("Who?", temperature=1.0).text
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(123)
            assert tiny.generate("Who?", temperature=1.0).text == first

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_a_draw_has_the_distribution_of_the_softmax(self, temperature: float) -> None:
        logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
        found = drawn(logits, Draw(temperature=temperature, seed=1))
        assert chi_square(found, torch.softmax(logits / temperature, 0)) < 18.5  # 99.9 % of 4 degrees of freedom

    def test_a_nucleus_draws_from_nothing_else(self) -> None:
        logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
        found = drawn(logits, Draw(temperature=1.0, top_p=0.7, seed=1))
        assert found[2:].sum() == 0

    def test_a_nucleus_keeps_the_proportions(self) -> None:
        logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
        found = drawn(logits, Draw(temperature=1.0, top_p=0.7, seed=1))[:2]
        assert chi_square(found, torch.tensor([0.625, 0.375])) < 10.8

    def test_a_word_that_is_ruled_out_is_never_drawn(self) -> None:
        found = drawn(torch.tensor([0.0, -math.inf, 0.0]), Draw(temperature=1.0, seed=1))
        assert found[1] == 0

    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": -0.1},
            {"temperature": math.nan},
            {"temperature": math.inf},
            {"top_p": 0.0},
            {"top_p": 1.1},
            {"top_p": math.nan},
            {"max_new_tokens": 0},
        ],
        ids=repr,
    )
    def test_settings_that_make_no_sense_are_refused(self, settings: Any, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError):
            tiny.generate("Who?", **settings)


def drawn(logits: torch.Tensor, draw: Draw, count: int = 4000) -> torch.Tensor:
    """How often each word is drawn, over steps and rows as they come in a generation."""
    [*_, noise] = processors = draw.processors(1, torch.device("cpu"))
    found = torch.zeros(len(logits))
    for _ in range(count):
        scores = logits[None].clone()
        for processor in processors:
            scores = processor(torch.zeros(1, 1, dtype=torch.long), scores)
        found[scores[0].argmax()] += 1
    assert noise is processors[-1]
    return found


def chi_square(found: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * found.sum()
    return float(((found - expected) ** 2 / expected).sum())


class TestTheEnd:
    def test_an_answer_has_at_most_so_many_tokens(self, tiny: WhiteBoxModel) -> None:
        generation = tiny.generate("Who?", max_new_tokens=3)
        assert (len(generation.response_token_ids), generation.finish_reason) == (3, "length")

    def test_an_answer_ends_before_its_end_token(self) -> None:
        white = white_box()
        whole = white.generate("Who?", max_new_tokens=8, temperature=1.0).response_token_ids
        white.model.generation_config.eos_token_id = [whole[4], 2]
        fresh = WhiteBoxModel(white.model, tiny_tokenizer())
        generation = fresh.generate("Who?", max_new_tokens=8, temperature=1.0)
        assert (generation.response_token_ids, generation.finish_reason) == (whole[: whole.index(whole[4])], "stop")

    def test_an_answer_ends_before_a_stop_text(self, tiny: WhiteBoxModel) -> None:
        settings = {"max_new_tokens": 30, "temperature": 1.0, "seed": 2}
        whole = tiny.generate("Who?", **settings).text
        stop = next(letter for letter in whole[3:] if letter.isascii() and letter.isprintable())
        assert tiny.generate("Who?", **settings, stop=[stop]).text == whole[: whole.index(stop)]

    def test_a_stop_text_ends_its_own_row_only(self, tiny: WhiteBoxModel) -> None:
        settings = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2}
        alone = [tiny.generate(each, **settings, stop=["K", "c"]).response_token_ids for each in QUESTIONS]
        together = tiny.generate(QUESTIONS, **settings, stop=["K", "c"])
        assert [each.response_token_ids for each in together] == alone

    def test_a_single_stop_text_is_not_taken_letter_by_letter(self, tiny: WhiteBoxModel) -> None:
        settings = {"max_new_tokens": 30, "temperature": 1.0, "seed": 2}
        whole = tiny.generate("Who?", **settings).text
        letter = next(letter for letter in whole[3:] if letter.isascii() and letter.isprintable())
        try:
            found = tiny.generate("Who?", **settings, stop=f"{letter}@#").text
        except InputError:
            return
        assert found == whole

    def test_an_empty_stop_text_is_refused(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError):
            tiny.generate("Who?", stop=[""])

    def test_what_was_stopped_is_scored_as_if_it_had_been_read(self, tiny: WhiteBoxModel) -> None:
        from hallucination_guard.scoring import HybridGrad

        generation = tiny.generate("Who?", max_new_tokens=30, temperature=1.0, seed=2, stop=["Y", "c"])
        read = tiny.read("Who?", answer=generation.response_token_ids)
        expected = dict(HybridGrad()(tiny, read).scores)
        assert dict(HybridGrad()(tiny, generation).scores) == pytest.approx(expected, rel=1e-4)

    def test_the_end_is_where_the_first_end_token_is(self) -> None:
        assert end_of_answer(tiny_tokenizer(), [50, 2, 51, 2], frozenset({2}), ()) == (1, "stop")

    def test_a_text_over_several_tokens_is_cut_before_the_one_in_which_it_begins(self) -> None:
        tokenizer = tiny_tokenizer()
        assert end_of_answer(tokenizer, tokenizer("ab##cd")["input_ids"], frozenset(), ["##"]) == (2, "stop_text")


class TestQuestions:
    def test_a_batch_takes_a_question_for_each_prompt(self) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None))
        prompts, asked = ["Q: Who? A:", "Q: Where was it? A:"], ["Who", "Where"]
        together = white.generate(prompts, question=asked, max_new_tokens=4)
        alone = [
            white.generate(each, question=part, max_new_tokens=4) for each, part in zip(prompts, asked, strict=True)
        ]
        assert [(each.text, each.anchor) for each in together] == [(each.text, each.anchor) for each in alone]
        assert together[0].anchor != together[1].anchor

    def test_as_many_questions_as_prompts_are_wanted(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError, match="2 questions for 1 prompts"):
            tiny.generate(["Who?"], question=["Who?", "Who?"])


class TestTheContext:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_an_answer_ends_where_the_context_does(self, family: str) -> None:
        white = white_box(family, **({"n_positions": 40} if family == "gpt2" else {"max_position_embeddings": 40}))
        generation = white.generate("Who?", max_new_tokens=100, temperature=1.0)
        assert len(generation.prompt_token_ids) + len(generation.response_token_ids) == 40

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_an_answer_up_to_the_end_of_the_context_can_be_scored(self, family: str) -> None:
        from hallucination_guard.scoring import HybridGrad

        white = white_box(family, **({"n_positions": 40} if family == "gpt2" else {"max_position_embeddings": 40}))
        generation = white.generate("Who?", max_new_tokens=100, temperature=1.0)
        assert HybridGrad()(white, generation).status == "scored"

    def test_a_prompt_that_fills_it_is_refused(self) -> None:
        with pytest.raises(InputError, match="context"):
            white_box(max_position_embeddings=40).generate("x" * 40)

    def test_an_answer_that_exceeds_it_is_refused(self) -> None:
        with pytest.raises(InputError, match="context"):
            white_box(max_position_embeddings=40).read("Who?", answer="x" * 40)


class TestReading:
    @pytest.mark.parametrize("ids", [[320], [-1], [10**9], [1.5], ["a"], [True], [None]], ids=repr)
    def test_ids_outside_the_vocabulary_are_refused(self, ids: Any, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError):
            tiny.read("Who?", answer=ids)

    def test_ids_are_taken_as_they_are(self, tiny: WhiteBoxModel) -> None:
        assert tiny.read("Who?", answer=[5, 0, 9]).response_token_ids == (5, 0, 9)

    def test_a_text_is_taken_as_it_is(self, tiny: WhiteBoxModel) -> None:
        assert tiny.read("Who?", answer="  Ada, né <x>\n").text == "  Ada, né <x>\n"

    @pytest.mark.parametrize("answer", [None, 7, b"Ada", {"text": "Ada"}], ids=repr)
    def test_what_is_no_answer_is_refused(self, answer: Any, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError):
            tiny.read("Who?", answer=answer)

    @pytest.mark.parametrize("answer", ["a\ud800", "\ud83d"], ids=ascii)
    def test_a_text_that_is_no_unicode_is_refused(self, answer: str, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError):
            tiny.read("Who?", answer=answer)

    def test_a_text_that_the_tokenizer_loses_parts_of_is_refused(self) -> None:
        """What is not in the tokens is not scored, and must not be let through as if it were."""
        tokenizer = tiny_tokenizer()
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("poison", "")
        white = WhiteBoxModel(tiny_model(), tokenizer)
        try:
            generation = white.read("Who?", answer="Ada poison")
        except InputError:
            return
        assert "poison" not in generation.text


@pytest.mark.parametrize("messages", [{"role": "user", "content": "x"}, 7, None, [], "", [[]], [""]], ids=repr)
def test_what_is_no_prompt_is_refused(messages: Any, tiny: WhiteBoxModel) -> None:
    with pytest.raises(InputError):
        tiny.generate(messages)


@pytest.mark.parametrize("ask", ["prompt", "answer"])
def test_megabytes_are_refused_before_they_are_tokenised(tiny: WhiteBoxModel, ask: str) -> None:
    text, began = "word " * 1_000_000, time.perf_counter()
    with pytest.raises(InputError, match="characters, and the context of 'tiny' holds 512 tokens"):
        tiny.generate(text) if ask == "prompt" else tiny.read("Who?", answer=text)
    assert time.perf_counter() - began < 1.0
