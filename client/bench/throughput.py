"""One measured run: a workload in, a report out.

    limits of the machine ─► cluster ─► topic ─► publisher processes ─► warm-up ─► rounds ─► report
                                                                           │          │
                                                     publish (clock on) ─► read back and verify (clock off)

A region keeps less than a run publishes, so a run is published in rounds: each is read back and verified byte by byte
before the next begins, with the same sessions all along. Only publishing is on the clock, from the first publish to the
last ack. The warm-up goes over all segments a few times where that takes no longer than a few seconds; it is verified,
and not counted.
"""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray

from broker.errors import CxlmqError
from broker.inspection import region_statistics
from broker.region import attach_region
from client.admin import Admin
from client.bench import load
from client.bench.harness import Child, LimitError, wait_until_warm
from client.bench.limit import measure_limits
from client.bench.pattern import Difference, Verifier
from client.bench.workload import TOPIC, Workload
from client.cluster import Cluster
from client.coherence import profile_report, tell_coherence
from client.subscriber import Subscriber

WARM_UP_SHARE = 0.05
WARM_UP_LAPS = 3                # each process maps each page once: brokers find other segments in each lap
WARM_UP_SECONDS = 3.0
# A publisher that is told to begin needs a moment to get the line; all begin together.
START_NS = 10_000_000
CHILD_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND, SLOWEST_BATCHES_PER_SECOND = 10e6, 200
READ_SECONDS = 30.0
LIMIT_FIELDS = ("memcpy_gigabytes_per_second", "nontemporal_gigabytes_per_second", "grpc_gigabytes_per_second")
MUTEX_FINE, MUTEX_BAD = 100, 1000       # contentions/s

Progress = Callable[[str], None]


class RunFailed(CxlmqError):
    """A run could not be finished; details: transport."""

    code = "run-failed"
    status = "INTERNAL"


def lock_advice(mode: str, contended_per_second: float) -> str:
    """What the contention of the sequencer's lock means."""
    rate = f"{contended_per_second:,.0f} contentions/s"
    if mode == "atomic":
        return f"lock-free already; {rate} for a session"
    if contended_per_second < MUTEX_FINE:
        return f"{rate}: the {mode} is fine (under {MUTEX_FINE}/s)"
    if contended_per_second > MUTEX_BAD:
        return f"{rate}: go lock-free, SEQUENCER_LOCK=atomic (over {MUTEX_BAD:,}/s)"
    return f"{rate}: either works; scripts/measure_mutex_contention.sh measures the sequencer alone"


def wanted_transports(workload: Workload) -> list[str]:
    """The transports to run."""
    return ["attached", "grpc"] if workload.transport == "both" else [workload.transport]


def measure_workload(workload: Workload, *, limits: bool = True, warm_up: bool = True,
                     progress: Progress = lambda _: None) -> dict[str, Any]:
    """Every transport and trial of a workload: `runs`, and the limits of the same run.

    Raises `RunFailed` when a run cannot be finished.
    """
    found = run_limits(workload, progress) if limits else dict.fromkeys(LIMIT_FIELDS)
    runs = []
    for transport in wanted_transports(workload):
        for trial in range(1, workload.trials + 1):
            progress(f"{transport}, trial {trial} of {workload.trials}: starting {workload.brokers} brokers")
            runs.append({**measure_run(workload, transport, found, warm_up, progress), "trial": trial})
    return {"runs": runs, "limits": found}


def run_limits(workload: Workload, progress: Progress) -> dict[str, Any]:
    """The limits that belong to a workload, with its batch size. Raises `RunFailed`."""
    batch_bytes = max(workload.batch_bytes or 1 << 20, workload.message_bytes)
    try:
        return measure_limits(batch_bytes=batch_bytes, servers=workload.brokers, publishers=workload.publishers,
                              tcp=workload.network == "tcp", progress=lambda text: progress(f"limits: {text}"))
    except LimitError as error:
        raise RunFailed(f"the limits could not be measured: {error}", transport="limits") from error


def measure_run(workload: Workload, transport: str, limits: dict[str, Any], warm_up: bool = True,
                progress: Progress = lambda _: None) -> dict[str, Any]:
    """One run on a cluster of its own. A difference in what was read back is part of the report, not an error."""
    name = f"bench-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        with Cluster(workload.cluster_config(name), exact_name=True) as cluster:
            with Admin(cluster=cluster.name) as admin:
                options = workload.topic_config()
                admin.create_topic(TOPIC, order=options.order, ack=options.ack,
                                   replication_factor=options.replication_factor)
            with Run(workload, transport, cluster, progress) as run:
                if warm_up:
                    run.warm_up()
                run.measure()
                found = run.report(limits)
    except LimitError as error:
        raise RunFailed(f"a publisher failed: {error}", transport=transport) from error
    tell_coherence(cluster.name, cluster.config.folder.parent, progress)
    return found


