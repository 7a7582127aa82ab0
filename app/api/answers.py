"""What chat and completions have in common: from a parsed body to a stream or a whole answer."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.api.schemas import ChosenLogprob, Sampling, Usage
from app.api.sse import ChunkFormat, EventStream, Pulse, watch_disconnect
from app.errors import GatewayError, InternalError, InvalidRequestError, ModelNotFoundError
from app.metrics import GatewayMetrics
from app.requests.calls import CallDelta
from app.requests.choice import Piece
from app.requests.generation import Generation, Generator
from app.requests.mailbox import Abandoned
from app.requests.record import RequestRecord
from app.requests.served import ServedModel
from app.settings import Settings
from app.tenancy.principal import caller

log = logging.getLogger(__name__)

MIN_KEEP_ALIVE_S = 0.5
CLIENT_CLOSED_REQUEST = 499
"""Status that nobody receives, for logs: the client left before its answer began."""


@dataclass(kw_only=True)
class Desk:
    """Everything that an endpoint needs: one per application."""

    settings: Settings
    models: dict[str, ServedModel]
    generator: Generator
    metrics: GatewayMetrics
    pulse: Pulse

    def model(self, name: str) -> ServedModel:
        """The served model of that name. Raises ModelNotFoundError, PermissionDeniedError when the key does not
        open it."""
        model = self.models.get(name)
        if model is None:
            raise ModelNotFoundError(
                f"the model {name!r} does not exist here; served are: {', '.join(self.models)}", param="model"
            )
        caller().check_model(name)
        return model

    def check(self, request: Sampling) -> None:
        """What the types cannot say. Raises InvalidRequestError."""
        if request.n is not None and request.n > self.settings.max_choices:
            raise InvalidRequestError(f"n: at most {self.settings.max_choices}, got {request.n}", param="n")
        if request.stream_options is not None and not request.stream:
            raise InvalidRequestError(
                "stream_options is only allowed when stream is true", param="stream_options"
            )


@dataclass(eq=False)
class WholeAnswer:
    """All of one choice, joined."""

    text: str = ""
    finish_reason: str = ""
    logprobs: list[ChosenLogprob] | None = None
    calls: list[CallDelta] = field(default_factory=list)
    """Calls of tools, each whole."""

    def take(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        for delta in piece.calls:
            if delta.name is None:
                self.calls[-1] = self.calls[-1].followed_by(delta)
            else:
                self.calls.append(delta)
        if piece.logprobs is not None:
            self.logprobs = (self.logprobs or []) + piece.logprobs
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason


def new_record(request: Request, endpoint: str) -> RequestRecord:
    """The record of a request that has just arrived."""
    state = request.scope["state"]
    return RequestRecord(state["request_id"], endpoint, int(time.time()), state["arrived_at"])


def deadline_at(request: Request, record: RequestRecord, stream: bool) -> float | None:
    """When the caller gives up, as it says: the SDK's read timeout (silence, so only for whole answers), or
    `x-request-timeout` in seconds."""
    limits = [seconds_header(request, "x-request-timeout")]
    if not stream:
        limits.append(seconds_header(request, "x-stainless-read-timeout"))
    given = [limit for limit in limits if limit is not None]
    return record.arrived_at + min(given) if given else None


def seconds_header(request: Request, name: str) -> float | None:
    """A header's positive number of seconds; None when it is absent or none."""
    try:
        value = float(request.headers.get(name, ""))
    except ValueError:
        return None
    return value if 0 < value < 1e9 else None


async def stream_answer(
    desk: Desk, request: Request, generation: Generation, chunks: ChunkFormat, include_usage: bool
) -> Response:
    """The answer as server-sent events."""
    read_timeout_s = seconds_header(request, "x-stainless-read-timeout")
    keep_alive_s = desk.settings.keep_alive_s
    if read_timeout_s is not None:
        keep_alive_s = min(keep_alive_s, max(MIN_KEEP_ALIVE_S, read_timeout_s / 3))
    return EventStream(
        generation,
        chunks,
        include_usage=include_usage,
        pulse=desk.pulse,
        keep_alive_s=keep_alive_s,
        describe=describe_failure,
    )


async def whole_answer(
    request: Request, generation: Generation, assemble: Callable[[list[WholeAnswer], Usage], object]
) -> Response:
    """The answer in one piece, in the shape that `assemble` gives it; ends the generation, whatever happens."""
    watcher = asyncio.create_task(watch_disconnect(request.receive, generation.mailbox))
    try:
        answers = await _collect(generation)
        usage = await generation.usage()
    except Abandoned as left:
        generation.end(left)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except BaseException as error:
        generation.end(error)
        raise
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
    generation.end()
    return json_response(assemble(answers, usage))


async def _collect(generation: Generation) -> list[WholeAnswer]:
    answers = [WholeAnswer() for _ in generation.choices]
    async for pieces in generation.pieces():
        for piece in pieces:
            answers[piece.choice].take(piece)
    return answers


def describe_failure(error: BaseException) -> GatewayError:
    """What the client is told of any failure; what is not meant for it goes to the log."""
    if isinstance(error, GatewayError):
        return error
    log.error("answering failed", exc_info=error)
    return InternalError("the gateway failed while answering; see its log under this request's id")


def json_response(value: object, status: int = 200) -> Response:
    """Any msgspec-encodable value as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")
