"""Consumer groups over both transports: where reading goes on, who may read, what is kept, what survives, and the command."""

import asyncio
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import (
    CommitRefused,
    ConfigError,
    CxlmqError,
    GroupBusy,
    GroupFenced,
    PositionLost,
    UnknownGroup,
)
from broker.group_files import read_group_files
from client import Admin, AsyncSubscriber, Publisher, Subscriber
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config, traces, unique
from tests.end_to_end.library_support import eventually, inspected, made_topic, numbered, read, settles_to_nothing
from tests.end_to_end.test_recovery import kill_everything

ROOT = Path(__file__).parents[2]
LEASE = 2.0
TRANSPORTS = ("grpc", "attached")


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    """Where replicas go."""
    folder = Path("/tmp") / unique("cxdata")
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(scope="module")
def cluster(data: Path) -> Iterator[Cluster]:
    """Three brokers with short leases."""
    with Cluster(small_config(brokers=3, group_lease_seconds=LEASE, data_directory=str(data))) as running:
        yield running
        assert settles_to_nothing(running.name)
    assert traces(running.name) == []


@pytest.fixture
def made(cluster: Cluster, topic: str) -> Iterator[str]:
    """A topic with a hundred messages in batches of about ten."""
    with made_topic(cluster, topic):
        publish(cluster, topic, numbered(100))
        yield topic


@pytest.fixture(params=TRANSPORTS)
def options(request: pytest.FixtureRequest, cluster: Cluster) -> dict[str, Any]:
    """How a subscriber reads."""
    return {"cluster": cluster.name, "transport": request.param, "group": "g"}


def publish(cluster: Cluster, topic: str, messages: list[bytes]) -> None:
    with Publisher(topic, cluster=cluster.name, batch_bytes=250) as publisher:
        publisher.publish_many(messages)
        publisher.flush()


def described(cluster: Cluster, topic: str, group: str = "g") -> dict[str, Any]:
    with Admin(cluster=cluster.name) as admin:
        return admin.describe_group(topic, group)


def test_reading_goes_on_where_the_group_has_committed(made: str, cluster: Cluster, options: dict[str, Any]) -> None:
    with Subscriber(made, **options) as first:
        assert read(first, 30) == numbered(100)[:30]
        first.commit()
        assert read(first, 10) == numbered(100)[30:40]
    with Subscriber(made, **options, start="end") as second:
        assert second.position == 30, "`start` is for a new group"
        assert read(second, 10) == numbered(100)[30:40], "what was read and not committed comes again"
        second.commit(33)
    found = described(cluster, made)
    assert (found["position"], found["lag"], found["holder"], found["lost"]) == (33, 67, "", 0)
    with Subscriber(made, **{**options, "group": "other"}) as third:
        assert read(third, 100) == numbered(100), "groups do not know each other"


def test_commits_are_monotone_and_stay_within_the_log(made: str, options: dict[str, Any]) -> None:
    with Subscriber(made, **options) as subscriber:
        subscriber.commit(50)
        for wrong in (49, 101):
            with pytest.raises(CommitRefused):
                subscriber.commit(wrong)
        subscriber.commit(50)
        subscriber.commit(100)


def test_one_reader_at_a_time_and_the_other_is_told_which(made: str, cluster: Cluster, options: dict[str, Any]) -> None:
    with Subscriber(made, **options) as first:
        read(first, 5)
        first.commit()
        with pytest.raises(GroupBusy, match=f"process {os.getpid()}"), Subscriber(made, **options):
            pass
        assert described(cluster, made)["holder"].startswith(f"process {os.getpid()}")
        time.sleep(1.5 * LEASE)
        with pytest.raises(GroupBusy), Subscriber(made, **options):
            pass
        assert read(first, 5) == numbered(100)[5:10], "a lease is renewed while its owner lives"
    with Subscriber(made, **options) as second:
        assert second.position == 5


def test_a_standby_takes_over_when_the_reader_leaves(made: str, options: dict[str, Any]) -> None:
    async def both() -> int | None:
        async with AsyncSubscriber(made, **options) as first:
            await first.fetch(7, 10.0)
            await first.commit(7)
            standby = AsyncSubscriber(made, **options, group_wait=30.0)
            waiting = asyncio.create_task(standby.open())
            await asyncio.sleep(0.5)
            assert not waiting.done()
        await waiting
        found = await standby.get_next(10.0)
        await standby.close()
        return None if found is None else found.position

    assert asyncio.run(both()) == 7


