"""Drives a publisher's session: does what it wants done, on the client loop, and tells it what came of that."""

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

from broker.config import TopicConfig
from broker.errors import BrokerUnavailable, CxlmqError
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress
from client.connection import ClientLoop, Connection, answered
from client.publishing.commands import (
    AskBrokers,
    AskWhetherThere,
    Connect,
    Disconnect,
    Failed,
    Leave,
    LookUp,
    NotOpened,
    Opened,
    OpenSession,
    Send,
    Settle,
    Tell,
)
from client.publishing.flights import Flights
from client.publishing.session import Session, State

_log = logging.getLogger("cxlmq")

CLOSE_SESSION_SECONDS = 2.0
OPEN_SECONDS = 5.0                      # a broker that has not opened the session by then is left for another one
ASK_SECONDS = 1.0
LOOK_UP_SECONDS = 5.0


class Driver(ABC):
    """Has the clock, the calls to brokers, and the ways that a transport finds. All of it runs on the client loop."""

    now = staticmethod(time.monotonic)

    def __init__(self, topic: str, *, cluster: str | None, bootstrap: str | None, ack: int | None, client_id: int,
                 delivery_timeout: float, on_event: Callable[[CxlmqError], None] | None) -> None:
        self.topic = topic
        self.client_loop = ClientLoop.get()
        self.loop = self.client_loop.loop
        self.connection = Connection(cluster, bootstrap)
        self.ack = ack
        self.delivery_timeout = delivery_timeout
        self.on_event = on_event
        self.session = Session(topic, client_id, delivery_timeout, self._new_flights())
        self.closed = False
        self.not_opened: CxlmqError | None = None   # why it could not be
        self.decided = asyncio.Event()              # whether it can be opened
        self.ticker: asyncio.Task[None] | None = None
        self.calls: set[asyncio.Task[None]] = set()

    # ---- of each transport ------------------------------------------------------------------------------------------

    @abstractmethod
    def _new_flights(self) -> Flights:
        """What is in flight, as this transport keeps it."""

    @abstractmethod
    def _go(self, command: Connect | Disconnect | Leave | Send) -> None:
        """Find a way to a broker, let go of one, or put a batch on it."""

    @abstractmethod
    async def _supplied(self) -> None:
        """It was opened: wait until something can be sent. Raises why nothing can be."""

    @abstractmethod
    async def _finish_ways(self) -> None:
        """End all ways, after what is under way was finished."""

    @abstractmethod
    def _pause(self) -> float:
        """Seconds until the next tick."""

    @abstractmethod
    def _set_limits(self) -> None:
        """The first session is open, and says what its limits are. Raises `ConfigError` for options beyond them."""

    @abstractmethod
    def _step(self) -> None:
        """Time has passed. Nothing here waits for a broker."""

    @abstractmethod
    def _settle(self, command: Settle) -> None:
        """Tell who published a batch what became of it."""

    @abstractmethod
    def _notify(self) -> None:
        """Wake whoever waits for outcomes."""

    @abstractmethod
    def _fail(self, error: CxlmqError) -> None:
        """Nothing more can be published: everything settles with this error, and so does what comes later."""

    @abstractmethod
    def _give_up(self) -> None:
        """It is closed: settle what is left."""

    # ---- opening ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find the brokers, open the session and a way to every broker."""
        brokers = await self.connection.brokers()
        topic = await self.connection.any("Admin/DescribeTopic", pb.DescribeTopicRequest(name=self.topic), pb.Topic,
                                          LOOK_UP_SECONDS)
        if self.ack is None:
            self.ack = topic.ack
        TopicConfig(name=topic.name, order=topic.order, ack=self.ack,
                    replication_factor=topic.replication_factor).validate(max(2, topic.replication_factor))
        self.session.open(brokers, self.connection.broker_count, self.ack)
        self._perform()
        # Cancelled not before the answer: nobody else could close what it opened.
        _, cancelled = await answered(self.decided.wait())
        if cancelled is not None:
            raise cancelled
        if self.not_opened is not None:
            raise self.not_opened
        await self._supplied()
        if self.session.failure is not None:
            raise self.session.failure
        self.ticker = self.loop.create_task(self._tick())

    async def _tick(self) -> None:
        while not self.closed:
            await asyncio.sleep(self._pause())
            self._step()

    def end_session(self, reason: CxlmqError) -> None:
        """Open the session anew. On the loop."""
        self.session.reopen(reason)
        self._perform()

    @property
    def reopening(self) -> bool:
        """Whether the session is being opened anew."""
        return self.session.state is State.REOPENING

    # ---- what the session wants done --------------------------------------------------------------------------------

    def _perform(self) -> None:
        """Do it, and wake whoever waits for an outcome. Callbacks may run here, which may only add to `pending`."""
        commands, settled = self.session.commands, False
        while commands:
            command = commands.popleft()
            settled |= type(command) is Settle
            self._do(command)
        if settled:
            self._notify()

    def _do(self, command: Any) -> None:
        match command:
            case Send() | Connect() | Disconnect() | Leave():
                self._go(command)
            case Settle():
                self._settle(command)
            case AskBrokers():
                self._call(self._ask_brokers())
            case OpenSession():
                self._call(self._open_session(command))
            case AskWhetherThere():
                self._call(self._ask_whether_there(command.broker))
            case LookUp():
                self._call(self._look_up())
            case Opened(again):
                if not again:
                    self._decided(self._set_limits)
            case NotOpened(error):
                self.not_opened = error
                self.decided.set()
            case Tell(event):
                self._tell(event)
            case Failed(error):
                self._fail(error)

    def _decided(self, prepare: Callable[[], None]) -> None:
        try:
            prepare()
        except CxlmqError as error:
            self.not_opened = error
        self.decided.set()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Call a broker beside everything else, and tell the session. Not any more when it closes."""
        if self.closed:
            coroutine.close()
        else:
            self._beside(self.calls, coroutine)

    def _beside(self, tasks: "set[asyncio.Task[None]]", coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _ask_brokers(self) -> None:
        try:
            brokers = await self.connection.brokers()
        except CxlmqError as error:
            self.session.brokers_unknown(error, self.now())
        else:
            self.session.brokers_known(brokers, self.connection.broker_count, self.now())
        self._perform()

    async def _open_session(self, command: OpenSession) -> None:
        broker = command.broker
        try:
            (opened, cancelled) = await answered(self.connection.unary(
                broker.target, "Admin/OpenSession", command.request, pb.Session, timeout=OPEN_SECONDS))
        except CxlmqError as error:
            self.session.session_refused(error)
        else:
            if not self.session.session_opened(opened, broker, self.now()):
                await self._close_session(opened, broker)
            if cancelled is not None:
                raise cancelled
        self._perform()

    async def _ask_whether_there(self, broker: BrokerAddress) -> None:
        while not self.closed and await self.connection.is_silent(broker.target, ASK_SECONDS):
            self.session.broker_silent(broker, self.now())
            self._perform()
        self.session.broker_there(broker, self.now())

    async def _look_up(self) -> None:
        try:
            topic = await self._describe()
        except CxlmqError:
            self.session.topic_unknown()
        else:
            self.session.topic_known(topic)
            self._perform()

    async def _describe(self) -> pb.Topic:
        """The topic as it is now, from the first broker that answers."""
        error: CxlmqError = BrokerUnavailable(address=f"the brokers of topic {self.topic}")
        silent = self.session.silent
        for broker in sorted(await self.connection.brokers(), key=lambda each: each.id in silent):
            try:
                return await self.connection.unary(broker.target, "Admin/DescribeTopic",
                                                   pb.DescribeTopicRequest(name=self.topic), pb.Topic, ASK_SECONDS)
            except BrokerUnavailable as failed:
                error = failed
        raise error

    def _tell(self, event: CxlmqError) -> None:
        if self.on_event is not None:
            try:
                self.on_event(event)
            except Exception:
                _log.exception("the callback for events failed")

    # ---- closing ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End all ways and the session. What is not settled is given up."""
        self.closed = True
        for task in (self.ticker, *self.calls):
            if task is not None:
                task.cancel()
        await self._finish_ways()
        if self.calls:                      # a session that is opened just now is closed where it was
            await asyncio.wait(self.calls, timeout=CLOSE_SESSION_SECONDS)
        was_open, opened, broker = self.session.state, self.session.opened, self.session.opened_at
        self.session.end()
        if broker is not None and was_open is not State.ENDED:
            await self._close_session(opened, broker)
        self._give_up()
        await self.connection.close()

    async def _close_session(self, opened: pb.Session, broker: BrokerAddress) -> None:
        request = pb.CloseSessionRequest(client_id=self.session.client_id, session_slot=opened.session_slot,
                                         session_epoch=opened.session_epoch)
        with contextlib.suppress(CxlmqError):       # a session without streams ends by itself
            await self.connection.unary(broker.target, "Admin/CloseSession", request, pb.CloseSessionResponse,
                                        timeout=CLOSE_SESSION_SECONDS)
