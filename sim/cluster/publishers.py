"""Publishers of the simulated cluster: the library's session (`client.publishing`), driven by simulated time and calls.

    act: answers of calls ─► what came by connections ─► new batches ─► tick    commands ─► calls, connections, outcomes

A connection is first in first out each way, as a gRPC stream is; it may be slow, it may break, and then nobody knows
what of it arrived.
"""

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from broker.errors import BrokerUnavailable, CxlmqError, DeliveryTimeout, MessageLost, PoolFull, ReplicaFailed
from broker.proto import cxlmq_pb2 as pb
from broker.stages import receiver as receiving
from client.batch import Batch, Packer
from client.brokers import BrokerAddress
from client.publishing.commands import (
    AskBrokers,
    AskWhetherThere,
    Connect,
    Disconnect,
    Failed,
    LookUp,
    Opened,
    OpenSession,
    Send,
    Settle,
    Tell,
)
from client.publishing.flights import Flights
from client.publishing.session import Session, State
from client.publishing.stream_flights import StreamFlights, Way
from sim.cluster.history import Operation, Violation
from sim.cluster.witness import build_payload

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

SECONDS_A_STEP = 0.0005                     # as clients count: their time-outs are made for milliseconds, not for steps
NEVER = 1e18                                # seconds: nothing expires here, the run ends before
ANSWER_STEPS = 4_000                        # a call that has no answer for so long has failed
STANDS_STILL_STEPS = 500                    # between two questions whether a host goes on
PUSH_BACK_STEPS = 2_000                     # a broker looks so long for room for a batch before it refuses it
WINDOW_BYTES = 16 << 20


class Connection:
    """One publisher's stream to one host, with what is under way on it."""

    def __init__(self, publisher: "Publisher", host: "Host", way: Way, opened: pb.PublishOpen) -> None:
        self.publisher, self.host, self.world = publisher, host, publisher.world
        self.way, self.opened = way, opened
        self.up: deque[tuple[int, bytes, int]] = deque()          # due, frame, sequence
        self.down: deque[tuple[int, Any]] = deque()               # due, response or error
        self.sent: dict[int, int] = {}                            # sequence -> step, of what has no answer
        self.topic, self.stream = 0, -1
        self.broken = not host.powered
        self.full_since = -1
        self.incarnation = host.incarnation
        host.connections.append(self)

    def send(self, batch: Batch) -> None:
        """Put a batch on its way, once or (a copy that the network kept) twice."""
        frame = bytes(memoryview(batch.frame))                    # its sequence is stamped into it, and may be again
        self.sent[batch.sequence] = self.world.step
        for _ in range(2 if self.world.strikes("message doubled", self.world.network, 0.02) else 1):
            due = self.world.step + self.world.delay()
            self.up.append((max(due, self.up[-1][0] if self.up else 0), frame, batch.sequence))

    def answer(self, response: Any) -> None:
        due = self.world.step + self.world.delay()
        self.down.append((max(due, self.down[-1][0] if self.down else 0), response))

    def serve(self) -> None:
        """The broker's side: take what has arrived, and answer what is settled."""
        host, acks, opened = self.host, self.host.acks, self.opened
        while self.up and self.up[0][0] <= self.world.step and not self.broken:
            if self.stream < 0 and not self._open():
                return
            _, frame, sequence = self.up[0]
            if self.world.strikes("handler failed", self.world.network, 0.01):
                host.receiver.abandon(self.topic)                 # a handler that failed after it had reserved
            status = host.receiver.receive(frame, self.stream, self.topic, opened.client_id, opened.session_slot,
                                           opened.session_epoch)
            if status in (receiving.RING_FULL, receiving.POOL_EMPTY, receiving.WINDOW_FULL):
                if self.full_since < 0:
                    self.full_since = self.world.step
                if self.world.step - self.full_since < PUSH_BACK_STEPS:
                    break
                self.answer(pb.PublishResponse(refusals=[
                    pb.Refusal(batch_sequence=sequence, code="pool-full", details='{"holder": "the simulation"}')]))
            elif status != receiving.RECEIVED:
                raise Violation("N", f"host {host.number} refused a sound batch with status {status}")
            self.full_since = -1
            self.up.popleft()
        if self.stream >= 0 and acks.has_acks(self.stream):
            epoch = host.sequencer_epoch()
            self.answer(pb.PublishResponse.FromString(acks.take_acks(self.stream, epoch)))

    def _open(self) -> bool:
        """As the broker's server opens a stream."""
        try:
            entry, self.stream = self.host.session_service.open_stream(self.opened)
        except BrokerUnavailable:
            return False                    # a new head is taking over
        except CxlmqError as error:
            self.answer(error)
            self.up.clear()
            return False
        self.topic = entry.number
        return True

    def cut(self) -> None:
        """Nothing passes any more, either way; the broker notices as well."""
        if not self.broken:
            self.broken = True
            self.up.clear()
            self.down.clear()
            if self.stream >= 0 and self.host.powered and self.host.incarnation == self.incarnation:
                self.host.session_service.close_stream(self.opened, self.stream)
        if self in self.host.connections:
            self.host.connections.remove(self)


