"""Slots and segments come back when nobody needs them any more, never before, and whoever is in the way is named."""

from pathlib import Path

import pytest

from broker.layout import CursorState, HolderKind, ResultStatus
from broker.stages.receiver import POOL_EMPTY, RECEIVED
from tests.manual_cluster import KIB, ManualCluster, Session

SMALL = {"region_bytes": 264 * KIB, "order_entry_count": 256}


def fill(cluster: ManualCluster, session: Session, batches: int, nbytes: int = 2000, first: int = 0) -> int:
    """Publish batches until one is refused; how many were received."""
    for sequence in range(first, first + batches):
        for _ in range(4):
            status = cluster.publish(session, sequence, [bytes(nbytes)])
            cluster.settle()
            if status == RECEIVED:
                break
        else:
            assert status == POOL_EMPTY
            return sequence - first
    return batches


def holder(cluster: ManualCluster, broker: int = 0) -> tuple[HolderKind, int]:
    word = cluster.record("ReclaimAnswerLine", "reclaim_answer", broker)["holder"]
    return HolderKind(word >> 32), word & 0xFFFFFFFF


def reclaimed(cluster: ManualCluster, topic: int = 0) -> dict[str, int]:
    return cluster.record("TopicReclaimLine", "topic_reclaim", topic)


# ---- slots ---------------------------------------------------------------------------------------------------------


def test_slots_come_back_in_ring_order_and_only_with_their_result() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, [0, 2, 3])
    assert cluster.brokers[0].log.topic_state(0)["tail"] == 1
    cluster.publish_all(session, [1])
    assert cluster.brokers[0].log.topic_state(0)["tail"] == 4
    assert cluster.record("OffsetBrokerLine", "offset_broker", 0, 0)["reclaimed"] == 4


# ---- segments ------------------------------------------------------------------------------------------------------


def test_nothing_is_reclaimed_while_there_is_room() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    fill(cluster, session, 20)
    assert reclaimed(cluster)["reclaimed_index"] == 0
    assert cluster.brokers[0].log.topic_state(0)["segments"] >= 10


def test_traffic_many_times_the_region_goes_through_and_the_last_of_it_is_readable() -> None:
    cluster = ManualCluster(**SMALL)
    session = cluster.open_session(cluster.create())
    assert fill(cluster, session, 400) == 400
    read = cluster.read(cluster.reader(session.topic, reclaimed(cluster)["reclaimed_index"]))
    assert read[-1].position == 399
    assert read[0].position == reclaimed(cluster)["reclaimed_position"]
    cluster.check_invariants()


def test_segments_are_given_back_only_behind_the_reclaimed_frontier() -> None:
    cluster = ManualCluster(**SMALL)
    session = cluster.open_session(cluster.create())
    for sequence in range(200):
        fill(cluster, session, 1, first=sequence)
        reader = cluster.reader(session.topic, reclaimed(cluster)["reclaimed_index"])
        assert all(message == bytes(2000) for read in cluster.read(reader) for message in read.messages)
    cluster.check_invariants()


@pytest.mark.parametrize("pool", ["atomic", "partitioned", "leader"])
def test_every_segment_comes_back_when_the_topic_goes(pool: str) -> None:
    cluster = ManualCluster(pool=pool, **SMALL)
    for round_number in range(5):
        session = cluster.open_session(cluster.create(f"topic-{round_number}"), client=round_number + 1)
        fill(cluster, session, 60)
        cluster.publish(session, 62, [b"held"], broker=1)
        cluster.delete(f"topic-{round_number}")
        cluster.settle()
        assert sum(broker.log.topic_state(0)["segments"] for broker in cluster.brokers) == 0
        cluster.check_invariants()
    if pool != "leader":
        assert cluster.free_segments() == cluster.layout.numbers["segment_count"]


# ---- what holds the frontier ---------------------------------------------------------------------------------------


