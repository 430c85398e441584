"""Answers as objects: the schema that the model is held to, and reading the object, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, ValidationError
from pydantic.v1 import ValidationError as ValidationErrorV1

__all__ = ["json_schema", "whole_object"]


def json_schema(schema: dict[str, Any] | type) -> dict[str, Any]:
    """The JSON Schema of a pydantic model, a typed dict, or itself."""
    if not isinstance(schema, type) or not is_basemodel_subclass(schema):
        return convert_to_json_schema(schema)
    known: Any = schema  # a model of pydantic 2, or of 1
    found: dict[str, Any] = known.model_json_schema() if issubclass(schema, BaseModel) else known.schema()
    return found


def whole_object(schema: dict[str, Any] | type) -> Callable[[AIMessage], Any]:
    """A step from a message to the object that it holds.

    LangChain's own parsers mend JSON that was cut, so an answer that ended at its most tokens would pass as an object
    with fields missing. Here it raises ``OutputParserException``.
    """

    def read(message: AIMessage) -> Any:
        try:
            plain = json.loads(str(message.text))
            if isinstance(schema, type) and is_basemodel_subclass(schema):
                known: Any = schema
                return known.model_validate(plain) if issubclass(schema, BaseModel) else known.parse_obj(plain)
            return plain
        except (ValueError, ValidationError, ValidationErrorV1) as error:
            ended = message.response_metadata.get("finish_reason")
            raise OutputParserException(
                f"the answer is not an object that fits the schema: {type(error).__name__}; it ended by {ended!r}"
            ) from None

    return read
