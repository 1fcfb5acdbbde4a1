"""What a topic promises can be altered while it is in use, by whoever is asked, and outlives restarts, heads and the memory."""

import asyncio
import signal
from pathlib import Path

import numpy
import pytest

from client import Admin, AsyncAdmin, Publisher
from client.cluster import Cluster
from client.errors import BadTopicName, BadTopicOptions, ConfigError, CxlmqError, DuplicateTopic, UnknownTopic
from tests.end_to_end.conftest import traces, unique
from tests.end_to_end.library_support import eventually, inspected
from tests.end_to_end.test_recovery import kill_everything, recovered, running

SECONDS = 20.0


def promised(admin: Admin, topic: str) -> tuple[int, int]:
    found = admin.describe_topic(topic)
    return found["ack"], found["retention_bytes"]


@pytest.mark.parametrize("broker", range(4))
def test_every_broker_can_be_asked_and_all_see_it(cluster: Cluster, topic: str, broker: int) -> None:
    with Admin(bootstrap=cluster.addresses[broker].tcp) as admin:
        admin.create_topic(topic, replication_factor=2)
        assert admin.alter_topic(topic, retention_bytes=1 << 20)["retention_bytes"] == 1 << 20
        assert admin.alter_topic(topic, ack=2)["ack"] == 2
        for address in cluster.addresses.values():
            with Admin(bootstrap=address.tcp) as other:
                assert promised(other, topic) == (2, 1 << 20)
    with Publisher(topic, cluster=cluster.name) as publisher:       # asks for no level of its own
        assert publisher.publish(b"m").result(SECONDS).level == 2


def test_what_does_not_fit_is_refused_and_nothing_is_changed(cluster: Cluster, topic: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        with pytest.raises(UnknownTopic):
            admin.alter_topic(topic, ack=0)
        admin.create_topic(topic, retention_bytes=5000)
        for options in ({}, {"ack": 3}, {"ack": -1}, {"ack": True}, {"ack": "1"}, {"ack": 1.0}, {"ack": 2}, {"retention_bytes": -2},
                        {"retention_bytes": 1 << 62}, {"retention_bytes": "1MiB"}, {"retention_bytes": 0, "ack": 2}):
            with pytest.raises(BadTopicOptions) as raised:
                admin.alter_topic(topic, **options)  # type: ignore[arg-type]
            assert "2 to 2" not in str(raised.value)
        with pytest.raises(BadTopicName):
            admin.alter_topic("a/b", ack=1)
        assert promised(admin, topic) == (1, 5000)
        assert admin.alter_topic(topic, ack=numpy.int64(0), retention_bytes=numpy.int32(7))["retention_bytes"] == 7


def test_a_topic_that_may_be_there_is_taken_when_it_promises_the_same(cluster: Cluster, topic: str) -> None:
    async def again() -> object:
        async with AsyncAdmin(cluster=cluster.name) as admin:
            return (await admin.create_topic(topic, order=2, exist_ok=True))["number"]

    with Admin(cluster=cluster.name) as admin:
        made = admin.create_topic(topic, order=2, exist_ok=True)
        assert admin.create_topic(topic, order=2, exist_ok=True)["generation"] == made["generation"]
        assert asyncio.run(again()) == made["number"]
        with pytest.raises(DuplicateTopic):
            admin.create_topic(topic, order=2)
        for options in ({"order": 5}, {"order": 2, "ack": 0}, {"order": 2, "replication_factor": 2},
                        {"order": 2, "retention_bytes": -1}):
            with pytest.raises(DuplicateTopic, match="and not"):
                admin.create_topic(topic, **options, exist_ok=True)


@pytest.mark.parametrize("call", [
    lambda admin: admin.create_topic("x", order=3), lambda admin: admin.create_topic("x", order="5"),
    lambda admin: admin.create_topic("x", replication_factor=65), lambda admin: admin.create_topic("x", ack=2),
    lambda admin: admin.create_topic("x", replication_factor=None), lambda admin: admin.create_topic(5),
    lambda admin: admin.create_topic("x", retention_bytes=1e6), lambda admin: admin.list_groups("a/b"),
    lambda admin: admin.list_groups(None), lambda admin: admin.describe_group("a/b", "g"),
    lambda admin: admin.describe_group("a", ""), lambda admin: admin.reset_group("a", "g", protect="yes"),
    lambda admin: admin.reset_group("a", "g", start="soon"), lambda admin: admin.reset_group("a", None),
    lambda admin: admin.delete_group("a", 5), lambda admin: admin.delete_topic(b"x"), lambda admin: admin.describe_topic(None),
    lambda admin: Admin(cluster="a/b"), lambda admin: Admin(cluster=5), lambda admin: Admin(bootstrap=""),
    lambda admin: Admin(bootstrap="nowhere"), lambda admin: Admin(bootstrap=7000),
])
def test_arguments_of_another_kind_are_refused_with_what_is_allowed(cluster: Cluster, call: object) -> None:
    with Admin(cluster=cluster.name) as admin, pytest.raises(CxlmqError) as raised:
        call(admin)  # type: ignore[operator]
    assert isinstance(raised.value, BadTopicOptions | BadTopicName | ConfigError) or "group" in raised.value.code
    assert "allowed" in str(raised.value) or "use 1 to" in str(raised.value)


def test_an_alteration_outlives_a_restart_another_head_and_the_memory(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with running(folder, brokers=3, name=unique("alter")) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("kept", replication_factor=2)
            with Publisher("kept", cluster=cluster.name, ack=2) as publisher:
                publisher.publish(b"m").result(SECONDS)
            assert admin.alter_topic("kept", retention_bytes=-1)["retention_bytes"] == -1
            assert admin.alter_topic("kept", ack=2)["ack"] == 2
            cluster.kill(0, signal.SIGKILL)             # the head, whose disk has it for certain
            assert eventually(lambda: inspected(cluster.name)["control"]["sequencer_broker"] != 0, SECONDS)
            assert promised(admin, "kept") == (2, -1)
            assert admin.alter_topic("kept", retention_bytes=1 << 20)["retention_bytes"] == 1 << 20
        kill_everything(cluster)
    with recovered(folder, brokers=3, name=cluster.name) as again:
        with Admin(cluster=again.name) as admin:
            assert promised(admin, "kept") == (2, 1 << 20)
            assert admin.alter_topic("kept", ack=1)["ack"] == 1
            assert promised(admin, "kept") == (1, 1 << 20)
    assert traces(again.name) == []
