"""A reasoning model's thinking: found by its marks, left out of scores and of what leaves, and never the other way."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hallucination_guard import Generation, Guard, WhiteBoxModel
from hallucination_guard.audit import AuditLog
from hallucination_guard.audit.labels import Label, label_all, labelled_answers
from hallucination_guard.errors import ConfigurationError
from hallucination_guard.scoring import Cascade, HybridGrad, Likelihood, SemGrad
from hallucination_guard.scoring.beginnings import score_beginnings
from hallucination_guard.testing import MemorySink, tiny_model, tiny_tokenizer
from hallucination_guard_policies import Accept

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).parents[1] / "reference.py")
assert _spec is not None and _spec.loader is not None
reference = sys.modules.setdefault("reference", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(reference)

ASKED = "What is the capital of France?"
THOUGHT, SAID = "<think>France. Its capital?</think>", " Paris. It is old."
MARKS = {
    "qwen": ("<think>", "</think>"),
    "magistral": ("[THINK]", "[/THINK]"),
    "seed": ("<seed:think>", "</seed:think>"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
}
OPENING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def white() -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(dtype=torch.float64, max_position_embeddings=1024), tiny_tokenizer())


def expected(white: WhiteBoxModel, generation: Generation) -> dict[str, float]:
    """The thinking as if it stood in the prompt."""
    assert generation.anchor is not None
    at, ids = generation.thinking, generation.response_token_ids
    found: dict[str, float] = reference.full_sequence_scores(
        white.model, (*generation.prompt_token_ids, *ids[:at]), ids[at:], generation.anchor.index - at
    )
    return found


class TestMarks:
    @pytest.mark.parametrize("family", MARKS)
    def test_of_every_family(self, white: WhiteBoxModel, family: str) -> None:
        begin, end = MARKS[family]
        found = white.read(ASKED, f"{begin}Hm.{end}{SAID}")
        assert found.text[found.spoken :] == SAID
        assert found.content == SAID.strip()

    def test_as_special_tokens(self) -> None:
        special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]")
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(special=special))
        ids = [3, *white.tokenizer("Hm.")["input_ids"], 4, *white.tokenizer("Paris.")["input_ids"]]
        found = white.read(ASKED, ids)
        assert (found.thinking, found.content) == (5, "Paris.")

    def test_opened_by_the_template(self) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=OPENING))
        assert white.read(ASKED, "Hm.</think>Paris.").content == "Paris."
        assert white.read(ASKED, "Hm.").content == ""

    @pytest.mark.parametrize("answer", ["Paris.", "Paris.</think>Lyon.", "Paris <think>hm</think>", ""])
    def test_an_answer_without_is_whole(self, white: WhiteBoxModel, answer: str) -> None:
        found = white.read(ASKED, answer)
        assert (found.thinking, found.content) == (0, answer)

    def test_what_is_not_closed_goes_on(self, white: WhiteBoxModel) -> None:
        found = white.read(ASKED, "<think>Paris, or")
        assert (found.thinking, found.content) == (len(found.response_token_ids), "")

    def test_nothing_is_called_in_it(self, white: WhiteBoxModel) -> None:
        call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
        tools = [{"name": "add"}]
        assert white.read(ASKED, f"<think>{call}</think>No.", tools=tools).tool_calls == ()
        found = white.read(ASKED, f"<think>{call}</think>Yes. {call}", tools=tools)
        assert len(found.tool_calls) == 1
        assert found.content == "Yes."


class TestScores:
    @pytest.mark.parametrize("answer", [THOUGHT + SAID, SAID])
    def test_are_of_the_answer_alone(self, white: WhiteBoxModel, answer: str) -> None:
        generation = white.read(ASKED, answer)
        score = HybridGrad()(white, generation)
        assert dict(score.scores) == pytest.approx(expected(white, generation), rel=1e-9)
        assert len(score.token_logprobs) == len(SAID)

    def test_so_they_are_where_what_was_kept_is_used(self) -> None:
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=OPENING))
        live = white.stream(ASKED, begin=white.tokenizer("Hm.</think>")["input_ids"], max_new_tokens=23)
        live.wait(lambda: False)
        generation = live.beginning(23)
        assert generation.thinking == len("Hm.</think>")
        assert dict(HybridGrad()(white, generation).scores) == pytest.approx(expected(white, generation), rel=1e-4)

    @pytest.mark.parametrize("scorer", [HybridGrad(), Likelihood(), Cascade(band=(0.0, 1e9))])
    def test_of_every_scorer(self, white: WhiteBoxModel, scorer: Any) -> None:
        generation = white.read(ASKED, THOUGHT + SAID)
        nll = expected(white, generation)["sequence_nll"]
        assert scorer(white, generation).scores["sequence_nll"] == pytest.approx(nll, rel=1e-9)

    def test_counted_is_the_whole(self, white: WhiteBoxModel) -> None:
        generation = white.read(ASKED, THOUGHT + SAID)
        score = SemGrad(thinking="counted")(white, generation)
        assert len(score.token_logprobs) == len(THOUGHT + SAID)
        whole = reference.full_sequence_scores(
            white.model, generation.prompt_token_ids, generation.response_token_ids, generation.anchor.index
        )
        assert score.scores["semgrad"] == pytest.approx(whole["semgrad"], rel=1e-9)

    @pytest.mark.parametrize("scorer", [HybridGrad(thinking="apart"), Likelihood(thinking="apart")])
    def test_apart_has_both(self, white: WhiteBoxModel, scorer: Any) -> None:
        generation = white.read(ASKED, THOUGHT + SAID)
        scores = scorer(white, generation).scores
        whole = Likelihood(thinking="counted")(white, generation).scores["sequence_nll"]
        assert scores["sequence_nll"] + scores["thinking_sequence_nll"] == pytest.approx(whole, rel=1e-9)

    def test_thinking_alone_is_unscorable(self, white: WhiteBoxModel) -> None:
        score = HybridGrad()(white, white.read(ASKED, "<think>Paris, or"))
        assert (score.status, score.reason) == ("unscorable", "the answer has nothing but its thinking")

    def test_nothing_visible_behind_it_is_unscorable(self, white: WhiteBoxModel) -> None:
        assert HybridGrad()(white, white.read(ASKED, THOUGHT + " ...")).status == "unscorable"

    def test_beginnings(self, white: WhiteBoxModel) -> None:
        found = score_beginnings(white, HybridGrad(), white.read(ASKED, THOUGHT + SAID))
        assert [length for length, _ in found] == [len(THOUGHT + " Paris. "), len(THOUGHT + SAID)]
        whole = white.read(ASKED, THOUGHT + SAID)
        assert dict(found[-1][1].scores) == pytest.approx(expected(white, whole), rel=1e-9)

    def test_the_usual_identity_says_nothing_of_it(self) -> None:
        assert "thinking" not in HybridGrad().identity.settings
        assert HybridGrad(thinking="counted").identity != HybridGrad().identity
        with pytest.raises(ConfigurationError, match="thinking"):
            HybridGrad(thinking="ignored")  # type: ignore[arg-type]


class TestGuards:
    def test_no_thought_is_let_through(self, white: WhiteBoxModel) -> None:
        outcome = Guard(white, policy=Accept()).review(ASKED, THOUGHT + SAID)
        assert outcome.text == SAID.strip()

    def test_nor_one_that_has_not_ended(self, white: WhiteBoxModel) -> None:
        outcome = Guard(white, policy=Accept()).review(ASKED, "<think>Paris is the answer")
        assert (outcome.text, outcome.decision.rule) == (None, "on_unscorable")

    def test_a_stream_begins_behind_it(self) -> None:
        from hallucination_guard.testing import ScriptedModel, ScriptedScorer

        class Thinking(ScriptedModel):
            def _generation(self, prompt: Any, text: str, *rest: Any) -> Generation:
                from dataclasses import replace

                made = super()._generation(prompt, text, *rest)
                end = text.find("</think>")
                stop = len(text) if end < 0 else end + len("</think>")
                return replace(made, thinking=stop, spoken=stop)

        sink = MemorySink()
        model = Thinking("<think>Hm. Well. Paris?</think>Paris. It is old.")
        events = list(Guard(model, policy=Accept(), scorer=ScriptedScorer(0.1), audit=sink).stream(ASKED))
        assert [each.text for each in events] == ["Paris. ", "It is old.", "Paris. It is old."]  # type: ignore[union-attr]
        assert [each.part is None for each in sink.records] == [False, True]

    def test_a_record_counts_what_was_scored(self, white: WhiteBoxModel, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "audit.jsonl")
        outcome = Guard(white, policy=Accept(), audit=log).review(ASKED, THOUGHT + SAID)
        log.close()
        label_all(tmp_path / "audit.jsonl", [Label(id=outcome.audit_ids[0], correct=True)])
        [row] = labelled_answers(tmp_path / "audit.jsonl")
        assert row.length == len(SAID)
