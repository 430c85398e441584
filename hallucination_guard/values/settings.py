"""How an answer is drawn, as one frozen value; what comes from outside is checked by pydantic at the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.values.plain import JSON
from hallucination_guard.values.tools import Tool, ToolChoice, as_tools, tool_choice_of

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["DRAWN", "Drawing", "GenerationOptions", "GenerationSettings", "Offered", "options_of"]


class Drawing(TypedDict, total=False):
    """The keywords of ``model.generate`` that say how tokens are drawn."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[str]
    tools: Sequence[Tool | Mapping[str, object]]
    tool_choice: ToolChoice
    strict_tools: bool
    response_schema: Mapping[str, JSON]


DRAWN = Drawing(max_new_tokens=64, temperature=0.0, top_p=1.0, seed=0, stop=())
"""How an answer is drawn where nothing was said."""


class Offered(TypedDict, total=False):
    """The keywords of ``model.prompt`` and ``model.read`` that stand in the prompt beside the turns."""

    tools: Sequence[Tool | Mapping[str, object]]
    response_schema: Mapping[str, JSON]


class GenerationOptions(Drawing, total=False):
    """The keywords of a guarded call that say how its answers are generated."""

    question: str | None


_CALLED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "stop_sequences": "stop"}


def options_of(given: Mapping[str, object]) -> GenerationOptions:
    """The keywords of a guarded call from what frameworks call them.

    What is None, or chooses among no tools, is left out. Names that are unknown are left in: the guard refuses them.

    Raises:
        InputError: if one setting was given under two names, or ``tool_choice`` is none.
    """
    options: dict[str, object] = {}
    for name, value in given.items():
        ours = _CALLED.get(name, name)
        if value is None:
            continue
        if ours in options:
            raise InputError(f"{ours} was given twice, the second time as {name}", hint="give it once")
        options[ours] = value
    if not options.get("tools"):
        options.pop("tools", None)
        options.pop("tool_choice", None)
    elif "tool_choice" in options:
        options["tool_choice"] = tool_choice_of(options["tool_choice"])
    return cast("GenerationOptions", options)


_Positive = Annotated[int, Ge(1), Lt(2**31)]
_Finite = Annotated[float, Ge(0.0), Lt(float("inf"))]
_Share = Annotated[float, Gt(0.0), Le(1.0)]
_Seed = Annotated[int, Ge(0), Lt(2**63)]
_Text = Annotated[str, MinLen(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What a caller said about generating; None where nothing was said, so that the model's default holds.

    Args:
        max_new_tokens: the answer's length at most, in tokens.
        temperature: 0 is greedy.
        top_p: nucleus of sampling, in (0, 1].
        seed: of sampling.
        stop: texts that end the answer; they are not part of it.
        tools: what the answer may call.
        tool_choice: ``auto``, ``required``, ``none``, or the name of the tool to be called.
        strict_tools: whether a call, once begun, can only be written as its schema says. What ``tool_choice`` demands
            always is. It needs the extra ``grammar``.
        response_schema: JSON Schema of the answer, which then can only be JSON that fits. It needs the extra
            ``grammar``.
        question: on a model without a chat template, the part of the prompt whose last token is t*.
    """

    max_new_tokens: _Positive | None = None
    temperature: _Finite | None = None
    top_p: _Share | None = None
    seed: _Seed | None = None
    stop: tuple[_Text, ...] | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: _Text | None = None
    strict_tools: bool | None = None
    response_schema: Mapping[str, Any] | None = None
    question: str | None = None

    @classmethod
    def of(cls, given: GenerationSettings | Mapping[str, object]) -> GenerationSettings:
        """Settings from what a caller gave.

        Raises:
            ConfigurationError: on a name that is no setting.
            InputError: on a value that a setting cannot have.
        """
        if isinstance(given, GenerationSettings):
            return given
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(given) - known, key=str):
            raise ConfigurationError(
                f"unknown generation settings {unknown!r}", hint=f"known are {', '.join(sorted(known))}"
            )
        plain = dict(given)
        if isinstance(plain.get("stop"), list):
            plain["stop"] = tuple(plain["stop"])  # type: ignore[arg-type]  # a list it is
        tools, schema = plain.pop("tools", None), plain.pop("response_schema", None)
        made = _checked(plain)
        if tools is not None:
            made = replace(made, tools=as_tools(tools))  # type: ignore[arg-type]  # as_tools refuses what is no list
        if schema is not None:
            made = replace(made, response_schema=Tool(name="response", parameters=schema).parameters)  # type: ignore[arg-type]
        return made._consistent()

    def _consistent(self) -> GenerationSettings:
        names = [each.name for each in self.tools or ()]
        free = (None, "auto", "none", *(["required"] if names else []))
        if self.tool_choice not in (*free, *names):
            raise InputError(
                f"tool_choice is {self.tool_choice!r} and the tools are {names!r}",
                hint="auto, required, none, or the name of a tool",
            )
        if names and self.response_schema is not None:
            raise InputError("tools and a response schema were given", hint="give one of them")
        return self

    def over(self, default: GenerationSettings) -> GenerationSettings:
        """These settings where they say something, and ``default`` where they do not."""
        said = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}
        return replace(default, **said)._consistent()

    @property
    def drawing(self) -> Drawing:
        """What was said, as keywords of ``model.generate``, without the question."""
        drawing = Drawing()
        if self.max_new_tokens is not None:
            drawing["max_new_tokens"] = self.max_new_tokens
        if self.temperature is not None:
            drawing["temperature"] = self.temperature
        if self.top_p is not None:
            drawing["top_p"] = self.top_p
        if self.seed is not None:
            drawing["seed"] = self.seed
        if self.stop is not None:
            drawing["stop"] = self.stop
        if self.tools is not None:
            drawing["tools"] = self.tools
        if self.tool_choice is not None:
            drawing["tool_choice"] = self.tool_choice
        if self.strict_tools is not None:
            drawing["strict_tools"] = self.strict_tools
        if self.response_schema is not None:
            drawing["response_schema"] = self.response_schema
        return drawing

    @property
    def offered(self) -> Offered:
        """What of it the prompt says, as keywords of ``model.prompt`` and ``model.read``; empty where nothing."""
        offered = Offered()
        if self.tools:
            offered["tools"] = self.tools
        if self.response_schema is not None:
            offered["response_schema"] = self.response_schema
        return offered


@cache
def _door() -> type[BaseModel]:
    """The same fields as a pydantic model. Made on first use: importing values must not load pydantic."""
    from pydantic import create_model

    hints = get_type_hints(GenerationSettings, include_extras=True)
    by_hand = ("tools", "response_schema")  # what they may be is their own values' to say
    fields_of: dict[str, Any] = {name: (hint, None) for name, hint in hints.items() if name not in by_hand}
    made: type[BaseModel] = create_model("GenerationSettings", __config__={"strict": True}, **fields_of)
    return made


def _checked(plain: Mapping[str, object]) -> GenerationSettings:
    from pydantic import ValidationError

    try:
        return GenerationSettings(**dict(_door().model_validate(plain)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise InputError(f"{name} is {repr(plain[name])[:60]}", hint=first["msg"].lower()) from None
