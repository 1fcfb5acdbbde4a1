"""An ack says what it promises: level 1 is ordered in memory, level 2 is on the disk of every replica."""

import errno
import select
from pathlib import Path

import pytest

from broker.layout import ResultStatus
from broker.stages.receiver import RECEIVED, TOPIC_CLOSED, WINDOW_FULL
from tests.manual_cluster import Ack, ManualCluster, Session

COMMITTED, DUPLICATE = ResultStatus.RESULT_COMMITTED, ResultStatus.RESULT_DUPLICATE
UNDURABLE = ResultStatus.RESULT_UNDURABLE


def acked(cluster: ManualCluster, session: Session, broker: int = 0) -> list[int]:
    return [ack.sequence for ack in cluster.take_acks(session, broker)]


def every_replica(cluster: ManualCluster) -> list[tuple[int, int]]:
    """(source, replica) of every line that the topic's acks wait for."""
    topic = cluster.table.entries()[0]
    return [(source, replica) for source in range(cluster.count) for replica in cluster.replicas(topic, source)]


def replicate_by_hand(cluster: ManualCluster, position: int, lines: list[tuple[int, int]] | None = None,
                      **changes: int) -> None:
    """Write replicas' lines, as their brokers would."""
    topic = cluster.table.entries()[0]
    for source, replica in every_replica(cluster) if lines is None else lines:
        cluster.poke("ReplicaLine", "replica", topic.number, source, replica, replicated_index=position,
                     replicated_position=position, **{"generation": topic.generation, **changes})


def test_no_ack_before_the_order_is_committed() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    cluster.publish(session, 0)
    broker = cluster.brokers[0]
    assert broker.acks.step_once() == 0
    broker.delegation.step_once()
    assert broker.acks.step_once() == 0
    cluster.scanners[0].step_once()
    assert broker.acks.step_once() == 1
    assert cluster.take_acks(session) == [Ack(0, 0, COMMITTED)]


def test_an_ack_names_the_position_of_the_first_message() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    for sequence, count in enumerate((2, 3, 1)):
        cluster.publish(session, sequence, [b"m"] * count)
    cluster.settle()
    assert [(ack.sequence, ack.position) for ack in cluster.take_acks(session)] == [(0, 0), (1, 2), (2, 5)]


def test_acks_of_a_stream_come_in_the_order_of_its_batches() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    for sequence in (1, 2, 0):
        cluster.publish(session, sequence)
        cluster.settle()
    assert acked(cluster, session) == [1, 2, 0]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_level_2_waits_for_each_replica(factor: int) -> None:
    cluster = ManualCluster(brokers=4)
    session = cluster.open_session(cluster.create(ack=2, replication_factor=factor), ack=2)
    cluster.publish_all(session, range(3), broker=1)
    assert len(every_replica(cluster)) == 4 * (factor - 1)
    for line in every_replica(cluster):         # those of other sources, too: below an ack there is no hole
        assert acked(cluster, session, 1) == []
        replicate_by_hand(cluster, 3, [line])
        cluster.settle()
    assert acked(cluster, session, 1) == [0, 1, 2]


def test_level_2_acknowledges_exactly_what_is_durable() -> None:
    cluster = ManualCluster(brokers=3)
    session = cluster.open_session(cluster.create(ack=2, replication_factor=2), ack=2)
    for sequence in range(3):
        cluster.publish(session, sequence, [b"m"] * 2)
    cluster.settle()
    replicate_by_hand(cluster, 3)         # the second batch ends at position 4
    cluster.settle()
    assert acked(cluster, session) == [0]
    replicate_by_hand(cluster, 4)
    cluster.settle()
    assert acked(cluster, session) == [1]


def test_level_1_goes_on_while_level_2_waits_and_keeps_its_result_however_often_the_ring_wraps() -> None:
    cluster = ManualCluster(brokers=2)
    topic = cluster.create(ack=2, replication_factor=2)
    durable, quick = cluster.open_session(topic, client=1, ack=2), cluster.open_session(topic, client=2, ack=1)
    cluster.publish_all(durable, [0])
    cluster.publish_all(quick, range(40))
    assert acked(cluster, quick) == list(range(40))
    assert acked(cluster, durable) == []
    replicate_by_hand(cluster, 1)
    cluster.settle()
    assert acked(cluster, durable) == [0]


def test_a_slot_is_not_reused_before_its_stream_has_its_result() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    others = [stage for stage in cluster.stages if stage is not cluster.brokers[0].acks]
    received = 0
    for _ in range(40):                         # everybody works but the ack stage
        received += cluster.publish(session, received) == RECEIVED
        for stage in others:
            stage.step_once()
    cluster.settle()
    assert acked(cluster, session) == list(range(received))


