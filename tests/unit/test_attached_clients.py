"""What attached clients held is free again when they go, and not before the stage has let go of it."""

from broker.topics import TopicEntry
from tests.manual_cluster import ManualBroker, ManualCluster, drive

PRESENCE = 5


def reader(cluster: ManualCluster, topic: TopicEntry) -> tuple[int, int, int]:
    """(slot, generation, cursor) of an attached reader at broker 0."""
    broker = cluster.brokers[0]
    cursor = drive(broker.cursors.open(topic.generation << 16 | topic.number, 0, 4711, presence=PRESENCE))[0]
    found = broker.attach.open_subscriber(topic.number, topic.generation, cursor, 0, 4711, PRESENCE)
    assert found is not None
    broker.attached_clients.add_reader(found[0], cursor)
    return *found, cursor


def with_reader() -> tuple[ManualCluster, ManualBroker, TopicEntry, tuple[int, int, int]]:
    cluster = ManualCluster(attach_slot_count=8, region_bytes=4 << 20)
    cluster.alive.add(PRESENCE)
    topic = cluster.create()
    return cluster, cluster.brokers[0], topic, reader(cluster, topic)


def watchers(cluster: ManualCluster) -> int:
    return int(cluster.record("BrokerLine", "broker", 0)["commit_watchers"])


def test_a_cursor_is_free_when_the_stage_is_off_the_slot() -> None:
    cluster, broker, topic, (slot, generation, cursor) = with_reader()
    assert watchers(cluster) == 1
    broker.attached_clients.close(slot, generation)
    broker.attached_clients.end_cursors()
    assert broker.attached_clients.is_ending(slot, generation)          # the stage has not stepped
    assert drive(broker.cursors.open(topic.generation << 16 | topic.number, 0, 1))[0] != cursor     # that stepped it
    broker.attached_clients.end_cursors()
    assert not broker.attached_clients.is_ending(slot, generation)
    assert watchers(cluster) == 0
    assert reader(cluster, topic)[2] == cursor


def test_who_lives_keeps_its_slot_and_who_died_does_not() -> None:
    cluster, broker, _, (slot, generation, _) = with_reader()
    for _ in range(3):
        broker.attached_clients.tend()
        cluster.settle()
    assert broker.attach.is_taken(slot, generation)
    cluster.alive.clear()
    broker.attached_clients.tend()
    cluster.settle()
    broker.attached_clients.tend()
    assert not broker.attach.is_taken(slot, generation)
    assert watchers(cluster) == 0


def test_a_slot_is_closed_once() -> None:
    cluster, broker, topic, (slot, generation, _) = with_reader()
    broker.attached_clients.close(slot, generation)
    broker.attached_clients.close(slot, generation)
    cluster.settle()
    broker.attached_clients.end_cursors()
    again = reader(cluster, topic)
    broker.attached_clients.close(slot, generation)                     # a late word about the one before
    assert broker.attach.is_taken(*again[:2])
    broker.attached_clients.end_cursors()
    assert watchers(cluster) == 1
