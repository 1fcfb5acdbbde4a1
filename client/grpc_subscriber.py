"""The engine of a subscriber over gRPC: one stream from one broker, the whole total order, into a bounded buffer."""

import asyncio
import contextlib
import threading
from typing import Any, NamedTuple

import grpc
import grpc.aio

from broker.errors import BrokerUnavailable, CxlmqError, UnknownTopic
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress
from client.connection import translated
from client.reading import ReadingEngine, T, Take, left_until
from client.received import ReceivedBatch, parse_response
from client.start import Start

SUBSCRIBE = "/cxlmq.v1.PubSub/Subscribe"
SAID = frozenset(f"cxlmq-{name}" for name in ("position", "first-position", "end-position", "run-id", "created-ns"))
RECONNECT_SECONDS = 0.2


def _wake_up(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class Stream(NamedTuple):
    """A subscription that a broker has granted."""

    call: Any
    position: int
    first_position: int
    end_position: int
    seen: pb.TopicIdentity


class SubscriberEngine(ReadingEngine[Stream]):
    """Keeps a subscription running and its buffer filled."""

    def __init__(self, topic: str, cluster: str | None, bootstrap: str | None, start: Start, broker: int | None,
                 buffer_bytes: int) -> None:
        super().__init__(topic, cluster, bootstrap, start, broker, buffer_bytes)
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.async_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.space = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    # ---- places -----------------------------------------------------------------------------------------------------

    async def _reach_at(self, broker: BrokerAddress, request: pb.SubscribeRequest) -> Stream:
        call = self.connection.channel(broker.target).unary_stream(
            SUBSCRIBE, pb.SubscribeRequest.SerializeToString)(request)
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
        said = {name.removeprefix("cxlmq-"): int(value) for name, value in metadata.items() if name in SAID}
        return Stream(call, said["position"], said["first-position"], said["end-position"],
                      pb.TopicIdentity(run_id=said["run-id"], created_ns=said["created-ns"]))

    def _take_place(self, place: Stream, start: Start) -> None:
        if self.task is not None:
            self.task.cancel()              # it takes nothing more in
        with self.changed:
            self.moved(start, place.position, place.first_position, place.end_position, place.seen)
            self._wake()
        self.task = asyncio.get_running_loop().create_task(self._run(place.call))

    async def _leave(self, place: Stream) -> None:
        place.call.cancel()

    # ---- the stream -------------------------------------------------------------------------------------------------

    async def _run(self, call: Any) -> None:
        """Read the stream; when it breaks, go on at another broker from the next position."""
        try:
            while True:
                try:
                    await self._read(call)
                except grpc.aio.AioRpcError as failed:
                    error = translated(failed)
                    if not error.comes_back and not isinstance(error, UnknownTopic):
                        raise error from None       # a topic that has gone may have been made again: who asks is told
                finally:
                    call.cancel()
                call = await self._subscribe_again()
        except CxlmqError as failed:
            self._fail(failed)
        except Exception as failed:         # a mistake of ours: whoever waits is told
            self._fail(CxlmqError(f"internal error: {failed!r}"))
            raise

    async def _subscribe_again(self) -> Any:
        """As long as it takes: whoever waits for messages meanwhile waits as for any."""
        while True:
            await asyncio.sleep(RECONNECT_SECONDS)
            try:
                place = await self._come_back()
            except CxlmqError as error:
                if not error.comes_back:
                    raise
                continue
            try:
                self._check_end(place.end_position, place.seen.run_id)
            except CxlmqError:
                place.call.cancel()
                raise
            self.seen = place.seen
            return place.call

    async def _read(self, call: Any) -> None:
        while True:
            self.space.clear()              # first: whoever makes room after we looked sets it again
            if self.buffer.nbytes > self.buffer_bytes:
                await self.space.wait()
                continue
            frame = await call.read()
            if frame is grpc.aio.EOF:
                code = await call.code()
                if code != grpc.StatusCode.OK:
                    raise grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(),
                                               details=await call.details())
                return
            self._take_in(parse_response(frame, self.topic))

    def _take_in(self, batches: list[ReceivedBatch]) -> None:
        wanted = self.next_position if self.next_position is not None else (
            self.start if isinstance(self.start, int) else None)
        with self.changed:
            for batch in batches:
                if wanted is not None and batch.position < wanted:
                    batch.drop_before(wanted)
                # A start that is still to come stays where it is.
                self.next_position = wanted = max(wanted or 0, batch.position + batch.count)
                if batch.count:
                    self.buffer.add(batch)
            self._wake()

    def fail(self, error: CxlmqError) -> None:
        """Nothing more comes; whoever asks is told why."""
        if self.task is not None:
            self.task.cancel()
        self._fail(error)

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

    async def end_dropped(self) -> None:
        """Nobody reads any more."""
        await self.close()

    async def close(self) -> None:
        """End the stream."""
        with self.changed:
            self.closed = True
            self.buffer.clear()
            self._wake()
        await self._until_changed()
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.connection.close()

    # ---- taking -----------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Whether there is something to take, or an error to raise."""
        return bool(self.buffer) or self.failure is not None or self.closed or not self.opened

    def taken(self, take: Take[T], deadline: float | None) -> list[T]:
        with self.changed:
            if not self.buffer:
                self.changed.wait_for(self._ready, left_until(deadline))
            return self._take_from(take)

    def _take_from(self, take: Take[T]) -> list[T]:
        full = self.buffer.nbytes > self.buffer_bytes
        try:
            return self._take_now(take)
        finally:
            if full and self.buffer.nbytes <= self.buffer_bytes:
                self.client_loop.loop.call_soon_threadsafe(self.space.set)

    async def taken_async(self, take: Take[T], deadline: float | None) -> list[T]:
        while True:
            await self._ready_async(deadline)
            with self.changed:
                found = self._take_from(take)
            if found or left_until(deadline) == 0:      # else somebody else was faster
                return found

    async def _ready_async(self, deadline: float | None) -> None:
        while True:
            with self.changed:
                if self._ready():
                    return
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self.async_waiters.append((loop, future))
            try:
                async with asyncio.timeout(left_until(deadline)):
                    await future
            except TimeoutError:
                return
            finally:
                with self.changed, contextlib.suppress(ValueError):
                    self.async_waiters.remove((loop, future))
