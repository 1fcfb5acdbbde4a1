"""The engine of an attached publisher: slots in the region instead of streams.

gRPC opens the session and hands out the slots; after that batches and acks go through memory alone. What is slow or
rare happens here: linger, time-outs, dead brokers, and what spilled into private memory (see `client.attached`).
"""

import asyncio
import contextlib
import os
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from broker.errors import (
    BrokerUnavailable,
    BufferFull,
    ClosedError,
    CxlmqError,
    DeliveryTimeout,
    SessionFenced,
    SessionUnknown,
    UnknownTopic,
)
from broker.head import HeadView
from broker.holders import NOBODY, in_the_way, pool_full
from broker.layout import BrokerState, TopicState
from broker.proto import cxlmq_pb2 as pb
from broker.records import unpack
from broker.region import Region, attach_region
from client.attached import AttachedCore, Loan
from client.batch import Batch
from client.connection import BrokerAddress
from client.engine import SILENT_SECONDS, Engine
from client.transport import rendezvous
from sim.cxl.locks import Presence
from sim.cxl.memory import Role

IDLE_SECONDS = 0.02
BUSY_SECONDS = 0.001
STREAM_SECONDS = 0.004                  # while batch follows batch: whoever publishes looks for acks, and needs the GIL
STREAM_BATCHES = 4                      # since the last look
BEAT_SECONDS = 1.0
CHECK_SECONDS = 0.25
RETRY_SECONDS = 0.02
ATTACH_SECONDS = 1.0                    # a broker that has not answered by then is waited for beside the others
DETACH_SECONDS = 2.0
WINDOW_BYTES = 32 << 20                 # two publishers and four brokers on two cores: acks take 1 ms and more
REGION_SHARE = 4                        # of a small region, one publisher has less in flight
TARGET_SHARE = 8                        # batches of a window that each broker should be able to have
PATIENCE_SECONDS = {"block": 0.05}      # how long a lease is waited for before messages spill
SHORT_PATIENCE_SECONDS = 0.002
UNLIMITED = 1 << 32
SUPPLY_TRIES = 50
IDLE_LEASE_SECONDS = 1.0                # who has published nothing for so long gives its leases back


