from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.testing import MemorySink, tiny_model, tiny_tokenizer
from hallucination_guard.values import Policy
from hallucination_guard_langchain import GuardedChatModel
from hallucination_guard_policies import AbstainBelow, Accept

NEVER = {"score": "hybridgrad", "limit": -1.0}  # no answer is so certain


@pytest.fixture(scope="session")
def white() -> WhiteBoxModel:
    """A random model that speaks in letters only, so that its drafts can be searched for in anything printed."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    letters = [tokenizer.convert_tokens_to_ids(each) for each in "abcdefghijklmnopqrstuvwxyz"]
    head = model.lm_head.weight.data
    loud = head[letters] * 8
    head.zero_()
    head[letters] = loud
    return WhiteBoxModel(model, tokenizer, name="tiny")


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
def guard(white: WhiteBoxModel, sink: MemorySink) -> Callable[..., Guard]:
    """A guard that abstains from everything, or does what another policy says."""

    def make(policy: Policy | None = None, **settings: Any) -> Guard:
        generation = {"max_new_tokens": 16, "temperature": 1.0, "seed": 1, **settings}
        return Guard(white, policy=policy or AbstainBelow(**NEVER), audit=sink, generation=generation)

    return make


@pytest.fixture
def guarded(guard: Callable[..., Guard]) -> Callable[..., GuardedChatModel]:
    """The same as a chat model."""

    def make(policy: Policy | None = None, **settings: Any) -> GuardedChatModel:
        return GuardedChatModel(guard=guard(policy), **settings)

    return make


@pytest.fixture
def open_model(guarded: Callable[..., GuardedChatModel]) -> GuardedChatModel:
    """A guarded model that lets everything through."""
    return guarded(Accept())


class Listener(BaseCallbackHandler):
    """Writes down all that any callback is told."""

    raise_error = True

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def hear(*args: Any, **kwargs: Any) -> None:
            self.events.append(name)
            self.heard.append(f"{args!r} {kwargs!r} {[vars(each) for each in args if hasattr(each, '__dict__')]!r}")

        return hear


@pytest.fixture
def listener() -> Listener:
    return Listener()
