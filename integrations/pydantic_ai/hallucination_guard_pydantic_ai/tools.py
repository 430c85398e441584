"""Which tools pydantic-ai offers in a request, and whether one has to be called."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.settings import ModelSettings, ToolOrOutput

from hallucination_guard.errors import InputError
from hallucination_guard.values import Tool, ToolChoice

__all__ = ["offered_tools"]


def offered_tools(settings: ModelSettings, parameters: ModelRequestParameters) -> tuple[list[Tool], ToolChoice]:
    """The tools of this request, the output tools among them, and ``tool_choice`` in the guard's words.

    Raises:
        InputError: if a choice names no tool of the request.
    """
    functions = {each.name for each in parameters.declared_function_tools}
    outputs = {each.name for each in parameters.output_tools}
    free: ToolChoice = "auto" if parameters.allow_text_output else "required"
    match settings.get("tool_choice"):
        case None | "auto":
            names, choice = functions | outputs, free
        case "none" | []:
            names, choice = outputs, free
        case "required":
            names, choice = functions, "required"
        case ToolOrOutput(function_tools=chosen):
            names, choice = _known(chosen, functions) | outputs, free
        case chosen:
            names, choice = _known(chosen, functions | outputs), "required"
    tools = [
        Tool(name=each.name, description=each.description or "", parameters=each.parameters_json_schema)
        for each in parameters.declared_tool_defs.values()
        if each.name in names
    ]
    if choice == "required" and not tools:
        raise InputError("a call is required and the request has no tool for it", hint="see tool_choice")
    return tools, choice


def _known(chosen: Iterable[str], names: set[str]) -> set[str]:
    if unknown := sorted(set(chosen) - names):
        raise InputError(f"tool_choice names {unknown!r}", hint=f"the tools are {', '.join(sorted(names)) or 'none'}")
    return set(chosen)
