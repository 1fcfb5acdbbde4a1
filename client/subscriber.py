"""Subscribers: what users call; an engine (gRPC or attached) gets the batches.

What comes next is given to whoever asks next, once: by `for`, `fetch`, `fetch_batches`, `get_next` or `get_all`, in any
mix, from several threads or tasks. Threads that share a subscriber share its stream.
"""

import asyncio
import contextlib
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

from broker.config import check_topic_name
from broker.errors import (
    AttachSlotsFull,
    BrokerUnavailable,
    ClosedError,
    ConfigError,
    CxlmqError,
    RegionError,
    TopicRecreated,
)
from broker.proto import cxlmq_pb2 as pb
from client.arguments import as_count, as_seconds
from client.attached_subscriber import AttachedSubscriberEngine
from client.buffer import BatchBuffer
from client.fork import ForkedEngine, end_in_child, keep
from client.group import Membership
from client.grpc_subscriber import SubscriberEngine
from client.received import Message, ReceivedBatch
from client.start import Start, as_start
from client.subscribing.driver import deadline_of

BUFFER_BYTES = 16 << 20
TRANSPORTS = ("auto", "grpc", "attached")
PROGRESS_SECONDS = 10.0
NO_PROGRESS = f"the broker that serves this reader sent nothing for {PROGRESS_SECONDS:.0f} s: is it stopped?"


_ending = set[asyncio.Task[None]]()     # kept until they are done


def _end_dropped(loop: asyncio.AbstractEventLoop, engine: Any, membership: Membership | None) -> None:
    """On the client loop: leave the group and the place of a subscriber that nobody has any more."""
    async def end() -> None:
        with contextlib.suppress(CxlmqError):           # its broker is gone, or its lease ended
            if membership is not None:
                await membership.leave(None)
        with contextlib.suppress(CxlmqError):
            await engine.end_dropped()

    task = loop.create_task(end())
    _ending.add(task)
    task.add_done_callback(_ending.discard)


