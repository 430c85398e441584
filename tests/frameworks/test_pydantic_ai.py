"""GuardedModel against the contract, and what is pydantic-ai's own, on the real library."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ImageUrl, NativeOutput, ToolOutput
from pydantic_ai.direct import model_request_stream
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.settings import ModelSettings, ToolOrOutput
from pydantic_ai.tools import ToolDefinition

from hallucination_guard import Guard
from hallucination_guard.errors import InputError
from hallucination_guard.guard import NotAnswered
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Message
from hallucination_guard_policies import AbstainBelow
from hallucination_guard_pydantic_ai import GuardedModel
from hallucination_guard_pydantic_ai.convert import as_guard_messages
from hallucination_guard_pydantic_ai.tools import offered_tools

_spec = importlib.util.spec_from_file_location("framework_contract", Path(__file__).parent / "contract.py")
assert _spec is not None and _spec.loader is not None
contract = sys.modules.setdefault("framework_contract", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(contract)


ADD = ToolDefinition(name="add", description="Add two numbers.", parameters_json_schema=contract.TOOL["parameters"])


class PydanticAI:
    def _messages(self, turns: Any) -> list[ModelMessage]:
        make: dict[str, Any] = {
            "system": lambda text: ModelRequest(parts=[SystemPromptPart(text)]),
            "user": lambda text: ModelRequest(parts=[UserPromptPart(text)]),
            "assistant": lambda text: ModelResponse(parts=[TextPart(text)]),
        }
        return [make[each["role"]](each["content"]) for each in turns]

    def _parameters(self, tools: bool) -> ModelRequestParameters:
        return ModelRequestParameters(function_tools=[ADD] if tools else [])

    def _heard(self, response: ModelResponse) -> Any:
        assert response.metadata is not None
        return contract.Heard(
            text=response.text or "",
            calls=[(each.tool_name, each.args_as_dict()) for each in response.tool_calls],
            verdict=response.metadata["hallucination_guard"],
            all=response,
        )

    def ask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        return asyncio.run(self.aask(guard, turns, tools=tools, **settings))

    async def aask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        model = GuardedModel(guard, **settings)
        return self._heard(await model.request(self._messages(turns), None, self._parameters(tools)))

    def stream(self, guard: Guard, turns: Any, heard: list[str], *, tools: bool = False, **settings: Any) -> Any:
        async def run() -> Any:
            model = GuardedModel(guard, **settings)
            async with model.request_stream(self._messages(turns), None, self._parameters(tools)) as stream:
                async for event in stream:
                    if event.event_kind == "part_start" and isinstance(event.part, TextPart):
                        heard.append(event.part.content)
                    elif event.event_kind == "part_delta" and event.delta.part_delta_kind == "text":
                        heard.append(event.delta.content_delta)
                return self._heard(stream.get())

        return asyncio.run(run())

    def show_an_image(self, guard: Guard) -> object:
        content = ["What is this?", ImageUrl(url="https://example.org/a.png")]
        messages = [ModelRequest(parts=[UserPromptPart(content)])]
        return asyncio.run(GuardedModel(guard).request(messages, None, ModelRequestParameters()))


@pytest.mark.parametrize("case", contract.CASES)
def test_contract(case: str) -> None:
    contract.CASES[case](PydanticAI())


def guarded(*answers: str, score: Any = 0.1, sink: Any = None, **settings: Any) -> GuardedModel:
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    scorer = ScriptedScorer(score)
    return GuardedModel(Guard(ScriptedModel(list(answers)), policy=policy, scorer=scorer, audit=sink), **settings)


class Person(BaseModel):
    """A person."""

    name: str


PERSON = '<tool_call>{"name": "final_result", "arguments": {"name": "Ada"}}</tool_call>'


def test_a_tools_round_is_read_in_order() -> None:
    history = [
        ModelRequest(parts=[SystemPromptPart("Be short."), UserPromptPart(["1 + 1", "?"])]),
        ModelResponse(parts=[ThinkingPart("Hm."), TextPart("Wait."), ToolCallPart("add", {"a": 1}, tool_call_id="c")]),
        ModelRequest(parts=[ToolReturnPart("add", 2, tool_call_id="c")]),
    ]
    system, asked, called, result = as_guard_messages(history, [])
    assert (system.content, asked) == ("Be short.", Message(role="user", content="1 + 1\n?"))
    assert (called.content, called.tool_calls[0].name, dict(called.tool_calls[0].arguments)) == (
        "Wait.",
        "add",
        {"a": 1},
    )
    assert (result.role, result.content, result.tool_call_id, result.name) == ("tool", "2", "c", "add")


def test_a_tool_that_gives_an_image_cannot_be_read() -> None:
    image = BinaryContent(b"iVBORw0KGgo=", media_type="image/png")
    with pytest.raises(InputError, match="add"):
        as_guard_messages([ModelRequest(parts=[ToolReturnPart("add", image, tool_call_id="c")])], [])


async def test_an_agents_instructions_and_system_prompt_are_one_turn() -> None:
    model = guarded("Paris.")
    assert (
        await Agent(model, system_prompt="Be short.", instructions="Be kind.").run(contract.QUESTION)
    ).output == "Paris."
    expected = (
        Message(role="system", content="Be short.\n\nBe kind."),
        Message(role="user", content=contract.QUESTION),
    )
    assert model.guard.model.calls[0][0] == expected  # type: ignore[attr-defined]


async def test_an_agent_says_what_was_decided() -> None:
    found = await Agent(guarded(contract.DRAFT, score=0.9)).run(contract.QUESTION)
    assert found.output == "I am not sure enough to answer that."
    assert contract.DRAFT not in repr(found.all_messages())


async def test_the_conversation_is_in_the_record() -> None:
    sink = MemorySink()
    found = await Agent(guarded("Paris.", sink=sink)).run(contract.QUESTION)
    assert sink.records[0].thread_id == found.all_messages()[0].conversation_id


async def test_an_agent_streams_what_was_decided() -> None:
    async with Agent(guarded(contract.DRAFT, score=0.9)).run_stream(contract.QUESTION) as stream:
        chunks = [each async for each in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(chunks) == "I am not sure enough to answer that."


async def test_a_direct_stream() -> None:
    async with model_request_stream(guarded("Paris."), [ModelRequest.user_text_prompt(contract.QUESTION)]) as stream:
        [_ async for _ in stream]
    assert stream.get().finish_reason == "stop"


async def test_an_abstention_as_an_error_leaves_the_agent() -> None:
    with pytest.raises(NotAnswered):
        await Agent(guarded(contract.DRAFT, score=0.9, on_abstain="error")).run(contract.QUESTION)


async def test_a_fallback_model_takes_it() -> None:
    doubtful = guarded(contract.DRAFT, score=0.9, on_abstain="error")
    model = FallbackModel(doubtful, TestModel(custom_output_text="Ask them."), fallback_on=(NotAnswered,))
    assert (await Agent(model).run(contract.QUESTION)).output == "Ask them."


@pytest.mark.parametrize("score", [0.1, 0.9])
async def test_an_agent_calls_what_was_let_through(score: float) -> None:
    called: list[int] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        called.append(a + b)
        return a + b

    model = guarded(contract.CALL, "471100173.", score={contract.CALL: score, "471100173.": 0.1})
    found = await Agent(model, tools=[add]).run("471100171 + 2?")
    assert called == ([471100173] if score < 0.5 else [])
    assert found.output == ("471100173." if score < 0.5 else "I am not sure enough to answer that.")


async def test_an_object_is_the_arguments_of_a_call() -> None:
    model = guarded(PERSON)
    assert (await Agent(model, output_type=ToolOutput(Person)).run("Who?")).output == Person(name="Ada")
    assert model.guard.model.calls[0][1]["tool_choice"] == "required"  # type: ignore[attr-defined]


async def test_an_object_is_the_answer() -> None:
    model = guarded('{"name": "Ada"}')
    assert (await Agent(model, output_type=NativeOutput(Person)).run("Who?")).output == Person(name="Ada")
    assert set(model.guard.model.calls[0][1]["response_schema"]["properties"]) == {"name"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
async def test_there_is_no_object_for_an_abstention(kind: Any) -> None:
    answer = PERSON if kind is ToolOutput else '{"name": "Ada"}'
    with pytest.raises(NotAnswered):
        await Agent(guarded(answer, score=0.9), output_type=kind(Person)).run("Who?")


async def test_settings_of_a_request() -> None:
    model = guarded("Paris.", settings=ModelSettings(max_tokens=5))
    await Agent(model).run(contract.QUESTION, model_settings=ModelSettings(temperature=0.5, stop_sequences=["\n"]))
    expected = {"max_new_tokens": 5, "temperature": 0.5, "stop": ("\n",)}
    assert model.guard.model.calls[0][1] == expected  # type: ignore[attr-defined]


OUTPUT = ToolDefinition(name="final_result")
OTHER = ToolDefinition(name="other")


@pytest.mark.parametrize(
    ("choice", "text", "names", "meant"),
    [
        (None, True, ["add", "other"], "auto"),
        ("auto", False, ["add", "other", "final_result"], "required"),
        ("none", True, [], "auto"),
        ([], False, ["final_result"], "required"),
        ("required", True, ["add", "other"], "required"),
        (["add"], True, ["add"], "required"),
        (ToolOrOutput(function_tools=["add"]), True, ["add"], "auto"),
        (ToolOrOutput(function_tools=["add"]), False, ["add", "final_result"], "required"),
    ],
)
def test_every_way_of_saying_tool_choice(choice: Any, text: bool, names: list[str], meant: str) -> None:
    parameters = ModelRequestParameters(
        function_tools=[ADD, OTHER], output_tools=[] if text else [OUTPUT], allow_text_output=text
    )
    tools, found = offered_tools(ModelSettings(tool_choice=choice), parameters)
    assert ([each.name for each in tools], found) == (names, meant)


def test_a_choice_of_no_tool_is_refused() -> None:
    with pytest.raises(InputError, match="subtract"):
        offered_tools(ModelSettings(tool_choice=["subtract"]), ModelRequestParameters(function_tools=[ADD]))


def test_the_readme_runs(tmp_path: Path) -> None:
    said = contract.readme_runs("pydantic_ai", tmp_path)
    assert all(words in said for words in ["The capital of France is Paris. 0."])
