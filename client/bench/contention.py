"""What the sequencer's lock costs: mutex, semaphore and lock-free order, over several scanner threads.

    stage alone    rings of 4 brokers filled and delegated in advance ─► N scanner threads, nothing else on the clock
    end to end     a cluster, tiny batches over gRPC: here the publisher is the bottleneck and hides the lock

Both run the product's own stages. The stage alone uses a private region, refilled outside the clock.
"""

import asyncio
import contextlib
import functools
import itertools
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from broker.assembly import Assembly, Settings
from broker.config import SEQUENCER_LOCKS, ClusterConfig, TopicConfig, load_config
from broker.inspection import region_statistics
from broker.region import Region, create_region
from broker.stages.sequencer import Scanner
from broker.topics import TopicEntry
from client.bench import sequencer_bench
from client.bench.throughput import lock_advice, measure_run, subtract
from client.bench.workload import Workload
from sim.cxl.clock import SystemClock
from sim.cxl.memory import Memory, Role

SCANNER_COUNTS = (1, 2, 4)
BROKERS = 4
TOPICS = 4                                  # one topic's order index holds a round of a few ms only
LEASE_NS = 30_000_000_000
START_NS = 3_000_000
ORDER_ENTRIES = 32768
# Scanners leave places in the order index for one another.
SPARE_ENTRIES = 64
# Fifteen messages of 256 bytes, with their 8 bytes of framing, fill a batch.
END_TO_END_MESSAGE_BYTES, END_TO_END_BATCH_MESSAGES = 256, 15
END_TO_END = {"message_bytes": END_TO_END_MESSAGE_BYTES, "batch_bytes": 4096, "region_bytes": 256 << 20,
              "transport": "grpc"}

Progress = Callable[[str], None]


@contextlib.contextmanager
def private_region(config: ClusterConfig) -> Iterator[Region]:
    """A region that nobody else attaches to, removed at the end."""
    region = create_region(config)
    try:
        yield region
    finally:
        region.unlink()
        region.close()


def bench_name() -> str:
    """A cluster name of our own."""
    return f"bench-{os.getpid()}-{secrets.token_hex(3)}"


# ---- the stage alone -----------------------------------------------------------------------------------------------


class SequencerAlone:
    """A sequencer with N scanners over the rings of `BROKERS` brokers, each with one session a topic."""

    def __init__(self, region: Region, lock: str, scanners: int) -> None:
        self._region, self._layout = region, region.layout
        settings = Settings(session_lease_ns=LEASE_NS, replica_grace_ns=LEASE_NS, scanners=scanners, lock=lock,
                            semaphore="/" + region.semaphore_name)
        self._scanners: list[Scanner] = []
        self._brokers: list[Assembly] = []
        for broker in range(self._layout.numbers["broker_count"]):
            door = functools.partial(self._door, broker=broker)
            self._brokers.append(Assembly(self._layout, broker, door, SystemClock(), settings,
                                          announced=self._look_at_tables))
        head = self._brokers[0].found()
        self._order, self._scanners = head.order, head.scanners
        self._topics, self._sessions = asyncio.run(self._open())
        self._numbers = [topic.number for topic in self._topics]
        self._sequence = 0
        self._share = (ORDER_ENTRIES - SPARE_ENTRIES) // len(self._brokers)
        self.batches = self._share * len(self._brokers) * len(self._topics)

    def _door(self, role: int, broker: int) -> Memory:
        return self._region.memory(role, self._layout.offset_of("role_statistics", broker, int(role)))

    async def _open(self) -> tuple[list[TopicEntry], dict[tuple[int, int], tuple[int, int]]]:
        """Topics, and by (topic, broker) a session's client and slot."""
        everybody = list(range(len(self._brokers)))
        topics = [await self._brokers[0].topics.create(TopicConfig(name=f"bench-{number}"), LEASE_NS, lambda: everybody)
                  for number in range(TOPICS)]
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for broker in self._brokers:
            for topic in topics:
                client = len(found) + 1
                opened = await broker.sessions.open(client, 1, topic.generation << 16 | topic.number, 1)
                found[topic.number, broker.broker] = client, opened["slot"]
        return topics, found

    def _look_at_tables(self) -> None:
        """Topics or sessions changed: whom it concerns looks."""
        for broker in self._brokers:
            broker.directory.step_once()
        for scanner in self._scanners:
            scanner.step_once()

    def run_round(self) -> int:
        """Fill the rings, let the scanners loose, take everything back; ns from the first scanner to the last."""
        before = self._committed()
        for (topic, broker), (client, slot) in self._sessions.items():
            sequencer_bench.fill_ring(self._brokers[broker].receiver, topic, client, slot, self._sequence, self._share)
            while self._brokers[broker].delegation.step_once():
                pass
        self._sequence += self._share
        start_ns = time.monotonic_ns() + START_NS
        with ThreadPoolExecutor(len(self._scanners)) as pool:
            runs = [pool.submit(sequencer_bench.run_scanner, scanner, self._numbers, start_ns)
                    for scanner in self._scanners]
            times = [run.result() for run in runs]
        if self._committed() - before != self.batches:
            raise sequencer_bench.BenchError(f"{self._committed() - before} of {self.batches} batches were ordered")
        for number in self._numbers:
            self._take_back(number)
        return int(max(end for _, end in times) - min(begin for begin, _ in times))

    def _committed(self) -> int:
        return sum(sequencer_bench.committed_index(self._order, number) for number in self._numbers)

    def _take_back(self, number: int) -> None:
        """Give all slots and segments back, as readers and the reclaimer would in time."""
        sequencer_bench.forget_committed(self._order, self._door(Role.ROLE_ADMIN, 0), number)
        for broker in self._brokers:
            broker.release.look_everywhere()
            while broker.release.step_once():
                pass
            state = broker.log.topic_state(number)
            if state["tail"] < state["head"]:
                raise sequencer_bench.BenchError(f"broker {broker.broker} did not get all its ring slots back")

    def close(self) -> None:
        """Give back what is not memory."""
        for broker in self._brokers:
            broker.close()


