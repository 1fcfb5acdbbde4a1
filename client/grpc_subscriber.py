"""The engine of a subscriber over gRPC: one stream from one broker, the whole total order, into a bounded buffer."""

import asyncio
import contextlib

import grpc
import grpc.aio

from broker.errors import BrokerUnavailable, CxlmqError
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress
from client.buffer import BatchBuffer
from client.connection import translated
from client.received import parse_response
from client.start import Start
from client.subscribing.commands import AskPlace, Place
from client.subscribing.driver import ReadingDriver, T, Take, left_until
from client.subscribing.reading import Reading, State

SUBSCRIBE = "/cxlmq.v1.PubSub/Subscribe"
SAID = frozenset(f"cxlmq-{name}" for name in ("position", "first-position", "end-position", "run-id", "created-ns"))
RECONNECT_SECONDS = 0.2


def _wake_up(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class SubscriberEngine(ReadingDriver):
    """Keeps a subscription running and its buffer filled. The way of a place is its call."""

    def __init__(self, topic: str, cluster: str | None, bootstrap: str | None, start: Start, broker: int | None,
                 buffer_bytes: int) -> None:
        super().__init__(Reading(topic, start, broker, id(self) // 64, BatchBuffer()), cluster, bootstrap, buffer_bytes)
        self.async_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.space = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    # ---- places -----------------------------------------------------------------------------------------------------

    async def _reach_at(self, broker: BrokerAddress, asked: AskPlace) -> Place:
        call = self.connection.channel(broker.target).unary_stream(
            SUBSCRIBE, pb.SubscribeRequest.SerializeToString)(asked.request)
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
        return Place(said["position"], said["first-position"], said["end-position"],
                     pb.TopicIdentity(run_id=said["run-id"], created_ns=said["created-ns"]), call)

    def _follow(self, place: Place, former: Place | None) -> None:
        if former is not None:
            return                          # the task that came back goes on with it
        if self.task is not None:
            self.task.cancel()              # it takes nothing more in
        self.task = asyncio.get_running_loop().create_task(self._run(place))

    async def _leave(self, place: Place) -> None:
        place.way.cancel()

    # ---- the stream -------------------------------------------------------------------------------------------------

    async def _run(self, place: Place) -> None:
        """Read the stream; when it breaks, go on at another broker from the next position."""
        try:
            while True:
                try:
                    await self._read(place)
                except grpc.aio.AioRpcError as failed:
                    self._lost(place, translated(failed))
                else:
                    self._lost(place, None)
                finally:
                    place.way.cancel()
                found = await self._subscribe_again()
                if found is None:
                    return
                place = found
        except CxlmqError as failed:        # what came is damaged
            self._fail(failed)
        except Exception as failed:         # a mistake of ours: whoever waits is told
            self._fail(CxlmqError(f"internal error: {failed!r}"))
            raise

    def _lost(self, place: Place, error: CxlmqError | None) -> None:
        with self.lock:
            self.reading.lost(place, error)
            self._perform()

    async def _subscribe_again(self) -> Place | None:
        """As long as it takes: whoever waits for messages meanwhile waits as for any. None when we need no place."""
        while self.reading.state is State.RETURNING:
            await asyncio.sleep(RECONNECT_SECONDS)
            if (search := self.reading.come_back()) is not None:
                with contextlib.suppress(CxlmqError):   # the reading knows, and tries again or tells
                    await self._reach(search)
        return self.reading.place if self.reading.state is State.READING else None

    async def _read(self, place: Place) -> None:
        call = place.way
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
            batches = parse_response(frame, self.topic)
            with self.lock:
                self.reading.received(place, batches)
                self._perform()
                if self.reading.state is not State.READING:
                    return

    def fail(self, error: CxlmqError) -> None:
        """Nothing more comes; whoever asks is told why."""
        if self.task is not None:
            self.task.cancel()
        self._fail(error)

    def _wake(self) -> None:
        self.changed.notify_all()
        waiters, self.async_waiters = self.async_waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):     # that loop has ended
                loop.call_soon_threadsafe(_wake_up, future)

    async def close(self) -> None:
        """End the stream."""
        with self.lock:
            self.reading.close()
            self._perform()
        await self._until_changed()
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.connection.close()

    # ---- taking -----------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Whether there is something to take, or an error to raise."""
        return bool(self.buffer) or self.reading.failure is not None or not self.reading.is_open

    def taken(self, take: Take[T], deadline: float | None) -> list[T]:
        with self.changed:
            if not self.buffer:
                self.changed.wait_for(self._ready, left_until(deadline))
            return self._take_from(take)

    def _take_from(self, take: Take[T]) -> list[T]:
        full = self.buffer.nbytes > self.buffer_bytes
        try:
            return self.reading.take(take)
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
