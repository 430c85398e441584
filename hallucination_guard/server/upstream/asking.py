"""From a guarded call to a request: the turns as the model here reads them, and only what the server draws by."""

from __future__ import annotations

from typing import Any

from hallucination_guard.errors import InputError
from hallucination_guard.model.calling import taught, told_schema
from hallucination_guard.model.template import knows_tools
from hallucination_guard.server.upstream.part import Asked, Capabilities
from hallucination_guard.values import DRAWN, GenerationSettings, Messages, Model, as_messages

__all__ = ["asked_of", "said_in_full"]

_FREE = {"tool_choice": ("auto", "none"), "top_p": (1.0,)}  # what asks for nothing, besides what is false


def said_in_full(settings: GenerationSettings) -> GenerationSettings:
    """The settings with the defaults of a model in this process: a server's own are never relied on."""
    return settings.over(GenerationSettings.of(DRAWN))


def asked_of(model: Model, messages: Messages, settings: GenerationSettings, can: Capabilities) -> Asked:
    """The request.

    Where the template here knows no tools, or an answer has a schema, the system turn is told of them: the server is
    sent that turn, or its prompt would be another.

    Args:
        model: that reads the answer.
        messages: what is asked.
        settings: how the answer is to be drawn, in full.
        can: what the server can do.

    Raises:
        InputError: if the server does not draw by a setting that was given.
    """
    turns, tools, honours = as_messages(messages), settings.tools or (), set(can.honours)
    if settings.response_schema is not None:
        turns = told_schema(turns, settings.response_schema)
    tokenizer: Any = getattr(model, "tokenizer", None)
    if (tools or any(turn.tool_calls or turn.role == "tool" for turn in turns)) and (
        tokenizer is None or not knows_tools(tokenizer)
    ):
        turns, tools = taught(turns, tools), ()
        honours = (honours | {"tools"}) - {"tool_choice"}
    for name, value in settings.drawing.items():
        if value and name not in honours and value not in _FREE.get(name, ()):
            raise InputError(f"{name} is {str(value)[:40]!r}, and the server does not draw by it", hint="leave it out")
    return Asked(turns=turns, tools=tools, settings=settings)
