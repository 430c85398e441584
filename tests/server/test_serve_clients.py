"""Stock clients against a real server on the loopback: what they get, and what of the verdict they keep."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from hallucination_guard.guard import ABSTENTION
from hallucination_guard_langchain import VerdictChatOpenAI

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
GOOD, BAD, BROKEN, CALLS = "Where is Lyon?", "Where is Atlantis?", "Where is half of it?", "How is the weather in Lyon?"


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, question: str, **more: Any) -> Any:
    return client.chat.completions.create(model="m", messages=[{"role": "user", "content": question}], **more)


def test_an_answer_that_is_let_through_comes_with_its_verdict(client: openai.OpenAI, server: Any) -> None:
    reply = ask(client, GOOD)
    [choice] = reply.choices
    assert (choice.message.content, choice.message.refusal, choice.finish_reason) == (
        "Lyon is a city. It lies in France.",
        None,
        "stop",
    )
    verdict = reply.model_extra["hallucination_guard"]
    assert verdict["decision"] == "accept" and verdict["scores"] == {"hybridgrad": 0.1}
    assert verdict["record"] in [record.id for record in server.sink.records]
    assert (
        reply.usage.model_extra["hallucination_guard"] == choice.logprobs.model_extra["hallucination_guard"] == verdict
    )


def test_an_answer_that_is_not_let_through_is_a_refusal_without_content(client: openai.OpenAI) -> None:
    reply = ask(client, BAD)
    [choice] = reply.choices
    assert (choice.message.content, choice.message.refusal, choice.finish_reason) == (
        None,
        ABSTENTION,
        "content_filter",
    )
    assert reply.model_extra["hallucination_guard"]["decision"] == "abstain"
    assert "Atlantis" not in reply.model_dump_json()


def test_an_abstention_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    message = ask(client, BAD).choices[0].message.model_dump(exclude_unset=True)
    turns = [{"role": "user", "content": BAD}, message, {"role": "user", "content": GOOD}]
    assert client.chat.completions.create(model="m", messages=turns).choices[0].finish_reason == "stop"


def test_a_stream_gives_each_sentence_after_its_record(client: openai.OpenAI, server: Any) -> None:
    chunks = list(ask(client, GOOD, stream=True, stream_options={"include_usage": True}))
    said = [each.choices[0].delta.content for each in chunks if each.choices and each.choices[0].delta.content]
    assert said == ["Lyon is a city. ", "It lies in France."]
    records = [record.id for record in server.sink.records]
    released = [each.model_extra["hallucination_guard"]["record"] for each in chunks[1:3]]
    assert set(released) <= set(records) and None not in released
    last = next(each for each in chunks if each.choices and each.choices[0].finish_reason)
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].logprobs.model_extra["hallucination_guard"]["decision"] == "accept"
    assert chunks[-1].usage.model_extra["hallucination_guard"]["decision"] == "accept"


def test_a_stream_that_is_not_let_through_has_no_text(client: openai.OpenAI) -> None:
    chunks = list(ask(client, BAD, stream=True))
    assert not any(each.choices[0].delta.content for each in chunks)
    assert [each.choices[0].delta.refusal for each in chunks if each.choices[0].delta.refusal] == [ABSTENTION]
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_a_stream_that_turns_doubtful_keeps_what_was_let_through_and_no_more(client: openai.OpenAI) -> None:
    chunks = list(ask(client, BROKEN, stream=True))
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == "Half is known. "
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_calls_of_tools_come_whole(client: openai.OpenAI) -> None:
    [choice] = ask(client, CALLS, tools=[TOOL]).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Lyon"})
    assert call.id


def test_calls_of_tools_come_in_a_stream(client: openai.OpenAI) -> None:
    chunks = list(ask(client, CALLS, tools=[TOOL], stream=True))
    [call] = [each.choices[0].delta.tool_calls[0] for each in chunks if each.choices[0].delta.tool_calls]
    assert call.function.name == "weather" and chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_the_asynchronous_client_gets_the_same(server: Any) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        turns: Any = [{"role": "user", "content": GOOD}]
        whole = await client.chat.completions.create(model="m", messages=turns)
        stream = await client.chat.completions.create(model="m", messages=turns, stream=True)
        text = "".join([each.choices[0].delta.content or "" async for each in stream])
    assert text == whole.choices[0].message.content == "Lyon is a city. It lies in France."


def test_text_completions_are_guarded_as_well(client: openai.OpenAI) -> None:
    assert client.completions.create(model="m", prompt=GOOD).choices[0].text == "Lyon is a city. It lies in France."
    refused = client.completions.create(model="m", prompt=BAD)
    assert (refused.choices[0].text, refused.choices[0].finish_reason) == ("", "content_filter")
    streamed = list(client.completions.create(model="m", prompt=GOOD, stream=True))
    assert "".join(each.choices[0].text for each in streamed) == "Lyon is a city. It lies in France."


def test_the_aliases_are_the_models(client: openai.OpenAI) -> None:
    assert "m" in [each.id for each in client.models.list()]


def langchain(server: Any, kind: Any = ChatOpenAI, **more: Any) -> Any:
    return kind(model="m", base_url=server.url + "/v1", api_key="none", max_retries=0, **more)


def test_langchain_keeps_the_verdict_where_it_is_mirrored(server: Any) -> None:
    whole = langchain(server).invoke(GOOD)
    assert whole.response_metadata["token_usage"]["hallucination_guard"]["decision"] == "accept"
    assert whole.response_metadata["logprobs"]["hallucination_guard"]["decision"] == "accept"
    streamed = None
    for chunk in langchain(server).stream(GOOD):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.text == whole.text
    assert streamed.response_metadata["logprobs"]["hallucination_guard"]["decision"] == "accept"


def test_langchain_reads_an_abstention_as_a_refusal(server: Any) -> None:
    refused = langchain(server).invoke(BAD)
    assert refused.content == "" and refused.additional_kwargs["refusal"] == ABSTENTION
    assert refused.response_metadata["finish_reason"] == "content_filter"
    chunks = list(langchain(server).stream(BAD))
    assert "".join(str(each.text) for each in chunks) == ""


def test_the_subclass_keeps_the_verdict_as_the_guarded_chat_model_does(server: Any) -> None:
    model = langchain(server, VerdictChatOpenAI)
    assert model.invoke(BAD).response_metadata["hallucination_guard"]["decision"] == "abstain"
    streamed = None
    for chunk in model.stream(BAD):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.response_metadata["hallucination_guard"]["decision"] == "abstain"
    assert streamed.additional_kwargs["refusal"] == ABSTENTION


@pytest.mark.parametrize("kind", [ChatOpenAI, VerdictChatOpenAI])
def test_an_agent_calls_a_tool_and_answers(server: Any, kind: Any) -> None:
    asked = []

    @tool
    def weather(city: str) -> str:
        """How the weather is."""
        asked.append(city)
        return "sunny"

    agent = create_agent(langchain(server, kind), [weather])
    told = agent.invoke({"messages": [{"role": "user", "content": CALLS}]})["messages"][-1]
    assert asked == ["Lyon"] and told.content == "It is sunny."
    assert told.response_metadata["logprobs"]["hallucination_guard"]["decision"] == "accept"


def test_curl_reads_a_stream(server: Any) -> None:
    body = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": GOOD}]})
    ran = subprocess.run(
        ["curl", "-sN", server.url + "/v1/chat/completions", "-H", "content-type: application/json", "-d", body],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    lines = [line.removeprefix("data: ") for line in ran.stdout.splitlines() if line]
    assert lines[-1] == "[DONE]"
    parts = [json.loads(line) for line in lines[:-1]]
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in parts) == (
        "Lyon is a city. It lies in France."
    )
