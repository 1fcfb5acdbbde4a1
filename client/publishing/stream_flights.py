"""What is in flight over streams, one to every broker: one ledger, by the session's sequence.

    pending ─► stamped ─► sent by a way ─► answered: settled
                             ▲   └── refused, or the way is lost: due again, elsewhere, with the sequence that it has
"""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.errors import (
    BadBatch,
    BrokerUnavailable,
    CxlmqError,
    DamagedData,
    DeliveryTimeout,
    MessageTooBig,
    SessionFenced,
    SessionUnknown,
    from_code,
    replica_failed,
)
from broker.layout import ResultStatus
from broker.proto import cxlmq_pb2 as pb
from client.batch import Batch
from client.brokers import BrokerAddress, rendezvous
from client.publishing.commands import Connect, Disconnect, Send
from client.publishing.flights import SILENT_SECONDS, Flights
from client.publishing.life import State

RETRY_SECONDS = 0.02
LAST_TRY_SECONDS = 1.5                  # a broker takes up to a second to refuse a batch
SPAN_MAX = 200                          # sequences from the oldest unsettled batch on; the sequencer's window has more
SPAN_BYTES_MIN = 1 << 20
SPAN_GROWTH_SECONDS = 1.0
PUSHED_BACK_SECONDS = 0.2               # a batch for which there was no room is sent again so much later
LATENCIES_KEPT = 1 << 20
ABOUT_A_BATCH = BadBatch, MessageTooBig, DamagedData     # the others may be taken
DAMAGED = "the batch was damaged in memory and not ordered: publish again"


@dataclass(eq=False, slots=True)
class Way:
    """A stream to a broker, and what was sent there and not answered: sequence -> bytes."""

    broker: BrokerAddress
    waiting: dict[int, int] = field(default_factory=dict)
    nbytes: int = 0
    heard_at: float = 0.0               # or since when it has something to answer
    alive: bool = True

    def answered(self, sequence: int) -> None:
        """The broker answered this batch."""
        self.nbytes -= self.waiting.pop(sequence, 0)


@dataclass(eq=False, slots=True)
class Flight:
    """A batch with its sequence: on a way, or `due` to be sent again."""

    batch: Batch
    due: float | None = None
    refusal: CxlmqError | None = None   # the last, since it was sent for the first time
    refusals: int = 0
    had_by_lost: bool = False           # a broker may have it that can answer no more: no refusal says that nobody has


def refusal_error(refusal: pb.Refusal) -> CxlmqError:
    """The typed error of a refused batch."""
    details: dict[str, Any] = json.loads(refusal.details or "{}")
    return from_code(refusal.code, refusal.message, **details)


