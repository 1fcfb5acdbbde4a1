"""A broker that is started again gives back what nobody needs, and nothing else: whenever a head falls, whoever writes or
views there, and whatever has become of the topic."""

import os

import pytest

from sim.cluster.door import HostControl
from tests.manual_cluster import SECOND, ManualBroker, ManualCluster, Session

PLACES = 300                        # at which the head falls, over the whole resume


def loaded(pool: str = "atomic", **numbers: int) -> tuple[ManualCluster, Session]:
    """Two brokers and a topic that both have served for some time."""
    cluster = ManualCluster(pool=pool, **numbers)
    session = cluster.open_session(cluster.create())
    for sequence in range(30):
        for _ in range(4):
            if cluster.publish(session, sequence, [bytes(1500)], broker=sequence % 2) == 0:
                break
            cluster.settle()                # the leader was asked for a segment
        cluster.settle()
    return cluster, session


def resumed(cluster: ManualCluster, broker: ManualBroker) -> ManualBroker:
    for _ in range(10):
        if broker.learn():
            return broker
    raise AssertionError("it never knew the past")


def assert_kept(cluster: ManualCluster, session: Session, batches: int) -> None:
    """Every message that is kept lies in a segment that belongs to its broker."""
    numbers, entries = cluster.layout.numbers, cluster.entries(session.topic)
    assert entries[-1]["position"] == batches - 1
    for entry in entries:
        first = (entry["payload_offset"] - numbers["segments"]) // numbers["segment_bytes"]
        last = (entry["payload_offset"] + entry["payload_bytes"] - 1 - numbers["segments"]) // numbers["segment_bytes"]
        for segment in range(first, last + 1):
            owner = cluster.record("SegmentLine", "segment_line", segment)["owner"]
            assert owner & 0xFFFF == entry["broker"] + 1, f"segment {segment} of position {entry['position']} is free"
    cluster.check_invariants()


def resume_with_a_fall(pool: str, operation: int) -> int:
    """Restart broker 1; before its `operation`-th memory operation (0: never) the head falls. How many there were."""
    cluster, session = loaded(pool)
    control = HostControl(1)
    takeovers = []
    control.call, control.call_at = lambda: takeovers.append(cluster.takeover(0)), operation
    broker = cluster.restart(1, control)
    broker.learn()
    assert control.raised is None
    count = int(control.operations)
    assert len(takeovers) == (operation != 0)
    for _ in range(3):
        broker.learn()
        broker.release.look_everywhere()
        broker.release.step_once()
    if operation:
        cluster.finish(takeovers[0])
    resumed(cluster, broker)
    cluster.settle()
    assert broker.log.topic_state(0)["ends_known"]
    assert_kept(cluster, session, 30)
    return count


