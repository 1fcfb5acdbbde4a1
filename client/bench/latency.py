"""How long a lone batch takes: published after a pause, waited for, nothing else in flight.

    pause ─► publish ─► sent ─► ring ─► ordered ─► acked ─► the caller's result
             └───────────────── caller ────────────────────┘
                        └────── transport ────────┘
"""

import time
from collections.abc import Callable
from typing import Any

import numpy
from numpy.typing import NDArray

from broker.region import attach_region
from client.admin import Admin
from client.bench import load, pattern
from client.bench.contention import bench_name
from client.bench.harness import wait_until_warm
from client.bench.throughput import process_cpu_seconds
from client.bench.workload import TOPIC, Workload
from client.cluster import Cluster
from client.publisher import Publisher

WARM_UP_BATCHES = 200
PERCENTILES = {"p50": 50.0, "p99": 99.0, "p999": 99.9}


def measure_latency(workload: Workload, transport: str, *, gap_seconds: float = 0.001, batches: int = 3000,
                    progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Latencies in microseconds of `batches` lone batches of one message each, `gap_seconds` after one another."""
    progress(f"{transport}: starting {workload.brokers} brokers")
    with Cluster(workload.cluster_config(bench_name()), exact_name=True) as cluster:
        topic = workload.topic_config()
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic(TOPIC, order=topic.order, ack=topic.ack, replication_factor=topic.replication_factor)
        options: dict[str, Any] = {
            "cluster": cluster.name, "transport": transport, "ack": workload.ack, "linger_ms": 0.0,
            "bootstrap": cluster.addresses[0].tcp if (transport, workload.network) == ("grpc", "tcp") else None,
            "batch_bytes": min(workload.framed_bytes, cluster.config.batch_bytes_max)}
        with attach_region(cluster.name, writable=False) as region:
            wait_until_warm(region, progress)
        with Publisher(TOPIC, **options) as publisher:
            progress(f"{transport}: {batches} batches, {gap_seconds * 1000:g} ms apart")
            _publish(publisher, workload, WARM_UP_BATCHES, gap_seconds, 0)
            publisher.take_latencies()
            pids = list(cluster.processes.values())
            cpu_seconds, started = sum(map(process_cpu_seconds, pids)), time.monotonic()
            caller = _publish(publisher, workload, batches, gap_seconds, WARM_UP_BATCHES)
            seconds = time.monotonic() - started
            cpu_seconds = sum(map(process_cpu_seconds, pids)) - cpu_seconds
            sent = publisher.take_latencies()
    return {"transport": transport, "brokers": workload.brokers, "message_bytes": workload.message_bytes,
            "order": workload.order, "ack": workload.ack, "replication_factor": workload.replication_factor,
            "waiting": workload.waiting, "network": workload.network, "gap_us": gap_seconds * 1e6, "batches": batches,
            "ack_latency_us": percentiles(caller), "sent_to_ack_us": percentiles(sent),
            "broker_cores": cpu_seconds / seconds}


def _publish(publisher: Publisher, workload: Workload, batches: int, gap_seconds: float,
             first: int) -> NDArray[numpy.int64]:
    """Publish one batch at a time; ns from the call to the result."""
    rows = numpy.zeros((1, workload.message_bytes), numpy.uint8)
    found = numpy.zeros(batches, numpy.int64)
    period = load.period_of(workload.message_bytes)
    for number in range(batches):
        pattern.fill(rows, 1, first + number, period)
        time.sleep(gap_seconds)
        started = time.perf_counter_ns()
        publisher.publish_array(rows).result()
        found[number] = time.perf_counter_ns() - started
    return found


def percentiles(nanoseconds: NDArray[numpy.int64]) -> dict[str, float | None]:
    """p50, p99, p99.9 and the largest, in microseconds; None when there is none."""
    if len(nanoseconds) == 0:
        return {**dict.fromkeys(PERCENTILES), "max": None}
    values = {name: float(numpy.percentile(nanoseconds, at)) / 1000 for name, at in PERCENTILES.items()}
    return {**values, "max": float(nanoseconds.max()) / 1000}
