"""The endpoints: the OpenAI API's, with a guard behind each answer."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hallucination_guard.errors import GuardError
from hallucination_guard.guard import KEY
from hallucination_guard.server.answering import Behind
from hallucination_guard.server.config import Settings
from hallucination_guard.server.house import Places
from hallucination_guard.server.keys import Keys
from hallucination_guard.server.limits import Door, Visitor
from hallucination_guard.server.metrics import MEDIA_TYPE, Metrics
from hallucination_guard.server.refusals import Refusal, refusal_of
from hallucination_guard.server.replies import Wire, event, verdict_on_the_wire
from hallucination_guard.server.requests import FIELDS, ChatRequest, CompletionRequest, ScoreRequest
from hallucination_guard.server.while_connected import ClientGone, Events, while_connected
from hallucination_guard.values import Event, GenerationOptions, Message, Outcome, Released

__all__ = ["Application", "create_app"]

_log = logging.getLogger("hallucination_guard.server")
_AGAIN = 5.0  # seconds after which what did not start is tried again


# Whose words repeat nothing of the request.
_WORDS = frozenset({
    "missing", "string_type", "int_type", "float_type", "bool_type", "list_type", "dict_type", "literal_error",
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "model_attributes_type", "too_long",
    "string_too_long", "string_too_short", "too_short", "string_pattern_mismatch", "finite_number", "none_required",
    "union_tag_not_found",
})  # fmt: skip
_INNER = frozenset({
    "content", "role", "text", "type", "function", "name", "arguments", "parameters", "tool_call_id", "tool_calls",
    "id", "json_schema", "schema", "refusal", "include_usage", "max_risk", "confidence", "strict", "description",
})  # fmt: skip
"""The names of inner fields: what else stands in a place may be a client's own key."""


class _Reply(BaseModel):
    """What every reply has; the rest is the OpenAI API's."""

    model_config = ConfigDict(extra="allow")


class Completion(_Reply):
    """A whole answer, or that there is none."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    hallucination_guard: dict[str, Any]


class Scored(_Reply):
    """The verdict on a given answer."""

    id: str
    object: str
    model: str
    hallucination_guard: dict[str, Any]


class Models(BaseModel):
    """The aliases."""

    object: str
    data: list[dict[str, Any]]


class State(BaseModel):
    """How the server is."""

    status: str
    why: dict[str, str]


class Failure(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Why there is no reply."""

    error: Failure


def _may_be(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error} for status in (401, 403, 405, 408, 413, 415, 421, 429, 500, 503, *statuses)}


_NOT_READY: dict[int | str, dict[str, Any]] = {405: {"model": Error}, 421: {"model": Error}, 503: {"model": State}}


