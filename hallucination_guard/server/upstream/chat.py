"""What the servers share: where they are, and their chat endpoints."""

from __future__ import annotations

from hallucination_guard.errors import UpstreamError
from hallucination_guard.server.upstream.client import Client, Reply, field
from hallucination_guard.server.upstream.part import Asked
from hallucination_guard.values import FinishReason

__all__ = ["Server", "body_of", "ended_of", "logprobs_of", "model_of", "only_choice"]


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


def logprobs_of(choice: Reply) -> tuple[float | None, ...]:
    """The log-probability of each token; none where there is no list of them."""
    listed = field(choice, "logprobs", "content")
    return tuple(field(each, "logprob") for each in listed) if isinstance(listed, list) else ()


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
            raise UpstreamError(f"the server ended the answer by {str(said)[:40]!r}", hint="ask again")


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