READER = """
import sys, time
from client import Subscriber
with Subscriber(sys.argv[1], cluster=sys.argv[2], transport=sys.argv[3], group="g") as subscriber:
    got = subscriber.fetch(10, timeout=10.0)
    subscriber.commit(got[-1].position + 1)
    print("ready", flush=True)
    while True:
        try:
            subscriber.fetch(1, timeout=0.2)
            subscriber.commit()
        except Exception as error:
            print(type(error).__name__, flush=True)
            sys.exit(0)
        time.sleep(0.1)
"""


def reader(made: str, options: dict[str, Any]) -> subprocess.Popen[str]:
    """Another process that reads for the group."""
    process = subprocess.Popen([sys.executable, "-c", READER, made, options["cluster"], options["transport"]], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_reader_keeps_the_group_for_its_lease_and_no_longer(made: str, options: dict[str, Any]) -> None:
    process = reader(made, options)
    process.kill()
    process.wait()
    with Subscriber(made, **options, group_wait=10 * LEASE) as second:
        position = second.position or 0
        assert position >= 10, "what was committed stays so"
        assert read(second, 5) == numbered(100)[position:position + 5]


def test_a_reader_that_was_stopped_too_long_is_fenced_and_says_so(made: str, options: dict[str, Any]) -> None:
    process = reader(made, options)
    process.send_signal(signal.SIGSTOP)
    with Subscriber(made, **options, group_wait=10 * LEASE) as second:
        second.commit(60)
        process.send_signal(signal.SIGCONT)
        assert process.stdout
        assert process.stdout.readline() == "GroupFenced\n"
        process.wait(20)
        second.commit(70)


def test_auto_commit_commits_what_was_processed_and_the_rest_on_a_clean_end(
        made: str, cluster: Cluster, options: dict[str, Any]) -> None:
    with Subscriber(made, **options, auto_commit=0.1) as subscriber:
        subscriber.fetch(10, timeout=10)
        time.sleep(0.4)
        assert described(cluster, made)["position"] == 0, "what was given out last may not be processed yet"
        given = 10 + len(subscriber.fetch(10, timeout=10))
        assert eventually(lambda: described(cluster, made)["position"] == 10)
    assert described(cluster, made)["position"] == given
    with pytest.raises(ZeroDivisionError), Subscriber(made, **options, auto_commit=60) as subscriber:
        for message in subscriber:
            if message.position == given + 5:
                raise ZeroDivisionError
    assert described(cluster, made)["position"] == given + 5, "not the one that failed"
    with Subscriber(made, **options, auto_commit=60) as subscriber:
        for message in subscriber:
            if message.position == given + 8:
                break
    assert described(cluster, made)["position"] == given + 9


def test_what_a_protected_group_has_not_read_stays_and_the_publisher_is_told_who_keeps_it(
        cluster: Cluster, topic: str, options: dict[str, Any]) -> None:
    with made_topic(cluster, topic):
        with Subscriber(topic, **options, protect=True):
            pass
        with Publisher(topic, cluster=cluster.name, batch_bytes=1 << 18, delivery_timeout=4.0) as publisher, \
                pytest.raises(CxlmqError, match=f"protected group g of topic {topic}"):
            for _ in range(400):
                publisher.publish_many(numbered(4, 60_000)).result(30)
        assert [each["group"] for each in inspected(cluster.name)["groups"]] == ["g"]
        with Admin(cluster=cluster.name) as admin:
            first = admin.describe_topic(topic)["first_position"]
            assert first == 0, "nothing of it was reclaimed"
            assert not admin.reset_group(topic, "g", protect=False)["protected"]
        with Publisher(topic, cluster=cluster.name, batch_bytes=1 << 18) as publisher:
            for _ in range(400):
                publisher.publish_many(numbered(4, 60_000))
        with pytest.raises(PositionLost) as raised, Subscriber(topic, **options):
            pass
        lost = int(str(raised.value.first_available))
        assert lost > 0
        assert raised.value.position == 0
        found = described(cluster, topic)
        assert (found["lost"] >= lost, found["protected"], found["holder"]) == (True, False, "")
        assert found["position"] + found["lost"] + found["lag"] == found["end_position"], "lag is what can be read"
        (seen,) = inspected(cluster.name)["groups"]
        assert seen["lag"] <= found["end_position"] - lost
        with Admin(cluster=cluster.name) as admin:
            admin.reset_group(topic, "g", "end")
        with Subscriber(topic, **options) as subscriber:
            publish(cluster, topic, [b"next"])
            assert read(subscriber, 1) == [b"next"]
    assert inspected(cluster.name)["groups"] == [], "a group goes with its topic"


def test_groups_of_replicated_topics_are_on_every_disk(cluster: Cluster, topic: str, data: Path,
                                                       options: dict[str, Any]) -> None:
    def on_disk(folder: Path) -> dict[str, int]:
        return {each.group: each.position for each in read_group_files([folder])[0] if each.topic == topic}

    with made_topic(cluster, topic, replication_factor=2):
        publish(cluster, topic, numbered(20))
        with Subscriber(topic, **options) as subscriber:
            subscriber.commit(11)
            assert on_disk(data / "broker-0") == {"g": 11}, "before a commit is answered it is on the head's disk"
        for broker in range(3):
            assert eventually(lambda broker=broker: on_disk(data / f"broker-{broker}") == {"g": 11})
        with Admin(cluster=cluster.name) as admin:
            admin.delete_group(topic, "g")
        for broker in range(3):
            assert eventually(lambda broker=broker: on_disk(data / f"broker-{broker}") == {})


def test_a_group_is_known_to_every_broker_and_outlives_the_one_that_served(
        made: str, cluster: Cluster, options: dict[str, Any]) -> None:
    for broker in range(3):
        with Subscriber(made, **options, broker=broker) as subscriber:
            assert subscriber.position == 10 * broker
            subscriber.commit(10 * broker + 10)
        with Admin(bootstrap=cluster.addresses[broker].tcp) as admin:
            assert admin.describe_group(made, "g")["position"] == 10 * broker + 10


def test_wrong_use_is_refused(made: str, cluster: Cluster) -> None:
    with pytest.raises(ConfigError):
        Subscriber(made, cluster=cluster.name, protect=True)
    with pytest.raises(ConfigError):
        Subscriber(made, cluster=cluster.name, group="g", auto_commit=0)
    with pytest.raises(CxlmqError, match="group name"):
        Subscriber(made, cluster=cluster.name, group="a/b")
    with Subscriber(made, cluster=cluster.name) as subscriber, pytest.raises(ConfigError):
        subscriber.commit(1)
    with pytest.raises(UnknownGroup):
        described(cluster, made, "never")
    with pytest.raises(CommitRefused), Subscriber(made, cluster=cluster.name, group="g", start=101):
        pass
    assert inspected(cluster.name)["groups"] == []


def test_a_group_that_is_deleted_under_its_member_ends_it(made: str, cluster: Cluster, options: dict[str, Any]) -> None:
    with Subscriber(made, **options) as subscriber:
        with Admin(cluster=cluster.name) as admin:
            with pytest.raises(GroupBusy):
                admin.delete_group(made, "g")
            with pytest.raises(GroupBusy):
                admin.reset_group(made, "g", "beginning")
        subscriber._member()._beating.cancel()      # type: ignore[union-attr]
        time.sleep(LEASE)
        with Admin(cluster=cluster.name) as admin:
            admin.reset_group(made, "g", 5)
        with pytest.raises(GroupFenced):
            subscriber.commit(9)
    assert described(cluster, made)["position"] == 5


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_group_outlives_the_head(transport: str) -> None:
    with Cluster(small_config(brokers=3)) as running:
        with Admin(cluster=running.name) as admin:
            admin.create_topic("t")
        publish(running, "t", numbered(40))
        with Subscriber("t", cluster=running.name, transport=transport, group="g", protect=True, broker=1) as subscriber:
            assert read(subscriber, 10) == numbered(40)[:10]
            subscriber.commit()
            running.kill(0)
            assert read(subscriber, 10) == numbered(40)[10:20]
            subscriber.commit()
            assert described(running, "t")["position"] == 20
            with pytest.raises(CommitRefused):
                subscriber.commit(19)
            with pytest.raises(GroupBusy), Subscriber("t", cluster=running.name, group="g"):
                pass
        with Subscriber("t", cluster=running.name, transport=transport, group="g") as subscriber:
            assert read(subscriber, 20) == numbered(40)[20:]


def test_groups_come_back_with_the_topics_when_the_memory_is_gone(tmp_path: Path) -> None:
    with Cluster(small_config(brokers=3, data_directory=str(tmp_path))) as first:
        with Admin(cluster=first.name) as admin:
            admin.create_topic("kept", ack=2, replication_factor=2)
        publish(first, "kept", numbered(50))
        for name, position in (("g", 20), ("h", 50)):
            with Subscriber("kept", cluster=first.name, group=name, protect=name == "g") as subscriber:
                subscriber.commit(position)
        assert eventually(lambda: all(len(read_group_files([tmp_path / f"broker-{broker}"])[0]) == 2 for broker in range(3)))
        kill_everything(first)
    (damaged,) = (tmp_path / "broker-0").glob("*.g.group")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with Cluster(small_config(brokers=3), recover=tmp_path) as second:
        report = second.recovery
        assert report is not None
        assert len(report["damaged_groups"]) == 1
        assert str(damaged) in report["damaged_groups"][0]
        assert {each["group"]: each["position"] for each in report["groups"]} == {"g": 20, "h": 50}
        assert [described(second, "kept", name)["protected"] for name in ("g", "h")] == [True, False]
        with Subscriber("kept", cluster=second.name, group="g") as subscriber:
            assert read(subscriber, 30) == numbered(50)[20:]
            subscriber.commit()
        with Subscriber("kept", cluster=second.name, group="h") as subscriber:
            publish(second, "kept", [b"next"])
            assert read(subscriber, 1) == [b"next"]


# ---- replay by time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_reading_from_a_time(cluster: Cluster, topic: str, transport: str) -> None:
    moments = []
    with made_topic(cluster, topic):
        for number in range(5):
            moments.append(datetime.datetime.now(datetime.UTC))
            time.sleep(0.02)
            publish(cluster, topic, [f"at {number}".encode()])
            time.sleep(0.02)
        for number, moment in enumerate(moments):
            with Subscriber(topic, cluster=cluster.name, transport=transport, start=moment) as subscriber:
                assert subscriber.position == number
                assert read(subscriber, 5 - number) == [f"at {each}".encode() for each in range(number, 5)]
        now = datetime.datetime.now(datetime.UTC)
        with Subscriber(topic, cluster=cluster.name, transport=transport, start=now) as subscriber:
            assert (subscriber.position, subscriber.fetch(1, timeout=0.1)) == (5, [])
            publish(cluster, topic, [b"later"])
            assert read(subscriber, 1) == [b"later"]
            subscriber.seek(moments[3])
            assert read(subscriber, 1) == [b"at 3"]
        with Subscriber(topic, cluster=cluster.name, transport=transport, group="g", start=moments[2]) as subscriber:
            assert read(subscriber, 1) == [b"at 2"]


# ---- the command -----------------------------------------------------------------------------------------------------


def cxlmq(cluster: Cluster, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command against the cluster."""
    done = subprocess.run([sys.executable, "-m", "client.cli.main", *arguments, "--cluster", cluster.name], cwd=ROOT,
                          capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    return done


def test_the_command(cluster: Cluster, topic: str) -> None:
    with made_topic(cluster, topic):
        publish(cluster, topic, [b"a\n", b"b\n", b"c\n", b"d\n"])
        begun = datetime.datetime.now(datetime.UTC)
        assert "no groups" in cxlmq(cluster, "group", "list").stdout
        consume = ("consume", topic, "--group", "g", "-f", "%s")
        assert cxlmq(cluster, *consume, "--count", "1", "--protect").stdout == "a\n"
        assert cxlmq(cluster, *consume, "--count", "2").stdout == "b\nc\n"
        (listed,) = json.loads(cxlmq(cluster, "group", "list", topic, "--json").stdout)
        assert (listed["group"], listed["position"], listed["lag"], listed["protected"]) == ("g", 3, 1, True)
        assert cxlmq(cluster, *consume).stdout == "d\n"
        assert cxlmq(cluster, *consume).stdout == ""
        assert "lag" in cxlmq(cluster, "group", "describe", topic, "g").stdout
        told = json.loads(cxlmq(cluster, "group", "reset", topic, "g", "--to", "1", "--no-protect", "--json").stdout)
        assert (told["position"], told["protected"]) == (1, False)
        assert cxlmq(cluster, *consume).stdout == "b\nc\nd\n"
        assert "g" in cxlmq(cluster, "group", "list").stdout
        publish(cluster, topic, [b"e\n"])
        for text in (begun.isoformat(), f"@{begun.timestamp():.6f}"):
            assert cxlmq(cluster, "consume", topic, "--from", text, "-f", "%s").stdout == "e\n"
        assert cxlmq(cluster, "consume", topic, "--from", "2100-01-01T00:00:00Z").stdout == ""
        cxlmq(cluster, "consume", topic, "--from", "yesterday", code=2)
        cxlmq(cluster, "group", "reset", topic, "g", code=2)
        cxlmq(cluster, "group", "delete", topic, "g")
        assert json.loads(cxlmq(cluster, "group", "describe", topic, "g", "--json", code=1).stderr)["error"] == (
            "unknown-group")