@dataclass(slots=True)
class Application:
    """What a server is made of; calling it is ASGI.

    Args:
        settings: of the server.
        served: by alias.
        keys: who may ask; None for everybody.
    """

    settings: Settings
    served: Mapping[str, Behind]
    keys: Keys | None = None
    closing: bool = False
    places: dict[str, Places] = field(init=False)
    metrics: Metrics = field(init=False)
    api: FastAPI = field(init=False)
    _door: Door = field(init=False)

    def __post_init__(self) -> None:
        limits = self.settings.limits
        self.places = {alias: Places(limits.running, limits.queue) for alias in self.served}
        self.metrics = Metrics(self.served, self.places)
        self.api = _api(self)
        self._door = Door(
            app=self.api,
            settings=self.settings,
            keys=self.keys,
            closing=lambda: self.closing,
            refused=self.metrics.refused,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        await self._door(scope, receive, send)

    def close(self) -> None:
        """Let nobody new in."""
        self.closing = True

    # ------------------------------------------------------------------------------------------------- asking

    def found(self, alias: str) -> Behind:
        """What stands behind an alias.

        Raises:
            Refusal: if nothing does, or not yet.
        """
        served = self.served.get(alias)
        if served is None:
            raise Refusal(404, "there is no model of that name", code="model_not_found", param="model")
        if served.why:
            raise Refusal(503, "the model is not ready yet", code="not_ready", retry_after=5)
        return served

    async def complete(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        """Answer a chat or a completion."""
        served, visitor = self.found(asked.model), _visitor(request)
        turns, options = self._checked(asked, visitor)
        answering = served.answering(asked.tightening)
        deadline = asyncio.get_running_loop().time() + self.settings.limits.deadline_seconds
        call = asked.call(visitor.principal, visitor.id)
        wire = Wire(
            alias=asked.model,
            abstention=self.settings.abstention,
            chat=isinstance(asked, ChatRequest),
            usage=asked.wants_usage,
            id=visitor.id,
            fingerprint=served.fingerprint,
        )

        async def whole() -> Outcome:
            async with asyncio.timeout_at(deadline), self.places[asked.model].one():
                return await answering.acall(turns, call=call, **options)

        async def parts() -> AsyncGenerator[Event, None]:
            async with self.places[asked.model].one():
                if not served.streams:
                    yield await answering.acall(turns, call=call, **options)
                    return
                async with aclosing(answering.astream(turns, call=call, **options)) as events:
                    async for each in events:
                        yield each

        self._say(visitor, asked.model, turns)
        if not asked.stream:
            outcome = await self._held(request, asked.model, whole)
            self._saw(asked.model, visitor, outcome)
            return JSONResponse(wire.whole(outcome))
        stream = self._encoded(parts(), wire, asked.model, visitor, deadline, streamed=served.streams)
        try:
            # Before anything is sent: what is refused has a status of its own.
            first = await self._held(request, asked.model, lambda: anext(stream))
        except BaseException:
            await stream.aclose()
            raise
        return Events(stream, first=first, gone=lambda: self.metrics.gone(asked.model))

    async def score(self, request: Request, asked: ScoreRequest) -> Response:
        """Judge a given answer."""
        served, visitor = self.found(asked.model), _visitor(request)
        turns, answer, options = asked.turns(), asked.answer(), asked.options()
        self._check_length(turns)
        deadline = asyncio.get_running_loop().time() + self.settings.limits.deadline_seconds

        async def whole() -> Outcome:
            async with asyncio.timeout_at(deadline), self.places[asked.model].one():
                return await served.review(
                    asked.tightening,
                    turns,
                    answer,
                    ended=asked.finish_reason or "read",
                    call=asked.call(visitor.principal, visitor.id),
                    **options,
                )

        self._say(visitor, asked.model, turns)
        outcome = await self._held(request, asked.model, whole)
        self._saw(asked.model, visitor, outcome)
        reply = {"id": f"score-{visitor.id}", "object": "score", "model": asked.model}
        return JSONResponse({**reply, KEY: verdict_on_the_wire(outcome)})

    async def _held(self, request: Request, alias: str, work: Callable[[], Any]) -> Any:
        """The work, as long as its client waits and its time lasts."""
        try:
            return await while_connected(request.receive, work())
        except TimeoutError:
            raise _late() from None
        except ClientGone:
            self.metrics.gone(alias)
            raise

    async def _encoded(
        self,
        events: AsyncGenerator[Event, None],
        wire: Wire,
        alias: str,
        visitor: Visitor,
        deadline: float,
        *,
        streamed: bool,
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream as they are sent. Before the first one an error is raised, later it is sent."""
        begun = False
        try:
            async with aclosing(events):
                while True:
                    async with asyncio.timeout_at(deadline):
                        each = await anext(events)
                    start = wire.start() if wire.chat and not begun else b""
                    if isinstance(each, Released):
                        begun = True
                        yield start + wire.part(each)
                    elif isinstance(each, Outcome):
                        begun = True
                        self._saw(alias, visitor, each)
                        yield start + b"".join(wire.end(each, streamed=streamed))
                        return
        except (GuardError, Refusal, TimeoutError, StopAsyncIteration) as error:
            refusal = _refusal(error)
        except Exception as error:
            refusal = _unexpected(error)
        if not begun:
            raise refusal
        self.metrics.refused(refusal.code)
        yield event(refusal.body, name="error")

    def _checked(
        self, asked: ChatRequest | CompletionRequest, visitor: Visitor
    ) -> tuple[list[Message], GenerationOptions]:
        turns, options = asked.turns(), asked.options()
        self._check_length(turns)
        if (most := options.get("max_new_tokens")) is not None and most > visitor.max_tokens:
            raise Refusal(400, f"at most {visitor.max_tokens} tokens", code="too_many_tokens", param="max_tokens")
        if most is None:
            own = self.served[asked.model].alias.max_new_tokens
            options["max_new_tokens"] = min(own, visitor.max_tokens)
        return turns, options

    def _check_length(self, turns: list[Message]) -> None:
        if len(turns) > (most := self.settings.limits.messages):
            raise Refusal(400, f"at most {most} messages", code="too_many_messages", param="messages")

    # ------------------------------------------------------------------------------------------------ noticing

    def _say(self, visitor: Visitor, alias: str, turns: list[Message]) -> None:
        said = {"request": visitor.id, "alias": alias, "principal": visitor.principal}
        if self.settings.log.prompts:
            said["prompt"] = str([turn.to_json_dict() for turn in turns])
        _log.info("server.asked %s", alias, extra={KEY: said})

    def _saw(self, alias: str, visitor: Visitor, outcome: Outcome) -> None:
        self.metrics.saw(alias, outcome)
        said = {
            "request": visitor.id,
            "alias": alias,
            "principal": visitor.principal,
            "decision": outcome.decision.action,
            "rule": outcome.decision.rule,
            "seconds": outcome.seconds.get("total"),
        }
        _log.info("server.decided %s %s", alias, outcome.decision.action, extra={KEY: said})

    # ------------------------------------------------------------------------------------------------ starting

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Get everything ready beside, and give it back at the end."""
        starting = [asyncio.create_task(self._start(each)) for each in self.served.values() if each.why]
        try:
            yield
        finally:
            self.close()
            for task in starting:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            for each in self.served.values():
                await each.close()

    async def _start(self, served: Behind) -> None:
        while True:
            try:
                await served.start()
                return
            except GuardError as error:
                _log.warning("server.not_ready %s: %s", served.alias.alias, error)
            await asyncio.sleep(_AGAIN)


def create_app(settings: Settings, served: Mapping[str, Behind], keys: Keys | None = None) -> Application:
    """The ASGI application of a server.

    Args:
        settings: of it.
        served: what stands behind each alias, loaded.
        keys: who may ask; None for everybody who reaches it.
    """
    return Application(settings, served, keys)


def _api(application: Application) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with application.lifespan():
            yield

    api = FastAPI(
        title="hallucination-guard",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    served, metrics = application.served, application.metrics

    @api.post("/v1/chat/completions", response_model=Completion, responses=_streams(_may_be(400, 404)))
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation, or not."""
        return await application.complete(request, asked)

    @api.post("/v1/completions", response_model=Completion, responses=_streams(_may_be(400, 404)))
    async def completion(request: Request, asked: CompletionRequest) -> Response:
        """Answer a prompt, or not."""
        return await application.complete(request, asked)

    @api.post("/v1/score", response_model=Scored, responses=_may_be(400, 404))
    async def score(request: Request, asked: ScoreRequest) -> Response:
        """Judge an answer that something else wrote. Nothing is drawn."""
        return await application.score(request, asked)

    @api.get("/v1/models", response_model=Models, responses=_may_be())
    async def models() -> Any:
        """The aliases."""
        data = [{"id": alias, "object": "model", "created": 0, "owned_by": "hallucination-guard"} for alias in served]
        return {"object": "list", "data": data}

    @api.get("/healthz", response_model=State, responses={421: {"model": Error}, 405: {"model": Error}})
    async def healthz() -> Any:
        """Whether the process lives."""
        return {"status": "ok", "why": {}}

    @api.get("/readyz", response_model=State, responses=_NOT_READY)
    async def readyz() -> Any:
        """Whether every alias is answered and scored; the reasons are told to nobody in particular, so in a word."""
        why = {alias: "suspended" if each.suspended else "not ready" for alias, each in served.items() if _lacks(each)}
        if application.closing:
            why = dict.fromkeys(served, "shutting down")
        state = {"status": "not ready" if why else "ready", "why": why}
        return JSONResponse(state, status_code=503 if why else 200, headers={"retry-after": "5"} if why else None)

    @api.get(
        "/metrics",
        responses=_may_be() | {200: {"content": {MEDIA_TYPE.partition(";")[0]: {"schema": {"type": "string"}}}}},
        response_class=Response,
    )
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), headers={"content-type": MEDIA_TYPE})

    _handle(api, metrics)
    _describe(api, keyed=application.keys is not None)
    return api


def _lacks(served: Behind) -> bool:
    return not served.status().ready or bool(served.suspended)


def _handle(api: FastAPI, metrics: Metrics) -> None:
    """Every error leaves in the OpenAI API's shape."""

    def told(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
        metrics.refused(refusal.code)
        return JSONResponse(refusal.body, status_code=refusal.status, headers={**(headers or {}), **refusal.headers})

    async def refused(_: Request, error: Exception) -> Response:
        return told(_refusal(error))

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return told(_invalid(error))

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: "there is no such path", 405: "this path has not that method"}
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return told(
            Refusal(error.status_code, words.get(error.status_code, "the body cannot be read"), code=code),
            error.headers,
        )

    async def unexpected(_: Request, error: Exception) -> Response:
        return told(_unexpected(error))

    api.add_exception_handler(GuardError, refused)
    api.add_exception_handler(Refusal, refused)
    api.add_exception_handler(ClientGone, gone)
    api.add_exception_handler(RequestValidationError, invalid)
    api.add_exception_handler(HTTPException, of_http)
    api.add_exception_handler(Exception, unexpected)  # Starlette raises it once more behind that: see the door


def _refusal(error: BaseException) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, GuardError):
        refusal = refusal_of(error)
        if refusal.status >= 500:
            _log.error("server.failed %s: %s", type(error).__name__, refusal.code)
        return refusal
    if isinstance(error, TimeoutError):
        return _late()
    return Refusal(503, "the stream ended without a decision", code="not_answered", retry_after=5)


def _late() -> Refusal:
    return Refusal(503, "the request's time is over", code="deadline", retry_after=5)


def _unexpected(error: BaseException) -> Refusal:
    """A defect: where, for the log; its words may hold a prompt, so they are not written."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("server.unexpected %s\n%s", type(error).__name__, frames)
    return Refusal(500, "something broke; the answer was not given", code="internal_error")


def _invalid(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong, by its place; what stands there is not repeated."""
    first = error.errors()[0]
    kind = str(first["type"])
    path = [str(step) for step in first["loc"] if step != "body"]
    if kind == "json_invalid":
        return Refusal(400, "the body is no JSON", code="invalid_json")
    name = path[0] if path else ""
    known = FIELDS.get(name)
    if kind == "extra_forbidden" and len(path) == 1:
        if known is not None and known.how == "refused":
            return Refusal(400, f"{name} is refused: {known.why}", code="unsupported_field", param=name)
        where = name[:64] if known is not None else "a field"
        return Refusal(400, f"{where} is not known here", code="unknown_field", param=name[:64] or None)
    place = ".".join(step for step in path if step.isdigit() or step in FIELDS or step in _INNER)
    said = str(first["msg"]) if kind in _WORDS else "cannot be this"
    words = "an unknown field" if kind == "extra_forbidden" else f"{place}: {said}"
    why = f" ({known.why})" if known is not None and len(path) == 1 else ""
    return Refusal(400, f"{words}{why}"[:300], code="invalid_field", param=place or None)


def _visitor(request: Request) -> Visitor:
    visitor = request.state.visitor
    assert isinstance(visitor, Visitor)
    return visitor


def _streams(responses: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    return responses | {200: {"content": {"text/event-stream": {}}}}


def _describe(api: FastAPI, *, keyed: bool) -> None:
    """The schema says what is so: invalid requests are 400, and a key is needed where one is."""
    made = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = made()
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
                    if keyed and path not in ("/healthz", "/readyz"):
                        operation["security"] = [{"key": []}]
            if keyed:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        assert api.openapi_schema is not None
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's own documentation extends it
