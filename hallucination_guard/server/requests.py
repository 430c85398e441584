"""What clients may ask: the OpenAI API's requests, strictly, and what becomes of each of their fields.

A field that would have no effect is refused, not looked over: a client that sets ``logit_bias`` counts on it. What is
taken without an effect stands in :data:`FIELDS` as ``harmless``, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from hallucination_guard.errors import InputError
from hallucination_guard.values import Call, GenerationOptions, Message, ToolCall, options_of

__all__ = ["FIELDS", "ChatRequest", "CompletionRequest", "Known", "ScoreRequest", "Tightening"]


@dataclass(frozen=True, slots=True)
class Known:
    """What becomes of a field.

    Args:
        how: ``honoured``, ``harmless`` (taken, without an effect) or ``refused``.
        why: in words.
    """

    how: Literal["honoured", "harmless", "refused"]
    why: str


FIELDS: Mapping[str, Known] = {
    "model": Known("honoured", "an alias of the server"),
    "messages": Known("honoured", "roles system, developer, user, assistant, tool; texts only"),
    "prompt": Known("honoured", "one text, as a user's turn (completions, score)"),
    "max_tokens": Known("honoured", "up to the server's and the key's limit"),
    "max_completion_tokens": Known("honoured", "the same under its newer name"),
    "temperature": Known("honoured", "without it the alias's own, which is greedy"),
    "top_p": Known("honoured", "nucleus"),
    "seed": Known("honoured", "the same seed draws the same answer"),
    "stop": Known("honoured", "up to 16 texts"),
    "stream": Known("honoured", "sentence by sentence, each after its decision"),
    "stream_options": Known("honoured", "include_usage"),
    "tools": Known("honoured", "functions; the policy decides on a call as on a text"),
    "tool_choice": Known("honoured", "none, auto, required or a function; the last two need the extra grammar"),
    "response_format": Known("honoured", "text, json_object, json_schema; JSON needs the extra grammar"),
    "hallucination_guard": Known("honoured", "max_risk, confidence: tighter than the alias's, never looser"),
    "user": Known("harmless", "goes into the record as a tag"),
    "metadata": Known("harmless", "goes into the record as tags"),
    "store": Known("harmless", "only false: nothing is stored but the record"),
    "service_tier": Known("harmless", "only auto or default: there is one tier"),
    "parallel_tool_calls": Known("harmless", "only true: a model may write several calls"),
    "n": Known("harmless", "only 1: one question has one decided answer"),
    "best_of": Known("harmless", "only 1"),
    "echo": Known("harmless", "only false"),
    "logprobs": Known("harmless", "only false: the verdict's scores stand instead"),
    "top_logprobs": Known("harmless", "only 0"),
    "presence_penalty": Known("harmless", "only 0: answers of another distribution are not calibrated"),
    "frequency_penalty": Known("harmless", "only 0: likewise"),
    "logit_bias": Known("harmless", "only empty: likewise"),
    "response": Known("honoured", "the text that is to be scored (score)"),
    "response_token_ids": Known("honoured", "or its token ids in the model's vocabulary (score)"),
    "finish_reason": Known("honoured", "stop or length, where that is known of it (score)"),
    "audio": Known("refused", "answers are texts"),
    "modalities": Known("refused", "answers are texts"),
    "prediction": Known("refused", "no answer is drawn along a guess"),
    "reasoning_effort": Known("refused", "how long the model thinks is its template's to say"),
    "verbosity": Known("refused", "say it in the prompt"),
    "web_search_options": Known("refused", "nothing is looked up for a client"),
    "functions": Known("refused", "use tools"),
    "function_call": Known("refused", "use tool_choice"),
    "suffix": Known("refused", "the model writes forwards"),
    "prompt_cache_key": Known("refused", "what is kept of a prompt is the server's to choose"),
    "safety_identifier": Known("refused", "use user"),
}
"""Every field of the API, once."""

_Text = Annotated[str, Field(max_length=1 << 20)]
_Short = Annotated[str, Field(min_length=1, max_length=512)]
_Tokens = Annotated[int, Field(ge=1, lt=2**31)]
_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_Extra = {"extra": "forbid", "strict": True, "allow_inf_nan": False, "protected_namespaces": ()}


def _as_written(kind: type) -> BeforeValidator:
    """To Python ``0`` is ``False`` and ``True`` is ``1``, and so it would be to a literal."""

    def check(given: object) -> object:
        if given is not None and isinstance(given, bool) != (kind is bool):
            raise PydanticCustomError("literal_error", "Input should be of another type")
        return given

    return BeforeValidator(check)


_No = Annotated[Literal[False], _as_written(bool)]
_Yes = Annotated[Literal[True], _as_written(bool)]
_One = Annotated[Literal[1], _as_written(int)]
_Zero = Annotated[Literal[0], _as_written(int)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, **_Extra)  # type: ignore[typeddict-item]  # one dict for all


class TextPart(_Part):
    """A part of a content."""

    type: Literal["text"]
    text: _Text


class CalledFunction(_Part):
    """Which function a turn called, and with what."""

    name: _Name
    arguments: _Text


class Called(_Part):
    """A call in an earlier turn."""

    id: _Short
    type: Literal["function"] = "function"
    function: CalledFunction


_Content: TypeAlias = _Text | list[TextPart]


class SystemTurn(_Part):
    """What the application says."""

    role: Literal["system", "developer"]
    content: _Content
    name: _Short | None = None


class UserTurn(_Part):
    """What a user says."""

    role: Literal["user"]
    content: _Content
    name: _Short | None = None


class ToolTurn(_Part):
    """What a tool gave."""

    role: Literal["tool"]
    content: _Content
    tool_call_id: _Short
    name: _Short | None = None


class AssistantTurn(_Part):
    """An earlier answer, as a client got it and sends it back."""

    role: Literal["assistant"]
    content: _Content | None = None
    refusal: _Text | None = None
    tool_calls: list[Called] | None = None
    name: _Short | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


Turn = Annotated[SystemTurn | UserTurn | ToolTurn | AssistantTurn, Field(discriminator="role")]


class OfferedFunction(_Part):
    """A function that may be called."""

    name: _Name
    description: _Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OfferedTool(_Part):
    """A tool that may be called."""

    type: Literal["function"]
    function: OfferedFunction


class NamedFunction(_Part):
    """The name of a function."""

    name: _Name


class NamedTool(_Part):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class PlainFormat(_Part):
    """A text, or any JSON object."""

    type: Literal["text", "json_object"]


class Schema(_Part):
    """What an answer has to fit."""

    name: _Name
    description: _Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(_Part):
    """JSON that fits."""

    type: Literal["json_schema"]
    json_schema: Schema


class StreamOptions(_Part):
    """Of a stream."""

    include_usage: bool | None = None


class Tightening(_Part):
    """What a request asks for beyond the alias's policy.

    Args:
        max_risk: at most the policy's own.
        confidence: at least the policy's own.
    """

    max_risk: float | None = Field(default=None, gt=0, lt=1)
    confidence: float | None = Field(default=None, gt=0, le=1)

    @property
    def asks(self) -> bool:
        """Whether it asks for anything."""
        return self.max_risk is not None or self.confidence is not None


class _Asked(_Part):
    model: _Short
    hallucination_guard: Tightening | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(min_length=1, max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None

    def call(self, principal: str | None, request_id: str) -> Call:
        """Facts for the record; who answers this request again answers the same one."""
        tags = dict(self.metadata or {})
        if self.user is not None:
            tags.setdefault("user", self.user)
        return Call(principal=principal, tags=tags, request_id=request_id)

    @property
    def tightening(self) -> Tightening:
        """What it asks for beyond the policy."""
        return self.hallucination_guard or Tightening()


class _Drawn(_Asked):
    max_tokens: _Tokens | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _Short | Annotated[list[_Short], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: _One | None = None
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _drawing(self) -> dict[str, object]:
        return {
            "max_tokens": self.max_tokens,
            "temperature": None if self.temperature is None else float(self.temperature),
            "top_p": None if self.top_p is None else float(self.top_p),
            "seed": self.seed,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or None,
        }


class ChatRequest(_Drawn):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: _Tokens | None = None
    tools: Annotated[list[OfferedTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: PlainFormat | SchemaFormat | None = None
    store: _No | None = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: _Yes | None = None
    logprobs: _No | None = None
    top_logprobs: _Zero | None = None

    def turns(self) -> list[Message]:
        """The conversation as values.

        Raises:
            InputError: if a call's arguments are no JSON.
        """
        return [_message(each) for each in self.messages]

    def options(self) -> GenerationOptions:
        """How the answer is to be drawn.

        Raises:
            InputError: on what contradicts itself.
        """
        given = self._drawing() | {"max_completion_tokens": self.max_completion_tokens}
        if self.tools:
            given["tools"] = [each.model_dump(exclude_none=True) for each in self.tools]
            if any(each.function.strict for each in self.tools):
                given["strict_tools"] = True
        choice = self.tool_choice
        if not self.tools and choice not in (None, "none", "auto"):
            raise InputError("tool_choice was given without tools", hint="offer the tool, or leave it out")
        if choice is not None:
            given["tool_choice"] = choice if isinstance(choice, str) else choice.function.name
        match self.response_format:
            case SchemaFormat() as asked:
                given["response_schema"] = asked.json_schema.schema_
            case PlainFormat(type="json_object"):
                given["response_schema"] = {"type": "object"}
            case _:
                pass
        return options_of(given)


class CompletionRequest(_Drawn):
    """``POST /v1/completions``."""

    prompt: Annotated[str, Field(min_length=1, max_length=1 << 20)]
    best_of: _One | None = None
    echo: _No | None = None
    logprobs: None = None

    def turns(self) -> list[Message]:
        """The prompt as a user's turn."""
        return [Message(role="user", content=self.prompt)]

    def options(self) -> GenerationOptions:
        """How the answer is to be drawn."""
        return options_of(self._drawing())