class Publisher:
    """A client that publishes `batches` batches of one to three messages, `window` at a time."""

    def __init__(self, world: "World", client: int, topic: Any, batches: int, window: int, level: int) -> None:
        self.world, self.client, self.topic, self.level = world, client, topic, level
        self.name = f"client {client}"
        self.random = world.scenario.random(f"publisher {client}")
        self.batches, self.window = batches, window
        self.next_number = self.submitted = 0
        self.dead = False
        steps = world.scenario.delivery_steps
        self.delivery_timeout = steps * SECONDS_A_STEP if steps else NEVER
        self.session = Session(topic.name, client, self.delivery_timeout, self._new_flights())
        numbers = world.layout.numbers
        self.packer = Packer(self, self._batch_is_full, numbers["batch_bytes_max"], numbers["message_bytes_max"])
        self.operations: dict[Batch, Operation] = {}    # that have no outcome yet
        self.answers: list[tuple[int, Callable[[], None]]] = []         # of calls: when they come
        self.request: asyncio.Task[pb.Session] | None = None
        self.request_until, self.asked = 0, BrokerAddress(0, "")
        self.connections: dict[int, Connection] = {}    # by host

    def _new_flights(self) -> Flights:
        self.streams = StreamFlights(self.window, WINDOW_BYTES)
        return self.streams

    # ---- what the packer asks its engine for ------------------------------------------------------------------------

    def make_room(self, nbytes: int) -> None:
        """There is room."""

    def _batch_is_full(self) -> None:
        raise AssertionError("a batch of three messages is never full")

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of its session."""
        return self.session.epoch

    @property
    def state(self) -> str:
        """For people."""
        return "dead" if self.dead else self.session.state.value

    @property
    def finished(self) -> bool:
        """Whether it has nothing left to do."""
        return self.dead or (not self.operations and (self.submitted >= self.batches or self.world.draining))

    def now(self) -> float:
        """Its clock, seconds."""
        return self.world.step * SECONDS_A_STEP

    def die(self) -> None:
        """The process is gone: what was in flight stays unknown."""
        self.dead = True
        for connection in list(self.connections.values()):
            connection.cut()
        self.connections.clear()

    def end(self) -> None:
        """The run is over."""

    def act(self) -> None:
        """What the client does when it comes to run."""
        if self.dead:
            return
        due = [answer for step, answer in self.answers if step <= self.world.step]
        self.answers = [each for each in self.answers if each[0] > self.world.step]
        for answer in due:
            self._event(answer)
        self._hear_of_session()
        for connection in list(self.connections.values()):
            self._hear(connection)
        if self.session.state is State.CLOSED:
            self._event(lambda: self.session.open(self._live(), len(self.world.hosts), self.level))
        elif self.session.is_open:
            self._publish()
        self._event(lambda: self.session.tick(self.now()))

    def _event(self, event: Callable[[], object]) -> None:
        """Something comes to the session; what it wants done is done, and what always holds is looked at."""
        event()
        commands = self.session.commands
        while commands:
            self._do(commands.popleft())
        self.session.invariants()

    def _live(self) -> list[BrokerAddress]:
        return [BrokerAddress(host.number, f"host {host.number}") for host in self.world.hosts if host.powered]

    def _later(self, answer: Callable[[], None]) -> None:
        self.answers.append((self.world.step + self.world.delay(), answer))

    # ---- what the session wants done --------------------------------------------------------------------------------

    def _do(self, command: Any) -> None:
        match command:
            case Send(way, batch):
                if (connection := self._by_way(way)) is not None:
                    connection.send(batch)
            case Settle():
                self._settle(command)
            case Connect(broker, opened, way):
                self._connect(broker, opened, way)
            case Disconnect(way):
                if (connection := self._by_way(way)) is not None:
                    self.connections.pop(connection.host.number).cut()
            case AskBrokers():
                self._later(self._say_brokers)
            case OpenSession(broker, request):
                self._ask_for_session(broker, request)
            case AskWhetherThere(broker):
                self._later(lambda: self._say_whether_there(broker))
            case LookUp():
                self._later(self._say_frontiers)
            case Opened():
                opened, at = self.session.opened, self.session.opened_at
                self.world.note(self.name, f"session epoch {self.epoch} opened at {at.target if at else ''}, "
                                           f"slot {opened.session_slot}")
                self.world.history.marks.append((f"epoch of client {self.client}", self.epoch))
            case Tell(event):
                self.world.note(self.name, f"its session was opened anew: {event}")
            case Failed(error):
                raise Violation("B", f"{self.name} can publish no more: {error}")

    def _say_brokers(self) -> None:
        if self.world.strikes("answer lost", self.random, 0.05) or not (live := self._live()):
            self.session.brokers_unknown(BrokerUnavailable(address="the cluster"), self.now())
        else:
            self.session.brokers_known(live, len(self.world.hosts), self.now())

    def _say_whether_there(self, broker: BrokerAddress) -> None:
        host = self.world.hosts[broker.id]
        if host.powered and host.stalled:
            self.session.broker_silent(broker, self.now())
            self.answers.append((self.world.step + STANDS_STILL_STEPS, lambda: self._say_whether_there(broker)))
        else:
            self.session.broker_there(broker, self.now())

    def _say_frontiers(self) -> None:
        """What a broker says of the topic."""
        host = self.world.hosts[self.random.randrange(len(self.world.hosts))]
        topic = None
        if host.powered and not host.stalled:
            with contextlib.suppress(BrokerUnavailable):    # a new head is taking over
                topic = host.session_service.levels(self.topic)
        if topic is None or host.control.dead:
            self.session.topic_unknown()
        else:
            self.session.topic_known(topic)

    # ---- the session ------------------------------------------------------------------------------------------------

    def _ask_for_session(self, broker: BrokerAddress, request: pb.OpenSessionRequest) -> None:
        host = self.world.hosts[broker.id]
        self.asked, self.request_until = broker, self.world.step + ANSWER_STEPS
        if host.powered:
            self.request = host.call(host.session_service.open(request))
        else:
            self._later(lambda: self.session.session_refused(BrokerUnavailable(address=broker.target)))

    def _hear_of_session(self) -> None:
        """The answer to the call that opens a session, or none in time."""
        request = self.request
        if request is None:
            return
        error: BaseException | None = BrokerUnavailable(address=self.asked.target)
        if not request.done():
            if self.world.step <= self.request_until:
                return
            request.cancel()
        elif not request.cancelled():
            lost = self.world.strikes("answer lost", self.random, 0.05)
            error = request.exception()
            if error is None and not lost:
                self.request = None
                self._event(lambda: self._opened(request.result()))
                return
            if isinstance(error, TimeoutError) or error is None:
                error = BrokerUnavailable(address=self.asked.target)
        self.request = None
        if isinstance(error, CxlmqError):
            self._event(lambda: self.session.session_refused(error))
        elif error is not None:
            raise error

    def _opened(self, opened: pb.Session) -> None:
        if self.session.state is State.REOPENING:
            self.world.history.marks.append((f"high-water mark of client {self.client} epoch {self.epoch}",
                                             opened.high_water))
        assert self.session.session_opened(opened, self.asked, self.now())

    # ---- connections ------------------------------------------------------------------------------------------------

    def _connect(self, broker: BrokerAddress, opened: pb.PublishOpen, way: Any) -> None:
        self.connections[broker.id] = Connection(self, self.world.hosts[broker.id], way, opened)

    def _by_way(self, way: Hashable) -> Connection | None:
        return next((each for each in self.connections.values() if each.way is way), None)

    def cut(self, host: int) -> bool:
        """Its connection to a host breaks, if there is one."""
        connection = self.connections.get(host)
        if connection is not None:
            connection.cut()
        return connection is not None

    def _hear(self, connection: Connection) -> None:
        """Take the answers that have arrived; notice that it broke."""
        way, number = connection.way, connection.host.number
        while connection.down and connection.down[0][0] <= self.world.step:
            _, response = connection.down.popleft()
            if isinstance(response, CxlmqError):
                self._lost(connection, response)
                return
            if response.epoch:
                self.world.history.marks.append((f"epoch at client {self.client} by host {number}", response.epoch))
            for sequence in (*response.batch_sequences, *(each.batch_sequence for each in response.refusals)):
                connection.sent.pop(sequence, None)
            self._event(lambda response=response: self.streams.results(way, response, self.now()))   # type: ignore[misc]
        if connection.broken and self.connections.get(number) is connection:
            self._lost(connection, BrokerUnavailable(address=f"host {number}"))
        elif connection.sent and self.world.reliable:
            sequence, since = next(iter(connection.sent.items()))
            if self.world.step - since > self.world.patience:
                self.world.history.leftovers.append(
                    f"batch {sequence} of client {self.client} had no answer from host {number} for "
                    f"{self.world.patience} steps, though nothing was lost")
                connection.sent.clear()

    def _lost(self, connection: Connection, error: CxlmqError) -> None:
        self.connections.pop(connection.host.number).cut()
        self._event(lambda: self.streams.way_lost(connection.way, error, self.now()))

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Publish something new, when the window has room."""
        for _ in range(4):
            if len(self.operations) >= self.window or self.submitted >= self.batches or self.world.draining:
                return
            operation = Operation(self.client, self.next_number, self.random.randint(1, 3), self.level, self.world.step,
                                  replicas=self.topic.replication_factor - 1)
            self.next_number += operation.count
            self.submitted += 1
            self.world.history.operations.append(operation)
            batch = self._build(operation)
            self.operations[batch] = operation
            self.session.pending.append(batch)

    def _build(self, operation: Operation) -> Batch:
        """Pack an operation's messages as the library does."""
        payload, at = build_payload(self.client, operation.first, operation.count), 0
        for _ in range(operation.count):
            (nbytes,) = struct.unpack_from("<I", payload, at)
            self.packer.append(payload[at + 8:at + 8 + nbytes])
            at += 8 + -(-nbytes // 8) * 8
        batch: Batch = self.packer.take()
        batch.seal(self.world.clock.wall())
        batch.level, batch.deadline = self.level, self.now() + self.delivery_timeout
        return batch

    def _settle(self, command: Settle) -> None:
        command.batch.release()
        self._outcome(command.batch, command.position, command.error)

    def _outcome(self, batch: Batch, position: int | None, error: object) -> None:
        """What its client was told of a batch, once."""
        operation = self.operations.pop(batch, None)
        if operation is None:
            raise Violation("A1", f"a batch of client {self.client} settled twice")
        operation.settled = self.world.step
        if error is None:
            operation.outcome, operation.position = "ok", position
            self.world.settled(operation)
        else:
            self._not_placed(operation, error, batch.deadline <= self.now())

    def _not_placed(self, operation: Operation, error: object, late: bool) -> None:
        """Its client was told an error: one that a fault of this run, or the end of its patience, is the reason of."""
        world, disks = self.world, self.world.disks
        if isinstance(error, MessageLost) and (self.client, operation.first) in world.named:
            operation.outcome = "failed"
            for number in range(operation.first, operation.first + operation.count):
                world.witness.give_up(self.client, number)
                world.history.lost.add((self.client, number))
        elif isinstance(error, DeliveryTimeout | PoolFull) and late:
            # What is said not to be in the log must never be read; of the rest nobody knows.
            surely = isinstance(error, PoolFull) or "not in the log" in str(error)
            operation.outcome = "failed" if surely else "unknown"
        elif not (isinstance(error, DeliveryTimeout) and world.losses) and not (
                isinstance(error, ReplicaFailed) and disks is not None and disks.failed):
            raise Violation("A2", f"message {operation.first} of client {self.client}: {error}, and no fault was such")
        world.note(self.name, f"gives up message {operation.first}: {type(error).__name__}, {operation.outcome}")

    def meet(self, topic: Any) -> None:
        """The region is another one, and the topic has another place there."""
        self.topic = topic
