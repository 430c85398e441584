"""Tools: what a model may call, and the calls that it, or an earlier turn of a conversation, made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

from hallucination_guard.errors import InputError
from hallucination_guard.values.plain import JSON, FrozenDict

__all__ = ["Tool", "ToolCall", "ToolChoice", "WrittenCall", "as_tools", "tool_choice_of"]

ToolChoice: TypeAlias = str
"""``auto``, ``required``, ``none``, or the name of the tool that is to be called."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")  # what the chat APIs allow


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """What a model may call.

    Args:
        name: letters, digits, ``_`` and ``-``, at most 64.
        description: what it does, for the model.
        parameters: JSON Schema of its arguments, an object's.

    Raises:
        InputError: on a name or a schema that cannot be.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, JSON] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.match(self.name):
            raise InputError(f"a tool is named {self.name!r}", hint="letters, digits, '_' and '-', at most 64")
        if not isinstance(self.description, str):
            raise InputError(f"the tool {self.name!r} has the description {self.description!r}", hint="give a text")
        schema = _plain(self.parameters, f"the parameters of the tool {self.name!r}")
        if schema.get("type", "object") != "object":
            raise InputError(
                f"the parameters of the tool {self.name!r} have the type {schema['type']!r}",
                hint="give the JSON Schema of an object",
            )
        object.__setattr__(self, "parameters", FrozenDict({"type": "object", **schema}))

    @classmethod
    def of(cls, given: object) -> Self:
        """A tool from what the chat APIs call one: ``{"type": "function", "function": {…}}``, or the inner part.

        Raises:
            InputError: if it is none.
        """
        if isinstance(given, cls):
            return given
        inner = given.get("function", given) if isinstance(given, Mapping) else None
        if not isinstance(inner, Mapping) or "name" not in inner:
            raise InputError(
                f"a tool is a {type(given).__name__}", hint="give a Tool, or a mapping with name and parameters"
            )
        return cls(
            name=inner["name"],
            description=inner.get("description") or "",
            parameters=inner.get("parameters") or {"properties": {}},
        )

    def to_json_dict(self) -> dict[str, JSON]:
        """As the chat APIs, and chat templates, write it."""
        function: dict[str, JSON] = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool.

    Args:
        name: of the tool.
        arguments: by name.
        id: by which its result names it.

    Raises:
        InputError: on anything else.
    """

    name: str
    arguments: Mapping[str, JSON]
    id: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not isinstance(self.id, str):
            raise InputError(f"a tool call has the name {self.name!r} and the id {self.id!r}", hint="give texts")
        object.__setattr__(
            self, "arguments", FrozenDict(_plain(self.arguments, f"the arguments of a call of {self.name!r}"))
        )

    @classmethod
    def of(cls, given: object) -> Self:
        """A call from what the chat APIs call one, or LangChain.

        Raises:
            InputError: if it is none.
        """
        if isinstance(given, cls):
            return given
        inner = given.get("function", given) if isinstance(given, Mapping) else None
        if not isinstance(given, Mapping) or not isinstance(inner, Mapping):
            raise InputError(f"a tool call is a {type(given).__name__}", hint="give a ToolCall, or a mapping")
        arguments = inner.get("arguments", inner.get("args", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None  # refused below
        return cls(name=inner.get("name", ""), arguments=arguments, id=given.get("id") or "")

    def to_json_dict(self, *, as_text: bool = True) -> dict[str, JSON]:
        """As the chat APIs write it: the arguments as a JSON text. Chat templates want them as they are."""
        arguments: JSON = json.dumps(self.arguments, ensure_ascii=False) if as_text else dict(self.arguments)
        called: dict[str, JSON] = {"id": self.id} if self.id else {}
        return called | {"type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenCall:
    """A call, and where in the answer's text it is written.

    Args:
        call: what is called.
        start: its first character, marks of the format included.
        stop: the character after its last.
        arguments: where the value of each argument is written, (start, stop) in characters.
    """

    call: ToolCall
    start: int
    stop: int
    arguments: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", FrozenDict(self.arguments))


def as_tools(given: Sequence[object]) -> tuple[Tool, ...]:
    """Tools from what a caller gave.

    Raises:
        InputError: if one is none, or two have one name.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise InputError(f"the tools are a {type(given).__name__}", hint="give a list of tools")
    tools = tuple(Tool.of(each) for each in given)
    names = [each.name for each in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two tools are named {twice[0]!r}", hint="name them apart")
    return tools


def tool_choice_of(given: object) -> str:
    """``tool_choice`` in the guard's words; frameworks and chat APIs have several.

    Raises:
        InputError: if it is none of them.
    """
    if isinstance(given, Mapping):
        function = given.get("function", given)
        given = function.get("name") if isinstance(function, Mapping) else function
        if not isinstance(given, str):
            raise InputError(f"tool_choice names {given!r}", hint="auto, none, required, or the name of a tool")
    if given is None or given is False:
        return "auto"
    if given is True or given == "any":
        return "required"
    if not isinstance(given, str):
        raise InputError(f"tool_choice is {given!r}", hint="auto, none, required, or the name of a tool")
    return given


def _plain(given: object, what: str) -> dict[str, Any]:
    """A copy that nobody else holds.

    Raises:
        InputError: if it is no JSON object.
    """
    try:
        copied = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        copied = None
    if not isinstance(copied, dict):
        raise InputError(f"{what} are {repr(given)[:60]}", hint="give a JSON object")
    return copied
