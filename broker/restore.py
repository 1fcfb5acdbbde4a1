"""Fills a new region with what a recovery plan found, before anybody else has attached to it.

    segments (payload) ──► order entries ──► frontiers ──► replicas' lines, sessions ──► topics, directory

Whoever opens a topic begins where its lines say: the sequencer behind the last position, the brokers with the segments
that the segment table says are theirs. What was recovered is on the disks already, so replicas go on behind it, but for
batches that fewer disks have than the topic wants: those are written again.
"""

import os
from typing import Any, Protocol

from broker.errors import RecoveryError
from broker.layout import LOST_BROKER_NUMBER, Layout, SessionState, TopicState
from broker.payload_places import LOST_COUNT_MAX, NoRoom, Place, Placement
from broker.placement import live_brokers, replica_brokers
from broker.records import pack, tag_of
from broker.recovery import Range, RecoveredBatch, RecoveredSession, RecoveredTopic, RecoveryPlan, write_manifest
from broker.replica_files import path_descriptor
from broker.replica_record import crc32c
from broker.segments import GRANTEE_BITS
from broker.topics import KEEP_FOREVER
from sim.cxl.clock import Clock, SystemClock
from sim.cxl.memory import Memory, Role

LINE_BYTES = 64


class NewRegion(Protocol):
    """A region that nobody uses yet."""

    layout: Layout

    @property
    def run_id(self) -> int:
        """Tells this run of the cluster from every other."""

    def memory(self, role: int) -> Memory:
        """A door to it for a role."""


class Restorer:
    """Writes topics into one region."""

    def __init__(self, region: NewRegion, lease_ns: int, clock: Clock) -> None:
        self._clock = clock
        self._region, self._layout, self._lease_ns = region, region.layout, lease_ns
        self._numbers = region.layout.numbers
        self._memory: Memory = region.memory(Role.ROLE_ADMIN)

    # ---- topics -----------------------------------------------------------------------------------------------------

    def everything(self, plan: RecoveryPlan) -> None:
        """Write all topics. What does not fit, and may be dropped, is taken off the plan. Raises `NoRoom`."""
        places = Placement(self._memory, self._layout, plan.limits).place(plan.topics)
        for place in places:
            self._topic(place)
        self._write_sessions(places)
        self._directory(len(plan.topics))

    def _topic(self, place: Place) -> None:
        topic, number, generation = place.topic, place.number, place.generation
        self._write_payload(place)
        index = self._write_entries(topic, number, generation, place.offsets)
        order = pack("TopicOrderLine", committed_index=index, committed_position=topic.end_position, epoch=1,
                     committed_bytes=sum(each.record.fields["payload_bytes"] for each in topic.batches))
        self._put(self._layout.offset_of("topic_order", number), order)
        self._put(self._layout.offset_of("topic_reclaim", number),
                  pack("TopicReclaimLine", reclaimed_position=topic.first_position))
        self._write_replica_lines(topic, number, generation, index)
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

    def _directory(self, topics: int) -> None:
        """Say how many topics there are."""
        self._put(self._layout.offset_of("directory"),
                  pack("DirectoryLine", topics_version=1, topic_generations=topics))

    def _put(self, at: int, line: bytes) -> None:
        self._memory.write_line_bytes(at, line)
        self._memory.flush_range(at, LINE_BYTES)
        self._memory.store_fence()

    # ---- payload ----------------------------------------------------------------------------------------------------

    def _write_payload(self, place: Place) -> None:
        """Copy the payloads of a topic in, and say whose its segments are."""
        for batch in place.topic.batches:
            self._copy(batch, place.offsets[batch.record.position])
        self._memory.store_fence()
        for broker, log in place.logs.items():
            for segment in log.segments:
                self._put(self._layout.offset_of("segment_line", segment), pack(
                    "SegmentLine", owner=(broker + 1) | place.number << 16 | place.generation << 32,
                    opened_ns=self._clock.wall(), end_position=place.ends.get(segment, 0)))
                self._grant(segment, broker)

    def _grant(self, segment: int, broker: int) -> None:
        """Where a leader gives segments out, let its table say so; the count of grants is set beyond it."""
        if self._layout.pool_strategy == "leader":
            for at, value in ((self._layout.offset_of("grantee", segment), (broker + 1) << GRANTEE_BITS),
                              (self._layout.offset_of("pool_grant", broker) + 8, 1)):
                self._memory.store_word(at, value)
                self._memory.flush_range(at, 8)

    def _copy(self, batch: RecoveredBatch, at: int) -> None:
        nbytes = batch.record.fields["payload_bytes"]
        with path_descriptor(batch.path) as descriptor:
            payload = os.pread(descriptor, nbytes, batch.record.payload_offset)
        if len(payload) != nbytes or crc32c(payload) != batch.record.fields["payload_crc"]:
            raise RecoveryError(folder=batch.path.parent.parent, file=str(batch.path), reason=(
                f"{batch.path} changed while it was read: no cluster may run on this folder meanwhile, and its disk "
                "must read the same twice"))
        self._memory.write_bytes(at, payload)

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

    def _write_sessions(self, places: list[Place]) -> None:
        """Sessions as if their publishers had just lost their connections: they may open the next epoch.

        The latest of each topic first: new ones need slots, too, and of the rest the log still tells.
        """
        share, brokers = self._numbers["sessions_per_broker"], self._numbers["broker_count"]
        ranked = [(rank, place.number, session, place) for place in places for rank, session in enumerate(
            sorted(place.topic.sessions, key=lambda each: -each.position))]
        for used, (_, _, session, place) in enumerate(sorted(ranked, key=lambda each: each[:2])[:share * brokers // 2]):
            # From the last slot on: brokers give out the first ones first.
            self._write_session(used % brokers * share + share - 1 - used // brokers, session, place)

    def _write_session(self, slot: int, session: RecoveredSession, place: Place) -> None:
        state = 1 << 8 | SessionState.SESSION_OPEN
        if session.in_log:
            self._put(self._layout.offset_of("session_window", slot), pack(
                "SessionWindowLine", base=session.expected, generation=1,
                in_log=[session.in_log >> 64 * word & (1 << 64) - 1 for word in range(4)]))
        self._put(self._layout.offset_of("session_progress", slot), pack(
            "SessionProgressLine", state=state, expected=session.expected, committed_messages=session.messages,
            committed_position=session.position))
        self._put(self._layout.offset_of("session", slot), pack(
            "SessionLine", state=state, client_id=session.client_id, session_epoch=session.epoch,
            topic=place.generation << 16 | place.number, ack=place.topic.options["ack"],
            opened_ns=self._clock.now(), found_from=session.found_from, found_end=session.expected))


def restore(region: NewRegion, plan: RecoveryPlan, lease_ns: int, clock: Clock | None = None) -> dict[str, Any]:
    """Fill a region that nobody else uses yet; the report. Raises `RecoveryError`.

    `recovery_check.check_limits` has found that all fits. The manifest is written last: until then the folder is as it
    was, and from then on the new region's run counts.
    """
    try:
        Restorer(region, lease_ns, clock or SystemClock()).everything(plan)
        write_manifest(plan.folder, region.run_id, plan.topics)
    except NoRoom as error:
        raise RecoveryError(folder=plan.folder, reason=f"{error}: make region_bytes larger") from error
    except OSError as error:
        raise RecoveryError(folder=plan.folder, file=error.filename, reason=(
            f"{error.filename or 'a file'}: {error.strerror or error}; what the folder has counts as before: try again "
            "when its disk is well and has room")) from error
    return plan.report()
