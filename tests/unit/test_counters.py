"""No counter has an end that a cluster meets: each is begun just before a power of two that some word has room for."""

import itertools
from pathlib import Path

import pytest

from broker.layout import ControlBits, ResultStatus
from broker.records import pack
from broker.recovery import make_plan
from broker.segments import PoolLeader, make_pool
from sim.cxl.memory import Role
from tests.manual_cluster import ManualCluster, Session

ENDS = [(1 << 32) - 20, (1 << 40) - 20, (1 << 48) - 20, (1 << 48) + (1 << 40) - 9, (1 << 56) - 3, (1 << 62) - 50]


def assert_whole(cluster: ManualCluster, session: Session, start: int, batches: int) -> None:
    """Batches 0, 1, 2, ... of one message each stand at `start`, `start` + 1, ...; all that is kept is readable."""
    cluster.check_invariants()
    frontiers = cluster.reader(session.topic).frontiers()
    assert frontiers["committed_position"] == frontiers["committed_index"] == start + batches
    entries = cluster.entries(session.topic)
    assert [entry["position"] - start for entry in entries] == [entry["batch_sequence"] for entry in entries]
    read = cluster.read(cluster.reader(session.topic, frontiers["reclaimed_index"]))
    assert [each.position for each in read] == list(range(frontiers["reclaimed_position"], start + batches))


