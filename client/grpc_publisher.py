"""The engine of a publisher over gRPC: a stream to every broker, and every batch kept until it is settled.

    publish ─► Packer ─► pending ─► (stamped with the session's sequence) ─► a broker's stream ─► acks ─► deliveries

A broken stream's batches go to other brokers with the sequence they have; a fenced session is opened anew and goes on
behind what is in the log.
"""

import asyncio
import time
from collections.abc import Sequence
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
    replica_failed,
)
from broker.grpc_options import RECOMMENDED_WINDOW_BYTES
from broker.layout import ResultStatus
from broker.proto import cxlmq_pb2 as pb
from client.batch import Batch, now_ns
from client.connection import BrokerAddress
from client.engine import SILENT_SECONDS, Engine
from client.transport import PublishTransport, rendezvous

TICK_SECONDS = 0.05
RETRY_SECONDS = 0.02
LAST_TRY_SECONDS = 1.5                  # a broker takes up to a second to refuse a batch
SPAN_MAX = 200                          # sequences from the oldest unsettled batch on; the sequencer's window has more
SPAN_BYTES_MIN = 1 << 20
SPAN_GROWTH_SECONDS = 1.0
PUSHED_BACK_SECONDS = 0.2               # a batch for which there was no room is sent again so much later
LATENCIES_KEPT = 1 << 20
ABOUT_A_BATCH = BadBatch, MessageTooBig, DamagedData     # the others may be taken