class ScoreRequest(_Asked):
    """``POST /v1/score``: an answer that something else wrote."""

    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=1 << 20)] | None = None
    response: Annotated[str, Field(max_length=1 << 20)] | None = None
    response_token_ids: Annotated[list[_Id], Field(max_length=1 << 17)] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    tools: Annotated[list[OfferedTool], Field(max_length=128)] | None = None

    def turns(self) -> list[Message]:
        """What it is an answer to.

        Raises:
            InputError: if that is not said, or said twice.
        """
        if (self.messages is None) == (self.prompt is None):
            raise InputError("give messages or prompt", hint="one of the two")
        return (
            [Message(role="user", content=self.prompt or "")]
            if self.messages is None
            else [_message(each) for each in self.messages]
        )

    def answer(self) -> str | list[int]:
        """What is to be scored.

        Raises:
            InputError: if that is not said, or said twice.
        """
        if (self.response is None) == (self.response_token_ids is None):
            raise InputError("give response or response_token_ids", hint="one of the two")
        return self.response if self.response is not None else self.response_token_ids or []

    def options(self) -> GenerationOptions:
        """What stood in its prompt."""
        return options_of({"tools": [each.model_dump(exclude_none=True) for each in self.tools or []]})


def _message(turn: SystemTurn | UserTurn | ToolTurn | AssistantTurn) -> Message:
    match turn:
        case AssistantTurn():
            said = turn.content if turn.content else turn.refusal or ""  # an abstention that is sent back
            calls = tuple(ToolCall.of(each.model_dump()) for each in turn.tool_calls or ())
            return Message(role="assistant", content=_text(said), tool_calls=calls)
        case ToolTurn():
            return Message(
                role="tool", content=_text(turn.content), tool_call_id=turn.tool_call_id, name=turn.name or ""
            )
        case SystemTurn():
            return Message(role="system", content=_text(turn.content))
        case UserTurn():
            return Message(role="user", content=_text(turn.content))


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
