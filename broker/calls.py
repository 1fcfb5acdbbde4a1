"""What every gRPC method of a broker does around its work: who calls and may, what is asked, how an error is told."""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from broker.errors import (
    TEXT_MAX,
    BadRequest,
    CxlmqError,
    shortened,
    status_of,
    to_metadata,
)
from broker.reader import ReadError
from broker.reading_service import read_error
from broker.rights import METHODS, Access
from broker.security import CALLER, Guard, Principal

_log = logging.getLogger("cxlmq")


async def abort(context: Any, error: CxlmqError) -> None:
    await context.abort(grpc.StatusCode[status_of(error)], shortened(error.message, 4 * TEXT_MAX), to_metadata(error))


@contextlib.asynccontextmanager
async def errors_as_statuses(context: Any) -> AsyncIterator[None]:
    """Whatever goes wrong within reaches the caller as a status with typed trailers."""
    try:
        yield
    except CxlmqError as error:
        await abort(context, error)
    except (grpc.aio.AbortError, grpc.aio.BaseError):
        raise
    except Exception as error:
        _log.exception("a call failed")
        await abort(context, CxlmqError(f"internal error: {error!r}"))


def parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise BadRequest(reason=f"no {kind.DESCRIPTOR.name}") from error


Served = tuple[Callable[[Any, Any], Awaitable[Any]], Any, Any]          # method, request type, reply type


def unary_handlers(guard: Guard, service: str, methods: dict[str, Served]) -> dict[str, grpc.RpcMethodHandler]:
    """The handlers of a service's methods, each with its row of the table of rights. KeyError for one without a row."""
    return {name: _unary(guard, METHODS[f"{service}/{name}"], *each) for name, each in methods.items()}


def _unary(guard: Guard, access: Access, method: Callable[[Any, Any], Awaitable[Any]], kind: Any,
           reply: Any) -> grpc.RpcMethodHandler:
    """A handler of one method: parses the request itself, so that garbage gets a typed answer."""
    async def call(data: bytes, context: Any) -> Any:
        async with errors_as_statuses(context):
            caller = introduce(guard, context)
            request = parsed(kind, data)
            access.check(caller, request)
            try:
                return await method(request, context)
            except ReadError as error:
                raise read_error(access.topic_of(request), error) from error

    return grpc.unary_unary_rpc_method_handler(call, None, reply.SerializeToString)


def introduce(guard: Guard, context: Any) -> Principal:
    """Who calls, for the rest of this call. Raises `Unauthenticated`."""
    caller = guard.caller(context.invocation_metadata())
    CALLER.set(caller)
    return caller


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Lets nobody in without a token, whatever the method; but for health, which tells no secret."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The method's handler, or one that refuses."""
        if not details.method.startswith("/grpc.health."):
            try:
                self._guard.caller(details.invocation_metadata)
            except CxlmqError as error:
                refusal = error

                async def refuse(_: Any, context: Any) -> None:
                    await abort(context, refusal)

                return grpc.stream_stream_rpc_method_handler(refuse)
        return await continuation(details)
