"""Baseline: bare gRPC in the best configuration known, whose handler only copies the payload into a warm mapping.

    python -m client.bench.grpc_limit --batch-bytes 1048576 --total-bytes 1000000000

What the brokers reach over gRPC is held against this figure, taken in the same run. Servers and publishers are
processes of their own, started fresh (never forked: gRPC's threads do not survive a fork). They end when their standard
input does, so none of them outlives the process that measures, however that one ends.

The parts that do not depend on gRPC (ring, frame header, processes, rounds) also serve `client.bench.socket_limit`.
"""

import asyncio
import contextlib
import json
import mmap
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
import psutil

from broker import grpc_options

Transport = Literal["unix", "tcp"]
TRANSPORTS: tuple[Transport, ...] = ("unix", "tcp")

MODULE = "client.bench.grpc_limit"
METHOD_PATH = "/cxlmq.bench.Limit/Publish"

# A frame is this header, then the payload: payload bytes, batch number on its stream, zeros.
HEADER = struct.Struct("<QQ48x")
# An ack is the number of batches received on the stream so far.
ACK = struct.Struct("<Q")

# Larger than the last-level cache of one core's share, small enough for four servers on a small machine.
RING_BYTES = 64 << 20
# An ack waits this long for the next batch before it goes out alone.
TAIL_SECONDS = 0.002
# A child that has not answered by then never will.
CHILD_SECONDS = 60.0
# A publisher in the middle of a round does not notice that it should end; no reason to wait for it.
POLITE_SECONDS = 1.0


class LimitError(RuntimeError):
    """A server or publisher process of the baseline failed; the message names it and how it ended."""


@dataclass(frozen=True)
class Limit:
    """What a transport reaches when nothing but the transport and one copy is there."""

    gigabytes_per_second: float
    """Median over the runs, payload only, 10^9 bytes."""
    runs: list[float]
    """GB/s of every run; the warm-up is not among them."""
    ack_latency_us_p50: float
    """From before the frame is built to the ack that covers it, at full load."""
    publisher_cpu_seconds_per_gigabyte: float
    server_cpu_seconds_per_gigabyte: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class GrpcLimit(Limit):
    """The limit of bare gRPC."""


AnyLimit = TypeVar("AnyLimit", bound=Limit)


