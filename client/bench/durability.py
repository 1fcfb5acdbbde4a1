"""Level 2 with replication factor 2, beside writing and fdatasyncing the same bytes with the same batching, in one run.

    round:  product (publish until the last ack of level 2)  ─►  bare files (a thread each: write a group, fdatasync)

The groups of the baseline are what the product's replicas had written on average when they called fdatasync. Both write
as many new files into the same folder.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy

from broker.config import load_config
from broker.inspection import region_statistics
from broker.region import attach_region
from client.admin import Admin
from client.cluster import Cluster
from client.publisher import Publisher

MESSAGE_BYTES = 1024
BAR = 0.9
WARM_BYTES = 32 << 20
TIMEOUT_SECONDS = 120.0


def measure_durability(total_bytes: int, batch_bytes: int, *, brokers: int = 4, runs: int = 3,
                       folder: str | None = None, transport: str = "attached",
                       progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """GB/s (10^9 bytes) of both, medians of `runs` rounds after one that is not counted, and their ratio.

    `folder` is where files go (default: a temporary folder); what is made there is removed again.
    """
    root = Path(tempfile.mkdtemp(prefix="cxlmq-durability-", dir=folder))
    try:
        config = load_config(name=f"durability-{os.getpid()}", brokers=brokers, data_directory=str(root / "data"))
        with Cluster(config) as cluster:
            _product(cluster, "warm", min(total_bytes, WARM_BYTES), batch_bytes, transport)
            rounds = []
            for number in range(runs):
                progress(f"round {number + 1} of {runs}: level 2")
                product = _product(cluster, f"round-{number}", total_bytes, batch_bytes, transport)
                progress(f"round {number + 1} of {runs}: bare files, {product['bytes_per_sync']:,} bytes a sync")
                bare = _bare(root / "bare", total_bytes, batch_bytes, product["bytes_per_sync"], brokers)
                rounds.append({**product, "bare_gigabytes_per_second": bare, "ratio": product[
                    "gigabytes_per_second"] / bare})
    finally:
        shutil.rmtree(root, ignore_errors=True)
    median = {key: statistics.median(each[key] for each in rounds)
              for key in ("gigabytes_per_second", "bare_gigabytes_per_second", "ratio", "bytes_per_sync")}
    return {**median, "bar": BAR, "reached": median["ratio"] >= BAR, "bytes": total_bytes, "batch_bytes": batch_bytes,
            "brokers": brokers, "transport": transport, "rounds": rounds}


def _synced(cluster: str) -> tuple[int, int]:
    """(syncs, bytes that they made durable) of all replicas so far."""
    with attach_region(cluster, writable=False) as region:
        counted = region_statistics(region)["brokers"]
    return (sum(each["replication_syncs"] for each in counted), sum(each["replicated_bytes"] for each in counted))


def _product(cluster: Cluster, topic: str, total_bytes: int, batch_bytes: int, transport: str) -> dict[str, Any]:
    shape = max(1, batch_bytes // (MESSAGE_BYTES + 8)), MESSAGE_BYTES
    rows = numpy.random.default_rng(7).integers(0, 256, shape, numpy.uint8)
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic, ack=2, replication_factor=2)
        with Publisher(topic, cluster=cluster.name, ack=2, transport=transport, batch_bytes=batch_bytes,
                       delivery_timeout=TIMEOUT_SECONDS) as publisher:
            syncs, durable = _synced(cluster.name)
            begun = time.monotonic()
            for _ in range(max(1, total_bytes // rows.nbytes)):
                publisher.publish_array(rows)
            publisher.flush()
            seconds = time.monotonic() - begun
            after_syncs, after_durable = _synced(cluster.name)
        admin.delete_topic(topic)
    written = max(1, total_bytes // rows.nbytes) * rows.nbytes
    return {"gigabytes_per_second": written / seconds / 1e9,
            "bytes_per_sync": (after_durable - durable) // max(1, after_syncs - syncs)}


def _bare(folder: Path, total_bytes: int, batch_bytes: int, group_bytes: int, files: int) -> float:
    """GB/s of `files` threads that write their share in groups of whole batches and fdatasync each group."""
    folder.mkdir(exist_ok=True)
    data = numpy.random.default_rng(8).integers(0, 256, batch_bytes, numpy.uint8).tobytes()
    batches = max(1, round(group_bytes / batch_bytes))
    groups = max(1, total_bytes // files // (batches * batch_bytes))

    def write(number: int) -> None:
        path = folder / str(number)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            for _ in range(groups):
                os.writev(descriptor, [data] * batches)
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    begun = time.monotonic()
    with ThreadPoolExecutor(files) as threads:
        list(threads.map(write, range(files)))
    seconds = time.monotonic() - begun
    shutil.rmtree(folder)
    return groups * batches * batch_bytes * files / seconds / 1e9
