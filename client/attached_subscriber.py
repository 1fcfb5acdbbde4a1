"""The engine of an attached subscriber: what `SubscriberEngine` is for gRPC, over a read-only mapping of the region."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from broker.errors import (
    BrokerUnavailable,
    ClosedError,
    CxlmqError,
    DamagedData,
    PositionLost,
    RangeLost,
    UnknownTopic,
)
from broker.proto import cxlmq_pb2 as pb
from broker.reader import ReadError, ReadStatus
from broker.records import unpack
from broker.region import Region, attach_region
from client.attached_reader import AttachedReader
from client.connection import BrokerAddress, ClientLoop, Connection
from client.group import Membership
from client.received import Message, ReceivedBatch
from client.start import Start, fill_start
from sim.cxl.memory import MappedMemory, Memory, Role
from sim.cxl.region import host_identity, map_region_part, process_alive, process_start_time

T = TypeVar("T")

TAKE_BATCHES = 64
SLEEP_SECONDS = 0.1
CHECK_SECONDS = 0.25
OPEN_SECONDS = 15.0                     # a broker that has not answered by then is passed over
AGAIN_SECONDS = 10.0


class AttachedSubscriberEngine:
    """Reads through the region. Opening, seeking and closing go over gRPC; reading makes no call at all.

    With `views`, payloads of messages are views of the segments; else they are copied out, as they come over gRPC.
    """

    def __init__(self, topic: str, cluster: str, bootstrap: str | None, start: Start, broker: int | None,
                 buffer_bytes: int, views: bool = True) -> None:
        self.topic = topic
        self.client_loop = ClientLoop.get()
        self.connection = Connection(cluster, bootstrap)
        self.start: Start = start
        self.broker = broker
        self.membership: Membership | None = None
        self.views = views
        self.attachment = pb.Attachment()
        self.address: BrokerAddress | None = None
        self.reader: AttachedReader | None = None
        self.retired: list[AttachedReader] = []     # of brokers that died; views under them are held still
        self.region: Region | None = None
        self.batch: ReceivedBatch | None = None     # the one that is being given out message by message
        self.first_in_batch = 0
        self.wanted: int | None = None              # messages below it were not asked for
        self.next_position: int | None = None
        self.next_check = 0.0
        self.closed = False
        self.failure: CxlmqError | None = None
        self.lock = threading.RLock()
        self.first_position = 0
        self.end_position = 0

    async def open(self) -> None:
        """Get a slot whose cursor protects the place, and map the region. Raises `RegionMissing`, `AttachSlotsFull`."""
        await self.connection.check_host()
        request = pb.AttachSubscriberRequest(subscribe=pb.SubscribeRequest(topic=self.topic), pid=os.getpid(),
                                             start_time=process_start_time())
        start = self.start if self.next_position is None else self.next_position
        fill_start(request.subscribe, start)
        if isinstance(start, int):
            self.wanted = start
        if self.membership is not None:
            self.membership.introduce(request.subscribe)
        error: CxlmqError = BrokerUnavailable(address="the cluster" if self.broker is None else f"broker {self.broker}")
        for broker in await self._candidates():
            try:
                self.attachment = await self.connection.unary(broker.target, "Admin/AttachSubscriber", request,
                                                              pb.Attachment, timeout=OPEN_SECONDS)
            except BrokerUnavailable as failed:
                error = failed
                continue
            self.address = broker
            self._map()
            return
        raise error

    async def _candidates(self) -> list[BrokerAddress]:
        """The brokers to try, in order. A chosen one has to be there at first; when it is lost, others serve too."""
        brokers = await self.connection.brokers()
        turn = id(self) // 64 % len(brokers)
        turned = brokers[turn:] + brokers[:turn]
        chosen = [each for each in brokers if each.id == self.broker]
        if self.broker is None or self.reader is not None:
            return chosen + [each for each in turned if each.id != self.broker]
        return chosen

    def _map(self) -> None:
        each = self.attachment
        region = attach_region(each.region, writable=False, run_id=each.run_id)
        page = region.layout.offset_of("attach_client", each.slot)
        if region.hardware.kind == "mapped":        # we may write our own page and nothing else
            part, offset = map_region_part(region.file_name, page, 4096)
            own: Memory = MappedMemory(part, int(Role.ROLE_CLIENT))
        else:                                       # a host has one cache: all goes through one door
            region.close()
            region = attach_region(each.region, run_id=each.run_id)
            own, offset = region.memory(Role.ROLE_CLIENT), page
        with self.lock:
            self.region = region
            self.reader = AttachedReader(
                region.memory(Role.ROLE_CLIENT), region.layout, own, offset,
                each.slot, each.generation, each.topic_number, each.topic_generation, each.index, self.topic,
                self.views)
            self.reader.beat()
        self.first_position, self.end_position = each.first_position, each.end_position
        if not isinstance(self.start, int) and self.next_position is None:
            self.next_position = each.position

    # ---- taking -----------------------------------------------------------------------------------------------------

    def fetch_batches(self, timeout: float | None, limit: int = TAKE_BATCHES) -> list[ReceivedBatch]:
        """Batches as views, at least one unless nothing came in time."""
        return self._taken(lambda: self._take_batches(limit), timeout)

    def fetch(self, limit: int, timeout: float | None) -> list[Message]:
        """Up to `limit` messages, at least one unless nothing came in time."""
        return self._taken(lambda: self._take_messages(limit), timeout)

    async def fetch_async(self, n: int, timeout: float | None) -> list[Message]:
        """As `fetch`, from any event loop."""
        return await self._taken_async(lambda: self._take_messages(n), timeout)

    async def fetch_batches_async(self, timeout: float | None) -> list[ReceivedBatch]:
        """As `fetch_batches`, from any event loop."""
        return await self._taken_async(lambda: self._take_batches(TAKE_BATCHES), timeout)

    def _taken(self, take: Callable[[], list[T]], timeout: float | None) -> list[T]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._is_cut_off():
                self.client_loop.run(self._again(patient=False))
            with self.lock:
                found = take()
            left = SLEEP_SECONDS if deadline is None else min(SLEEP_SECONDS, deadline - time.monotonic())
            if found or left <= 0:
                return found
            if not self._open_reader().wait(left) and self._is_cut_off():
                self.client_loop.run(self._again())

    async def _taken_async(self, take: Callable[[], list[T]], timeout: float | None) -> list[T]:
        """Only the waiting is done in a thread: whoever gives up waiting has taken nothing."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._is_cut_off():
                await self.client_loop.call(self._again(patient=False))
            with self.lock:
                found = take()
            left = SLEEP_SECONDS if deadline is None else min(SLEEP_SECONDS, deadline - time.monotonic())
            if found or left <= 0:
                return found
            if not await asyncio.to_thread(self._open_reader().wait, left) and self._is_cut_off():
                await self.client_loop.call(self._again())

    def _open_reader(self) -> AttachedReader:
        reader = self.reader
        if self.closed or reader is None:
            raise ClosedError(what="the subscriber")
        if self.failure is not None:
            raise self.failure
        return reader

    def _take_batches(self, limit: int) -> list[ReceivedBatch]:
        if self.batch is None:
            return self._take(limit)
        begun, self.batch = self.batch, None
        begun.drop_before(begun.position + self.first_in_batch)
        return [begun]

    def _take_messages(self, limit: int) -> list[Message]:
        out: list[Message] = []
        while len(out) < limit:
            if self.batch is None:
                try:
                    batches = self._take(1)
                except CxlmqError:
                    if out:
                        break               # it is raised again when what came before it is given out
                    raise
                if not batches:
                    break
                self.batch, self.first_in_batch = batches[0], 0
            taken = self.batch.to_messages(self.first_in_batch, limit - len(out))
            out += taken
            self.first_in_batch += len(taken)
            if self.first_in_batch >= self.batch.count:
                self.batch = None
        return out

    def _take(self, limit: int) -> list[ReceivedBatch]:
        reader = self._open_reader()
        try:
            batches: list[ReceivedBatch] = reader.take(limit)
        except ReadError as error:
            raise self._typed(error) from None
        for batch in batches:
            self.next_position = max(self.wanted or 0, batch.position + batch.count)
            if self.wanted is not None:
                batch.drop_before(self.wanted)
                if batch.count:
                    self.wanted = None
        return [batch for batch in batches if batch.count]

    def _is_cut_off(self) -> bool:
        """Whether the broker whose cursor protects us serves us no longer: it said so, or is dead."""
        now, reader, region = time.monotonic(), self.reader, self.region
        if reader is None or region is None or now < self.next_check:
            return False
        self.next_check = now + CHECK_SECONDS
        self._let_go()
        if not reader.is_open():
            return True
        line = unpack("BrokerLine", region.memory(Role.ROLE_CLIENT).read_line_bytes(
            region.layout.offset_of("broker", self.attachment.doorbell)))
        return not process_alive(line["pid"], line["start_time"], host_identity())

    def _typed(self, error: ReadError) -> CxlmqError:
        if error.status == ReadStatus.READ_CLOSED:
            return UnknownTopic(topic=self.topic)
        if error.status == ReadStatus.READ_LOST:
            return PositionLost(position=self.next_position, first_available=self._open_reader().first_position())
        if error.status == ReadStatus.READ_GONE and error.end is not None:
            return RangeLost(topic=self.topic, first=error.first, end=error.end)
        return DamagedData(str(error), topic=self.topic, index=error.index)

    async def _again(self, patient: bool = True) -> None:
        """Our broker is gone or cut us off: go on from the same place through another one."""
        deadline = time.monotonic() + AGAIN_SECONDS
        if self.next_position is None and self.start == "beginning":
            self.next_position = self.first_position
        before = self.reader
        while not self.closed:
            try:
                await self.open()
            except BrokerUnavailable:
                if not patient:
                    return                  # what is in memory can be read without a broker
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(SLEEP_SECONDS)
                continue
            if before is not None:
                self.retired.append(before)
            self._let_go()
            return

    def _let_go(self, all_of_them: bool = False) -> None:
        """Give up the former places under which nothing is viewed any more; their brokers see it by themselves."""
        for reader in [each for each in self.retired if all_of_them or each.released == each.next_index]:
            reader.leave()
            self.retired.remove(reader)

    def position(self) -> int | None:
        """Position of the message that is given out next."""
        with self.lock:
            if self.batch is not None:
                return int(self.batch.position) + self.first_in_batch
            if self.next_position is not None:
                return self.next_position
            return self.start if isinstance(self.start, int) else self.first_position

    def after_fork(self) -> None:
        """In a child: nothing that ends there says so."""
        for reader in (self.reader, *self.retired):
            if reader is not None:
                reader.after_fork()

    # ---- life -------------------------------------------------------------------------------------------------------

    async def seek(self, start: Start) -> None:
        """Go on elsewhere. Release the views first: what they show is protected no longer."""
        await self._detach()
        with self.lock:
            self.batch, self.wanted = None, None
            self.start, self.next_position, self.failure = start, None, None
        try:
            await self.open()
        except CxlmqError as error:
            self.failure = error
            raise

    async def _detach(self) -> None:
        if self.address is None:
            return
        self._let_go(all_of_them=True)
        if self.reader is not None:
            self.reader.leave()             # also when the broker cannot answer now
        request = pb.DetachRequest(slot=self.attachment.slot, generation=self.attachment.generation)
        try:
            await self.connection.unary(self.address.target, "Admin/Detach", request, pb.DetachResponse, timeout=2.0)
        except CxlmqError:
            pass                            # the broker is gone, or will see that we left
        self.address = None

    async def close(self) -> None:
        """Let go of the place. Views that are still held are no longer protected."""
        self.closed = True
        await self._detach()
        with self.lock:
            self.batch = self.reader = self.region = None
        await self.connection.close()