@dataclass(frozen=True)
class Settings:
    """One measurement, as handed to the publisher processes."""

    batch_bytes: int
    total_bytes: int
    servers: int = 4
    window: int = grpc_options.RECOMMENDED_WINDOW_BATCHES
    transport: Transport = "unix"
    runs: int = 3
    publishers: int = 1

    def check(self) -> None:
        """Raise `ValueError`, naming the field, when this cannot be measured."""
        for name in ("batch_bytes", "total_bytes", "servers", "window", "runs", "publishers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_bytes > RING_BYTES:
            raise ValueError(f"batch_bytes must be at most {RING_BYTES}, the size of the mapping")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}")

    @property
    def batches_per_stream(self) -> int:
        """Batches that one publisher sends to one server in one round, at least one."""
        return max(1, self.total_bytes // (self.batch_bytes * self.servers * self.publishers))

    @property
    def bytes_per_round(self) -> int:
        """Payload bytes of one round, over all publishers and servers."""
        return self.batches_per_stream * self.batch_bytes * self.servers * self.publishers

    @property
    def round_seconds_max(self) -> float:
        """A round that takes longer hangs: a tenth of what the slowest machine should reach, and time to start."""
        return CHILD_SECONDS + self.bytes_per_round / 20e6 + self.bytes_per_round / self.batch_bytes * 0.005

    @property
    def ack_interval(self) -> int:
        """Batches per ack: a window smaller than the interval would wait for the tail every time."""
        return min(grpc_options.RECOMMENDED_ACK_INTERVAL_BATCHES, max(1, self.window // 2))


class WarmRing:
    """A mapping on tmpfs, every page touched, that payloads are copied into one behind the other."""

    def __init__(self) -> None:
        descriptor = os.memfd_create("cxlmq-limit")
        try:
            os.ftruncate(descriptor, RING_BYTES)
            self._view = memoryview(mmap.mmap(descriptor, RING_BYTES))
        finally:
            os.close(descriptor)
        self._view[:: mmap.PAGESIZE] = bytes(RING_BYTES // mmap.PAGESIZE)
        self._position = 0

    def reserve(self, length: int) -> memoryview:
        """The next `length` bytes; a payload never wraps, as it never crosses a segment."""
        if self._position + length > RING_BYTES:
            self._position = 0
        start = self._position
        self._position += length
        return self._view[start : start + length]


def make_payload(batch_bytes: int) -> bytes:
    """A payload that is neither zero pages nor one repeated byte."""
    return (os.urandom(4096) * (batch_bytes // 4096 + 1))[:batch_bytes]


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


# --- Processes and rounds, for every transport ---


def answer(line: str) -> None:
    """Tell the measuring process."""
    print(line, flush=True)


class Child:
    """A process of the baseline: it answers lines with lines, and ends when its standard input does."""

    def __init__(self, module: str, role: str, argument: str, settings: Settings) -> None:
        self._role = role
        self._seconds_max = settings.round_seconds_max
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, f"--{role}", argument, "--settings", json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout

    def ask(self) -> None:
        """Have a publisher run one round."""
        with contextlib.suppress(BrokenPipeError):
            self._input.write("\n")
            self._input.flush()

    def read_answer(self) -> str:
        """The next line; raises `LimitError` when the process has ended instead, or hangs."""
        watchdog = threading.Timer(self._seconds_max, self._process.kill)
        watchdog.start()
        try:
            line = self._output.readline().strip()
        finally:
            watchdog.cancel()
        if not line:
            raise LimitError(f"the {self._role} process ended with code {self._process.wait()}; see its standard error")
        return line

    def cpu_seconds(self) -> float:
        """Processor time used so far, 0.0 when the process has gone."""
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self._process.pid).cpu_times()
            return times.user + times.system
        return 0.0

    def close(self) -> None:
        """End the process: politely, then by force. A second Ctrl-C skips the polite part."""
        try:
            with contextlib.suppress(OSError):
                self._input.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=POLITE_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._output.close()


@dataclass(frozen=True)
class Round:
    """One round of all publishers."""

    seconds: float
    ack_latency_us_p50: float
    publisher_cpu_seconds: float
    server_cpu_seconds: float


def measure(module: str, settings: Settings, kind: type[AnyLimit]) -> AnyLimit:
    """Start `module`'s servers and publishers, run all rounds, and leave nothing behind.

    Raises `ValueError` for settings that make no sense and `LimitError` when a process fails.
    """
    settings.check()
    with _started(module, settings) as (servers, publishers):
        # The first round opens the flow-control windows and warms the heaps; it is not counted.
        rounds = [_run_round(servers, publishers) for _ in range(settings.runs + 1)][1:]
    gigabytes = settings.bytes_per_round / 1e9
    runs = [gigabytes / one.seconds for one in rounds]
    return kind(
        gigabytes_per_second=statistics.median(runs),
        runs=runs,
        ack_latency_us_p50=statistics.median(one.ack_latency_us_p50 for one in rounds),
        publisher_cpu_seconds_per_gigabyte=statistics.median(one.publisher_cpu_seconds for one in rounds) / gigabytes,
        server_cpu_seconds_per_gigabyte=statistics.median(one.server_cpu_seconds for one in rounds) / gigabytes,
        settings={**asdict(settings), "ack_interval": settings.ack_interval},
    )


@contextlib.contextmanager
def _started(module: str, settings: Settings) -> Iterator[tuple[list[Child], list[Child]]]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cxlmq-limit-", ignore_cleanup_errors=True))

        def start(role: str, argument: str) -> Child:
            child = Child(module, role, argument, settings)
            stack.callback(child.close)
            return child

        unix = settings.transport == "unix"
        wanted = [f"unix:{folder}/{index}" if unix else "127.0.0.1:0" for index in range(settings.servers)]
        servers = [start("server", address) for address in wanted]
        addresses = [server.read_answer() for server in servers]
        publishers = [start("publisher", json.dumps(addresses)) for _ in range(settings.publishers)]
        for publisher in publishers:
            publisher.read_answer()
        yield servers, publishers


def _run_round(servers: list[Child], publishers: list[Child]) -> Round:
    publisher_cpu, server_cpu = _cpu_seconds(publishers), _cpu_seconds(servers)
    started = time.perf_counter()
    for publisher in publishers:
        publisher.ask()
    latencies = [float(publisher.read_answer()) for publisher in publishers]
    return Round(
        seconds=time.perf_counter() - started,
        ack_latency_us_p50=statistics.median(latencies),
        publisher_cpu_seconds=_cpu_seconds(publishers) - publisher_cpu,
        server_cpu_seconds=_cpu_seconds(servers) - server_cpu,
    )


def _cpu_seconds(children: list[Child]) -> float:
    return sum(child.cpu_seconds() for child in children)


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


# --- Command line, for every transport ---


def run_child(role: Callable[[], None], address: str | None = None) -> None:
    """Be one server or publisher process; a server's unix socket is removed even when nobody else is left to do it."""
    # Ctrl-C reaches the whole process group, but the measuring process ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        role()
    finally:
        if address is not None and address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def limit_command(
    help_text: str,
    measure: Callable[[Settings], Limit],
    serve: Callable[[str, Settings], None],
    publish: Callable[[list[str], Settings], None],
) -> click.Command:
    """The command of one baseline: measures when a person calls it, is a server or publisher when the baseline does."""

    def callback(server: str | None, publisher: str | None, settings: str | None, as_json: bool, **fields: Any) -> None:
        chosen = Settings(**(json.loads(settings) if settings else fields))
        if server is not None:
            run_child(lambda: serve(server, chosen), server)
        elif publisher is not None:
            run_child(lambda: publish(json.loads(publisher), chosen))
        else:
            _measure_and_print(measure, chosen, as_json)

    defaults = Settings(batch_bytes=1 << 20, total_bytes=1_000_000_000)
    counts: list[click.Parameter] = [
        click.Option([f"--{name.replace('_', '-')}"], default=getattr(defaults, name), show_default=True)
        for name in ("batch_bytes", "total_bytes", "servers", "window", "runs", "publishers")
    ]
    others: list[click.Parameter] = [
        click.Option(["--transport"], type=click.Choice(TRANSPORTS), default=defaults.transport, show_default=True),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
        *(click.Option([f"--{name}"], hidden=True) for name in ("server", "publisher", "settings")),
    ]
    return click.Command("limit", callback=callback, params=counts + others, help=help_text)


def _measure_and_print(measure: Callable[[Settings], Limit], settings: Settings, as_json: bool) -> None:
    # So that a polite kill cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        limit = measure(settings)
    except (ValueError, LimitError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(asdict(limit)))
        return
    click.echo(
        f"{limit.gigabytes_per_second:.2f} GB/s (runs {', '.join(f'{run:.2f}' for run in limit.runs)}), "
        f"ack p50 {limit.ack_latency_us_p50:.0f} us, CPU s/GB: publishers "
        f"{limit.publisher_cpu_seconds_per_gigabyte:.2f}, servers {limit.server_cpu_seconds_per_gigabyte:.2f}"
    )


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