# ---- what is counted -----------------------------------------------------------------------------------------------


def process_cpu_seconds(pid: int) -> float:
    """Processor time of another process, all threads, to the nanosecond; 0.0 when it has gone.

    The clock's number is that of clock_getcpuclockid(3) on Linux: the complement of the pid, and "scheduler time".
    """
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return 0.0


def subtract(after: dict[str, Any], before: dict[str, Any]) -> dict[str, int]:
    """Differences of two readings of counters."""
    return {name: after[name] - before[name] for name in after}


@dataclass
class Reading:
    """The counters of a region and of its brokers' processes at one moment."""

    total: dict[str, int]
    brokers: dict[str, int]
    sequencer: dict[str, int]
    cpu_seconds: float

    @classmethod
    def take(cls, region: Any, pids: list[int]) -> "Reading":
        """Read them now."""
        statistics = region_statistics(region)
        brokers = statistics["brokers"]
        return cls(statistics["total"], {name: sum(each[name] for each in brokers) for name in brokers[0]},
                   statistics["sequencer"], sum(process_cpu_seconds(pid) for pid in pids))


@dataclass
class Totals:
    """What one phase, warm-up or measured, added up to."""

    messages: int = 0
    rounds: int = 0
    seconds: float = 0.0
    batches: int = 0
    retries: int = 0
    publisher_cpu_seconds: float = 0.0
    broker_cpu_seconds: float = 0.0
    read_seconds: float = 0.0
    read_bytes: int = 0
    verified_bytes: int = 0
    access: dict[str, int] = field(default_factory=dict)
    brokers: dict[str, int] = field(default_factory=dict)
    sequencer: dict[str, int] = field(default_factory=dict)
    latencies: list[NDArray[numpy.int64]] = field(default_factory=list)

    def count(self, answers: list[dict[str, Any]], before: Reading, after: Reading) -> None:
        """Add one round of publishing."""
        self.rounds += 1
        self.seconds += (max(each["ended_ns"] for each in answers) - min(each["started_ns"] for each in answers)) / 1e9
        self.batches += sum(each["batches"] for each in answers)
        self.retries += sum(each["retries"] for each in answers)
        self.publisher_cpu_seconds += sum(each["cpu_seconds"] for each in answers)
        self.broker_cpu_seconds += after.cpu_seconds - before.cpu_seconds
        for mine, new in ((self.access, subtract(after.total, before.total)),
                          (self.brokers, subtract(after.brokers, before.brokers)),
                          (self.sequencer, subtract(after.sequencer, before.sequencer))):
            for name, value in new.items():
                mine[name] = mine.get(name, 0) + value
        self.latencies += [numpy.array(each["latencies_ns"], numpy.int64) for each in answers]


# ---- publisher processes (client/bench/load.py) ----------------------------------------------------------------------


def ask(publisher: Child, messages: int, start_ns: int) -> None:
    """Have a publisher process publish so many messages from a moment (monotonic) on."""
    publisher.ask(json.dumps({"messages": messages, "start_ns": start_ns}))


def answer_of(publisher: Child, transport: str) -> dict[str, Any]:
    """What a publisher process says. Raises `RunFailed` when that is an error."""
    found: dict[str, Any] = json.loads(publisher.read_answer())
    if "error" in found:
        raise RunFailed(f"a publisher failed: {found['error']}", transport=transport)
    return found


# ---- the run -------------------------------------------------------------------------------------------------------


