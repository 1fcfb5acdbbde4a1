"""Fills a new region with what a recovery plan found, before anybody else has attached to it.

    segments (payload) ──► order entries ──► frontiers ──► replicas' lines, sessions ──► topics, directory

Whoever opens a topic begins where its lines say: the sequencer behind the last position, the brokers with the segments
that the segment table says are theirs. What was recovered is on the disks already, so replicas go on behind it, but for
batches that fewer disks have than the topic wants: those are written again.
"""

import os
import time
from dataclasses import dataclass, field
from typing import Any

from broker.errors import RecoveryError
from broker.layout import LOST_BROKER_NUMBER, SessionState, TopicState
from broker.placement import live_brokers, replica_brokers
from broker.records import pack, tag_of
from broker.recovery import Range, RecoveredBatch, RecoveredTopic, RecoveryPlan, write_manifest
from broker.region import Region
from broker.replica_files import path_descriptor
from broker.segments import GRANTEE_BITS, AtomicPool, PartitionedPool, SegmentPool
from broker.topics import KEEP_FOREVER
from sim.cxl.memory import Memory, Role

LINE_BYTES = 64
LOST_COUNT_MAX = (1 << 32) - 1


@dataclass
class _Log:
    """Where a broker's part of a topic goes on: as `BrokerLog` does it."""

    cursor: int = 0
    end: int = 0
    segments: list[int] = field(default_factory=list)


