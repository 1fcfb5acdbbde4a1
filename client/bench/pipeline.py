"""The native pipeline alone: from a batch header in the ring to its ack, no gRPC and no Python on the way.

    feeder (native publishers) ─► rings ─► delegation ─► sequencer ─► acks ─► feeder
                                  all brokers' own thread plans, in one process

Shows that a batch costs the same with 1 broker or 8, with 1 topic or 64. The load grows with the cluster: as many
publishers as brokers, and at least one a topic, each with its batches striped over all brokers.
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from broker.config import TopicConfig, load_config
from broker.layout import BrokerState
from broker.node import BrokerNode
from client.bench.contention import LEASE_NS, bench_name, private_region
from client.bench.sequencer_bench import BATCH_BYTES, Feeder

BROKER_COUNTS = (1, 2, 4, 8)
TOPIC_COUNTS = (1, 4, 16, 64)
WINDOW = 64

Progress = Callable[[str], None]


@contextlib.contextmanager
def running_nodes(brokers: int, topics: int, **settings: Any) -> Iterator[tuple[list[BrokerNode], Feeder]]:
    """All brokers of a cluster in this process, without gRPC, and a feeder whose lanes cover topics and brokers."""
    config = load_config(name=bench_name(), brokers=brokers, **settings)
    with private_region(config) as region:
        nodes = [BrokerNode(config, broker, region, founder=broker == 0) for broker in range(brokers)]
        try:
            nodes[0].leadership.tick()
            assert nodes[0].is_head, "nobody else is there to be it"
            for node in nodes:
                node.start()
                node.write_line(BrokerState.BROKER_READY)
            lanes = asyncio.run(_open_lanes(nodes, topics))
            yield nodes, Feeder([node.receiver for node in nodes], [node.acks for node in nodes], lanes, WINDOW)
        finally:
            for node in nodes:
                node.stop()
                node.notifier.close()


async def _open_lanes(nodes: list[BrokerNode], topics: int) -> list[tuple[int, int, int, int]]:
    """Topics and sessions: (topic, generation, client, session slot) of each lane."""
    head = nodes[0]
    entries = [await head.topics.create(TopicConfig(name=f"bench-{number}"), LEASE_NS, lambda: list(range(len(nodes))))
               for number in range(topics)]
    lanes = []
    for number in range(max(topics, len(nodes))):
        entry = entries[number % topics]
        opened = await head.sessions.open(number + 1, 1, entry.generation << 16 | entry.number, 1)
        lanes.append((entry.number, entry.generation, number + 1, opened["slot"]))
    return lanes


def measure_pipeline(brokers: int = 4, topics: int = 1, batches: int = 200_000, runs: int = 3,
                     **settings: Any) -> dict[str, Any]:
    """Batches/s and cost per batch, medians of `runs` after a warm-up. `settings` are the cluster's.

    Raises `client.bench.sequencer_bench.BenchError` when batches are refused or acks do not come.
    """
    lanes = max(brokers, topics)
    each = max(1, batches // lanes)
    with running_nodes(brokers, topics, **settings) as (_, feeder):
        feeder.run(max(1, each // 4))
        elapsed, cpu = [], []
        for _ in range(runs):
            cpu_ns = time.process_time_ns()
            elapsed.append(feeder.run(each))
            cpu.append(time.process_time_ns() - cpu_ns)
        pushed_back = feeder.pushed_back
    count = each * lanes
    return {"brokers": brokers, "topics": topics, "batches": count, "runs": runs, "payload_bytes": BATCH_BYTES,
            "batches_per_second": count / statistics.median(elapsed) * 1e9,
            "ns_per_batch": statistics.median(elapsed) / count, "cpu_ns_per_batch": statistics.median(cpu) / count,
            "pushed_back": pushed_back}


def measure_matrix(broker_counts: Sequence[int] = BROKER_COUNTS, topic_counts: Sequence[int] = TOPIC_COUNTS, *,
                   batches: int = 200_000, runs: int = 3, progress: Progress = lambda _: None) -> dict[str, Any]:
    """One topic over several broker counts, four brokers over several topic counts."""
    cases = [(brokers, 1) for brokers in broker_counts] + [(4, topics) for topics in topic_counts if topics != 1]
    results = []
    for brokers, topics in cases:
        progress(f"{brokers} brokers, {topics} topics")
        results.append(measure_pipeline(brokers, topics, batches, runs))
    costs = [each["cpu_ns_per_batch"] for each in results]
    return {"results": results, "cpu_cost_spread": max(costs) / min(costs)}
