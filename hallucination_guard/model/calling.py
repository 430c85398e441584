"""How a model family writes calls of tools, and reads them back.

Sources: the chat templates of Qwen 2.5/3 and Hermes (``<tool_call>`` around a JSON object), Llama 3.1 (the answer is a
JSON object with ``parameters``, behind ``<|python_tag|>`` or not) and Mistral (``[TOOL_CALLS]`` and a JSON list, or
``[TOOL_CALLS]name[ARGS]`` and the arguments). Which one it is stands in the template. A template that knows no tools is
taught the first: the tools stand in the system turn, calls and results in the turns' texts.

What does not parse is text: here nothing raises on what a model wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.values import JSON, Message, Tool, ToolCall, WrittenCall

__all__ = [
    "CallFormat",
    "begun_at_end",
    "call_grammar",
    "format_of",
    "json_grammar",
    "prose_of",
    "taught",
    "told_schema",
    "write_calls",
    "written_calls",
    "written_text",
]

CallFormat: TypeAlias = Literal["hermes", "llama", "mistral", "mistral_args"]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")
# What stands before a call, and after it. Where nothing does, the whole answer has to be the call.
_MARKS: Mapping[CallFormat, tuple[str, str]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama": ("", ""),
    "mistral": ("[TOOL_CALLS]", ""),
    "mistral_args": ("[TOOL_CALLS]", ""),
}
# Compact, with the separators that json.dumps writes and models have seen most.
_WRITTEN_AS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TAUGHT = """You can call these tools, each described by a JSON object:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as a JSON object between these marks:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""
_TOLD_SCHEMA = "Answer only with JSON that fits this schema:\n{schema}"


def format_of(tokenizer: Tokenizer) -> CallFormat:
    """How this model's template writes calls; ``hermes`` where it writes none."""
    source = _source(tokenizer)
    if "[TOOL_CALLS]" in source:
        return "mistral_args" if "[ARGS]" in source else "mistral"
    if "<tool_call>" not in source and ("<|python_tag|>" in source or '"parameters": ' in source):
        return "llama"
    return "hermes"


def _source(tokenizer: Tokenizer) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several by name: transformers takes the one for tools where there is one
        template = template.get("tool_use") or template.get("default")
    return template if isinstance(template, str) else ""


# ------------------------------------------------------------------------------------------------------- teaching


def taught(turns: Sequence[Message], tools: Sequence[Tool]) -> tuple[Message, ...]:
    """The same conversation for a template that knows no tools: all of it is in the texts."""
    plain = []
    for turn in turns:
        if turn.tool_calls:
            calls = [{"name": each.name, "arguments": each.arguments} for each in turn.tool_calls]
            written = [f"<tool_call>\n{json.dumps(each, ensure_ascii=False)}\n</tool_call>" for each in calls]
            plain.append(Message(role=turn.role, content="\n".join([turn.content, *written]).strip()))
        elif turn.role == "tool":
            plain.append(replace(turn, content=f"<tool_response>\n{turn.content}\n</tool_response>"))
        else:
            plain.append(turn)
    if not tools:
        return tuple(plain)
    described = "\n".join(json.dumps(each.to_json_dict(), ensure_ascii=False) for each in tools)
    return _with_system(plain, _TAUGHT.format(tools=described))


def told_schema(turns: Sequence[Message], schema: Mapping[str, JSON]) -> tuple[Message, ...]:
    """The same conversation, with the schema of the answer in the system turn: no template has a place for it."""
    return _with_system(turns, _TOLD_SCHEMA.format(schema=json.dumps(schema, ensure_ascii=False)))


def _with_system(turns: Sequence[Message], text: str) -> tuple[Message, ...]:
    if turns[0].role == "system":
        return (replace(turns[0], content=f"{turns[0].content}\n\n{text}"), *turns[1:])
    return (Message(role="system", content=text), *turns)


def write_calls(form: CallFormat, content: str, calls: Sequence[ToolCall]) -> str:
    """An answer with calls as its family writes it, so that it can be read: what served it gives them apart."""
    inner = "parameters" if form == "llama" else "arguments"
    plain = [json.dumps({"name": each.name, inner: each.arguments}, ensure_ascii=False) for each in calls]
    match form:
        case "hermes":
            written = [f"<tool_call>\n{each}\n</tool_call>" for each in plain]
        case "llama":
            written = plain
        case "mistral":
            written = [f"[TOOL_CALLS][{', '.join(plain)}]"]
        case "mistral_args":
            arguments = (json.dumps(each.arguments, ensure_ascii=False) for each in calls)
            written = [f"[TOOL_CALLS]{each.name}[ARGS]{own}" for each, own in zip(calls, arguments, strict=True)]
    return "\n".join([*([content] if content else []), *written]) if calls else content


