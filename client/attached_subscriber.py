"""The engine of an attached subscriber: what `SubscriberEngine` is for gRPC, over a read-only mapping of the region."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, cast

from broker.errors import CxlmqError
from broker.proto import cxlmq_pb2 as pb
from broker.region import Region, attach_region
from client.attached_reader import AttachedReader
from client.brokers import BrokerAddress
from client.received import Message
from client.start import Start
from client.subscribing.attached_reading import AttachedReading
from client.subscribing.commands import AskPlace, HandOver, Place
from client.subscribing.driver import REACH_SECONDS, ReadingDriver, T, Take, left_until
from client.subscribing.reading import State
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


class AttachedSubscriberEngine(ReadingDriver):
    """Reads through the region. Opening, seeking and closing go over gRPC; reading makes no call at all.

    With `views`, payloads of messages are views of the segments; else they are copied out, as they come over gRPC.
    """

    def __init__(self, topic: str, cluster: str | None, bootstrap: str | None, start: Start, broker: int | None,
                 buffer_bytes: int, views: bool = True) -> None:
        self.attached = AttachedReading(topic, start, broker, id(self) // 64)
        super().__init__(self.attached, cluster, bootstrap, buffer_bytes)
        self.views, self.copies = views, not views
        self.next_check = 0.0
        self.looked_at: Place | None = None         # a place that ended is looked after at once
        self.returning: Future[None] | None = None  # on its way to another broker
        self.waiting = threading.Lock()             # one thread at a time waits in memory
        self.over_grpc: Callable[[], ReadingDriver | None] = lambda: None      # makes what reads when we cannot
        self.handed_over: Callable[[Any], None] = lambda _: None    # told that it reads now
        self.handing_over = False                   # nothing is taken meanwhile
        self.successor: ReadingDriver | None = None

    @property
    def slot(self) -> Slot | None:
        """The slot through which we read."""
        return None if self.reading.place is None else cast(Slot, self.reading.place.way)

    @property
    def attachment(self) -> pb.Attachment:
        """Of the slot through which we read."""
        assert self.slot is not None
        return self.slot.attachment

    # ---- places -----------------------------------------------------------------------------------------------------

    async def _brokers(self) -> list[BrokerAddress]:
        await self.connection.check_host()
        return await super()._brokers()

    async def _reach_at(self, broker: BrokerAddress, asked: AskPlace) -> Place:
        presence = await self.connection.presence()
        request = pb.AttachSubscriberRequest(subscribe=asked.request, pid=os.getpid(), presence=presence.number)
        granted = await self.connection.undoable(
            self.connection.unary(broker.target, "Admin/AttachSubscriber", request, pb.Attachment, REACH_SECONDS),
            lambda found: self._detach(broker, found))
        try:
            slot = self._mapped(broker, granted)
            slot.region.mapping.presence = presence     # as long as a view of it is held
        except BaseException:
            await self._detach(broker, granted)
            raise
        return Place(granted.position, granted.first_position, granted.end_position,
                     pb.TopicIdentity(run_id=granted.run_id, created_ns=granted.created_ns), slot)

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

    def _follow(self, place: Place, former: Place | None) -> None:
        if former is not None:
            self.attached.retire(former)

    async def _leave(self, place: Place) -> None:
        slot: Slot = place.way
        with self.lock:
            self.attached.let_go(all_of_them=True)
        slot.reader.leave()                 # also when the broker cannot answer now
        slot.region.mapping.presence = None
        await self._detach(slot.address, slot.attachment)

    async def _detach(self, broker: BrokerAddress, granted: pb.Attachment) -> None:
        request = pb.DetachRequest(slot=granted.slot, generation=granted.generation)
        with contextlib.suppress(CxlmqError):       # the broker is gone, or will see that we left
            await self.connection.unary(broker.target, "Admin/Detach", request, pb.DetachResponse, DETACH_SECONDS)

    # ---- when the broker is gone ------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See to it, now and then, that somebody serves us: what is in memory can be read without a broker."""
        now = time.monotonic()
        if (now >= self.next_check or self.attached.ended is not self.looked_at) and self.reading.is_open:
            self.next_check, self.looked_at = now + CHECK_SECONDS, self.attached.ended
            with self.lock:
                self.attached.look(self._serves)
            if self.reading.state is State.RETURNING:
                self._return()

    @staticmethod
    def _serves(place: Place) -> bool:
        slot: Slot = place.way
        return bool(slot.region.broker_lives(slot.attachment.doorbell))

    def _return(self) -> None:
        """Go on from the same place through another broker, in the background: nobody who fetches waits for that."""
        if self.returning is None or self.returning.done():
            self.returning = self.client_loop.submit(self._return_now())

    async def _return_now(self) -> None:
        async with self.changing:
            with self.lock:
                search = self.reading.come_back()
            if search is None:
                return                      # it went elsewhere meanwhile
            try:
                await self._reach(search)
            except CxlmqError:
                pass                        # the reading knows, and tells or tries again with the next look
            except Exception as error:      # a mistake of ours: whoever waits is told
                self._fail(CxlmqError(f"internal error: {error!r}"))
                raise

    async def _hand_over(self, command: HandOver) -> None:
        """Let another engine read on from here. Refused, all is as it was."""
        search, other, slot = command.search, self.over_grpc(), self.slot
        assert slot is not None
        if other is None:
            with self.lock:
                self.reading.not_handed_over(search, command.error)
            return
        with self.lock:
            self.handing_over = True
            other.reading.go_on_from(self.reading)
        try:
            await other.open()
        except CxlmqError as error:
            with self.lock:
                self.reading.not_handed_over(search, error)
            return
        else:
            if self.closed:
                await other.close()
                return
            with self.lock:
                place = other.reading.place
                if place is not None and (lost := self.reading.lost_range(place)) is not None:
                    other.fail(lost)
                self.successor = other
                self.handed_over(other)
                self.buffer.clear()
            slot.reader.leave_when_free()
        finally:
            self.handing_over = False

    def after_fork(self) -> None:
        """In a child: nothing that ends there says so."""
        for reader in (self.attached.reader, *self.attached.retired):
            if reader is not None:
                reader.after_fork()

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
        """The lock is held."""
        if self.handing_over or self.successor is not None:
            return []
        return self.reading.take(take)

    def _wait(self, seconds: float) -> None:
        """Until there is more, or the time is over."""
        if self.attached.ended is self.reading.place:
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

    # ---- life -------------------------------------------------------------------------------------------------------

    async def _stop(self) -> list[AttachedReader]:
        """Begin nothing more; what we read by."""
        with self.lock:
            self.reading.close()
        if self.returning is not None:
            self.returning.cancel()
        await self._until_changed()
        with self.lock:
            retired, self.attached.retired = self.attached.retired, []
            return retired if self.slot is None or self.successor is not None else [*retired, self.slot.reader]

    async def end_dropped(self) -> None:
        """Nobody reads any more. What is still viewed is protected until it is released; brokers see that."""
        for reader in await self._stop():
            reader.leave_when_free()
        await self.connection.close()

    async def close(self) -> None:
        """Let go of the place. Views that are still held are no longer protected."""
        for reader in await self._stop():
            reader.leave()
        place = self.reading.place
        if place is not None and self.successor is None:
            await self._leave(place)
        await self.connection.close()
