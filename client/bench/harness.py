"""What the baselines of every transport share: the ring, frame headers, processes, rounds and the command line.

    measuring process ──lines──► publishers ──transport──► servers (one copy into a warm mapping each)

Servers and publishers are processes of their own, started fresh (never forked: gRPC's threads do not survive a fork).
They end when their standard input does, so none of them outlives the process that measures, however that one ends.
"""

import contextlib
import json
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
import psutil

from broker import grpc_options
from broker.inspection import inspect_region
from broker.region import Region
from sim.cxl import region as files
from sim.cxl.memory import MappedMemory

Transport = Literal["unix", "tcp"]
TRANSPORTS: tuple[Transport, ...] = ("unix", "tcp")

# A frame is this header, then the payload: payload bytes, batch number on its stream, zeros.
HEADER = struct.Struct("<QQ48x")
# An ack is the number of batches received on the stream so far.
ACK = struct.Struct("<Q")

# Larger than the last-level cache of one core's share, small enough for four servers on a small machine.
FULL = "no room: "                     # before the answer of a process that finds none for its mapping
RING_BYTES = 64 << 20
# After the last segment was touched, brokers map them for so long.
MAPPED_SECONDS = 1.0
# A child that has not answered by then never will.
CHILD_SECONDS = 60.0
# A publisher in the middle of a round does not notice that it should end; no reason to wait for it.
POLITE_SECONDS = 1.0


class LimitError(RuntimeError):
    """A process of a measurement failed; the message names it and how it ended."""


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


def warm_mapping(nbytes: int) -> Any:
    """A mapping on tmpfs, every page touched, that nobody else can find and that goes with this process.

    Raises `sim.cxl.region.TmpfsFull`.
    """
    name = f"{files.REGION_PREFIX}limit-{os.getpid()}"
    files.remove_region_file(name)          # of a process with our number that died in between these two lines
    mapping = files.create_region_file(name, nbytes)
    files.remove_region_file(name)
    MappedMemory(mapping).touch_range(0, nbytes)
    return mapping


def wait_until_warm(region: Region, progress: Callable[[str], None]) -> None:
    """Brokers touch cold memory in the background, and then map what others have touched: wait for the end of it."""
    warm, changed = -1, time.monotonic()
    while time.monotonic() < changed + MAPPED_SECONDS:
        pool = inspect_region(region)["pool"]
        if pool["warm"] != warm:
            warm, changed = pool["warm"], time.monotonic()
            progress(f"{warm} of {pool['segments']} segments are warm")
        time.sleep(0.1)


class WarmRing:
    """A mapping on tmpfs, every page touched, that payloads are copied into one behind the other."""

    def __init__(self) -> None:
        self._view = memoryview(warm_mapping(RING_BYTES))
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


# --- Processes and rounds, for every transport ---


def answer(line: str) -> None:
    """Tell the measuring process."""
    print(line, flush=True)


class Child:
    """A process that answers lines with lines, and ends when its standard input does.

    `role` names it in errors; an answer that takes longer than `seconds_max` counts as a hang.
    """

    def __init__(self, role: str, module: str, arguments: Sequence[str], seconds_max: float) -> None:
        self._role = role
        self._seconds_max = seconds_max
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            # numpy's linear algebra would start threads that spin for a tenth of a second.
            env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, line: str = "") -> None:
        """Send one line: have a publisher run one round."""
        with contextlib.suppress(BrokenPipeError):
            self._input.write(line + "\n")
            self._input.flush()

    def read_answer(self) -> str:
        """The next line. Raises `LimitError` when the process has ended or hangs, `TmpfsFull` when it says so."""
        watchdog = threading.Timer(self._seconds_max, self._process.kill)
        watchdog.daemon = True              # Ctrl-C may come before the `try`: it must not keep this process
        watchdog.start()
        try:
            line = self._output.readline().strip()
        finally:
            watchdog.cancel()
        if not line:
            raise LimitError(f"the {self._role} process ended with code {self._process.wait()}; see its standard error")
        if line.startswith(FULL):
            wanted, free = json.loads(line.removeprefix(FULL))
            raise files.TmpfsFull(f"the {self._role} process needs {wanted} bytes of {files.SHARED_MEMORY_FOLDER}, "
                                  f"which has {free} free", wanted, free)
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
            arguments = [f"--{role}", argument, "--settings", json.dumps(asdict(settings))]
            child = Child(role, module, arguments, settings.round_seconds_max)
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


# --- Command line, for every transport ---


def run_child(role: Callable[[], None], address: str | None = None) -> None:
    """Be one server or publisher process; a server's unix socket is removed even when nobody else is left to do it."""
    # Ctrl-C reaches the whole process group, but the measuring process ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begun = True
    try:
        role()
    except files.TmpfsFull as error:        # the one who started us says it, once
        begun = False                       # the folder is for others, who may be about to listen there
        answer(FULL + json.dumps([error.wanted_bytes, error.free_bytes]))
        sys.exit(1)
    finally:
        if begun and address is not None and address.startswith("unix:"):
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
