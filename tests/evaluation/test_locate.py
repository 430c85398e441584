"""SPS against all pairs one by one, states against the model's own, SemGrad anywhere against the scorer."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hallucination_guard import SemGrad, WhiteBoxModel
from hallucination_guard.errors import ConfigurationError, InputError, ScoringError
from hallucination_guard.evaluation.heatmap import draw
from hallucination_guard.evaluation.locate import _states, locate
from hallucination_guard.evaluation.located import VIEWS, Located, likeness
from hallucination_guard.evaluation.metrics import auroc, spearman
from hallucination_guard.evaluation.paraphrases import Group, read_groups, shipped_groups
from hallucination_guard.evaluation.predict import Predicted, _semgrad_everywhere, predict
from hallucination_guard.testing import tiny_model, tiny_tokenizer
from hallucination_guard.values import Anchor, ModelIdentity

torch.set_num_threads(1)

GROUPS = [
    Group(query="Who wrote Hamlet?", paraphrases=("Name the author of Hamlet.", "Hamlet is by whom?"), answers=("a",)),
    Group(query="What is ice?", paraphrases=("Say what ice is.",), answers=("b",)),
    Group(query="Where do whales live in winter?", paraphrases=("In winter, where are whales?",), answers=("c",)),
]


def random_states(seed: int, owners: list[int], width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = 3 * torch.randn(width, generator=generator)
    return common + torch.randn(len(owners), width, generator=generator)


def by_all_pairs(states: torch.Tensor, owners: list[int]) -> float:
    """S_within − S_across as it is defined: every pair, one by one."""
    within, across = [], []
    for one, other in itertools.combinations(range(len(owners)), 2):
        cosine = float(torch.cosine_similarity(states[one].double(), states[other].double(), dim=0))
        (within if owners[one] == owners[other] else across).append(cosine)
    return math.fsum(within) / len(within) - math.fsum(across) / len(across)


def nearest_one_by_one(states: torch.Tensor, owners: list[int]) -> float:
    hits = 0
    for one in range(len(owners)):
        others = [other for other in range(len(owners)) if other != one]
        likest = max(others, key=lambda other: float(torch.cosine_similarity(states[one], states[other], dim=0)))
        hits += owners[likest] == owners[one]
    return hits / len(owners)


def located(**changes: Any) -> Located:
    """Two layers that count; centred chooses −2, raw −3; −1 speaks the answer, and −4 has not read the question."""
    values: dict[str, Any] = {
        "model": ModelIdentity(name="m", fingerprint="f", dtype="float32", template="t"),
        "positions": (-1, -2, -3, -4),
        "tokens": ("Ċ", "a", "$b_1", "ĊĊ"),
        "shared": (True, True, True, False),
        "layers": range(1, 3),
        "table": {
            "raw": ((9.0, 9.0, 0.0, 0.0), (5.0, 0.1, 0.3, 0.9), (5.0, 0.1, 0.3, 0.9)),
            "centred": ((0.0, 0.0, 9.0, 0.0), (5.0, 0.5, 0.1, 0.9), (5.0, 0.3, 0.5, 0.9)),
            "nearest": ((0.0, 0.0, 0.0, 0.0), (1.0, 0.5, 0.1, 0.9), (1.0, 0.5, 0.5, 0.9)),
        },
        "read": 3,
        "view": "centred",
        "template": Anchor(index=-3, token="$b_1", rule="header"),
        "tail": (7, 8),
        "prompt": "{query}",
        "queries": 2,
        "prompts": 4,
        "data": "d",
    }
    return Located(**{**values, **changes})


class TestLikeness:
    @given(
        seed=st.integers(0, 10_000),
        owners=st.lists(st.integers(0, 3), min_size=3, max_size=12).filter(lambda x: 2 <= len(set(x)) < len(x)),
    )
    @settings(max_examples=60, deadline=None)
    def test_in_sums_of_unit_vectors_is_that_of_all_pairs(self, seed: int, owners: list[int]) -> None:
        states = random_states(seed, owners)
        found = likeness(states, owners)
        centred = states.double() - states.double().mean(dim=0)
        assert found.raw == pytest.approx(by_all_pairs(states, owners), abs=1e-9)
        assert found.centred == pytest.approx(by_all_pairs(centred, owners), abs=1e-9)
        assert found.nearest == nearest_one_by_one(centred, owners)

    def test_of_queries_that_never_mix_is_whole(self) -> None:
        states = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        found = likeness(states, [0, 0, 1, 1])
        assert (found.raw, found.nearest) == (pytest.approx(1.0), 1.0)

    def test_centred_does_not_see_what_all_states_share(self) -> None:
        owners = [0, 0, 1, 1, 2, 2]
        states = random_states(1, owners)
        moved = likeness(states + 1000 * torch.ones(5), owners)
        assert moved.centred == pytest.approx(likeness(states, owners).centred, abs=1e-3)
        assert abs(moved.raw) < 1e-4 < abs(likeness(states, owners).raw)

    def test_does_not_depend_on_the_length_of_the_states(self) -> None:
        owners = [0, 0, 1, 1]
        states = random_states(2, owners)
        assert likeness(1e3 * states, owners).raw == pytest.approx(likeness(states, owners).raw, abs=1e-9)

    def test_of_states_that_are_all_the_same_is_nil_in_every_view(self) -> None:
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(7, generator=generator, dtype=torch.float64)
        rounding = 1e-9 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
        found = likeness(state + rounding, [0, 0, 1, 1, 2, 2])
        assert (found.centred, found.nearest) == (0.0, 0.0)
        assert found.raw == pytest.approx(0.0, abs=1e-9)

    @pytest.mark.parametrize("owners", [[0, 0, 0], [0, 1, 2]])
    def test_needs_two_queries_and_two_wordings(self, owners: list[int]) -> None:
        with pytest.raises(InputError, match="cannot be compared"):
            likeness(random_states(0, owners), owners)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
class TestTheStates:
    def test_are_those_that_the_model_itself_reports(self, family: str) -> None:
        model = WhiteBoxModel(tiny_model(family), tiny_tokenizer())
        prompts = [model.prompt(text) for text in ("Who?", "What is ice made of, and where?", "A" * 40)]
        found = _states(model, prompts, 10, None)
        for row, prompt in enumerate(prompts):
            with torch.no_grad():
                out = model.model(torch.tensor([prompt.token_ids]), output_hidden_states=True)
            for level, states in enumerate(out.hidden_states[:-1]):  # its last is taken after the final norm
                own = states[0].flip(0)[:10]
                torch.testing.assert_close(found[level, :, row], own, atol=2e-5, rtol=1e-4)

    def test_end_with_those_before_the_final_norm(self, family: str) -> None:
        model = WhiteBoxModel(tiny_model(family), tiny_tokenizer())
        prompt = model.prompt("Who?")
        last = _states(model, [prompt], 4, None)[-1, :, 0]
        norm = model.layout.decoder_of(model.model)
        normed = (norm.ln_f if family == "gpt2" else norm.norm)(last)
        with torch.no_grad():
            final = norm(torch.tensor([prompt.token_ids])).last_hidden_state[0].flip(0)[:4]
        torch.testing.assert_close(normed.detach(), final, atol=2e-5, rtol=1e-4)

    def test_leave_no_hook_on_the_model(self, family: str) -> None:
        model = WhiteBoxModel(tiny_model(family), tiny_tokenizer())
        locate(model, GROUPS, positions=3)
        assert not any(
            module._forward_hooks or module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs
            for module in model.model.modules()
        )


class TestLocating:
    def test_gives_every_layer_and_position_in_every_view(self, tiny: WhiteBoxModel) -> None:
        found = locate(tiny, GROUPS, positions=4)
        assert found.positions == (-1, -2, -3, -4)
        assert {view: (len(found.table[view]), len(found.table[view][0])) for view in VIEWS} == dict.fromkeys(
            VIEWS, (7, 4)
        )
        assert (found.queries, found.prompts, found.layers) == (3, 7, range(4, 6))

    def test_does_not_depend_on_the_order_of_the_queries(self, tiny: WhiteBoxModel) -> None:
        one, other = (locate(tiny, groups, positions=6) for groups in (GROUPS, GROUPS[::-1]))
        for view in VIEWS:
            assert one.by_position(view) == pytest.approx(other.by_position(view), abs=1e-4)

    def test_chooses_among_positions_that_have_read_the_question(self, tiny: WhiteBoxModel) -> None:
        found = locate(tiny, GROUPS, positions=30 - 6)
        after = tiny.tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        assert found.read == len(after) + 1
        assert all(-found.choice(view) <= found.read for view in VIEWS)

    def test_binds_its_profile_to_what_follows_the_question_not_to_how_questions_end(self, tiny: WhiteBoxModel) -> None:
        asking = [replace(group, paraphrases=(f"Tell me: {group.query}",)) for group in GROUPS]
        found = locate(tiny, asking, positions=25)
        assert found.shared[found.read - 1]  # '?' everywhere
        assert tiny.tokenizer.decode(found.tail) == "<|im_end|>\n<|im_start|>assistant\n"

    def test_names_the_rule_of_the_template_beside_its_own(self, tiny: WhiteBoxModel) -> None:
        rule = locate(tiny, GROUPS, positions=3).template
        assert rule is not None
        assert (rule.token, rule.rule) == ("<|im_start|>", "header")

    def test_of_a_model_without_a_template_reads_the_prompt_as_it_is(self) -> None:
        base = WhiteBoxModel(tiny_model(), tiny_tokenizer(chat_template=None))
        found = locate(base, GROUPS, positions=12, prompt="Q: {query}\nA:")
        assert found.tokens[:3] == (":", "A", "Ċ")
        assert (found.read, found.template, found.model.template) == (4, None, "none")

    def test_shows_which_tokens_all_prompts_share(self, tiny: WhiteBoxModel) -> None:
        found = locate(tiny, GROUPS, positions=20)
        assert all(found.shared[: found.read - 1])
        assert not found.shared[found.read - 1]  # '?' here, '.' there

    def test_says_how_far_it_is(self, tiny: WhiteBoxModel) -> None:
        told: list[int] = []
        locate(tiny, GROUPS, positions=3, progress=told.append)
        assert told == [7]

    def test_measures_the_same_on_a_model_that_has_a_profile(self, tiny: WhiteBoxModel) -> None:
        found = locate(tiny, GROUPS, positions=3)
        with_profile = WhiteBoxModel(tiny_model(), tiny_tokenizer(), name=tiny.name, profile=found.profile())
        assert locate(with_profile, GROUPS, positions=3) == found

    @pytest.mark.parametrize("view", VIEWS)
    def test_lets_another_view_choose(self, tiny: WhiteBoxModel, view: Any) -> None:
        found = locate(tiny, GROUPS, positions=5, view=view)
        assert found.chosen == found.choice(view)

    def test_has_a_hash_of_the_wordings(self, tiny: WhiteBoxModel) -> None:
        same, other = (locate(tiny, groups, positions=2).data for groups in (GROUPS, GROUPS[:2]))
        assert locate(tiny, GROUPS, positions=3).data == same != other

    @pytest.mark.parametrize(
        ("groups", "options", "error", "why"),
        [
            (GROUPS[:1], {}, InputError, "1 queries cannot be told apart"),
            ([*GROUPS, Group(query="Who?")], {}, InputError, "'Who\\?' has one wording"),
            ([*GROUPS, Group(query="Who?", paraphrases=("Who?",))], {}, InputError, "has one wording"),
            (GROUPS, {"prompt": "Answer!"}, ConfigurationError, "has no {query}"),
            (GROUPS, {"view": "best"}, ConfigurationError, "view is 'best'"),
            (GROUPS, {"positions": 0}, ConfigurationError, "positions is 0"),
            (GROUPS, {"positions": 200}, InputError, "fewer than the 200 positions"),
        ],
    )
    def test_refuses_what_can_not_be_measured(
        self, tiny: WhiteBoxModel, groups: Any, options: Any, error: Any, why: str
    ) -> None:
        with pytest.raises(error, match=why):
            locate(tiny, groups, **options)

    def test_refuses_states_that_are_not_finite(self) -> None:
        model = WhiteBoxModel(tiny_model(), tiny_tokenizer())
        with torch.no_grad():
            model.layout.list_of(model.model)[4].mlp.down_proj.weight.fill_(math.nan)
        with pytest.raises(ScoringError, match="not finite"):
            locate(model, GROUPS, positions=2)


class TestTheChoice:
    def test_is_of_the_mean_over_the_deep_half(self) -> None:
        assert located().by_position("centred") == pytest.approx((5.0, 0.4, 0.3, 0.9))
        assert located().chosen == -2

    def test_is_the_prompts_last_token_only_where_there_is_no_other(self) -> None:
        assert [located(read=1).choice(view) for view in VIEWS] == [-1, -1, -1]

    def test_is_said_for_every_view(self) -> None:
        assert [located().choice(view) for view in VIEWS] == [-3, -2, -2]
        assert not located().agree
        assert located(read=2).agree

    def test_becomes_a_profile(self) -> None:
        profile = located().profile()
        assert (profile.anchor, profile.view, profile.layers, profile.tail) == (-2, "centred", (1, 2), (7, 8))
        assert [place.raw for place in profile.table] == [5.0, 0.1, 0.3, 0.9]

    def test_may_be_overruled_by_labels(self) -> None:
        overruled = located().profile(anchor=-3)
        assert (overruled.anchor, overruled.view) == (-3, "caller")

    @pytest.mark.parametrize("anchor", [-4, -5, 0])
    def test_is_never_before_the_questions_end(self, anchor: int) -> None:
        with pytest.raises(ConfigurationError, match="cannot be t"):
            located().profile(anchor=anchor)

    def test_is_plain_data_for_a_machine(self) -> None:
        plain = json.loads(json.dumps(located().to_json_dict()))
        assert plain["choices"] == {"raw": -3, "centred": -2, "nearest": -2}
        assert (plain["chosen"], plain["views_agree"], plain["template_rule"]["index"]) == (-2, False, -3)


class TestAgainstLabels:
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_semgrad_everywhere_is_the_scorers_at_each_position(self, family: str) -> None:
        model = WhiteBoxModel(tiny_model(family), tiny_tokenizer())
        made = [model.read(text, answer) for text, answer in [("Who?", "Ada it was"), ("What is ice made of?", "Ice")]]
        positions = (-1, -2, -5, -8)
        found = _semgrad_everywhere(model, made, positions)
        for column, position in enumerate(positions):
            there = [replace(each, anchor=Anchor(index=position, token="", rule="profile")) for each in made]
            expected = [score.scores["semgrad"] for score in SemGrad().batch(model, there)]
            assert [row[column] for row in found] == pytest.approx(expected, rel=1e-4)

    def test_says_where_the_gradient_tells_right_from_wrong(self, tiny: WhiteBoxModel) -> None:
        found = locate(tiny, GROUPS, positions=5)
        answers = [each.text for each in tiny.generate([group.query for group in GROUPS], max_new_tokens=4)]
        words = re.findall(r"\w+", answers[0])
        labelled = [
            replace(group, answers=(words[0],) if at == 0 and words else ("no such word",))
            for at, group in enumerate(GROUPS)
        ]
        told: list[int] = []
        predicted = predict(tiny, labelled, found, max_new_tokens=4, batch=2, progress=told.append)
        assert (predicted.answers, predicted.wrong, predicted.judge) == (3, 2, "contains")
        assert all(value in (0.0, 0.5, 1.0) for value in predicted.auroc)
        assert told == [2, 3]

    def test_needs_right_and_wrong_answers(self, tiny: WhiteBoxModel) -> None:
        found = locate(tiny, GROUPS, positions=3)
        wrong = [replace(group, answers=("no such word",)) for group in GROUPS]
        with pytest.raises(InputError, match="of 3 answers 3 are wrong"):
            predict(tiny, wrong, found, max_new_tokens=3)

    def test_needs_answers_to_judge_by(self, tiny: WhiteBoxModel) -> None:
        with pytest.raises(InputError, match="has no answers"):
            predict(tiny, [Group(query="Who?")], locate(tiny, GROUPS, positions=3))

    def test_refuses_another_model(self, tiny: WhiteBoxModel) -> None:
        other = WhiteBoxModel(tiny_model(seed=3), tiny_tokenizer())
        with pytest.raises(ConfigurationError, match="not the model that was measured"):
            predict(other, GROUPS, locate(tiny, GROUPS, positions=3))

    def test_the_margin_is_that_of_a_coin(self) -> None:
        predicted = Predicted(positions=(-1,), auroc=(0.5,), rank_correlation={}, answers=20, wrong=10)
        generator = torch.Generator().manual_seed(0)
        kinds = [True] * 10 + [False] * 10
        drawn = [auroc(torch.rand(20, generator=generator).tolist(), kinds) for _ in range(2000)]
        assert float(torch.tensor(drawn).std()) == pytest.approx(predicted.margin, rel=0.08)


class TestRanks:
    @given(pairs=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
    def test_auroc_counts_pairs(self, pairs: list[tuple[int, bool]]) -> None:
        scores, kinds = [float(value) for value, _ in pairs], [kind for _, kind in pairs]
        high, low = ([s for s, kind in zip(scores, kinds, strict=True) if kind is wanted] for wanted in (True, False))
        if not high or not low:
            with pytest.raises(InputError):
                auroc(scores, kinds)
            return
        won = sum((a > b) + (a == b) / 2 for a in high for b in low)
        assert auroc(scores, kinds) == pytest.approx(won / (len(high) * len(low)))

    @given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
    @settings(deadline=None)
    def test_spearman_is_that_of_scipy(self, pairs: list[tuple[int, int]]) -> None:
        stats = pytest.importorskip("scipy.stats")
        one, other = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
        if len(set(one)) < 2 or len(set(other)) < 2:
            assert spearman(one, other) is None
        else:
            assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)


class TestTheData:
    def test_shipped_are_forty_queries_in_five_wordings_and_none_twice(self) -> None:
        groups = shipped_groups()
        wordings = [re.sub(r"\W+", " ", text.lower()) for group in groups for text in group.wordings]
        assert (len(groups), len(wordings), len(set(wordings))) == (40, 200, 200)
        assert all(group.answers for group in groups)

    def test_reads_the_names_of_published_sets_too(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        row = {"query": "Who?", "truthful answer": ["Ada", ""], "paraphrases": ["Whose?"], "language": "en"}
        path.write_text(f"\n{json.dumps(row)}\n", encoding="utf-8")
        assert read_groups(path) == [Group(query="Who?", paraphrases=("Whose?",), answers=("Ada",))]

    @pytest.mark.parametrize(
        ("line", "labelled", "why"),
        [
            ("{", False, "line 1 of .* is not JSON"),
            ("[1]", False, "not an object"),
            ('{"query": ""}', False, "has the query ''"),
            ('{"query": "Who?"}', False, "has no paraphrases"),
            ('{"query": "Who?", "paraphrases": ["Who?"]}', False, "has no paraphrases"),
            ('{"query": "Who?", "paraphrases": [" "]}', False, "has an empty paraphrase"),
            ('{"query": "Who?", "paraphrases": "Whose?"}', False, "paraphrases are a list"),
            ('{"query": "Who?", "answers": [1]}', True, "answers are a list"),
            ('{"query": "Who?", "answers": [""]}', True, "has no answers"),
        ],
    )
    def test_names_the_line_that_can_not_be_used(self, tmp_path: Path, line: str, labelled: bool, why: str) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text(line, encoding="utf-8")
        with pytest.raises(InputError, match=why):
            read_groups(path, labelled=labelled)

    def test_says_so_where_there_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            read_groups(tmp_path / "none.jsonl")


class TestTheHeatMap:
    def test_has_a_panel_a_view_with_the_prompt_read_from_left_to_right(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        figure = draw(located())
        panels = [axes for axes in figure.axes if axes.images]
        assert [panel.images[0].get_array().shape for panel in panels] == [(3, 4)] * 3
        assert panels[0].images[0].get_array()[1].tolist() == [0.9, 0.3, 0.1, 5.0]
        assert [label.get_text() for label in panels[0].get_xticklabels()] == [
            "\\n\\n  -4",
            "$b_1  -3",
            "a  -2",
            "\\n  -1",
        ]
        figure.savefig(tmp_path / "heat.png")  # no token is taken for a formula

    def test_frames_the_deep_half_at_the_position_chosen(self) -> None:
        pytest.importorskip("matplotlib")
        panels = [axes for axes in draw(located()).axes if axes.images]
        frames = [panel.patches[0].get_bbox() for panel in panels]
        assert [(frame.x0, frame.x1) for frame in frames] == [(0.5, 1.5), (1.5, 2.5), (1.5, 2.5)]
        assert {(frame.y0, frame.y1) for frame in frames} == {(0.5, 2.5)}

    def test_leaves_matplotlibs_global_state_alone(self) -> None:
        matplotlib = pytest.importorskip("matplotlib")
        before = dict(matplotlib.rcParams)
        draw(located(template=None))
        assert dict(matplotlib.rcParams) == before
