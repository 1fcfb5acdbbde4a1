"""One publish stream to one broker over gRPC, and how a broker is chosen for a retransmission."""

import asyncio
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from broker.compression import compressed
from broker.errors import BrokerUnavailable, CxlmqError, DamagedData, from_code
from broker.proto import cxlmq_pb2 as pb
from client.connection import BrokerAddress, translated

if TYPE_CHECKING:
    from client.batch import Batch

PUBLISH = "/cxlmq.v1.PubSub/Publish"
CLOSE_SECONDS = 5.0


def rendezvous(brokers: Sequence[BrokerAddress], client_id: int, number: int) -> list[BrokerAddress]:
    """The brokers in the order of their hash with (client, number): everyone computes the same choice."""
    def weight(broker: BrokerAddress) -> bytes:
        return hashlib.blake2b(f"{client_id}:{number}:{broker.id}".encode(), digest_size=8).digest()

    return sorted(brokers, key=weight, reverse=True)


class PublishTransport:
    """Sends batches in order on one stream, at most a window of them unanswered. Runs on the client loop."""

    def __init__(self, broker: BrokerAddress, channel: grpc.aio.Channel, opened: pb.PublishOpen, window: int,
                 window_bytes: int, on_acks: Callable[["PublishTransport", pb.PublishResponse], None],
                 on_broken: Callable[["PublishTransport", CxlmqError], None], compression: str | None) -> None:
        self.broker = broker
        self.alive = True
        self._window = window
        self._window_bytes = window_bytes
        self._waiting: dict[int, int] = {}      # sequence -> bytes, sent and not answered
        self._waiting_bytes = 0
        self._heard_at = 0.0                    # or since when it has something to answer
        self._queue: deque[Batch] = deque()
        self._news = asyncio.Event()
        self._closing = False
        self._on_acks = on_acks
        self._on_broken = on_broken
        self._level = opened.ack
        self._opened = pb.PublishRequest(open=opened).SerializeToString()
        self._compression = compression
        self._call = channel.stream_stream(PUBLISH)()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def has_room(self, nbytes: int) -> bool:
        """Whether one more batch may be sent; two always may, however large."""
        count = len(self._waiting)
        return count < self._window and (count < 2 or self._waiting_bytes + nbytes <= self._window_bytes)

    def send(self, batch: "Batch") -> None:
        """Queue a stamped batch."""
        if not self._waiting:
            self._heard_at = time.monotonic()
        if batch.sequence not in self._waiting:
            self._waiting[batch.sequence] = batch.nbytes
            self._waiting_bytes += batch.nbytes
        self._queue.append(batch)
        self._news.set()

    def is_quiet(self, since: float) -> bool:
        """Whether it has batches and has answered none since a moment (monotonic seconds)."""
        return bool(self._waiting) and self._heard_at < since

    def answered(self, sequence: int) -> None:
        """The broker answered this batch."""
        self._waiting_bytes -= self._waiting.pop(sequence, 0)

    def unanswered(self) -> list[int]:
        """Sequences that the broker has not answered."""
        return list(self._waiting)

    @staticmethod
    def refusal_error(refusal: pb.Refusal) -> CxlmqError:
        """The typed error of a refused batch."""
        details: dict[str, Any] = json.loads(refusal.details or "{}")
        return from_code(refusal.code, refusal.message, **details)

    async def _run(self) -> None:
        """Write what is queued and read the answers, until the stream ends; the reader learns why it ended."""
        error: CxlmqError = BrokerUnavailable(address=self.broker.target)
        writer = asyncio.get_running_loop().create_task(self._write())
        try:
            await self._read()
        except grpc.aio.AioRpcError as failed:
            error = translated(failed, self.broker.target)
        except DecodeError:
            error = DamagedData(f"{self.broker.target} sent what is no PublishResponse")
        except asyncio.CancelledError:
            if self._closing:
                return
        finally:
            self.alive = False
            writer.cancel()
        if not self._closing:
            self._on_broken(self, error)

    async def _write(self) -> None:
        try:
            await self._call.write(self._opened)
            while True:
                while self._queue:
                    await self._write_batch(self._queue.popleft())
                if self._closing:
                    await self._call.done_writing()
                    return
                self._news.clear()
                if not self._queue:
                    await self._news.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass                            # the call has ended: the reader says why

    async def _write_batch(self, batch: "Batch") -> None:
        frame = batch.frame
        if frame is None or batch.sequence not in self._waiting:
            return                          # settled meanwhile, or given another sequence
        if self._compression is not None:
            frame = await asyncio.to_thread(compressed, frame, self._compression)
        await self._call.write(frame)
        if self._level == 0:
            batch.publisher.settled_at_send(batch)

    async def _read(self) -> None:
        while True:
            frame = await self._call.read()
            if frame is grpc.aio.EOF:
                return
            self._heard_at = time.monotonic()
            self._on_acks(self, pb.PublishResponse.FromString(frame))

    def abandon(self) -> None:
        """Drop the stream without waiting."""
        self._closing = True
        self.alive = False
        self._call.cancel()
        self._task.cancel()

    async def close(self) -> None:
        """Finish writing, take the last answers, end."""
        self._closing = True
        self._news.set()
        try:
            await asyncio.wait_for(self._task, CLOSE_SECONDS)
        except (TimeoutError, asyncio.CancelledError, grpc.aio.AioRpcError):
            self._call.cancel()


__all__ = ["PublishTransport", "rendezvous"]