class Restorer:
    """Writes topics into one region."""

    def __init__(self, region: Region, lease_ns: int) -> None:
        self._region, self._layout, self._lease_ns = region, region.layout, lease_ns
        self._numbers = region.layout.numbers
        self._memory: Memory = region.memory(Role.ROLE_ADMIN)
        kind = PartitionedPool if region.layout.pool_strategy == "partitioned" else AtomicPool
        self._pools: list[SegmentPool] = [kind(self._memory, region.layout, broker)
                                          for broker in range(self._numbers["broker_count"])]
        self._sessions_used = 0

    # ---- topics -----------------------------------------------------------------------------------------------------

    def topic(self, topic: RecoveredTopic, number: int, generation: int) -> None:
        """Write one topic. What does not fit is taken off the plan, at its beginning."""
        places = self._place(topic, number, generation)
        index = self._write_entries(topic, number, generation, places)
        order = pack("TopicOrderLine", committed_index=index, committed_position=topic.end_position, epoch=1,
                     committed_bytes=sum(each.record.fields["payload_bytes"] for each in topic.batches))
        self._put(self._layout.offset_of("topic_order", number), order)
        self._put(self._layout.offset_of("topic_reclaim", number),
                  pack("TopicReclaimLine", reclaimed_position=topic.first_position))
        self._write_replica_lines(topic, number, generation, index)
        self._write_sessions(topic, number, generation)
        self._write_topic_line(topic, number, generation)

    def _write_topic_line(self, topic: RecoveredTopic, number: int, generation: int) -> None:
        options = topic.options
        self._memory.write_bytes(self._layout.offset_of("topic_name", number), pack("TopicName", text=topic.name))
        self._memory.store_fence()
        retention = options["retention_bytes"]
        self._put(self._layout.offset_of("topic", number), pack(
            "TopicLine", state=generation << 8 | TopicState.TOPIC_ACTIVE, order=options["order"], ack=options["ack"],
            alteration=options.get("alteration", 0), replication_factor=options["replication_factor"],
            retention_bytes=KEEP_FOREVER if retention < 0 else retention, created_wall_ns=options["created_ns"],
            message_bytes_max=self._numbers["message_bytes_max"], lease_ns=self._lease_ns))

    def directory(self, topics: int) -> None:
        """Say how many topics there are."""
        self._put(self._layout.offset_of("directory"),
                  pack("DirectoryLine", topics_version=1, topic_generations=topics))

    def _put(self, at: int, line: bytes) -> None:
        self._memory.write_line_bytes(at, line)
        self._memory.flush_range(at, LINE_BYTES)
        self._memory.store_fence()

    # ---- payload ----------------------------------------------------------------------------------------------------

    def _place(self, topic: RecoveredTopic, number: int, generation: int) -> dict[int, int]:
        """Copy the payloads in, the latest first as long as there is room; position -> offset."""
        brokers, places = self._numbers["broker_count"], dict[int, int]()
        logs: dict[int, _Log] = {broker: _Log() for broker in range(brokers)}
        ends: dict[int, int] = {}
        room = self._numbers["order_entry_count"] * 3 // 4 - 2 * len(topic.lost) - 1
        for batch in reversed(topic.batches):
            broker = batch.record.fields["broker"] % brokers
            nbytes = batch.record.fields["payload_bytes"]
            at = self._reserve(logs[broker], broker, nbytes) if len(places) < room else None
            if at is None:
                self._forget(topic, batch)
                break
            self._copy(batch, at)
            places[batch.record.position] = at
            for segment in range(self._segment_of(at), self._segment_of(at + nbytes - 1) + 1):
                ends[segment] = max(ends.get(segment, 0), batch.record.end)
        self._memory.store_fence()
        for broker, log in logs.items():
            for segment in log.segments:
                self._put(self._layout.offset_of("segment_line", segment), pack(
                    "SegmentLine", owner=(broker + 1) | number << 16 | generation << 32, opened_ns=time.time_ns(),
                    end_position=ends.get(segment, 0)))
                self._grant(segment, broker)
        return places

    def _grant(self, segment: int, broker: int) -> None:
        """Where a leader gives segments out, let its table say so; the count of grants is set beyond it."""
        if self._layout.pool_strategy == "leader":
            for at, value in ((self._layout.offset_of("grantee", segment), (broker + 1) << GRANTEE_BITS),
                              (self._layout.offset_of("pool_grant", broker) + 8, 1)):
                self._memory.store_word(at, value)
                self._memory.flush_range(at, 8)

    def _forget(self, topic: RecoveredTopic, batch: RecoveredBatch) -> None:
        """This batch and everything before it does not fit into the region."""
        if topic.options["retention_bytes"] < 0:
            raise RecoveryError(folder=batch.path.parent.parent, reason=(
                f"topic {topic.name!r} never drops messages, and they do not fit into the region: make region_bytes "
                "larger"))
        lost = Range(topic.first_position, batch.record.end, "no room")
        topic.batches = [each for each in topic.batches if each.record.position >= batch.record.end]
        topic.lost = [lost, *(each for each in topic.lost if each.first >= lost.end)]
        topic.first_position = lost.end

    def _copy(self, batch: RecoveredBatch, at: int) -> None:
        with path_descriptor(batch.path) as descriptor:
            self._memory.write_bytes(at, os.pread(descriptor, batch.record.fields["payload_bytes"],
                                                  batch.record.payload_offset))

    def _segment_of(self, offset: int) -> int:
        return int((offset - self._numbers["segments"]) // self._numbers["segment_bytes"])

    def _reserve(self, log: _Log, broker: int, nbytes: int) -> int | None:
        """Room for a payload in a run of a broker's segments; None when too few would be left to go on with."""
        need, size = -(-nbytes // LINE_BYTES) * LINE_BYTES, self._numbers["segment_bytes"]
        if log.end and log.cursor + need > log.end:
            run = -(-(log.cursor + need - log.end) // size)
            following = self._segment_of(log.end)
            if self._has_room(broker, run) and self._pools[broker].claim_segments(following, run):
                log.segments += range(following, following + run)
                log.end += run * size
        if log.cursor + need > log.end:
            run = -(-need // size)
            first = self._pools[broker].allocate_segments(run) if self._has_room(broker, run) else -1
            if first < 0:
                return None
            log.segments += range(first, first + run)
            log.cursor = self._layout.offset_of("segment", first)
            log.end = log.cursor + run * size
        at, log.cursor = log.cursor, log.cursor + need
        return at

    def _has_room(self, broker: int, run: int) -> bool:
        """Whether enough segments are left to go on with when these are taken."""
        longest = -(-self._numbers["batch_bytes_max"] // self._numbers["segment_bytes"])
        parts = 1 if self._layout.pool_strategy == "partitioned" else self._numbers["broker_count"]
        return bool(self._pools[broker].free_count() - run >= longest + 2 * parts)

    # ---- order, replicas, sessions ------------------------------------------------------------------------------

    def _write_entries(self, topic: RecoveredTopic, number: int, generation: int, places: dict[int, int]) -> int:
        """Batches and lost ranges, one entry each, by position; how many entries that are."""
        index = 0

        def write(**fields: int) -> None:
            nonlocal index
            at = self._layout.offset_of("order_entry", number, index)
            self._memory.write_line_bytes(at, pack("OrderEntry", commit=tag_of(generation, index), **fields))
            self._memory.flush_range(at, LINE_BYTES)
            index += 1

        every: list[RecoveredBatch | Range] = [*topic.batches, *(each for each in topic.lost
                                                                 if each.first >= topic.first_position)]
        for each in sorted(every, key=lambda each: each.first if isinstance(each, Range) else each.record.position):
            if isinstance(each, Range):
                for first in range(each.first, each.end, LOST_COUNT_MAX):
                    write(position=first, message_count=min(each.end - first, LOST_COUNT_MAX),
                          broker=LOST_BROKER_NUMBER)
                continue
            fields = each.record.fields
            write(position=each.record.position, payload_offset=places[each.record.position],
                  payload_bytes=fields["payload_bytes"], message_count=fields["message_count"],
                  client_id=fields["client_id"], batch_sequence=fields["batch_sequence"],
                  session_epoch=fields["session_epoch"], broker=fields["broker"] % self._numbers["broker_count"],
                  epoch=fields["epoch"], wall_ns=fields["wall_ns"])
        self._memory.store_fence()
        return index

    def _write_replica_lines(self, topic: RecoveredTopic, number: int, generation: int, entries: int) -> None:
        """Say what is on the disks already, for each source up to its first batch that lacks a copy."""
        factor, brokers = topic.options["replication_factor"], self._numbers["broker_count"]
        live = live_brokers(self._memory, self._layout)
        for source in range(brokers if factor > 1 else 0):
            index, position = entries, topic.end_position
            for at, each in enumerate(topic.batches):
                if each.copies < factor - 1 and each.record.fields["broker"] % brokers == source:
                    before = sum(1 for lost in topic.lost
                                 if topic.first_position <= lost.first < each.record.position)
                    index, position = at + before, each.record.position
                    break
            for replica in replica_brokers(number, generation, source, live, brokers, factor):
                self._put(self._layout.offset_of("replica", number, source, replica), pack(
                    "ReplicaLine", replicated_index=index, replicated_position=position, generation=generation))

    def _write_sessions(self, topic: RecoveredTopic, number: int, generation: int) -> None:
        """Sessions as if their publishers had just lost their connections: they may open the next epoch."""
        share, brokers = self._numbers["sessions_per_broker"], self._numbers["broker_count"]
        for session in sorted(topic.sessions, key=lambda each: -each.position):
            if self._sessions_used >= share * brokers // 2:
                return                          # new ones need slots; of the rest the log still tells
            # From the last slot on: brokers give out the first ones first.
            slot = self._sessions_used % brokers * share + share - 1 - self._sessions_used // brokers
            self._sessions_used += 1
            state = 1 << 8 | SessionState.SESSION_OPEN
            self._put(self._layout.offset_of("session_progress", slot), pack(
                "SessionProgressLine", state=state, expected=session.expected, committed_messages=session.messages,
                committed_position=session.position))
            self._put(self._layout.offset_of("session", slot), pack(
                "SessionLine", state=state, client_id=session.client_id, session_epoch=session.epoch,
                topic=generation << 16 | number, ack=topic.options["ack"], opened_ns=time.monotonic_ns()))


def restore(region: Region, plan: RecoveryPlan, lease_ns: int) -> dict[str, Any]:
    """Fill a region that nobody else uses yet; the report. Raises `RecoveryError`.

    The manifest is written last: until then the folder is as it was, and from then on the new region's run counts.
    """
    numbers = region.layout.numbers
    if len(plan.topics) > numbers["topic_count_max"]:
        raise RecoveryError(folder=plan.folder, reason=f"it has {len(plan.topics)} topics, and topic_count_max is "
                                                       f"{numbers['topic_count_max']}")
    wanted = max((topic.options["replication_factor"] for topic in plan.topics), default=1)
    if wanted > numbers["broker_count"]:
        raise RecoveryError(folder=plan.folder, reason=f"a topic has replication factor {wanted}: start at least "
                                                       f"{wanted} brokers")
    restorer = Restorer(region, lease_ns)
    for number, topic in enumerate(plan.topics):
        restorer.topic(topic, number, number + 1)
    restorer.directory(len(plan.topics))
    write_manifest(plan.folder, region.run_id, plan.topics)
    return plan.report()
