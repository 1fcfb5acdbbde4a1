"""Attached clients beside what memory can do: publishing from a Python loop, subscribers, cost by message size.

    limit ─► trial ─► limit ─► trial ─► ... ─► limit        each trial is held against the limits on both sides of it

One trial of each measurement comes first and is not counted. On machines that others share, a limit moves by a factor
within seconds: the ratio of a trial to its own neighbours says more than either figure.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy

from broker.errors import CxlmqError
from client.admin import Admin
from client.bench import limits, load
from client.bench.contention import bench_name
from client.bench.harness import Child, warm_mapping
from client.bench.limit import PIECE_BYTES, choose_footprint
from client.bench.throughput import READ_SECONDS, START_NS, answer_of, ask
from client.bench.workload import TOPIC, Workload
from client.cluster import Cluster
from client.publisher import Publisher
from client.subscriber import Subscriber

CALLS = ("publish", "publish_many", "publish_array")
SIZES = tuple(64 << 2 * step for step in range(9))      # 64 B to 4 MiB
BLOCK_BYTES = 1 << 20                                   # payloads that are published again and again: hot
TRIAL_BYTES, TRIAL_MESSAGES = 1 << 30, 2_000_000
SWEEP_BYTES, SWEEP_MESSAGES = 512 << 20, 400_000
CHILD_SECONDS = 120.0
LAPS = 4            # of a reader that are not counted: in each it meets segments whose pages it has not mapped yet

Progress = Callable[[str], None]


class Ceiling:
    """One core's rate over memory beyond any cache, taken again and again in a run."""

    def __init__(self, kind: str, footprint_bytes: int | None = None) -> None:
        self._kind = kind
        self._mapping = warm_mapping(footprint_bytes or choose_footprint())
        self._source = numpy.random.default_rng(1).bytes(PIECE_BYTES)
        self.taken: list[float] = []
        self.take()

    def take(self) -> float:
        """GB/s (10^9 bytes) now."""
        begun, ended, _ = limits.run_pass(self._mapping, self._source, self._kind, 0, len(self._mapping))
        self.taken.append(len(self._mapping) / (ended - begun))
        return self.taken[-1]

    def beside(self, trial: Callable[[], float]) -> tuple[float, float]:
        """Run a trial; (its GB/s, its share of the limits taken just before and after it)."""
        before = self.take()
        rate = trial()
        return rate, rate / statistics.mean((before, self.take()))


@contextmanager
def _topic(workload: Workload, progress: Progress) -> Iterator[Cluster]:
    progress(f"starting {workload.brokers} brokers")
    with Cluster(workload.cluster_config(bench_name()), exact_name=True) as cluster:
        _new_topic(workload, cluster)
        yield cluster


def _new_topic(workload: Workload, cluster: Cluster, again: bool = False) -> None:
    with Admin(cluster=cluster.name) as admin:
        if again:
            admin.delete_topic(TOPIC)
        admin.create_topic(TOPIC, order=workload.order, ack=workload.ack,
                           replication_factor=workload.replication_factor)


# ---- publishing ----------------------------------------------------------------------------------------------------


