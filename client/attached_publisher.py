"""The engine of an attached publisher: slots in the region instead of streams.

gRPC opens the session and hands out the slots; after that batches and acks go through memory alone. What is slow or
rare happens here: linger, time-outs, dead brokers, and what spilled into private memory (see `client.attached`).
"""

import asyncio
import contextlib
import os
import time
from array import array
from collections.abc import Callable
from typing import Any

from broker.errors import BrokerUnavailable, BufferFull, ClosedError, CxlmqError, SessionUnknown
from broker.head import HeadView
from broker.holders import NOBODY, in_the_way, pool_full
from broker.proto import cxlmq_pb2 as pb
from broker.region import Region, attach_region
from client.attached import AttachedCore, Loan
from client.batch import Batch
from client.brokers import BrokerAddress
from client.engine import Engine
from client.publishing.attached_flights import AttachedFlights, Slot
from client.publishing.commands import Connect, Disconnect, Leave, Send
from sim.cxl.locks import Presence
from sim.cxl.memory import Role

IDLE_SECONDS = 0.02
BUSY_SECONDS = 0.001
STREAM_SECONDS = 0.004                  # while batch follows batch: whoever publishes looks for acks, and needs the GIL
STREAM_BATCHES = 4                      # since the last look
ATTACH_SECONDS = 1.0                    # a broker that has not answered by then is waited for beside the others
DETACH_SECONDS = 2.0
WINDOW_BYTES = 32 << 20                 # two publishers and four brokers on two cores: acks take 1 ms and more
REGION_SHARE = 4                        # of a small region, one publisher has less in flight
TARGET_SHARE = 8                        # batches of a window that each broker should be able to have
PATIENCE_SECONDS = {"block": 0.05}      # how long a lease is waited for before messages spill
SHORT_PATIENCE_SECONDS = 0.002
UNLIMITED = 1 << 32
SUPPLY_TRIES = 50


class EngineFlights(AttachedFlights):
    """What is in flight, and keeps the accounts of an engine whose other threads pack and wait."""

    def __init__(self, engine: "AttachedEngine") -> None:
        super().__init__(engine.broker_lives)
        self.engine = engine
        self.moving = engine.sealing

    def submitted(self, gone: list[Batch]) -> None:
        """The core has these batches now; when nothing is left, spilling ends."""
        self.engine.hand_over(gone)

    def taken(self, batches: list[tuple[int, Batch]]) -> None:
        """These are private batches again."""
        for _, batch in batches:
            self.engine.keep(batch)

    def why_not_sent(self) -> CxlmqError:
        """When it is the region that has no room: who holds it."""
        return self.engine.region_full() or super().why_not_sent()


