"""One publish stream to one broker over gRPC. What is in flight on it, and how much may be, others know."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from broker.compression import compressed
from broker.errors import BrokerUnavailable, CxlmqError, DamagedData
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress
from client.connection import translated

if TYPE_CHECKING:
    from client.batch import Batch

PUBLISH = "/cxlmq.v1.PubSub/Publish"
CLOSE_SECONDS = 5.0


class PublishTransport:
    """Sends batches in order on one stream. Runs on the client loop."""

    def __init__(self, broker: BrokerAddress, channel: grpc.aio.Channel, opened: pb.PublishOpen,
                 on_results: Callable[[pb.PublishResponse], None], on_lost: Callable[[CxlmqError], None],
                 compression: str | None) -> None:
        self.broker = broker
        self._queue: deque[Batch] = deque()
        self._news = asyncio.Event()
        self._closing = False
        self._on_results, self._on_lost = on_results, on_lost
        self._level = opened.ack
        self._opened = pb.PublishRequest(open=opened).SerializeToString()
        self._compression = compression
        self._call = channel.stream_stream(PUBLISH)()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def send(self, batch: "Batch") -> None:
        """Queue a stamped batch."""
        self._queue.append(batch)
        self._news.set()

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
            writer.cancel()
        if not self._closing:
            self._on_lost(error)

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
        if frame is None:
            return                          # settled meanwhile
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
            self._on_results(pb.PublishResponse.FromString(frame))

    def abandon(self) -> None:
        """Drop the stream without waiting."""
        self._closing = True
        self._queue.clear()
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


__all__ = ["PublishTransport"]
