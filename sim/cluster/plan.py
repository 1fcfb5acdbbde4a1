"""What a cluster of 1 to 64 hosts would do on a device: measured costs of steps, the device's latencies, queues.

    publishers ──► cores that copy ──► links ──► device ──► brokers ──► sequencer ──► acks ──► publishers

A closed network of queues: each publisher has a window of batches on their way. It is solved by mean value analysis
(Reiser and Lavenberg, 1980), so bandwidth saturates and latency rises with it. Reads and writes share the device and
cost differently.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from client.bench.limit import nontemporal_rate
from sim.cluster.costs import time_packing, time_stages
from sim.cluster.devices import write_rate
from sim.cluster.scenario import Scenario
from sim.cluster.world import World
from sim.cxl.profiles import Profile
from sim.cxl.region import private_mapping

HOST_COUNTS = (1, 2, 4, 8, 16, 32, 64)
MESSAGE_SIZES = (512, 1024, 16384)          # bytes, of the comparison with real runs
MIB, GIGA = 1 << 20, 1_000_000_000
WINDOW_BYTES, WINDOW_MAX = 16 * MIB, 64
FOOTPRINT_BYTES = 256 * MIB
REAL_RUNS = 3                               # of which the best counts: others may use the machine as well
STAGE_BATCHES, BURST = 20_000, 8
HOPS = 3                                    # header, order entry, committed frontier: each is flushed, fenced, loaded
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Costs:
    """Measured on this machine, in ns: per batch in each stage, per message and byte when packing."""

    per_batch: dict[str, float]
    packing: dict[int, float]               # message size -> ns per byte of messages
    memory_gb_s: float = math.inf           # what all cores together store around the cache

    def packing_ns_per_byte(self, message_bytes: int) -> float:
        """Between two measured sizes, linear in 1/size: a cost per message and one per byte."""
        sizes = sorted(self.packing)
        if message_bytes <= sizes[0]:
            low, high = sizes[0], sizes[min(1, len(sizes) - 1)]
        elif message_bytes >= sizes[-1]:
            return self.packing[sizes[-1]]
        else:
            low, high = next((a, b) for a, b in pairwise(sizes) if a <= message_bytes <= b)
        if low == high:
            return self.packing[low]
        share = (1 / message_bytes - 1 / high) / (1 / low - 1 / high)
        return self.packing[high] + share * (self.packing[low] - self.packing[high])


@dataclass(frozen=True)
class Station:
    """A queue: `count` alike, each batch visits one of them for `ns`."""

    name: str
    ns: float
    count: int = 1


@dataclass(frozen=True)
class Point:
    """A prediction."""

    hosts: int
    gbps: float
    batches_per_second: float
    latency_us: float
    bottleneck: str
    utilization: dict[str, float]


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure_costs(sizes: Sequence[int] = MESSAGE_SIZES, batch_bytes: int = MIB, progress: Progress = lambda _: None
                  ) -> Costs:
    """Per-step costs of this machine, medians of three."""
    progress("costs of the stages")
    stages = sorted((_stage_costs() for _ in range(3)), key=lambda each: sum(each.values()))[1]
    mapping = private_mapping(FOOTPRINT_BYTES)
    memoryview(mapping)[::4096] = bytes(FOOTPRINT_BYTES // 4096)        # its pages are present
    packing = {}
    for size in sorted({*sizes, 128, 4096, 65536}):
        progress(f"packing messages of {size} bytes")
        times = sorted(time_packing(mapping, bytes(size), max(batch_bytes, size + 64), FOOTPRINT_BYTES)
                       for _ in range(3))
        packing[size] = times[1] / (FOOTPRINT_BYTES * size / (8 + -(-size // 8) * 8))
    progress("what memory takes from all cores")
    return Costs(stages, packing, nontemporal_rate(os.cpu_count() or 1, FOOTPRINT_BYTES))


def _stage_costs() -> dict[str, float]:
    """ns per batch of each stage: one broker and the head's stages."""
    scenario = Scenario(seed=1, hosts=1, steps=1, kinds=frozenset(), faults=(), memory="mapped", ring_slots=1024,
                        entries=16384, region_bytes=8 * MIB, segment_bytes=64 << 10)
    world = World(scenario, bare=True)
    try:
        topic = world.create_topic("costs")
        host = world.hosts[0]
        opened = world.finish_at_head("a session", host.sessions.open(1, 1, topic.generation << 16 | topic.number, 1))
        stream = host.acks.open_stream(topic.number, topic.generation, 1, 1)
        stages = world.schedule.stages()
        names = [stage.split(" ")[0] for stage in world.schedule.names]
        run = [[host.receiver], [host.acks], [stream], stages, topic.number, 1, opened["slot"]]
        time_stages(*run, 0, STAGE_BATCHES // 4, BURST)
        receiving, spent = time_stages(*run, STAGE_BATCHES // 4, STAGE_BATCHES, BURST)
    finally:
        world.close()
    found = {"receiver": receiving / STAGE_BATCHES}
    for name, nanoseconds in zip(names, spent, strict=True):
        found[name] = found.get(name, 0.0) + nanoseconds / STAGE_BATCHES
    return found


# ---- the model -----------------------------------------------------------------------------------------------------


def solve(stations: Sequence[Station], batches: int, delay_ns: float = 0.0) -> tuple[float, float]:
    """Mean value analysis: (batches/s, mean ns from submit to ack) with so many batches on their way."""
    queues = [0.0] * len(stations)
    rate, response = 0.0, 0.0
    for population in range(1, batches + 1):
        times = [station.ns / station.count * (1 + queue) for station, queue in zip(stations, queues, strict=True)]
        response = sum(time * station.count for time, station in zip(times, stations, strict=True))
        rate = population / (delay_ns + response)
        queues = [rate * time for time in times]
    return rate * GIGA, response + delay_ns


def payload_of(message_bytes: int, batch_bytes: int) -> float:
    """Bytes of messages in a batch, without their framing."""
    return batch_bytes * message_bytes / (8 + -(-message_bytes // 8) * 8)


def window_of(batch_bytes: int) -> int:
    """How many batches a publisher has on their way."""
    return max(2, min(WINDOW_MAX, WINDOW_BYTES // batch_bytes))


def stations_of(costs: Costs, hosts: int, publishers: int, message_bytes: int, batch_bytes: int,
                device: Profile | None) -> list[Station]:
    """The queues that a batch goes through. Without a device: this machine, whose copies cost what was measured."""
    stage = costs.per_batch
    packing = costs.packing_ns_per_byte(message_bytes) * payload_of(message_bytes, batch_bytes)
    broker = stage["receiver"] + stage["delegation"] + stage["acks"] + stage["release"]
    sequencer = stage["scanner"] + stage["reclaim"]
    if device is None:
        return [Station("publisher's core", packing, publishers), Station("memory", batch_bytes / costs.memory_gb_s),
                Station("brokers", broker, hosts), Station("sequencer", sequencer)]
    # A batch costs a broker two loads and two rounds of flush and fence beyond what they cost here; the sequencer
    # loads a header and writes an entry and a result; with many hosts it looks at more frontiers for each batch.
    flush = device.flush_ns + device.fence_ns / BURST
    broker += 2 * device.peer_load_ns + 2 * flush
    sequencer += device.peer_load_ns + 2 * flush
    return [
        Station("publisher's core", packing, publishers),
        Station("device", batch_bytes / write_rate(device, hosts) + batch_bytes / device.read_gb_s),
        Station("brokers", broker, hosts), Station("sequencer", sequencer),
    ]


def predict(costs: Costs, hosts: int, message_bytes: int, batch_bytes: int, device: Profile | None = None,
            publishers: int | None = None, cores: int | None = None) -> Point:
    """Throughput and latency of `hosts` brokers, with as many publishers and one reader of everything a host.

    `cores` bounds what all of them may use together, for several hosts on one machine.
    """
    count = hosts if publishers is None else publishers
    stations = stations_of(costs, hosts, count, message_bytes, batch_bytes, device)
    visible = HOPS * ((device.flush_ns + device.fence_ns + device.peer_load_ns) if device else 0.0)
    polling = hosts * 2 * (device.load_ns if device else 5.0)
    rate, latency = solve(stations, count * window_of(batch_bytes), visible + polling)
    use = {station.name: rate * station.ns / station.count / GIGA for station in stations}
    if cores is not None:                   # while a core stores, it waits for memory: that is counted already
        total = sum(station.ns for station in stations if station.name != "memory") / cores
        use["cores"] = rate * total / GIGA
        if use["cores"] > 1:
            rate, latency = rate / use["cores"], latency * use["cores"]
            use = {name: share / use["cores"] for name, share in use.items()}
    return Point(hosts, rate * payload_of(message_bytes, batch_bytes) / GIGA, rate, latency / 1000,
                 max(use, key=lambda name: use[name]), use)


def curve(costs: Costs, device: Profile | None, message_bytes: int, batch_bytes: int,
          hosts: Sequence[int] = HOST_COUNTS, cores: int | None = None) -> list[Point]:
    """Predictions for several host counts."""
    return [predict(costs, count, message_bytes, batch_bytes, device, cores=cores) for count in hosts]


# ---- against real runs ---------------------------------------------------------------------------------------------


def _real_run(brokers: int, message_bytes: int, batch_bytes: int, total_bytes: int) -> float:
    """GB/s of a real cluster with one attached publisher."""
    from client.bench.throughput import LIMIT_FIELDS, measure_run
    from client.bench.workload import Workload

    workload = Workload.parse({
        "transport": "attached", "brokers": brokers, "publishers": 1, "message_bytes": message_bytes,
        "batch_bytes": batch_bytes, "total_bytes": total_bytes})
    return max(float(measure_run(workload, "attached", dict.fromkeys(LIMIT_FIELDS))["gigabytes_per_second"])
               for _ in range(REAL_RUNS))


def compare(costs: Costs, batch_bytes: int, cores: int, sizes: Sequence[int] = MESSAGE_SIZES,
            total_bytes: int = 1 << 30, progress: Progress = lambda _: None) -> list[dict[str, Any]]:
    """The prediction beside a real run of 4 brokers and an attached publisher, for several message sizes.

    What a message and a byte cost the library is taken from runs with one broker, of the smallest and the largest size.
    """
    library = {}
    for size in (min(sizes), max(sizes)):
        progress(f"what the library costs with messages of {size} bytes: one broker")
        library[size] = 1 / _real_run(1, size, batch_bytes, total_bytes)
    costs, rows = replace(costs, packing=library), []
    for size in sizes:
        progress(f"a real run of four brokers with messages of {size} bytes")
        predicted = predict(costs, 4, size, batch_bytes, None, publishers=1, cores=cores)
        measured = _real_run(4, size, batch_bytes, total_bytes)
        rows.append({"message_bytes": size, "predicted_gbps": predicted.gbps, "measured_gbps": measured,
                     "error": predicted.gbps / measured - 1, "bottleneck": predicted.bottleneck})
    return rows


def to_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For `--json`."""
    return [asdict(point) for point in points]
