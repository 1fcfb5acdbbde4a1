"""Publishers live through whatever comes back, over every transport, and end typed where it does not."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.errors import ClusterReplaced, CxlmqError, PermissionDenied, TopicRecreated, UnknownTopic
from client.admin import Admin
from client.brokers import BrokerAddress, rendezvous
from client.cluster import Cluster
from client.publisher import Publisher
from tests.end_to_end.conftest import small_config, traces, unique
from tests.end_to_end.library_support import eventually, inspected, read_topic

TRANSPORTS = ["grpc", "attached"]
ALWAYS = 120.0                          # seconds for a delivery: an outage and a slow machine


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {"name": unique("test"), "brokers": 2, "data_directory": str(folder), **more}


def make_topic(cluster: str, name: str = "t", **options: Any) -> None:
    with Admin(cluster=cluster) as admin:
        admin.create_topic(name, **options)


def numbers(messages: list[bytes]) -> list[int]:
    return [int(each) for each in messages]


@contextmanager
def opened(cluster: str, **options: Any) -> Iterator[dict[str, Publisher]]:
    """A publisher over each transport."""
    found = {each: Publisher("t", cluster=cluster, transport=each, **{"delivery_timeout": ALWAYS, **options}).open()
             for each in TRANSPORTS}
    try:
        yield found
    finally:
        for each in found.values():
            each.close()


def test_a_socket_of_somebody_elses_is_refused_when_a_publisher_opens(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # That of the second broker alone: the session is opened at the first.
    def check(address: str) -> None:
        if "broker-1" in address:
            raise PermissionDenied(what=address)

    with Cluster(small_config(**settings(tmp_path))) as cluster:
        make_topic(cluster.name)
        client = next(each for each in range(1, 100) if rendezvous(
            [BrokerAddress(0, ""), BrokerAddress(1, "")], each, 0)[0].id == 0)
        monkeypatch.setattr("client.connection.check_socket", check)
        with pytest.raises(PermissionDenied, match="broker-1"):
            Publisher("t", cluster=cluster.name, transport="grpc", client_id=client).open()


def test_publishers_go_on_in_a_recovered_cluster_also_of_another_size(tmp_path: Path) -> None:
    wanted, every = settings(tmp_path), 0
    cluster = Cluster(small_config(**wanted)).start()
    make_topic(wanted["name"], ack=2, replication_factor=2)
    with opened(wanted["name"]) as publishers:
        for region_bytes in ("64MiB", "96MiB", "48MiB"):
            for publisher in publishers.values():
                publisher.publish(b"%d" % every).result()
                every += 1
            cluster.stop()
            # What is published meanwhile waits, and comes in order.
            waiting = [publishers[each].publish(b"%d" % (every + at)) for at, each in enumerate(TRANSPORTS)]
            every += len(waiting)
            cluster = Cluster(small_config(**{**wanted, "region_bytes": region_bytes}), recover=str(tmp_path)).start()
            assert {each.result().level for each in waiting} == {2}
        assert {publisher.publish(b"%d" % (every + at)).result().level for at, publisher in
                enumerate(publishers.values())} == {2}
        every += len(publishers)
        assert sorted(numbers(read_topic(wanted["name"], "t"))) == list(range(every))
        assert {each.transport for each in publishers.values()} == set(TRANSPORTS)
    cluster.stop()
    assert traces(wanted["name"]) == []


def test_publishers_go_on_when_all_brokers_died_and_were_started_again(tmp_path: Path) -> None:
    wanted = settings(tmp_path)
    with Cluster(small_config(**wanted)) as cluster:
        make_topic(cluster.name)
        with opened(cluster.name) as publishers:
            for turn in range(2):
                for publisher in publishers.values():
                    publisher.publish(b"before").result()
                before = cluster.restarts
                for process in list(cluster.processes.values()):
                    os.kill(process, signal.SIGKILL)
                waiting = [publisher.publish(b"meanwhile") for publisher in publishers.values()]
                assert eventually(lambda before=before: cluster.restarts >= before + 2)     # type: ignore[misc]
                for each in waiting:
                    assert each.result().level == 1, turn
        assert sorted(set(read_topic(cluster.name, "t"))) == [b"before", b"meanwhile"]
        assert len(read_topic(cluster.name, "t")) == 8


@pytest.mark.parametrize("made_again", [True, False])
def test_a_cluster_that_was_started_without_the_data_is_another_one(tmp_path: Path, made_again: bool) -> None:
    wanted = settings(tmp_path / "first")
    cluster = Cluster(small_config(**wanted)).start()
    make_topic(cluster.name)
    with opened(cluster.name) as publishers:
        for publisher in publishers.values():
            publisher.publish(b"old").result()
        cluster.stop()
        with Cluster(small_config(**{**wanted, "data_directory": str(tmp_path / "second")})) as fresh:
            make_topic(fresh.name, "t" if made_again else "other")
            for publisher in publishers.values():
                assert eventually(lambda each=publisher: each._engine.closed)               # type: ignore[misc]
                with pytest.raises(ClusterReplaced):
                    publisher.publish(b"for the old one")
            if made_again:
                assert read_topic(fresh.name, "t") == []
                with Publisher("t", cluster=fresh.name) as again:       # as the message says
                    again.publish(b"new").result()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", ["nothing", "kill"])
def test_a_topic_that_was_made_again_is_another_one(tmp_path: Path, transport: str, fault: str) -> None:
    with Cluster(small_config(**settings(tmp_path))) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        publisher = Publisher("t", cluster=cluster.name, transport=transport, delivery_timeout=ALWAYS).open()
        publisher.publish(b"old").result()
        admin.delete_topic("t")
        if fault == "kill":
            follower = 1 - int(inspected(cluster.name)["control"]["sequencer_broker"])
            os.kill(cluster.processes[follower], signal.SIGKILL)
        admin.create_topic("t")
        delivery = None
        try:
            delivery = publisher.publish(b"for the old one")
        except (TopicRecreated, UnknownTopic):
            pass                            # it was seen already
        if delivery is not None:
            assert isinstance(delivery.exception(), TopicRecreated | UnknownTopic)
        with pytest.raises(CxlmqError) as raised:
            while True:                     # at the latest when it was told
                publisher.publish(b"for the old one").result()
        assert isinstance(raised.value, TopicRecreated | UnknownTopic)
        publisher.close()
        assert read_topic(cluster.name, "t") == []
        with Publisher("t", cluster=cluster.name, transport=transport) as again:
            again.publish(b"new").result()
        assert read_topic(cluster.name, "t") == [b"new"]
