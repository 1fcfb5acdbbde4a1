"""Drives a reading: does what it wants done, on the client loop, and tells it what came of that.

Coroutines run on the client loop, taking in any thread; whoever tells the reading something holds the lock.
"""

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from broker.errors import BrokerUnavailable, ClosedError, CxlmqError
from client.brokers import BrokerAddress
from client.buffer import BatchBuffer
from client.connection import ClientLoop, Connection
from client.group import Membership
from client.received import Message
from client.start import Start
from client.subscribing.commands import AskBrokers, AskPlace, Follow, GoOn, HandOver, Leave, Place, Renew, Wake
from client.subscribing.reading import Reading, State
from client.subscribing.search import Search

T = TypeVar("T")
Take = Callable[[BatchBuffer], list[T]]
CLOSE_SECONDS = 2.0
REACH_SECONDS = 15.0                    # a broker that has not answered by then is passed over


class ReadingDriver(ABC):
    """A subscription: the calls to brokers, and the ways that a transport finds."""

    copies = True                           # what is taken apart is ours, and no view of what others may change

    def __init__(self, reading: Reading, cluster: str | None, bootstrap: str | None, buffer_bytes: int) -> None:
        self.topic, self.reading, self.buffer = reading.topic, reading, reading.buffer
        self.client_loop = ClientLoop.get()
        self.connection = Connection(cluster, bootstrap)
        self.buffer_bytes = buffer_bytes
        self.membership: Membership | None = None
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.changing = asyncio.Lock()              # one step at a time: opening, seeking, coming back

    def belong(self, membership: Membership) -> None:
        """Read as the member of a group."""
        self.membership, self.reading.introduce = membership, membership.introduce

    @property
    def opened(self) -> bool:
        """Whether it has been opened."""
        return self.reading.place is not None

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self.reading.state is State.CLOSED

    # ---- of each transport ------------------------------------------------------------------------------------------

    @abstractmethod
    async def _reach_at(self, broker: BrokerAddress, asked: AskPlace) -> Place:
        """A place at one broker; refused or cancelled, the broker keeps nothing for us."""

    @abstractmethod
    def _follow(self, place: Place, former: Place | None) -> None:
        """Read there from now on, without waiting for anything; `former` is the same place at another broker."""

    @abstractmethod
    async def _leave(self, place: Place) -> None:
        """Let go of a place."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of all."""

    async def end_dropped(self) -> None:
        """Nobody reads any more."""
        await self.close()

    async def _hand_over(self, command: HandOver) -> None:
        """Let another transport read on, when that may."""
        raise AssertionError("there is no other")

    def _wake(self) -> None:                # noqa: B027 whoever polls needs no waking
        """Wake whoever waits. The lock is held."""

    # ---- steps (on the loop) ----------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Subscribe; returns once the place is protected."""
        async with self.changing:
            if self.closed:
                raise ClosedError(what="the subscriber")
            if not self.opened:
                with self.lock:
                    search = self.reading.open()
                await self._reach(search)

    async def seek(self, start: Start) -> None:
        """Forget what is buffered and go on elsewhere."""
        async with self.changing:
            with self.lock:
                search = self.reading.seek(start)
            left = await self._reach(search)
        for place in left:
            await self._leave(place)

    async def _until_changed(self) -> None:
        """Wait, but not for long, until no step is under way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS), self.changing:
                pass

    async def _reach(self, search: Search) -> list[Place]:
        """Do what a search wants; the places that are to be left then. Raises why there is none."""
        try:
            while search.wants is not None:
                place = await self._answer(search)
                if place is not None:
                    await self._leave(place)        # it was closed meanwhile, by another thread or task
        except BaseException:
            with self.lock:
                self.reading.give_up(search)
            raise
        left = []
        for command in self._perform():
            if isinstance(command, HandOver):
                await self._hand_over(command)
            else:
                left.append(command.place)
        if search.error is not None:
            raise search.error
        return left

    async def _answer(self, search: Search) -> Place | None:
        """Ask for what a search wants now, and tell it; a place that nobody wants any more."""
        try:
            match search.wants:
                case Renew():
                    assert self.membership is not None
                    await self.membership.renew()   # a recovered cluster knows of no member
                    with self.lock:
                        search.renewed()
                case AskBrokers():
                    brokers = await self._brokers()
                    with self.lock:
                        search.brokers_known(brokers)
                case AskPlace(broker) as asked:
                    try:
                        async with asyncio.timeout(REACH_SECONDS):      # wait_for may lose a cancellation
                            place = await self._reach_at(broker, asked)
                    except TimeoutError:
                        raise BrokerUnavailable(address=broker.target) from None
                    with self.lock:
                        if not search.granted(place):
                            return place
        except CxlmqError as error:
            with self.lock:
                search.refused(error)
        return None

    async def _brokers(self) -> list[BrokerAddress]:
        return await self.connection.brokers()

    def _perform(self) -> list[Leave | HandOver]:
        """Do what the reading wants; what is left of that has to be waited for."""
        left: list[Leave | HandOver] = []
        with self.lock:
            commands = self.reading.commands
            while commands:
                match commands.popleft():
                    case Follow(place):
                        self._follow(place, None)
                    case GoOn(former, place):
                        self._follow(place, former)
                    case Wake():
                        self._wake()
                    case command:
                        left.append(command)
        return left

    def fail(self, error: CxlmqError) -> None:
        """End what reads, and let whoever asks know why."""
        self._fail(error)

    def _fail(self, error: CxlmqError) -> None:
        """Nothing more comes; whoever asks is told why."""
        with self.lock:
            self.reading.fail(error)
            self._perform()

    # ---- any thread -------------------------------------------------------------------------------------------------

    def shut(self) -> None:
        """Give out nothing more; `close` lets go of the rest."""
        with self.lock:
            self.reading.close()
            self._perform()

    def require_open(self) -> None:
        """Raise `ClosedError` unless it is open."""
        self.reading.require_open()

    def position(self) -> int:
        """Position of the message that is given out next."""
        with self.lock:
            return self.reading.position()

    # ---- taking -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def taken(self, take: Take[T], deadline: float | None) -> list[T]:
        """What `take` gets out of the buffer as soon as there is something; empty when nothing came in time."""

    @abstractmethod
    async def taken_async(self, take: Take[T], deadline: float | None) -> list[T]:
        """As `taken`, from any event loop. Whoever gives up waiting has taken nothing."""

    def next_ahead(self) -> Message | None:
        """The next message when it is at hand already, copied; for loops, most of whose messages are."""
        with self.lock:
            return self.buffer.next_ahead() if self.copies and not self.closed else None


def deadline_of(timeout: float | None) -> float | None:
    """When a wait is over (monotonic seconds)."""
    return None if timeout is None else time.monotonic() + timeout


def left_until(deadline: float | None) -> float | None:
    """How long that still is."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
