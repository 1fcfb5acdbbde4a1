"""One client's pace is its own: readers that stand still or are dropped, publishers that idle, and what the errors advise."""

import gc
import os
import warnings
from collections.abc import Iterator

import pytest

from broker.errors import PoolFull, PositionLost
from client.admin import Admin
from client.cluster import Cluster
from client.publisher import Publisher
from client.subscriber import Subscriber
from tests.end_to_end.conftest import small_config, unique
from tests.end_to_end.library_support import eventually, inspected, read

NBYTES, ROUNDS = 250_000, 120                   # of messages: several times what a topic can have
TRANSPORTS = ["grpc", "attached"]


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Two brokers with little memory."""
    with Cluster(small_config(brokers=2, region_bytes="32MiB")) as running:
        yield running


@pytest.fixture
def admin(pair: Cluster) -> Iterator[Admin]:
    """Topics that a test makes are gone when it ends."""
    with Admin(cluster=pair.name) as found:
        before = {each["name"] for each in found.list_topics()}
        yield found
        for each in found.list_topics():
            if each["name"] not in before:
                found.delete_topic(each["name"])


def publish(cluster: Cluster, topic: str, transport: str, rounds: int = ROUNDS, nbytes: int = NBYTES) -> int:
    """Publish one after the other; how many. Raises what the first refused one raises."""
    with Publisher(topic, cluster=cluster.name, transport=transport, delivery_timeout=6) as publisher:
        for _ in range(rounds):
            publisher.publish(bytes(nbytes)).result(15)
    return rounds


def holds_no_place(cluster: str) -> bool:
    """Whether no reader has a place or a slot any more, within a while."""
    return eventually(lambda: not inspected(cluster)["cursors"] and not inspected(cluster)["attached"], 10)


def refusal(cluster: Cluster, topic: str, transport: str) -> PoolFull:
    """Publish until the topic takes no more."""
    with pytest.raises(PoolFull) as refused:
        publish(cluster, topic, transport, 1000)
    return refused.value


# ---- readers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["grpc", "attached", "auto"])
@pytest.mark.parametrize("writing", TRANSPORTS)
def test_a_reader_beyond_the_retention_stops_nobody(pair: Cluster, admin: Admin, reading: str, writing: str) -> None:
    topic, other = unique("t"), unique("other")
    admin.create_topic(topic, retention_bytes=1 << 20)
    admin.create_topic(other)
    with Subscriber(topic, cluster=pair.name, transport=reading) as reader:
        assert publish(pair, topic, writing) == ROUNDS
        assert publish(pair, other, writing) == ROUNDS
        with pytest.raises(PositionLost) as lost:
            for _ in range(ROUNDS):
                assert reader.fetch(1, timeout=10)
        reader.seek(int(lost.value.first_available) if lost.value.details.get("first_available") else "beginning")
        assert read(reader, 1) == [bytes(NBYTES)]


@pytest.mark.parametrize("protect", [None, False, True])
@pytest.mark.parametrize("reading", TRANSPORTS)
def test_a_reader_without_retention_stops_its_topic_alone(pair: Cluster, admin: Admin, reading: str,
                                                          protect: bool | None) -> None:
    topic, other = unique("t"), unique("other")
    admin.create_topic(topic)
    admin.create_topic(other)
    group = {} if protect is None else {"group": "g", "protect": protect}
    with Subscriber(topic, cluster=pair.name, transport=reading, **group) as reader:    # type: ignore[arg-type]
        for writing in TRANSPORTS:
            error = refusal(pair, topic, writing)
            assert topic in error.message and (f"process {os.getpid()}" in error.message or "group g" in error.message)
            assert publish(pair, other, writing) == ROUNDS
        first = inspected(pair.name)
        assert f"topic {topic}" in next(each["holder"] for each in first["topics"] if each["name"] == topic)
        assert next(each["holder"] for each in first["topics"] if each["name"] == other) == "nobody"
        assert reader.fetch(1, timeout=10)[0].position == 0
    if protect:
        admin.reset_group(topic, "g", None, False)          # what the error advises
    assert publish(pair, topic, "grpc") == ROUNDS


@pytest.mark.parametrize("retention", [0, -1])
def test_a_topic_that_is_given_a_retention_goes_on(pair: Cluster, admin: Admin, retention: int) -> None:
    topic = unique("t")
    admin.create_topic(topic, retention_bytes=retention)
    with Subscriber(topic, cluster=pair.name, transport="grpc") as reader:
        error = refusal(pair, topic, "grpc")
        assert f"cxlmq topic alter {topic} --retention" in error.message
        admin.alter_topic(topic, retention_bytes=1 << 20)
        assert publish(pair, topic, "grpc") == ROUNDS
        with pytest.raises(PositionLost):
            while reader.fetch(100, timeout=10):
                pass


def test_views_that_are_held_stay_what_they_are(pair: Cluster, admin: Admin) -> None:
    topic = unique("t")
    admin.create_topic(topic, retention_bytes=1 << 20)
    with Subscriber(topic, cluster=pair.name, transport="attached") as reader:
        with Publisher(topic, cluster=pair.name) as publisher:
            publisher.publish(b"kept" * 1000).result(10)
        messages = reader.fetch(1, timeout=10)
        error = refusal(pair, topic, "grpc")
        assert f"process {os.getpid()}" in error.message and "release what it views" in error.message
        assert bytes(messages[0].payload) == b"kept" * 1000
        del messages                                        # what the error advises
        gc.collect()
        assert publish(pair, topic, "grpc") == ROUNDS


@pytest.mark.parametrize("transport", ["grpc", "attached", "auto"])
@pytest.mark.parametrize("group", [None, "g"])
def test_a_reader_that_is_dropped_keeps_nothing(pair: Cluster, admin: Admin, transport: str, group: str | None) -> None:
    topic = unique("t")
    admin.create_topic(topic)
    publish(pair, topic, "grpc", 3, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(3):
            reader = Subscriber(topic, cluster=pair.name, transport=transport, group=group).open()
            assert reader.fetch(1, timeout=10)
            del reader
            gc.collect()
            assert holds_no_place(pair.name)
    if group:
        assert admin.describe_group(topic, group)["holder"] == ""


def test_views_of_a_reader_that_is_dropped_are_protected_until_they_are_released(pair: Cluster, admin: Admin) -> None:
    topic = unique("t")
    admin.create_topic(topic)
    with Publisher(topic, cluster=pair.name) as publisher:
        publisher.publish(b"kept" * 1000).result(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        reader = Subscriber(topic, cluster=pair.name, transport="attached").open()
        messages = reader.fetch(1, timeout=10)
        del reader
        gc.collect()
    refusal(pair, topic, "grpc")
    assert bytes(messages[0].payload) == b"kept" * 1000
    del messages
    gc.collect()
    assert holds_no_place(pair.name)


def test_dropping_a_reader_is_said() -> None:
    with Cluster(small_config(brokers=1, region_bytes="16MiB")) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        reader = [Subscriber("t", cluster=cluster.name).open()]
        with pytest.warns(ResourceWarning, match="without close"):
            reader.clear()
        assert holds_no_place(cluster.name)


# ---- publishers ----------------------------------------------------------------------------------------------------


def test_idle_attached_publishers_leave_room_for_others() -> None:
    config = small_config(brokers=2, region_bytes="48MiB", attach_slot_count=420, session_count_max=512)
    with Cluster(config) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("idle")
        admin.create_topic("other")
        idle = [Publisher("idle", cluster=cluster.name, transport="attached").open() for _ in range(100)]
        try:
            assert eventually(lambda: sum(each["leases"] for each in inspected(cluster.name)["attached"]) == 0)
            for transport in TRANSPORTS:
                assert publish(cluster, "other", transport) == ROUNDS
            assert all(each.publish(b"again").result(10).position >= 0 for each in idle[::10])
            assert eventually(lambda: sum(each["leases"] for each in inspected(cluster.name)["attached"]) == 0)
        finally:
            for each in idle:
                each.close()