@pytest.mark.parametrize("lock", ["atomic", "mutex"])
@pytest.mark.parametrize("scanners", [1, 2])
@pytest.mark.parametrize("start", ENDS)
def test_slots_positions_and_indexes_pass_every_power_of_two(start: int, scanners: int, lock: str) -> None:
    cluster = ManualCluster(scanners=scanners, lock=lock, counters_start=start)
    session = cluster.open_session(cluster.create())
    for sequence in range(120):
        cluster.publish_all(session, [sequence], broker=sequence // 3 % 2)
    acks = sorted(itertools.chain(*(cluster.take_acks(session, broker) for broker in (0, 1))), key=lambda ack: ack.sequence)
    assert [(ack.status, ack.position) for ack in acks] == [
        (ResultStatus.RESULT_COMMITTED, start + sequence) for sequence in range(120)]
    assert cluster.brokers[0].log.topic_state(0)["tail"] == start + 60
    assert_whole(cluster, session, start, 120)
    cluster.publish_all(session, [5])
    (again,) = cluster.take_acks(session)
    assert (again.status, again.position) == (ResultStatus.RESULT_DUPLICATE, start + 120)


@pytest.mark.parametrize("start", ENDS)
def test_batches_of_many_messages_pass_the_end_of_the_position_bits(start: int) -> None:
    cluster = ManualCluster(counters_start=start)
    session = cluster.open_session(cluster.create())
    position = start
    for sequence in range(60):
        cluster.publish(session, sequence, [b"m"] * (sequence % 7 + 1), broker=sequence % 2)
        cluster.settle()
        assert cluster.entries(session.topic)[-1]["position"] == position
        position += sequence % 7 + 1
    assert cluster.reader(session.topic).frontiers() | {"reclaimed_index": 0, "reclaimed_position": 0} == {
        "committed_index": start + 60, "committed_position": position, "reclaimed_index": 0, "reclaimed_position": 0}


@pytest.mark.parametrize("start", ENDS)
def test_heads_and_brokers_come_back_at_every_end(start: int) -> None:
    cluster = ManualCluster(brokers=2, counters_start=start)
    session = cluster.open_session(cluster.create())
    for sequence in range(80):
        cluster.publish(session, sequence, broker=sequence % 2)
        if sequence % 4 == 3:
            cluster.take_over(sequence // 4 % 2)
        cluster.settle()
        cluster.take_acks(session, 0), cluster.take_acks(session, 1)
    if cluster.order.head_broker != 0:
        cluster.take_over(0)
    cluster.settle()
    broker = cluster.restart(1)
    while not broker.learn():
        pass
    cluster.publish_all(session, range(80, 90))
    assert_whole(cluster, session, start, 90)


@pytest.mark.parametrize("start", ENDS)
def test_replicas_and_recovery_at_every_end(start: int, tmp_path: Path) -> None:
    cluster = ManualCluster(brokers=2, folder=tmp_path, counters_start=start)
    session = cluster.open_session(cluster.create(replication_factor=2, ack=2), ack=2)
    cluster.publish_all(session, range(40))
    assert [ack.status for ack in cluster.take_acks(session)] == [ResultStatus.RESULT_COMMITTED] * 40
    (topic,) = make_plan(tmp_path).topics
    assert (topic.lost, topic.end_position, len(topic.batches)) == ([], start + 40, 40)


# ---- grants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granted", [(1 << 40) - 3, (1 << 48) - 1])
def test_the_leader_counts_grants_beyond_what_it_ever_gives(granted: int) -> None:
    cluster = ManualCluster(pool="leader")
    layout, door = cluster.layout, cluster.door(0, Role.ROLE_SEQUENCER)
    for broker in (0, 1):
        for word in (0, 8):                 # of its wishes, and of its segments
            cluster.memory.store_word(layout.offset_of("pool_grant", broker) + word, granted)
        cluster.memory.store_word(layout.offset_of("pool_wish", broker), granted)
    pools = [make_pool(cluster.door(broker, Role.ROLE_RECEIVER), layout, broker) for broker in (0, 1)]
    leader = PoolLeader(door, layout, 0)
    held: dict[int, int] = {}
    for turn in range(12):
        broker = turn % 2
        segment = pools[broker].allocate_segments()
        while segment < 0:
            leader.step_once()
            segment = pools[broker].allocate_segments()
        assert segment not in held
        held[segment] = broker
    leader = PoolLeader(door, layout, 0)    # the next one: it takes back what was not granted, and nothing else
    owners = {segment: cluster.memory.load_word(layout.offset_of("grantee", segment)) >> 56 for segment in held}
    assert owners == {segment: broker + 1 for segment, broker in held.items()}
    fresh = make_pool(cluster.door(0, Role.ROLE_RECEIVER), layout, 0)
    while fresh.allocate_segments() < 0:
        leader.step_once()


# ---- epochs and generations ------------------------------------------------------------------------------------------


def set_epoch(cluster: ManualCluster, epoch: int) -> None:
    at = cluster.layout.offset_of("control")
    cluster.memory.store_word(at, cluster.control & 0xFFFFFFFF | epoch << ControlBits.CONTROL_EPOCH_SHIFT)


@pytest.mark.parametrize("rounds", [1, 2, 65535])
def test_what_an_earlier_round_of_epochs_left_in_a_bank_is_not_taken_over(rounds: int) -> None:
    cluster = ManualCluster()
    session = cluster.open_session(cluster.create())
    cluster.publish_all(session, range(10))
    other = cluster.layout.with_bank(1)
    # A head of epoch 3 wrote an entry into bank 1, and fell before it committed it.
    left = cluster.entries(session.topic)[4] | {
        "commit": session.topic.generation << 48 | 11, "epoch": 3, "position": 10, "client_id": 99}
    cluster.memory.write_line_bytes(other.offset_of("order_entry", 0, 10), pack("OrderEntry", **left))
    cluster.memory.store_word(other.offset_of("head"), 3)
    set_epoch(cluster, (rounds << 16) + 2)
    cluster.take_over(1)
    assert cluster.control >> 32 == (rounds << 16) + 3
    cluster.take_over(0)
    assert cluster.reader(session.topic).frontiers()["committed_index"] == 10
    cluster.publish_all(session, range(10, 20))
    assert_whole(cluster, session, 0, 20)


def test_a_generation_that_comes_round_is_none_that_a_line_still_names() -> None:
    cluster = ManualCluster(brokers=2)
    first = cluster.create()
    cluster.delete()
    cluster.settle()
    cluster.memory.store_word(cluster.layout.offset_of("offset_broker", first.number, 1) + 48, 2)   # of one that is away
    cluster.dead.add(1)
    cluster.memory.store_word(cluster.order.layout.offset_of("directory") + 8, 0xFFFF)
    assert [cluster.table._next_generation(cluster.order.layout, first.number) for _ in range(3)] == [1, 3, 4]
