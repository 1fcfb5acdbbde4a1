"""Opening the session of a publisher, over whatever transport its batches then go."""

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from broker.errors import BrokerUnavailable, CxlmqError, SessionFenced
from broker.proto import cxlmq_pb2 as pb
from client.connection import BrokerAddress, Connection
from client.transport import rendezvous

T = TypeVar("T")
OPEN_SECONDS = 5.0                      # a broker that has not opened it by then is left for another one


async def answered(call: Coroutine[Any, Any, T]) -> tuple[T, asyncio.CancelledError | None]:
    """A call's answer, also when we are cancelled before it comes; then the cancellation, which the caller raises."""
    task, cancelled = asyncio.get_running_loop().create_task(call), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    return task.result(), cancelled


async def open_session(connection: Connection, brokers: Sequence[BrokerAddress], request: pb.OpenSessionRequest,
                       tried: set[int]) -> tuple[pb.Session, str]:
    """Open the epoch after `resume_epoch` (0: there was none) at the first broker that takes it; and its address.

    Every try has an epoch of its own: a session that was opened, but whose answer was lost, must not fence ours.
    `tried` has the epochs of such tries, also of earlier calls: who fences us under one of them is we ourselves. Raises
    `SessionFenced` when a later publisher of this client id has taken over, and what does not come back.
    """
    error: CxlmqError = BrokerUnavailable(address="the cluster")
    request.session_epoch = request.resume_epoch
    candidates = deque(rendezvous(brokers, request.client_id, request.resume_epoch))
    while candidates:
        request.session_epoch += 1
        tried.add(request.session_epoch)
        try:
            session = await connection.unary(candidates[0].target, "Admin/OpenSession", request, pb.Session,
                                             timeout=OPEN_SECONDS)
            tried.clear()
            return session, candidates[0].target
        except SessionFenced as fenced:
            tried.discard(request.session_epoch)
            newest = int(str(fenced.details.get("newest_epoch", 0)))
            if request.resume_epoch and newest not in tried:
                raise
            request.session_epoch = max(request.session_epoch, newest)     # we are the later one: fence it
        except CxlmqError as failed:
            if not failed.comes_back:
                raise
            error = failed
            candidates.popleft()
    raise error
