"""A sentence's part of SemGrad is what the definition says, and the parts are the whole."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard.errors import AnchorError, InputError, ScoringError
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import (
    GradientSettings,
    HybridGrad,
    SemGrad,
    prompt_sensitivity,
    question_sensitivity,
    semgrad_by_span,
    spans,
)
from hallucination_guard.scoring.token_texts import token_texts
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard.values.text import sentence_ranges, sentence_starts

ANSWER = "It was Ada. She wrote it! Or not?"
SENTENCES = ["It was Ada.", " She wrote it!", " Or not?"]
# The backward is linear, but norms round to float32 inside Llama and Gemma, whatever the weights are: one backward for
# each part then differs by that from one for the whole. GPT-2 is float64 throughout.
ROUNDING = {"llama": 1e-6, "gemma3": 1e-6, "gpt2": 1e-12}
TOKENIZER = tiny_tokenizer()


def by_autograd(white: WhiteBoxModel, generation: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """−ω_t log p_t[ŷ_t] for every t with its graph, and every h_l, from the whole sequence at once."""
    prompt, answer = generation.prompt_token_ids, generation.response_token_ids
    out = white.model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True, use_cache=False)
    logp = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    return [-entropy[t] * logp[t, each] for t, each in enumerate(answer)], list(out.hidden_states)


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def white(request: pytest.FixtureRequest) -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(request.param, dtype=torch.float64), tiny_tokenizer())


@pytest.fixture(scope="module")
def exact() -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model("gpt2", dtype=torch.float64), tiny_tokenizer())


class TestEqualsFullSequenceAutograd:
    def test_each_span(self, white: WhiteBoxModel) -> None:
        generation = white.read("Who wrote it?", answer=ANSWER)
        assert generation.anchor is not None
        losses, hidden = by_autograd(white, generation)
        states = [hidden[level] for level in white.deep_layers]
        at = len(generation.prompt_token_ids) + generation.anchor.index

        def gradient(start: int, stop: int) -> torch.Tensor:
            grads = torch.autograd.grad(sum(losses[start:stop], torch.tensor(0.0)), states, retain_graph=True)
            return torch.cat([each[0, at] for each in grads])

        whole = gradient(0, len(losses))
        found = semgrad_by_span(white, generation)
        assert len(found) == 3
        for span in found:
            own = gradient(span.start, span.stop)
            assert span.semgrad == pytest.approx(float(own.abs().mean()), rel=1e-9)
            assert span.share == pytest.approx(float((whole.sign() * own).mean()), rel=1e-9, abs=1e-12)

    def test_the_prompts_tokens(self, white: WhiteBoxModel) -> None:
        generation = white.read("Who wrote it?", answer=ANSWER)
        losses, hidden = by_autograd(white, generation)
        (gradient,) = torch.autograd.grad(sum(losses), hidden[white.deep_layers.start])  # type: ignore[arg-type]
        expected = gradient[0].abs().mean(dim=-1)[: len(generation.prompt_token_ids)].tolist()
        assert prompt_sensitivity(white, generation) == pytest.approx(expected, rel=1e-9)


class TestTheParts:
    def test_of_a_partition_add_up_to_semgrad(self, white: WhiteBoxModel) -> None:
        rounding = ROUNDING[white.model.config.model_type.removesuffix("_text")]
        generation = white.generate("Who wrote it?", max_new_tokens=12, temperature=1.0, seed=3)
        whole = SemGrad()(white, generation).scores["semgrad"]
        length = len(generation.response_token_ids)
        found = semgrad_by_span(white, generation, [(at, min(at + 5, length)) for at in range(0, length, 5)])
        assert len(found) > 1
        assert sum(span.share for span in found) == pytest.approx(whole, rel=rounding)

    def test_alone_are_together_no_less_than_semgrad(self, white: WhiteBoxModel) -> None:
        generation = white.read("Who wrote it?", answer=ANSWER)
        found = semgrad_by_span(white, generation)
        assert sum(span.semgrad for span in found) >= SemGrad()(white, generation).scores["semgrad"]
        assert all(abs(span.share) <= span.semgrad * (1 + 1e-12) for span in found)

    def test_one_span_over_all_is_semgrad(self, white: WhiteBoxModel) -> None:
        generation = white.read("Who wrote it?", answer=ANSWER)
        (span,) = semgrad_by_span(white, generation, [(0, len(generation.response_token_ids))])
        whole = SemGrad()(white, generation).scores["semgrad"]
        assert (span.semgrad, span.share) == pytest.approx((whole, whole), rel=1e-9)

    @pytest.mark.parametrize("chosen", [[(2, 6)], [(0, 8), (4, 12)]], ids=["leaving tokens out", "overlapping"])
    def test_are_the_same_whatever_other_spans_are_asked_for(
        self, exact: WhiteBoxModel, chosen: list[tuple[int, int]]
    ) -> None:
        generation = exact.read("Who wrote it?", answer=ANSWER)
        start, stop = chosen[0]
        partition = [each for each in ((0, start), (start, stop), (stop, len(ANSWER))) if each[0] < each[1]]
        found = semgrad_by_span(exact, generation, chosen)[0]
        same = next(each for each in semgrad_by_span(exact, generation, partition) if each.start == start)
        assert (found.semgrad, found.share) == pytest.approx((same.semgrad, same.share), rel=1e-9)

    @pytest.mark.parametrize(
        "settings",
        [GradientSettings(reduction="mean"), GradientSettings(weighting="none"), GradientSettings(layers="official")],
        ids=str,
    )
    def test_add_up_under_every_setting(self, exact: WhiteBoxModel, settings: GradientSettings) -> None:
        generation = exact.read("Who wrote it?", answer=ANSWER)
        scorer = SemGrad(layers=settings.layers, reduction=settings.reduction, weighting=settings.weighting)
        found = semgrad_by_span(exact, generation, settings=settings)
        whole = scorer(exact, generation).scores["semgrad"]
        assert sum(span.share for span in found) == pytest.approx(whole, rel=1e-9)

    def test_are_the_same_where_the_backward_can_not_be_batched(
        self, exact: WhiteBoxModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generation = exact.read("Who wrote it?", answer=ANSWER)
        batched = semgrad_by_span(exact, generation)
        grad = torch.autograd.grad

        def refusing(*args: Any, is_grads_batched: bool = False, **kwargs: Any) -> Any:
            if is_grads_batched:
                raise RuntimeError("vmap: there is no batching rule")
            return grad(*args, **kwargs)

        monkeypatch.setattr(spans.torch.autograd, "grad", refusing)
        for one, other in zip(semgrad_by_span(exact, generation), batched, strict=True):
            assert (one.semgrad, one.share) == pytest.approx((other.semgrad, other.share), rel=1e-9)


class TestWhatIsLeftBehind:
    def test_a_generation_can_be_scored_before_and_after(self, exact: WhiteBoxModel) -> None:
        generation = exact.generate("Who?", max_new_tokens=9, temperature=1.0, seed=0)
        again = pickle.loads(pickle.dumps(generation))
        before = semgrad_by_span(exact, generation)
        score = HybridGrad()(exact, generation)
        assert dict(score.scores) == pytest.approx(dict(HybridGrad()(exact, again).scores), rel=1e-9)
        assert [span.share for span in semgrad_by_span(exact, generation)] == pytest.approx(
            [span.share for span in before], rel=1e-9
        )

    def test_the_model_is_as_it_was(self) -> None:
        model = tiny_model()
        white = WhiteBoxModel(model, tiny_tokenizer())
        generation = white.read("Who?", answer=ANSWER)
        tables = [copy.copy(module.__dict__) for module in model.modules()]
        values = {name: each.clone() for name, each in model.state_dict().items()}
        semgrad_by_span(white, generation)
        question_sensitivity(white, generation)
        assert all(each.grad is None and each.requires_grad for each in model.parameters())
        assert all(torch.equal(each, values[name]) for name, each in model.state_dict().items())
        for module, table in zip(model.modules(), tables, strict=True):
            assert {name: id(value) for name, value in module.__dict__.items()} == {
                name: id(value) for name, value in table.items()
            }
            assert not module._forward_hooks and not module._forward_pre_hooks

    def test_inference_mode_around_changes_nothing(self, exact: WhiteBoxModel) -> None:
        generation = exact.read("Who?", answer=ANSWER)
        with torch.inference_mode():
            inside = semgrad_by_span(exact, generation), prompt_sensitivity(exact, generation)
        assert inside == (semgrad_by_span(exact, generation), prompt_sensitivity(exact, generation))


class TestRefuses:
    @pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (0, 99)])
    def test_a_span_outside_the_answer(self, tiny: WhiteBoxModel, span: tuple[int, int]) -> None:
        with pytest.raises(InputError, match="not in an answer of 3 tokens"):
            semgrad_by_span(tiny, tiny.read("Who?", answer="Ada"), [span])

    def test_no_spans(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError, match="no spans"):
            semgrad_by_span(tiny, tiny.read("Who?", answer="Ada"), [])

    @pytest.mark.parametrize("measure", [semgrad_by_span, question_sensitivity])
    def test_an_empty_answer(self, tiny: WhiteBoxModel, measure: Any) -> None:
        with pytest.raises(ScoringError, match="empty"):
            measure(tiny, tiny.read("Who?", answer=""))

    @pytest.mark.parametrize("measure", [semgrad_by_span, question_sensitivity])
    def test_another_models_generation(self, tiny: WhiteBoxModel, exact: WhiteBoxModel, measure: Any) -> None:
        with pytest.raises(ScoringError, match="is of model"):
            measure(exact, tiny.read("Who?", answer="Ada"))

    def test_a_generation_without_an_anchor(self) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None))
        with pytest.raises(AnchorError):
            semgrad_by_span(white, white.read("Who?", answer="Ada"))


class TestSentences:
    def test_of_an_answer_are_its_spans(self, tiny: WhiteBoxModel) -> None:
        found = semgrad_by_span(tiny, tiny.read("Who?", answer=ANSWER))
        # A token a byte: a blank belongs to no sentence by itself, so it stays with the one before.
        assert [span.text.strip() for span in found] == [each.strip() for each in SENTENCES]
        assert "".join(span.text for span in found) == ANSWER

    def test_begin_where_their_first_token_does(self) -> None:
        texts = ["It", " was", " Ada", ".", " She", " wrote", " it", "!"]
        assert sentence_ranges(texts) == ((0, 4), (4, 8))

    @pytest.mark.parametrize(
        ("text", "sentences"),
        [
            ("One. Two.", ["One. ", "Two."]),
            ("Is it? Yes! Sure… Fine", ["Is it? ", "Yes! ", "Sure… ", "Fine"]),
            ("Dr. Who met J. R. Smith. He left.", ["Dr. Who met J. R. Smith. ", "He left."]),
            ("It is 3.14, e.g. here. Good", ["It is 3.14, e.g. here. ", "Good"]),
            ("1. One\n2. Two", ["1. One\n", "2. Two"]),
            ('He said "no." Then he left.', ['He said "no." ', "Then he left."]),
            ("一。二！三", ["一。", "二！", "三"]),
            ("well… maybe", ["well… maybe"]),
            ("\n\nOne\n\nTwo\n", ["\n\nOne\n\n", "Two\n"]),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_end_where_a_reader_sees_it(self, text: str, sentences: list[str]) -> None:
        starts = sentence_starts(text)
        ends = [*starts[1:], len(text)]
        assert [text[start:stop] for start, stop in zip(starts, ends, strict=True)] == sentences

    def test_of_ten_thousand_line_breaks_are_found_at_once(self) -> None:
        assert sentence_starts("One." + "\n" * 10_000) == [0]

    @given(st.lists(st.integers(0, 258), min_size=1, max_size=60))
    def test_cover_every_token_once_whatever_the_tokens(self, ids: list[int]) -> None:
        texts = token_texts(TOKENIZER, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == TOKENIZER.decode(ids, skip_special_tokens=True)
        covered = [at for start, stop in sentence_ranges(texts) for at in range(start, stop)]
        assert covered == list(range(len(ids)))

    @given(st.lists(st.text(st.sampled_from('aB.!? \n…。"é'), max_size=6), min_size=1, max_size=30))
    def test_cover_every_token_once_however_text_is_cut(self, texts: list[str]) -> None:
        ranges = sentence_ranges(texts)
        assert all(start < stop for start, stop in ranges)
        assert [at for start, stop in ranges for at in range(start, stop)] == list(range(len(texts)))


class TestWords:
    def test_are_those_of_the_last_user_message(self, tiny: WhiteBoxModel) -> None:
        messages = [
            {"role": "user", "content": "Who wrote it?"},
            {"role": "assistant", "content": "Ada."},
            {"role": "user", "content": " Who  wrote it, user? "},
        ]
        generation = tiny.read(messages, answer="me")
        words = question_sensitivity(tiny, generation)
        assert [word.text for word in words] == ["Who", "wrote", "it,", "user?"]
        for word in words:
            ids = [generation.prompt_token_ids[at] for at in word.tokens]
            assert tiny.tokenizer.decode(ids) == word.text
        assert words[-1].tokens[-1] > words[0].tokens[0] > len("Who wrote it?") + len("Ada.")

    def test_weigh_what_their_tokens_weigh_together(self, exact: WhiteBoxModel) -> None:
        generation = exact.read("Who wrote it?", answer="me")
        by_token = prompt_sensitivity(exact, generation)
        for word in question_sensitivity(exact, generation):
            assert word.sensitivity == pytest.approx(sum(by_token[at] for at in word.tokens), rel=1e-12)

    def test_are_there_without_a_chat_template_and_without_an_anchor(self) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None))
        words = question_sensitivity(white, white.read("Who wrote it?", answer="me"))
        assert [word.text for word in words] == ["Who", "wrote", "it?"]