class Loop:
    """Publishes a block of different messages again and again from Python, and knows what lies at every position."""

    def __init__(self, cluster: str, transport: str, message_bytes: int, batch_bytes: int | None = None) -> None:
        self.count = max(2, BLOCK_BYTES // message_bytes)
        self.rows = numpy.random.default_rng(2).integers(0, 256, (self.count, message_bytes), numpy.uint8)
        self.payloads = [row.tobytes() for row in self.rows]
        self.published = 0
        self._cluster = cluster
        self._publisher = Publisher(TOPIC, cluster=cluster, transport=transport, batch_bytes=batch_bytes)

    def __enter__(self) -> "Loop":
        self._publisher.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._publisher.close()

    def run(self, call: str, messages: int) -> tuple[float, int]:
        """Publish whole blocks until the last ack; (seconds, messages). Raises `CxlmqError` when one got none."""
        blocks = max(1, messages // self.count)
        failed = self._publisher.statistics()["failed"]
        begun = time.perf_counter()
        if call == "publish":
            publish = self._publisher.publish
            for payload in itertools.chain.from_iterable(itertools.repeat(self.payloads, blocks)):
                publish(payload)
        elif call == "publish_many":
            for _ in range(blocks):
                self._publisher.publish_many(self.payloads)
        else:
            for _ in range(blocks):
                self._publisher.publish_array(self.rows)
        self._publisher.flush()
        seconds = time.perf_counter() - begun
        if self._publisher.statistics()["failed"] != failed:
            raise CxlmqError("messages were not acknowledged: the figures would mean nothing")
        self.published += blocks * self.count
        return seconds, blocks * self.count

    def verify(self) -> int:
        """Read what the region still keeps, up to the last message; bytes that were compared. Raises `CxlmqError`."""
        compared = 0
        with Subscriber(TOPIC, cluster=self._cluster, start="beginning") as subscriber:
            for batch in _batches(subscriber, end=self.published):
                first, messages = batch.position % self.count, batch.messages()
                due = itertools.islice(itertools.cycle(self.payloads), first, first + len(messages))
                for position, (message, payload) in enumerate(zip(messages, due, strict=True), batch.position):
                    if message != payload:
                        raise CxlmqError(f"the message at position {position} is not what was published there")
                    compared += len(message)
        return compared


def _batches(subscriber: Subscriber, *, count: int = 0, end: int = 0) -> Iterator[Any]:
    """The next `count` messages, or all up to position `end`, batch after batch without a gap. Raises `CxlmqError`."""
    due: int | None = None
    while due is None or due < end:
        batches = subscriber.fetch_batches(timeout=READ_SECONDS)
        if not batches:
            raise CxlmqError(f"nothing came for {READ_SECONDS:g} s from position {due} on")
        if due is None and count:
            end = batches[0].position + count
        for batch in batches:
            if due is not None and batch.position != due:
                raise CxlmqError(f"position {batch.position} came where {due} was due")
            due = batch.position + batch.count
            yield batch


def _loops(workload: Workload, batch_bytes: int | None, sizes: Sequence[int], calls: Sequence[str],
           progress: Progress) -> Iterator[tuple[Loop, str, int]]:
    """A loop for each size and call, on a topic of its own: its positions begin at 0."""
    with _topic(workload, progress) as cluster:
        for number, (size, call) in enumerate(itertools.product(sizes, calls)):
            progress(f"{call}, messages of {size:,} bytes")
            if number:
                _new_topic(workload, cluster, again=True)
            with Loop(cluster.name, workload.transport, size, batch_bytes) as loop:
                yield loop, call, size


def measure_publishing(workload: Workload, sizes: Sequence[int] = (128, 1024), calls: Sequence[str] = CALLS, *,
                       runs: int = 5, progress: Progress = lambda _: None) -> list[dict[str, Any]]:
    """Messages/s from a Python loop until the last ack, by call and message size; medians of `runs`."""
    ceiling = Ceiling("nontemporal")
    return [{**_calls(loop, call, size, ceiling, runs, min(TRIAL_MESSAGES, TRIAL_BYTES // size)),
             "verified_bytes": loop.verify()}
            for loop, call, size in _loops(workload, workload.batch_bytes, sizes, calls, progress)]


def measure_sizes(workload: Workload, sizes: Sequence[int] = SIZES, calls: Sequence[str] = CALLS, *, runs: int = 3,
                  progress: Progress = lambda _: None) -> dict[str, Any]:
    """Cost of a message in ns as it grows, by call, and the size from which copying is most of it."""
    ceiling = Ceiling("nontemporal")
    found = [_calls(loop, call, size, ceiling, runs, min(SWEEP_MESSAGES, SWEEP_BYTES // size))
             for loop, call, size in _loops(workload, None, sizes, calls, progress)]
    return {"rows": found, "nontemporal_gigabytes_per_second": statistics.median(ceiling.taken),
            "crossovers": {call: _crossover([row for row in found if row["call"] == call]) for call in calls}}


def _calls(loop: Loop, call: str, size: int, ceiling: Ceiling, runs: int, messages: int) -> dict[str, Any]:
    seconds_each: list[float] = []

    def trial() -> float:
        seconds, count = loop.run(call, messages)
        seconds_each.append(seconds / count)
        return count * size / seconds / 1e9

    trials = [ceiling.beside(trial) for _ in range(runs + 1)][1:]
    each = statistics.median(seconds_each[1:])
    return {"call": call, "message_bytes": size,
            "messages_per_second": 1 / each, "nanoseconds_per_message": each * 1e9,
            "gigabytes_per_second": statistics.median(rate for rate, _ in trials),
            "of_nontemporal": statistics.median(ratio for _, ratio in trials),
            "nontemporal_gigabytes_per_second": statistics.median(ceiling.taken[-2 * runs:]),
            "runs": [rate for rate, _ in trials]}


def _crossover(rows: Sequence[dict[str, Any]]) -> int | None:
    """The smallest size of which the copy alone takes at least half of the message's time."""
    return next((row["message_bytes"] for row in rows if row["of_nontemporal"] >= 0.5), None)


# ---- subscribing ---------------------------------------------------------------------------------------------------


def measure_subscribing(workload: Workload, *, runs: int = 5, progress: Progress = lambda _: None) -> dict[str, Any]:
    """A subscriber that follows a publisher, and one alone over a full region that touches every byte."""
    with ExitStack() as stack:
        cluster = stack.enter_context(_topic(workload, progress))
        settings = load.LoadSettings(
            topic=TOPIC, cluster=cluster.name, bootstrap=None, transport=workload.transport, publisher=1,
            message_bytes=workload.message_bytes, batch_bytes=workload.batch_bytes, ack=workload.ack)
        publisher = Child("publisher", load.MODULE, [settings.to_json()], CHILD_SECONDS)
        stack.callback(publisher.close)
        answer_of(publisher, workload.transport)
        progress("following a publisher")
        following = [_follow(workload, cluster.name, publisher) for _ in range(runs + 1)][1:]
        progress("alone, every byte")
        subscriber = stack.enter_context(Subscriber(TOPIC, cluster=cluster.name, transport=workload.transport,
                                                    start="end"))
        nbytes = workload.round_messages() * workload.framed_bytes
        ceiling = Ceiling("read", max(PIECE_BYTES, nbytes // PIECE_BYTES * PIECE_BYTES))
        alone = [_alone(workload, subscriber, publisher, ceiling) for _ in range(runs + LAPS)][LAPS:]
    return {"following": _medians(following), "alone": _medians(alone)}


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {**{name: statistics.median(row[name] for row in rows) for name in rows[0]}, "runs": list(rows)}


def _follow(workload: Workload, cluster: str, publisher: Child) -> dict[str, float]:
    """Batch after batch as views while the publisher runs; both rates in GB/s from the first publish on."""
    messages = workload.messages
    with Subscriber(TOPIC, cluster=cluster, transport=workload.transport, start="end") as subscriber:
        subscriber.fetch_batches(timeout=0)         # the place is taken
        ask(publisher, messages, time.monotonic_ns() + START_NS)
        for _ in _batches(subscriber, count=messages):
            pass
        ended_ns = time.monotonic_ns()
    said = answer_of(publisher, workload.transport)
    published = messages * workload.message_bytes / (said["ended_ns"] - said["started_ns"])
    followed = messages * workload.message_bytes / (ended_ns - said["started_ns"])
    return {"published_gigabytes_per_second": published, "followed_gigabytes_per_second": followed,
            "ratio": followed / published}


def _alone(workload: Workload, subscriber: Subscriber, publisher: Child, ceiling: Ceiling) -> dict[str, float]:
    """Fill what one reader may keep of the region, then read it: every byte, nobody else at work."""
    def trial() -> float:
        nbytes, begun = 0, time.perf_counter()
        for batch in _batches(subscriber, count=workload.round_messages()):
            payload = batch.payload
            limits.add_up(payload)
            nbytes += payload.nbytes
        return nbytes / (time.perf_counter() - begun) / 1e9

    subscriber.fetch_batches(timeout=0)                 # the place is taken
    ask(publisher, workload.round_messages(), time.monotonic_ns() + START_NS)
    answer_of(publisher, workload.transport)
    rate, ratio = ceiling.beside(trial)
    return {"gigabytes_per_second": rate, "read_gigabytes_per_second": rate / ratio, "ratio": ratio}


# ---- copies --------------------------------------------------------------------------------------------------------


def measure_copies(sizes: Sequence[int] = SIZES, *, runs: int = 5,
                   progress: Progress = lambda _: None) -> dict[str, Any]:
    """GB/s of every copy that ends in memory, a fence after each piece, from a hot and from a cold source."""
    mapping = warm_mapping(choose_footprint())
    random = numpy.random.default_rng(1)
    sources = {"hot": random.bytes(SIZES[-1]), "cold": random.bytes(256 << 20)}
    rows = []
    for heat, size in itertools.product(sources, sizes):
        progress(f"{heat} source, {size:,} bytes")
        source = sources[heat] if heat == "cold" else sources[heat][:max(size, PIECE_BYTES)]
        nbytes = min(len(mapping), max(32 << 20, 1024 * size)) // size * size
        rates: dict[str, list[float]] = {name: [] for name in limits.COPIES}
        for _ in range(runs + 1):                   # taken in turn, so that a busy moment meets all of them
            for name, mine in rates.items():
                begun, ended, _ = limits.run_pass(mapping, source, name, 0, nbytes, 0, size)
                mine.append(nbytes / (ended - begun))
        medians = {name: statistics.median(mine[1:]) for name, mine in rates.items()}
        rows.append({"source": heat, "bytes": size, "gigabytes_per_second": medians,
                     "best": max(medians, key=medians.__getitem__),
                     "chosen_of_best": medians[limits.CHOSEN] / max(medians.values())})
    return {"rows": rows, "chosen": limits.CHOSEN}
