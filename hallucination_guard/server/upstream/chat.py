"""What the servers share: where they are, and their chat endpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hallucination_guard.errors import UpstreamError
from hallucination_guard.server.upstream.client import Client, Reply, field, logprob_of, text_of
from hallucination_guard.server.upstream.part import Asked, LogprobsError
from hallucination_guard.values import FinishReason

__all__ = ["Server", "body_of", "content_of", "ended_of", "listed_in", "logprobs_of", "model_of", "only_choice"]


class Server:
    """A server of some kind.

    Args:
        client: of its address.
        model: which of its models; by default its first.
        dtype: of its weights; by default as it says, if it does.
    """

    def __init__(self, client: Client, *, model: str | None = None, dtype: str = "") -> None:
        self._client, self._model, self._dtype = client, model, dtype

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.close()


def body_of(asked: Asked, model: str) -> dict[str, object]:
    """The fields that all of them know; of the others only what was asked for."""
    settings = asked.settings
    body: dict[str, object] = {
        "model": model,
        "messages": asked.plain_turns,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
    }
    if settings.temperature:
        body |= {"top_p": settings.top_p, "seed": settings.seed}
    if settings.stop:
        body["stop"] = list(settings.stop)
    if asked.tools:
        body["tools"] = [each.to_json_dict() for each in asked.tools]
        body["tool_choice"] = _tool_choice(settings.tool_choice or "auto")
    if settings.response_schema is not None:
        schema = {"name": "response", "schema": settings.response_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def only_choice(reply: Reply) -> Reply:
    """The one answer.

    Raises:
        UpstreamError: if there are several, or none.
    """
    choices = field(reply, "choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        found = len(choices) if isinstance(choices, list) else "no list of"
        raise UpstreamError(f"the server gave {found} answers to one question", hint="one is judged, n is 1")
    only: Reply = choices[0]
    return only


def content_of(choice: Reply, holder: str = "message") -> str:
    """The text of an answer or of its next part; empty where there is none.

    Raises:
        UpstreamError: if what stands there is no text.
    """
    held = field(choice, holder)
    if held is not None and not isinstance(held, Mapping):
        raise UpstreamError(f"the server gave {type(held).__name__!r} for a {holder}", hint="only texts are read")
    return text_of(field(held, "content"))


def logprobs_of(choice: Reply) -> tuple[float | None, ...]:
    """The log-probability of each token, None where one is missing; empty where there is no list of them.

    Raises:
        LogprobsError: if what stands there is none.
    """
    held = field(choice, "logprobs")
    if held is not None and not isinstance(held, Mapping):
        raise LogprobsError(f"the server gave {type(held).__name__!r} for log-probabilities")
    return tuple(logprob_of(field(each, "logprob")) for each in listed_in(field(held, "content")))


def listed_in(found: object) -> Sequence[Reply]:
    """The entries of a list with something for each token; empty where there is no list.

    Raises:
        LogprobsError: if it is something else.
    """
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise LogprobsError("the server gave no list of objects for its log-probabilities")
    return found


def ended_of(said: object, *, stop_text: bool = False) -> FinishReason | None:
    """How an answer ended, in our words; None while it goes on.

    Raises:
        UpstreamError: if it was ended by something else, so that it is none.
    """
    match said:
        case None:
            return None
        case "stop" | "tool_calls":
            return "stop_text" if stop_text else "stop"
        case "length":
            return "length"
        case _:
            word = said[:40] if isinstance(said, str) else type(said).__name__
            raise UpstreamError(f"the server ended the answer by {word!r}", hint="ask again")


async def model_of(client: Client, model: str | None) -> str:
    """The name of the model that is asked: the one named, if the server has it, else its first.

    Raises:
        UpstreamError: if it has none, or not that one.
    """
    listed = field(await client.get("/v1/models"), "data")
    names = [str(field(each, "id")) for each in listed] if isinstance(listed, list) else []
    if not names or (model is not None and model not in names):
        raise UpstreamError(f"the server at {client.url} has the models {names!r}, not {model!r}", hint="name one")
    return names[0] if model is None else model


def _tool_choice(choice: str) -> object:
    if choice in ("auto", "none", "required"):
        return choice
    return {"type": "function", "function": {"name": choice}}
