"""The engine of an attached subscriber: what `SubscriberEngine` is for gRPC, over a read-only mapping of the region."""

import asyncio
import os
import threading
import time

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
from broker.region import attach_region
from client.attached_reader import AttachedReader
from client.connection import BrokerAddress, ClientLoop, Connection
from client.group import Membership
from client.received import Message, ReceivedBatch
from client.start import Start, fill_start
from sim.cxl.memory import MappedMemory, Memory, Role
from sim.cxl.region import map_region_part, process_start_time

TAKE_BATCHES = 64
SLEEP_SECONDS = 0.1


class AttachedSubscriberEngine:
    """Reads through the region. Opening, seeking and closing go over gRPC; reading makes no call at all."""

    def __init__(self, topic: str, cluster: str, bootstrap: str | None, start: Start, broker: int | None,
                 buffer_bytes: int) -> None:
        self.topic = topic
        self.client_loop = ClientLoop.get()
        self.connection = Connection(cluster, bootstrap)
        self.start: Start = start
        self.broker = broker
        self.membership: Membership | None = None
        self.attachment = pb.Attachment()
        self.address: BrokerAddress | None = None
        self.reader: AttachedReader | None = None
        self.batch: ReceivedBatch | None = None     # the one that is being given out message by message
        self.first_in_batch = 0
        self.wanted: int | None = None
        self.next_position: int | None = None
        self.closed = False
        self.lock = threading.RLock()
        self.first_position = 0
        self.end_position = 0

    async def open(self) -> None:
        """Get a slot whose cursor protects the place, and map the region."""
        request = pb.AttachSubscriberRequest(subscribe=pb.SubscribeRequest(topic=self.topic), pid=os.getpid(),
                                             start_time=process_start_time())
        start = self.start if self.next_position is None else self.next_position
        fill_start(request.subscribe, start)
        if isinstance(start, int):
            self.wanted = start
        if self.membership is not None:
            self.membership.introduce(request.subscribe)
        error: CxlmqError = BrokerUnavailable(address="the cluster")
        for broker in await self.connection.brokers():
            if self.broker is not None and broker.id != self.broker:
                continue
            try:
                self.attachment = await self.connection.unary(broker.target, "Admin/AttachSubscriber", request,
                                                              pb.Attachment)
            except BrokerUnavailable as failed:
                error = failed
                continue
            self.address = broker
            self._map()
            return
        raise error

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
        if self.reader is not None:
            self.reader.close()
        self.reader = AttachedReader(
            region.memory(Role.ROLE_CLIENT), region.layout, own, offset,
            each.slot, each.generation, each.topic_number, each.topic_generation, each.index, self.topic)
        self.first_position, self.end_position = each.first_position, each.end_position
        if not isinstance(self.start, int) and self.next_position is None:
            self.next_position = each.position

    # ---- taking -----------------------------------------------------------------------------------------------------

    def fetch_batches(self, timeout: float | None, limit: int = TAKE_BATCHES) -> list[ReceivedBatch]:
        """Batches as views, at least one unless nothing came in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.lock:
            if self.batch is not None:
                begun, self.batch = self.batch, None
                begun.drop_before(begun.position + self.first_in_batch)
                return [begun]
        while True:
            if self.closed or self.reader is None:
                raise ClosedError(what="the subscriber")
            with self.lock:
                batches = self._take(limit)
            if batches:
                return batches
            left = SLEEP_SECONDS if deadline is None else min(SLEEP_SECONDS, deadline - time.monotonic())
            if left <= 0:
                return []
            if not self.reader.wait(left) and not self.reader.is_open():
                self.client_loop.run(self._again())

    def _take(self, limit: int) -> list[ReceivedBatch]:
        assert self.reader is not None
        try:
            batches: list[ReceivedBatch] = self.reader.take(limit)
        except ReadError as error:
            raise self._typed(error) from None
        if batches and self.wanted is not None:
            batches[0].drop_before(self.wanted)
            self.wanted = None
        if batches:
            self.next_position = batches[-1].position + batches[-1].count
        return [batch for batch in batches if batch.count]

    def _typed(self, error: ReadError) -> CxlmqError:
        if error.status == ReadStatus.READ_CLOSED:
            return UnknownTopic(topic=self.topic)
        if error.status == ReadStatus.READ_LOST:
            return PositionLost(str(error), position=self.next_position, first_available=-1)
        if error.status == ReadStatus.READ_GONE and error.end is not None:
            return RangeLost(topic=self.topic, first=error.first, end=error.end)
        return DamagedData(str(error), topic=self.topic, index=error.index)

    async def _again(self) -> None:
        """Our broker is gone or cut us off: go on from the same place through another one."""
        deadline = time.monotonic() + 10.0
        while True:
            try:
                await self.open()
                return
            except BrokerUnavailable:
                if time.monotonic() > deadline:
                    raise

    async def fetch_async(self, n: int, timeout: float | None) -> list[Message]:
        """As `fetch`, waiting in a thread."""
        return await asyncio.to_thread(self.fetch, n, timeout)

    async def fetch_batches_async(self, timeout: float | None) -> list[ReceivedBatch]:
        """As `fetch_batches`, waiting in a thread."""
        return await asyncio.to_thread(self.fetch_batches, timeout)

    def fetch(self, limit: int, timeout: float | None) -> list[Message]:
        """Up to `limit` messages whose payloads are views."""
        with self.lock:
            if self.batch is None:
                batches = self.fetch_batches(timeout, 1)
                if not batches:
                    return []
                self.batch, self.first_in_batch = batches[0], 0
            taken: list[Message] = self.batch.to_messages(self.first_in_batch, limit)
            self.first_in_batch += len(taken)
            if self.first_in_batch >= self.batch.count:
                self.batch = None
            return taken

    def position(self) -> int | None:
        """Position of the message that is given out next."""
        with self.lock:
            if self.batch is not None:
                return int(self.batch.position) + self.first_in_batch
            if self.next_position is not None:
                return self.next_position
            return self.start if isinstance(self.start, int) else self.first_position

    # ---- life -------------------------------------------------------------------------------------------------------

    async def seek(self, start: Start) -> None:
        """Go on elsewhere. Release the views first: what they show is protected no longer."""
        await self._detach()
        with self.lock:
            self.batch, self.wanted = None, None
            self.start, self.next_position = start, None
        await self.open()

    async def _detach(self) -> None:
        if self.address is None:
            return
        request = pb.DetachRequest(slot=self.attachment.slot, generation=self.attachment.generation)
        try:
            await self.connection.unary(self.address.target, "Admin/Detach", request, pb.DetachResponse, timeout=2.0)
        except CxlmqError:
            pass                            # the broker is gone, and our cursor with it
        self.address = None

    async def close(self) -> None:
        """Let go of the place. Views that are still held are no longer protected."""
        self.closed = True
        if self.reader is not None:
            self.reader.close()
        self.batch = self.reader = None
        await self._detach()
        await self.connection.close()