class AttachedEngine(Engine):
    """Drives an `AttachedCore`."""

    BUFFER_BYTES = WINDOW_BYTES

    def __init__(self, topic: str, **options: Any) -> None:
        super().__init__(topic, **options)
        self.region: Region | None = None
        self.presence: Presence | None = None
        self.old_regions: list[Region] = []         # of runs that ended: loans may be open there
        self.attaching: set[asyncio.Task[None]] = set()
        self.detaching: set[asyncio.Task[None]] = set()
        self.final: dict[str, int] = {}
        self.submitted = 0                          # batches, when it was looked last
        self.window = 0                             # bytes in flight
        self.targets = 0, 0, 0                      # bytes of a batch: at first, at least, at most

    def _new_flights(self) -> EngineFlights:
        self.flights = EngineFlights(self)
        return self.flights

    @property
    def core(self) -> AttachedCore | None:
        """The native half, from the first slot on until it is closed."""
        return self.flights.core

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

    async def _supplied(self) -> None:
        """Wait for a slot at every broker. Raises when there is none at all."""
        if self.attaching:
            await asyncio.wait(self.attaching, timeout=ATTACH_SECONDS)
        while not self.flights.connected():
            if not self.attaching:
                raise self.flights.not_attached_error or BrokerUnavailable(address=f"the brokers of topic {self.topic}")
            await asyncio.wait(self.attaching, return_when=asyncio.FIRST_COMPLETED)
        assert self.core is not None
        for _ in range(SUPPLY_TRIES):       # so that the first batches find room at every broker
            if self.core.is_supplied():
                break
            await asyncio.sleep(BUSY_SECONDS)

    def _go(self, command: Connect | Disconnect | Leave | Send) -> None:
        match command:
            case Connect(broker, opened):
                self._beside(self.attaching, self._attach(broker, opened))
            case Leave(slot):
                self._beside(self.detaching, self._detach(slot))

    async def _attach(self, broker: BrokerAddress, opened: pb.PublishOpen) -> None:
        """Get a slot at one broker; its answer may come when nobody wants it any more."""
        epoch, found = opened.session_epoch, None
        try:
            self.presence = await self.connection.presence()
            request = pb.AttachPublisherRequest(open=opened, pid=os.getpid(), presence=self.presence.number)
            found = await self.connection.unary(broker.target, "Admin/AttachPublisher", request, pb.Attachment)
            slot = Slot(broker, found.slot, found.generation, found.doorbell)
            if self.flights.wants(epoch) and not self.closed:
                self._map(found)
        except CxlmqError as error:
            self.flights.not_attached(broker, error, epoch)
            self._perform()
            if found is not None:
                await self._detach(slot)
            return
        if self.closed or not self.flights.attached(slot, epoch):
            self.flights.connecting.discard(broker.id)
            await self._detach(slot)

    def _map(self, found: pb.Attachment) -> None:
        """Map the region of the session's run, if it is not mapped. Raises `RegionMissing` and its kin."""
        assert self.packer is not None
        assert self.ack is not None
        if self.region is not None and self.region.run_id == found.run_id:
            return
        if found.run_id != self.session.opened.topic.run_id:
            raise SessionUnknown(session=self.session.opened.session_slot)
        region = attach_region(found.region, run_id=found.run_id)
        region.mapping.presence = self.presence             # as long as a loan of it is held
        window = min(self.window, region.layout.numbers["region_bytes"] // REGION_SHARE)
        memory, core = region.memory(Role.ROLE_CLIENT), self.core
        if core is None:
            core = AttachedCore(self, memory, region.layout, self.packer, self.targets, window,
                                self.in_flight if self.when_full == "drop_oldest" else UNLIMITED, self.ack,
                                self.delivery_timeout)
        else:
            core.move_to(memory, region.layout)
            assert self.region is not None
            self.old_regions.append(self.region)
        self.region, self.window = region, window
        self.flights.use(core, memory, region.layout)

    async def _detach(self, slot: Slot) -> None:
        request = pb.DetachRequest(slot=slot.number, generation=slot.generation)
        with contextlib.suppress(CxlmqError):       # it is gone, or sees by itself that we left
            await self.connection.unary(slot.broker.target, "Admin/Detach", request, pb.DetachResponse,
                                        timeout=DETACH_SECONDS)

    async def _finish_ways(self) -> None:
        if self.attaching:                  # what is answered now gives its slot back
            await asyncio.wait(self.attaching, timeout=ATTACH_SECONDS)
        self._shut_down()
        self.flights.leave(list(self.flights.slots))
        self._perform()
        if self.detaching:
            await asyncio.wait(self.detaching)
        for task in self.attaching:
            task.cancel()

    def broker_lives(self, broker: int) -> bool:
        """Whether a process is that broker."""
        return self.region is not None and self.region.broker_lives(broker)

    # ---- batches that come from private memory, and go back there ---------------------------------------------------

    def _seal(self, batch: Batch) -> None:
        super()._seal(batch)
        core = self.core
        if core is not None:
            core.spill()                    # what comes next must stay behind it

    def hand_over(self, gone: list[Batch]) -> None:
        """The core has these now. Under `sealing`."""
        with self.account:
            for batch in gone:
                del self.unsettled[batch.number]
                self.held -= batch.nbytes
        assert self.core is not None
        if not self.pending and not self.is_packed():
            self.core.end_spilling()

    def _pump(self) -> None:
        super()._pump()
        core = self.core
        while (core is not None and core.spilling and self.is_packed() and not self.pending and self.session.is_open
               and not self.closed):
            self.seal_current()             # more was packed meanwhile
            super()._pump()

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
        return self.region_full() or BufferFull(buffer_bytes=self.buffer_bytes)

    def region_full(self) -> CxlmqError | None:
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
                holder = in_the_way(head, region.layout, broker, self.session.opened.topic_number)
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
        """Linger, and what every publisher has to do."""
        core, now = self.core, time.monotonic()
        assert core is not None
        if core.open_count and now - core.opened >= self.linger and not self.flights.is_saturated():
            core.flush_open()
        super()._step()
        core.see_to_pages()
        if core.spilling:
            self._pump()
        self._notify()

    def _is_loaded(self) -> bool:
        return len(self.pending) >= self.flights.connected()

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
        self.flights.let_go()
        for region in (*self.old_regions, *([self.region] if self.region is not None else [])):
            region.mapping.presence = None
            region.close()
        self.old_regions, self.region, self.presence = [], None, None


__all__ = ["AttachedEngine"]
