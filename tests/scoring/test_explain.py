"""The page says what was measured, to every reader, and nothing in it can act."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from hallucination_guard import WhiteBoxModel
from hallucination_guard.errors import ScoringError
from hallucination_guard.scoring import Explanation, GradientSettings, HybridGrad, Token, explain
from hallucination_guard.testing import CHATML, tiny_model, tiny_tokenizer

ANSWER = "It was Ada. She wrote it!\nOr <b>not</b>?"
SCRIPT = "Sure. <script>alert('x')</script> & \"so\" on. {style}"


class Reader(HTMLParser):
    """What a browser would see: elements, their attributes, the text of those with ``class="text"``."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self._inside = False
        self._raised = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if ("class", "text") in attrs:
            self.texts.append("")
            self._inside = True
        self._raised = self._raised or tag == "sup"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "div":
            self._inside = False
        self._raised = self._raised and tag != "sup"

    def handle_data(self, data: str) -> None:
        if self._inside and not self._raised:
            self.texts[-1] += data


@pytest.fixture(scope="module")
def explanation(tiny: WhiteBoxModel) -> Explanation:
    return explain(tiny, tiny.read("Who wrote <i>it</i>?", answer=ANSWER))


class TestTheValue:
    def test_has_the_score_that_the_scorer_gives(self, tiny: WhiteBoxModel, explanation: Explanation) -> None:
        score = HybridGrad()(tiny, tiny.read("Who wrote <i>it</i>?", answer=ANSWER))
        assert dict(explanation.score.scores) == pytest.approx(dict(score.scores))

    def test_has_every_token_in_order(self, explanation: Explanation) -> None:
        assert "".join(token.text for token in explanation.tokens) == ANSWER
        assert [token.entropy for token in explanation.tokens] == list(explanation.score.token_entropies)
        assert [token.logprob for token in explanation.tokens] == list(explanation.score.token_logprobs)

    def test_has_parts_that_add_up_to_one(self, explanation: Explanation) -> None:
        assert len(explanation.spans) == 3
        assert sum(map(explanation.part, explanation.spans)) == pytest.approx(1, rel=1e-4)

    def test_calls_no_single_sentence_shaky(self, tiny: WhiteBoxModel) -> None:
        assert explain(tiny, tiny.read("Who?", answer="Ada")).shaky == ()

    def test_calls_some_but_not_all_sentences_shaky(self, explanation: Explanation) -> None:
        assert 0 < len(explanation.shaky) < len(explanation.spans)

    def test_is_measured_under_the_settings_given(self, tiny: WhiteBoxModel, explanation: Explanation) -> None:
        generation = tiny.read("Who wrote <i>it</i>?", answer=ANSWER)
        mean = explain(tiny, generation, GradientSettings(reduction="mean"))
        for one, other in zip(mean.spans, explanation.spans, strict=True):
            assert one.share * len(explanation.tokens) == pytest.approx(other.share, rel=1e-4)
        for one, other in zip(mean.words, explanation.words, strict=True):
            assert one.sensitivity * len(explanation.tokens) == pytest.approx(other.sensitivity, rel=1e-4)

    def test_does_not_exist_for_an_empty_answer(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(ScoringError, match="the answer is empty"):
            explain(tiny, tiny.read("Who?", answer=""))

    def test_has_no_words_where_the_template_rewrites_the_question(self) -> None:
        shouting = CHATML.replace("message['content']", "message['content'] | upper")
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=shouting))
        found = explain(white, white.read("Who?", answer="Ada"))
        assert found.words == ()
        assert "rewrote" in found.to_html()

    @pytest.mark.parametrize(
        ("entropy", "doubt"),
        [(0.0, "none"), (0.5, "some"), (1.49, "some"), (1.5, "much"), (3.0, "most"), (9.0, "most")],
    )
    def test_puts_a_tokens_doubt_in_words(self, entropy: float, doubt: str) -> None:
        assert Token(text="a", entropy=entropy, logprob=-1.0).doubt == doubt


class TestThePage:
    def test_shows_question_and_answer_letter_by_letter(self, explanation: Explanation) -> None:
        assert Reader(explanation.to_html()).texts == ["Who wrote <i>it</i>?", ANSWER]

    def test_is_well_formed(self, explanation: Explanation) -> None:
        assert Reader(explanation.to_html()).open == []

    def test_lets_no_text_become_markup(self, tiny: WhiteBoxModel) -> None:
        white = WhiteBoxModel(tiny.model, tiny.tokenizer, name="<script>name</script>")
        page = explain(white, white.read(SCRIPT, answer=SCRIPT)).to_html(note="<script>note</script>")
        reader = Reader(page)
        assert "script" not in reader.tags
        assert reader.texts == [SCRIPT, SCRIPT]
        assert "&lt;script&gt;note" in page
        assert "&lt;script&gt;name" in page

    def test_needs_nothing_else(self, explanation: Explanation) -> None:
        page = explanation.to_html()
        reader = Reader(page)
        assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
        assert not [name for name, _ in reader.attributes if name in ("src", "href") or name.startswith("on")]
        assert not re.search(r"https?:|url\(|@import", page)
        assert "default-src 'none'" in page

    def test_says_in_words_what_its_colours_say(self, explanation: Explanation) -> None:
        page = explanation.to_html()
        for number, span in enumerate(explanation.spans, 1):
            shaky = ", shaky" if span in explanation.shaky else ""
            assert f"sentence {number}: {explanation.part(span):.0%} of SemGrad{shaky}" in page
        assert page.count(" ⚠</sup>") == len(explanation.shaky)

    def test_has_every_score(self, explanation: Explanation) -> None:
        page = explanation.to_html()
        for name, value in explanation.score.scores.items():
            assert f">{name}</td>" in page
            assert f">{value:.4g}</td>" in page

    def test_has_a_note_where_there_is_one(self, explanation: Explanation) -> None:
        assert '<p class="note">abstain &lt; 0.5</p>' in explanation.to_html(note="abstain < 0.5")
        assert 'class="note"' not in explanation.to_html()


class TestOfAScore:
    def test_the_page_is_that_of_its_generation(self, tiny: WhiteBoxModel) -> None:
        generation = tiny.read("Who wrote <i>it</i>?", answer=ANSWER)
        score = HybridGrad(reduction="mean")(tiny, generation)
        page = explain(tiny, generation, score=score).to_html()
        assert Reader(page).texts == ["Who wrote <i>it</i>?", ANSWER]
        assert f"{score.scores['semgrad']:.4g}" in page

    def test_another_answer_is_refused(self, tiny: WhiteBoxModel) -> None:
        score = HybridGrad()(tiny, tiny.read("Who wrote <i>it</i>?", answer=ANSWER))
        with pytest.raises(ScoringError, match="does not belong"):
            explain(tiny, tiny.read("Who wrote <i>it</i>?", answer="Me."), score=score).to_html()
