"""Readers over outages: they wait, and go on in the same topic; in another one of its name never, but by their own wish."""

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import ClusterReplaced, CxlmqError, GroupError, RangeLost, TopicRecreated, UnknownTopic
from client import Admin, Publisher, Subscriber
from client.attached_subscriber import AttachedSubscriberEngine
from client.brokers import BrokerAddress
from client.cluster import Cluster
from client.received import Message
from client.subscribing.commands import AskPlace, Place
from tests.end_to_end.conftest import small_config, unique
from tests.end_to_end.library_support import eventually, made_topic

TRANSPORTS = ("grpc", "attached", "auto")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three brokers, started anew when they end."""
    with Cluster(small_config(brokers=3, group_lease_seconds=5.0)) as running:
        yield running


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where replicas go."""
    made = Path("/tmp") / unique("cxdata")
    yield made
    shutil.rmtree(made, ignore_errors=True)


def publish(cluster: str, topic: str, word: str, count: int) -> None:
    with Publisher(topic, cluster=cluster, transport="grpc") as publisher:
        publisher.publish_many([f"{word}{number}".encode() for number in range(count)]).result()


def read_until_error(subscriber: Subscriber, seconds: float = 30.0) -> tuple[list[bytes], CxlmqError]:
    """Everything that comes, and what ended it."""
    got: list[bytes] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            got += [bytes(each.payload) for each in subscriber.fetch(1000, 0.5)]
        except CxlmqError as error:
            return got, error
    raise AssertionError(f"no error; {len(got)} messages came")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("lost", [False, True])
def test_a_topic_that_is_made_again_is_another_topic(cluster: Cluster, topic: str, transport: str, lost: bool) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
        publish(cluster.name, topic, "old", 100)
        assert eventually(lambda: _serves(cluster.name, topic, 2)), "the test before may have killed it"
        with Subscriber(topic, cluster=cluster.name, transport=transport, broker=2) as subscriber:
            got = [bytes(each.payload) for each in subscriber.fetch(50, 10)]
            if lost:
                cluster.kill(2)             # it looks for another broker
            admin.delete_topic(topic)
            admin.create_topic(topic)
            publish(cluster.name, topic, "new", 200)
            more, error = read_until_error(subscriber)
            assert all(each.startswith(b"old") for each in got + more)
            assert isinstance(error, UnknownTopic)
            with pytest.raises(type(error)):
                subscriber.fetch(1, 0.1)    # it stays so
            if not isinstance(error, TopicRecreated):
                with pytest.raises(TopicRecreated):
                    subscriber.seek("beginning")
            subscriber.seek("beginning")    # as the error says: whoever was told means the new one
            assert [bytes(each.payload) for each in subscriber.get_all()] == [f"new{n}".encode() for n in range(200)]
        with Subscriber(topic, cluster=cluster.name, transport=transport) as another:
            assert len(another.get_all()) == 200