def measure_stage(lock: str, scanners: int, rounds: int = 20) -> dict[str, Any]:
    """The sequencer stage alone; M batches/s is the median of the rounds, the lock's counters are of all of them."""
    config = load_config(
        name=bench_name(), brokers=BROKERS, region_bytes="192MiB", topic_count_max=TOPICS, sequencer_lock=lock,
        scanners=scanners, ring_slot_count=ORDER_ENTRIES // BROKERS, order_entry_count=ORDER_ENTRIES)
    with private_region(config) as region:
        bench = SequencerAlone(region, lock, scanners)
        try:
            bench.run_round()               # touches the pages
            before = region_statistics(region)["sequencer"]
            times = [bench.run_round() for _ in range(rounds)]
            counters = subtract(region_statistics(region)["sequencer"], before)
        finally:
            bench.close()
    return {"lock": lock, "scanners": scanners, "rounds": rounds, "batches": bench.batches * rounds,
            "million_batches_per_second": bench.batches / statistics.median(times) * 1000,
            **lock_figures(lock, counters, sum(times) / 1e9)}


def lock_figures(lock: str, counters: dict[str, int], seconds: float) -> dict[str, Any]:
    """What the lock's counters say of so many seconds."""
    contended, samples = counters["lock_contended"], counters["lock_hold_samples"]
    return {
        "seconds": seconds, "acquisitions": counters["lock_acquisitions"], "contended": contended,
        "contended_per_second": contended / seconds, "wait_us": counters["lock_wait_ns"] / 1000,
        "wait_us_mean": counters["lock_wait_ns"] / contended / 1000 if contended else 0.0,
        "hold_us_mean": counters["lock_hold_ns"] / samples / 1000 if samples else None,
        "advice": lock_advice(lock, contended / seconds),
    }


# ---- end to end ----------------------------------------------------------------------------------------------------


def measure_end_to_end(lock: str, scanners: int, batches: int) -> dict[str, Any]:
    """A cluster with tiny batches over gRPC; everything is read back and verified."""
    workload = Workload.parse({**END_TO_END, "brokers": BROKERS, "sequencer_lock": lock, "scanners": scanners,
                               "total_bytes": batches * END_TO_END_BATCH_MESSAGES * END_TO_END_MESSAGE_BYTES})
    run = measure_run(workload, "grpc", {})
    lock_report = run["sequencer_lock"]
    names = ("acquisitions", "contended", "contended_per_second", "wait_us", "wait_us_mean", "hold_us_mean", "advice")
    return {"lock": lock, "scanners": scanners, "batches": run["batches"], "seconds": run["seconds"],
            "million_batches_per_second": run["batches_per_second"] / 1e6, "ack_latency_us": run["ack_latency_us"],
            "verified": run["verified"], **{name: lock_report[name] for name in names}}


def compare(locks: tuple[str, ...] = SEQUENCER_LOCKS, scanner_counts: tuple[int, ...] = SCANNER_COUNTS, *,
            end_to_end_scanners: tuple[int, ...] = SCANNER_COUNTS, rounds: int = 20, batches: int = 20_000,
            progress: Progress = lambda _: None) -> dict[str, Any]:
    """All locks over all scanner counts, the stage alone and (unless `batches` is 0) end to end."""
    stage, end_to_end = [], []
    for scanners, lock in itertools.product(scanner_counts, locks):
        progress(f"the stage alone: {lock}, {scanners} scanners")
        stage.append(measure_stage(lock, scanners, rounds))
    for scanners, lock in itertools.product(end_to_end_scanners if batches else (), locks):
        progress(f"end to end: {lock}, {scanners} scanners")
        end_to_end.append(measure_end_to_end(lock, scanners, batches))
    return {"stage_alone": stage, "end_to_end": end_to_end, "brokers": BROKERS}
