"""The engine of an attached subscriber: what `SubscriberEngine` is for gRPC, over a read-only mapping of the region."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, cast

from broker.errors import AttachSlotsFull, CxlmqError, DamagedData, PositionLost, RangeLost, RegionError
from broker.proto import cxlmq_pb2 as pb
from broker.reader import ReadError, ReadStatus
from broker.region import Region, attach_region
from client.attached_reader import AttachedReader
from client.brokers import BrokerAddress
from client.buffer import BatchBuffer
from client.reading import REACH_SECONDS, ReadingEngine, T, Take, left_until
from client.received import Message, ReceivedBatch
from client.start import Start
from sim.cxl.memory import MappedMemory, Memory, Role
from sim.cxl.region import map_region_part

SLEEP_SECONDS = 0.1
CHECK_SECONDS = 0.25
ENDED_SECONDS = 0.02                    # between two looks at a topic that is closed, until a broker says why
DETACH_SECONDS = 2.0                    # for a word that may go unheard: brokers see for themselves that we left


class Slot(NamedTuple):
    """A slot that a broker has granted, and the region that it is in."""

    attachment: pb.Attachment
    address: BrokerAddress
    region: Region
    reader: AttachedReader


class AttachedSubscriberEngine(ReadingEngine[Slot]):
    """Reads through the region. Opening, seeking and closing go over gRPC; reading makes no call at all.

    With `views`, payloads of messages are views of the segments; else they are copied out, as they come over gRPC.
    """

    def __init__(self, topic: str, cluster: str | None, bootstrap: str | None, start: Start, broker: int | None,
                 buffer_bytes: int, views: bool = True) -> None:
        super().__init__(topic, cluster, bootstrap, start, broker, buffer_bytes)
        self.views, self.copies = views, not views
        self.slot: Slot | None = None
        self.buffer = BatchBuffer(self._refill)
        self.retired: list[AttachedReader] = []     # of brokers that died; views under them are held still
        self.wanted: int | None = None              # messages below it were not asked for
        self.next_check = 0.0
        self.ended = False                          # the topic that we read in memory is closed
        self.returning: Future[None] | None = None  # on its way to another broker
        self.waiting = threading.Lock()             # one thread at a time waits in memory
        self.over_grpc: Callable[[], ReadingEngine[Any] | None] = lambda: None      # makes what reads when we cannot
        self.handed_over: Callable[[Any], None] = lambda _: None    # told that it reads now
        self.handing_over = False                   # nothing is taken meanwhile
        self.successor: ReadingEngine[Any] | None = None

    @property
    def attachment(self) -> pb.Attachment:
        """Of the slot through which we read."""
        assert self.slot is not None
        return self.slot.attachment

    # ---- places -----------------------------------------------------------------------------------------------------

    async def _candidates(self) -> list[BrokerAddress]:
        await self.connection.check_host()
        return await super()._candidates()

    async def _reach_at(self, broker: BrokerAddress, request: pb.SubscribeRequest) -> Slot:
        presence = await self.connection.presence()
        asked = pb.AttachSubscriberRequest(subscribe=request, pid=os.getpid(), presence=presence.number)
        attachment = await self.connection.undoable(
            self.connection.unary(broker.target, "Admin/AttachSubscriber", asked, pb.Attachment, REACH_SECONDS),
            lambda granted: self._detach(broker, granted))
        try:
            place = self._mapped(broker, attachment)
            place.region.mapping.presence = presence    # as long as a view of it is held
            return place
        except BaseException:
            await self._detach(broker, attachment)
            raise

    def _mapped(self, broker: BrokerAddress, granted: pb.Attachment) -> Slot:
        region = attach_region(granted.region, writable=False, run_id=granted.run_id)
        page = region.layout.offset_of("attach_client", granted.slot)
        if region.hardware.kind == "mapped":        # we may write our own page and nothing else
            part, offset = map_region_part(region.file_name, page, 4096)
            own: Memory = MappedMemory(part, int(Role.ROLE_CLIENT))
        else:                                       # a host has one cache: all goes through one door
            region.close()
            region = attach_region(granted.region, run_id=granted.run_id)
            own, offset = region.memory(Role.ROLE_CLIENT), page
        reader = AttachedReader(
            region.memory(Role.ROLE_CLIENT), region.layout, own, offset, granted.slot, granted.generation,
            granted.topic_number, granted.topic_generation, granted.index, self.topic, self.views)
        reader.beat()
        return Slot(granted, broker, region, reader)

    @staticmethod
    def _identity(slot: Slot) -> pb.TopicIdentity:
        return pb.TopicIdentity(run_id=slot.attachment.run_id, created_ns=slot.attachment.created_ns)

    def _take_place(self, place: Slot, start: Start) -> Slot | None:
        with self.lock:
            former, self.slot, self.ended = self.slot, place, False
            self.moved(start, place.attachment.position, place.attachment.first_position, place.attachment.end_position,
                       self._identity(place))
            self.wanted = start if isinstance(start, int) else None
        return former

    async def _leave(self, place: Slot) -> None:
        self._let_go(all_of_them=True)
        place.reader.leave()                # also when the broker cannot answer now
        place.region.mapping.presence = None
        await self._detach(place.address, place.attachment)

    async def _detach(self, broker: BrokerAddress, granted: pb.Attachment) -> None:
        request = pb.DetachRequest(slot=granted.slot, generation=granted.generation)
        with contextlib.suppress(CxlmqError):       # the broker is gone, or will see that we left
            await self.connection.unary(broker.target, "Admin/Detach", request, pb.DetachResponse, DETACH_SECONDS)

    # ---- when the broker is gone ------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See to it, now and then, that somebody serves us: what is in memory can be read without a broker."""
        now = time.monotonic()
        if now >= self.next_check and self.slot is not None:
            self.next_check = now + CHECK_SECONDS
            self._let_go()
            if self.ended or self._is_cut_off(self.slot):
                self._return()

    def _is_cut_off(self, slot: Slot) -> bool:
        """Whether the broker whose cursor protects us serves us no longer: it said so, or is dead."""
        if not slot.reader.is_open():
            return True
        return not slot.region.broker_lives(slot.attachment.doorbell)

    def _return(self) -> None:
        """Go on from the same place through another broker, in the background: nobody who fetches waits for that."""
        if self.returning is None or self.returning.done():
            self.returning = self.client_loop.submit(self._return_now())

    async def _return_now(self) -> None:
        before = self.slot
        async with self.changing:
            if self.closed or self.slot is not before or before is None:
                return                      # it went elsewhere meanwhile
            with self.lock:
                if not before.reader.is_intact() and self.buffer:
                    self._rewind(self.buffer.position())
            try:
                place = await self._come_back()
            except CxlmqError as error:
                # As at opening: what stands against attaching, and not against reading.
                attaching = isinstance(error, AttachSlotsFull) or (
                    isinstance(error, RegionError) and not error.comes_back)
                if not (attaching and await self._hand_over(before)) and not error.comes_back:
                    self.failure = error
                return                      # the next look tries again
            except Exception as error:      # a mistake of ours: whoever waits is told
                self.failure = CxlmqError(f"internal error: {error!r}")
                raise
            with self.lock:
                self.slot, self.ended = place, False
                self.retired.append(before.reader)
                self.wanted = self.next_position if self.next_position is not None else self.wanted
                try:
                    self._check_end(place.attachment.end_position, place.attachment.run_id)
                except CxlmqError as error:
                    self.failure = error
                self.seen = self._identity(place)
            self._let_go()

    async def _hand_over(self, before: Slot) -> bool:
        """Let another engine read on from here; False when nobody may. Refused, all is as it was."""
        other = self.over_grpc()
        if other is None:
            return False
        with self.lock:
            self.handing_over = True
            other.start, other.seen, other.told = self.position(), self.seen, self.told
            other.buffer.handed = self.buffer.handed
        try:
            await other.open()
        except CxlmqError as error:
            if not error.comes_back:
                self.failure = error
            return True
        else:
            if self.closed:
                await other.close()
                return True
            with self.lock:
                try:
                    self._check_end(other.end_position, other.seen.run_id)
                except CxlmqError as error:
                    other.fail(error)
                self.successor, self.slot = other, None
                self.handed_over(other)
                self.buffer.clear()
            before.reader.leave_when_free()
            return True
        finally:
            self.handing_over = False

    def _let_go(self, all_of_them: bool = False) -> None:
        """Give up the former places under which nothing is viewed any more; their brokers see it by themselves."""
        with self.lock:
            for reader in [each for each in self.retired if all_of_them or each.released == each.next_index]:
                reader.leave()
                self.retired.remove(reader)

    def after_fork(self) -> None:
        """In a child: nothing that ends there says so."""
        for reader in (self.slot and self.slot.reader, *self.retired):
            if reader is not None:
                reader.after_fork()

    def _rewind(self, position: int | None) -> None:
        """What is in the buffer may be something else by now: it is read again. The lock is held."""
        handed = self.buffer.handed
        self.buffer.clear()
        self.buffer.handed = handed
        self.next_position = self.wanted = position

    # ---- taking -----------------------------------------------------------------------------------------------------

    def taken(self, take: Take[T], deadline: float | None) -> list[T]:
        while True:
            self._look()
            with self.lock:
                found = self._take_now(take)
            left = left_until(deadline)
            if found or left == 0:
                return found
            if self.successor is not None:
                return self.successor.taken(take, deadline)
            self._wait(SLEEP_SECONDS if left is None else min(SLEEP_SECONDS, left))

    async def taken_async(self, take: Take[T], deadline: float | None) -> list[T]:
        """Only the waiting is done in a thread: whoever gives up waiting has taken nothing."""
        while True:
            self._look()
            with self.lock:
                found = self._take_now(take)
            left = left_until(deadline)
            if found or left == 0:
                return found
            if self.successor is not None:
                return await self.successor.taken_async(take, deadline)
            await asyncio.to_thread(self._wait, SLEEP_SECONDS if left is None else min(SLEEP_SECONDS, left))

    def next_ahead(self) -> Message | None:
        with self.lock:
            return None if self.handing_over else super().next_ahead()

    def _take_now(self, take: Take[T]) -> list[T]:
        if self.handing_over or self.successor is not None:
            return []
        handed = self.buffer.handed
        found = super()._take_now(take)
        if found and self.slot is not None and not self.slot.reader.is_intact():
            self.buffer.handed = handed
            self._rewind(cast(Message, found[0]).position)
            self._end()
            return []
        return found

    def _end(self) -> None:
        """A broker says what became of the topic, or of our place in it."""
        if not self.ended:
            self.ended, self.next_check = True, 0.0
            self._look()

    def _wait(self, seconds: float) -> None:
        """Until there is more, or the time is over."""
        if self.ended:
            time.sleep(min(seconds, ENDED_SECONDS))
            return
        deadline = time.monotonic() + seconds
        if self.waiting.acquire(timeout=seconds):
            try:
                slot = self.slot
                if slot is not None and not self.closed:
                    slot.reader.wait(max(0.0, deadline - time.monotonic()))
            finally:
                self.waiting.release()

    def _refill(self, limit: int) -> None:
        """Put what is in memory into the buffer. The lock is held."""
        slot = self.slot
        while slot is not None and self.failure is None and not self.buffer:
            try:
                batches = slot.reader.take(limit)
            except ReadError as error:
                if error.status != ReadStatus.READ_CLOSED:
                    raise self._typed(slot, error) from None
                self._end()
                return
            if not batches:
                return
            for batch in batches:
                self._take_in(batch)

    def _take_in(self, batch: ReceivedBatch) -> None:
        self.next_position = max(self.wanted or 0, batch.position + batch.count)
        if self.wanted is not None:
            batch.drop_before(self.wanted)
            if batch.count:
                self.wanted = None
        if batch.count:
            self.buffer.add(batch)

    def _typed(self, slot: Slot, error: ReadError) -> CxlmqError:
        if error.status == ReadStatus.READ_LOST:
            return PositionLost(position=self.next_position, first_available=slot.reader.first_position())
        if error.status == ReadStatus.READ_GONE and error.end is not None:
            return RangeLost(topic=self.topic, first=error.first, end=error.end)
        return DamagedData(str(error), topic=self.topic, index=error.index)

    # ---- life -------------------------------------------------------------------------------------------------------

    async def end_dropped(self) -> None:
        """Nobody reads any more. What is still viewed is protected until it is released; brokers see that."""
        self.closed = True
        if self.returning is not None:
            self.returning.cancel()
        await self._until_changed()
        with self.lock:
            slot, self.slot, retired, self.retired = self.slot, None, self.retired, []
            self.buffer.clear()
        for reader in (*retired, *(() if slot is None else (slot.reader,))):
            reader.leave_when_free()
        await self.connection.close()

    async def close(self) -> None:
        """Let go of the place. Views that are still held are no longer protected."""
        self.closed = True
        if self.returning is not None:
            self.returning.cancel()
        await self._until_changed()
        with self.lock:
            slot, self.slot = self.slot, None
            self.buffer.clear()
        if slot is not None:
            await self._leave(slot)
        await self.connection.close()
