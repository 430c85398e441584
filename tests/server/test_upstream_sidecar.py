"""What a server drew is scored by exactly its tokens, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from hallucination_guard import Outcome, Released
from hallucination_guard.errors import CalibrationMismatch, ConfigurationError, InputError, UpstreamError
from hallucination_guard_policies import AbstainBelow, Accept, RetryBelow, Unscored

LYON = "Lyon is a city. It lies in France."
LIMIT: Any = {"score": "hybridgrad", "limit": 0.5}


def records(sidecar: Any) -> Any:
    return sidecar.guard.audit.records


async def events_of(stream: Any) -> list[Any]:
    return [each async for each in stream]


def text_of(events: list[Any]) -> str:
    return "".join(each.text for each in events if isinstance(each, Released))


class TestAnswers:
    async def test_an_answer_is_the_server_s_and_scored_by_its_tokens(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        assert (await sidecar.start()).ready
        outcome = await sidecar.acall("Where is Lyon?")
        assert outcome.text == LYON
        assert outcome.generation.response_token_ids == tuple(LYON.encode())
        assert outcome.generation.finish_reason == "stop"
        assert sidecar.guard.model.calls == []

    async def test_the_record_names_server_and_reader_apart(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        await sidecar.acall("Where is Lyon?")
        [record] = records(sidecar)
        assert record.model["name"] == "scripted"
        assert dict(record.generator) == {
            "url": "http://127.0.0.1:1", "kind": "vllm", "version": "0.32.0", "model": "m", "dtype": "float32",
            "tolerance": 1e-4, "compared": 0, "beyond": 0,
        }  # fmt: skip
        assert record.conditions["generator"] == "vllm 0.32.0 m float32"
        assert record.conditions["max_new_tokens"] == 64

    async def test_what_is_doubtful_stays_in(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double, doubts="Lyon")
        await sidecar.start()
        assert (await sidecar.acall("Where is Lyon?")).text is None

    async def test_everything_is_said_and_nothing_else(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        await sidecar.acall("Where is Lyon?", max_new_tokens=7, temperature=0.5, seed=3)
        assert double.asked[-1] == {
            "model": "m", "messages": [{"role": "user", "content": "Where is Lyon?"}], "max_tokens": 7,
            "temperature": 0.5, "top_p": 1.0, "seed": 3, "return_token_ids": True, "logprobs": True,
        }  # fmt: skip

    async def test_a_setting_that_the_server_does_not_draw_by_is_refused(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        before = len(double.asked)
        with pytest.raises(InputError, match="strict_tools"):
            await sidecar.acall("Add.", tools=[{"name": "add"}], strict_tools=True)
        with pytest.raises(ConfigurationError, match="'n'"):
            await sidecar.acall("Where?", n=2)
        assert len(double.asked) == before

    async def test_it_has_to_be_started(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        assert not sidecar.status().ready
        with pytest.raises(ConfigurationError, match="not started"):
            await sidecar.acall("Where is Lyon?")

    async def test_further_drafts_are_the_reader_s_own(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double, doubts="Lyon", answers="Paris.", policy=RetryBelow(**LIMIT))
        await sidecar.start()
        outcome = await sidecar.acall("Where?")
        assert outcome.text == "Paris."
        first, second = records(sidecar)
        assert first.generator is not None
        assert second.generator is None
        assert "generator" not in second.conditions


class TestEndings:
    async def test_a_stop_text_is_in_no_answer_and_in_no_score(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        outcome = await sidecar.acall("Where is Lyon?", stop=[" It"])
        assert outcome.text == "Lyon is a city."
        assert bytes(outcome.generation.response_token_ids) == b"Lyon is a city."
        assert outcome.generation.finish_reason == "stop_text"

    async def test_the_end_of_turn_is_not_scored(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        outcome = await sidecar.acall("Where?")
        assert 2 not in outcome.generation.response_token_ids

    async def test_a_cut_answer_is_known_to_be_cut(self, double: Any, sidecar_of: Any) -> None:
        double.ends, double.finish = False, "length"
        sidecar = sidecar_of(double)
        await sidecar.start()
        await sidecar.acall("Where?", max_new_tokens=len(LYON))
        [record] = records(sidecar)
        assert record.conditions["endings"] == ("length",)
        assert record.conditions["max_new_tokens"] == len(LYON)

    @pytest.mark.parametrize("said", ["content_filter", "abort", "error"])
    async def test_what_the_server_broke_off_is_no_answer(self, double: Any, sidecar_of: Any, said: str) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.finish = said
        with pytest.raises(UpstreamError, match=said):
            await sidecar.acall("Where?")

    async def test_of_several_answers_none_is_taken(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit = lambda reply: reply["choices"].append(reply["choices"][0])
        with pytest.raises(UpstreamError, match="2 answers"):
            await sidecar.acall("Where?")
        assert records(sidecar) == []

    async def test_a_whole_answer_that_does_not_say_how_it_ended_is_none(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.ends, double.finish = False, None
        with pytest.raises(UpstreamError, match="how the answer ended"):
            await sidecar.acall("Where?")
        assert records(sidecar) == []


ODD: dict[str, Any] = {
    "a number for the text": lambda choice, held: held.update(content=5),
    "a list for the text": lambda choice, held: held.update(content=[{"type": "text", "text": "x"}]),
    "a number for what holds the text": lambda choice, held: choice.update(message=5, delta=5),
    "a list for the ending": lambda choice, held: choice.update(finish_reason=["stop"]),
}
ODD_LOGPROBS: dict[str, Any] = {
    "a text": [{"logprob": "x"}],
    "a list": [{"logprob": [1]}],
    "a truth": [{"logprob": True}],
    "a number without end": [{"logprob": 10**400}],
    "no object": [5],
    "no list": "x",
}


def odd(edit: Any) -> Any:
    """That edit where tokens come."""

    def apply(reply: Any) -> None:
        [choice] = reply["choices"]
        if "token_ids" in choice:
            edit(choice, choice.get("message", choice.get("delta")))

    return apply


async def asked(sidecar: Any, *, streamed: bool) -> Any:
    return await events_of(sidecar.astream("Where?")) if streamed else await sidecar.acall("Where?")


@pytest.mark.parametrize("streamed", [False, True])
class TestOddReplies:
    @pytest.mark.parametrize("what", ODD)
    async def test_nothing_is_decided_on_it(self, double: Any, sidecar_of: Any, what: str, streamed: bool) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit = odd(ODD[what])
        with pytest.raises(UpstreamError, match=r"gave|ended"):
            await asked(sidecar, streamed=streamed)
        assert [each.rule for each in records(sidecar)] == ["interrupted"] * streamed

    @pytest.mark.parametrize("what", ODD_LOGPROBS)
    async def test_odd_log_probabilities_are_no_answer_and_count_as_beyond(
        self, double: Any, sidecar_of: Any, what: str, streamed: bool
    ) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit = odd(lambda choice, _: choice.update(logprobs={"content": ODD_LOGPROBS[what]}))
        for _ in range(4):
            with pytest.raises(UpstreamError, match="log-probabilit"):
                await asked(sidecar, streamed=streamed)
        assert [each.rule for each in records(sidecar)] == ["interrupted"] * 4 * streamed
        double.edit = lambda reply: None
        await sidecar.acall("Where?")
        assert "no longer ours" in sidecar.status().why

    async def test_log_probabilities_that_are_none_at_all_are_odd(
        self, double: Any, sidecar_of: Any, streamed: bool
    ) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit = odd(lambda choice, _: choice.update(logprobs=5))
        with pytest.raises(UpstreamError, match="log-probabilities"):
            await asked(sidecar, streamed=streamed)


@pytest.mark.parametrize("ids", [[70_000], [-1], [10**30]])
async def test_ids_in_a_stream_that_are_none_are_the_server_s_fault_and_not_the_asker_s(
    double: Any, sidecar_of: Any, ids: list[int]
) -> None:
    sidecar = sidecar_of(double)
    await sidecar.start()
    double.edit = odd(lambda choice, _: choice.update(token_ids=ids))
    with pytest.raises(UpstreamError, match="token id"):
        await events_of(sidecar.astream("Where?"))


FORGED: dict[str, tuple[Any, str]] = {
    "no ids": (lambda reply: reply["choices"][0].pop("token_ids"), "does not say which tokens it drew"),
    "ids that are null": (lambda r: r["choices"][0].update(token_ids=None), "does not say which tokens it drew"),
    "ids that are text": (lambda r: r["choices"][0].update(token_ids=["a"]), "does not say which tokens it drew"),
    "ids that are bool": (lambda r: r["choices"][0].update(token_ids=[True]), "does not say which tokens it drew"),
    "no prompt ids": (lambda reply: reply.pop("prompt_token_ids"), "does not say which tokens it read"),
    "one prompt token": (lambda reply: reply["prompt_token_ids"].__setitem__(3, 65), "read another prompt"),
    "a token more": (lambda reply: reply["prompt_token_ids"].append(65), "read another prompt"),
    "other ids": (lambda r: r["choices"][0].update(token_ids=[*b"Nice is a city."]), "not what its tokens say"),
    "other text": (lambda r: r["choices"][0]["message"].update(content="Nice."), "not what its tokens say"),
    "an id too large": (lambda reply: reply["choices"][0].update(token_ids=[70_000]), "70000"),
    "an id below zero": (lambda reply: reply["choices"][0].update(token_ids=[-1]), "-1"),
}


class TestUnscorable:
    @pytest.mark.parametrize("forged", FORGED)
    async def test_it_is_not_scored_and_the_policy_decides(self, double: Any, sidecar_of: Any, forged: str) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit, reason = FORGED[forged]
        outcome = await sidecar.acall("Where is Lyon?")
        assert outcome.text is None
        assert outcome.verdict.score.status == "unscorable"
        assert reason in outcome.verdict.score.reason
        assert records(sidecar)[-1].detail == outcome.verdict.score.reason

    async def test_a_policy_may_let_it_through_as_it_is(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double, policy=Unscored(AbstainBelow(**LIMIT), on_unscorable="accept"))
        await sidecar.start()
        double.edit = FORGED["no ids"][0]
        outcome = await sidecar.acall("Where is Lyon?")
        assert outcome.text == LYON
        assert outcome.generation.response_token_ids == ()

    async def test_a_server_without_ids_starts_and_nothing_is_scored(self, double: Any, sidecar_of: Any) -> None:
        double.edit = FORGED["no ids"][0]
        sidecar = sidecar_of(double)
        status = await sidecar.start()
        assert not status.ready
        assert "which tokens it drew" in status.why
        double.edit = lambda reply: None
        assert (await sidecar.acall("Where?")).verdict.score.status == "unscorable"

    async def test_another_model_is_noticed_at_start(self, double: Any, sidecar_of: Any) -> None:
        double.off = 0.3
        status = await sidecar_of(double).start()
        assert "another model" in status.why

    async def test_one_probe_far_off_gives_no_tolerance_that_hides_another_model(
        self, double: Any, sidecar_of: Any
    ) -> None:
        def far(reply: Any) -> None:
            if len(double.asked) == 1:
                for each in reply["choices"][0]["logprobs"]["content"]:
                    each["logprob"] = -1.2

        double.edit = far
        sidecar = sidecar_of(double, probes=tuple("abcdefgh"))
        status = await sidecar.start()
        assert not status.ready and "0.7 nats" in status.why
        assert (await sidecar.acall("Where?")).verdict.score.status == "unscorable"

    async def test_a_server_that_says_one_log_probability_an_answer_is_suspended(
        self, double: Any, sidecar_of: Any
    ) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit = lambda reply: [
            each.update(logprob=None) for each in reply["choices"][0]["logprobs"]["content"][1:]
        ]
        for _ in range(4):
            await sidecar.acall("Where?")
        assert not sidecar.status().ready

    async def test_a_server_that_drifts_away_is_suspended(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.off = 0.01
        statuses = []
        for _ in range(5):
            statuses.append((await sidecar.acall("Where?")).verdict.score.status)
        assert statuses == ["scored"] * 4 + ["unscorable"]
        assert "no longer ours" in sidecar.status().why
        assert records(sidecar)[-1].generator["beyond"] == 4

    async def test_a_server_that_falls_silent_is_suspended_as_well(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit = lambda reply: reply["choices"][0].pop("logprobs")
        statuses = [(await sidecar.acall("Where?")).verdict.score.status for _ in range(5)]
        assert statuses == ["scored"] * 4 + ["unscorable"]
        assert sidecar.status().why.endswith("the last came without any")

    async def test_the_further_drafts_of_the_reader_do_not_count(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double, doubts="Lyon", answers="Paris.", policy=RetryBelow(**LIMIT))
        await sidecar.start()
        await sidecar.acall("Where?")
        assert sidecar.status().generator.compared == 0


class TestStreams:
    async def test_sentences_leave_one_by_one(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        events = await events_of(sidecar.astream("Where is Lyon?"))
        assert [each.text for each in events[:-1]] == ["Lyon is a city. ", "It lies in France."]
        assert isinstance(events[-1], Outcome)
        assert events[-1].generation.finish_reason == "stop"
        assert all(each.generator["kind"] == "vllm" for each in records(sidecar))
        assert double.open == 0
        assert sidecar.status().generator.compared == 1

    async def test_a_stop_text_never_leaves(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        events = await events_of(sidecar.astream("Where is Lyon?", stop=["lies"]))
        assert text_of(events) == "Lyon is a city. It "
        assert events[-1].generation.finish_reason == "stop_text"

    async def test_what_only_begins_like_a_stop_text_leaves(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        assert text_of(await events_of(sidecar.astream("Where?", stop=["Frances", "liest"]))) == LYON

    async def test_a_server_that_dies_leaves_a_record_and_nothing_more(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.dies_after = 24
        given = []
        with pytest.raises(UpstreamError, match="ReadError"):
            async for event in sidecar.astream("Where is Lyon?"):
                given.append(event)
        assert text_of(given) == "Lyon is a city. "
        assert records(sidecar)[-1].rule == "interrupted"
        assert "does not answer" in sidecar.status().why
        double.dies_after = None
        await sidecar.acall("Where is Lyon?")
        assert sidecar.status().ready

    async def test_a_stream_that_ends_early_is_no_answer(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.finish = None
        with pytest.raises(UpstreamError, match="broke off"):
            await events_of(sidecar.astream("Where is Lyon?"))
        assert records(sidecar)[-1].rule == "interrupted"

    async def test_a_reader_who_leaves_ends_the_request(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        stream = sidecar.astream("Where is Lyon?")
        assert isinstance(await anext(stream), Released)
        await stream.aclose()
        assert double.open == 0
        assert records(sidecar)[-1].rule == "interrupted"

    async def test_ids_that_go_missing_end_it(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        seen = []

        def lose(event: Any) -> None:
            seen.append(event)
            if len(seen) == 24:
                del event["choices"][0]["token_ids"]

        double.edit = lose
        with pytest.raises(UpstreamError, match="stopped saying"):
            await events_of(sidecar.astream("Where is Lyon?"))

    async def test_another_prompt_is_decided_on_as_a_whole(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit = lambda event: event.get("prompt_token_ids", []).append(65)
        events = await events_of(sidecar.astream("Where is Lyon?"))
        assert text_of(events) == ""
        assert "another prompt" in events[-1].verdict.score.reason

    async def test_text_that_its_tokens_do_not_say_is_not_taken(self, double: Any, sidecar_of: Any) -> None:
        sidecar = sidecar_of(double)
        await sidecar.start()
        double.edit = lambda event: (
            "token_ids" in event["choices"][0] and event["choices"][0]["delta"].update(content="x")
        )
        with pytest.raises(UpstreamError, match="not what its tokens say"):
            await events_of(sidecar.astream("Where is Lyon?"))


class TestCertificates:
    async def test_a_policy_on_a_certificate_of_other_answers_does_not_start(
        self, double: Any, sidecar_of: Any, certified: Any
    ) -> None:
        sidecar = sidecar_of(double, **certified(None))
        with pytest.raises(CalibrationMismatch, match="vllm"):
            await sidecar.start()

    async def test_one_of_the_server_s_own_answers_holds(self, double: Any, sidecar_of: Any, certified: Any) -> None:
        sidecar = sidecar_of(double, **certified("vllm 0.32.0 m float32"))
        assert (await sidecar.start()).uncovered == ""
        outcome = await sidecar.acall("Where is Lyon?")
        assert outcome.verdict.certificate is not None

    async def test_no_certificate_holds_for_another_server(self, double: Any, sidecar_of: Any, certified: Any) -> None:
        sidecar = sidecar_of(double, **{**certified("vllm 0.31.0 m float32"), "policy": Accept()})
        assert "0.31.0" in (await sidecar.start()).uncovered
        outcome = await sidecar.acall("Where is Lyon?")
        assert outcome.verdict.certificate is None
        assert "generator" in outcome.verdict.uncovered