def test_a_reader_keeps_what_it_has_not_read_and_is_named() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create()
    cursor, granted = cluster.open_cursor(topic, broker=1)
    assert granted == 0
    session = cluster.open_session(topic)
    received = fill(cluster, session, 400)
    assert received < 100
    assert holder(cluster) == (HolderKind.HOLDER_CURSOR, cursor)
    reader = cluster.reader(topic)
    assert [read.position for read in cluster.read(reader)] == list(range(received))
    cluster.brokers[1].cursors.move(cursor, reader.index)
    assert fill(cluster, session, 10, first=received) == 10


def test_a_wanted_cursor_is_granted_at_or_above_the_reclaimed_frontier_and_holds_from_then_on() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create()
    session = cluster.open_session(topic)
    fill(cluster, session, 200)
    low = reclaimed(cluster)["reclaimed_index"]
    assert low > 0
    _, granted = cluster.open_cursor(topic, 0)
    assert granted == low
    fill(cluster, session, 200, first=200)
    assert reclaimed(cluster)["reclaimed_index"] == low


def test_a_cursor_that_is_only_wanted_is_held_from_its_grant_on() -> None:
    # Between the head's grant and the reader's own next store, the frontier must not pass the granted place.
    cluster = ManualCluster(**SMALL)
    topic = cluster.create()
    key = topic.generation << 16 | topic.number
    cluster.poke("CursorLine", "cursor", 0, state=1 << 8 | CursorState.CURSOR_WANTED, topic=key, index=0)
    cluster.bump(0, 6)
    assert cluster.record("CursorGrantLine", "cursor_grant", 0)["granted"] == 1
    fill(cluster, cluster.open_session(topic), 100)
    assert reclaimed(cluster)["reclaimed_index"] == 0


def test_a_reader_of_one_topic_does_not_hold_another() -> None:
    cluster = ManualCluster(**SMALL)
    held, free = cluster.create("held"), cluster.create("free")
    cluster.open_cursor(held)
    fill(cluster, cluster.open_session(held, client=1), 3)
    session = cluster.open_session(free, client=2)
    assert fill(cluster, session, 200) == 200
    assert reclaimed(cluster, held.number)["reclaimed_index"] == 0


def test_a_replica_that_is_behind_holds_the_data_and_is_named() -> None:
    cluster = ManualCluster(brokers=3, **{**SMALL, "region_bytes": 408 * KIB})
    topic = cluster.create(replication_factor=2)
    session = cluster.open_session(topic)
    received = fill(cluster, session, 400)
    assert received < 200
    assert holder(cluster)[0] == HolderKind.HOLDER_REPLICA
    for source in range(3):
        for replica in cluster.replicas(topic, source):
            cluster.poke("ReplicaLine", "replica", 0, source, replica, replicated_index=received,
                         replicated_position=received, generation=topic.generation)
    assert fill(cluster, session, 20, first=received) == 20


def test_replicas_that_keep_up_hold_nothing(tmp_path: Path) -> None:
    cluster = ManualCluster(folder=tmp_path, **SMALL)
    session = cluster.open_session(cluster.create(replication_factor=2))
    assert fill(cluster, session, 200) == 200


def test_a_topic_that_never_drops_pushes_back_and_is_named() -> None:
    cluster = ManualCluster(**SMALL)
    topic = cluster.create(retention_bytes=-1)
    received = fill(cluster, cluster.open_session(topic), 400)
    assert received < 100
    assert holder(cluster) == (HolderKind.HOLDER_RETENTION, topic.number)
    assert [read.position for read in cluster.read(cluster.reader(topic))] == list(range(received))


def test_batches_that_wait_for_their_order_are_named_when_they_fill_the_region() -> None:
    cluster = ManualCluster(**{**SMALL, "region_bytes": 232 * KIB}, message_bytes_max=4096, batch_bytes_max=8192)
    topic = cluster.create()
    session = cluster.open_session(topic)
    cluster.publish_all(session, [0])
    statuses = [cluster.publish(session, sequence, [bytes(4000)] * 2) for sequence in range(2, 18)]
    cluster.settle()
    assert POOL_EMPTY in statuses
    assert holder(cluster) == (HolderKind.HOLDER_UNCOMMITTED, topic.number)


