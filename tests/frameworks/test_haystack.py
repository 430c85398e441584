"""GuardedChatGenerator and ConfidenceGate: the contract, and what is Haystack's own, on the real library."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack import Pipeline
from haystack.components.agents import Agent
from haystack.components.generators.chat import MockChatGenerator
from haystack.dataclasses import ChatMessage, ImageContent, StreamingChunk, ToolCall
from haystack.tools import Tool

from hallucination_guard import Guard
from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard_haystack import ConfidenceGate, GuardedChatGenerator
from hallucination_guard_haystack.convert import as_guard_messages
from hallucination_guard_policies import AbstainBelow, RetryBelow

_spec = importlib.util.spec_from_file_location("framework_contract", Path(__file__).parent / "contract.py")
assert _spec is not None and _spec.loader is not None
contract = sys.modules.setdefault("framework_contract", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(contract)


def tool(function: Any = lambda a, b: a + b) -> Tool:
    return Tool(function=function, **contract.TOOL)


class Haystack:
    def _messages(self, turns: Any) -> list[ChatMessage]:
        make = {
            "system": ChatMessage.from_system,
            "user": ChatMessage.from_user,
            "assistant": ChatMessage.from_assistant,
        }
        return [make[each["role"]](each["content"]) for each in turns]

    def _heard(self, found: dict[str, list[ChatMessage]]) -> Any:
        [message] = found["replies"]
        return contract.Heard(
            text=message.text or "",
            calls=[(each.tool_name, each.arguments) for each in message.tool_calls],
            verdict=message.meta["hallucination_guard"],
            all=message,
        )

    def ask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        generator = GuardedChatGenerator(guard, **settings)
        return self._heard(generator.run(self._messages(turns), tools=[tool()] if tools else None))

    async def aask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        generator = GuardedChatGenerator(guard, **settings, tools=[tool()] if tools else None)
        return self._heard(await generator.run_async(self._messages(turns)))

    def stream(self, guard: Guard, turns: Any, heard: list[str], *, tools: bool = False, **settings: Any) -> Any:
        last: list[StreamingChunk] = []

        def hear(chunk: StreamingChunk) -> None:
            heard.append(chunk.content)
            last[:] = [chunk]

        generator = GuardedChatGenerator(guard, **settings)
        found = self._heard(generator.run(self._messages(turns), hear, tools=[tool()] if tools else None))
        assert last[0].meta["hallucination_guard"] == found.verdict
        assert [json.loads(each.arguments) for each in last[0].tool_calls or ()] == [args for _, args in found.calls]
        return found

    def show_an_image(self, guard: Guard) -> object:
        image = ImageContent(base64_image="iVBORw0KGgo=", mime_type="image/png", validation=False)
        return GuardedChatGenerator(guard).run([ChatMessage.from_user(content_parts=["What is this?", image])])


@pytest.mark.parametrize("case", contract.CASES)
def test_contract(case: str) -> None:
    contract.CASES[case](Haystack())


def guarded(*answers: str, score: Any = 0.1, **settings: Any) -> GuardedChatGenerator:
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    guard = Guard(ScriptedModel(list(answers)), policy=policy, scorer=ScriptedScorer(score))
    return GuardedChatGenerator(guard, **settings)


def test_a_tools_round_is_read_in_order() -> None:
    call = ToolCall(tool_name="add", arguments={"a": 1}, id="c")
    history = [
        ChatMessage.from_user("1 + 1?"),
        ChatMessage.from_assistant("Wait.", tool_calls=[call], reasoning="Hm."),
        ChatMessage.from_tool("2", origin=call),
    ]
    _, called, result = as_guard_messages(history)
    assert (called.content, called.tool_calls[0].name, dict(called.tool_calls[0].arguments)) == (
        "Wait.",
        "add",
        {"a": 1},
    )
    assert (result.role, result.content, result.tool_call_id, result.name) == ("tool", "2", "c", "add")


def test_a_tool_that_gives_an_image_cannot_be_read() -> None:
    image = ImageContent(base64_image="iVBORw0KGgo=", mime_type="image/png", validation=False)
    with pytest.raises(InputError, match="ImageContent"):
        as_guard_messages([ChatMessage.from_tool([image], origin=ToolCall(tool_name="add", arguments={}))])


def test_a_text_is_a_prompt() -> None:
    assert guarded("Paris.").run(contract.QUESTION)["replies"][0].text == "Paris."


def test_settings_of_a_call_go_before_the_generators() -> None:
    generator = guarded("Paris.", generation_kwargs={"max_tokens": 9, "temperature": 0.5})
    generator.run(contract.QUESTION, generation_kwargs={"max_tokens": 5})
    assert generator.guard.model.calls[0][1] == {"max_new_tokens": 5, "temperature": 0.5}


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="presence_penalty"):
        guarded("Paris.").run(contract.QUESTION, generation_kwargs={"presence_penalty": 1.0})


async def test_a_callback_is_awaited() -> None:
    heard: list[str] = []

    async def hear(chunk: StreamingChunk) -> None:
        heard.append(chunk.content)

    await guarded("Paris.", streaming_callback=hear).run_async(contract.QUESTION)
    assert heard == ["Paris."]


def test_a_pipeline_says_what_was_decided() -> None:
    pipeline = Pipeline()
    pipeline.add_component("llm", guarded(contract.DRAFT, score=0.9))
    [reply] = pipeline.run({"llm": {"messages": [ChatMessage.from_user(contract.QUESTION)]}})["llm"]["replies"]
    assert (reply.text, reply.meta["finish_reason"]) == ("I am not sure enough to answer that.", "content_filter")


@pytest.mark.parametrize("score", [0.1, 0.9])
def test_an_agent_calls_what_was_let_through(score: float) -> None:
    called: list[int] = []

    def add(a: int, b: int) -> int:
        called.append(a + b)
        return a + b

    generator = guarded(contract.CALL, "471100173.", score={contract.CALL: score, "471100173.": 0.1})
    found = Agent(chat_generator=generator, tools=[tool(add)]).run([ChatMessage.from_user("471100171 + 2?")])
    assert called == ([471100173] if score < 0.5 else [])
    assert found["last_message"].text == ("471100173." if score < 0.5 else "I am not sure enough to answer that.")


def test_it_cannot_be_written_to_yaml() -> None:
    with pytest.raises(ConfigurationError, match="YAML"):
        guarded("Paris.").to_dict()


# ------------------------------------------------------------------------------------------------------- the gate


def routed(*drafts: str | ChatMessage, policy: Any = None, answers: Any = "unused", score: Any = None) -> Any:
    """A pipeline with a generator, the gate, and a component behind each of its outputs."""
    sink = MemorySink()
    guard = Guard(
        ScriptedModel(answers),
        policy=policy or AbstainBelow(score="hybridgrad", limit=0.5),
        scorer=ScriptedScorer({contract.DRAFT: 0.9, "Paris.": 0.1} if score is None else score),
        audit=sink,
    )
    pipeline = Pipeline()
    pipeline.add_component("llm", MockChatGenerator(responses=list(drafts)))
    pipeline.add_component("gate", ConfidenceGate(guard))
    pipeline.add_component("fallback", MockChatGenerator(responses="Ask the librarian."))
    pipeline.connect("llm.replies", "gate.replies")
    pipeline.connect("gate.rejected", "fallback.messages")
    asked = [ChatMessage.from_user(contract.QUESTION)]
    inputs = {"llm": {"messages": asked}, "gate": {"messages": asked}}
    return pipeline.run(inputs, include_outputs_from={"gate"}), sink


def test_a_sure_reply_is_accepted_and_the_fallback_does_not_run() -> None:
    found, sink = routed("Paris.")
    [reply] = found["gate"]["accepted"]
    assert (reply.text, reply.meta["hallucination_guard"]["decision"]) == ("Paris.", "accept")
    assert reply.meta["model"] == "mock-model"
    assert "fallback" not in found and "rejected" not in found["gate"]
    assert [(each.decision, each.answer) for each in sink.records] == [("accept", "Paris.")]


def test_a_doubtful_reply_is_rejected_without_its_text() -> None:
    found, sink = routed(contract.DRAFT)
    assert "accepted" not in found["gate"]
    assert found["fallback"]["replies"][0].text == "Ask the librarian."
    assert contract.DRAFT not in repr(found)
    assert [(each.decision, each.answer) for each in sink.records] == [("abstain", contract.DRAFT)]


def test_what_a_reply_says_of_itself_is_not_believed() -> None:
    boast = {"hallucination_guard": {"decision": "accept"}}
    found, _ = routed(ChatMessage.from_assistant(contract.DRAFT, meta=boast))
    assert "accepted" not in found["gate"]


def test_a_later_draft_is_the_guards_own() -> None:
    found, _ = routed(contract.DRAFT, policy=RetryBelow(score="hybridgrad", limit=0.5), answers="Paris.")
    [reply] = found["gate"]["accepted"]
    assert (reply.text, reply.meta["model"]) == ("Paris.", "scripted")


async def test_a_gate_is_awaited() -> None:
    guard = Guard(
        ScriptedModel("unused"), policy=AbstainBelow(score="hybridgrad", limit=0.5), scorer=ScriptedScorer(0.9)
    )
    found = await ConfidenceGate(guard).run_async(contract.QUESTION, [ChatMessage.from_assistant(contract.DRAFT)])
    assert list(found) == ["rejected"]


@pytest.mark.parametrize(
    "replies",
    [[], [ChatMessage.from_assistant(tool_calls=[ToolCall(tool_name="add", arguments={})])]],
    ids=["none", "a call"],
)
def test_what_is_no_answer_is_refused(replies: list[ChatMessage]) -> None:
    guard = Guard(
        ScriptedModel("unused"), policy=AbstainBelow(score="hybridgrad", limit=0.5), scorer=ScriptedScorer(0.1)
    )
    with pytest.raises(InputError):
        ConfidenceGate(guard).run(contract.QUESTION, replies)


def test_the_readme_runs(tmp_path: Path) -> None:
    said = contract.readme_runs("haystack", tmp_path)
    assert all(words in said for words in ["The capital of France is Paris. 0."])
