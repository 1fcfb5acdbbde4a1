"""Delegation publishes complete batches in ring order, in groups, and strands none."""

import pytest

from broker.layout import ResultStatus
from broker.records import unpack
from tests.manual_cluster import KIB, ManualCluster


def flushes(cluster: ManualCluster, broker: int = 0) -> int:
    at = cluster.layout.offset_of("broker_counters", broker)
    return unpack("BrokerCounters", cluster.memory.read_bytes(at, 192))["delegation_flushes"]


def line(cluster: ManualCluster, broker: int = 0) -> dict[str, int]:
    return cluster.record("OffsetBrokerLine", "offset_broker", 0, broker)


def test_the_frontier_passes_only_batches_that_are_complete_and_in_ring_order() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    delegation = cluster.brokers[0].delegation
    assert delegation.step_once() == 0
    for sequence in (4, 0, 2):
        assert cluster.publish(session, sequence) == 0
    assert line(cluster)["delegated"] == 0, "nothing is visible before delegation ran"
    assert delegation.step_once() == 3
    sequences = [cluster.record("BatchHeader", "ring", 0, 0, slot)["batch_sequence"] for slot in range(3)]
    assert sequences == [4, 0, 2]
    assert line(cluster)["delegated"] == line(cluster)["written"] == 3


def test_local_order_counts_the_messages_of_the_broker() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    for sequence, count in enumerate((3, 1, 5)):
        cluster.publish(session, sequence, [b"x"] * count)
    cluster.brokers[0].delegation.step_once()
    orders = [cluster.record("BatchHeader", "ring", 0, 0, slot)["local_order"] for slot in range(3)]
    assert orders == [3, 4, 9]
    assert line(cluster)["written"] == 9
    assert line(cluster)["written_bytes"] == 9 * 16


@pytest.mark.parametrize(("batches", "groups"), [(1, 1), (8, 1), (9, 2), (16, 2)])
def test_small_batches_share_a_flush_of_at_most_eight(batches: int, groups: int) -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    for sequence in range(batches):
        cluster.publish(session, sequence)
    cluster.brokers[0].delegation.step_once()
    assert flushes(cluster) == groups
    assert line(cluster)["delegated"] == batches, "the tail is published with the step"


def test_a_group_ends_at_64_kib_of_payload() -> None:
    cluster = ManualCluster(region_bytes=4 << 20, segment_bytes=64 * KIB, message_bytes_max=32 * KIB,
                            batch_bytes_max=64 * KIB)
    session = cluster.open_session(cluster.create())
    for sequence in range(6):
        cluster.publish(session, sequence, [bytes(30 * KIB)])
    cluster.brokers[0].delegation.step_once()
    assert flushes(cluster) == 2, "three batches of 30 KiB each reach 64 KiB"
    assert line(cluster)["delegated"] == 6


@pytest.mark.parametrize("count", range(1, 17))
def test_no_tail_is_stranded_however_many_batches_came(count: int) -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    for sequence in range(count):
        cluster.publish(session, sequence)
    cluster.settle()
    assert [ack.sequence for ack in cluster.take_acks(session)] == list(range(count))


def test_the_activity_line_changes_for_the_topic_that_has_news_and_for_no_other() -> None:
    cluster = ManualCluster()
    cluster.create("quiet")
    session = cluster.open_session(cluster.create("busy"))
    at = cluster.layout.offset_of("broker_activity", 0)
    before = cluster.memory.read_bytes(at, 8)
    cluster.publish(session, 0)
    cluster.brokers[0].delegation.step_once()
    after = cluster.memory.read_bytes(at, 8)
    assert [index for index in range(8) if before[index] != after[index]] == [1]


def test_256_publications_between_two_looks_are_found_by_a_look_at_everything() -> None:
    cluster = ManualCluster(ring_slot_count=256, order_entry_count=1024)
    session = cluster.open_session(cluster.create())
    cluster.settle()
    for sequence in range(256):                     # each its own group: the activity byte comes round
        cluster.publish(session, sequence)
        cluster.brokers[0].delegation.step_once()
    cluster.settle()
    assert len(cluster.order_of(session.topic)) == 256


def test_a_broker_with_a_full_ring_takes_no_more_and_goes_on_when_slots_are_free() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    statuses = [cluster.publish(session, sequence) for sequence in range(18)]
    assert statuses == [0] * 16 + [1, 1]
    cluster.settle()
    assert cluster.publish(session, 16) == 0
    cluster.settle()
    assert {ack.status for ack in cluster.take_acks(session)} == {ResultStatus.RESULT_COMMITTED}
    cluster.check_invariants()


def test_nothing_of_a_quiesced_topic_is_published_any_more() -> None:
    # A late store of a deleted topic's delegation would fall into the lines of the next topic of that number.
    cluster = ManualCluster()
    topic = cluster.create()
    session = cluster.open_session(topic)
    cluster.publish(session, 0)
    cluster.poke("TopicLine", "topic", 0, state=topic.generation << 8 | 3)
    directory = cluster.layout.offset_of("directory")
    cluster.memory.store_word(directory, cluster.memory.load_word(directory) + 1)
    for broker in cluster.brokers:
        broker.directory.step_once()
    assert line(cluster)["generation"] == 0
    before = cluster.memory.read_line_bytes(cluster.layout.offset_of("offset_broker", 0, 0))
    cluster.brokers[0].delegation.step_once()
    assert cluster.memory.read_line_bytes(cluster.layout.offset_of("offset_broker", 0, 0)) == before
