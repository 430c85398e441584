"""GuardedLLM against the contract, and what is LlamaIndex's own, on the real library."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, Settings, SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetryQueryEngine
from llama_index.core.tools import FunctionTool

from hallucination_guard import Guard
from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Message
from hallucination_guard_llamaindex import ConfidenceEvaluator, GuardedLLM
from hallucination_guard_llamaindex.convert import as_guard_messages
from hallucination_guard_policies import AbstainBelow, Accept, MarkSentences, RetryBelow

_spec = importlib.util.spec_from_file_location("framework_contract", Path(__file__).parent / "contract.py")
assert _spec is not None and _spec.loader is not None
contract = sys.modules.setdefault("framework_contract", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(contract)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


ADD = FunctionTool.from_defaults(add)


class LlamaIndex:
    def _asked(self, turns: Any, tools: bool) -> dict[str, Any]:
        messages = [ChatMessage(each["content"], role=each["role"]) for each in turns]
        return {"chat_history": messages, "tools": [ADD]} if tools else {"messages": messages}

    def _heard(self, response: ChatResponse) -> Any:
        blocks = response.message.blocks
        assert response.raw["hallucination_guard"] == response.additional_kwargs["hallucination_guard"]
        return contract.Heard(
            text=response.message.content,
            calls=[(each.tool_name, each.tool_kwargs) for each in blocks if isinstance(each, ToolCallBlock)],
            verdict=response.raw["hallucination_guard"],
            all=response,
        )

    def ask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        llm = GuardedLLM(guard, **settings)
        return self._heard((llm.chat_with_tools if tools else llm.chat)(**self._asked(turns, tools)))

    async def aask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        llm = GuardedLLM(guard, **settings)
        return self._heard(await (llm.achat_with_tools if tools else llm.achat)(**self._asked(turns, tools)))

    def stream(self, guard: Guard, turns: Any, heard: list[str], *, tools: bool = False, **settings: Any) -> Any:
        llm = GuardedLLM(guard, **settings)
        last = None
        for last in (llm.stream_chat_with_tools if tools else llm.stream_chat)(**self._asked(turns, tools)):
            heard.append(last.delta or "")
        assert last is not None
        return self._heard(last)

    def show_an_image(self, guard: Guard) -> object:
        image = ImageBlock(image=b"iVBORw0KGgo=", image_mimetype="image/png")
        return GuardedLLM(guard).chat([ChatMessage(role=MessageRole.USER, blocks=[TextBlock(text="What?"), image])])


@pytest.mark.parametrize("case", contract.CASES)
def test_contract(case: str) -> None:
    contract.CASES[case](LlamaIndex())


def guarded(*answers: str, score: float = 0.1, **settings: Any) -> GuardedLLM:
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    return GuardedLLM(Guard(ScriptedModel(list(answers)), policy=policy, scorer=ScriptedScorer(score)), **settings)


def test_a_tools_round_is_read_in_order() -> None:
    call = ToolCallBlock(tool_name="add", tool_kwargs={"a": 1}, tool_call_id="c")
    history = [
        ChatMessage("Be short.", role=MessageRole.DEVELOPER),
        ChatMessage("1 + 1?", role=MessageRole.USER),
        ChatMessage(role=MessageRole.ASSISTANT, blocks=[ThinkingBlock(content="Hm."), TextBlock(text="Wait."), call]),
        ChatMessage("2", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": "c", "name": "add"}),
    ]
    system, asked, called, result = as_guard_messages(history)
    assert (system.role, asked) == ("system", Message(role="user", content="1 + 1?"))
    assert (called.content, called.tool_calls[0].name, dict(called.tool_calls[0].arguments)) == (
        "Wait.",
        "add",
        {"a": 1},
    )
    assert (result.role, result.content, result.tool_call_id, result.name) == ("tool", "2", "c", "add")


def test_calls_where_older_versions_keep_them() -> None:
    plain = {"id": "c", "function": {"name": "add", "arguments": "{}"}}
    [message] = as_guard_messages(
        [ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [plain]})]
    )
    assert message.tool_calls[0].name == "add"


@pytest.mark.parametrize("way", ["complete", "stream_complete"])
def test_a_completion_is_a_conversation_of_one_turn(way: str) -> None:
    llm = guarded("Paris.")
    found = getattr(llm, way)(contract.QUESTION)
    response = found if way == "complete" else list(found)[-1]
    assert (response.text, response.raw["hallucination_guard"]["decision"]) == ("Paris.", "accept")
    assert llm.guard.model.calls[0][0] == (Message(role="user", content=contract.QUESTION),)  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["acomplete", "astream_complete"])
async def test_a_completion_awaited(way: str) -> None:
    found = await getattr(guarded("Paris."), way)(contract.QUESTION)
    response = found if way == "acomplete" else [each async for each in found][-1]
    assert response.text == "Paris."


async def test_a_stream_awaited() -> None:
    chunks = [each async for each in await guarded("Paris.").astream_chat([ChatMessage(contract.QUESTION)])]
    assert [each.delta for each in chunks] == ["Paris."]


def test_settings_of_a_call() -> None:
    llm = guarded("Paris.")
    llm.complete(contract.QUESTION, max_tokens=5, temperature=0.5)
    assert llm.guard.model.calls[0][1] == {"max_new_tokens": 5, "temperature": 0.5}  # type: ignore[attr-defined]


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="presence_penalty"):
        guarded("Paris.").complete(contract.QUESTION, presence_penalty=1.0)


def test_a_query_engine_says_what_was_decided() -> None:
    index = SummaryIndex.from_documents([Document(text="The capital of France is Paris.")])
    assert str(index.as_query_engine(llm=guarded("Paris.")).query(contract.QUESTION)) == "Paris."
    assert str(index.as_query_engine(llm=guarded(contract.DRAFT, score=0.9)).query(contract.QUESTION)).startswith(
        "I am"
    )


def test_no_event_handler_hears_a_draft() -> None:
    heard: list[str] = []

    class Listener(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            heard.append(repr(event))

    root = get_dispatcher()
    listener = Listener()
    root.add_event_handler(listener)
    try:
        policy = RetryBelow(score="hybridgrad", limit=0.5)
        model = ScriptedModel([contract.DRAFT, "Paris."])
        llm = GuardedLLM(Guard(model, policy=policy, scorer=ScriptedScorer([0.9, 0.1])))
        llm.chat([ChatMessage(contract.QUESTION)])
    finally:
        root.event_handlers.remove(listener)
    assert any("Paris." in each for each in heard)
    assert not any(contract.DRAFT in each for each in heard)


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")  # of LlamaIndex's agents
@pytest.mark.parametrize("score", [0.1, 0.9])
async def test_an_agent_calls_what_was_let_through(score: float) -> None:
    called: list[int] = []

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        called.append(a + b)
        return a + b

    model = ScriptedModel([contract.CALL, "471100173."])
    scorer = ScriptedScorer({contract.CALL: score, "471100173.": 0.1})
    guard = Guard(model, policy=AbstainBelow(score="hybridgrad", limit=0.5), scorer=scorer)
    answer = await FunctionAgent(llm=GuardedLLM(guard), tools=[FunctionTool.from_defaults(add)]).run("471100171 + 2?")
    assert called == ([471100173] if score < 0.5 else [])
    assert str(answer) == ("471100173." if score < 0.5 else "I am not sure enough to answer that.")


def test_a_required_call_that_was_not_let_through_is_an_error() -> None:
    with pytest.raises(InputError, match="no call was let through"):
        guarded(contract.CALL, score=0.9).predict_and_call([ADD], "471100171 + 2?")


def test_a_copy_abstains_in_its_own_words() -> None:
    llm = guarded(contract.DRAFT, score=0.9).model_copy(update={"abstention": "Pass."})
    assert llm.complete(contract.QUESTION).text == "Pass."


def test_the_weights_are_not_among_the_fields() -> None:
    llm = guarded("Paris.")
    assert "guard" not in llm.to_dict()
    assert "guard=" not in repr(llm)


# -------------------------------------------------------------------------------------------------- the evaluator


def evaluator(score: float | str, **settings: Any) -> tuple[ConfidenceEvaluator, MemorySink]:
    sink = MemorySink()
    policy = AbstainBelow(score="hybridgrad", limit=0.5)
    guard = Guard(ScriptedModel("unused"), policy=policy, scorer=ScriptedScorer(score), audit=sink)
    return ConfidenceEvaluator(guard, **settings), sink


@pytest.mark.parametrize(("score", "passing"), [(0.1, True), (0.9, False)])
def test_an_answer_passes_if_the_policy_accepts_it(score: float, passing: bool) -> None:
    judge, sink = evaluator(score)
    result = judge.evaluate(query=contract.QUESTION, response="Paris.", contexts=["France: {Paris}"])
    assert (result.passing, result.invalid_result) == (passing, False)
    assert sink.records[0].prompt[0]["content"] == f"[1] France: {{Paris}}\n\n{contract.QUESTION}"
    assert sink.records[0].answer == "Paris."


@pytest.mark.parametrize(("limit", "passing"), [(1.0, False), (3.0, True)])
def test_an_answer_with_a_sentence_to_be_marked_does_not_pass(limit: float, passing: bool) -> None:
    scorer = ScriptedScorer(0.1, by_sentence=lambda each: {"mean_nll": 2.0})
    guard = Guard(ScriptedModel("unused"), policy=MarkSentences(score="mean_nll", limit=limit), scorer=scorer)
    assert ConfidenceEvaluator(guard).evaluate(query=contract.QUESTION, response="Paris.").passing is passing


def test_an_answer_that_has_no_score_is_invalid_and_does_not_pass() -> None:
    result = evaluator("nothing to measure")[0].evaluate(query=contract.QUESTION, response="Paris.")
    assert (result.passing, result.invalid_result, result.invalid_reason) == (False, True, "nothing to measure")


async def test_an_evaluation_is_awaited() -> None:
    assert (await evaluator(0.9)[0].aevaluate(query=contract.QUESTION, response=contract.DRAFT)).passing is False


def test_an_answer_is_needed() -> None:
    with pytest.raises(InputError, match="response"):
        evaluator(0.1)[0].evaluate(query=contract.QUESTION)


def test_a_retrying_query_engine_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", MockLLM())  # the engine looks for one and does not ask it
    index = SummaryIndex.from_documents([Document(text="The capital of France is Paris.")])
    judge = ConfidenceEvaluator(
        Guard(
            ScriptedModel("unused"),
            policy=AbstainBelow(score="hybridgrad", limit=0.5),
            scorer=ScriptedScorer({contract.DRAFT: 0.9, "Paris.": 0.1}),
        )
    )
    guard = Guard(ScriptedModel([contract.DRAFT, "Paris."]), policy=Accept(), scorer=ScriptedScorer(0.1))
    engine = RetryQueryEngine(index.as_query_engine(llm=GuardedLLM(guard)), judge, max_retries=1)
    assert str(engine.query(contract.QUESTION)) == "Paris."


def test_the_readme_runs(tmp_path: Path) -> None:
    said = contract.readme_runs("llamaindex", tmp_path)
    assert all(words in said for words in ["The capital of France is Paris. 0.", "Biscuit"])
