"""A receipt's level is true also when the session was opened anew: level 2 comes when the disks have it, not before."""

import os
import signal
from collections.abc import Iterator

import pytest

from broker.errors import SessionFenced
from client.admin import Admin
from client.cluster import Cluster
from client.publisher import Publisher
from tests.end_to_end.conftest import small_config, unique
from tests.end_to_end.library_support import eventually, inspected

LOOKS = 3


class Pair:
    """Two brokers, each the replica of the other."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        head = inspected(cluster.name)["control"]["sequencer_broker"]
        self.replica = 1 - head

    def stop(self) -> None:
        os.kill(self.cluster.processes[self.replica], signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.cluster.processes[self.replica], signal.SIGCONT)

    def committed(self, topic: str) -> int:
        return int(self._topic(topic)["committed_position"])

    def durable(self, topic: str) -> int:
        return min(each["replicated_position"] for place in self._topic(topic)["brokers"] for each in place["replicas"])

    def _topic(self, name: str) -> dict[str, object]:
        (found,) = [each for each in inspected(self.cluster.name)["topics"] if each["name"] == name]
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Cluster(small_config(brokers=2, data_directory=str(tmp_path_factory.mktemp("data")), restart=False,
                              head_lease_seconds=60)) as cluster:
        yield Pair(cluster)


def reopen(publisher: Publisher) -> None:
    """Have its session opened anew, as when a broker fenced it."""
    engine, before = publisher._engine, publisher.statistics()["reopened"]
    engine.loop.call_soon_threadsafe(engine.end_session, SessionFenced(reason="a test", committed=0))
    assert eventually(lambda: publisher.statistics()["reopened"] > before and not engine.reopening)


@pytest.mark.parametrize("transport", ["grpc", "attached"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_session_opened_anew_promises_level_2_only_when_the_disks_have_it(
        pair: Pair, transport: str, times: int) -> None:
    topic = unique("topic")
    with Admin(cluster=pair.cluster.name) as admin:
        admin.create_topic(topic, ack=2, replication_factor=2)
    with Publisher(topic, cluster=pair.cluster.name, transport=transport, delivery_timeout=120.0) as publisher:
        assert publisher.publish(b"before").result().level == 2
        pair.stop()
        try:
            waiting = [publisher.publish(b"%d" % number) for number in range(3)]
            publisher._engine.seal_current()
            assert eventually(lambda: pair.committed(topic) == 4)
            for _ in range(times):
                reopen(publisher)
            for _ in range(LOOKS):
                publisher._engine.client_loop.run(publisher._engine._look_up())
            assert not any(each.done() for each in waiting)
            assert publisher._engine.buffered > 0
        finally:
            pair.go_on()
        receipts = [each.result() for each in waiting]
        assert pair.durable(topic) >= 4
        assert [(each.position, each.level) for each in receipts] == [(1, 2), (2, 2), (3, 2)]


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_session_opened_anew_settles_level_1_without_the_disks(pair: Pair, transport: str) -> None:
    topic = unique("topic")
    with Admin(cluster=pair.cluster.name) as admin:
        admin.create_topic(topic, ack=2, replication_factor=2)
    with Publisher(topic, cluster=pair.cluster.name, transport=transport, delivery_timeout=120.0) as durable, \
            Publisher(topic, cluster=pair.cluster.name, transport=transport, ack=1, delivery_timeout=120.0) as quick:
        pair.stop()
        try:
            waiting, done = durable.publish(b"durable"), quick.publish(b"quick")
            durable._engine.seal_current()
            quick._engine.seal_current()
            assert eventually(lambda: pair.committed(topic) == 2)
            reopen(quick)
            reopen(durable)
            assert done.result().level == 1
            assert not waiting.done()
        finally:
            pair.go_on()
        assert waiting.result().level == 2