class Run:
    """The publishers and the verifier of one run, as a context manager."""

    def __init__(self, workload: Workload, transport: str, cluster: Cluster, progress: Progress) -> None:
        self._workload = workload
        self._transport = transport
        self._cluster = cluster
        self._progress = progress
        self._region = attach_region(cluster.name, writable=False)
        over_tcp = transport == "grpc" and workload.network == "tcp"
        self._bootstrap = cluster.addresses[0].tcp if over_tcp else None
        self._stack = contextlib.ExitStack()
        self._publishers: list[Child] = []
        self._verifier = Verifier(workload.publishers, workload.message_bytes, workload.order == 5,
                                  load.period_of(workload.message_bytes))
        self._warm, self._measured = Totals(), Totals()
        self._difference: Difference | None = None
        self._held_peak = 0

    def __enter__(self) -> "Run":
        self._stack.callback(self._region.close)
        try:
            self._publishers = [self._start(number) for number in range(1, self._workload.publishers + 1)]
            for publisher in self._publishers:
                answer_of(publisher, self._transport)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, number: int) -> Child:
        workload = self._workload
        settings = load.LoadSettings(
            topic=TOPIC, cluster=self._cluster.name, bootstrap=self._bootstrap, transport=self._transport,
            publisher=number, message_bytes=workload.message_bytes, batch_bytes=workload.batch_bytes, ack=workload.ack)
        share = workload.round_messages() / workload.publishers
        seconds_max = (CHILD_SECONDS + share * workload.message_bytes / SLOWEST_BYTES_PER_SECOND
                       + share / workload.batch_messages / SLOWEST_BATCHES_PER_SECOND)
        child = Child("publisher", load.MODULE, [settings.to_json()], seconds_max)
        self._stack.callback(child.close)
        return child

    # ---- phases -----------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """At least 5 % of the run, and some laps over all segments, but no longer than a few seconds of publishing."""
        workload = self._workload
        if workload.messages >= workload.segment_messages():        # fewer do not come far enough to notice
            wait_until_warm(self._region, lambda text: self._progress(f"{self._transport}: {text}"))
        wanted = max(math.ceil(WARM_UP_SHARE * workload.messages), WARM_UP_LAPS * workload.segment_messages())
        for messages in self._shares(wanted):
            if self._warm.seconds >= WARM_UP_SECONDS or self._difference is not None:
                break
            self._progress(f"{self._transport}: warm-up, {self._warm.messages:,} of {wanted:,} messages")
            self._round(self._warm, messages)

    def measure(self) -> None:
        """The measured rounds."""
        shares = list(self._shares(self._workload.messages))
        for number, messages in enumerate(shares, 1):
            if self._difference is not None:
                break
            self._progress(f"{self._transport}: round {number} of {len(shares)}")
            self._round(self._measured, messages)

    def _shares(self, messages: int) -> Iterator[int]:
        """Messages of each round, as equal as they can be."""
        rounds = math.ceil(messages / self._workload.round_messages())
        for number in range(rounds):
            yield messages * (number + 1) // rounds - messages * number // rounds

    def _round(self, totals: Totals, messages: int) -> None:
        pids = list(self._cluster.processes.values())
        before = Reading.take(self._region, pids)
        answers = self._publish(messages)
        after = Reading.take(self._region, pids)
        totals.count(answers, before, after)
        totals.messages += messages
        self._held_peak = after.sequencer["held_peak"]
        try:
            self._read_back(totals)
        except Difference as difference:
            self._difference = difference

    def _publish(self, messages: int) -> list[dict[str, Any]]:
        """All publishers at once; what each has to say."""
        start_ns = time.monotonic_ns() + START_NS
        count = len(self._publishers)
        for index, publisher in enumerate(self._publishers):
            share = messages * (index + 1) // count - messages * index // count
            ask(publisher, share, start_ns)
            self._verifier.expect(index + 1, share)
        return [answer_of(publisher, self._transport) for publisher in self._publishers]

    def _read_back(self, totals: Totals) -> None:
        """Read and verify what this round published. Raises `Difference`."""
        verifier, started = self._verifier, time.monotonic()
        verified_before = verifier.verified_bytes
        with Subscriber(TOPIC, cluster=self._cluster.name, bootstrap=self._bootstrap, start=verifier.position,
                        transport=self._transport) as subscriber:
            while verifier.missing > 0:
                batches = subscriber.fetch_batches(timeout=READ_SECONDS)
                if not batches:
                    verifier.finish()       # says what is missing
                for batch in batches:
                    verifier.check(batch.payload, batch.count, batch.position)
                    totals.read_bytes += batch.count * self._workload.message_bytes
        totals.verified_bytes += verifier.verified_bytes - verified_before
        totals.read_seconds += time.monotonic() - started

    # ---- the report -------------------------------------------------------------------------------------------------

    def report(self, limits: dict[str, Any]) -> dict[str, Any]:
        """Everything about this run; sizes in bytes, GB are 10^9 bytes of message content."""
        workload, measured = self._workload, self._measured
        total_bytes, seconds = measured.messages * workload.message_bytes, max(measured.seconds, 1e-9)
        verified = self._difference is None and measured.verified_bytes == total_bytes
        return {
            "transport": self._transport, **_settings(workload), "network": "tcp" if self._bootstrap else "unix",
            "profile_costs": profile_report(workload.profile),
            "batch_bytes": workload.batch_bytes or round(total_bytes / max(1, measured.batches)),
            "batch_bytes_mean": total_bytes / max(1, measured.batches),
            "messages": measured.messages, "batches": measured.batches, "total_bytes": total_bytes,
            "seconds": seconds, "gigabytes_per_second": total_bytes / seconds / 1e9,
            "messages_per_second": measured.messages / seconds, "batches_per_second": measured.batches / seconds,
            "ack_latency_us": _latencies(measured.latencies),
            "verified": verified, "verified_bytes": measured.verified_bytes,
            "verified_order": "per publisher" if self._verifier.ordered else "none: the topic's order promises none",
            "difference": None if self._difference is None else str(self._difference),
            "rounds": measured.rounds,
            "read_back": _read_back_report(measured),
            "warm_up": {"bytes": self._warm.messages * workload.message_bytes, "rounds": self._warm.rounds,
                        "seconds": self._warm.seconds, "verified_bytes": self._warm.verified_bytes},
            "sequencer_lock": _lock_report(workload.sequencer_lock, measured.sequencer, seconds),
            "hold_buffer_peak": self._held_peak,
            "flushes": measured.access.get("flushes", 0), "fences": measured.access.get("fences", 0),
            "flushes_per_gigabyte": measured.access.get("flushes", 0) / max(total_bytes / 1e9, 1e-9),
            "fences_per_gigabyte": measured.access.get("fences", 0) / max(total_bytes / 1e9, 1e-9),
            "cpu_seconds": {"publishers": measured.publisher_cpu_seconds, "brokers": measured.broker_cpu_seconds},
            "counters": _counters(measured), "limits": limits,
        }