class _SubscriberBase:
    """What `Subscriber` and `AsyncSubscriber` share."""

    def __init__(self, topic: str, *, cluster: str | None = None, bootstrap: str | None = None, transport: str = "auto",
                 start: Start = "beginning", broker: int | None = None, buffer_bytes: int = BUFFER_BYTES,
                 group: str | None = None, protect: bool = False, auto_commit: float | None = None,
                 group_wait: float = 0.0, security: str | Path | None = None) -> None:
        if transport not in TRANSPORTS:
            raise ConfigError(setting="transport", value=repr(transport), allowed=", ".join(TRANSPORTS))
        check_topic_name(topic)
        start = as_start(start)
        broker = None if broker is None else as_count("broker", broker, 0)
        buffer_bytes = as_count("buffer_bytes", buffer_bytes)
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
            self._engine.belong(self._membership)
        if isinstance(self._engine, AttachedSubscriberEngine) and self._falls_back:
            self._engine.reading.hands_over = True
            me = weakref.ref(self)          # or nobody would notice when it is dropped
            self._engine.over_grpc = lambda: None if (there := me()) is None else there._over_grpc()
            self._engine.handed_over = lambda engine: None if (there := me()) is None else there._goes_on_with(engine)
        self._opening = asyncio.Lock()
        self._closing: asyncio.Task[None] | None = None
        end_in_child(self)

    def after_fork(self) -> None:
        """In a child of the process that opened it. Views that end there must not end the parent's."""
        if isinstance(self._engine, ForkedEngine):
            return
        if isinstance(self._engine, AttachedSubscriberEngine):
            self._engine.after_fork()
        self._engine, self._membership = cast(SubscriberEngine, keep(self._engine)), None

    def __del__(self) -> None:
        """Dropped and never closed: brokers keep neither its place nor its group for it. What is viewed stays."""
        engine = getattr(self, "_engine", None)
        if engine is None or isinstance(engine, ForkedEngine) or not engine.opened or engine.closed:
            return
        with contextlib.suppress(RuntimeError):         # the interpreter ends, and the loop with it
            warnings.warn(f"a subscriber of topic {engine.topic} was dropped without close()", ResourceWarning,
                          source=self, stacklevel=2)
            loop = engine.client_loop.loop
            loop.call_soon_threadsafe(_end_dropped, loop, engine, self._membership)

    async def _open_engine(self) -> None:
        """On the client loop. Attaches when it can and may; what stands against it is an error only when asked for."""
        try:
            await self._engine.open()
        except (RegionError, AttachSlotsFull):
            if not self._falls_back:
                raise
            self._falls_back = False
            self._engine = self._over_grpc()
            await self._open_engine()

    def _over_grpc(self) -> SubscriberEngine:
        """What reads where attaching is not possible."""
        fresh = SubscriberEngine(*self._arguments)
        fresh.connection, fresh.reading.start = self._engine.connection, self._engine.reading.start
        if self._engine.membership is not None:
            fresh.belong(self._engine.membership)
        return fresh

    def _goes_on_with(self, engine: SubscriberEngine) -> None:
        """The former engine found no place any more. Its lock is held."""
        self._engine = engine

    @contextlib.contextmanager
    def _held(self) -> Iterator[SubscriberEngine | AttachedSubscriberEngine]:
        """The engine that reads, locked: no other one takes its place meanwhile."""
        while True:
            engine = self._engine
            with engine.lock:
                if engine is self._engine:
                    yield engine
                    return

    @property
    def transport(self) -> str:
        """How batches come: "attached" or "grpc"."""
        return "grpc" if isinstance(self._engine, SubscriberEngine) else "attached"

    @property
    def position(self) -> int:
        """Position of the next message."""
        return self._engine.position()

    @property
    def end_position(self) -> int:
        """Where the log ended when the subscription began."""
        return self._engine.reading.end_position

    async def _open(self) -> None:
        """Join the group, if any, and subscribe at its place; all of it or nothing."""
        async with self._opening:
            if self._closing is not None:
                raise ClosedError(what="the subscriber")
            if self._engine.opened:
                return
            try:
                if self._membership is not None:
                    self._engine.reading.start = await self._membership.join(self._start)
                await self._open_engine()
            except BaseException:
                if self._membership is not None:
                    await self._membership.leave(None)
                await self._engine.connection.close()
                raise
            if self._membership is not None:
                self._engine.buffer.handed = self._membership.committed

    async def _close(self, position: int | None) -> None:
        """Begun once, and then done to its end, whoever waits for it or gives up waiting."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close_now(position))
        await asyncio.shield(self._closing)

    async def _close_now(self, position: int | None) -> None:
        self._engine.shut()
        if self._membership is not None:
            await self._membership.leave(position if self._membership.auto_commit is not None else None)
        await self._engine.close()

    def _member(self) -> Membership:
        if self._membership is None:
            raise ConfigError(setting="group", value="None", allowed="a name, to commit")
        self._engine.require_open()
        return self._membership

    def _done(self, clean: bool) -> int | None:
        """What a last commit may say: all that was given out, or, after an error, what was before the last call."""
        return self._engine.buffer.handed if clean or self._membership is None else self._membership.processed

    def _to_commit(self, position: int | None) -> int:
        """What `commit` means: a position, or everything that was given out."""
        return as_count("position", self._engine.buffer.handed if position is None else position, 0)

    @staticmethod
    def _who() -> Any:
        """Who reads: of several, each has processed what it was given when it asks again."""
        raise NotImplementedError

    def _asks(self) -> None:
        """Whoever asks for more has processed what it was given."""
        membership, handed = self._membership, self._engine.buffer.handed
        if membership is not None and membership.auto_commit is not None and handed is not None:
            membership.processed = membership.work.asks(self._who(), handed)

    def _got_nothing(self) -> None:
        if self._membership is not None:
            self._membership.work.got_nothing(self._who())

    def _at_hand(self) -> Message | None:
        """For loops: the next message when nothing has to be waited for or looked at, which is the rule."""
        membership = self._membership
        if membership is not None:
            self._asks()
            if not membership.valid():
                return None
        return self._engine.next_ahead()

    async def _end_now(self) -> int:
        engine = self._engine
        engine.require_open()
        topic = await engine.connection.any("Admin/DescribeTopic", pb.DescribeTopicRequest(name=engine.topic), pb.Topic)
        if topic.created_ns != engine.reading.seen.created_ns:
            raise TopicRecreated(topic=engine.topic)
        return int(topic.end_position)

    def _gave_all(self, batches: list[ReceivedBatch], end: int, turn: int) -> list[Message]:
        """The messages of claimed batches up to `end`; what lies behind it comes next."""
        out = [message for batch in batches for message in batch.to_messages(0, max(0, end - batch.position))]
        with self._held() as engine:
            if batches and batches[-1].position + batches[-1].count > end:
                batches[-1].drop_before(end)
                engine.buffer.put_back(batches[-1:], turn)
            engine.buffer.gave(end, turn)
        return out

    def _give_back(self, batches: list[ReceivedBatch], turn: int) -> None:
        """What was claimed is given out to nobody: it comes next, unless somebody sought elsewhere meanwhile."""
        with self._held() as engine:
            engine.buffer.put_back(batches, turn)


class Subscriber(_SubscriberBase):
    """Reads one topic in the total order. `with Subscriber("topic") as subscriber: subscriber.fetch(10, timeout=1)`

    `start` is "beginning" (what is kept), "end", a position, or a datetime: the first batch published then or later.
    `broker` chooses the broker that serves (any can).
    With transport "attached" payloads are read-only views of the segments, which are kept while a view is held; "auto"
    reads there, too, when the region is on this machine, and gives bytes as "grpc" does.

    With `group`, reading starts where the group has committed (`start` counts for a new group only), one member reads
    at a time (`GroupBusy` names the other one; `group_wait` seconds are waited for it), and `commit` moves the group's
    place. `protect` keeps what the group has not committed, else `PositionLost` may tell of a range that is gone.
    `auto_commit` commits every so many seconds what was given out before the last fetch (of several threads or tasks
    that read: before the last of each that has not ended), and the rest when a `with` ends without error.

    `security` is the folder with our certificate and token. Raises the typed errors of `client.errors`.
    """

    _who = staticmethod(threading.current_thread)

    def open(self) -> "Subscriber":
        """Subscribe; `with` does it. Refused, it can be tried again; once closed, another one has to be made."""
        self._engine.client_loop.run(self._open())
        return self

    def _taken(self, take: Any, timeout: float | None) -> list[Any]:
        deadline = deadline_of(as_seconds("timeout", timeout))
        self._asks()
        found: list[Any] = []
        try:
            if self._membership is None or self._membership.wait(deadline):
                found = self._engine.taken(take, deadline)
        finally:
            if not found:
                self._got_nothing()
        return found

    def fetch(self, n: int = 1, timeout: float | None = None) -> list[Message]:
        """Up to `n` messages, as soon as there is one; empty when nothing came in `timeout` seconds."""
        return self._taken(partial(BatchBuffer.take_messages, limit=as_count("n", n)), timeout)

    def fetch_batches(self, timeout: float | None = None) -> list[ReceivedBatch]:
        """Whole batches, without copying their messages; empty when nothing came in `timeout` seconds."""
        return self._taken(BatchBuffer.take_batches, timeout)

    def commit(self, position: int | None = None) -> None:
        """Move the group's place: everything below `position` is done; None means all that was given out.

        Raises `CommitRefused` (below what is committed, or beyond the end), `GroupFenced` (another member reads now).
        """
        self._engine.client_loop.run(self._member().commit_surely(self._to_commit(position)))

    def __iter__(self) -> Iterator[Message]:
        """Messages, for ever: waits for what comes. What a loop that ends has not given out comes next."""
        while True:
            message = self._at_hand()
            if message is not None:
                yield message
            else:
                yield from self._taken(BatchBuffer.take_message, None)

    def get_next(self, timeout: float | None = None) -> Message | None:
        """The next message; None when none came in time. The paper's GetNext()."""
        return next(iter(self.fetch(1, timeout)), None)

    def get_all(self) -> list[Message]:
        """Everything up to the end of the log as it is now; all of it, or an error and nothing.

        The paper's GetAll().
        """
        end = self._engine.client_loop.run(self._end_now())
        claimed, turn = list[ReceivedBatch](), self._engine.buffer.turn
        try:
            while self.position < end:
                found = self._taken(BatchBuffer.claim, PROGRESS_SECONDS)
                if not found:
                    raise BrokerUnavailable(NO_PROGRESS, address="the serving broker")
                claimed += found
            return self._gave_all(claimed, end, turn)
        except BaseException:
            self._give_back(claimed, turn)
            raise

    def seek(self, start: Start) -> None:
        """Go on from "beginning", "end", a position or a time. Raises `PositionLost` when it is reclaimed.

        Refused, reading goes on where it was.
        """
        self._engine.client_loop.run(self._engine.seek(as_start(start)))

    def close(self) -> None:
        """End the subscription; with `auto_commit`, commit what was given out."""
        self._end(True)

    def _end(self, clean: bool) -> None:
        if not isinstance(self._engine, ForkedEngine):
            self._engine.client_loop.run(self._close(self._done(clean)))

    def __enter__(self) -> "Subscriber":
        return self.open()

    def __exit__(self, kind: object, *_: object) -> None:
        self._end(kind is None)