def test_the_line_of_a_deleted_topics_replica_promises_nothing_to_the_next_topic() -> None:
    cluster = ManualCluster()
    first = cluster.create("first", ack=2, replication_factor=2)
    cluster.delete("first")
    session = cluster.open_session(cluster.create("second", ack=2, replication_factor=2), ack=2)
    replicate_by_hand(cluster, 100, generation=first.generation)      # a late store of the old one
    cluster.publish_all(session, [0])
    assert acked(cluster, session) == []
    replicate_by_hand(cluster, 1)
    cluster.settle()
    assert acked(cluster, session) == [0]


def test_a_duplicate_at_level_2_waits_for_the_disks_that_its_first_copy_goes_to() -> None:
    cluster = ManualCluster(brokers=4)
    session = cluster.open_session(cluster.create(ack=2, replication_factor=2), ack=2)
    cluster.publish_all(session, [0], broker=0)
    cluster.publish_all(session, [0], broker=2)
    replicate_by_hand(cluster, 1, [line for line in every_replica(cluster) if line[0] != 0])
    cluster.settle()
    assert acked(cluster, session, 2) == []
    replicate_by_hand(cluster, 1)
    cluster.settle()
    assert [(ack.sequence, ack.status) for ack in cluster.take_acks(session, 2)] == [(0, DUPLICATE)]


def test_level_2_is_refused_where_a_replica_failed_and_the_refusal_names_it(tmp_path: Path) -> None:
    cluster = ManualCluster(brokers=2, folder=tmp_path)
    (tmp_path / "broker-1").write_text("a file where the folder should be")
    session = cluster.open_session(cluster.create(ack=2, replication_factor=2), ack=2)
    cluster.publish_all(session, range(3), broker=0)
    number = cluster.record("ReplicaLine", "replica", 0, 0, 1)["failed"]
    assert [(ack.status, ack.position) for ack in cluster.take_acks(session, 0)] == [(UNDURABLE, 1 << 32 | number)] * 3
    assert number in (errno.EEXIST, errno.ENOTDIR)


def test_too_few_live_brokers_promise_nothing_at_level_2() -> None:
    cluster = ManualCluster(brokers=3)
    session = cluster.open_session(cluster.create(ack=2, replication_factor=3), ack=2)
    cluster.publish_all(session, [0])
    replicate_by_hand(cluster, 1)
    cluster.poke("HeadLine", "head", live_brokers=0b011)
    cluster.settle()
    assert acked(cluster, session) == []
    cluster.poke("HeadLine", "head", live_brokers=0b111)
    cluster.settle()
    assert acked(cluster, session) == [0]


def test_batches_of_a_deleted_topic_are_answered_and_none_goes_into_the_next_topic_of_that_number() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create("first"))
    cluster.publish_all(session, [1])           # held
    cluster.delete("first")
    cluster.settle()
    second = cluster.create("second")
    assert second.number == session.topic.number
    assert cluster.publish(session, 0) == TOPIC_CLOSED
    cluster.settle()
    assert cluster.order_of(second) == []
    assert [(ack.sequence, ack.status) for ack in cluster.take_acks(session)] == [(1, ResultStatus.RESULT_FENCED)]


def test_a_stream_whose_acks_nobody_takes_pushes_back_and_loses_none() -> None:
    cluster = ManualCluster(ring_slot_count=4096, order_entry_count=4096, region_bytes=8 << 20)
    topic = cluster.create(order=2)
    sessions = [cluster.open_session(topic, client=client) for client in range(1, 4)]
    session = sessions[0]
    sent, status = 0, RECEIVED
    while status == RECEIVED and sent < 5000:
        status = cluster.publish(session, sent)
        sent += status == RECEIVED
        if sent % 200 == 0:
            cluster.settle()
    assert status == WINDOW_FULL
    cluster.settle()
    taken = acked(cluster, session)
    cluster.settle()
    assert taken + acked(cluster, session) == list(range(sent))


def test_a_closed_stream_frees_its_slots_and_its_number() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    cluster.publish(session, 0)
    cluster.close_streams(session)
    cluster.settle()
    assert cluster.brokers[0].log.topic_state(0)["tail"] == 1
    assert cluster.open_session(session.topic, client=8).streams == {0: 0, 1: 0}


def test_what_came_is_told_once_to_the_event_loop() -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    notifier = cluster.brokers[0].notifier
    cluster.publish_all(session, range(5))
    assert select.select([notifier.fd], [], [], 0)[0]
    notifier.arm()
    assert not select.select([notifier.fd], [], [], 0)[0]
    assert acked(cluster, session) == list(range(5))
