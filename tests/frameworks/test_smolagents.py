"""GuardedModel and AnswerCheck: the contract, and what is smolagents' own, on the real library."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from smolagents import CodeAgent, Tool, ToolCallingAgent
from smolagents.memory import AgentMemory, TaskStep
from smolagents.models import ChatMessage, MessageRole, agglomerate_stream_deltas
from smolagents.utils import AgentGenerationError

from hallucination_guard import Guard
from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.guard import NotAnswered
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard_policies import AbstainBelow, Accept, MarkSentences
from hallucination_guard_smolagents import AnswerCheck, GuardedModel
from hallucination_guard_smolagents.convert import as_guard_messages

_spec = importlib.util.spec_from_file_location("framework_contract", Path(__file__).parent / "contract.py")
assert _spec is not None and _spec.loader is not None
contract = sys.modules.setdefault("framework_contract", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(contract)


class Add(Tool):  # type: ignore[misc]
    name = "add"
    description = "Add two numbers."
    inputs = {  # noqa: RUF012 - smolagents reads it from the class
        "a": {"type": "integer", "description": "one"},
        "b": {"type": "integer", "description": "the other"},
    }
    output_type = "integer"

    def __init__(self) -> None:
        super().__init__()
        self.called: list[int] = []

    def forward(self, a: int, b: int) -> int:
        self.called.append(a + b)
        return a + b


class Smolagents:
    def _messages(self, turns: Any) -> list[ChatMessage]:
        return [
            ChatMessage(role=MessageRole(each["role"]), content=[{"type": "text", "text": each["content"]}])
            for each in turns
        ]

    def _heard(self, message: ChatMessage) -> Any:
        calls = [(each.function.name, each.function.arguments) for each in message.tool_calls or ()]
        verdict = message.raw and message.raw["hallucination_guard"]
        return contract.Heard(text=message.content or "", calls=calls, verdict=verdict, all=message)

    def ask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        model = GuardedModel(guard, tool_choice="auto", **settings)
        return self._heard(model.generate(self._messages(turns), tools_to_call_from=[Add()] if tools else None))

    async def aask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        """smolagents awaits nothing; whoever does has threads."""
        return await asyncio.to_thread(self.ask, guard, turns, tools=tools, **settings)

    def stream(self, guard: Guard, turns: Any, heard: list[str], *, tools: bool = False, **settings: Any) -> Any:
        deltas = []
        model = GuardedModel(guard, tool_choice="auto", **settings)
        for delta in model.generate_stream(self._messages(turns), tools_to_call_from=[Add()] if tools else None):
            heard.append(delta.content or "")
            deltas.append(delta)
        message = agglomerate_stream_deltas(deltas)
        for each in message.tool_calls or ():
            each.function.arguments = json.loads(each.function.arguments)
        return self._heard(message)

    def show_an_image(self, guard: Guard) -> object:
        content = [{"type": "text", "text": "What is this?"}, {"type": "image", "image": b"iVBORw0KGgo="}]
        return GuardedModel(guard).generate([ChatMessage(role=MessageRole.USER, content=content)])


@pytest.mark.parametrize("case", contract.CASES)
def test_contract(case: str) -> None:
    contract.CASES[case](Smolagents())


def guarded(*answers: str, score: Any = 0.1, **settings: Any) -> GuardedModel:
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    return GuardedModel(Guard(ScriptedModel(list(answers)), policy=policy, scorer=ScriptedScorer(score)), **settings)


def final(answer: str) -> str:
    return f'<tool_call>{{"name": "final_answer", "arguments": {{"answer": "{answer}"}}}}</tool_call>'


def test_turns_of_one_role_in_a_row_are_one_turn() -> None:
    said = [("assistant", "I add."), ("tool-call", "Calling tools: add"), ("tool-response", "3"), ("user", "Go on.")]
    messages = [ChatMessage(role=MessageRole(role), content=[{"type": "text", "text": text}]) for role, text in said]
    found = [(each.role, each.content) for each in as_guard_messages(messages)]
    assert found == [("assistant", "I add.\nCalling tools: add"), ("user", "3\nGo on.")]


def test_messages_may_be_mappings() -> None:
    assert guarded("Paris.").generate([{"role": "user", "content": contract.QUESTION}]).content == "Paris."


def test_settings_of_a_call() -> None:
    model = guarded("Paris.", max_tokens=5)
    model.generate([{"role": "user", "content": contract.QUESTION}], ["Observation:"], temperature=0.5)
    expected = {"max_new_tokens": 5, "temperature": 0.5, "stop": ("Observation:",)}
    assert model.guard.model.calls[0][1] == expected  # type: ignore[attr-defined]


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="presence_penalty"):
        guarded("Paris.").generate([{"role": "user", "content": "?"}], presence_penalty=1.0)


def test_an_answer_may_have_to_fit_a_schema() -> None:
    model = guarded("{}")
    asked = {"type": "json_schema", "json_schema": {"name": "thought", "schema": {"type": "object"}}}
    model.generate([{"role": "user", "content": "?"}], response_format=asked)
    assert model.guard.model.calls[0][1]["response_schema"] == {"type": "object"}  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="json_object"):
        model.generate([{"role": "user", "content": "?"}], response_format={"type": "json_object"})


@pytest.mark.parametrize("stream_outputs", [False, True])
def test_an_agent_calls_what_was_let_through(stream_outputs: bool) -> None:
    add = Add()
    model = guarded(contract.CALL, final("471100173"))
    agent = ToolCallingAgent(tools=[add], model=model, verbosity_level=0, stream_outputs=stream_outputs)
    assert agent.run("471100171 + 2?") == "471100173"
    assert add.called == [471100173]
    assert [settings["tool_choice"] for _, settings in model.guard.model.calls] == ["required"] * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream_outputs", [False, True])
def test_an_abstention_ends_the_run_of_an_agent(stream_outputs: bool) -> None:
    add = Add()
    model = guarded(contract.CALL, score=0.9)
    agent = ToolCallingAgent(tools=[add], model=model, verbosity_level=0, stream_outputs=stream_outputs)
    assert agent.run("471100171 + 2?") == "I am not sure enough to answer that."
    assert add.called == []
    assert "471100171," not in repr(agent.memory.get_full_steps())


def test_a_code_agent_runs_what_was_let_through() -> None:
    agent = CodeAgent(tools=[], model=guarded("<code>final_answer(471100171 + 2)</code>"), verbosity_level=0)
    assert agent.run("471100171 + 2?") == 471100173


def test_a_code_agents_run_ends_with_the_error() -> None:
    model = guarded("<code>final_answer(471100171)</code>", score=0.9, on_abstain="error")
    with pytest.raises(AgentGenerationError, match="no answer was let through") as raised:
        CodeAgent(tools=[], model=model, verbosity_level=0).run("471100171 + 2?")
    assert isinstance(raised.value.__cause__, NotAnswered)


# ------------------------------------------------------------------------------------------------------ the check


def checked(*finals: str, max_steps: int = 3) -> tuple[Any, MemorySink]:
    """What an agent of another model says behind a check, and the check's records."""
    sink = MemorySink()
    scorer = ScriptedScorer({"471100173": 0.1, "471100171": 0.9})
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    check = AnswerCheck(Guard(ScriptedModel("unused"), policy=policy, scorer=scorer, audit=sink))
    other = Guard(ScriptedModel([final(each) for each in finals]), policy=Accept(), scorer=ScriptedScorer(0.1))
    agent = ToolCallingAgent(
        tools=[], model=GuardedModel(other), verbosity_level=0, final_answer_checks=[check], max_steps=max_steps
    )
    return agent.run("471100171 + 2?"), sink