@pytest.mark.parametrize("pool", ["atomic", "partitioned", "leader"])
def test_a_head_that_falls_anywhere_in_a_resume_makes_no_committed_segment_free(pool: str) -> None:
    count = resume_with_a_fall(pool, 0)
    for operation in range(1, count, max(1, count // PLACES)):
        resume_with_a_fall(pool, operation)


def test_what_nobody_needs_comes_back_after_a_fall() -> None:
    cluster, session = loaded()
    held = cluster.brokers[1].log.topic_state(0)["segments"]
    assert cluster.publish(session, 30, [bytes(8000)], broker=1) == 0       # received, and gone with the process
    control = HostControl(1)
    takeovers = []
    control.call, control.call_at = lambda: takeovers.append(cluster.takeover(0)), 400
    broker = cluster.restart(1, control)
    broker.learn()
    cluster.finish(takeovers[0])
    resumed(cluster, broker)
    cluster.settle()
    assert broker.log.topic_state(0)["segments"] <= held
    assert_kept(cluster, session, 30)


# ---- leases ----------------------------------------------------------------------------------------------------------


def attached(cluster: ManualCluster, session: Session, broker: int = 1) -> tuple[int, int, set[int]]:
    """An attached publisher of a broker: its slot, the slot's generation, and the segments that it was leased."""
    stage, numbers = cluster.brokers[broker].attach, cluster.layout.numbers
    slot, generation = stage.open(session.topic.number, session.topic.generation, session.slot, session.epoch,
                                  session.client, 1, 1, os.getpid(), 1)
    cluster.memory.store_word(cluster.layout.offset_of("attach_client", slot), 1)
    cluster.settle()
    granted = cluster.record("AttachLine", "attach_line", slot)["granted"]
    assert granted
    segments = set()
    for number in range(granted):
        at = cluster.layout.offset_of("attach_lease", slot, number)
        first = (cluster.memory.load_word(at) - numbers["segments"]) // numbers["segment_bytes"]
        segments |= set(range(first, first + cluster.memory.load_word(at + 8) // numbers["segment_bytes"]))
    return slot, generation, segments


def owners(cluster: ManualCluster, segments: set[int]) -> list[int]:
    return [cluster.memory.load_word(cluster.layout.offset_of("segment_owner", each)) for each in sorted(segments)]


def leave(cluster: ManualCluster, broker: ManualBroker, slot: int, generation: int) -> None:
    assert broker.attach.close_slot(slot, generation)
    cluster.settle()
    cluster.clock.advance(SECOND)
    cluster.settle()


@pytest.mark.parametrize("again", [False, True])
def test_leases_of_a_deleted_topic_end_with_their_client_also_after_a_restart(again: bool) -> None:
    cluster = ManualCluster(attach_slot_count=8)
    free = cluster.free_segments()
    slot, generation, segments = attached(cluster, cluster.open_session(cluster.create()))
    cluster.delete()
    cluster.settle()
    if again:                               # the number has another topic now
        cluster.create("again")
    for _ in range(3):
        broker = resumed(cluster, cluster.restart(1))
        cluster.settle()
        assert owners(cluster, segments) == [2] * len(segments)
    leave(cluster, broker, slot, generation)
    assert owners(cluster, segments) == [0] * len(segments)
    assert cluster.free_segments() == free


def test_leases_are_kept_when_the_topic_goes_while_the_broker_is_away() -> None:
    cluster = ManualCluster(attach_slot_count=8)
    topic = cluster.create()
    slot, generation, segments = attached(cluster, cluster.open_session(topic))
    cluster.poke("TopicLine", "topic", 0, state=topic.generation << 8 | 3)          # deleting
    cluster.poke("DirectoryLine", "directory", topics_version=99)
    broker = cluster.restart(1)
    broker.directory.step_once()
    assert broker.log.topic_state(0)["generation"] == 0
    cluster.poke("TopicLine", "topic", 0, state=topic.generation << 8)              # gone
    cluster.poke("DirectoryLine", "directory", topics_version=100)
    resumed(cluster, broker)
    cluster.settle()
    assert owners(cluster, segments) == [2] * len(segments)
    leave(cluster, broker, slot, generation)
    assert owners(cluster, segments) == [0] * len(segments)


# ---- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("pool", ["atomic", "partitioned", "leader"])
def test_what_an_attached_reader_views_outlives_its_topic(pool: str, restart: bool) -> None:
    cluster, session = loaded(pool)
    key = session.topic.generation << 16 | session.topic.number
    cursor, _ = drive_open(cluster, key)
    segments = {number for number in range(cluster.layout.numbers["segment_count"])
                if cluster.record("SegmentLine", "segment_line", number)["owner"]}
    cluster.delete()
    cluster.settle()
    if restart:
        resumed(cluster, cluster.restart(1))
        cluster.settle()
    kept = [cluster.record("SegmentLine", "segment_line", number)["owner"] for number in segments]
    assert all(kept)
    cluster.brokers[0].cursors.close(cursor)
    cluster.settle()
    assert not any(cluster.record("SegmentLine", "segment_line", number)["owner"] for number in segments)
    cluster.check_invariants()


def drive_open(cluster: ManualCluster, key: int) -> tuple[int, int]:
    from tests.manual_cluster import drive

    return drive(cluster.brokers[0].cursors.open(key, 0, os.getpid(), presence=1))
