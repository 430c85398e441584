"""langchain-tests' own suites: GuardedChatModel is a chat model like any other."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from hallucination_guard import Guard, WhiteBoxModel
from hallucination_guard.testing import MemorySink, tiny_model, tiny_tokenizer
from hallucination_guard_langchain import GuardedChatModel
from hallucination_guard_policies import Accept


class _Setup:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return GuardedChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # A random model says nothing sensible: what is tested is the interface, so all that is scored may pass.
        white = WhiteBoxModel(tiny_model(), tiny_tokenizer(), name="tiny")
        sampled = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}
        guard = Guard(white, policy=Accept(), audit=MemorySink(), generation=sampled)
        return {"guard": guard, "model": "tiny"}


class TestUnit(_Setup, ChatModelUnitTests):
    pass


class TestIntegration(_Setup, ChatModelIntegrationTests):
    has_tool_calling = property(lambda self: False)  # a random tiny model cannot call tools
    has_tool_choice = property(lambda self: False)
    has_structured_output = property(lambda self: False)
    model_override_value = property(lambda self: "tiny-2")


_LOADED: list[WhiteBoxModel] = []


class _Brief(GuardedChatModel):
    """Cuts short what is not under the grammar: there the interface is tested, not what the model says."""

    def _settings(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Any:
        asked: dict[str, Any] = {**super()._settings(stop, kwargs)}
        return asked if {"tools", "response_schema"} & asked.keys() else {"max_new_tokens": 12, **asked}


class _Real(_Setup):
    """SmolLM2 under the grammar: it is loaded once, by the first test that needs it."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return _Brief

    settings: ClassVar[dict[str, Any]] = {"max_new_tokens": 64}

    @property
    def chat_model_params(self) -> dict[str, Any]:
        if not _LOADED:
            _LOADED.append(WhiteBoxModel.demo())
        guard = Guard(_LOADED[0], policy=Accept(), audit=MemorySink(), generation=self.settings)  # type: ignore[typeddict-item]
        return {"guard": guard, "model": "smollm2"}


class TestTools(_Real, ChatModelIntegrationTests):
    has_structured_output = property(lambda self: False)  # below
    model_override_value = property(lambda self: "smollm2-2")

    @pytest.mark.xfail(reason="SmolLM2-135M was not taught tools: it calls one where a call is demanded, and only then")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)


class TestStructured(_Real, ChatModelIntegrationTests):
    # Greedily it repeats itself inside a string until it is cut, and what was cut is refused.
    settings: ClassVar[dict[str, Any]] = {"max_new_tokens": 160, "temperature": 1.3, "seed": 0}
    has_tool_calling = property(lambda self: False)  # above
    has_tool_choice = property(lambda self: False)
    has_structured_output = property(lambda self: True)
    model_override_value = property(lambda self: "smollm2-2")


class TestRealUnit(_Real, ChatModelUnitTests):
    pass
