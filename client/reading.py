"""What both engines of a subscriber share: where it reads, what it has not given out, and how it comes and goes.

    new ──open──► open ──seek──► open ──close──► closed
          a step that is refused or cancelled leaves everything as it was

A new place is reached first, beside the old one; then, without waiting for anything, it takes its place.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from broker.errors import (
    AttachSlotsFull,
    BrokerUnavailable,
    ClosedError,
    ClusterReplaced,
    CursorTableFull,
    CxlmqError,
    RangeLost,
    TopicRecreated,
)
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress
from client.buffer import BatchBuffer
from client.connection import ClientLoop, Connection
from client.group import Membership
from client.received import Message
from client.start import Start, fill_start

P = TypeVar("P")
T = TypeVar("T")
Take = Callable[[BatchBuffer], list[T]]
CLOSE_SECONDS = 2.0
REACH_SECONDS = 15.0                    # a broker that has not answered by then is passed over


class ReadingEngine(Generic[P]):
    """A subscription; `P` is a place at a broker. Coroutines run on the client loop, taking in any thread."""

    copies = True                           # what is taken apart is ours, and no view of what others may change

    def __init__(self, topic: str, cluster: str | None, bootstrap: str | None, start: Start, broker: int | None,
                 buffer_bytes: int) -> None:
        self.topic = topic
        self.client_loop = ClientLoop.get()
        self.connection = Connection(cluster, bootstrap)
        self.start: Start = start
        self.broker = broker
        self.buffer_bytes = buffer_bytes
        self.membership: Membership | None = None
        self.seen = pb.TopicIdentity()              # of the topic that we read
        self.buffer = BatchBuffer()
        self.next_position: int | None = None       # of what comes behind the buffer
        self.failure: CxlmqError | None = None      # for when the buffer is empty
        self.told: CxlmqError | None = None         # what the user was told last
        self.opened = False
        self.closed = False
        self.lock: AbstractContextManager[Any] = threading.RLock()      # of what taking changes
        self.changing = asyncio.Lock()              # one step at a time: opening, seeking, coming back
        self.first_position = 0
        self.end_position = 0

    # ---- what the transports do -------------------------------------------------------------------------------------

    async def _reach_at(self, broker: BrokerAddress, request: pb.SubscribeRequest) -> P:
        """A place at one broker; refused or cancelled, the broker keeps nothing for us."""
        raise NotImplementedError

    def _take_place(self, place: P, start: Start) -> P | None:
        """Read there from now on, without waiting for anything; the former place."""
        raise NotImplementedError

    async def _leave(self, place: P) -> None:
        """Let go of a place."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go of all."""
        raise NotImplementedError

    def fail(self, error: CxlmqError) -> None:
        """Nothing more comes; whoever asks is told why."""
        raise NotImplementedError

    # ---- steps (on the loop) ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Subscribe; returns once the place is protected."""
        async with self.changing:
            if not self.opened:
                place = await self._reach(self.start, self.seen)
                await self._unless_closed(place)
                self._take_place(place, self.start)
                self.opened = True

    async def seek(self, start: Start) -> None:
        """Forget what is buffered and go on elsewhere."""
        async with self.changing:
            self.require_open()
            # Whoever was told that another topic has the name, and seeks, means that one.
            accepted = isinstance(self.told, TopicRecreated | ClusterReplaced) and self.membership is None
            try:
                place = await self._reach(start, pb.TopicIdentity() if accepted else self.seen)
            except (TopicRecreated, ClusterReplaced) as error:
                self.told = error
                raise
            await self._unless_closed(place)
            former = self._take_place(place, start)
            self.told = None
        if former is not None:
            await self._leave(former)

    async def _unless_closed(self, place: P) -> None:
        if self.closed:                             # meanwhile, by another thread or task
            await self._leave(place)
            raise ClosedError(what="the subscriber")

    async def _until_changed(self) -> None:
        """Wait, but not for long, until no step is under way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS), self.changing:
                pass

    async def _reach(self, start: Start, seen: pb.TopicIdentity) -> P:
        """A place at the first broker that gives one."""
        request = pb.SubscribeRequest(topic=self.topic, seen=seen)
        fill_start(request, start)
        if self.membership is not None:
            self.membership.introduce(request)
        error: CxlmqError = BrokerUnavailable(
            address="the cluster" if self.broker is None else f"broker {self.broker}")
        for broker in await self._candidates():
            try:
                async with asyncio.timeout(REACH_SECONDS):      # wait_for may lose a cancellation
                    return await self._reach_at(broker, request)
            except TimeoutError:
                error = BrokerUnavailable(address=broker.target)
            except (BrokerUnavailable, AttachSlotsFull, CursorTableFull) as failed:
                error = failed
        raise error

    async def _candidates(self) -> list[BrokerAddress]:
        """The brokers to try, in order. A chosen one has to be there at first; when it is lost, others serve too."""
        brokers = await self.connection.brokers()
        turn = id(self) // 64 % max(1, len(brokers))
        chosen = [each for each in brokers if each.id == self.broker]
        if self.broker is not None and not self.opened:
            return chosen
        return chosen + [each for each in brokers[turn:] + brokers[:turn] if each.id != self.broker]

    async def _come_back(self) -> P:
        """A place where we were; one try. Raises what `comes_back`, and what does not."""
        if self.membership is not None:
            await self.membership.renew()      # a recovered cluster knows of no member
        return await self._reach(self.start if self.next_position is None else self.next_position, self.seen)

    def _check_end(self, end: int, run_id: int) -> None:
        """Raise `RangeLost` when the log that we came back to has not what we had: others take those positions.

        In the memory that we knew nothing of that is lost: we may have read on since that end was looked at.
        """
        reached = self.next_position
        if run_id != self.seen.run_id and reached is not None and end < reached:
            raise RangeLost(
                f"messages {end} up to {reached} of topic {self.topic}, which this reader had come to, were lost with "
                f"the memory, and new ones take their positions: go on with seek({end})",
                topic=self.topic, first=end, end=reached)

    # ---- any thread -------------------------------------------------------------------------------------------------

    def require_open(self) -> None:
        """Raise `ClosedError` unless it is open."""
        if self.closed:
            raise ClosedError(what="the subscriber")
        if not self.opened:
            raise ClosedError("the subscriber is not open: use `with`, or open()", what="the subscriber")

    def raise_failure(self) -> None:
        """Raise why nothing comes any more, if so."""
        self.require_open()
        if self.failure is not None:
            self.told = self.failure
            raise self.failure

    def position(self) -> int:
        """Position of the message that is given out next."""
        with self.lock:
            position = self.buffer.position()
            if position is None:
                position = self.next_position
            if position is None:
                position = self.start if isinstance(self.start, int) else self.first_position
            return position

    def moved(self, start: Start, position: int, first: int, end: int, seen: pb.TopicIdentity) -> None:
        """We read elsewhere from now on. The lock is held."""
        self.start = start
        # A position that is still to come stays where it is.
        self.next_position = None if isinstance(start, int) else position
        self.first_position, self.end_position = first, end
        self.seen = seen
        self.failure = None
        self.buffer.moved(start if isinstance(start, int) else position)

    # ---- taking -----------------------------------------------------------------------------------------------------

    def taken(self, take: Take[T], deadline: float | None) -> list[T]:
        """What `take` gets out of the buffer as soon as there is something; empty when nothing came in time."""
        raise NotImplementedError

    async def taken_async(self, take: Take[T], deadline: float | None) -> list[T]:
        """As `taken`, from any event loop. Whoever gives up waiting has taken nothing."""
        raise NotImplementedError

    def next_ahead(self) -> Message | None:
        """The next message when it is at hand already, copied; for loops, most of whose messages are."""
        with self.lock:
            return self.buffer.next_ahead() if self.copies and not self.closed else None

    def _take_now(self, take: Take[T]) -> list[T]:
        """The lock is held."""
        self.require_open()
        found = take(self.buffer)
        if not found:
            self.raise_failure()
        return found


def deadline_of(timeout: float | None) -> float | None:
    """When a wait is over (monotonic seconds)."""
    return None if timeout is None else time.monotonic() + timeout


def left_until(deadline: float | None) -> float | None:
    """How long that still is."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
