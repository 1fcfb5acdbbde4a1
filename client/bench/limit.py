"""The limits of this machine, measured in the same run as the product: memory, bare gRPC, plain sockets.

    limits = measure_limits(("memory", "grpc"), batch_bytes=1 << 20)

What the broker reaches means nothing without them: machines, and minutes on a shared machine, differ by factors.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from client.bench import limits
from client.bench.grpc_limit import measure_grpc
from client.bench.harness import RING_BYTES, Limit, Transport, warm_mapping
from client.bench.socket_limit import measure_sockets
from sim.cxl import region as files
from sim.cxl.memory import processor_features

WHICH = ("memory", "grpc", "sockets")
PIECE_BYTES = 1 << 20
# Copies look two or three times faster while their target fits the last-level cache.
FOOTPRINT_BYTES, FOOTPRINT_BYTES_MIN = 1 << 30, 64 << 20
# Threads that begin together need a moment to get there.
START_NS = 2_000_000
TRANSPORT_BYTES = 500_000_000


def measure_limits(which: Iterable[str] = WHICH, *, batch_bytes: int = PIECE_BYTES, servers: int = 4,
                   publishers: int = 1, tcp: bool = False, runs: int = 5, transport_bytes: int = TRANSPORT_BYTES,
                   progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure what is asked for; GB/s are 10^9 bytes, medians of `runs` after a warm-up that is not counted.

    `tcp` measures bare gRPC over TCP as well. Raises `ValueError` for a name that is not in `WHICH`,
    `client.bench.harness.LimitError` when a process fails.
    """
    which = tuple(which)
    for name in which:
        if name not in WHICH:
            raise ValueError(f"{name!r} is no limit: allowed are {', '.join(WHICH)}")
    found: dict[str, Any] = {}
    if "memory" in which:
        progress("memory: copies and reads beyond the cache")
        found.update(measure_memory(runs))
    batch_bytes = min(batch_bytes, RING_BYTES)
    transports = [each for each in _TRANSPORTS if each[0] in which and (tcp or each[2] != "tcp")]
    for what, name, network, measure in transports:
        progress(f"{what} over {network}, {batch_bytes:,} bytes a batch")
        limit = measure(batch_bytes, transport_total(transport_bytes, batch_bytes), servers=servers, transport=network,
                        runs=min(runs, 3), publishers=publishers)
        found[f"{name}_gigabytes_per_second"] = limit.gigabytes_per_second
        found[f"{name}_ack_latency_us_p50"] = limit.ack_latency_us_p50
        found[f"{name}_cpu_seconds_per_gigabyte"] = {"publishers": limit.publisher_cpu_seconds_per_gigabyte,
                                                     "servers": limit.server_cpu_seconds_per_gigabyte}
    if transports:
        found["transport_batch_bytes"] = batch_bytes
    return found


# (what is asked for, name in the results, sockets, measurement)
_TRANSPORTS: tuple[tuple[str, str, Transport, Callable[..., Limit]], ...] = (
    ("grpc", "grpc", "unix", measure_grpc), ("grpc", "grpc_tcp", "tcp", measure_grpc),
    ("sockets", "sockets", "unix", measure_sockets))


def transport_total(wanted: int, batch_bytes: int) -> int:
    """Bytes of one round: small batches cost by the piece, and 20,000 of them say enough."""
    return min(wanted, 20_000 * batch_bytes)


def measure_memory(runs: int = 5, footprint_bytes: int | None = None) -> dict[str, Any]:
    """One core's, and if there are two, two cores' rate of memcpy, non-temporal copy and read.

    Raises `sim.cxl.region.TmpfsFull` when not even the smallest footprint fits.
    """
    footprint_bytes = footprint_bytes or choose_footprint()
    mapping = warm_mapping(footprint_bytes)
    source = os.urandom(PIECE_BYTES)
    found: dict[str, Any] = {"footprint_bytes": footprint_bytes, "piece_bytes": PIECE_BYTES, **processor_features()}
    cores = len(os.sched_getaffinity(0))
    for kind in limits.KINDS:
        found[f"{kind}_gigabytes_per_second"] = _median_rate(mapping, source, kind, 1, runs)
        if cores > 1:
            found[f"{kind}_two_cores_gigabytes_per_second"] = _median_rate(mapping, source, kind, 2, runs)
    with contextlib.suppress(BufferError):
        mapping.close()
    return found


def nontemporal_rate(cores: int, footprint_bytes: int, runs: int = 3) -> float:
    """GB/s that so many cores together store around the cache."""
    whole = cores * PIECE_BYTES             # as many pieces for each
    mapping = warm_mapping(max(1, footprint_bytes // whole) * whole)
    return _median_rate(mapping, os.urandom(PIECE_BYTES), "nontemporal", cores, runs)


def choose_footprint() -> int:
    """Up to 1 GiB, at most a third of what tmpfs and memory have free, whole pieces for two threads."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = min(files.tmpfs_free_bytes(), available) // 3
    return max(FOOTPRINT_BYTES_MIN, min(FOOTPRINT_BYTES, room // (2 * PIECE_BYTES) * (2 * PIECE_BYTES)))


def _median_rate(mapping: Any, source: bytes, kind: str, threads: int, runs: int) -> float:
    share = len(mapping) // threads

    def one(start_ns: int, thread: int) -> tuple[int, int, int]:
        result: tuple[int, int, int] = limits.run_pass(mapping, source, kind, thread * share, share, start_ns)
        return result

    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(runs + 1):
            start_ns = time.monotonic_ns() + START_NS
            passes = [each.result() for each in [pool.submit(one, start_ns, thread) for thread in range(threads)]]
            rates.append(share * threads / (max(end for _, end, _ in passes) - min(begin for begin, _, _ in passes)))
    return statistics.median(rates[1:])     # bytes per ns are GB/s
