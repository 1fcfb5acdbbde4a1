"""Where recovered payload goes in a new region: the same steps for the region itself and for one only thought of.

The latest batches come first, of all topics together: so when there is less room than on the disks, the topics lose
what the reclaimer would have forgotten next.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from broker.layout import Layout
from broker.recovery import Range, RecoveredBatch, RecoveredTopic
from broker.segments import AtomicPool, PartitionedPool, SegmentPool
from sim.cxl.memory import Memory

LINE_BYTES = 64
LOST_COUNT_MAX = (1 << 32) - 1
# Below such a share of free segments the reclaimer makes room: what was just restored is not to go at once.
FREE_SHARE = 16


class NoRoom(Exception):
    """A topic does not fit, and nothing of it may be dropped. The message says what."""


@dataclass
class Log:
    """Where a broker's part of a topic goes on: as `BrokerLog` does it."""

    cursor: int = 0
    end: int = 0
    segments: list[int] = field(default_factory=list)


@dataclass
class Place:
    """Where the batches of one topic are: position -> offset, and up to which position each segment goes."""

    topic: RecoveredTopic
    number: int
    generation: int
    logs: dict[int, Log]
    offsets: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)


def limits_of(numbers: dict[str, int]) -> dict[str, int]:
    """The numbers of a region that say how much of a log it can hold: written into replica files."""
    return {"pool_bytes": numbers["segment_count"] * numbers["segment_bytes"],
            **{key: numbers[key] for key in ("segment_bytes", "order_entry_count", "broker_count")}}


class Placement:
    """Places topics into the pools of a layout. `limits` are those of the regions that the log was in.

    A region that holds at least as much as those did may drop the oldest messages, as they would have next, of topics
    whose retention allows it. A smaller one may not: whoever made it smaller did not ask for that.
    """

    def __init__(self, memory: Memory, layout: Layout, limits: dict[str, int]) -> None:
        self._layout, self._numbers = layout, layout.numbers
        kind = PartitionedPool if layout.pool_strategy == "partitioned" else AtomicPool
        self._pools: list[SegmentPool] = [kind(memory, layout, broker)
                                          for broker in range(self._numbers["broker_count"])]
        self._may_drop = _as_large(limits_of(self._numbers), limits)

    def place(self, topics: list[RecoveredTopic]) -> list[Place]:
        """Find room for all batches; what was dropped is taken off the topics. Raises `NoRoom`."""
        places = [Place(topic, number, number + 1, {broker: Log() for broker in range(self._numbers["broker_count"])})
                  for number, topic in enumerate(topics)]
        # What is never dropped goes first.
        waiting: list[tuple[bool, int, int, Iterator[RecoveredBatch], RecoveredBatch]] = []

        def push(number: int, batches: Iterator[RecoveredBatch]) -> None:
            batch = next(batches, None)
            if batch is not None:
                heapq.heappush(waiting, (not self._is_kept(topics[number]), -batch.record.fields["wall_ns"], number,
                                         batches, batch))

        for number, topic in enumerate(topics):
            push(number, reversed(topic.batches))
        while waiting:
            _, _, number, batches, batch = heapq.heappop(waiting)
            if self._put(places[number], batch):
                push(number, batches)
            else:
                self._drop(topics[number], batch)
        return places

    @staticmethod
    def _is_kept(topic: RecoveredTopic) -> bool:
        return bool(topic.options["retention_bytes"] < 0)

    def _put(self, place: Place, batch: RecoveredBatch) -> bool:
        brokers, nbytes = self._numbers["broker_count"], batch.record.fields["payload_bytes"]
        broker = batch.record.fields["broker"] % brokers
        reserve = 0 if self._may_drop and self._is_kept(place.topic) else self._reserve(broker)
        at = None
        if len(place.offsets) < self._entries(place.topic):
            at = self._find(place.logs[broker], broker, nbytes, reserve)
        if at is None:
            return False
        place.offsets[batch.record.position] = at
        for segment in range(self._segment_of(at), self._segment_of(at + max(nbytes, 1) - 1) + 1):
            place.ends[segment] = max(place.ends.get(segment, 0), batch.record.end)
        return True

    def _entries(self, topic: RecoveredTopic) -> int:
        """How many batches a topic may have: the rest of the order index is for lost ranges, and to go on with."""
        entries: int = self._numbers["order_entry_count"]
        lost = sum(-(-(each.end - each.first) // LOST_COUNT_MAX) for each in topic.lost if each.reason != "no room")
        return (entries if self._may_drop else entries * 3 // 4) - lost - 1

    def _drop(self, topic: RecoveredTopic, batch: RecoveredBatch) -> None:
        """This batch and everything before it does not fit into the region."""
        if self._is_kept(topic) or not self._may_drop:
            raise NoRoom(f"the messages of topic {topic.name!r} do not fit into the region")
        lost = Range(topic.first_position, batch.record.end, "no room")
        topic.batches = [each for each in topic.batches if each.record.position >= batch.record.end]
        topic.lost = [lost, *(each for each in topic.lost if each.first >= lost.end)]
        topic.first_position = lost.end

    # ---- segments ---------------------------------------------------------------------------------------------------

    def _segment_of(self, offset: int) -> int:
        return int((offset - self._numbers["segments"]) // self._numbers["segment_bytes"])

    def _find(self, log: Log, broker: int, nbytes: int, reserve: int) -> int | None:
        """Room for a payload in a run of a broker's segments; None when too few would be left to go on with."""
        need, size = -(-nbytes // LINE_BYTES) * LINE_BYTES, self._numbers["segment_bytes"]
        if log.end and log.cursor + need > log.end:
            run = -(-(log.cursor + need - log.end) // size)
            following = self._segment_of(log.end)
            if self._pools[broker].free_count() - run >= reserve and self._pools[broker].claim_segments(following, run):
                log.segments += range(following, following + run)
                log.end += run * size
        if log.cursor + need > log.end:
            run = -(-need // size)
            first = self._pools[broker].allocate_segments(run) if (
                self._pools[broker].free_count() - run >= reserve) else -1
            if first < 0:
                return None
            log.segments += range(first, first + run)
            log.cursor = self._layout.offset_of("segment", first)
            log.end = log.cursor + run * size
        at, log.cursor = log.cursor, log.cursor + need
        return at

    def _reserve(self, broker: int) -> int:
        """Segments that must stay free, so that the cluster can go on and nothing is reclaimed for it at once."""
        longest = -(-self._numbers["batch_bytes_max"] // self._numbers["segment_bytes"])
        parted = self._layout.pool_strategy == "partitioned"
        parts = 1 if parted else self._numbers["broker_count"]
        there = self._numbers["segment_count"] // (self._numbers["broker_count"] if parted else 1)
        return int(longest + 2 * parts + there // FREE_SHARE)


def _as_large(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether a region holds what the others did; not when nobody knows what they did."""
    return all(key in theirs for key in ours) and (
        ours["pool_bytes"] >= theirs["pool_bytes"] and ours["order_entry_count"] >= theirs["order_entry_count"]
        and ours["segment_bytes"] <= theirs["segment_bytes"] and ours["broker_count"] <= theirs["broker_count"])