class StreamFlights(Flights):
    """At most `window` batches and `window_bytes` unanswered on a way; two always may be, however large."""

    def __init__(self, window: int, window_bytes: int) -> None:
        self.window, self.window_bytes = window, window_bytes
        self.flights: dict[int, Flight] = {}        # by sequence, which enter in order: the first is the oldest
        self.nbytes = 0                             # of them
        self.next_sequence = 0
        self.ways: dict[int, Way] = {}              # by broker
        self.span = SPAN_MAX                        # sequences in flight at once; fewer after there was no room
        self.span_bytes = SPAN_BYTES_MIN
        self.latencies = array("q")                 # ns from sent to acknowledged
        self._obstacle: CxlmqError | None = None    # the last refusal, as long as nothing was acked since
        self._span_grows_at = 0.0
        self._turn = 0

    # ---- ways -------------------------------------------------------------------------------------------------------

    def begin(self, opened: pb.Session) -> None:
        """A session is open."""
        # A quarter of a region, by the default sizes: what waits for its order must not fill it.
        self.span_bytes = max(SPAN_BYTES_MIN, 4 * opened.batch_bytes_max)

    def connect(self, brokers: Sequence[BrokerAddress], now: float) -> None:
        """Ask for a stream to those brokers to which there is none."""
        session = self.session
        for broker in brokers:
            if broker.id not in self.ways:
                way = self.ways[broker.id] = Way(broker)
                session.commands.append(Connect(broker, pb.PublishOpen(
                    topic=session.topic, client_id=session.client_id, session_slot=session.opened.session_slot,
                    session_epoch=session.epoch, ack=session.ack, seen=session.opened.topic), way))

    def connected(self) -> int:
        """Streams that have not ended."""
        return len(self.ways)

    def lacks_brokers(self, count: int) -> bool:
        """Also when something is to be sent again: whoever took it last may be gone."""
        return super().lacks_brokers(count) or any(each.due is not None for each in self.flights.values())

    def quiet(self, now: float) -> list[BrokerAddress]:
        """Brokers that have batches and have answered none for a while."""
        return [each.broker for each in self.ways.values() if each.waiting and each.heard_at < now - SILENT_SECONDS]

    def lose(self, broker: BrokerAddress, now: float) -> None:
        """A broker stands still: as if its stream had ended."""
        way = self.ways.get(broker.id)
        if way is not None:
            self._disconnect(way)
            self._send_elsewhere(way, BrokerUnavailable(address=broker.target), now)

    def abandon(self) -> None:
        """Let go of all streams."""
        for way in list(self.ways.values()):
            self._disconnect(way)

    def _disconnect(self, way: Way) -> None:
        self._remove(way)
        self.session.commands.append(Disconnect(way))

    def _remove(self, way: Way) -> None:
        way.alive = False
        del self.ways[way.broker.id]

    def way_lost(self, way: Way, error: CxlmqError, now: float) -> None:
        """A stream ended: its batches go elsewhere with the sequence they have."""
        if not way.alive:
            return
        self._remove(way)
        if isinstance(error, SessionFenced | SessionUnknown):
            self.session.reopen(error)
        elif not error.comes_back and not isinstance(error, ABOUT_A_BATCH):
            self.session.fail(error)
        else:
            self._send_elsewhere(way, error, now)

    def _send_elsewhere(self, way: Way, error: CxlmqError, now: float) -> None:
        for sequence in way.waiting:
            flight = self.flights.get(sequence)
            if flight is None:
                continue
            flight.due = now
            flight.had_by_lost = True
            if not isinstance(error, BrokerUnavailable):
                self._obstacle = flight.refusal = error
        self.resend(now)

    # ---- sending ----------------------------------------------------------------------------------------------------

    def pump(self, now: float) -> None:
        """Stamp pending batches and give each to the next broker in turn that has room."""
        pending = self.session.pending
        while pending:
            try:
                way = self._next_way(pending[0].nbytes) if self._may_send(pending[0], now) else None
                if way is None:
                    return
                batch = pending.popleft()
            except IndexError:
                return                      # dropped by another thread
            batch.stamp(self.next_sequence)
            self.flights[self.next_sequence] = Flight(batch)
            self.nbytes += batch.nbytes
            self.next_sequence += 1
            self._send(way, batch, now)

    def oldest(self) -> int:
        """Every lower sequence is settled."""
        return next(iter(self.flights), self.next_sequence)

    def is_saturated(self) -> bool:
        """Whether a batch that is sent now would have to wait anyhow."""
        return bool(self.session.pending) or (bool(self.ways) and not any(map(self._has_room, self.ways.values())))

    def _has_room(self, way: Way, nbytes: int = 1) -> bool:
        count = len(way.waiting)
        return count < self.window and (count < 2 or way.nbytes + nbytes <= self.window_bytes)

    def _may_send(self, batch: Batch, now: float) -> bool:
        """Whether one more batch may be in flight."""
        if self._obstacle is not None and batch.deadline - now < LAST_TRY_SECONDS:
            return False                    # so that at its deadline it is known not to be in the log
        return not self.flights or (self.next_sequence - self.oldest() < self.span
                                    and self.nbytes + batch.nbytes <= self.span_bytes)

    def _next_way(self, nbytes: int) -> Way | None:
        """The way to the next broker in turn whose window has room."""
        order = list(self.ways.values())
        for i in range(len(order)):
            way = order[(self._turn + i) % len(order)]
            if self._has_room(way, nbytes):
                self._turn = (self._turn + i + 1) % len(order)
                return way
        return None

    def _send(self, way: Way, batch: Batch, now: float) -> None:
        batch.sent_ns = int(now * 1e9)
        batch.broker = way.broker.id
        if not way.waiting:
            way.heard_at = now
        if batch.sequence not in way.waiting:
            way.waiting[batch.sequence] = batch.nbytes
            way.nbytes += batch.nbytes
        self.session.commands.append(Send(way, batch))

    def resend(self, now: float) -> None:
        """Send again what is due, by rendezvous hashing over the live brokers.

        What one of them had no room for goes to the next.
        """
        live = [way.broker for way in self.ways.values()]
        for sequence, flight in self.flights.items() if live else ():
            if flight.due is None or flight.due > now:
                continue
            if flight.refusal is not None and flight.batch.deadline - now < LAST_TRY_SECONDS:
                continue                    # so that at its deadline it is known to be refused, and not on its way
            order = rendezvous(live, self.session.client_id, sequence)
            flight.due = None
            self.session.retries += 1
            self._send(self.ways[order[flight.refusals % len(order)].id], flight.batch, now)

    # ---- answers ----------------------------------------------------------------------------------------------------

    def results(self, way: Way, response: pb.PublishResponse, now: float) -> None:
        """A broker has answered."""
        if not way.alive:
            return
        way.heard_at = now
        for sequence, position, status in zip(response.batch_sequences, response.positions, response.statuses,
                                              strict=True):
            way.answered(sequence)
            if status == ResultStatus.RESULT_FENCED:
                self.session.reopen(SessionFenced(reason="the sequencer ended it", committed=sequence))
            elif sequence in self.flights:
                self._result(way, sequence, position, status, response.epoch, now)
        for refusal in response.refusals:
            way.answered(refusal.batch_sequence)
            if refusal.batch_sequence in self.flights:
                self._pushed_back(refusal.batch_sequence, refusal_error(refusal), now)
        self.session.pump(now)

    def _result(self, way: Way, sequence: int, position: int, status: int, epoch: int, now: float) -> None:
        session = self.session
        if status in (ResultStatus.RESULT_COMMITTED, ResultStatus.RESULT_DUPLICATE):
            batch = self._leave(sequence)
            if len(self.latencies) < LATENCIES_KEPT:
                self.latencies.append(int(now * 1e9) - batch.sent_ns)
            batch.broker = way.broker.id
            self._had_room(now)
            duplicate = status == ResultStatus.RESULT_DUPLICATE
            # A duplicate's ack says how far the log had come, not where its first copy lies.
            session.settle(batch, None if duplicate or session.ack == 0 else position, None, epoch=epoch,
                           duplicate=duplicate)
        elif status == ResultStatus.RESULT_UNDURABLE:
            session.settle(self._leave(sequence), None, replica_failed(position))
        elif status == ResultStatus.RESULT_DAMAGED:
            session.settle(self._leave(sequence), None, CxlmqError(DAMAGED))
            session.reopen(SessionFenced(reason="a batch was damaged", committed=sequence))
        else:
            self.flights[sequence].due = now + RETRY_SECONDS

    def _leave(self, sequence: int) -> Batch:
        batch = self.flights.pop(sequence).batch
        self.nbytes -= batch.nbytes
        return batch

    def _pushed_back(self, sequence: int, error: CxlmqError, now: float) -> None:
        """A broker had no room for a batch: send it again later, and less at once.

        What was sent behind the oldest batch waits in memory for its order, and may be what fills it: take it back.
        """
        flight = self.flights[sequence]
        self._obstacle = flight.refusal = error
        flight.refusals += 1
        flight.due = now + PUSHED_BACK_SECONDS
        if sequence == self.oldest() and len(self.flights) > 1:
            self.span = max(1, len(self.flights) // 2)
            self._span_grows_at = now + SPAN_GROWTH_SECONDS
            if self.session.opened.order == 5:
                self.session.reopen(error)

    def _had_room(self, now: float) -> None:
        self._obstacle = None
        if self.span < SPAN_MAX and now >= self._span_grows_at:
            self.span = min(SPAN_MAX, self.span * 2)
            self._span_grows_at = now + SPAN_GROWTH_SECONDS

    # ---- ends -------------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> bool:
        """Settle what nobody answered in time."""
        overdue = [sequence for sequence, each in self.flights.items() if each.batch.deadline <= now]
        for sequence in overdue:
            error = self._why_not_acked(self.flights[sequence])
            self.session.settle(self._leave(sequence), None, error)
        return bool(overdue)

    def why_not_sent(self) -> CxlmqError:
        """What stops all batches now, or else that no broker took this one."""
        return self._obstacle or self.session.not_sent_in_time()

    def _why_not_acked(self, flight: Flight) -> CxlmqError:
        """A refusal that stands, or else that nobody knows: a broker has the batch, or may have, and did not answer."""
        if flight.due is not None and flight.refusal is not None and not flight.had_by_lost:
            return flight.refusal
        error = DeliveryTimeout(timeout_seconds=self.session.delivery_timeout)
        error.__cause__ = flight.refusal or self._obstacle
        return error

    def take(self) -> list[tuple[int, Batch]]:
        """The session has ended: what was in flight, by sequence. The next one counts from 0."""
        taken = [(sequence, each.batch) for sequence, each in self.flights.items()]
        self.forget()
        self.next_sequence = 0
        return taken

    def forget(self) -> None:
        """Somebody else settles what is in flight."""
        self.flights.clear()
        self.nbytes = 0

    def invariants(self) -> list[Batch]:
        """Sequences are the session's and in order; every batch is on a way or due; sums are sums."""
        sequences = list(self.flights)
        assert sequences == sorted(sequences), "the first is the oldest"
        assert not sequences or sequences[-1] < self.next_sequence
        assert self.nbytes == sum(each.batch.nbytes for each in self.flights.values())
        for sequence, flight in self.flights.items():
            assert flight.batch.sequence == sequence, "it was stamped for another place"
            assert flight.batch.frame is not None, "it was let go of before it was settled"
            assert self.session.state is not State.OPEN or flight.due is not None or any(
                sequence in way.waiting for way in self.ways.values()), "it is on no way, and nobody sends it again"
        for way in self.ways.values():
            assert way.alive
            assert way.nbytes == sum(way.waiting.values())
        return [each.batch for each in self.flights.values()]


__all__ = ["Flight", "StreamFlights", "Way", "refusal_error"]