# -------------------------------------------------------------------------------------------------------- grammars


def call_grammar(tokenizer: Tokenizer, tools: Sequence[Tool], choice: str) -> str:
    """A grammar, in llguidance's Lark, of the answers that may be given.

    Args:
        tokenizer: of the model, whose format it is.
        tools: that may be called.
        choice: ``auto`` (text, in which any call is a valid one), ``required`` or a tool's name (one call).
    """
    form = format_of(tokenizer)
    offered = [each for each in tools if choice in ("auto", "required", each.name)]
    begin, end = (_terminal(tokenizer, mark) for mark in _MARKS[form])
    if form == "mistral_args":
        args = _terminal(tokenizer, "[ARGS]")
        body = " | ".join(f'"{each.name}" {args} {_json(_closed(each.parameters))}' for each in offered)
    else:
        schema: Any = {"anyOf": [_call_schema(each, form) for each in offered]}
        if form == "mistral":
            schema = {"type": "array", "items": schema, "minItems": 1, **({} if choice == "auto" else {"maxItems": 1})}
        body = _json(schema)
    gap = r'"\n"' if form == "hermes" else ""
    call = " ".join(part for part in (begin, gap, "body", gap, end) if part)
    if choice != "auto":
        start = "start: call"
    elif not begin:  # the answer is a call or a text: its first character tells
        start = "start: call | TEXT\nTEXT: /[^{](?s:.)*/"
    elif begin.startswith("<"):  # no text can hold a special token
        start = "start: TEXT (call TEXT)*\nTEXT: /(?s:.*)/"
    else:
        start = f"start: TEXT (call TEXT)*\nTEXT: /(?s:.*)/ & ~/(?s:.*){re.escape(_MARKS[form][0])}(?s:.*)/"
    return "\n".join([start, f"call: {call}", f"body: {body}"])


def json_grammar(schema: Mapping[str, JSON]) -> str:
    """The grammar of JSON that fits a schema."""
    return f"start: {_json(dict(schema))}"


def _call_schema(tool: Tool, form: CallFormat) -> dict[str, Any]:
    arguments = "parameters" if form == "llama" else "arguments"
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, arguments: _closed(tool.parameters)},
        "required": ["name", arguments],
        "additionalProperties": False,
    }


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """An object's schema that allows no other names, unless it says that it does."""
    return {"additionalProperties": False, **schema}


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _WRITTEN_AS})


def _terminal(tokenizer: Tokenizer, mark: str) -> str:
    """A mark in a grammar: a special token by its id, any other as the text that it is."""
    special = _special_id(tokenizer, mark)
    return f"<[{special}]>" if special is not None else json.dumps(mark) if mark else ""


def _special_id(tokenizer: Tokenizer, mark: str) -> int | None:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return next((at for at, each in added.items() if each.special and str(each) == mark), None)


def written_text(tokenizer: Tokenizer, token_ids: Sequence[int], *, calls: bool) -> str:
    """The text of an answer: without special tokens, but for the marks of calls where it may call.

    Args:
        tokenizer: of the model.
        token_ids: of the answer.
        calls: whether tools were offered.
    """
    marks = [mark for mark in (*_MARKS[format_of(tokenizer)], "[ARGS]", "<|python_tag|>") if mark] if calls else []
    kept = any(_special_id(tokenizer, mark) in token_ids for mark in marks)
    return str(tokenizer.decode(token_ids, skip_special_tokens=not kept))


def prose_of(form: CallFormat, text: str) -> int:
    """How many characters at the beginning of an unfinished answer are surely in no call."""
    if form == "llama":  # a call is the whole answer, whatever stands before its mark
        return 0
    mark = _MARKS[form][0]
    found = text.find(mark)
    return found if found >= 0 else len(text) - begun_at_end(text, (mark,))


