"""A publish stream of the gRPC adapter: batches of one session in, cumulative acks and refusals out."""

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf.message import DecodeError

from broker.compression import inflated, is_compressed
from broker.errors import BadBatch, BrokerUnavailable, CxlmqError, MessageTooBig, PoolFull, StreamTableFull
from broker.grpc_options import RECOMMENDED_ACK_INTERVAL_BATCHES
from broker.proto import cxlmq_pb2 as pb
from broker.rights import METHODS
from broker.security import CALLER
from broker.stages import receiver as receiving
from broker.stages.receiver import Receiver
from broker.topics import TopicEntry

if TYPE_CHECKING:
    from broker.server import BrokerServer

# A batch that finds no room waits so long before its publisher is told what is full; then it is for the publisher.
PUSH_BACK_SECONDS = 1.0
ACK_LINGER_SECONDS = 0.002
# A publish stream says at once whose it is; so many may be about to.
OPEN_SECONDS = 10.0
STREAMS_BEGINNING_MAX = 256


class PublishStream:
    """One publish stream: the batches of one session that come through this broker."""

    def __init__(self, server: "BrokerServer", context: Any) -> None:
        self._server = server
        self._node = server.node
        self._receiver: Receiver = server.node.receiver
        self._acks = server.node.acks
        self._context = context
        self._news = asyncio.Event()
        self._linger: asyncio.TimerHandle | None = None
        self._ended = False
        self._broken = False
        self._gone = False
        self._full_since = 0.0
        self.entry: TopicEntry | None = None
        self._number = -1
        self._refusals: list[pb.Refusal] = []
        self._last_bytes = 64 << 10

    def wake(self) -> None:
        """Acks may have come: several go in one response while more are on the way, at once when none is."""
        ready = self._acks.ready_count(self._number)
        if not ready or self._news.is_set():
            return
        waiting = self._acks.waiting_count(self._number)
        if self._ended or ready >= min(RECOMMENDED_ACK_INTERVAL_BATCHES, waiting):
            self._news.set()
        elif self._linger is None:
            self._linger = asyncio.get_running_loop().call_later(ACK_LINGER_SECONDS, self._news.set)

    def topic_is_gone(self) -> None:
        """Its topic was deleted: the publisher is told, also when it sends nothing."""
        self._gone = True
        self._news.set()

    async def run(self) -> None:
        """Serve the stream until the publisher closes it or it breaks."""
        first = await self._first_message()
        if first is grpc.aio.EOF:
            return
        opened, payload = self._parse_open(first)
        METHODS["PubSub/Publish"].check(CALLER.get(), opened)
        entry, self._number = self._node.session_service.open_stream(opened)
        self.entry = entry
        self._server.publish_streams[self._number] = self
        try:
            await self._serve(entry, opened, first if payload else None)
        finally:
            del self._server.publish_streams[self._number]
            self._node.session_service.close_stream(opened, self._number)

    async def _first_message(self) -> Any:
        """What the stream begins with. Streams that do not begin are few, and soon ended: anybody may open them."""
        if self._server.streams_beginning >= STREAMS_BEGINNING_MAX:
            raise StreamTableFull(broker=self._node.broker)
        self._server.streams_beginning += 1
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                return await self._context.read()
        except TimeoutError:
            raise BadBatch(reason=f"a stream has to begin with `open` within {OPEN_SECONDS:g} s") from None
        finally:
            self._server.streams_beginning -= 1

    async def _serve(self, entry: TopicEntry, opened: pb.PublishOpen, first: bytes | None) -> None:
        """Take batches and write acks, side by side.

        The writer is told to end, and not cancelled, when a batch is refused: behind a write that was cancelled gRPC
        sends no status any more, and the stream would hang.
        """
        reader = asyncio.create_task(self._read_batches(entry, opened, first))
        writer = asyncio.create_task(self._write_acks())
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                self._ended, self._broken = True, reader.exception() is not None
                self._news.set()
                await writer
                await reader
            else:
                await writer                # which raises why
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    def _parse_open(self, frame: bytes) -> tuple[pb.PublishOpen, bool]:
        fields = Receiver.sequence_of(frame)
        if fields is None or fields[1] is None:
            raise BadBatch(reason="the first message of a stream has to be `open`")
        try:
            return pb.PublishOpen.FromString(fields[1]), fields[2]
        except DecodeError as error:
            raise BadBatch(reason="`open` is not a PublishOpen") from error

    async def _read_batches(self, entry: TopicEntry, opened: pb.PublishOpen, first: bytes | None) -> None:
        if first is not None:
            await self._receive(first, entry, opened)
            del first
        while True:
            async with self._server.receiving(self._last_bytes):
                frame = await self._read_frame()
            if frame is grpc.aio.EOF:
                return
            self._last_bytes = len(frame)
            await self._receive(frame, entry, opened)
            del frame                   # before the next one is put together

    async def _read_frame(self) -> Any:
        frame = await self._context.read()
        if frame is grpc.aio.EOF or not is_compressed(frame):
            return frame
        return await asyncio.to_thread(inflated, frame, self._server.message_limit)

    async def _receive(self, frame: bytes, entry: TopicEntry, opened: pb.PublishOpen) -> None:
        """Take one batch in; wait for room when something is full, and say what when that takes too long."""
        pause = 0.0002
        while True:
            status = self._receiver.receive(frame, self._number, entry.number, opened.client_id, opened.session_slot,
                                            opened.session_epoch)
            if status == receiving.RECEIVED:
                self._full_since = 0.0
                return
            if status == receiving.MALFORMED:
                raise BadBatch(reason="its messages do not add up")
            if status == receiving.TOO_BIG:
                numbers = self._node.layout.numbers
                raise MessageTooBig(
                    f"a message or the batch is too big: at most {numbers['message_bytes_max']} bytes a message and "
                    f"{numbers['batch_bytes_max']} a batch", message_bytes_max=numbers["message_bytes_max"])
            if status == receiving.TOPIC_CLOSED:
                raise self._why_gone(entry)
            now = time.monotonic()
            self._full_since = self._full_since or now
            if now > self._full_since + PUSH_BACK_SECONDS:
                self._refuse(frame, status)
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.01)

    def _why_gone(self, entry: TopicEntry) -> CxlmqError:
        """Why its topic is not served here. Raises `BrokerUnavailable` while no head serves."""
        if self._node.topics.is_open(entry):
            return BrokerUnavailable(f"this broker does not serve topic {entry.name} yet: try again", address="")
        return self._node.topics.gone(entry.name, entry.created_ns)

    def _refuse(self, frame: bytes, status: int) -> None:
        what = {receiving.RING_FULL: "the batch-header ring", receiving.WINDOW_FULL: "the stream's window"}.get(status)
        number = self.entry.number if self.entry is not None else 0
        error = self._server.why_full(number) if what is None else PoolFull(
            f"{what} of this broker is full: batches before it wait for their order or their ack; "
            f"{self._server.who_stops(number)}", holder=what)
        fields = Receiver.sequence_of(frame)
        assert fields is not None
        self._refusals.append(pb.Refusal(batch_sequence=fields[0], code=error.code, message=error.message,
                                         details=json.dumps(error.details)))
        self._news.set()

    async def _write_acks(self) -> None:
        """Cumulative acks and refusals, as often as there is news."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._linger is not None:
                self._linger.cancel()
                self._linger = None
            await self._send_acks()
            if self._gone:
                assert self.entry is not None
                raise self._why_gone(self.entry)
            if self._broken or (self._ended and not self._acks.waiting_count(self._number)
                                and not self._acks.has_acks(self._number)):
                return

    async def _send_acks(self) -> None:
        epoch = self._server.epoch()
        response = self._acks.take_acks(self._number, epoch)
        if self._refusals:
            refused = pb.PublishResponse(epoch=epoch, refusals=self._refusals)
            self._refusals = []
            response += refused.SerializeToString()
        if response:
            await self._context.write(response)
