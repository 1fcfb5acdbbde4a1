"""What a cluster costs that does nothing: processor time, memory, and how long it takes to be ready."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from broker.inspection import region_statistics
from broker.region import attach_region
from client.bench.contention import bench_name
from client.bench.throughput import process_cpu_seconds
from client.bench.workload import Workload
from client.cluster import Cluster

# Brokers touch cold pages in the background after they are ready: that is not idling.
SETTLE_SECONDS, SETTLED_SECONDS = 30.0, 1.0


def measure_idle(workload: Workload, seconds: float = 10.0,
                 progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """CPU of all brokers over `seconds`, memory of each beside the region, start-up time.

    `ready_seconds` is from the call to all brokers answering; `command_seconds` from the start of this process, so it
    means something only when this is the first thing that it does.
    """
    started = time.monotonic()
    with Cluster(workload.cluster_config(bench_name()), exact_name=True) as cluster:
        ready_seconds = time.monotonic() - started
        command_seconds = time.time() - psutil.Process().create_time()
        pids = cluster.processes
        progress("waiting until the brokers have touched their memory")
        settle_seconds = _settle(cluster.name)
        progress(f"looking on for {seconds:g} s")
        before = {broker: process_cpu_seconds(pid) for broker, pid in pids.items()}
        begun = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - begun
        cores = {broker: (process_cpu_seconds(pid) - before[broker]) / elapsed for broker, pid in pids.items()}
        memory = {broker: private_bytes(pid) for broker, pid in pids.items()}
    return {"brokers": workload.brokers, "waiting": workload.waiting, "region_bytes": workload.region_bytes,
            "seconds": elapsed, "ready_seconds": ready_seconds, "command_seconds": command_seconds,
            "settle_seconds": settle_seconds, "cores": sum(cores.values()), "cores_by_broker": cores,
            "memory_bytes_max": max(memory.values()), "memory_bytes_by_broker": memory}


def _settle(name: str) -> float:
    """Wait until no more pages are touched; seconds."""
    started = changed = time.monotonic()
    touched = -1
    with attach_region(name, writable=False) as region:
        while time.monotonic() - changed < SETTLED_SECONDS and time.monotonic() - started < SETTLE_SECONDS:
            now = sum(each["pages_touched"] for each in region_statistics(region)["brokers"])
            if now != touched:
                touched, changed = now, time.monotonic()
            time.sleep(0.05)
    return changed - started


def private_bytes(pid: int) -> int:
    """Resident memory of a process beside what it maps of tmpfs."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) * 1024 for kib in re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB", status, re.MULTILINE))
