"""Subscribers: one stream from one broker, the whole total order; batches wait in a bounded buffer for the reader."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio

from broker.config import check_topic_name
from broker.errors import (
    AttachSlotsFull,
    BrokerUnavailable,
    ClosedError,
    ConfigError,
    CxlmqError,
    RegionError,
)
from broker.proto import cxlmq_pb2 as pb
from client.attached_subscriber import AttachedSubscriberEngine
from client.connection import BrokerAddress, ClientLoop, Connection, translated
from client.fork import ForkedEngine, end_in_child, keep
from client.group import Membership
from client.received import Message, ReceivedBatch, parse_response
from client.start import Start, check_start, fill_start

SUBSCRIBE = "/cxlmq.v1.PubSub/Subscribe"
BUFFER_BYTES = 16 << 20
TRANSPORTS = ("auto", "grpc", "attached")
RECONNECT_SECONDS = 0.2
RECONNECT_TRIES = 50
SUBSCRIBE_SECONDS = 15.0                # a broker that has not answered by then is passed over
PROGRESS_SECONDS = 10.0
NO_PROGRESS = f"the broker that serves this reader sent nothing for {PROGRESS_SECONDS:.0f} s: is it stopped?"


def _wake_up(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class SubscriberEngine:
    """Keeps a subscription running and its buffer filled. Coroutines run on the client loop."""

    def __init__(self, topic: str, cluster: str, bootstrap: str | None, start: Start, broker: int | None,
                 buffer_bytes: int) -> None:
        self.topic = topic
        self.client_loop = ClientLoop.get()
        self.connection = Connection(cluster, bootstrap)
        self.start: Start = start
        self.broker = broker
        self.buffer_bytes = buffer_bytes
        self.membership: Membership | None = None
        self.batches: deque[ReceivedBatch] = deque()
        self.buffered = 0
        self.first_in_batch = 0             # messages of batches[0] that were given out
        self.next_position: int | None = None       # of what the stream brings next
        self.failure: CxlmqError | None = None
        self.closed = False
        self.changed = threading.Condition()
        self.async_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.space = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.first_position = 0
        self.end_position = 0

    # ---- on the loop ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Subscribe; returns once the place is protected."""
        call = await self._subscribe()
        self.task = asyncio.get_running_loop().create_task(self._run(call))

    async def _candidates(self) -> list[BrokerAddress]:
        """The brokers to try, in order. A chosen one has to be there at first; when it is lost, others serve too."""
        brokers = await self.connection.brokers()
        if self.broker is None:
            turn = id(self) // 64 % len(brokers)
            return brokers[turn:] + brokers[:turn]
        chosen = [each for each in brokers if each.id == self.broker]
        if self.task is None:
            if not chosen:
                raise BrokerUnavailable(address=f"broker {self.broker}")
            return chosen
        return chosen + [each for each in brokers if each.id != self.broker]

    async def _subscribe(self) -> Any:
        """Open a stream at the first broker that answers."""
        error: CxlmqError = BrokerUnavailable(address="the cluster")
        for broker in await self._candidates():
            try:
                async with asyncio.timeout(SUBSCRIBE_SECONDS):      # wait_for may lose a cancellation
                    return await self._subscribe_at(broker)
            except TimeoutError:
                error = BrokerUnavailable(address=broker.target)
            except BrokerUnavailable as failed:
                error = failed
        raise error

    async def _subscribe_at(self, broker: BrokerAddress) -> Any:
        call = self.connection.channel(broker.target).unary_stream(
            SUBSCRIBE, pb.SubscribeRequest.SerializeToString)(self._request())
        try:
            metadata = dict(await call.initial_metadata() or ())
            if "cxlmq-end-position" not in metadata:
                await call.read()           # the call has failed: this raises why
                raise BrokerUnavailable(address=broker.target)
        except grpc.aio.AioRpcError as failed:
            raise translated(failed, broker.target) from None
        except BaseException:
            call.cancel()                   # or the broker would keep our place
            raise
        self.first_position = int(metadata["cxlmq-first-position"])
        self.end_position = int(metadata["cxlmq-end-position"])
        if self.next_position is None and not isinstance(self.start, int):
            self.next_position = int(metadata["cxlmq-position"])
        return call

    def _request(self) -> pb.SubscribeRequest:
        request = pb.SubscribeRequest(topic=self.topic)
        fill_start(request, self.start if self.next_position is None else self.next_position)
        if self.membership is not None:
            self.membership.introduce(request)
        return request

    async def _run(self, call: Any) -> None:
        """Read the stream; when it breaks, go on at another broker from the next position."""
        try:
            while True:
                try:
                    await self._read(call)
                except grpc.aio.AioRpcError as failed:
                    error = translated(failed)
                    if not isinstance(error, BrokerUnavailable):
                        raise error from None
                finally:
                    call.cancel()
                call = await self._subscribe_again()
        except CxlmqError as failed:
            self._fail(failed)

    async def _subscribe_again(self) -> Any:
        for tried in range(RECONNECT_TRIES):
            await asyncio.sleep(RECONNECT_SECONDS)
            try:
                return await self._subscribe()
            except BrokerUnavailable:
                if tried == RECONNECT_TRIES - 1:
                    raise
        raise AssertionError

    async def _read(self, call: Any) -> None:
        while True:
            self.space.clear()              # first: whoever makes room after we looked sets it again
            if self.buffered > self.buffer_bytes:
                await self.space.wait()
                continue
            frame = await call.read()
            if frame is grpc.aio.EOF:
                code = await call.code()
                if code != grpc.StatusCode.OK:
                    raise grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(),
                                               details=await call.details())
                return
            self._take(parse_response(frame, self.topic))

    def _take(self, batches: list[ReceivedBatch]) -> None:
        wanted = self.next_position if self.next_position is not None else (
            self.start if isinstance(self.start, int) else None)
        with self.changed:
            for batch in batches:
                if wanted is not None and batch.position < wanted:
                    batch.drop_before(wanted)
                # A start that is still to come stays where it is.
                self.next_position = wanted = max(wanted or 0, batch.position + batch.count)
                if batch.count:
                    self.batches.append(batch)
                    self.buffered += batch.nbytes
            self._wake()

    def _fail(self, error: CxlmqError) -> None:
        with self.changed:
            self.failure = error
            self._wake()

    def _wake(self) -> None:
        self.changed.notify_all()
        waiters, self.async_waiters = self.async_waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):     # that loop has ended
                loop.call_soon_threadsafe(_wake_up, future)

    async def close(self) -> None:
        """End the stream."""
        self.closed = True
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self._fail(ClosedError(what="the subscriber"))
        await self.connection.close()

    async def seek(self, start: Start) -> None:
        """Forget what is buffered and go on elsewhere."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        with self.changed:
            self.batches.clear()
            self.buffered = self.first_in_batch = 0
            self.failure = None
            self.start, self.next_position = start, None
        try:
            await self.open()
        except CxlmqError as error:
            self._fail(error)
            raise

    # ---- taking (any thread, `changed` held) ------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether there is something to take, or an error to raise."""
        return bool(self.batches) or self.failure is not None

    def take_messages(self, limit: int) -> list[Message]:
        """Up to `limit` buffered messages."""
        out: list[Message] = []
        while self.batches and len(out) < limit:
            batch = self.batches[0]
            taken = batch.to_messages(self.first_in_batch, limit - len(out))
            out += taken
            self.first_in_batch += len(taken)
            if self.first_in_batch == batch.count:
                self._drop_first()
        if not out and self.failure is not None:
            raise self.failure
        return out

    def take_batches(self) -> list[ReceivedBatch]:
        """All buffered batches; one that was begun by `take_messages` comes without what was taken."""
        out: list[ReceivedBatch] = []
        if self.batches and self.first_in_batch:
            self.batches[0].drop_before(self.batches[0].position + self.first_in_batch)
            self.first_in_batch = 0
        while self.batches:
            out.append(self.batches[0])
            self._drop_first()
        if not out and self.failure is not None:
            raise self.failure
        return out

    def _drop_first(self) -> None:
        batch = self.batches.popleft()
        self.first_in_batch = 0
        self.buffered = self.buffered - batch.nbytes if self.batches else 0
        if self.buffered <= self.buffer_bytes and not self.space.is_set():
            self.client_loop.loop.call_soon_threadsafe(self.space.set)

    # ---- taking, as the library's classes ask for it -----------------------------------------------------------------

    def fetch(self, n: int, timeout: float | None) -> list[Message]:
        """Up to `n` messages; empty when nothing came in time."""
        with self.changed:
            self.changed.wait_for(self.ready, timeout)
            return self.take_messages(n)

    def fetch_batches(self, timeout: float | None) -> list[ReceivedBatch]:
        """What is buffered; empty when nothing came in time."""
        with self.changed:
            self.changed.wait_for(self.ready, timeout)
            return self.take_batches()

    async def fetch_async(self, n: int, timeout: float | None) -> list[Message]:
        """As `fetch`, from any event loop."""
        await self._ready_async(timeout)
        with self.changed:
            return self.take_messages(n)

    async def fetch_batches_async(self, timeout: float | None) -> list[ReceivedBatch]:
        """As `fetch_batches`, from any event loop."""
        await self._ready_async(timeout)
        with self.changed:
            return self.take_batches()

    async def _ready_async(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self.changed:
                if self.ready():
                    return
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self.async_waiters.append((loop, future))
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    await future
            except TimeoutError:
                return
            finally:
                with self.changed, contextlib.suppress(ValueError):
                    self.async_waiters.remove((loop, future))

    def position(self) -> int | None:
        """Position of the message that is given out next; None when nothing has told yet."""
        with self.changed:
            if self.batches:
                return self.batches[0].position + self.first_in_batch
            if self.next_position is not None:
                return self.next_position
            return self.start if isinstance(self.start, int) else self.first_position


class _SubscriberBase:
    """What `Subscriber` and `AsyncSubscriber` share."""

    def __init__(self, topic: str, *, cluster: str = "default", bootstrap: str | None = None, transport: str = "auto",
                 start: Start = "beginning", broker: int | None = None, buffer_bytes: int = BUFFER_BYTES,
                 group: str | None = None, protect: bool = False, auto_commit: float | None = None,
                 group_wait: float = 0.0, security: str | Path | None = None) -> None:
        if transport not in TRANSPORTS:
            raise ConfigError(setting="transport", value=repr(transport), allowed=", ".join(TRANSPORTS))
        check_topic_name(topic)
        check_start(start)
        if group is None and (protect or auto_commit is not None):
            raise ConfigError(setting="group", value="None", allowed="a name, for protect or auto_commit")
        self._arguments = topic, cluster, bootstrap, start, broker, buffer_bytes
        self._falls_back = transport == "auto"
        self._engine: SubscriberEngine | AttachedSubscriberEngine = (
            SubscriberEngine(*self._arguments) if transport == "grpc"
            else AttachedSubscriberEngine(*self._arguments, views=transport == "attached"))
        self._engine.connection.secured(security)
        self._start = start
        self._membership: Membership | None = None
        if group is not None:
            self._membership = Membership(self._engine.connection, topic, group, protect, auto_commit, group_wait)
            self._engine.membership = self._membership
        end_in_child(self)

    def after_fork(self) -> None:
        """In a child of the process that opened it. Views that end there must not end the parent's."""
        if isinstance(self._engine, ForkedEngine):
            return
        if isinstance(self._engine, AttachedSubscriberEngine):
            self._engine.after_fork()
        self._engine, self._membership = cast(SubscriberEngine, keep(self._engine)), None

    async def _open_engine(self) -> None:
        """On the client loop. Attaches when it can and may; what stands against it is an error only when asked for."""
        try:
            await self._engine.open()
        except (RegionError, AttachSlotsFull):
            if not self._falls_back:
                raise
            self._falls_back = False
            fresh = SubscriberEngine(*self._arguments)
            fresh.connection, fresh.membership, fresh.start = (
                self._engine.connection, self._engine.membership, self._engine.start)
            self._engine = fresh
            await self._open_engine()

    @property
    def transport(self) -> str:
        """How batches come: "attached" or "grpc"."""
        return "grpc" if isinstance(self._engine, SubscriberEngine) else "attached"

    @property
    def position(self) -> int | None:
        """Position of the next message."""
        return self._engine.position()

    @property
    def end_position(self) -> int:
        """Where the log ended when the subscription began."""
        return self._engine.end_position

    async def _open(self) -> None:
        """Join the group, if any, and subscribe at its place."""
        if self._membership is not None:
            self._engine.start = await self._membership.join(self._start)
        await self._open_engine()

    async def _close(self, position: int | None) -> None:
        if self._membership is not None:
            await self._membership.leave(position if self._membership.auto_commit is not None else None)
        await self._engine.close()

    def _member(self) -> Membership:
        if self._membership is None:
            raise ConfigError(setting="group", value="None", allowed="a name, to commit")
        return self._membership

    def _last_handed(self) -> int | None:
        return None if self._membership is None else self._membership.handed

    def _to_commit(self, position: int | None) -> int:
        """What `commit` means: a position, or everything that was given out."""
        handed = self._member().handed
        return position if position is not None else handed if handed is not None else 0

    def _asked_again(self) -> None:
        """Whoever asks for more has processed what it was given."""
        if self._membership is not None and self._membership.handed is not None:
            self._membership.processed = self._membership.handed

    def _handed_out(self, position: int | None = None) -> None:
        if self._membership is not None:
            self._membership.handed = self._engine.position() if position is None else position

    async def _end_now(self) -> int:
        engine = self._engine
        topic = await engine.connection.any("Admin/DescribeTopic", pb.DescribeTopicRequest(name=engine.topic), pb.Topic)
        return int(topic.end_position)


class Subscriber(_SubscriberBase):
    """Reads one topic in the total order. `with Subscriber("topic") as subscriber: subscriber.fetch(10, timeout=1)`

    `start` is "beginning" (what is kept), "end", a position, or a datetime: the first batch published then or later.
    `broker` chooses the broker that serves (any can).
    With transport "attached" payloads are read-only views of the segments, which are kept while a view is held; "auto"
    reads there, too, when the region is on this machine, and gives bytes as "grpc" does.

    With `group`, reading starts where the group has committed (`start` counts for a new group only), one member reads
    at a time (`GroupBusy` names the other one; `group_wait` seconds are waited for it), and `commit` moves the group's
    place. `protect` keeps what the group has not committed, else `PositionLost` may tell of a range that is gone.
    `auto_commit` commits every so many seconds what was given out before the last fetch, and the rest when a `with`
    ends without error.

    `security` is the folder with our certificate and token. Raises the typed errors of `client.errors`.
    """

    def open(self) -> "Subscriber":
        """Subscribe; `with` does it."""
        try:
            self._engine.client_loop.run(self._open())
        except BaseException:
            self._engine.client_loop.run(self._close(None))
            raise
        return self

    def fetch(self, n: int = 1, timeout: float | None = None) -> list[Message]:
        """Up to `n` messages, as soon as there is one; empty when nothing came in `timeout` seconds."""
        self._asked_again()
        found = self._next(n, timeout)
        self._handed_out()
        return found

    def _next(self, n: int, timeout: float | None) -> list[Message]:
        if self._membership is not None and not self._membership.wait(timeout):
            return []
        return self._engine.fetch(n, timeout)

    def fetch_batches(self, timeout: float | None = None) -> list[ReceivedBatch]:
        """Whole batches, without copying their messages; empty when nothing came in `timeout` seconds."""
        self._asked_again()
        if self._membership is not None and not self._membership.wait(timeout):
            return []
        found = self._engine.fetch_batches(timeout)
        self._handed_out()
        return found

    def commit(self, position: int | None = None) -> None:
        """Move the group's place: everything below `position` is done; None means all that was given out.

        Raises `CommitRefused` (below what is committed, or beyond the end), `GroupFenced` (another member reads now).
        """
        self._engine.client_loop.run(self._member().commit_surely(self._to_commit(position)))

    def __iter__(self) -> Iterator[Message]:
        """Messages, for ever: waits for what comes."""
        while True:
            for message in self._next(1024, None):
                self._asked_again()
                self._handed_out(message.position + 1)
                yield message

    def get_next(self, timeout: float | None = None) -> Message | None:
        """The next message; None when none came in time. The paper's GetNext()."""
        return next(iter(self.fetch(1, timeout)), None)

    def get_all(self) -> list[Message]:
        """Everything up to the end of the log as it is now. The paper's GetAll()."""
        out: list[Message] = []
        end = self._engine.client_loop.run(self._end_now())
        while (left := end - (self.position or 0)) > 0:
            found = self.fetch(left, timeout=PROGRESS_SECONDS)
            if not found:
                raise BrokerUnavailable(NO_PROGRESS, address="the serving broker")
            out += found
        return out

    def seek(self, start: Start) -> None:
        """Go on from "beginning", "end", a position or a time. Raises `PositionLost` when it is reclaimed."""
        check_start(start)
        self._engine.client_loop.run(self._engine.seek(start))
        self._handed_out()

    def close(self) -> None:
        """End the subscription; with `auto_commit`, commit what was given out."""
        if isinstance(self._engine, ForkedEngine):
            return
        self._engine.client_loop.run(self._close(self._last_handed()))

    def __enter__(self) -> "Subscriber":
        return self.open()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._membership is not None:
            self._membership.handed = self._membership.processed    # what was given out last may not be done
        self.close()


class AsyncSubscriber(_SubscriberBase):
    """As `Subscriber`, for coroutines: `async with AsyncSubscriber("topic") as s: async for message in s: ...`"""

    async def open(self) -> "AsyncSubscriber":
        """Subscribe; `async with` does it."""
        try:
            await self._engine.client_loop.call(self._open())
        except BaseException:
            await self._engine.client_loop.call(self._close(None))
            raise
        return self

    async def fetch(self, n: int = 1, timeout: float | None = None) -> list[Message]:
        """Up to `n` messages, as soon as there is one; empty when nothing came in `timeout` seconds."""
        self._asked_again()
        found = await self._next(n, timeout)
        self._handed_out()
        return found

    async def _next(self, n: int, timeout: float | None) -> list[Message]:
        if self._membership is not None and not await self._membership.wait_async(timeout):
            return []
        return await self._engine.fetch_async(n, timeout)

    async def fetch_batches(self, timeout: float | None = None) -> list[ReceivedBatch]:
        """Whole batches, without copying their messages."""
        self._asked_again()
        if self._membership is not None and not await self._membership.wait_async(timeout):
            return []
        found = await self._engine.fetch_batches_async(timeout)
        self._handed_out()
        return found

    async def commit(self, position: int | None = None) -> None:
        """As `Subscriber.commit`."""
        await self._engine.client_loop.call(self._member().commit_surely(self._to_commit(position)))

    async def get_next(self, timeout: float | None = None) -> Message | None:
        """The next message; None when none came in time."""
        return next(iter(await self.fetch(1, timeout)), None)

    async def get_all(self) -> list[Message]:
        """Everything up to the end of the log as it is now."""
        out: list[Message] = []
        end = await self._engine.client_loop.call(self._end_now())
        while (left := end - (self.position or 0)) > 0:
            found = await self.fetch(left, PROGRESS_SECONDS)
            if not found:
                raise BrokerUnavailable(NO_PROGRESS, address="the serving broker")
            out += found
        return out

    async def __aiter__(self) -> AsyncIterator[Message]:
        while True:
            for message in await self._next(1024, None):
                self._asked_again()
                self._handed_out(message.position + 1)
                yield message

    async def seek(self, start: Start) -> None:
        """Go on from "beginning", "end", a position or a time."""
        check_start(start)
        await self._engine.client_loop.call(self._engine.seek(start))
        self._handed_out()

    async def close(self) -> None:
        """End the subscription; with `auto_commit`, commit what was given out."""
        if isinstance(self._engine, ForkedEngine):
            return                          # it is the parent's
        await self._engine.client_loop.call(self._close(self._last_handed()))

    async def __aenter__(self) -> "AsyncSubscriber":
        return await self.open()

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._membership is not None:
            self._membership.handed = self._membership.processed
        await self.close()
