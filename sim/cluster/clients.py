"""Clients of the simulated cluster: publishers with sessions, subscribers that follow the order, and their connections.

A publisher does what the library's does: numbers its batches, resends what was refused or lost by rendezvous hashing,
opens the next epoch when its session ended, and goes on behind the high-water mark. A connection is first in first out
each way, as a gRPC stream is; it may be slow, it may break, and then nobody knows what of it arrived.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broker.errors import BrokerUnavailable, CxlmqError, SessionFenced, UnknownTopic
from broker.layout import ResultStatus
from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader, ReadError, ReadStatus
from broker.sessions import UNKNOWN_POSITION, UNPLACED_POSITION, CursorTable
from broker.stages import receiver as receiving
from client.connection import BrokerAddress
from client.transport import rendezvous
from sim.cluster.history import Operation, Read, Violation
from sim.cluster.witness import build_payload, payload_sender

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

RETRY_STEPS = 40                            # after a refusal
ANSWER_STEPS = 4_000                        # a publisher that hears nothing for so long tries elsewhere
PUSH_BACK_STEPS = 2_000                     # a broker looks so long for room for a batch before it refuses it
SPAN = 200                                  # sequences from the oldest unsettled batch on


@dataclass
class Flight:
    """A batch on its way."""

    operation: Operation
    frame: bytes
    host: int
    sent: int
    retry_at: int = -1
    connection: "Connection | None" = None      # that it was sent on: another one to the same host may follow it


class Connection:
    """One publisher's stream to one host, with what is under way on it."""

    def __init__(self, publisher: "Publisher", host: "Host") -> None:
        self.publisher, self.host, self.world = publisher, host, publisher.world
        self.epoch, self.slot, self.opened = publisher.epoch, publisher.slot, publisher.opened()
        self.up: deque[tuple[int, bytes, int]] = deque()          # due, frame, sequence
        self.down: deque[tuple[int, Any]] = deque()               # due, response or error
        self.stream = -1
        self.broken = False
        self.full_since = -1
        self.incarnation = host.incarnation
        host.connections.append(self)

    def send(self, frame: bytes, sequence: int) -> None:
        """Put a batch on its way, once or (a copy that the network kept) twice."""
        for _ in range(2 if self.world.strikes("message doubled", self.world.network, 0.02) else 1):
            due = self.world.step + self.world.delay()
            self.up.append((max(due, self.up[-1][0] if self.up else 0), frame, sequence))

    def answer(self, response: Any) -> None:
        due = self.world.step + self.world.delay()
        self.down.append((max(due, self.down[-1][0] if self.down else 0), response))

    def serve(self) -> None:
        """The broker's side: take what has arrived, and answer what is settled."""
        host, acks, publisher = self.host, self.host.acks, self.publisher
        while self.up and self.up[0][0] <= self.world.step and not self.broken:
            if self.stream < 0 and not self._open():
                return
            _, frame, sequence = self.up[0]
            if self.world.strikes("handler failed", self.world.network, 0.01):
                host.receiver.abandon(publisher.topic.number)       # a handler that failed after it had reserved
            status = host.receiver.receive(frame, self.stream, publisher.topic.number, publisher.client, self.slot,
                                           self.epoch)
            if status in (receiving.RING_FULL, receiving.POOL_EMPTY, receiving.WINDOW_FULL):
                if self.full_since < 0:
                    self.full_since = self.world.step
                if self.world.step - self.full_since < PUSH_BACK_STEPS:
                    break
                self.answer(pb.PublishResponse(refusals=[pb.Refusal(batch_sequence=sequence, code="pool-full")]))
            elif status != receiving.RECEIVED:
                raise Violation("N", f"host {host.number} refused a sound batch with status {status}")
            self.full_since = -1
            self.up.popleft()
        if self.stream >= 0 and acks.has_acks(self.stream):
            epoch = host.sequencer_epoch()
            self.answer(pb.PublishResponse.FromString(acks.take_acks(self.stream, epoch)))

    def _open(self) -> bool:
        try:
            _, self.stream = self.host.session_service.open_stream(self.opened)
        except BrokerUnavailable:
            return False                    # a new head is taking over
        except CxlmqError as error:
            self.answer(error)
            self.up.clear()
            return False
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
        self.seen = pb.TopicIdentity(run_id=world.settings.run_id, created_ns=topic.created_ns)
        self.random = world.scenario.random(f"publisher {client}")
        self.batches, self.window = batches, window
        self.epoch = self.slot = 0
        self.session_host = 0
        self.next_number = self.next_sequence = self.resume_from = self.submitted = self.turn = 0
        self.flights: dict[int, Flight] = {}        # by sequence, in order
        self.pending: deque[Operation] = deque()    # to be sent again under a new session
        self.connections: dict[int, Connection] = {}
        self.request: asyncio.Task[Any] | None = None
        self.request_until = 0
        self.wanted_epoch = 0
        self.candidates: deque[int] = deque()
        self.state = "closed"                       # closed, opening, open, dead, done
        self.name = f"client {client}"

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether everything that it submitted has its outcome."""
        return not self.flights and not self.pending

    @property
    def finished(self) -> bool:
        """Whether it has nothing left to do."""
        return self.state == "dead" or (self.settled and (self.submitted >= self.batches or self.world.draining))

    def die(self) -> None:
        """The process is gone: what was in flight stays unknown."""
        self.state = "dead"
        self._drop_connections()

    def end(self) -> None:
        """The run is over."""

    def _drop_connections(self) -> None:
        for connection in list(self.connections.values()):
            connection.cut()
        self.connections.clear()

    def act(self) -> None:
        """What the client does when it comes to run."""
        if self.state in ("dead", "done"):
            return
        if self.state == "closed":
            self._start_opening()
        elif self.state == "opening":
            self._go_on_opening()
        if self.state == "open":
            self._hear()
        if self.state == "open":
            self._resend()
            self._submit()

    # ---- the session ------------------------------------------------------------------------------------------------

    def _start_opening(self) -> None:
        self._drop_connections()
        live = [BrokerAddress(host.number, "") for host in self.world.hosts if host.powered]
        self.candidates = deque(each.id for each in rendezvous(live, self.client, self.epoch))
        self.wanted_epoch = max(self.wanted_epoch, self.epoch)
        self.resume_from = next(iter(self.flights), 0)
        self.state = "opening"
        self._ask_next()

    def _ask_next(self) -> None:
        """Ask the next broker for a session, under an epoch of its own."""
        if not self.candidates:
            self.state = "closed"
            return
        self.wanted_epoch += 1
        self.session_host = self.candidates[0]
        host = self.world.hosts[self.session_host]
        request = pb.OpenSessionRequest(
            topic=self.topic.name, client_id=self.client, session_epoch=self.wanted_epoch, ack=self.level,
            resume_from=self.resume_from, resume_epoch=self.epoch, seen=self.seen)
        self.request = host.call(host.session_service.open(request)) if host.powered else None
        self.request_until = self.world.step + ANSWER_STEPS

    def _go_on_opening(self) -> None:
        request = self.request
        if request is not None and request.done():
            self.request = None
            error = None if request.cancelled() else request.exception()
            lost = self.world.strikes("answer lost", self.random, 0.05)
            if not request.cancelled() and error is None and not lost:
                self._opened(request.result())
                return
            if isinstance(error, SessionFenced):
                if self.epoch:
                    self._taken_over()
                    return
                self.wanted_epoch = max(self.wanted_epoch, int(str(error.details.get("newest_epoch", 0))))
            elif error is not None and not isinstance(error, CxlmqError | TimeoutError):
                raise error
            else:
                self.candidates.popleft()
            self._ask_next()
        elif self.world.step > self.request_until or request is None:
            if request is not None:
                request.cancel()
            self.candidates.popleft()
            self._ask_next()

    def _taken_over(self) -> None:
        """A later session of this client fenced us: with one process a client, only our own lost attempts can."""
        self.epoch = 0 if not self.flights else self.epoch
        self.state = "closed"

    def opened(self) -> pb.PublishOpen:
        """What it says of its session where it uses it."""
        return pb.PublishOpen(topic=self.topic.name, client_id=self.client, session_slot=self.slot,
                              session_epoch=self.epoch, ack=self.level, seen=self.seen)

    def _opened(self, session: pb.Session) -> None:
        self.slot = session.session_slot
        if self.epoch:
            self._resume(session.high_water, list(session.positions))
        self.epoch = self.wanted_epoch
        self.next_sequence = 0
        self.state = "open"
        self.world.note(self.name, f"session epoch {self.epoch} opened at host {self.session_host}, slot {self.slot}")

    def _resume(self, high_water: int, positions: list[int]) -> None:
        """Settle what is in the log; the rest is sent again, renumbered from 0."""
        self.world.history.marks.append((f"high-water mark of client {self.client} epoch {self.epoch}", high_water))
        again = []
        for sequence, flight in self.flights.items():
            at = sequence - self.resume_from
            known = positions[at] if 0 <= at < len(positions) else UNKNOWN_POSITION
            if sequence < high_water or known != UNKNOWN_POSITION:
                # The library learns that it is in the log, and not on which disks.
                flight.operation.level = min(flight.operation.level, 1)
                self._settle(flight.operation, None if known >= UNPLACED_POSITION else known)
            else:
                again.append(flight.operation)
        self.flights.clear()
        self.pending.extendleft(reversed(again))

    def _reopen(self, why: str) -> None:
        self.world.note(self.name, f"reopens: {why}")
        self._drop_connections()
        self.state = "closed"

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _connection(self, host: int) -> Connection:
        connection = self.connections.get(host)
        if connection is None or connection.broken:
            connection = self.connections[host] = Connection(self, self.world.hosts[host])
        return connection

    def _send(self, host: int, sequence: int, flight: Flight) -> None:
        flight.host, flight.sent, flight.retry_at = host, self.world.step, -1
        flight.connection = self._connection(host)
        flight.connection.send(flight.frame, sequence)

    def _reachable(self) -> list[int]:
        return [host.number for host in self.world.hosts if host.powered]

    def _may_submit(self) -> bool:
        """Whether the window has room, and there is something to send."""
        done = self.submitted >= self.batches or self.world.draining
        return len(self.flights) < self.window and (bool(self.pending) or not done)

    def _next_operation(self) -> Operation:
        """What is to be sent again first, else a new one."""
        if self.pending:
            return self.pending.popleft()
        operation = Operation(self.client, self.next_number, self.random.randint(1, 3), self.level, self.world.step,
                              replicas=self.topic.replication_factor - 1)
        self.next_number += operation.count
        self.submitted += 1
        self.world.history.operations.append(operation)
        return operation

    def _submit(self) -> None:
        live = self._reachable()
        for _ in range(4):
            if not live or not self._may_submit():
                return
            if self.flights and self.next_sequence - next(iter(self.flights)) >= SPAN:
                return
            operation = self._next_operation()
            frame = pb.PublishRequest(
                batch_sequence=self.next_sequence, message_count=operation.count,
                payload=build_payload(self.client, operation.first, operation.count)).SerializeToString()
            flight = self.flights[self.next_sequence] = Flight(operation, frame, 0, 0)
            self.turn += 1
            self._send(live[self.turn % len(live)], self.next_sequence, flight)
            self.next_sequence += 1

    def _resend(self) -> None:
        """Send again what was refused, what was lost with its connection, and what nobody answered."""
        live = [BrokerAddress(host, "") for host in self._reachable()]
        for sequence, flight in list(self.flights.items()) if live else ():
            connection = flight.connection
            lost = connection is None or connection.broken or not self.world.hosts[flight.host].powered
            waits = self.world.step - flight.sent if flight.retry_at < 0 else 0
            if connection is not None and not lost and waits > self.world.patience:
                self.world.note(self.name, f"hears nothing from host {flight.host}")
                if self.world.reliable:
                    self.world.history.leftovers.append(
                        f"batch {sequence} of client {self.client} had no answer from host {flight.host} for "
                        f"{self.world.patience} steps, though nothing was lost")
                connection.cut()
                lost = True
            if lost or 0 <= flight.retry_at <= self.world.step:
                chosen = rendezvous(live, self.client, sequence)
                others = [each.id for each in chosen if each.id != flight.host] if lost else []
                self._send((others or [chosen[0].id])[0], sequence, flight)

    def _hear(self) -> None:
        """Take the answers that have arrived."""
        for connection in list(self.connections.values()):
            while connection.down and connection.down[0][0] <= self.world.step and self.state == "open":
                _, response = connection.down.popleft()
                if isinstance(response, CxlmqError):
                    self._reopen("its session had ended")
                    return
                self._take(connection, response)

    def _take(self, connection: Connection, response: Any) -> None:
        if response.epoch:
            self.world.history.marks.append((f"epoch at client {self.client} by host {connection.host.number}",
                                             response.epoch))
        for sequence, position, status in zip(response.batch_sequences, response.positions, response.statuses,
                                              strict=True):
            flight = self.flights.get(sequence)
            if status == ResultStatus.RESULT_FENCED:
                self._reopen(f"batch {sequence} was fenced")
                return
            if flight is None:
                continue
            if status in (ResultStatus.RESULT_COMMITTED, ResultStatus.RESULT_DUPLICATE):
                del self.flights[sequence]
                self._settle(flight.operation, None if status == ResultStatus.RESULT_DUPLICATE else position)
            elif status == ResultStatus.RESULT_UNDURABLE:
                raise Violation("A2", f"batch {sequence} of client {self.client}: a replica failed, and no disk did")
            elif status == ResultStatus.RESULT_DAMAGED:
                raise Violation("I", f"batch {sequence} of client {self.client} was damaged, and no damage was done")
            else:
                flight.retry_at = self.world.step + RETRY_STEPS
        for refusal in response.refusals:
            flight = self.flights.get(refusal.batch_sequence)
            if flight is not None:
                flight.retry_at = self.world.step + 4 * RETRY_STEPS
                oldest = next(iter(self.flights))
                if refusal.batch_sequence == oldest and len(self.flights) > 1 and self.topic.order == 5:
                    self._reopen("there was no room for its oldest batch")
                    return

    def _settle(self, operation: Operation, position: int | None) -> None:
        operation.outcome, operation.position, operation.settled = "ok", position, self.world.step
        self.world.settled(operation)


class Subscriber:
    """Follows one topic from its first entry, at one broker after the other, with a cursor that protects it."""

    def __init__(self, world: "World", number: int, topic: Any) -> None:
        self.world, self.number, self.topic = world, number, topic
        self.random = world.scenario.random(f"subscriber {number}")
        self.name = f"reader {number}"
        self.reads: list[Read] = world.history.reads.setdefault(self.name, [])
        self.host: Host | None = None
        self.incarnation = 0
        self.presence = 0                   # not 0: its cursor protects views, also when its broker dies
        self.reader: OrderReader | None = None
        self.cursor = -1
        self.request: asyncio.Task[Any] | None = None
        self.request_until = 0
        self.index = 0

    def end(self) -> None:
        """The run is over."""

    def act(self) -> None:
        """Find a broker, or read there."""
        host = self.host
        if host is not None and (not host.powered or host.incarnation != self.incarnation):
            self.leave()
            host = None
        if host is None:
            self._choose()
        elif self.request is not None:
            self._wait()
        elif not host.stalled:
            if self.random.random() < 0.01 and not self.world.draining:
                self.leave()
            else:
                self.read()

    def _choose(self) -> None:
        live = [host for host in self.world.hosts if host.powered]
        if not live:
            return
        host = self.random.choice(live)
        key = self.topic.generation << 16 | self.topic.number
        self.host, self.incarnation = host, host.incarnation
        self.request = host.call(host.cursors.open(key, self.index, self.number + 1, presence=self.presence))
        self.request_until = self.world.step + ANSWER_STEPS

    def _wait(self) -> None:
        request = self.request
        assert request is not None and self.host is not None
        if request.done():
            self.request = None
            if request.cancelled() or request.exception() is not None:
                self.host = None
                return
            self.cursor, index = request.result()
            self._look_up()
            if index != self.index:         # what lay between was reclaimed while nobody protected it
                self.reads = self.world.history.reads.setdefault(f"{self.name} from {index}", [])
                self.index = index
            self.reader = OrderReader(self.host.delivery_door, self.world.layout, self.topic.number,
                                      self.topic.generation, index)
        elif self.world.step > self.request_until:
            self.leave()

    def _look_up(self) -> None:
        """A topic that exists can be opened by its name at any broker."""
        assert self.host is not None
        try:
            found = self.host.topics.find(self.topic.name)
        except BrokerUnavailable:
            return                          # a new head is taking over
        except UnknownTopic:
            raise Violation("T", f"host {self.host.number} does not know the topic {self.topic.name!r}") from None
        if found.generation != self.topic.generation and self.host.powered:
            raise Violation("T", f"host {self.host.number} knows generation {found.generation} of the topic, it is "
                                 f"{self.topic.generation}")

    def leave(self) -> None:
        """Give up the place at this broker."""
        host = self.host
        if host is not None and host.powered and host.incarnation == self.incarnation:
            if self.request is not None:
                self.request.add_done_callback(lambda asked: self._gave_up(asked, host.cursors))
                self.request.cancel()
            elif self.reader is not None:
                host.cursors.close(self.cursor)
        self.host = self.reader = self.request = None
        self.cursor = -1

    @staticmethod
    def _gave_up(asked: "asyncio.Task[Any]", cursors: CursorTable) -> None:
        """A place that was given when nobody waited for it any more."""
        if not asked.cancelled() and asked.exception() is None:
            cursors.close(asked.result()[0])

    def _refused(self, host: "Host", error: ReadError) -> None:
        """Its cursor protects it, so nothing is lost; a topic that is gone is told as such."""
        self.world.history.errors.append((f"{self.name} at host {host.number}: {error}",
                                          error.status == ReadStatus.READ_CLOSED or not host.powered))
        self.leave()

    def _take(self, position: int, count: int, payload: bytes) -> None:
        """Note the next batch, and hold it against the log."""
        read = Read(self.index, position, count, payload_sender(payload, count))
        self.world.check_read(self.name, read)
        self.reads.append(read)
        self.index += 1

    def read(self) -> int:
        """Read what is there, as one frame; how many batches it had."""
        reader, host = self.reader, self.host
        assert reader is not None and host is not None
        try:
            frame = reader.read_frame(self.random.choice((200, 2000, 20000)))
        except ReadError as error:
            self._refused(host, error)
            return 0
        if not frame or not host.powered:
            return 0
        batches = pb.SubscribeResponse.FromString(frame).batches
        for batch in batches:
            self._take(batch.position, batch.message_count, batch.payload)
        self.world.history.cursors.append((self.name, reader.index, reader.frontiers()["committed_index"]))
        host.cursors.move(self.cursor, reader.index)
        return len(batches)