class AttachedEngine(Engine):
    """Drives an `AttachedCore`."""

    BUFFER_BYTES = WINDOW_BYTES

    def __init__(self, topic: str, **options: Any) -> None:
        super().__init__(topic, **options)
        self.region: Region | None = None
        self.presence: Presence | None = None
        self.old_regions: list[Region] = []         # of runs that ended: loans may be open there
        self.core: AttachedCore | None = None
        self.attachments: dict[int, tuple[BrokerAddress, pb.Attachment]] = {}
        self.attaching: dict[int, asyncio.Task[None]] = {}
        self.attach_error: CxlmqError | None = None
        self.detaching: set[asyncio.Task[None]] = set()
        self.next_beat = self.next_check = self.next_retry = 0.0
        self.final: dict[str, int] = {}
        self.submitted = 0                          # batches, when it was looked last
        self.packed_before = 0                      # messages, when it was looked for idleness last
        self.idle_since = time.monotonic()
        self.window = 0                             # bytes in flight
        self.targets = 0, 0, 0                      # bytes of a batch: at first, at least, at most

    # ---- slots ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """As over gRPC. Raises `RegionMissing` when the region is not on this machine."""
        await self.connection.check_host()
        await super().open()

    def _opened(self) -> None:
        first, least, most = self.batch_bytes
        self.window = min(self.buffer_bytes, WINDOW_BYTES)
        if self.fixed_batch:
            least = most = first
        else:
            most = max(first, min(most, self.window // (TARGET_SHARE * self.connection.broker_count)))
        self.targets = first, least, most

    async def _connect(self, brokers: Sequence[BrokerAddress]) -> None:
        """Get a slot at every broker. Raises when there is none at all."""
        for broker in brokers:
            if broker.id not in {*self.attaching, *self._brokers_alive(), *self.silent}:
                task = self.loop.create_task(self._attach(broker, self.epoch))
                self.attaching[broker.id] = task
                task.add_done_callback(lambda _, key=broker.id: self.attaching.pop(key, None))  # type: ignore[misc]
        if self.attaching:
            await asyncio.wait(list(self.attaching.values()), timeout=ATTACH_SECONDS)
        while not self._connected():
            if not self.attaching:
                raise self.attach_error or BrokerUnavailable(address=f"the brokers of topic {self.topic}")
            await asyncio.wait(list(self.attaching.values()), return_when=asyncio.FIRST_COMPLETED)
        assert self.core is not None
        for _ in range(SUPPLY_TRIES):       # so that the first batches find room at every broker
            if self.core.is_supplied():
                break
            await asyncio.sleep(BUSY_SECONDS)

    async def _attach(self, broker: BrokerAddress, epoch: int) -> None:
        """Get a slot at one broker; its answer may come when nobody wants it any more."""
        opened = pb.PublishOpen(topic=self.topic, client_id=self.client_id, session_slot=self.session.session_slot,
                                session_epoch=epoch, ack=self.ack or 0, seen=self.session.topic)
        try:
            self.presence = await self.connection.presence()
            request = pb.AttachPublisherRequest(open=opened, pid=os.getpid(), presence=self.presence.number)
            found = await self.connection.unary(broker.target, "Admin/AttachPublisher", request, pb.Attachment)
        except CxlmqError as error:
            self._not_attached(error, epoch)
            return
        if self.closed or epoch != self.epoch or self.reopening:
            await self._detach(broker, found)
            return
        try:
            self._map(found)
        except CxlmqError as error:
            self._not_attached(error, epoch)
            await self._detach(broker, found)
            return
        assert self.core is not None
        self.core.add_channel(found.slot, found.generation, found.doorbell)
        self.attachments[found.slot] = broker, found

    def _not_attached(self, error: CxlmqError, epoch: int) -> None:
        """There is no slot: a session that has ended, or is of another run, is opened anew; what does not come back is
        final."""
        self.attach_error = error
        if self.ticker is None or self.closed or epoch != self.epoch:
            return                          # it is being opened: `open` raises; or another session is under way
        if isinstance(error, SessionFenced | SessionUnknown):
            self._start_reopening(error)
        elif not error.comes_back:
            self._fail_everything(error)

    def _map(self, found: pb.Attachment) -> None:
        """Map the region of the session's run, if it is not mapped. Raises `RegionMissing` and its kin."""
        assert self.packer is not None
        assert self.ack is not None
        if self.region is not None and self.region.run_id == found.run_id:
            return
        if found.run_id != self.session.topic.run_id:
            raise SessionUnknown(session=self.session.session_slot)
        region = attach_region(found.region, run_id=found.run_id)
        region.mapping.presence = self.presence             # as long as a loan of it is held
        window = min(self.window, region.layout.numbers["region_bytes"] // REGION_SHARE)
        memory = region.memory(Role.ROLE_CLIENT)
        if self.core is None:
            self.core = AttachedCore(self, memory, region.layout, self.packer, self.targets, window,
                                     self.in_flight if self.when_full == "drop_oldest" else UNLIMITED, self.ack,
                                     self.delivery_timeout)
            self.core.begin_session(self.epoch)
        else:
            self.core.move_to(memory, region.layout)
            assert self.region is not None
            self.old_regions.append(self.region)
        self.region, self.window = region, window

    async def _detach(self, broker: BrokerAddress, found: pb.Attachment) -> None:
        request = pb.DetachRequest(slot=found.slot, generation=found.generation)
        with contextlib.suppress(CxlmqError):       # it is gone, or sees by itself that we left
            await self.connection.unary(broker.target, "Admin/Detach", request, pb.DetachResponse,
                                        timeout=DETACH_SECONDS)

    def _quiet_brokers(self) -> list[BrokerAddress]:
        assert self.core is not None
        return [self.attachments[slot][0] for slot in self.core.quiet_slots(SILENT_SECONDS)]

    def _lose(self, broker: BrokerAddress) -> None:
        if self.core is not None:
            self.core.drop_channel(broker.id)

    def _leave(self, slots: Iterable[int]) -> None:
        """Give up slots; their brokers are told in memory, and by a call so that they look at once."""
        held = [self.attachments.pop(slot) for slot in slots]
        if not held or self.core is None or not self.core.leave([(each.slot, each.doorbell) for _, each in held]):
            return
        for broker, each in held:
            task = self.loop.create_task(self._detach(broker, each))
            self.detaching.add(task)
            task.add_done_callback(self.detaching.discard)

    def _abandon(self) -> None:
        pass                                # what is in flight is settled there, or taken from there

    async def _disconnect(self) -> None:
        if self.attaching:                  # what is answered now gives its slot back
            await asyncio.wait(list(self.attaching.values()), timeout=ATTACH_SECONDS)
        self._shut_down()
        self._leave(list(self.attachments))
        if self.detaching:
            await asyncio.wait(list(self.detaching))
        for task in list(self.attaching.values()):
            task.cancel()

    def _brokers_alive(self) -> list[int]:
        return self.core.brokers_alive() if self.core is not None else []

    def _connected(self) -> int:
        return len(self._brokers_alive())

    def _seal(self, batch: Batch) -> None:
        super()._seal(batch)
        core = self.core
        if core is not None:
            core.spill()                    # what comes next must stay behind it

    def after_fork(self) -> None:
        """In a child."""
        super().after_fork()
        if self.core is not None:
            self.core.after_fork()

    # ---- asked by the core and by the publisher ---------------------------------------------------------------------

    @property
    def front(self) -> Any:
        """What takes messages."""
        core = self.core                    # it may be closed meanwhile
        return super().front if core is None else core

    @property
    def buffered(self) -> int:
        """Bytes that are not settled."""
        core = self.core
        return self.held + (core.in_flight_bytes if core is not None else 0)

    def statistics(self) -> dict[str, int]:
        """Counts so far."""
        found, core = super().statistics(), self.core
        if core is None:
            return self.final or found
        for name in ("messages", "acked", "failed", "duplicates", "retries"):
            found[name] += getattr(core, name)
        return {**found, "bytes": found["bytes"] + core.nbytes, "batches": core.batches,
                "batch_bytes_target": found["batch_bytes_target"] if core.spilling else core.target}

    def take_latencies(self) -> "array[int]":
        """Submit-to-settled times since the last call, ns."""
        return self.core.take_latencies() if self.core is not None else array("q")

    def patience(self) -> float:
        """How long to wait for a lease before messages spill, seconds."""
        return 0.0 if self.is_on_loop() else PATIENCE_SECONDS.get(self.when_full, SHORT_PATIENCE_SECONDS)

    def no_room(self) -> CxlmqError:
        """Why no lease has room."""
        return self._pool_full() or BufferFull(buffer_bytes=self.buffer_bytes)

    def _pool_full(self) -> CxlmqError | None:
        """When it is the region that has no room: who holds it."""
        region, core = self.region, self.core       # another thread may close
        if region is None or core is None or not core.lacks_leases():
            return None
        brokers = core.brokers_alive()
        if not brokers or core.is_idle():
            return None
        head = HeadView(core.memory, region.layout)
        for broker in brokers:
            try:
                holder = in_the_way(head, region.layout, broker, self.session.topic_number)
            except BrokerUnavailable:
                break                       # a new head is taking over: nobody can say
            if holder.word != NOBODY:
                return pool_full(holder)
        return None

    def loan(self, nbytes: int) -> Loan:
        """A writable view of a segment."""
        self.raise_if_closed()
        core = self.core
        if core is None:
            raise ClosedError("the publisher is not open: use it in a `with` block", what="the publisher")
        return core.loan(nbytes)

    # ---- waiting (any thread but the loop's) ------------------------------------------------------------------------

    def urge(self, batch: Batch) -> None:
        """Somebody waits for this batch: do not linger."""
        core = self.core
        if core is not None and not self.forked and core.is_current(batch):
            core.flush_open()
        super().urge(batch)

    def _wait(self, done: Callable[[], bool], limit: float) -> bool:
        """Acks are looked for by whoever waits for them."""
        core = self.core
        if core is None:
            return super()._wait(done, limit)
        if self.is_on_loop() or core.tells_now():
            raise RuntimeError("a delivery callback cannot wait for other deliveries: it runs where they are settled")
        deadline = time.monotonic() + limit
        while not done():
            core.poll()
            if done():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            core.wait(min(left, 0.01))
        return True

    def flushed(self) -> Callable[[], bool]:
        """Send what is packed; what it returns says whether everything published until now is settled."""
        core = self.core
        if core is None:
            return super().flushed()
        core.flush_open()
        sent = self._sent(core)
        with self.sealing:                  # no batch is between private memory and the core
            spilled = super().flushed()
            in_flight = core.waited_for()
        # A session that is opened anew renumbers what is left; the batches stay what they are.
        return lambda: self.closed or (spilled() and all(batch.settled for batch in in_flight) and (
            self.ack != 0 or sent()))

    def _sent(self, core: AttachedCore) -> Callable[[], bool]:
        """Level 0, where batches are settled before brokers have them: whether brokers have all that there is now."""
        private: list[Batch] = []
        epoch = target = -1

        def done() -> bool:
            nonlocal private, epoch, target
            if epoch != core.epoch:         # at first, and when what is left was numbered anew
                with self.sealing:
                    private, epoch, target = self._kept(), core.epoch, core.next_sequence
            if private:
                if any(batch.frame is not None for batch in private):
                    return False
                private, target = [], core.next_sequence
            return bool(core.oldest >= target)

        return done

    # ---- on the loop ------------------------------------------------------------------------------------------------

    def _pause(self) -> float:
        core = self.core
        if core is None or not (core.in_flight or core.open_count or core.spilling):
            return IDLE_SECONDS
        submitted, self.submitted = core.batches - self.submitted, core.batches
        least = STREAM_SECONDS if submitted >= STREAM_BATCHES and not core.spilling else BUSY_SECONDS
        return max(least, min(self.linger, IDLE_SECONDS))

    def _step(self) -> None:
        """Linger, acks that nobody waits for, heartbeats, dead brokers, and what every publisher has to do."""
        core, now = self.core, time.monotonic()
        assert core is not None
        if core.open_count and now - core.opened >= self.linger and not self._is_saturated():
            core.flush_open()
        core.poll()
        if now >= self.next_beat:
            self.next_beat = now + BEAT_SECONDS
            core.beat()
        if now >= self.next_check:
            self.next_check = now + CHECK_SECONDS
            self._check_brokers()
        if core.in_flight or core.spilling or core.messages != self.packed_before:
            self.packed_before, self.idle_since = core.messages, now
        elif now - self.idle_since > IDLE_LEASE_SECONDS:
            core.give_leases_back()
        if core.fenced:
            self._start_reopening(SessionFenced(reason="the broker ended it", committed=core.oldest))
        super()._step()
        core.see_to_pages()
        if core.spilling:
            self._pump()
        self._notify()

    def _is_saturated(self) -> bool:
        core = self.core
        return bool(self.pending) or (core is not None and core.in_flight_bytes >= core.window_bytes // 2)

    def _is_loaded(self) -> bool:
        return len(self.pending) >= self._connected()

    def _check_brokers(self) -> None:
        """Drop the channels of dead brokers; notice a deleted topic."""
        assert self.region is not None
        assert self.core is not None
        memory, layout = self.region.memory(Role.ROLE_CLIENT), self.region.layout
        for broker in self.core.brokers_alive():
            at = layout.offset_of("broker", broker)
            memory.invalidate_range(at, 64)
            line = unpack("BrokerLine", memory.read_line_bytes(at))
            if line["state"] != BrokerState.BROKER_READY or not self.region.broker_lives(broker):
                self.core.drop_channel(broker)
        self._leave(self.core.let_go())
        self.core.check_slots()
        try:
            state = HeadView(memory, layout).read("TopicLine", "topic", self.session.topic_number)["state"]
        except BrokerUnavailable:
            return                          # a new head is taking over, and the topic is what it was
        if state != self.session.topic_generation << 8 | TopicState.TOPIC_ACTIVE:
            self._start_reopening(UnknownTopic(topic=self.topic))       # which tells deleted from made again

    def _pump(self) -> None:
        """Submit what spilled; when nothing is left, messages go straight into the segments again."""
        self.pump_scheduled = False
        core = self.core
        if core is None or self.reopening or self.closed:
            return
        while self._submit_pending(core):
            self.seal_current()             # more was packed meanwhile
        core.poll()                         # what they settled

    def _submit_pending(self, core: AttachedCore) -> bool:
        """Give the core what is pending, as far as it has room; whether all of it went, and more is packed."""
        gone: list[Batch] = []
        # From here to there, no thread sees a batch in neither. Once for all: threads that publish much hold it often.
        with self.sealing:
            while self.pending:
                try:
                    batch = self.pending.popleft()
                except IndexError:
                    break                   # dropped by another thread
                if not core.submit_batch(batch):
                    self.pending.appendleft(batch)
                    break
                gone.append(batch)
            with self.account:              # the core has them now
                for batch in gone:
                    del self.unsettled[batch.number]
                    self.held -= batch.nbytes
            if self.pending:
                return False
            if self.packer is not None and self.packer.batch is not None and self.packer.batch.count:
                return True
            core.end_spilling()
            return False

    def _resend_due(self) -> None:
        core, now = self.core, time.monotonic()
        if core is None or not core.retry_wanted or self.reopening or now < self.next_retry:
            return
        self.next_retry = now + RETRY_SECONDS
        addresses = {broker.id: broker for broker, _ in self.attachments.values()}
        alive = [addresses[each] for each in core.brokers_alive()]
        for sequence in core.lost():
            for broker in rendezvous(alive, self.client_id, sequence):
                if core.resubmit(sequence, broker.id):
                    break
            else:
                return                      # no broker has room now

    def _oldest(self) -> int:
        return int(self.core.oldest) if self.core is not None else 0

    def _expire_in_flight(self, now: float) -> bool:
        if self.core is None or not self.core.undecided:
            return False
        return self.core.expire(now, DeliveryTimeout(timeout_seconds=self.delivery_timeout)) > 0

    def _why_not_sent(self) -> CxlmqError:
        return self._pool_full() or DeliveryTimeout(
            f"not sent within {self.delivery_timeout} s: no broker took it; it is not in the log",
            timeout_seconds=self.delivery_timeout)

    def _take_in_flight(self) -> list[tuple[int, Batch]]:
        core = self.core
        if core is None:
            return []
        with self.sealing:                  # from there to here, no thread sees it in neither
            taken = core.take_unsettled()
            for _, batch in taken:
                self._keep(batch)
        core.poll()                         # what was answered last is told
        self._leave(list(self.attachments))
        core.begin_session(self.epoch)
        return taken

    def _shut_down(self) -> None:
        core = self.core
        if core is not None:
            failed = core.shut_down(self.failure or ClosedError(what="the publisher"))
            with self.account:
                self.counts["failed"] += failed

    def _give_up(self) -> None:
        self._shut_down()
        super()._give_up()

    # ---- closing ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give the slots back and end the session. What is not settled is given up."""
        await super().close()
        # Nothing of ours keeps the region mapped any longer; what was counted stays.
        self.final = self.statistics()
        if self.core is not None:
            self.core.end_pages()
        self.core = None
        for region in (*self.old_regions, *([self.region] if self.region is not None else [])):
            region.mapping.presence = None
            region.close()
        self.old_regions, self.region, self.presence = [], None, None


__all__ = ["AttachedEngine"]
