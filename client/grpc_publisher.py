"""The engine of a publisher over gRPC: batches are packed by the caller's thread and carried on the client loop.

    publish ─► Packer ─► pending ─► (stamped with the session's sequence) ─► a broker's stream ─► acks ─► deliveries

The engine keeps every batch until it is settled: a broken stream's batches go to other brokers with the sequence they
have; a fenced session is opened anew and goes on behind what is in the log.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence

from broker.config import TopicConfig
from broker.errors import (
    BrokerUnavailable,
    BufferFull,
    ClosedError,
    ConfigError,
    CxlmqError,
    DeliveryTimeout,
    MessageTooBig,
    SessionFenced,
    SessionUnknown,
    UnknownTopic,
    replica_failed,
)
from broker.grpc_options import RECOMMENDED_WINDOW_BYTES
from broker.layout import ResultStatus
from broker.proto import cxlmq_pb2 as pb
from client.batch import Batch, Delivery, Dropped, Packer, now_ns
from client.connection import BrokerAddress, ClientLoop, Connection
from client.session import open_session
from client.transport import PublishTransport, rendezvous

_log = logging.getLogger("cxlmq")

TICK_SECONDS = 0.05
RECONNECT_SECONDS = 0.5
RETRY_SECONDS = 0.02
LAST_TRY_SECONDS = 1.5                  # a broker takes up to a second to refuse a batch
CLOSE_SESSION_SECONDS = 2.0
SPAN_MAX = 200                          # sequences from the oldest unsettled batch on; the sequencer's window has more
SPAN_BYTES_MIN = 1 << 20
SPAN_GROWTH_SECONDS = 1.0
PUSHED_BACK_SECONDS = 0.2               # a batch for which there was no room is sent again so much later
BLOCK_GRACE_SECONDS = 1.0
LATENCIES_KEPT = 1 << 20
UNKNOWN_POSITION = (1 << 64) - 1
FRAMING_BYTES_MAX = 16                  # around one message, with its padding


class PublisherEngine:
    """What carries batches. Its coroutines and callbacks run on the client loop; the rest may be called anywhere.

    Invariant: a batch is in exactly one of: the packer, `pending` (no sequence yet), `inflight` (by sequence), settled.
    """

    def __init__(self, topic: str, *, cluster: str, bootstrap: str | None, ack: int | None, client_id: int,
                 batch_bytes: int | None, batch_bytes_min: int, batch_bytes_max: int, linger_ms: float,
                 in_flight: int, buffer_bytes: int, when_full: str, delivery_timeout: float,
                 on_delivery: Callable[[Delivery], None] | None, on_event: Callable[[CxlmqError], None] | None,
                 compression: str | None) -> None:
        self.topic = topic
        self.client_loop = ClientLoop.get()
        self.loop = self.client_loop.loop
        self.connection = Connection(cluster, bootstrap)
        self.ack = ack
        self.client_id = client_id
        self.fixed_batch = batch_bytes is not None
        self.batch_bytes = (batch_bytes or batch_bytes_min, batch_bytes_min, batch_bytes_max)
        self.linger = linger_ms / 1000
        self.in_flight = in_flight
        self.buffer_bytes = buffer_bytes
        self.when_full = when_full
        self.delivery_timeout = delivery_timeout
        self.on_delivery = on_delivery
        self.on_event = on_event
        self.compression = compression
        self.session = pb.Session()
        self.session_target = ""
        self.epoch = 0
        self.next_sequence = 0
        self.pending: deque[Batch] = deque()
        self.inflight: dict[int, Batch] = {}
        self.inflight_bytes = 0
        self.span = SPAN_MAX                        # batches in flight at once; fewer after there was no room
        self.span_bytes = SPAN_BYTES_MIN
        self.span_grows_at = 0.0
        self.unsettled: dict[int, Batch] = {}       # both, and what is between them, by number of sealing
        self.sealed = itertools.count()
        self.retry_at: dict[int, float] = {}
        self.last_refusal: dict[int, CxlmqError] = {}
        self.obstacle: CxlmqError | None = None     # the last refusal, as long as nothing was acked since
        self.transports: dict[int, PublishTransport] = {}
        self.turn = 0
        self.buffered = 0
        self.account = threading.Lock()
        self.packer: Packer | None = None
        self.changed = threading.Condition()
        self.waiters = 0
        self.pump_scheduled = False
        self.linger_armed = False
        self.reopening = False
        self.closed = False
        self.session_open = False
        self.failure: CxlmqError | None = None
        self.ticker: asyncio.Task[None] | None = None
        self.reconnecting: asyncio.Task[None] | None = None
        self.next_reconnect = 0.0
        self.known_brokers = 0
        self.latencies = array("q")
        self.final: dict[str, int] = {}
        self.counts = dict.fromkeys(
            ("batches", "acked", "duplicates", "failed", "dropped_oldest", "dropped_newest", "retries", "reopened"), 0)

    # ---- opening ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find the brokers, open the session and a stream to every broker."""
        brokers = await self.connection.brokers()
        topic = await self.connection.any("Admin/DescribeTopic", pb.DescribeTopicRequest(name=self.topic), pb.Topic)
        if self.ack is None:
            self.ack = topic.ack
        TopicConfig(name=topic.name, order=topic.order, ack=self.ack,
                    replication_factor=topic.replication_factor).validate(max(2, topic.replication_factor))
        await self._open_session(brokers, resume_from=0)
        limit = min(self.batch_bytes[2], self.session.batch_bytes_max)
        if self.fixed_batch and self.batch_bytes[0] > self.session.batch_bytes_max:
            raise ConfigError(setting="batch_bytes", value=self.batch_bytes[0],
                              allowed=f"at most {self.session.batch_bytes_max} (the cluster's batch_bytes_max)")
        self.batch_bytes = (min(self.batch_bytes[0], limit), min(self.batch_bytes[1], limit), limit)
        # A quarter of a region, by the default sizes: what waits for its order must not fill it.
        self.span_bytes = max(SPAN_BYTES_MIN, 4 * self.session.batch_bytes_max)
        self.packer = Packer(self, self.send_full, self.batch_bytes[0], self.session.message_bytes_max)
        self.known_brokers = len(brokers)
        self._connect(brokers)
        self.ticker = self.loop.create_task(self._tick())

    async def _open_session(self, brokers: Sequence[BrokerAddress], resume_from: int) -> None:
        """Open the session's next epoch. Raises `SessionFenced` when a later publisher of this client id took over."""
        assert self.ack is not None
        self.session, self.session_target = await open_session(
            self.connection, brokers, self.topic, self.client_id, self.ack, self.epoch, resume_from)
        self.epoch = self.session.session_epoch
        self.session_open = True

    def _connect(self, brokers: Sequence[BrokerAddress]) -> None:
        assert self.ack is not None
        for broker in brokers:
            if broker.id in self.transports:
                continue
            opened = pb.PublishOpen(
                topic=self.topic, client_id=self.client_id, session_slot=self.session.session_slot,
                session_epoch=self.session.session_epoch, ack=self.ack)
            self.transports[broker.id] = PublishTransport(
                broker, self.connection.channel(broker.target), opened, self.in_flight, RECOMMENDED_WINDOW_BYTES,
                self._on_acks, self._on_broken, self.compression)

    # ---- from the packer (any thread) -------------------------------------------------------------------------------

    def too_big(self, nbytes: int) -> None:
        """Refuse a message before anything is packed."""
        raise MessageTooBig(message_bytes=nbytes, message_bytes_max=self.session.message_bytes_max)

    def make_room(self, nbytes: int) -> None:
        """Account for a new batch of up to `nbytes`; the policy decides when there is no room."""
        self._raise_if_closed()
        if self.buffered and self.buffered + nbytes > self.buffer_bytes:
            self._when_full(nbytes)
            self._raise_if_closed()
        if not self.linger_armed:
            self.linger_armed = True
            self.loop.call_soon_threadsafe(self._arm_linger)

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise self.failure or ClosedError(what="the publisher")

    def _when_full(self, nbytes: int) -> None:
        def room() -> bool:
            return self.closed or not self.buffered or self.buffered + nbytes <= self.buffer_bytes

        error = BufferFull(buffer_bytes=self.buffer_bytes)
        if self.when_full == "error":
            raise error
        if self.when_full == "drop_oldest":
            while not room() and self._drop_oldest():
                pass
            if room():
                return
        if self.when_full in ("drop_oldest", "drop_newest"):
            with self.account:
                self.counts["dropped_newest"] += 1
            raise Dropped(BufferFull("dropped: the buffer was full", buffer_bytes=self.buffer_bytes))
        if threading.current_thread() is self.client_loop.thread:
            raise error                     # waiting here would stop what makes room
        with self._waiting():
            if not self.changed.wait_for(room, self.delivery_timeout + BLOCK_GRACE_SECONDS):
                raise error

    def _drop_oldest(self) -> bool:
        """Drop the oldest batch that is not on its way yet; False when there is none."""
        try:
            oldest = self.pending.popleft()
        except IndexError:
            return False                    # the loop was faster
        self._settle(oldest, None, BufferFull("dropped: the buffer was full and this was the oldest",
                                              buffer_bytes=self.buffer_bytes), outcome="dropped_oldest")
        self._notify()
        return True

    def send_full(self) -> None:
        """The packer's batch is full: it goes, and under load the next one may be larger."""
        assert self.packer is not None
        batch = self.packer.take()
        if batch is None:
            return
        if not self.fixed_batch and len(self.unsettled) >= len(self.transports):
            self.packer.target = min(self.packer.target * 2, self.batch_bytes[2])
        self._seal(batch)

    def _seal(self, batch: Batch) -> None:
        assert self.ack is not None
        batch.seal(time.time_ns())
        batch.level = self.ack
        batch.deadline = batch.opened + self.delivery_timeout
        batch.number = next(self.sealed)
        with self.account:
            self.buffered += batch.nbytes
            self.counts["batches"] += 1
            self.unsettled[batch.number] = batch
        self.pending.append(batch)
        if self.closed:
            self._give_up()                 # it was closed meanwhile
        self._schedule_pump()

    def _schedule_pump(self) -> None:
        if not self.pump_scheduled:
            self.pump_scheduled = True
            self.loop.call_soon_threadsafe(self._pump)

    def take_latencies(self) -> "array[int]":
        """Send-to-ack times since the last call, ns."""
        taken, self.latencies = self.latencies, array("q")
        return taken

    def urge(self, batch: Batch) -> None:
        """Somebody waits for this batch: do not linger."""
        if self.packer is not None and self.packer.batch is batch:
            self.seal_current()

    def seal_current(self) -> None:
        """Send what is packed so far. When that is little, the next batch need not be as large."""
        taken = self.packer.take() if self.packer is not None else None
        if taken is None or self.packer is None:
            return
        if not self.fixed_batch and taken.nbytes < self.packer.target // 2:
            self.packer.target = max(self.packer.target // 2, self.batch_bytes[1])
        self._seal(taken)

    # ---- waiting (any thread but the loop's) ------------------------------------------------------------------------

    def _waiting(self) -> "_Waiter":
        if threading.current_thread() is self.client_loop.thread:
            raise RuntimeError("a delivery callback cannot wait for other deliveries: it runs where they are settled")
        return _Waiter(self)

    def wait_for_batch(self, batch: Batch, timeout: float | None) -> None:
        """Wait until a batch is settled. Raises TimeoutError."""
        self.urge(batch)
        limit = self.delivery_timeout + 5.0 if timeout is None else timeout
        with self._waiting():
            if not self.changed.wait_for(lambda: batch.settled, limit):
                raise TimeoutError(f"the outcome is not known after {limit} s")

    def outstanding(self) -> list[Batch]:
        """Batches that are not settled, the current one sealed first."""
        self.seal_current()
        with self.account:
            return list(self.unsettled.values())

    def flush(self, timeout: float | None) -> None:
        """Wait until everything published so far is settled. Raises `DeliveryTimeout`."""
        batches = self.outstanding()
        with self._waiting():
            if not self.changed.wait_for(lambda: all(batch.settled for batch in batches),
                                         self.delivery_timeout + 5.0 if timeout is None else timeout):
                raise DeliveryTimeout(timeout_seconds=timeout)

    # ---- on the loop ------------------------------------------------------------------------------------------------

    def _arm_linger(self) -> None:
        self.loop.call_later(self.linger, self._linger)

    def _linger(self) -> None:
        """Send a batch that lingered long enough; come again while there is one."""
        assert self.packer is not None
        batch = self.packer.batch
        if batch is None or batch.count == 0 or self.closed:
            self.linger_armed = False
            batch = self.packer.batch       # one may have begun just now
            if batch is not None and batch.count and not self.linger_armed and not self.closed:
                self.linger_armed = True
                self._arm_linger()
            return
        age = time.monotonic() - batch.opened
        # While the pipe is full, lingering costs nothing and fills batches.
        if age >= self.linger and not self._is_saturated():
            self.seal_current()
            age = 0.0
        self.loop.call_later(max(self.linger - age, self.linger / 4, 0.0001), self._linger)

    def _is_saturated(self) -> bool:
        return bool(self.pending) or (bool(self.transports) and all(
            not transport.has_room(1) for transport in self.transports.values()))

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
        if isinstance(error, UnknownTopic):
            self._fail_everything(error)
        elif isinstance(error, SessionFenced | SessionUnknown):
            self._start_reopening(error)
        else:
            for sequence in transport.unanswered():
                self.retry_at[sequence] = 0.0
                if not isinstance(error, BrokerUnavailable):
                    self.obstacle = self.last_refusal[sequence] = error
            self._resend_due()

    def _resend_due(self) -> None:
        """Send again what was refused or lost, by rendezvous hashing over the brokers that are there."""
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
            chosen = rendezvous([transport.broker for transport in live], self.client_id, sequence)[0]
            self.retry_at.pop(sequence)
            self.counts["retries"] += 1
            self._send(self.transports[chosen.id], batch)

    async def _tick(self) -> None:
        """Deadlines, retries, and lost brokers that came back. Nothing here waits for a broker."""
        while not self.closed:
            await asyncio.sleep(TICK_SECONDS)
            self._expire()
            self._resend_due()
            now = time.monotonic()
            if now >= self.next_reconnect and not self.reopening and self._lacks_brokers() and (
                    self.reconnecting is None or self.reconnecting.done()):
                self.next_reconnect = now + RECONNECT_SECONDS
                self.reconnecting = self.loop.create_task(self._reconnect())
            if self.pending:
                self._pump()

    def _lacks_brokers(self) -> bool:
        return len(self.transports) < max(1, self.known_brokers) or bool(self.retry_at) or any(
            not transport.alive for transport in self.transports.values())

    async def _reconnect(self) -> None:
        try:
            brokers = await self.connection.brokers()
        except CxlmqError:
            return
        if self.closed or self.reopening:
            return
        self.known_brokers = len(brokers)
        for broker_id in [key for key, transport in self.transports.items() if not transport.alive]:
            del self.transports[broker_id]
        self._connect(brokers)

    def _expire(self) -> None:
        """Settle what nobody answered in time."""
        now = time.monotonic()
        expired = False
        while (batch := self._overdue(now)) is not None:
            self._settle(batch, None, self._why_not_sent())
            expired = True
        for sequence in [key for key, batch in self.inflight.items() if batch.deadline <= now]:
            self._settle(self._leave(sequence), None, self._why_not_acked(sequence))
            # Its sequence may never arrive: the session has to end, or everything behind it would wait for ever.
            self._start_reopening(SessionFenced(reason="a batch was given up", committed=sequence))
            expired = True
        if expired:
            self._notify()

    def _overdue(self, now: float) -> Batch | None:
        """Take the oldest batch that is not sent, when its time is over."""
        try:
            return self.pending.popleft() if self.pending[0].deadline <= now else None
        except IndexError:
            return None

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

    def _settle(self, batch: Batch, position: int | None, error: CxlmqError | None, *, epoch: int = 0,
                duplicate: bool = False, outcome: str = "") -> None:
        """Let go of a batch; tell who published it, unless that was told when it was sent (level 0)."""
        if batch.sequence is not None:
            self.last_refusal.pop(batch.sequence, None)
        batch.release()
        with self.account:
            if self.unsettled.pop(batch.number, None) is None:
                return                      # another thread gave it up
            self.buffered -= batch.nbytes
            self.counts["duplicates"] += duplicate
            if not batch.settled:
                self.counts[outcome or ("acked" if error is None else "failed")] += batch.count
        batch.settle(position, epoch, batch.broker, duplicate, error)

    def settled_at_send(self, batch: Batch) -> None:
        """Level 0: whoever published it is told now. The batch is kept until a broker has it: none is lost because
        a broker had no room, and none is sent faster than brokers take them."""
        if not batch.settled:
            with self.account:
                self.counts["acked"] += batch.count
            batch.settle(None, 0, batch.broker, False, None)
            self._notify()

    def _notify(self) -> None:
        if self.waiters:
            with self.changed:
                self.changed.notify_all()

    # ---- a session that ended ---------------------------------------------------------------------------------------

    def _start_reopening(self, reason: CxlmqError) -> None:
        if not self.reopening and not self.closed:
            self.reopening = True
            self.loop.create_task(self._reopen(reason))

    async def _reopen(self, reason: CxlmqError) -> None:
        """Open the next epoch, settle what is in the log, and send the rest again, renumbered from 0."""
        for transport in list(self.transports.values()):
            transport.abandon()
        self.transports.clear()
        resume_from = self._oldest()
        while not self.closed:
            try:
                brokers = await self.connection.brokers()
                await self._open_session(brokers, resume_from)
                break
            except (UnknownTopic, SessionFenced) as error:
                self._fail_everything(error)
                return
            except CxlmqError:
                await asyncio.sleep(RECONNECT_SECONDS / 5)
                self._expire()
        self.known_brokers = len(brokers)
        self.counts["reopened"] += 1
        self._resume(resume_from)
        self.reopening = False
        self._connect(brokers)
        self._pump()
        self._notify()
        self._tell(reason)

    def _resume(self, resume_from: int) -> None:
        high_water, positions = self.session.high_water, list(self.session.positions)
        unsettled = []
        for sequence in sorted(self.inflight):
            batch, at = self.inflight[sequence], sequence - resume_from
            if sequence < high_water:
                position = positions[at] if 0 <= at < len(positions) else UNKNOWN_POSITION
                self._settle(batch, None if position == UNKNOWN_POSITION else position, None, duplicate=True)
            elif 0 <= at < len(positions) and positions[at] != UNKNOWN_POSITION:
                self._settle(batch, positions[at], None, duplicate=True)
            else:
                unsettled.append(batch)
        self.inflight.clear()
        self.inflight_bytes = 0
        self.retry_at.clear()
        self.last_refusal.clear()
        self.next_sequence = 0
        self.pending.extendleft(reversed(unsettled))

    def _fail_everything(self, error: CxlmqError) -> None:
        """Nothing more can be published: everything settles with this error, and so does what comes later."""
        self.failure = error
        self.closed = True
        self._give_up()
        self._tell(error)

    def _tell(self, event: CxlmqError) -> None:
        if self.on_event is not None:
            try:
                self.on_event(event)
            except Exception:
                _log.exception("the callback for events failed")

    def _give_up(self) -> None:
        """Settle what a closed publisher still has. Any thread."""
        error = self.failure or ClosedError(what="the publisher")
        current = self.packer.take() if self.packer is not None else None
        if current is not None:
            current.settle(None, None, None, False, error)
            current.release()
            with self.account:
                self.counts["failed"] += current.count
        self.pending.clear()
        self.inflight.clear()
        with self.account:
            left = list(self.unsettled.values())
        for batch in left:
            self._settle(batch, None, error)
        self._notify()

    # ---- closing ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End streams and session. What is not settled is given up."""
        self.closed = True
        for task in (self.ticker, self.reconnecting):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(transport.close() for transport in list(self.transports.values())))
        await self._close_session()
        self._give_up()
        await self.connection.close()

    async def _close_session(self) -> None:
        if not self.session_open:
            return
        self.session_open = False
        request = pb.CloseSessionRequest(client_id=self.client_id, session_slot=self.session.session_slot,
                                         session_epoch=self.session.session_epoch)
        with contextlib.suppress(CxlmqError):       # a session without streams ends by itself
            await self.connection.unary(self.session_target, "Admin/CloseSession", request, pb.CloseSessionResponse,
                                        timeout=CLOSE_SESSION_SECONDS)


class _Waiter:
    """Holds the engine's condition and counts itself, so that the loop notifies only when somebody waits."""

    def __init__(self, engine: PublisherEngine) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        self._engine.changed.acquire()
        self._engine.waiters += 1

    def __exit__(self, *_: object) -> None:
        self._engine.waiters -= 1
        self._engine.changed.release()


