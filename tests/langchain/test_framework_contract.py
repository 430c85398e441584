"""GuardedChatModel against the contract of all frameworks, on the real library."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage

from hallucination_guard import Guard
from hallucination_guard_langchain import GuardedChatModel
from hallucination_guard_langchain.convert import KEY

_spec = importlib.util.spec_from_file_location(
    "framework_contract", Path(__file__).parents[1] / "frameworks" / "contract.py"
)
assert _spec is not None and _spec.loader is not None
contract = sys.modules.setdefault("framework_contract", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(contract)


class LangChain:
    def _chat(self, guard: Guard, tools: bool, settings: dict[str, Any]) -> Any:
        chat = GuardedChatModel(guard=guard, **settings)
        return chat.bind_tools([{"type": "function", "function": contract.TOOL}]) if tools else chat

    def _heard(self, message: AIMessage) -> Any:
        return contract.Heard(
            text=message.text,
            calls=[(each["name"], each["args"]) for each in message.tool_calls],
            verdict=message.response_metadata[KEY],
            all=message,
        )

    def ask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        return self._heard(self._chat(guard, tools, settings).invoke(list(turns)))

    async def aask(self, guard: Guard, turns: Any, *, tools: bool = False, **settings: Any) -> Any:
        return self._heard(await self._chat(guard, tools, settings).ainvoke(list(turns)))

    def stream(self, guard: Guard, turns: Any, heard: list[str], *, tools: bool = False, **settings: Any) -> Any:
        chunks = []
        for chunk in self._chat(guard, tools, settings).stream(list(turns)):
            heard.append(chunk.text)
            chunks.append(chunk)
        return self._heard(reduce(add, chunks))

    def show_an_image(self, guard: Guard) -> object:
        return self._chat(guard, False, {}).invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])


@pytest.mark.parametrize("case", contract.CASES)
def test_contract(case: str) -> None:
    check: Callable[[Any], None] = contract.CASES[case]
    check(LangChain())


def test_the_readme_runs(tmp_path: Path) -> None:
    assert contract.readme_runs("langchain", tmp_path).startswith("The capital of France is Paris. 0.")
