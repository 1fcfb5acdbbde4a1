"""The engine of an attached publisher: what `PublisherEngine` is for gRPC, over slots in the region.

gRPC opens the session and hands out the slots; after that batches and acks go through memory alone. This engine does
what is slow or rare: linger, time-outs, dead brokers, a session that has to be opened anew.
"""

import asyncio
import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from broker.config import TopicConfig
from broker.errors import (
    BrokerUnavailable,
    BufferFull,
    ClosedError,
    ConfigError,
    CxlmqError,
    DeliveryTimeout,
    MessageTooBig,
    PoolFull,
    SessionFenced,
    UnknownTopic,
)
from broker.layout import BrokerState, TopicState
from broker.proto import cxlmq_pb2 as pb
from broker.records import unpack
from broker.region import Region, attach_region
from broker.topics import holder_text
from client.attached import AttachedCore, Loan
from client.batch import Batch, Delivery, Dropped
from client.connection import BrokerAddress, ClientLoop, Connection
from client.session import open_session
from sim.cxl.memory import Role
from sim.cxl.region import host_identity, process_alive, process_start_time

IDLE_SECONDS = 0.02
BUSY_SECONDS = 0.001
BEAT_SECONDS = 1.0
CHECK_SECONDS = 0.25
WINDOW_BYTES = 16 << 20
PATIENCE_SECONDS = 0.05
UNKNOWN_POSITION = (1 << 64) - 1
DEFAULT_BATCH_BYTES = 512 << 10