def _settings(workload: Workload) -> dict[str, Any]:
    return {name: value for name, value in asdict(workload).items()
            if name not in ("transport", "trials", "sequencer_lock", "batch_bytes", "total_bytes")}


def _latencies(samples: list[NDArray[numpy.int64]]) -> dict[str, Any]:
    """Batch latencies, from sent to acked; None when the ack level has no acks."""
    merged = numpy.concatenate(samples) if samples else numpy.empty(0)
    if merged.size == 0:
        return {"p50": None, "p99": None, "p999": None, "max": None, "samples": 0}
    p50, p99, p999 = (float(value) / 1000 for value in numpy.percentile(merged, (50, 99, 99.9)))
    return {"p50": p50, "p99": p99, "p999": p999, "max": float(merged.max()) / 1000, "samples": int(merged.size)}


def _read_back_report(totals: Totals) -> dict[str, Any]:
    rate = totals.read_bytes / totals.read_seconds / 1e9 if totals.read_seconds else None
    return {"bytes": totals.read_bytes, "seconds": totals.read_seconds, "gigabytes_per_second": rate,
            "note": "reading back and verifying is not part of the publish time"}


def _lock_report(mode: str, sequencer: dict[str, int], seconds: float) -> dict[str, Any]:
    """The sequencer's lock during the measured rounds; times in microseconds."""
    contended = sequencer.get("lock_contended", 0)
    wait_ns, hold_ns = sequencer.get("lock_wait_ns", 0), sequencer.get("lock_hold_ns", 0)
    samples = sequencer.get("lock_hold_samples", 0)
    return {
        "mode": mode, "acquisitions": sequencer.get("lock_acquisitions", 0), "contended": contended,
        "contended_per_second": contended / seconds, "wait_us": wait_ns / 1000,
        "wait_us_mean": wait_ns / contended / 1000 if contended else 0.0,
        "hold_us_mean": hold_ns / samples / 1000 if samples else None,
        "advice": lock_advice(mode, contended / seconds),
    }


def _counters(totals: Totals) -> dict[str, int]:
    """What explains a slow run: full rings, missing segments, cold pages, retries."""
    names = ("batches_received", "batches_refused", "ring_full", "pool_empty", "segments_allocated", "segments_cold",
             "segments_released", "delegation_flushes", "sleeps", "wakeups", "loops", "idle_loops")
    sequencer = ("batches_ordered", "duplicates", "refused", "order_full", "damaged")
    return {**{name: totals.brokers.get(name, 0) for name in names},
            **{name: totals.sequencer.get(name, 0) for name in sequencer}, "retries": totals.retries}
