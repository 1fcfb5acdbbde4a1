"""Baseline: bare gRPC in the best configuration known, whose handler only copies the payload into a warm mapping.

    python -m client.bench.grpc_limit --batch-bytes 1048576 --total-bytes 1000000000

What the brokers reach over gRPC is held against this figure, taken in the same run.
"""

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from broker import grpc_options
from client.bench.harness import (
    ACK,
    HEADER,
    Limit,
    Settings,
    Transport,
    WarmRing,
    answer,
    limit_command,
    make_payload,
    measure,
)

MODULE = "client.bench.grpc_limit"
METHOD_PATH = "/cxlmq.bench.Limit/Publish"

# An ack waits this long for the next batch before it goes out alone.
TAIL_SECONDS = 0.002


@dataclass(frozen=True)
class GrpcLimit(Limit):
    """The limit of bare gRPC."""


# --- Servers ---


class AckTail:
    """Says when an ack is due: after `interval` batches, when nothing more has come for a while, and at the end."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._received_at_timer = 0
        self._received = 0
        self._acked = 0
        self._closed = False

    def batch_received(self) -> None:
        """Count a batch."""
        self._received += 1
        if self._received - self._acked >= self._interval:
            self._due.set()
        elif self._timer is None:
            self._arm()

    def close(self) -> None:
        """No batch comes any more."""
        self._closed = True
        self._due.set()
        if self._timer is not None:
            self._timer.cancel()

    async def next_ack(self) -> int | None:
        """Wait for the next count to acknowledge; None when the stream is closed and all is acknowledged."""
        while True:
            if not self._closed:
                await self._due.wait()
                self._due.clear()
            if self._received > self._acked:
                self._acked = self._received
                return self._acked
            if self._closed:
                return None

    def _arm(self) -> None:
        self._received_at_timer = self._received
        self._timer = asyncio.get_running_loop().call_later(TAIL_SECONDS, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._received == self._acked:
            return
        if self._received == self._received_at_timer:
            self._due.set()
        else:
            self._arm()


async def handle_publish(context: Any, ring: WarmRing, ack_interval: int) -> None:
    """Serve one stream: copy each payload into the ring, acknowledge from a task of its own."""
    import grpc

    tail = AckTail(ack_interval)
    acknowledging = asyncio.create_task(_write_acks(context, tail))
    try:
        while (frame := await context.read()) is not grpc.aio.EOF:
            payload = memoryview(frame)[HEADER.size :]
            ring.reserve(len(payload))[:] = payload
            # Freed before the next read, or the allocator needs a second block of a batch's size.
            del payload, frame
            tail.batch_received()
        tail.close()
        await acknowledging
    finally:
        tail.close()
        acknowledging.cancel()


async def _write_acks(context: Any, tail: AckTail) -> None:
    while (count := await tail.next_ack()) is not None:
        await context.write(ACK.pack(count))


async def serve(address: str, settings: Settings) -> None:
    """Run one server until standard input ends; print its address once it listens."""
    import grpc

    ring = WarmRing()

    async def publish(_requests: Any, context: Any) -> None:
        await handle_publish(context, ring, settings.ack_interval)

    server = grpc.aio.server(options=grpc_options.server_options(settings.batch_bytes))
    service, method = METHOD_PATH.strip("/").split("/")
    # No serializers: the bytes on the wire are the bytes of the frame.
    handlers = {method: grpc.stream_stream_rpc_method_handler(publish)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port(address)
    await server.start()
    answer(address if address.startswith("unix:") else f"127.0.0.1:{port}")
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


# --- Publishers ---


class Window:
    """Batches in flight on one stream, and how long each took to be acknowledged."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._sent_at: list[float] = []
        self._moved = asyncio.Event()
        self.acked = 0
        self.latencies: list[float] = []

    async def enter(self) -> int:
        """Wait for room; the number of the batch that may go now, its time taken."""
        while len(self._sent_at) - self.acked >= self._size:
            self._moved.clear()
            await self._moved.wait()
        self._sent_at.append(time.perf_counter())
        return len(self._sent_at) - 1

    def acknowledge(self, count: int) -> None:
        """Everything before `count` has been received."""
        now = time.perf_counter()
        self.latencies.extend(now - sent for sent in self._sent_at[self.acked : count])
        self.acked = count
        self._moved.set()


async def publish_stream(channel: Any, settings: Settings, payload: bytes) -> list[float]:
    """Send one round's batches on one new stream; their ack latencies in seconds."""
    import grpc

    window = Window(settings.window)
    call = channel.stream_stream(METHOD_PATH)()

    async def read_acks() -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            window.acknowledge(ACK.unpack(message)[0])

    async def write_batches() -> None:
        for _ in range(settings.batches_per_stream):
            number = await window.enter()
            await call.write(b"".join((HEADER.pack(len(payload), number), payload)))
        await call.done_writing()

    # A group, because a stream that breaks must not leave the writer waiting for acks that never come.
    async with asyncio.TaskGroup() as group:
        group.create_task(read_acks())
        group.create_task(write_batches())
    assert window.acked == settings.batches_per_stream, "the stream ended before the last ack"
    return window.latencies


async def publish(addresses: list[str], settings: Settings) -> None:
    """Answer every line on standard input with one round over all servers, until it ends."""
    import grpc

    options = grpc_options.channel_options(settings.batch_bytes)
    payload = make_payload(settings.batch_bytes)
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            for address in addresses
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))

        async def publish_round() -> list[float]:
            streams = (publish_stream(channel, settings, payload) for channel in channels)
            return [latency for latencies in await asyncio.gather(*streams) for latency in latencies]

        answer("ready")
        while await asyncio.to_thread(sys.stdin.readline):
            latencies = await publish_round()
            answer(str(statistics.median(latencies) * 1e6))


def measure_grpc(
    batch_bytes: int,
    total_bytes: int,
    servers: int = 4,
    window: int = grpc_options.RECOMMENDED_WINDOW_BATCHES,
    transport: Transport = "unix",
    runs: int = 3,
    publishers: int = 1,
) -> GrpcLimit:
    """Measure bare gRPC: batches of `batch_bytes`, striped over `servers`, `total_bytes` in each of `runs` runs.

    Raises `ValueError` for arguments that make no sense and `LimitError` when a process fails.
    """
    settings = Settings(batch_bytes, total_bytes, servers, window, transport, runs, publishers)
    return measure(MODULE, settings, GrpcLimit)


def _serve_process(address: str, settings: Settings) -> None:
    _run_tuned(serve(address, settings))


def _publish_process(addresses: list[str], settings: Settings) -> None:
    _run_tuned(publish(addresses, settings))


def _run_tuned(main: Coroutine[Any, Any, None]) -> None:
    grpc_options.apply_process_tuning()
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        # The best configuration known: a sixth more at 64 KiB, the same at 1 MiB.
        uvloop.run(main)


main = limit_command(
    "Measure bare gRPC in the best configuration known.",
    lambda settings: measure(MODULE, settings, GrpcLimit),
    _serve_process,
    _publish_process,
)

if __name__ == "__main__":
    main()