@pytest.mark.parametrize("transport", TRANSPORTS[:2])
def test_a_seek_is_a_second_look_too(cluster: Cluster, topic: str, transport: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
        publish(cluster.name, topic, "old", 20)
        with Subscriber(topic, cluster=cluster.name, transport=transport) as subscriber:
            subscriber.fetch(5, 10)
            admin.delete_topic(topic)
            admin.create_topic(topic)
            publish(cluster.name, topic, "new", 20)
            with pytest.raises(TopicRecreated):
                subscriber.seek(7)
            with pytest.raises(CxlmqError):
                subscriber.get_all()


@pytest.mark.parametrize("transport", TRANSPORTS[:2])
def test_a_group_of_a_topic_that_was_made_again_commits_nothing_there(cluster: Cluster, topic: str,
                                                                        transport: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
        publish(cluster.name, topic, "old", 20)
        with Subscriber(topic, cluster=cluster.name, transport=transport, group="g") as subscriber:
            subscriber.fetch(5, 10)
            admin.delete_topic(topic)
            admin.create_topic(topic)
            publish(cluster.name, topic, "new", 20)
            with Subscriber(topic, cluster=cluster.name, group="g") as other:
                with pytest.raises(TopicRecreated):
                    subscriber.commit()
                assert other.fetch(1, 10)[0].position == 0
                other.commit()
            assert admin.describe_group(topic, "g")["position"] == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("same_topic", [False, True])
def test_a_cluster_that_starts_without_its_data_is_another_cluster(transport: str, same_topic: bool) -> None:
    config = small_config(brokers=2)
    with Cluster(config), Admin(cluster=config.name) as admin:
        admin.create_topic("t")
        publish(config.name, "t", "old", 10)
        subscriber = Subscriber("t", cluster=config.name, transport=transport).open()
        member = Subscriber("t", cluster=config.name, transport=transport, group="g").open()
        assert len(subscriber.fetch(5, 10)) == len(member.fetch(5, 10)) == 5
    started = time.monotonic()
    subscriber.fetch(100, 0.5)              # what it had, or nothing: it waits no longer than it was told
    assert subscriber.fetch(100, 0.5) == []
    assert time.monotonic() - started < 5
    with Cluster(config), Admin(cluster=config.name) as admin:
        if same_topic:
            admin.create_topic("t")
            publish(config.name, "t", "new", 30)
        for reader in (subscriber, member):
            got, error = read_until_error(reader)
            assert all(each.startswith(b"old") for each in got), "at most what is left in its memory"
            assert isinstance(error, ClusterReplaced)
        if same_topic:
            subscriber.seek("beginning")
            assert [bytes(each.payload) for each in subscriber.get_all()] == [f"new{n}".encode() for n in range(30)]
        subscriber.close()
        with contextlib.suppress(GroupError, ClusterReplaced):
            member.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_readers_and_members_go_on_in_a_recovered_cluster(folder: Path, transport: str) -> None:
    config = small_config(brokers=2, data_directory=str(folder))
    options: dict[str, Any] = {"cluster": config.name, "transport": transport}
    with Cluster(config), Admin(cluster=config.name) as admin:
        admin.create_topic("t", ack=2, replication_factor=2)
        publish(config.name, "t", "a", 10)
        readers = [Subscriber("t", **options).open(), Subscriber("t", **options, group="g").open()]
        for reader in readers:
            assert [each.position for each in reader.fetch(5, 10)] == list(range(5))
        readers[1].commit()
    with Cluster(config, recover=folder):
        publish(config.name, "t", "b", 10)
        for reader in readers:
            got: list[int] = []
            assert eventually(lambda: bool(got.extend(each.position for each in reader.fetch(20, 1))) or len(got) == 15)  # noqa: B023
            assert got == list(range(5, 20))
        readers[1].commit()
        with Admin(cluster=config.name) as admin:
            assert admin.describe_group("t", "g")["position"] == 20
        readers[0].seek(3)
        assert readers[0].fetch(1, 10)[0].position == 3
        for reader in readers:
            reader.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_was_read_and_lost_is_said_before_others_take_its_positions(folder: Path, transport: str) -> None:
    config = small_config(brokers=2, data_directory=str(folder))
    with Cluster(config), Admin(cluster=config.name) as admin:
        admin.create_topic("t", ack=2, replication_factor=2)        # else there is nothing to recover
        admin.create_topic("memory")
        publish(config.name, "t", "a", 10)
        publish(config.name, "memory", "old", 10)
        reader = Subscriber("memory", cluster=config.name, transport=transport).open()
        assert len(reader.fetch(10, 10)) == 10
    with Cluster(config, recover=folder) as running:
        assert running.recovery is not None
        got, error = read_until_error(reader)
        assert got == []
        assert isinstance(error, RangeLost | UnknownTopic)
        if isinstance(error, RangeLost):
            publish(config.name, "memory", "new", 3)
            reader.seek(int(str(error.first)))
            assert [bytes(each.payload) for each in reader.fetch(3, 10)] == [b"new0", b"new1", b"new2"]
        reader.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_brokers_die_and_come_back(topic: str, transport: str) -> None:
    with Cluster(small_config(brokers=2)) as cluster, made_topic(cluster, topic):
        with Subscriber(topic, cluster=cluster.name, transport=transport) as reader:
            publish(cluster.name, topic, "a", 5)
            assert len(reader.fetch(5, 10)) == 5
            before = dict(cluster.processes)
            for broker in before:
                cluster.kill(broker)
            assert eventually(lambda: cluster.restarts >= 2)
            assert eventually(lambda: _publishes(cluster.name, topic))
            assert eventually(lambda: bool(reader.fetch(1, 1)))


def test_a_reader_that_reads_on_while_another_broker_takes_it_has_lost_nothing(
        cluster: Cluster, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads in memory after that broker looked for the end of the log lies behind that end."""
    with made_topic(cluster, topic), Subscriber(topic, cluster=cluster.name, transport="attached") as reader:
        publish(cluster.name, topic, "a", 5)
        assert len(reader.fetch(5, 10)) == 5
        engine = reader._engine
        assert isinstance(engine, AttachedSubscriberEngine)
        reach_at, meanwhile = engine._reach_at, list[Message]()

        async def slowly(broker: BrokerAddress, asked: AskPlace) -> Place:
            place = await reach_at(broker, asked)
            await asyncio.to_thread(publish, cluster.name, topic, "b", 5)
            meanwhile.extend(await asyncio.to_thread(reader.fetch, 5, 10))
            return place

        monkeypatch.setattr(engine, "_reach_at", slowly)
        assert engine.reading.place is not None
        engine.reading.lost(engine.reading.place)
        engine._return()
        assert engine.returning is not None
        engine.returning.result(30)
        assert len(meanwhile) == 5
        publish(cluster.name, topic, "c", 1)
        assert [each.position for each in reader.fetch(1, 10)] == [10]


def _publishes(cluster: str, topic: str) -> bool:
    with contextlib.suppress(CxlmqError):
        publish(cluster, topic, "b", 1)
        return True
    return False


def _serves(cluster: str, topic: str, broker: int) -> bool:
    with contextlib.suppress(CxlmqError), Subscriber(topic, cluster=cluster, broker=broker, transport="grpc"):
        return True
    return False


@pytest.mark.parametrize("way", ["fetch", "for", "async"])
def test_an_auto_reader_that_finds_no_slot_any_more_goes_on_over_grpc(folder: Path, way: str) -> None:
    """As it would at opening; a reader that asked for "attached" waits for one."""
    config = small_config(brokers=2, data_directory=str(folder))
    with Cluster(config), Admin(cluster=config.name) as admin:
        admin.create_topic("t", ack=2, replication_factor=2)
        publish(config.name, "t", "a", 10)
        auto = Subscriber("t", cluster=config.name).open()
        member = Subscriber("t", cluster=config.name, group="g").open()
        attached = Subscriber("t", cluster=config.name, transport="attached").open()
        for reader in (auto, member, attached):
            assert [each.position for each in reader.fetch(4, 10)] == list(range(4))
            assert reader.transport == "attached"
        member.commit()
    without = small_config(brokers=2, name=config.name, data_directory=str(folder), attach_slot_count=0)
    with Cluster(without, recover=folder), Admin(cluster=config.name) as admin:
        publish(config.name, "t", "b", 10)
        for reader in (auto, member):
            got = list(_read_in(way, reader, 16))
            assert [(each.position, bytes(each.payload)) for each in got] == [
                *((at, b"a%d" % at) for at in range(4, 10)), *((10 + at, b"b%d" % at) for at in range(10))]
            assert reader.transport == "grpc"
        member.commit()
        assert admin.describe_group("t", "g")["position"] == 20
        auto.seek(3)
        assert [each.position for each in auto.get_all()] == list(range(3, 20))
        publish(config.name, "t", "c", 1)
        assert auto.fetch(10, 10)[0].position == 20
        attached.fetch(100, 1)
        assert attached.transport == "attached"
        for reader in (auto, member, attached):
            reader.close()


def _read_in(way: str, reader: Subscriber, count: int) -> Iterator[Message]:
    """So many messages, by this way of asking."""
    if way == "for":
        yield from itertools.islice(reader, count)
        return
    while count > 0:
        found = reader.fetch(3, 20) if way == "fetch" else asyncio.run(_fetch_async(reader))
        assert found, "nothing came"
        yield from found
        count -= len(found)


async def _fetch_async(reader: Subscriber) -> list[Message]:
    return await reader._engine.taken_async(lambda buffer: buffer.take_messages(3), time.monotonic() + 20)