class PublisherEngine(Engine):
    """Carries batches over gRPC streams."""

    def __init__(self, topic: str, **options: Any) -> None:
        super().__init__(topic, **options)
        self.next_sequence = 0
        self.inflight: dict[int, Batch] = {}
        self.inflight_bytes = 0
        self.span = SPAN_MAX                        # batches in flight at once; fewer after there was no room
        self.span_bytes = SPAN_BYTES_MIN
        self.span_grows_at = 0.0
        self.retry_at: dict[int, float] = {}
        self.last_refusal: dict[int, CxlmqError] = {}
        self.refusals: dict[int, int] = {}          # how many there were
        self.obstacle: CxlmqError | None = None     # the last refusal, as long as nothing was acked since
        self.transports: dict[int, PublishTransport] = {}
        self.turn = 0

    # ---- streams ----------------------------------------------------------------------------------------------------

    def _opened(self) -> None:
        # A quarter of a region, by the default sizes: what waits for its order must not fill it.
        self.span_bytes = max(SPAN_BYTES_MIN, 4 * self.session.batch_bytes_max)

    async def _connect(self, brokers: Sequence[BrokerAddress]) -> None:
        assert self.ack is not None
        for broker_id in [key for key, transport in self.transports.items() if not transport.alive]:
            del self.transports[broker_id]
        for broker in brokers:
            if broker.id in self.transports or broker.id in self.silent:
                continue
            opened = pb.PublishOpen(
                topic=self.topic, client_id=self.client_id, session_slot=self.session.session_slot,
                session_epoch=self.session.session_epoch, ack=self.ack, seen=self.session.topic)
            self.transports[broker.id] = PublishTransport(
                broker, self.connection.channel(broker.target), opened, self.in_flight, RECOMMENDED_WINDOW_BYTES,
                self._on_acks, self._on_broken, self.compression)

    def _connected(self) -> int:
        return sum(transport.alive for transport in self.transports.values())

    def _quiet_brokers(self) -> list[BrokerAddress]:
        since = time.monotonic() - SILENT_SECONDS
        return [each.broker for each in self.transports.values() if each.alive and each.is_quiet(since)]

    def _lose(self, broker: BrokerAddress) -> None:
        transport = self.transports.get(broker.id)
        if transport is not None:
            transport.abandon()
            self._on_broken(transport, BrokerUnavailable(address=broker.target))

    def _lacks_brokers(self) -> bool:
        return super()._lacks_brokers() or bool(self.retry_at)

    def _abandon(self) -> None:
        for transport in list(self.transports.values()):
            transport.abandon()
        self.transports.clear()

    async def _disconnect(self) -> None:
        await asyncio.gather(*(transport.close() for transport in list(self.transports.values())))

    def _is_saturated(self) -> bool:
        return bool(self.pending) or (bool(self.transports) and all(
            not transport.has_room(1) for transport in self.transports.values()))

    # ---- sending ----------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Stamp pending batches and give each to the next broker in turn that has room."""
        self.pump_scheduled = False
        if self.reopening:
            return
        while self.pending:
            try:
                transport = self._next_transport(self.pending[0].nbytes) if self._may_send(self.pending[0]) else None
                if transport is None:
                    return
                batch = self.pending.popleft()
            except IndexError:
                return                      # dropped by another thread
            batch.stamp(self.next_sequence)
            self.inflight[self.next_sequence] = batch
            self.inflight_bytes += batch.nbytes
            self.next_sequence += 1
            self._send(transport, batch)

    def _oldest(self) -> int:
        # Sequences enter `inflight` in order: the first is the oldest.
        return next(iter(self.inflight), self.next_sequence)

    def _may_send(self, batch: Batch) -> bool:
        """Whether one more batch may be in flight."""
        if self.obstacle is not None and batch.deadline - time.monotonic() < LAST_TRY_SECONDS:
            return False                    # so that at its deadline it is known not to be in the log
        return not self.inflight or (self.next_sequence - self._oldest() < self.span
                                     and self.inflight_bytes + batch.nbytes <= self.span_bytes)

    def _leave(self, sequence: int) -> Batch:
        batch = self.inflight.pop(sequence)
        self.last_refusal.pop(sequence, None)
        self.refusals.pop(sequence, None)
        self.inflight_bytes -= batch.nbytes
        return batch

    def _send(self, transport: PublishTransport, batch: Batch) -> None:
        batch.sent_ns = now_ns()
        batch.broker = transport.broker.id
        transport.send(batch)

    def _next_transport(self, nbytes: int) -> PublishTransport | None:
        """The next live broker in turn whose window has room."""
        order = list(self.transports.values())
        for i in range(len(order)):
            transport = order[(self.turn + i) % len(order)]
            if transport.alive and transport.has_room(nbytes):
                self.turn = (self.turn + i + 1) % len(order)
                return transport
        return None

    def _on_acks(self, transport: PublishTransport, response: pb.PublishResponse) -> None:
        """Settle what a broker answered."""
        now = now_ns()
        for sequence, position, status in zip(response.batch_sequences, response.positions, response.statuses,
                                              strict=True):
            transport.answered(sequence)
            batch = self.inflight.get(sequence)
            if status == ResultStatus.RESULT_FENCED:
                self._start_reopening(SessionFenced(reason="the sequencer ended it", committed=sequence))
            elif batch is None:
                continue
            elif status in (ResultStatus.RESULT_COMMITTED, ResultStatus.RESULT_DUPLICATE):
                if len(self.latencies) < LATENCIES_KEPT:
                    self.latencies.append(now - batch.sent_ns)
                duplicate = status == ResultStatus.RESULT_DUPLICATE
                batch.broker = transport.broker.id
                self._leave(sequence)
                self._had_room(time.monotonic())
                # A duplicate's ack says how far the log had come, not where its first copy lies.
                known = None if duplicate or self.ack == 0 else position
                self._settle(batch, known, None, epoch=response.epoch, duplicate=duplicate)
            elif status == ResultStatus.RESULT_UNDURABLE:
                self._leave(sequence)
                self._settle(batch, None, replica_failed(position))
            elif status == ResultStatus.RESULT_DAMAGED:
                self._leave(sequence)
                self._settle(batch, None, CxlmqError("the batch was damaged in memory and not ordered: publish again"))
                self._start_reopening(SessionFenced(reason="a batch was damaged", committed=sequence))
            else:
                self.retry_at[sequence] = time.monotonic() + RETRY_SECONDS
        for refusal in response.refusals:
            transport.answered(refusal.batch_sequence)
            if refusal.batch_sequence in self.inflight:
                self._pushed_back(refusal.batch_sequence, transport.refusal_error(refusal))
        if self.pending:
            self._pump()
        self._notify()

    def _pushed_back(self, sequence: int, error: CxlmqError) -> None:
        """A broker had no room for a batch: send it again later, and less at once.

        What was sent behind the oldest batch waits in memory for its order, and may be what fills it: take it back.
        """
        now = time.monotonic()
        self.obstacle = self.last_refusal[sequence] = error
        self.refusals[sequence] = self.refusals.get(sequence, 0) + 1
        self.retry_at[sequence] = now + PUSHED_BACK_SECONDS
        if sequence == self._oldest() and len(self.inflight) > 1 and not self.reopening:
            self.span = max(1, len(self.inflight) // 2)
            self.span_grows_at = now + SPAN_GROWTH_SECONDS
            if self.session.order == 5:
                self._start_reopening(error)

    def _had_room(self, now: float) -> None:
        self.obstacle = None
        if self.span < SPAN_MAX and now >= self.span_grows_at:
            self.span = min(SPAN_MAX, self.span * 2)
            self.span_grows_at = now + SPAN_GROWTH_SECONDS

    def _on_broken(self, transport: PublishTransport, error: CxlmqError) -> None:
        """A stream ended: its batches go elsewhere with the sequence they have."""
        self.transports.pop(transport.broker.id, None)
        if self.closed:
            return
        if isinstance(error, SessionFenced | SessionUnknown):
            self._start_reopening(error)
        elif not error.comes_back and not isinstance(error, ABOUT_A_BATCH):
            self._fail_everything(error)
        else:
            for sequence in transport.unanswered():
                self.retry_at[sequence] = 0.0
                if not isinstance(error, BrokerUnavailable):
                    self.obstacle = self.last_refusal[sequence] = error
            self._resend_due()

    def _resend_due(self) -> None:
        """Send again what was refused or lost, by rendezvous hashing over the live brokers.

        What one of them had no room for goes to the next.
        """
        if self.reopening:
            return
        now = time.monotonic()
        for sequence in sorted(sequence for sequence, due in self.retry_at.items() if due <= now):
            batch = self.inflight.get(sequence)
            live = [transport for transport in self.transports.values() if transport.alive]
            if batch is None:
                self.retry_at.pop(sequence)
                continue
            if not live:
                return
            if sequence in self.last_refusal and batch.deadline - now < LAST_TRY_SECONDS:
                continue                    # so that at its deadline it is known to be refused, and not on its way
            order = rendezvous([transport.broker for transport in live], self.client_id, sequence)
            chosen = order[self.refusals.get(sequence, 0) % len(order)]
            self.retry_at.pop(sequence)
            self.counts["retries"] += 1
            self._send(self.transports[chosen.id], batch)

    def _pause(self) -> float:
        return TICK_SECONDS

    def _expire_in_flight(self, now: float) -> bool:
        overdue = [key for key, batch in self.inflight.items() if batch.deadline <= now]
        for sequence in overdue:
            error = self._why_not_acked(sequence)
            self._settle(self._leave(sequence), None, error)
        return bool(overdue)

    def _why_not_sent(self) -> CxlmqError:
        """What stops all batches now, or else that no broker took this one. Either way it is not in the log."""
        return self.obstacle or DeliveryTimeout(
            f"not sent within {self.delivery_timeout} s: no broker took it; it is not in the log",
            timeout_seconds=self.delivery_timeout)

    def _why_not_acked(self, sequence: int) -> CxlmqError:
        """A refusal that stands, or else that nobody knows: a broker has the batch and has not answered."""
        if sequence in self.retry_at and sequence in self.last_refusal:
            return self.last_refusal[sequence]
        error = DeliveryTimeout(timeout_seconds=self.delivery_timeout)
        error.__cause__ = self.last_refusal.get(sequence, self.obstacle)
        return error

    def _take_in_flight(self) -> list[tuple[int, Batch]]:
        taken = sorted(self.inflight.items())
        self.inflight.clear()
        self.inflight_bytes = 0
        self.retry_at.clear()
        self.last_refusal.clear()
        self.refusals.clear()
        self.next_sequence = 0
        return taken

    def _give_up(self) -> None:
        self.inflight.clear()
        super()._give_up()