def test_a_doubtful_final_answer_goes_back_to_the_agent() -> None:
    answer, sink = checked("471100171", "471100173")
    assert answer == "471100173"
    assert [(each.decision, each.answer) for each in sink.records] == [
        ("abstain", "471100171"),
        ("accept", "471100173"),
    ]
    assert sink.records[0].prompt[0]["content"] == "471100171 + 2?"


def test_so_does_one_with_a_sentence_to_be_marked() -> None:
    """A check cannot change the answer that it passes."""
    scorer = ScriptedScorer(0.1, by_sentence=lambda each: {"mean_nll": 2.0 if "471100171" in each else 0.5})
    check = AnswerCheck(
        Guard(ScriptedModel("unused"), policy=MarkSentences(score="mean_nll", limit=1.0), scorer=scorer)
    )
    memory = AgentMemory("")
    memory.steps.append(TaskStep(task="471100171 + 2?"))
    assert check("471100173", memory)
    with pytest.raises(NotAnswered):
        check("471100171", memory)


def test_the_answer_after_max_steps_passes_no_check() -> None:
    """As it is said in the README: a change of this in smolagents is to be noticed."""
    answer, sink = checked("471100171", "471100173", max_steps=1)
    assert answer == final("471100173")
    assert [each.answer for each in sink.records] == ["471100171"]


def test_the_readme_runs(tmp_path: Path) -> None:
    said = contract.readme_runs("smolagents", tmp_path)
    assert all(
        words in said for words in ["The capital of France is Paris. accept", "I am not sure enough to answer that."]
    )