class AsyncSubscriber(_SubscriberBase):
    """As `Subscriber`, for coroutines: `async with AsyncSubscriber("topic") as s: async for message in s: ...`

    A call that is cancelled has taken nothing and changed nothing; a cancelled `close` is done all the same.
    """

    _who = staticmethod(asyncio.current_task)

    async def open(self) -> "AsyncSubscriber":
        """Subscribe; `async with` does it."""
        await self._engine.client_loop.call(self._open())
        return self

    async def _taken(self, take: Any, timeout: float | None) -> list[Any]:
        deadline = deadline_of(as_seconds("timeout", timeout))
        self._asks()
        found: list[Any] = []
        try:
            if self._membership is None or await self._membership.wait_async(deadline):
                found = await self._engine.taken_async(take, deadline)
        finally:
            if not found:
                self._got_nothing()
        return found

    async def fetch(self, n: int = 1, timeout: float | None = None) -> list[Message]:
        """Up to `n` messages, as soon as there is one; empty when nothing came in `timeout` seconds."""
        return await self._taken(partial(BatchBuffer.take_messages, limit=as_count("n", n)), timeout)

    async def fetch_batches(self, timeout: float | None = None) -> list[ReceivedBatch]:
        """Whole batches, without copying their messages."""
        return await self._taken(BatchBuffer.take_batches, timeout)

    async def commit(self, position: int | None = None) -> None:
        """As `Subscriber.commit`."""
        await self._engine.client_loop.call(self._member().commit_surely(self._to_commit(position)))

    async def get_next(self, timeout: float | None = None) -> Message | None:
        """The next message; None when none came in time."""
        return next(iter(await self.fetch(1, timeout)), None)

    async def get_all(self) -> list[Message]:
        """Everything up to the end of the log as it is now; all of it, or an error and nothing."""
        end = await self._engine.client_loop.call(self._end_now())
        claimed, turn = list[ReceivedBatch](), self._engine.buffer.turn
        try:
            while self.position < end:
                found = await self._taken(BatchBuffer.claim, PROGRESS_SECONDS)
                if not found:
                    raise BrokerUnavailable(NO_PROGRESS, address="the serving broker")
                claimed += found
            return self._gave_all(claimed, end, turn)
        except BaseException:
            self._give_back(claimed, turn)
            raise

    async def __aiter__(self) -> AsyncIterator[Message]:
        while True:
            message = self._at_hand()
            if message is not None:
                yield message
            else:
                for each in await self._taken(BatchBuffer.take_message, None):
                    yield each

    async def seek(self, start: Start) -> None:
        """Go on from "beginning", "end", a position or a time. Refused or cancelled, reading goes on where it was."""
        await self._engine.client_loop.call(self._engine.seek(as_start(start)))

    async def close(self) -> None:
        """End the subscription; with `auto_commit`, commit what was given out."""
        await self._end(True)

    async def _end(self, clean: bool) -> None:
        if not isinstance(self._engine, ForkedEngine):
            await self._engine.client_loop.call(self._close(self._done(clean)))

    async def __aenter__(self) -> "AsyncSubscriber":
        return await self.open()

    async def __aexit__(self, kind: object, *_: object) -> None:
        await self._end(kind is None)
