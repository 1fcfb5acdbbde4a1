"""What readers ask a broker for: a place in a topic's order, protected by a cursor, over a stream or through memory.

The gRPC adapter and the simulation call the same methods with the same requests. There is no I/O here: what has to wait
for the head waits on the event loop that it runs on.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from broker.errors import (
    AttachSlotsFull,
    BrokerUnavailable,
    CxlmqError,
    DamagedData,
    PositionLost,
    RangeLost,
    UnknownTopic,
)
from broker.groups import topic_key
from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader, ReadError, ReadStatus
from broker.sessions import ENTRIES_AT_ONCE
from broker.topics import TopicEntry

if TYPE_CHECKING:
    from broker.assembly import Assembly


async def time_index(request: Any, reader: OrderReader) -> int:
    """The order entry of the time that a request begins at, if it does: a piece at a time, others run in between."""
    at, end = 0, reader.frontiers()["committed_index"] if request.WhichOneof("start") == "published_ns" else 0
    while at < end and (found := reader.find_time(request.published_ns, at, ENTRIES_AT_ONCE)) != at:
        at = found
        await asyncio.sleep(0)
    return at


def start_index(request: Any, reader: OrderReader, at_time: int) -> int:
    """The order entry that a request with a start means; "beginning" when it has none. `at_time`: see `time_index`."""
    frontiers = reader.frontiers()
    index: int = {
        "beginning": lambda: frontiers["reclaimed_index"],
        "end": lambda: frontiers["committed_index"],
        "position": lambda: reader.find(request.position),
        "published_ns": lambda: max(at_time, frontiers["reclaimed_index"]),
    }[request.WhichOneof("start") or "beginning"]()
    return index


def read_error(topic: str, error: ReadError) -> CxlmqError:
    """The typed error for what a reader of a topic came upon."""
    if error.status == ReadStatus.READ_CLOSED:
        return UnknownTopic(topic=topic)
    if error.status == ReadStatus.READ_LOST:
        return PositionLost(str(error), index=error.index)
    if error.status == ReadStatus.READ_GONE and error.end is not None:
        return RangeLost(topic=topic, first=error.first, end=error.end)
    return DamagedData(str(error), topic=topic, index=error.index)


class ReadingService:
    """Readers of one broker. Everything may raise `BrokerUnavailable` while a new head takes over."""

    def __init__(self, broker: "Assembly") -> None:
        self._broker = broker

    def topic_of(self, request: Any) -> TopicEntry:
        """The topic that a request is about. Raises as `TopicTable.find_seen`."""
        return self._broker.topics.find_seen(request.topic, request.seen, self._broker.settings.run_id)

    def read_error(self, request: Any, error: ReadError) -> CxlmqError:
        """The typed error for what a reader came upon; of a topic that is closed, what became of it."""
        if error.status == ReadStatus.READ_CLOSED:
            return self._broker.topics.gone(request.topic, request.seen.created_ns)
        return read_error(request.topic, error)

    async def place(self, request: pb.SubscribeRequest, entry: TopicEntry, process: tuple[int, int],
                    copies: bool = False) -> tuple[int, OrderReader]:
        """A cursor at the wanted place, and a reader there. `process` is its pid and its presence.

        Raises `PositionLost` when the place is gone, `GroupFenced` for one who is not the group's member.
        """
        broker = self._broker
        if request.group:
            broker.groups.require_member(entry, request.group, request.member, request.member_epoch)
        reader = OrderReader(broker.delivery_door, broker.layout, entry.number, entry.generation)
        start = request.WhichOneof("start") or "beginning"
        wanted = start_index(request, reader, await time_index(request, reader))
        cursor, granted = await broker.cursors.open(topic_key(entry), wanted, process[0], request.group, process[1],
                                                    copies)
        try:
            reader.move_to(granted)
            first = reader.frontiers()["reclaimed_position"]
            if start == "position" and request.position < first:
                raise PositionLost(position=request.position, first_available=first)
            if start == "position" and request.position < reader.position_of(granted):
                # Given away by a head whose frontier nobody sees: the one that serves may have it still, or will say.
                raise BrokerUnavailable("what was asked for is just being reclaimed, or a head fell: try again",
                                        address="head")
        except BaseException:
            broker.cursors.close(cursor)
            raise
        return cursor, reader

    def described(self, entry: TopicEntry, reader: OrderReader) -> pb.Attachment:
        """What a reader is told of its place: where it is, and what of the topic there is."""
        frontiers = reader.frontiers()
        return pb.Attachment(
            run_id=self._broker.settings.run_id, created_ns=entry.created_ns, topic_number=entry.number,
            topic_generation=entry.generation, index=reader.index, position=reader.position_of(reader.index),
            first_position=frontiers["reclaimed_position"], end_position=frontiers["committed_position"],
            doorbell=self._broker.broker)

    async def attach(self, request: pb.AttachSubscriberRequest, principal: int = 0) -> pb.Attachment:
        """Hand out a slot to a reader. Raises `AttachSlotsFull`, and as `place`."""
        try:
            return await self._attach(request, principal)
        except ReadError as error:
            raise self.read_error(request.subscribe, error) from error

    async def _attach(self, request: pb.AttachSubscriberRequest, principal: int) -> pb.Attachment:
        broker = self._broker
        entry = self.topic_of(request.subscribe)
        cursor, reader = await self.place(request.subscribe, entry, (request.pid, request.presence))
        try:                                # what may fail comes before the slot: who is refused holds nothing
            told = self.described(entry, reader)
            found = broker.attach.open_subscriber(entry.number, entry.generation, cursor, reader.index, request.pid,
                                                  request.presence, principal)
            if found is None:
                raise AttachSlotsFull(broker=broker.broker)
        except BaseException:
            broker.cursors.close(cursor)
            raise
        broker.attached_clients.add_reader(found[0], cursor)
        told.slot, told.generation = found
        return told