class AttachedEngine:
    """Drives an `AttachedCore`. Methods without `async` may be called from any thread."""

    def __init__(self, topic: str, *, cluster: str, bootstrap: str | None, ack: int | None, client_id: int,
                 batch_bytes: int | None, linger_ms: float, in_flight: int, buffer_bytes: int, when_full: str,
                 delivery_timeout: float, on_event: Callable[[CxlmqError], None] | None, **_: Any) -> None:
        self.topic = topic
        self.client_loop = ClientLoop.get()
        self.connection = Connection(cluster, bootstrap)
        self.ack = ack
        self.client_id = client_id
        self.batch_bytes = batch_bytes or DEFAULT_BATCH_BYTES
        self.linger = linger_ms / 1000
        self.buffer_bytes = buffer_bytes
        self.when_full = when_full
        self.delivery_timeout = delivery_timeout
        self.on_event = on_event
        self.epoch = 0
        self.session = pb.Session()
        self.session_target = ""
        self.attachments: list[tuple[BrokerAddress, pb.Attachment]] = []
        self.region: Region | None = None
        self.packer: AttachedCore | None = None
        self.closed = False
        self.failure: CxlmqError | None = None
        self.reopening: asyncio.Task[None] | None = None
        self.reopened_event = threading.Event()
        self.reopened_event.set()
        self.ticker: asyncio.Task[None] | None = None
        self.final: dict[str, int] = {}
        self.extra = dict.fromkeys(("failed", "dropped_oldest", "dropped_newest", "reopened"), 0)

    # ---- opening ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the session, map the region, get a slot at every live broker."""
        brokers = await self.connection.brokers()
        topic = await self.connection.any("Admin/DescribeTopic", pb.DescribeTopicRequest(name=self.topic), pb.Topic)
        if self.ack is None:
            self.ack = topic.ack
        TopicConfig(name=topic.name, order=topic.order, ack=self.ack,
                    replication_factor=topic.replication_factor).validate(max(2, topic.replication_factor))
        self.attachments = await self._attach(brokers, 0)
        if self.batch_bytes > self.session.batch_bytes_max and self.batch_bytes != DEFAULT_BATCH_BYTES:
            raise ConfigError(setting="batch_bytes", value=self.batch_bytes,
                              allowed=f"at most {self.session.batch_bytes_max} (the cluster's batch_bytes_max)")
        first = self.attachments[0][1]
        self.region = attach_region(first.region, run_id=first.run_id)
        memory = self.region.memory(Role.ROLE_CLIENT)
        self.packer = AttachedCore(self, memory, self.region.layout,
                                   min(self.batch_bytes, self.session.batch_bytes_max),
                                   min(self.buffer_bytes, WINDOW_BYTES), self.session.message_bytes_max, self.ack)
        self._use_attachments()
        self.ticker = asyncio.get_running_loop().create_task(self._tick())

    def _use_attachments(self) -> None:
        assert self.packer is not None
        self.packer.epoch = self.session.session_epoch
        self.packer.use_channels([(each.slot, each.generation, each.doorbell) for _, each in self.attachments])
        self.packer.beat()

    async def _attach(self, brokers: Sequence[BrokerAddress],
                      resume_from: int) -> list[tuple[BrokerAddress, pb.Attachment]]:
        """Open the next epoch of the session, and a slot at every broker."""
        await self._open_session(brokers, resume_from)
        opened = pb.PublishOpen(topic=self.topic, client_id=self.client_id, session_slot=self.session.session_slot,
                                session_epoch=self.session.session_epoch, ack=self.ack or 0)
        request = pb.AttachPublisherRequest(open=opened, pid=os.getpid(), start_time=process_start_time())
        got: list[tuple[BrokerAddress, pb.Attachment]] = []
        for broker in brokers:
            try:
                got.append((broker, await self.connection.unary(broker.target, "Admin/AttachPublisher", request,
                                                                pb.Attachment)))
            except BrokerUnavailable:
                continue
            except CxlmqError:
                await self._detach(got)
                raise
        if not got:
            raise BrokerUnavailable(address=f"the brokers of topic {self.topic}")
        return got

    async def _open_session(self, brokers: Sequence[BrokerAddress], resume_from: int) -> None:
        assert self.ack is not None
        self.session, self.session_target = await open_session(
            self.connection, brokers, self.topic, self.client_id, self.ack, self.epoch, resume_from)
        self.epoch = self.session.session_epoch

    async def _detach(self, attachments: Sequence[tuple[BrokerAddress, pb.Attachment]]) -> None:
        for broker, each in attachments:
            request = pb.DetachRequest(slot=each.slot, generation=each.generation)
            try:
                await self.connection.unary(broker.target, "Admin/Detach", request, pb.DetachResponse, timeout=2.0)
            except CxlmqError:
                continue                    # it is gone; it finds out by itself that we are, too

    # ---- asked by the core ------------------------------------------------------------------------------------------

    def too_big(self, nbytes: int) -> None:
        """Refuse a message before anything is packed."""
        raise MessageTooBig(message_bytes=nbytes, message_bytes_max=self.session.message_bytes_max)

    def check(self) -> None:
        """Raise what ended the publisher; wait while its session is being opened anew."""
        if self.closed:
            raise self.failure or ClosedError(what="the publisher")
        assert self.packer is not None
        if not self.packer.fenced and self.reopening is None:
            return
        if threading.current_thread() is self.client_loop.thread:
            raise SessionFenced(reason="it is being opened anew", committed=self.packer.oldest)
        self.client_loop.loop.call_soon_threadsafe(self._start_reopening, "the broker ended it")
        self.reopened_event.wait(0.01)

    def retry(self) -> None:
        """Submit again what was refused or lost."""
        if self.packer is not None and self.packer.retry_wanted and self.reopening is None:
            self.packer.resubmit()

    def patience(self) -> float:
        """How long to wait for room, seconds."""
        return self.delivery_timeout if self.when_full == "block" else PATIENCE_SECONDS

    def no_room(self) -> None:
        """The policy when no lease had room in time."""
        error = BufferFull(buffer_bytes=self.buffer_bytes)
        if self.when_full in ("drop_oldest", "drop_newest"):
            # What is in a segment has its place in the session already: only the newest can still be dropped.
            self.extra["dropped_newest"] += 1
            raise Dropped(error)
        raise self._pool_full() or error

    def _pool_full(self) -> CxlmqError | None:
        """When it is the region that has no room: who holds it."""
        assert self.region is not None and self.packer is not None
        if self.packer.in_flight_bytes >= self.buffer_bytes // 2:
            return None
        memory, layout = self.region.memory(Role.ROLE_CLIENT), self.region.layout
        for broker in self.packer.brokers_alive():
            answer = unpack("ReclaimAnswerLine",
                            memory.read_line_bytes(layout.offset_of("reclaim_answer", broker)))
            if answer["holder"]:
                return PoolFull(holder=holder_text(answer["holder"]))
        return None

    # ---- waiting (any thread but the loop's) ------------------------------------------------------------------------

    @property
    def buffered(self) -> int:
        """Bytes that are not settled."""
        return self.packer.in_flight_bytes if self.packer is not None else 0

    @property
    def counts(self) -> dict[str, int]:
        """What happened so far."""
        core = self.packer
        found = {"batches": 0, "acked": 0, "duplicates": 0, "retries": 0} if core is None else {
            "batches": core.batches, "acked": core.acked, "duplicates": core.duplicates, "retries": core.retries}
        return {**found, **self.extra}

    def take_latencies(self) -> "array[int]":
        """Submit-to-settled times since the last call, ns."""
        return self.packer.take_latencies() if self.packer is not None else array("q")

    def urge(self, batch: Batch) -> None:
        """Somebody waits for this batch: do not linger."""
        if self.packer is not None and self.packer.is_current(batch):
            self.packer.flush_open()

    def wait_for_batch(self, batch: Batch, timeout: float | None) -> None:
        """Wait until a batch is settled. Raises TimeoutError."""
        self.urge(batch)
        if batch.settled:
            return
        if threading.current_thread() is self.client_loop.thread or self.packer is None or self.packer.tells_now():
            raise RuntimeError("a callback cannot wait for a delivery: it would stop what settles it")
        limit = self.delivery_timeout + 5.0 if timeout is None else timeout
        if not self._wait(lambda: batch.settled, limit):
            raise TimeoutError(f"the outcome is not known after {limit} s")

    def _wait(self, done: Callable[[], bool], limit: float) -> bool:
        core = self.packer
        assert core is not None
        deadline = time.monotonic() + limit
        while not done():
            core.poll()
            if done():
                return True
            if core.retry_wanted:
                self.retry()
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            core.wait(min(left, 0.01))
        return True

    def flush(self, timeout: float | None) -> None:
        """Wait until everything published so far is settled. Raises `DeliveryTimeout`."""
        core = self.packer
        assert core is not None
        core.flush_open()
        epoch, target = core.epoch, core.next_sequence
        limit = self.delivery_timeout + 5.0 if timeout is None else timeout
        # A session that was opened anew has renumbered what is left: then all of it has to settle.
        if not self._wait(lambda: self.closed or (
                core.undecided == 0 or (core.epoch == epoch and core.oldest >= target)), limit):
            raise DeliveryTimeout(timeout_seconds=limit)

    def outstanding(self) -> list[Any]:
        """For flushing from a coroutine: one object whose `settled` says that nothing is left."""
        assert self.packer is not None
        self.packer.flush_open()
        return [_AllSettled(self)]

    def loan(self, nbytes: int) -> Loan:
        """A writable view of a segment."""
        self.check()
        assert self.packer is not None
        return self.packer.loan(nbytes)

    # ---- on the loop ------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Linger, acks that nobody waits for, heartbeats, time-outs, dead brokers."""
        core = self.packer
        assert core is not None
        next_beat = next_check = 0.0
        while not self.closed:
            busy = core.in_flight or core.open_count
            await asyncio.sleep(max(BUSY_SECONDS, min(self.linger, IDLE_SECONDS)) if busy else IDLE_SECONDS)
            now = time.monotonic()
            if core.open_count and now - core.opened >= self.linger and not core.in_flight_bytes >= WINDOW_BYTES // 2:
                core.flush_open()
            core.poll()
            self.retry()
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                core.beat()
            if now >= next_check:
                next_check = now + CHECK_SECONDS
                self._check_brokers()
            oldest = core.oldest_sent_ns()
            if core.fenced:
                self._start_reopening("the broker ended it")
            elif oldest and time.monotonic_ns() - oldest > self.delivery_timeout * 1e9:
                error = self._pool_full() or DeliveryTimeout(timeout_seconds=self.delivery_timeout)
                self.extra["failed"] += core.expire(
                    time.monotonic_ns() - int(self.delivery_timeout * 1e9), error)
                # Its sequence may never arrive: the session has to end, or all behind it would wait for ever.
                self._start_reopening("a batch was given up")

    def _check_brokers(self) -> None:
        """Drop the channels of dead brokers; notice a deleted topic."""
        assert self.region is not None and self.packer is not None
        memory, layout, boot = self.region.memory(Role.ROLE_CLIENT), self.region.layout, host_identity()
        for broker in self.packer.brokers_alive():
            line = unpack("BrokerLine", memory.read_line_bytes(layout.offset_of("broker", broker)))
            if line["state"] != BrokerState.BROKER_READY or not process_alive(line["pid"], line["start_time"], boot):
                self.packer.drop_channel(broker)
        state = memory.load_word(layout.offset_of("topic", self.session.topic_number))
        if state != self.session.topic_generation << 8 | TopicState.TOPIC_ACTIVE:
            self._fail_everything(UnknownTopic(topic=self.topic))

    def _start_reopening(self, reason: str) -> None:
        if self.reopening is None and not self.closed:
            self.reopened_event.clear()
            self.reopening = asyncio.get_running_loop().create_task(self._reopen(reason))

    async def _reopen(self, reason: str) -> None:
        """Open the next epoch, settle what is in the log, publish the rest again behind it."""
        core = self.packer
        assert core is not None
        old, resume_from = self.attachments, core.oldest
        attachments: list[tuple[BrokerAddress, pb.Attachment]] = []
        while not attachments:
            try:
                attachments = await self._attach(await self.connection.brokers(), resume_from)
            except (UnknownTopic, SessionFenced) as error:
                self._fail_everything(error)
                return
            except CxlmqError:
                await asyncio.sleep(0.1)    # nobody answers now; what is in flight expires meanwhile
        core.poll()
        deadline = time.monotonic() + self.delivery_timeout
        unsettled = self._settle_committed(core.take_unsettled(), resume_from)
        self.attachments = attachments
        self.extra["reopened"] += 1
        self._use_attachments()
        for _, offset, nbytes, messages, wall_ns, batch in unsettled:
            while not core.republish(offset, nbytes, messages, wall_ns, batch):
                if time.monotonic() > deadline:
                    self.extra["failed"] += messages
                    if batch is not None:
                        batch.settle(None, None, None, False, DeliveryTimeout(timeout_seconds=self.delivery_timeout))
                    break
                await asyncio.sleep(0.001)
                core.poll()
        if self.on_event is not None:
            self.on_event(SessionFenced(reason=reason, committed=self.session.high_water))
        await self._detach(old)
        self.reopening = None
        self.reopened_event.set()

    def _settle_committed(self, unsettled: list[Any], resume_from: int) -> list[Any]:
        high_water, positions = self.session.high_water, list(self.session.positions)
        left = []
        for sequence, offset, nbytes, messages, wall_ns, batch in unsettled:
            at = sequence - resume_from
            position = positions[at] if 0 <= at < len(positions) else UNKNOWN_POSITION
            if sequence < high_water or position != UNKNOWN_POSITION:
                if batch is not None:
                    batch.settle(None if position == UNKNOWN_POSITION else position, self.session.session_epoch, None,
                                 True, None)
            else:
                left.append((sequence, offset, nbytes, messages, wall_ns, batch))
        return left

    def _fail_everything(self, error: CxlmqError) -> None:
        assert self.packer is not None
        self.failure, self.closed = error, True
        self.packer.shut_down(error)
        for *_, messages, _, batch in self.packer.take_unsettled():
            self.extra["failed"] += messages
            if batch is not None:
                batch.settle(None, None, None, False, error)
        self.reopening = None
        self.reopened_event.set()
        if self.on_event is not None and not isinstance(error, ClosedError):
            self.on_event(error)

    # ---- closing ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give the slots back and end the session. What is not settled is given up."""
        already, self.closed = self.closed, True
        for task in (self.ticker, self.reopening):
            if task is not None:
                task.cancel()
        if self.packer is not None and not already:
            self._fail_everything(ClosedError(what="the publisher"))
        await self._detach(self.attachments)
        if self.session.session_epoch:
            request = pb.CloseSessionRequest(client_id=self.client_id, session_slot=self.session.session_slot,
                                             session_epoch=self.session.session_epoch)
            try:
                await self.connection.unary(self.session_target, "Admin/CloseSession", request,
                                            pb.CloseSessionResponse, timeout=2.0)
            except CxlmqError:
                pass                        # a session without streams ends by itself
        await self.connection.close()
        if self.packer is not None:
            # Nothing of ours keeps the region mapped any longer; what was counted stays.
            self.final = {"messages": self.packer.messages, "bytes": self.packer.nbytes,
                          "batch_bytes_target": self.packer.target, **self.counts}
            self.packer = None
        if self.region is not None:
            self.region.close()
            self.region = None


class _AllSettled:
    """Looks like a batch that is settled once the engine has nothing in flight."""

    def __init__(self, engine: AttachedEngine) -> None:
        self._engine = engine

    @property
    def settled(self) -> bool:
        """Whether nothing is in flight."""
        core = self._engine.packer
        return self._engine.closed or (core is not None and core.in_flight == 0 and self._engine.reopening is None)


__all__ = ["AttachedEngine", "Delivery"]
