"""The gradient runs exactly where the cheap score says, and one number orders all answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hallucination_guard import Guard
from hallucination_guard.calibration import fit_calibration
from hallucination_guard.errors import AnchorError, CalibrationError, ConfigurationError, MissingExtra
from hallucination_guard.model import WhiteBoxModel
from hallucination_guard.scoring import (
    Cascade,
    CascadeFit,
    ExGrad,
    HybridGrad,
    Isotropic,
    Likelihood,
    ParaGrad,
    SemGrad,
    fit_cascade,
    gradients,
)
from hallucination_guard.scoring.cascade import _number
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard.values import Score, ScorerIdentity
from hallucination_guard_policies import AbstainBelow

QUESTION = "What is the capital of France?"
ANSWERS = ["no", "Lyon?", "Paris, on the Seine", "A", "Marseille or Nice"]
LIKELIHOODS = {"mean_token_entropy", "max_token_entropy", "sequence_nll", "mean_nll", "min_token_logprob"}
ALWAYS = (0.0, math.inf)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of examples in each backward that was run."""
    run: list[int] = []
    real = torch.autograd.grad

    def grad(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        run.append(outputs.shape[0])
        return real(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return run


@pytest.fixture
def readings(tiny: WhiteBoxModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every pass over a whole prompt and answer that was needed for scoring."""
    run: list[int] = []
    real = tiny.trace_ids

    def trace_ids(*args: Any) -> Any:
        run.append(1)
        return real(*args)

    monkeypatch.setattr(tiny, "trace_ids", trace_ids)
    return run


def read(model: WhiteBoxModel) -> list[Any]:
    return [model.read(f"Which city is {answer}?", answer=answer) for answer in ANSWERS]


def around(values: list[float], *ranks: int) -> tuple[float, float]:
    """A band that holds exactly the values of these ranks."""
    ordered = [0.0, *sorted(values), 2 * max(values)]
    first, last = min(ranks) + 1, max(ranks) + 1
    return (ordered[first - 1] + ordered[first]) / 2, (ordered[last] + ordered[last + 1]) / 2


class TestInAndOutOfTheBand:
    @pytest.fixture
    def likely(self, tiny: WhiteBoxModel) -> list[Score]:
        return Likelihood().batch(tiny, read(tiny))

    @pytest.mark.parametrize("cheap", ["mean_token_entropy", "max_token_entropy", "sequence_nll", "mean_nll"])
    @pytest.mark.parametrize("ranks", [(0,), (1, 2), (1, 2, 3), (4,)], ids=str)
    def test_the_gradient_runs_exactly_inside(
        self, cheap: str, ranks: tuple[int, ...], tiny: WhiteBoxModel, likely: list[Score], backwards: list[int]
    ) -> None:
        values = [score.scores[cheap] for score in likely]
        low, high = band = around(values, *ranks)
        cascade = Cascade(cheap=cheap, band=band)
        alone = [cascade(tiny, each) for each in read(tiny)]
        assert backwards == [1] * len(ranks)
        together = cascade.batch(tiny, read(tiny))
        for found in (alone, together):
            ran = [score.anchor is not None for score in found]
            assert ran == [low <= value <= high for value in values]
            assert ["hybridgrad" in score.scores for score in found] == ran

    def test_numbers_inside_are_those_of_the_gradient(self, tiny: WhiteBoxModel) -> None:
        for score, own in zip(
            Cascade(band=ALWAYS).batch(tiny, read(tiny)), HybridGrad().batch(tiny, read(tiny)), strict=True
        ):
            assert {name: value for name, value in score.scores.items() if name != "cascade"} == dict(own.scores)

    @pytest.mark.parametrize("ranks", [(2,), (0, 1, 2)], ids=["few: forward once more", "most: one graph"])
    def test_numbers_inside_are_those_of_the_gradient_beside_answers_outside(
        self,
        ranks: tuple[int, ...],
        tiny: WhiteBoxModel,
        likely: list[Score],
        backwards: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(gradients, "ON_A_CPU", None)  # all in one pass
        band = around([score.scores["sequence_nll"] for score in likely], *ranks)
        found = Cascade(cheap="sequence_nll", band=band).batch(tiny, read(tiny))
        assert backwards == [1 if len(ranks) == 1 else len(ANSWERS)]
        own = HybridGrad().batch(tiny, read(tiny))
        for score, expected in zip(found, own, strict=True):
            if score.anchor is not None:
                numbers = {name: value for name, value in score.scores.items() if name != "cascade"}
                assert numbers == pytest.approx(dict(expected.scores), rel=1e-5)

    def test_outside_there_are_likelihoods_only(self, tiny: WhiteBoxModel, likely: list[Score]) -> None:
        for band in ((0.0, 1e-9), (1e9, 1e9)):
            for score, own in zip(Cascade(band=band).batch(tiny, read(tiny)), likely, strict=True):
                assert score.anchor is None
                assert set(score.scores) == LIKELIHOODS | {"cascade"}
                assert {name: score.scores[name] for name in LIKELIHOODS} == pytest.approx(dict(own.scores), rel=1e-5)

    @pytest.mark.parametrize("gradient", [SemGrad(reduction="mean"), ParaGrad(), ExGrad(), HybridGrad()], ids=repr)
    def test_the_number_is_about_the_gradient_that_was_given(self, gradient: Any, tiny: WhiteBoxModel) -> None:
        generation = tiny.read(QUESTION, answer="Paris")
        score = Cascade(band=ALWAYS, gradient=gradient, scale=0.5)(tiny, generation)
        own = gradient(tiny, generation).scores[gradient.primary]
        assert score.scores["cascade"] == pytest.approx(1 + own / (own + 0.5), rel=1e-9)

    @pytest.mark.parametrize("band", [ALWAYS, (0.0, 1e-9)], ids=["inside", "outside"])
    def test_what_was_kept_of_the_generation_is_used_and_handed_back(
        self, band: tuple[float, float], tiny: WhiteBoxModel, readings: list[int]
    ) -> None:
        generation = tiny.generate(QUESTION, max_new_tokens=6)
        Cascade(band=band)(tiny, generation)
        assert readings == []
        assert generation._trace.take() is None

    def test_few_inside_a_batch_need_no_second_reading_either(
        self, tiny: WhiteBoxModel, readings: list[int], backwards: list[int]
    ) -> None:
        prompts = [QUESTION, "Who?", "Name a red fruit."]
        values = [each.scores["mean_nll"] for each in Likelihood().batch(tiny, tiny.generate(prompts))]
        Cascade(cheap="mean_nll", band=around(values, 1)).batch(tiny, tiny.generate(prompts))
        assert (readings, backwards) == ([], [1])

    def test_empty_answers_are_unscorable(self, tiny: WhiteBoxModel, backwards: list[int]) -> None:
        found = Cascade(band=ALWAYS).batch(tiny, [tiny.read(QUESTION, answer=each) for each in ("", " \n", "Paris")])
        assert [score.status for score in found] == ["unscorable", "unscorable", "scored"]
        assert backwards == [1]

    @pytest.mark.parametrize("band", [ALWAYS, (0.0, 1e-9)], ids=["inside", "outside"])
    def test_without_an_anchor_it_is_refused_whatever_the_cheap_score(self, band: tuple[float, float]) -> None:
        base = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None))
        with pytest.raises(AnchorError):
            Cascade(band=band)(base, base.read("The capital of France is", answer=" Paris"))


SCORES = st.floats(0.0, 1e6)
ENDS = st.floats(0.0, 1e6)


@st.composite
def bands(draw: Callable[..., Any]) -> tuple[float, float]:
    low, high = sorted((draw(ENDS), draw(ENDS)))
    return low, draw(st.sampled_from((high, math.inf)))


class TestOneNumber:
    @staticmethod
    def of(cheap: float, gradient: float, band: tuple[float, float], scale: float = 1e-3) -> float:
        return _number(cheap, gradient if band[0] <= cheap <= band[1] else None, band, scale)

    @given(cheap=SCORES, gradient=st.floats(0.0, 1e300), band=bands(), scale=st.floats(1e-12, 1e6))
    def test_says_which_stage_it_is_of(
        self, cheap: float, gradient: float, band: tuple[float, float], scale: float
    ) -> None:
        number = self.of(cheap, gradient, band, scale)
        assert math.isfinite(number)
        assert min(int(number), 2) == (0 if cheap < band[0] else 1 if cheap <= band[1] else 2)

    @given(cheaps=st.tuples(SCORES, SCORES), gradients=st.tuples(SCORES, SCORES), band=bands())
    def test_rises_with_the_cheap_score_outside_the_band_and_with_the_gradient_inside(
        self, cheaps: tuple[float, float], gradients: tuple[float, float], band: tuple[float, float]
    ) -> None:
        one, other = (self.of(c, g, band) for c, g in zip(cheaps, gradients, strict=True))
        inside = [band[0] <= each <= band[1] for each in cheaps]
        below = gradients[0] <= gradients[1] if all(inside) else cheaps[0] <= cheaps[1]
        assert one <= other if below else one >= other

    def test_an_entropy_rounded_below_nil_is_nil(self) -> None:
        assert self.of(-1e-9, 0.0, (1.0, 2.0)) == 0.0

    def test_the_scale_is_the_gradient_that_becomes_one_and_a_half(self) -> None:
        assert self.of(1.0, 0.25, ALWAYS, 0.25) == 1.5


class TestItself:
    def test_identity_names_everything_that_changes_a_number(self) -> None:
        others = [
            Cascade(band=(1, 2)),
            Cascade(band=(1, 3)),
            Cascade(band=(0.5, 2)),
            Cascade(band=(1, 2), cheap="mean_nll"),
            Cascade(band=(1, 2), scale=1.0),
            Cascade(band=(1, 2), gradient=SemGrad()),
            Cascade(band=(1, 2), gradient=HybridGrad(reduction="mean")),
        ]
        assert all(one.identity != other.identity for one, other in combinations(others, 2))

    def test_whole_numbers_are_the_same_band(self) -> None:
        assert Cascade(band=(1, 2)).identity == Cascade(band=(1.0, 2.0)).identity

    @pytest.mark.parametrize(
        "wrong",
        [
            {"cheap": "min_token_logprob"},
            {"cheap": "semgrad"},
            {"gradient": Isotropic()},
            {"gradient": "hybridgrad"},
            {"band": (2.0, 1.0)},
            {"band": (-1.0, 1.0)},
            {"band": (0.0, math.nan)},
            {"band": (math.inf, math.inf)},
            {"band": (1.0, 2.0, 3.0)},
            {"band": None},
            {"scale": 0.0},
            {"scale": math.inf},
        ],
        ids=str,
    )
    def test_nonsense_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            Cascade(**{"band": (1.0, 2.0), **wrong})


class TestInAGuard:
    def test_decides_by_the_one_number_in_all_three_ranges(self, tiny: WhiteBoxModel) -> None:
        entropy = Likelihood()(tiny, tiny.generate(QUESTION, max_new_tokens=6)).scores["mean_token_entropy"]
        found = {}
        for name, band in {
            "below": (entropy * 2, entropy * 3),
            "inside": (entropy / 2, entropy * 2),
            "above": (entropy / 3, entropy / 2),
        }.items():
            guard = Guard(
                tiny,
                scorer=Cascade(band=band, scale=1e9),  # every gradient is small against that
                policy=AbstainBelow(score="cascade", limit=1.5),
                generation={"max_new_tokens": 6},
            )
            outcome = guard(QUESTION)
            found[name] = (outcome.decision.action, int(outcome.verdict.score.scores["cascade"]))
        assert found["below"] == ("accept", 0)
        assert found["inside"] == ("accept", 1)
        assert found["above"][0] == "abstain" and found["above"][1] >= 2

    def test_a_gradient_that_was_not_taken_lets_nothing_through(self, tiny: WhiteBoxModel) -> None:
        policy = AbstainBelow(score="hybridgrad", limit=1e9)
        outcome = Guard(tiny, scorer=Cascade(band=(1e6, 1e6)), policy=policy)(QUESTION, max_new_tokens=6)
        assert (outcome.decision.action, outcome.text) == ("abstain", None)

    def test_can_be_calibrated(self, tiny: WhiteBoxModel) -> None:
        cascade = Cascade(cheap="sequence_nll", band=(20.0, 60.0))
        answers = [tiny.read(QUESTION, answer="a" * length) for length in range(1, 25)]
        scores = cascade.batch(tiny, answers)
        calibration = fit_calibration(scores, [at < 12 for at in range(24)], generations=answers)
        confidences = [calibration.confidence(score) for score in sorted(scores, key=lambda s: s.scores["cascade"])]
        assert calibration.score == "cascade"
        assert confidences == sorted(confidences, reverse=True)


SETTINGS = {"layers": "official", "reduction": "mean", "weighting": "entropy"}
SCORER = ScorerIdentity(name="hybridgrad", version="1", settings=SETTINGS)


def scored(cheap: float, gradient: float, scorer: ScorerIdentity = SCORER) -> Score:
    return Score(
        status="scored", scorer=scorer, scores={"mean_token_entropy": cheap, "hybridgrad": gradient}, anchor=None
    )


def labelled(seed: int, n: int = 40, *, ties: bool = False) -> tuple[list[Score], list[bool]]:
    """Answers on which the gradient knows more than the cheap score does."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(n, generator=generator) < 0.5
    cheap = wrong + 2.0 * torch.rand(n, generator=generator)
    gradient = wrong + 1.2 * torch.rand(n, generator=generator)
    if ties:
        cheap, gradient = cheap.mul(4).round(), gradient.mul(4).round()
    scores = [scored(*pair) for pair in zip(cheap.tolist(), gradient.tolist(), strict=True)]
    return scores, [not each for each in wrong.tolist()]


def middle_unknown() -> tuple[list[Score], list[bool]]:
    """Right below 1, wrong above 2; between them the cheap score puts every pair in the wrong order."""
    low = [(scored(0.5 + at / 100, 0.1), True) for at in range(15)]
    high = [(scored(2.5 + at / 100, 0.9), False) for at in range(15)]
    middle = [(scored(1.0 + at / 10, 0.2 if at >= 5 else 0.8), at >= 5) for at in range(10)]
    scores, correct = zip(*(low + middle + high), strict=True)
    return list(scores), list(correct)


def brute_force(scores: list[Score], correct: list[bool], keep: float) -> int:
    """The fewest answers in a band that keeps enough, all bands between distinct cheap scores tried one by one."""
    from sklearn.metrics import roc_auc_score

    cheap = [each.scores["mean_token_entropy"] for each in scores]
    gradient = [each.scores["hybridgrad"] for each in scores]
    wrong = [not each for each in correct]
    ordered = sorted(set(cheap))
    cuts = [0.0, *((a + b) / 2 for a, b in pairwise(ordered)), 1e9]
    need = roc_auc_score(wrong, gradient) - keep - 1e-12
    best = len(scores)
    for low, high in [*combinations(cuts, 2), *((cut, cut) for cut in cuts[1:-1])]:
        inside = [low <= each <= high for each in cheap]
        if sum(inside) < best:
            numbers = [
                (1.0, g) if within else (0.0 if c < low else 2.0, c)
                for c, g, within in zip(cheap, gradient, inside, strict=True)
            ]
            ranks = {number: rank for rank, number in enumerate(sorted(set(numbers)))}
            if roc_auc_score(wrong, [ranks[number] for number in numbers]) >= need:
                best = sum(inside)
    return best


class TestFit:
    def test_finds_the_band_in_which_the_cheap_score_knows_nothing(self) -> None:
        fit = fit_cascade(*middle_unknown(), keep=0.0)
        assert 0.64 < fit.band[0] < 1.0 and 1.9 < fit.band[1] < 2.5
        assert (fit.n, fit.share) == (40, 0.25)
        assert fit.auroc_cheap < fit.auroc_cascade == fit.auroc_gradient == 1.0
        assert (fit.cost, fit.scale) == (0.0, 0.5)

    def test_a_cascade_can_be_better_than_the_gradient_alone(self) -> None:
        scores, correct = middle_unknown()
        blind = [
            each if 1.0 <= each.scores["mean_token_entropy"] < 2.0 else scored(each.scores["mean_token_entropy"], 0.5)
            for each in scores
        ]
        assert fit_cascade(blind, correct, keep=0.0).cost < 0

    def test_a_cheap_score_that_is_as_good_needs_no_gradient(self) -> None:
        fit = fit_cascade([scored(float(at), 1.0) for at in range(40)], [at < 20 for at in range(40)])
        assert (fit.share, fit.auroc_cascade, fit.auroc_cheap) == (0.0, 1.0, 1.0)
        assert fit.scorer().band[0] == fit.scorer().band[1]

    def test_no_end_lies_between_cheap_scores_that_differ_by_rounding(self) -> None:
        scores = [scored(1.0 - at * 1e-8, float(at)) for at in range(20)] + [scored(2.0, 30.0)]
        assert fit_cascade(scores, [at < 10 for at in range(21)], keep=0.0).band == (0.0, 1.5)

    def test_cheap_scores_that_are_all_the_same_always_ask(self) -> None:
        fit = fit_cascade([scored(1.0, float(at)) for at in range(20)], [at < 10 for at in range(20)])
        assert (fit.band, fit.share, fit.auroc_cascade) == (ALWAYS, 1.0, 1.0)

    @pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
    @pytest.mark.parametrize("keep", [0.0, 0.005, 0.03, 0.2])
    @pytest.mark.parametrize("seed", range(4))
    def test_runs_as_seldom_as_any_band_that_keeps_enough(self, seed: int, keep: float, ties: bool) -> None:
        scores, correct = labelled(seed, ties=ties)
        fit = fit_cascade(scores, correct, keep=keep)
        assert fit.cost <= keep + 1e-9
        assert round(fit.share * fit.n) == brute_force(scores, correct, keep)

    def test_the_report_is_what_its_scorers_numbers_give(self) -> None:
        from sklearn.metrics import roc_auc_score

        scores, correct = labelled(7)
        fit = fit_cascade(scores, correct)
        low, high = fit.band
        numbers = []
        for each in scores:
            cheap, gradient = each.scores["mean_token_entropy"], each.scores["hybridgrad"]
            numbers.append(_number(cheap, gradient if low <= cheap <= high else None, fit.band, fit.scale))
        assert fit.auroc_cascade == roc_auc_score([not each for each in correct], numbers)
        assert 0 < fit.share < 1

    def test_its_scorer_has_the_gradient_that_it_was_fitted_with(self) -> None:
        fit = fit_cascade(*labelled(1))
        assert fit.scorer() == Cascade(
            band=fit.band, scale=fit.scale, gradient=HybridGrad(layers="official", reduction="mean")
        )

    def test_real_scores_go_in_and_a_working_scorer_comes_out(self, tiny: WhiteBoxModel) -> None:
        generations = [tiny.read(QUESTION, answer=chr(97 + at) * (1 + at % 7)) for at in range(24)]
        scores = HybridGrad().batch(tiny, generations)
        fit = fit_cascade(scores, [at % 7 < 3 for at in range(24)], cheap="mean_nll", gradient="semgrad", keep=0.0)
        ran = [score.anchor is not None for score in fit.scorer().batch(tiny, generations)]
        assert sum(ran) / len(ran) == fit.share

    def test_unscorable_answers_are_left_out(self) -> None:
        scores, correct = labelled(2)
        empty = Score.unscorable("the answer is empty", scorer=SCORER)
        assert fit_cascade([empty, *scores], [False, *correct]) == fit_cascade(scores, correct)

    @pytest.mark.parametrize(
        "pick",
        [
            lambda scores, correct: (scores[:19], correct[:19]),
            lambda scores, correct: (scores, [True] * len(scores)),
            lambda scores, correct: (scores, [False] * len(scores)),
        ],
        ids=["too few", "only right", "only wrong"],
    )
    def test_what_can_not_be_fitted_on_is_refused(self, pick: Callable[..., Any]) -> None:
        with pytest.raises(CalibrationError, match="cannot be fitted on"):
            fit_cascade(*pick(*labelled(3)))

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"cheap": "min_token_logprob"}, ConfigurationError),
            ({"gradient": "isotropic"}, ConfigurationError),
            ({"keep": -0.1}, ConfigurationError),
            ({"keep": math.nan}, ConfigurationError),
            ({"cheap": "mean_nll"}, CalibrationError),
            ({"gradient": "semgrad"}, CalibrationError),
        ],
        ids=str,
    )
    def test_nonsense_is_refused(self, changes: dict[str, Any], error: type[Exception]) -> None:
        with pytest.raises(error):
            fit_cascade(*labelled(3), **changes)

    @pytest.mark.parametrize(
        "stranger",
        [
            ScorerIdentity(name="likelihood", version="1"),
            ScorerIdentity(name="hybridgrad", version="0", settings=SETTINGS),
            ScorerIdentity(name="hybridgrad", version="1", settings={"parameters": "all"}),
        ],
        ids=["no gradient", "other arithmetic", "unknown setting"],
    )
    def test_scores_of_no_gradient_scorer_are_refused(self, stranger: ScorerIdentity) -> None:
        scores, correct = labelled(3)
        with pytest.raises(CalibrationError, match="no gradient scorer"):
            fit_cascade([scored(*each.scores.values(), stranger) for each in scores], correct)

    def test_scores_of_several_scorers_are_refused(self) -> None:
        scores, correct = labelled(3)
        other = ScorerIdentity(name="hybridgrad", version="1")
        with pytest.raises(CalibrationError, match="different scorers"):
            fit_cascade([*scores[1:], scored(1.0, 1.0, other)], correct)

    def test_without_scikit_learn_it_says_what_to_install(self, no_sklearn: None) -> None:
        with pytest.raises(MissingExtra, match="calibrate"):
            fit_cascade(*labelled(3))

    @pytest.fixture
    def no_sklearn(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
        yield

    def test_the_report_can_not_be_changed(self) -> None:
        fit = fit_cascade(*labelled(1))
        assert isinstance(fit, CascadeFit)
        with pytest.raises(AttributeError):
            fit.keep = 1.0  # type: ignore[misc]
        with pytest.raises(TypeError):
            fit.settings["layers"] = "paper"  # type: ignore[index]
