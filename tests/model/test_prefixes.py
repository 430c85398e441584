"""What was read before is not read again, and the scores are those of a reading from the start."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hallucination_guard import WhiteBoxModel
from hallucination_guard.errors import ConfigurationError
from hallucination_guard.model.prefixes import Prefixes
from hallucination_guard.scoring import HybridGrad
from hallucination_guard.testing import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "gpt2")
FIRST = [{"role": "user", "content": "What is the capital of France, and which river runs through it?"}]
SECOND = [*FIRST, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Spain?"}]
PLENTY = 2**30


def white_box(family: str = "llama") -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(family).double(), tiny_tokenizer())


def scores(model: WhiteBoxModel, messages: Any, answer: str) -> dict[str, float]:
    [score] = HybridGrad().batch(model, [model.read(messages, answer)])
    assert score.status == "scored", score.reason
    return dict(score.scores)


class Counting:
    """How many tokens go into a model."""

    def __init__(self, model: WhiteBoxModel) -> None:
        self.tokens = 0
        model.model.get_input_embeddings().register_forward_hook(self)

    def __call__(self, _: Any, given: Any, __: Any) -> None:
        self.tokens += given[0].numel()

    def since(self) -> int:
        found, self.tokens = self.tokens, 0
        return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scores_are_those_of_a_reading_from_the_start(family: str) -> None:
    model = white_box(family)
    keeping = model.with_prefixes(PLENTY)
    for messages, answer in ((FIRST, "Paris."), (SECOND, "Madrid."), (FIRST, "Lyon."), (SECOND, "Madrid. Or not.")):
        assert scores(keeping, messages, answer) == pytest.approx(scores(model, messages, answer), rel=1e-9, abs=1e-12)


def test_a_turn_of_a_conversation_is_read_from_where_it_is_new() -> None:
    model = white_box()
    counting, keeping = Counting(model), model.with_prefixes(PLENTY)
    anchor = model.read(SECOND, "Madrid.").anchor
    assert anchor is not None
    scores(keeping, FIRST, "Paris.")
    first = counting.since()
    scores(keeping, SECOND, "Madrid.")
    second = counting.since()
    scores(model, SECOND, "Madrid.")
    whole = counting.since()
    prompt = len(model.prompt(FIRST).token_ids)
    assert second <= whole - prompt + 1
    assert first > prompt


def test_the_copy_is_of_the_same_model_and_the_original_keeps_nothing() -> None:
    model = white_box()
    keeping = model.with_prefixes(PLENTY)
    scores(keeping, FIRST, "Paris.")
    scores(model, FIRST, "Paris.")
    assert keeping.model is model.model
    assert model.prefixes is None
    assert keeping.prefixes is not None and keeping.prefixes.size > 0


def test_other_weights_have_read_nothing_yet() -> None:
    model = white_box()
    keeping = model.with_prefixes(PLENTY)
    scores(keeping, FIRST, "Paris.")
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1.5)
    assert scores(keeping, SECOND, "Madrid.") == pytest.approx(scores(model, SECOND, "Madrid."), rel=1e-9)


def test_what_is_kept_is_bounded_in_bytes() -> None:
    model = white_box()
    keeping = model.with_prefixes(PLENTY)
    scores(keeping, FIRST, "Paris.")
    assert keeping.prefixes is not None
    one = keeping.prefixes.size
    keeping = model.with_prefixes(one * 5 // 2)
    counting = Counting(model)
    questions = [[{"role": "user", "content": f"{letter * 60}?"}] for letter in "abcd"]
    for each in questions:
        scores(keeping, each, "Paris.")
        assert keeping.prefixes is not None and 0 < keeping.prefixes.size <= one * 5 // 2
    counting.since()
    scores(keeping, questions[-1], "Lyon.")
    used_last = counting.since()
    scores(keeping, questions[0], "Lyon.")
    assert used_last < counting.since()


def test_what_is_larger_than_the_room_is_not_kept() -> None:
    model = white_box().with_prefixes(1000)
    scores(model, FIRST, "Paris.")
    assert model.prefixes is not None and model.prefixes.size == 0


@pytest.mark.parametrize("most", [0, -1, True, 1.5, "1"])
def test_no_room_is_refused(most: Any) -> None:
    with pytest.raises(ConfigurationError, match="bytes"):
        Prefixes(most)


def test_threads_read_what_they_would_read_alone() -> None:
    model = white_box()
    keeping = model.with_prefixes(200_000)
    asked = [[{"role": "user", "content": f"What is {each} times two, and how do you know it?"}] for each in range(24)]
    alone = [scores(model, each, "It is.") for each in asked]
    found: dict[int, dict[str, float]] = {}

    def read(begin: int) -> None:
        for at in range(begin, len(asked), 4):
            found[at] = scores(keeping, asked[at], "It is.")

    threads = [threading.Thread(target=read, args=(begin,)) for begin in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for at, expected in enumerate(alone):
        assert found[at] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_nothing_is_kept_of_a_reading_in_which_the_weights_were_changed_and_changed_back() -> None:
    model = white_box()
    keeping = model.with_prefixes(PLENTY)
    weight = model.model.get_input_embeddings().weight

    def there_and_back(*_: Any) -> None:
        with torch.no_grad():
            weight.mul_(2.0)
            weight.mul_(0.5)

    scores(keeping, FIRST, "Paris.")
    assert keeping.prefixes is not None
    before = keeping.prefixes.size
    handle = model.layout.list_of(model.model)[0].register_forward_pre_hook(there_and_back)
    scores(keeping, SECOND, "Madrid.")
    handle.remove()
    assert keeping.prefixes.size <= before
    assert scores(keeping, SECOND, "Madrid.") == pytest.approx(scores(model, SECOND, "Madrid."), rel=1e-9)


def test_keys_that_hang_on_the_length_are_not_kept() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 100,
    }
    made = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=100).double()
    with pytest.raises(ConfigurationError, match="longrope"):
        WhiteBoxModel(made, tiny_tokenizer()).with_prefixes(PLENTY)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_an_adapter_that_can_be_switched_is_not_kept() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    model = WhiteBoxModel(peft.get_peft_model(tiny_model("llama"), config), tiny_tokenizer())
    with pytest.raises(ConfigurationError, match="adapter"):
        model.with_prefixes(PLENTY)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_an_adapter_that_comes_later_ends_the_keeping() -> None:
    peft = pytest.importorskip("peft")
    model = white_box()
    keeping = model.with_prefixes(PLENTY)
    scores(keeping, FIRST, "Paris.")
    peft.get_peft_model(model.model, peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    assert keeping.prefixes is None
    assert scores(keeping, SECOND, "Madrid.") == pytest.approx(scores(model, SECOND, "Madrid."), rel=1e-9)
