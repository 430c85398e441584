"""The server behind LiteLLM as a provider, with LiteLLM's own SDK: what it passes on of verdicts and refusals."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litellm
import pytest

_spec = importlib.util.spec_from_file_location("served", Path(__file__).parents[1] / "server" / "conftest.py")
assert _spec is not None and _spec.loader is not None
served = sys.modules.setdefault("served", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(served)

# Of LiteLLM's own making: pydantic on its types, and clients that it leaves to the end of the process.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:pydantic", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)

GOOD, BAD, BROKEN, CALLS = "Where is Lyon?", "Where is Atlantis?", "Where is half of it?", "How is the weather in Lyon?"
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with served.serving() as running:
        yield running
    with warnings.catch_warnings():  # LiteLLM leaves an event loop open
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.set_event_loop(None)
        gc.collect()


@pytest.fixture
def ask(server: Any) -> Any:
    def asked(question: str, **more: Any) -> Any:
        return litellm.completion(
            model="openai/m",
            api_base=f"{server.url}/v1",
            api_key="none",
            messages=[{"role": "user", "content": question}],
            num_retries=0,
            **more,
        )

    return asked


def test_an_answer_comes_with_its_verdict(ask: Any, server: Any) -> None:
    reply = ask(GOOD)
    [choice] = reply.choices
    assert (choice.message.content, choice.finish_reason) == ("Lyon is a city. It lies in France.", "stop")
    verdict = reply.model_extra["hallucination_guard"]
    assert verdict["decision"] == "accept"
    assert verdict["record"] in [record.id for record in server.sink.records]
    assert choice.logprobs.model_extra["hallucination_guard"] == verdict


def test_an_abstention_has_no_content_and_says_so(ask: Any) -> None:
    reply = ask(BAD)
    [choice] = reply.choices
    assert (choice.message.content, choice.finish_reason) == (None, "content_filter")
    assert reply.model_extra["hallucination_guard"]["decision"] == "abstain"
    assert "Atlantis" not in str(reply.model_dump())


def test_a_stream_has_what_was_let_through_and_the_verdict_in_logprobs(ask: Any) -> None:
    chunks = list(ask(GOOD, stream=True))
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == "Lyon is a city. It lies in France."
    assert [each.choices[0].finish_reason for each in chunks if each.choices[0].finish_reason] == ["stop"]
    [verdict] = _verdicts(chunks)
    assert verdict["decision"] == "accept"


def test_a_stream_that_is_not_let_through_to_its_end_stops_there(ask: Any) -> None:
    chunks = list(ask(BROKEN, stream=True))
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == "Half is known. "
    assert [each.choices[0].finish_reason for each in chunks if each.choices[0].finish_reason] == ["content_filter"]
    assert _verdicts(chunks)[-1]["decision"] == "abstain"
    assert "Atlantis" not in str([each.model_dump() for each in chunks])


def test_it_is_the_same_from_a_task(server: Any) -> None:
    asked = litellm.acompletion(
        model="openai/m",
        api_base=f"{server.url}/v1",
        api_key="none",
        messages=[{"role": "user", "content": BAD}],
        num_retries=0,
    )
    [choice] = asyncio.run(asked).choices
    assert (choice.message.content, choice.finish_reason) == (None, "content_filter")


def test_calls_of_tools_come_through(ask: Any) -> None:
    [choice] = ask(CALLS, tools=[TOOL]).choices
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Lyon"}')
    assert choice.finish_reason == "tool_calls"


def test_what_the_server_refuses_is_an_error(ask: Any) -> None:
    with pytest.raises(litellm.BadRequestError, match="only empty"):
        ask(GOOD, logit_bias={"5": 10})


def _verdicts(chunks: list[Any]) -> list[dict[str, Any]]:
    """Those of whole answers, where LiteLLM keeps them in a stream: top-level fields it drops or keeps by version."""
    logprobs = [each.model_dump()["choices"][0].get("logprobs") for each in chunks]
    return [each["hallucination_guard"] for each in logprobs if each]
