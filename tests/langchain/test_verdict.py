"""What a guarded message carries besides its text: the verdict as plain JSON, and tokens that were really spent."""

from __future__ import annotations

import json
from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from hallucination_guard.testing import MemorySink
from hallucination_guard.values import Passage
from hallucination_guard_langchain.convert import KEY
from hallucination_guard_policies import AbstainBelow, Accept, EscalateBelow, RetrieveBelow, RetryBelow

NEVER: dict[str, Any] = {"score": "hybridgrad", "limit": -1.0}
POLICIES = {
    "accept": Accept(),
    "abstain": AbstainBelow(**NEVER),
    "retry": RetryBelow(**NEVER, times=2) | AbstainBelow(**NEVER),
    "retrieve": RetrieveBelow(**NEVER, retriever=lambda _: [Passage(id="a.txt", text="A")]) | AbstainBelow(**NEVER),
    "escalate": EscalateBelow(**NEVER, to=lambda _: "She wrote a program."),
    "hand_over": EscalateBelow(**NEVER, to=None),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_verdict_is_plain_json(name: str, guarded: Any) -> None:
    verdict = guarded(POLICIES[name]).invoke("Who was Ada?").response_metadata[KEY]
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict


def test_the_verdict_names_its_audit_records(guarded: Any, sink: MemorySink) -> None:
    verdict = guarded(POLICIES["retry"]).invoke("Who was Ada?").response_metadata[KEY]
    assert verdict["audit_ids"] == [record.id for record in sink.records]


def test_the_scores_are_floats(open_model: Any) -> None:
    verdict = open_model.invoke("Who was Ada?").response_metadata[KEY]
    assert verdict["scores"] and {type(value) for value in verdict["scores"].values()} == {float}


def test_exactly_one_chunk_carries_the_verdict(open_model: Any) -> None:
    chunks = list(open_model.stream("Who was Ada?"))
    assert [KEY in chunk.response_metadata for chunk in chunks].count(True) == 1


def test_the_verdict_survives_the_merging_of_chunks(open_model: Any) -> None:
    chunks = [AIMessageChunk(content="", id="a"), *open_model.stream("Who was Ada?"), AIMessageChunk(content="")]
    carried = next(chunk.response_metadata[KEY] for chunk in chunks if KEY in chunk.response_metadata)
    assert reduce(add, chunks).response_metadata[KEY] == carried


def test_a_stream_says_what_an_invocation_says(open_model: Any) -> None:
    whole = reduce(add, open_model.stream("Who was Ada?"))
    told = open_model.invoke("Who was Ada?")
    assert (whole.content, whole.usage_metadata, whole.response_metadata["model_name"]) == (
        told.content,
        told.usage_metadata,
        told.response_metadata["model_name"],
    )


@pytest.mark.parametrize("name", ["accept", "retry", "retrieve"])
def test_usage_counts_the_tokens_of_every_attempt(name: str, guarded: Any, sink: MemorySink) -> None:
    usage = guarded(POLICIES[name]).invoke("Who was Ada?").usage_metadata
    spent = [sum(record.tokens[kind] for record in sink.records) for kind in ("in", "out")]
    assert usage == {"input_tokens": spent[0], "output_tokens": spent[1], "total_tokens": sum(spent)}


def test_a_strict_checkpoint_gives_the_message_back_as_it_was(guarded: Any) -> None:
    message = guarded(POLICIES["retry"]).invoke("Who was Ada?")
    strict = JsonPlusSerializer(allowed_msgpack_modules=None)  # what LANGGRAPH_STRICT_MSGPACK=true stands for
    assert strict.loads_typed(strict.dumps_typed(message)) == message
