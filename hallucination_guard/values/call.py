"""What is known of a call besides its prompt: which request and conversation, on whose behalf, and the own marks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hallucination_guard.errors import InputError
from hallucination_guard.values.plain import FrozenDict
from hallucination_guard.values.prompt import checked_text

__all__ = ["Call"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Facts that go into the record of every attempt of a call; the decision does not depend on them.

    Args:
        thread_id: the conversation, as LangGraph calls it.
        principal: on whose behalf: a user, a service or an API key's name.
        tags: the application's own marks, texts by name.
        request_id: under which its attempts are recorded; by default a new one. What is asked again under the same one,
            since nobody knows what became of it, is the same call: its records count once.

    Raises:
        InputError: on anything that is not a text.
    """

    thread_id: str | None = None
    principal: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    request_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("thread_id", "principal", "request_id"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name))
        if self.request_id == "":
            raise InputError("the request_id is empty", hint="give a text, or None for a new one")
        if not isinstance(self.tags, Mapping):
            raise InputError(f"tags is {self.tags!r}", hint="give texts by name, for example {'tenant': 'acme'}")
        for name, value in self.tags.items():
            _text("the name of a tag", name)
            _text(f"the tag {name!r}", value)
        object.__setattr__(self, "tags", FrozenDict(self.tags))


def _text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{what} is {value!r}", hint="give a text")
    checked_text(value, what)