# ---- retention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 64, 100, 1000])
def test_retention_keeps_at_least_its_bytes_and_not_much_more(nbytes: int) -> None:
    cluster = ManualCluster(region_bytes=2560 * KIB, order_entry_count=4096)
    payload = 8 + (nbytes + 7) // 8 * 8
    retention = 50 * payload
    session = cluster.open_session(cluster.create(retention_bytes=retention))
    fill(cluster, session, 400, nbytes)
    kept = [each["payload_bytes"] for each in cluster.entries(session.topic)]
    assert retention <= sum(kept) <= retention + retention // 16 + payload
    line = reclaimed(cluster)
    assert line["reclaimed_bytes"] == (400 - len(kept)) * payload
    assert line["reclaimed_position"] == 400 - len(kept)


def test_a_full_order_index_is_reclaimed_although_segments_are_free() -> None:
    cluster = ManualCluster(order_entry_count=64)
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(1000))
    assert {ack.status for ack in cluster.take_acks(session)} == {ResultStatus.RESULT_COMMITTED}
    assert cluster.reader(session.topic).frontiers()["committed_index"] == 1000
    cluster.check_invariants()


def test_pressure_of_one_topic_takes_from_the_topic_that_keeps_most() -> None:
    cluster = ManualCluster(**SMALL)
    large, small = cluster.create("large"), cluster.create("small")
    fill(cluster, cluster.open_session(large, client=1), 30)
    session, sequence = cluster.open_session(small, client=2), 0
    while not any(reclaimed(cluster, topic.number)["reclaimed_index"] for topic in (large, small)):
        sequence += fill(cluster, session, 1, 1000, first=sequence)
    assert reclaimed(cluster, large.number)["reclaimed_index"] > 0
    assert reclaimed(cluster, small.number)["reclaimed_index"] == 0


# ---- cursors are not lost ------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_while_it_waits_leaves_its_place() -> None:
    cluster = ManualCluster()
    topic = cluster.create()
    cursors = cluster.brokers[0].cursors
    cursors._announce = lambda: None            # the head does not answer
    waiting = cursors.open(topic.generation << 16 | topic.number, 0, 1)
    with pytest.raises(RuntimeError):           # it wants to sleep and has no loop
        waiting.send(None)
    assert cluster.record("CursorLine", "cursor", 0)["state"] & 0xFF == CursorState.CURSOR_FREE


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_retention_that_is_altered_counts_at_once_and_under_the_next_head(taken_over: bool) -> None:
    cluster = ManualCluster(brokers=2, region_bytes=2560 * KIB, order_entry_count=4096)
    session = cluster.open_session(cluster.create(retention_bytes=-1))
    fill(cluster, session, 100, 1000)
    if taken_over:
        cluster.take_over(1)
        cluster.settle()
    assert reclaimed(cluster)["reclaimed_index"] == 0
    cluster.alter(retention_bytes=20_000)
    cluster.settle()
    kept = sum(each["payload_bytes"] for each in cluster.entries(session.topic))
    assert 20_000 <= kept <= 23_000
    cluster.alter(retention_bytes=-1)
    fill(cluster, session, 100, 1000, first=100)
    assert sum(each["payload_bytes"] for each in cluster.entries(session.topic)) > 100_000
    cluster.take_over(0 if taken_over else 1)
    cluster.settle()
    assert (cluster.table.find("topic").retention_bytes, cluster.table.find("topic").alteration) == (-1, 2)
    assert cluster.publish(session, 200, [b"x"]) == RECEIVED
    cluster.settle()
    assert sum(each["payload_bytes"] for each in cluster.entries(session.topic)) > 100_000


def test_a_topic_that_never_drops_and_is_altered_lets_publishers_go_on() -> None:
    cluster = ManualCluster(**SMALL)
    session = cluster.open_session(cluster.create(retention_bytes=-1))
    received = fill(cluster, session, 400)
    assert received < 100
    cluster.alter(retention_bytes=0)
    assert fill(cluster, session, 200, first=received) == 200
