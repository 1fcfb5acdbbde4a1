"""Replicas whose broker dies are kept by others, and come back to it; no head that falls, and no change, breaks a chain."""

from pathlib import Path

import pytest

from broker.layout import BrokerState, ResultStatus
from broker.recovery import make_plan
from broker.replica_files import Record, find_files, read_records
from broker.replica_watch import ReplicaWatch
from broker.stages.takeover import Takeover
from sim.cluster.door import HostControl
from tests.manual_cluster import SECOND, ManualCluster, Session


def replica_line(cluster: ManualCluster, source: int, replica: int) -> dict[str, int]:
    return cluster.record("ReplicaLine", "replica", 0, source, replica)


def beat(cluster: ManualCluster, *brokers: int) -> None:
    """Let a second pass in which these brokers are ready and beat, and the head looks."""
    for _ in range(4):
        cluster.clock.advance(SECOND // 4)
        for number in brokers:
            at = cluster.layout.offset_of("broker", number)
            cluster.memory.store_word(at, BrokerState.BROKER_READY)
            cluster.memory.store_word(at + 24, cluster.clock.now())
        cluster.watch.look()
    cluster.settle()


def watched(tmp_path: Path, **numbers: int) -> tuple[ManualCluster, Session, int, int]:
    """Three brokers whose head looks who lives, and the replicas of broker 0: that which keeps them, and the other one."""
    cluster = ManualCluster(brokers=3, folder=tmp_path, **numbers)
    cluster.watch = ReplicaWatch(cluster.memory, cluster.order.layout, cluster.clock, 3 * SECOND)
    session = cluster.open_session(cluster.create(replication_factor=2, ack=2), ack=2)
    (first,) = cluster.replicas(session.topic, 0)
    beat(cluster, 0, 1, 2)
    return cluster, session, first, 3 - first


def positions_in(folder: Path, source: int, broker: int) -> list[int]:
    found = []
    for file in find_files(folder / f"broker-{broker}"):
        for record in read_records(file) if file.source == source else ():
            assert isinstance(record, Record)
            found += range(record.position, record.end)
    return found


def stop(cluster: ManualCluster, broker: int) -> None:
    """Its process is killed: no beats, and its replica writes no more."""
    replication = cluster.brokers[broker].replication
    assert replication is not None
    replication.close()
    cluster.dead.add(broker)
    cluster.stages = [stage for stage in cluster.stages if stage not in cluster.brokers[broker].in_turn()]


def start(cluster: ManualCluster, broker: int) -> None:
    cluster.dead.discard(broker)
    resumed = cluster.restart(broker)
    while not resumed.learn():
        pass


def statuses(cluster: ManualCluster, session: Session) -> list[ResultStatus]:
    return [ack.status for ack in cluster.take_acks(session)]


def test_when_a_replica_dies_another_copies_all_that_memory_has_and_gives_it_back(tmp_path: Path) -> None:
    cluster, session, first, second = watched(tmp_path)
    cluster.publish_all(session, range(10))
    assert len(statuses(cluster, session)) == 10
    stop(cluster, first)
    cluster.publish_all(session, range(10, 13))
    beat(cluster, *({0, 1, 2} - {first}))
    assert statuses(cluster, session) == []                 # a short absence moves nothing
    assert cluster.replicas(session.topic, 0) == [first]
    for _ in range(3):
        beat(cluster, *({0, 1, 2} - {first}))
    assert cluster.replicas(session.topic, 0) == [second]
    assert statuses(cluster, session) == [ResultStatus.RESULT_COMMITTED] * 3
    assert positions_in(tmp_path, 0, second) == list(range(13))
    (note,) = [each for each in cluster.table.degraded(session.topic) if "by broker 0" in each]
    assert f"broker {first} is away: broker {second} keeps" in note
    start(cluster, first)
    beat(cluster, 0, 1, 2)
    assert cluster.replicas(session.topic, 0) == [first]
    assert cluster.table.degraded(session.topic) == []
    cluster.publish_all(session, range(13, 16))
    assert statuses(cluster, session) == [ResultStatus.RESULT_COMMITTED] * 3
    assert sorted(positions_in(tmp_path, 0, first)) == list(range(16))
    assert positions_in(tmp_path, 0, second) == list(range(13))


def test_level_two_never_counts_what_only_the_dead_replica_has(tmp_path: Path) -> None:
    cluster, session, first, second = watched(tmp_path)
    cluster.publish_all(session, range(10))
    assert len(statuses(cluster, session)) == 10
    stop(cluster, first)
    cluster.publish(session, 10)
    other = cluster.brokers[second].replication
    cluster.stages.remove(other)
    for _ in range(5):
        beat(cluster, *({0, 1, 2} - {first}))
    assert cluster.replicas(session.topic, 0) == [second]
    assert statuses(cluster, session) == []                 # chosen, and it has not begun
    cluster.stages.append(other)
    cluster.settle()
    assert statuses(cluster, session) == [ResultStatus.RESULT_COMMITTED]
    assert positions_in(tmp_path, 0, second) == list(range(11))


def test_reclaiming_goes_on_with_the_next_replica_and_recovery_finds_both(tmp_path: Path) -> None:
    cluster, session, first, _ = watched(tmp_path, order_entry_count=64)
    cluster.publish_all(session, range(60))
    stop(cluster, first)
    for _ in range(5):
        beat(cluster, *({0, 1, 2} - {first}))
    cluster.publish_all(session, range(60, 200))
    kept = cluster.reader(session.topic).frontiers()["reclaimed_index"]
    assert kept > 100
    start(cluster, first)
    beat(cluster, 0, 1, 2)
    assert replica_line(cluster, 0, first)["replicated_index"] == 200
    assert replica_line(cluster, 0, first)["failed"] == 0
    cluster.publish_all(session, range(200, 210))
    plan = make_plan(tmp_path)
    (topic,) = plan.topics
    assert not topic.lost
    assert not plan.damage
    assert topic.end_position == 210
    assert [batch.record.position for batch in topic.batches] == list(range(topic.first_position, 210))


def test_a_replica_that_did_not_see_that_it_was_replaced_goes_on_behind_what_is_gone(tmp_path: Path) -> None:
    cluster, session, first, _ = watched(tmp_path, order_entry_count=64)
    cluster.publish_all(session, range(10))
    asleep = cluster.brokers[first].replication             # its thread gets no processor; its broker does
    cluster.stages.remove(asleep)
    live = 0b111 & ~(1 << first)
    cluster.poke("HeadLine", "head", live_brokers=live)
    cluster.publish_all(session, range(10, 150))
    assert cluster.reader(session.topic).frontiers()["reclaimed_index"] > 20
    cluster.poke("HeadLine", "head", live_brokers=0b111)
    cluster.stages.append(asleep)
    cluster.settle()
    assert (replica_line(cluster, 0, first)["replicated_index"], replica_line(cluster, 0, first)["failed"]) == (150, 0)
    (topic,) = make_plan(tmp_path).topics
    assert not topic.lost


def test_a_cluster_too_small_to_replace_a_replica_keeps_what_no_disk_has_and_says_so(tmp_path: Path) -> None:
    cluster = ManualCluster(brokers=2, folder=tmp_path)
    cluster.watch = ReplicaWatch(cluster.memory, cluster.order.layout, cluster.clock, 3 * SECOND)
    session = cluster.open_session(cluster.create(replication_factor=2), ack=2)
    beat(cluster, 0, 1)
    stop(cluster, 1)
    for _ in range(5):
        beat(cluster, 0)
    cluster.publish_all(session, range(50))
    assert statuses(cluster, session) == []
    assert any("acks of level 2 wait until it is back" in each for each in cluster.table.degraded(session.topic))
    cluster.publish(session, 50)
    cluster.settle()
    assert cluster.reader(session.topic).frontiers()["reclaimed_index"] == 0
    start(cluster, 1)
    beat(cluster, 0, 1)
    assert statuses(cluster, session) == [ResultStatus.RESULT_COMMITTED] * 51
    assert positions_in(tmp_path, 0, 1) == list(range(51))


@pytest.mark.parametrize("stride", [1, 7])
def test_a_head_that_falls_anywhere_while_chains_open_breaks_none(tmp_path: Path, stride: int) -> None:
    for operation in range(stride, 2000, 37):
        folder = tmp_path / str(operation)
        cluster = ManualCluster(brokers=3, folder=folder)
        session = cluster.open_session(cluster.create(replication_factor=3, ack=2), ack=2)
        cluster.publish_all(session, range(90))
        assert len(statuses(cluster, session)) == 90
        control, takeovers = HostControl(2), list[Takeover]()
        broker = cluster.restart(2, control)
        assert broker.replication is not None
        control.call = lambda: takeovers.append(cluster.takeover(1))        # noqa: B023
        control.call_at = control.operations + operation
        for _ in range(3):
            broker.replication.step_once()
        assert control.raised is None
        if not takeovers:
            break                           # it opens chains with fewer operations
        cluster.finish(takeovers[0])
        for _ in range(3):
            broker.learn()
        cluster.settle()
        cluster.publish_all(session, range(90, 95), broker=1)
        lines = [replica_line(cluster, source, 2) for source in (0, 1)]
        assert [(line["replicated_index"], line["failed"]) for line in lines] == [(95, 0)] * 2, operation
        assert [ack.status for ack in cluster.take_acks(session, 1)] == [ResultStatus.RESULT_COMMITTED] * 5
    assert operation > 100


def test_what_a_stage_cannot_pass_on_is_raised_by_its_owner(tmp_path: Path) -> None:
    class Broken:
        def topic_appeared(self, topic: int, generation: int) -> None:
            raise ZeroDivisionError("no disk for this")

    cluster = ManualCluster(folder=tmp_path)
    cluster.brokers[1].replication.__init__(        # type: ignore[misc]
        cluster.door(1, 5), cluster.layout, 1, Broken(), cluster.clock)
    with pytest.raises(ZeroDivisionError, match="no disk for this"):
        cluster.create(replication_factor=2)
