"""A profile: t* from a file, bound to its model, its template and the way its prompts end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hallucination_guard import HybridGrad, SemGrad, WhiteBoxModel
from hallucination_guard.calibration import fit_calibration
from hallucination_guard.errors import AnchorError, CalibrationMismatch, InputError
from hallucination_guard.model import Place, Profile
from hallucination_guard.model.profile import template_under
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard.values import Score

END = "<|im_end|>\n<|im_start|>assistant\n"
PROMPT = "Who wrote Hamlet?"


def profile_of(model: WhiteBoxModel, anchor: int = -1, **changes: Any) -> Profile:
    tail = tuple(model.tokenizer(END, add_special_tokens=False)["input_ids"])
    values: dict[str, Any] = {
        "fingerprint": model.identity.fingerprint,
        "dtype": model.identity.dtype,
        "template": model.identity.template,
        "anchor": anchor,
        "tail": tail[anchor:],
        "view": "centred",
        "layers": (4, 5),
        "table": (Place(index=-1, raw=0.0, centred=0.5, nearest=1.0),),
        "prompt": "{query}",
        "queries": 2,
        "prompts": 4,
        "data": "d",
    }
    return Profile(**{**values, **changes})


def loaded(profile: Any, **model: Any) -> WhiteBoxModel:
    return WhiteBoxModel(tiny_model(**model), tiny_tokenizer(), profile=profile, self_test=False)


class TestAModelWithAProfile:
    @pytest.mark.parametrize("index", [-1, -2, -7])
    def test_takes_its_anchor_from_there(self, tiny: WhiteBoxModel, index: int) -> None:
        model = loaded(profile_of(tiny, index))
        generation = model.generate(PROMPT, max_new_tokens=4)
        assert generation.anchor is not None
        assert (generation.anchor.index, generation.anchor.rule) == (index, "profile")
        token = generation.prompt_token_ids[index]
        assert generation.anchor.token == model.tokenizer.convert_ids_to_tokens(token)

    def test_reads_with_it_as_it_generates_with_it(self, tiny: WhiteBoxModel) -> None:
        model = loaded(profile_of(tiny, -2))
        assert model.read(PROMPT, "Ada").anchor == model.generate(PROMPT, max_new_tokens=2).anchor

    @pytest.mark.parametrize("index", [-1, -3, -11])
    def test_scores_what_it_kept_as_what_it_reads_again(self, tiny: WhiteBoxModel, index: int) -> None:
        model = loaded(profile_of(tiny, index))
        generation = model.generate(PROMPT, max_new_tokens=5)
        kept = HybridGrad()(model, generation).scores
        again = HybridGrad()(model, generation).scores
        assert dict(kept) == pytest.approx(dict(again), rel=1e-3)

    def test_scores_otherwise_than_without(self, tiny: WhiteBoxModel) -> None:
        here, there = (
            SemGrad()(model, model.read(PROMPT, "Ada")).scores["semgrad"] for model in (tiny, loaded(profile_of(tiny)))
        )
        assert here != pytest.approx(there, rel=1e-3)

    def test_scores_as_without_where_the_profile_says_what_the_template_says(self, tiny: WhiteBoxModel) -> None:
        anchor = tiny.read(PROMPT, "Ada").anchor
        assert anchor is not None
        model = loaded(profile_of(tiny, anchor.index))
        here, there = (SemGrad()(each, each.read(PROMPT, "Ada")).scores["semgrad"] for each in (tiny, model))
        assert here == pytest.approx(there, rel=1e-5)

    def test_passes_its_self_test(self, tiny: WhiteBoxModel) -> None:
        assert WhiteBoxModel(tiny_model(), tiny_tokenizer(), profile=profile_of(tiny)).profile is not None

    def test_is_another_model_to_a_calibration(self, tiny: WhiteBoxModel) -> None:
        model = loaded(profile_of(tiny, -2))
        assert model.identity.template == f"{tiny.identity.template}@profile:-2"
        assert model.identity.fingerprint == tiny.identity.fingerprint
        assert template_under(model.identity.template) == tiny.identity.template

    def test_refuses_a_calibration_fitted_without_it_and_takes_one_fitted_with_it(self, tiny: WhiteBoxModel) -> None:
        scorer = HybridGrad().identity
        labels = [at % 3 == 0 for at in range(30)]
        scores = [
            Score(status="scored", scorer=scorer, scores={"hybridgrad": 1.0 + at / 30 if right else 2.0 + at / 30})
            for at, right in enumerate(labels)
        ]
        model, other = loaded(profile_of(tiny, -1)), loaded(profile_of(tiny, -2))
        fitted = {
            each: fit_calibration(scores, labels, generations=[each.read("Who?", answer="me")] * 30)
            for each in (tiny, model, other)
        }
        fitted[model].check(model.identity, scorer)
        for stranger in (tiny, other):
            with pytest.raises(CalibrationMismatch, match="template"):
                fitted[stranger].check(model.identity, scorer)
        with pytest.raises(CalibrationMismatch, match="template"):
            fitted[model].check(tiny.identity, scorer)

    def test_refuses_a_question_that_names_another_anchor(self, tiny: WhiteBoxModel) -> None:
        model = loaded(profile_of(tiny))
        with pytest.raises(InputError, match="names t\\*, and so does the model's profile"):
            model.generate(PROMPT, question="Hamlet")

    def test_refuses_a_prompt_that_ends_otherwise(self, tiny: WhiteBoxModel) -> None:
        profile = profile_of(tiny, -3, tail=(1, 2, 3))
        with pytest.raises(AnchorError, match="was measured on prompts that end with \\[1, 2, 3\\]"):
            loaded(profile).read(PROMPT, "Ada")

    def test_refuses_a_prompt_that_is_too_short(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(AnchorError, match="token -500 of the prompt"):
            loaded(profile_of(tiny, -500, tail=())).read(PROMPT, "Ada")

    def test_needs_no_question_where_there_is_no_template(self) -> None:
        tokenizer = tiny_tokenizer(chat_template=None)
        base = WhiteBoxModel(tiny_model(), tokenizer, self_test=False)
        tail = tuple(tokenizer("\nA:", add_special_tokens=False)["input_ids"])
        profile = profile_of(base, -4, tail=tail)
        model = WhiteBoxModel(tiny_model(), tokenizer, profile=profile, self_test=False)
        anchor = model.read("Q: Who?\nA:", "Ada").anchor
        assert anchor is not None
        assert (anchor.index, anchor.token) == (-4, "?")
        with pytest.raises(AnchorError, match="ends with the token ids"):
            model.read("Who?", "Ada")


class TestAStrangersProfile:
    @pytest.mark.parametrize(
        ("field", "value", "why"),
        [
            ("fingerprint", "x", "model 'x' against"),
            ("dtype", "bfloat16", "dtype 'bfloat16'"),
            ("template", "x", "template 'x'"),
        ],
    )
    def test_is_refused_on_loading(self, tiny: WhiteBoxModel, field: str, value: str, why: str) -> None:
        with pytest.raises(AnchorError, match=f"measured on something else: {why}"):
            loaded(profile_of(tiny, **{field: value}))

    def test_is_that_of_other_weights(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(AnchorError, match="measured on something else: model"):
            loaded(profile_of(tiny), seed=5)


class TestTheFile:
    def test_gives_back_what_was_saved(self, tiny: WhiteBoxModel, tmp_path: Path) -> None:
        profile = profile_of(tiny)
        profile.save(tmp_path / "profile.json")
        assert Profile.load(tmp_path / "profile.json") == profile

    def test_may_be_named_instead_of_the_profile(self, tiny: WhiteBoxModel, tmp_path: Path) -> None:
        profile_of(tiny, -2).save(tmp_path / "profile.json")
        model = loaded(str(tmp_path / "profile.json"))
        assert model.profile is not None
        assert model.profile.anchor == -2

    def test_may_be_named_on_loading_from_a_folder(self, tiny: WhiteBoxModel, tmp_path: Path) -> None:
        tiny_model().save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        plain = WhiteBoxModel.from_pretrained(tmp_path, device_map="cpu", dtype="float32", self_test=False)
        profile_of(plain, -2).save(tmp_path / "profile.json")
        model = WhiteBoxModel.from_pretrained(
            tmp_path, device_map="cpu", dtype="float32", self_test=False, profile=tmp_path / "profile.json"
        )
        anchor = model.read(PROMPT, "Ada").anchor
        assert anchor is not None
        assert anchor.index == -2

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda text: text[:-9],
            lambda text: json.dumps({**json.loads(text), "anchor": 0}),
            lambda text: json.dumps({**json.loads(text), "schema_version": 2}),
            lambda text: json.dumps({**json.loads(text), "more": 1}),
            lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "tail"}),
        ],
    )
    def test_is_refused_when_it_is_not_whole(self, tiny: WhiteBoxModel, tmp_path: Path, spoil: Any) -> None:
        path = tmp_path / "profile.json"
        profile_of(tiny).save(path)
        path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
        with pytest.raises(AnchorError, match="is not valid"):
            Profile.load(path)

    def test_says_so_where_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(AnchorError, match="cannot be read"):
            Profile.load(tmp_path / "none.json")