def begun_at_end(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of one of ``marks``."""
    return max((size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)


# --------------------------------------------------------------------------------------------------------- parsing


@dataclass(frozen=True, slots=True)
class _Found:
    name: str
    arguments: dict[str, JSON]
    places: dict[str, tuple[int, int]]


def written_calls(
    form: CallFormat, text: str, tools: Sequence[Tool], *, prompt_token_ids: Sequence[int], begin: int = 0
) -> tuple[WrittenCall, ...]:
    """The calls in an answer, as its family writes them; none if one that was begun cannot be parsed.

    Args:
        form: how calls are written.
        text: of the answer.
        tools: that were offered; what has no name among them is no call.
        prompt_token_ids: of its prompt, so that no two calls of a conversation have one id.
        begin: the character behind the thinking, in which nothing is called.
    """
    names = {each.name for each in tools}
    if not names:
        return ()
    calls = []
    for number, (start, stop, found) in enumerate(_scanned(text, form, begin)):
        if found is None or found.name not in names:
            return ()
        # Nine letters and digits: what Mistral's templates accept, and so do all others.
        asked = hashlib.sha256(f"{list(prompt_token_ids)} {number} {text}".encode("utf-8", "surrogatepass"))
        call = ToolCall(name=found.name, arguments=found.arguments, id=asked.hexdigest()[:9])
        calls.append(WrittenCall(call=call, start=start, stop=stop, arguments=found.places))
    return tuple(calls)


def _scanned(text: str, form: CallFormat, at: int) -> Iterator[tuple[int, int, _Found | None]]:
    """Where calls begin and end, and what they say; None for one that says nothing."""
    begin, end = _MARKS[form]
    if form == "llama":
        start = text.find("<|python_tag|>", at)
        inner = _skip(text, start + len("<|python_tag|>") if start >= 0 else at)
        if text[inner : inner + 1] == "{":
            found, stop = _call_at(text, inner, "parameters")
            whole = found is not None and _skip(text, stop) == len(text)
            # JSON that is no call is an answer like any other.
            yield from [(at, len(text), found)] if whole else []
        return
    at = text.find(begin, at)
    while at >= 0:
        inner = _skip(text, at + len(begin))
        if form == "mistral":
            yield from _listed(text, at, inner)
            return
        if form == "mistral_args":
            found, stop = _named_at(text, inner)
        else:
            found, stop = _call_at(text, inner, "arguments")
            closed = _skip(text, stop)
            stop = closed + len(end)
            if not text.startswith(end, closed):
                found = None
        yield at, stop, found
        if found is None:
            return
        at = text.find(begin, stop)


def _listed(text: str, start: int, at: int) -> Iterator[tuple[int, int, _Found | None]]:
    """``[{…}, {…}]``: several calls, of which the first has the marks before it."""
    if text[at : at + 1] != "[":
        yield start, at, None
        return
    at += 1
    while True:
        found, stop = _call_at(text, _skip(text, at), "arguments")
        after = _skip(text, stop)
        if found is None or text[after : after + 1] not in (",", "]"):
            yield start, stop, None
            return
        yield start, after + 1, found
        start = at = after + 1
        if text[after] == "]":
            return


def _named_at(text: str, at: int) -> tuple[_Found | None, int]:
    """``name[ARGS]{…}``."""
    name, mark, _ = text[at:].partition("[ARGS]")
    read = _object_at(text, at + len(name) + len(mark)) if mark else None
    if read is None:
        return None, at
    fields, stop = read
    return _found(name.strip(), {key: value for key, (value, _, _) in fields.items()}, fields), stop


def _call_at(text: str, at: int, arguments: str) -> tuple[_Found | None, int]:
    """``{"name": …, "arguments": {…}}``."""
    read = _object_at(text, at)
    if read is None:
        return None, at
    fields, stop = read
    name, given = fields.get("name", (None, 0, 0))[0], fields.get(arguments)
    if given is None or not isinstance(name, str) or not name or not isinstance(given[0], dict):
        return None, stop
    inner = _object_at(text, given[1])
    assert inner is not None  # it was read a moment ago
    return _found(name, given[0], inner[0]), stop


def _found(name: str, arguments: dict[str, JSON], fields: Mapping[str, tuple[Any, int, int]]) -> _Found | None:
    try:
        json.dumps(arguments, allow_nan=False).encode()
    except ValueError:  # NaN, which Python reads and JSON has not
        return None
    return _Found(name, arguments, {key: (start, stop) for key, (_, start, stop) in fields.items()}) if name else None


def _object_at(text: str, at: int) -> tuple[dict[str, tuple[Any, int, int]], int] | None:
    """The JSON object at a place: each name's value and where it is written, and where the object ends."""
    try:
        whole, stop = _DECODER.raw_decode(text, at)
        if not isinstance(whole, dict):
            return None
        fields: dict[str, tuple[Any, int, int]] = {}
        at = _skip(text, at + 1)
        while text[at] != "}":
            name, at = _DECODER.raw_decode(text, at)
            start = _skip(text, _skip(text, at) + 1)  # past the colon
            value, at = _DECODER.raw_decode(text, start)
            fields[name] = (value, start, at)
            at = _skip(text, at)
            if text[at] == ",":
                at = _skip(text, at + 1)
    except (ValueError, RecursionError):
        return None
    return fields, stop


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()
