"""What an administrator's call asks a second time, after an answer was lost, is never reported as a mistake of the caller's."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from broker.errors import BrokerUnavailable, DuplicateTopic, UnknownGroup, UnknownTopic
from client import Admin, Subscriber
from client.cluster import Cluster
from client.connection import Connection
from tests.end_to_end.conftest import small_config
from tests.end_to_end.library_support import eventually, inspected


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three brokers; the head stays the head while it is awake."""
    with Cluster(small_config(brokers=3, head_lease_seconds=30.0)) as running:
        yield running


def lose_the_first_answer(monkeypatch: pytest.MonkeyPatch, methods: set[str]) -> None:
    """Of these methods: they are done, and who asked hears nothing."""
    unary: Callable[..., Awaitable[Any]] = Connection.unary

    async def losing(self: Connection, target: str, method: str, *rest: Any, **more: Any) -> Any:
        reply = await unary(self, target, method, *rest, **more)
        if method in methods:
            methods.discard(method)
            raise BrokerUnavailable(address=target)
        return reply

    monkeypatch.setattr(Connection, "unary", losing)


def test_what_was_done_before_the_answer_was_lost_is_a_success(cluster: Cluster, topic: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"Admin/CreateTopic", "Admin/DeleteTopic", "Groups/Delete", "Groups/Join"}
    lose_the_first_answer(monkeypatch, methods)
    with Admin(cluster=cluster.name) as admin:
        assert admin.create_topic(topic, order=2)["order"] == 2
        with Subscriber(topic, cluster=cluster.name, group="g"):
            pass
        admin.delete_group(topic, "g")
        admin.delete_topic(topic)
        assert methods == set()
        with pytest.raises(UnknownTopic):
            admin.delete_topic(topic)
        admin.create_topic(topic)
        with pytest.raises(DuplicateTopic):
            admin.create_topic(topic)
        with pytest.raises(UnknownGroup):
            admin.delete_group(topic, "g")


def test_another_topic_of_the_name_is_no_success(cluster: Cluster, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic, order=2)
        unary: Callable[..., Awaitable[Any]] = Connection.unary
        lost = ["Admin/CreateTopic"]

        async def losing(self: Connection, target: str, method: str, *rest: Any, **more: Any) -> Any:
            if method in lost:
                lost.clear()
                raise BrokerUnavailable(address=target)
            return await unary(self, target, method, *rest, **more)

        monkeypatch.setattr(Connection, "unary", losing)
        with pytest.raises(DuplicateTopic):
            admin.create_topic(topic, order=5)


def test_a_topic_is_deleted_beside_a_broker_that_stands_still(cluster: Cluster, topic: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        number = admin.create_topic(topic)["number"]
        head = admin.describe_cluster()["head"]
        stopped = next(broker for broker in (2, 1, 0) if broker != head)
        cluster.kill(stopped, signal.SIGSTOP)
        try:
            with Admin(bootstrap=cluster.addresses[head].unix) as beside:
                started = time.monotonic()
                beside.delete_topic(topic)
                assert time.monotonic() - started < 9
                with pytest.raises(UnknownTopic):
                    beside.describe_topic(topic)
        finally:
            cluster.kill(stopped, signal.SIGCONT)
        assert eventually(lambda: number not in {each["topic"] for each in inspected(cluster.name)["topics"]})
        admin.create_topic(topic)


def test_what_is_cancelled_at_the_client_is_ended_at_the_broker(cluster: Cluster, topic: str) -> None:
    async def run() -> None:
        from client import AsyncAdmin

        async with AsyncAdmin(cluster=cluster.name) as admin:
            for number in range(20):
                name = f"{topic}-{number}"
                task = asyncio.create_task(admin.create_topic(name))
                await asyncio.sleep(number * 0.0005)
                task.cancel()
                done = not isinstance((await asyncio.gather(task, return_exceptions=True))[0], BaseException)
                try:
                    await admin.create_topic(name)
                    assert not done
                except DuplicateTopic:
                    pass
                await admin.delete_topic(name)

    asyncio.run(run())


def test_calls_right_after_the_heads_death_wait_for_the_next_head() -> None:
    """At a broker that is not head and passes them on, over a channel that it used before."""
    with Cluster(small_config(brokers=4, restart=False)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t", order=2)
        with Subscriber("t", cluster=cluster.name, group="g"):
            pass
        calls: list[Callable[[Admin], Any]] = [
            lambda beside: beside.create_topic("new"), lambda beside: beside.alter_topic("t", retention_bytes=1 << 20),
            lambda beside: beside.reset_group("t", "g", "end")]
        asked = (admin.describe_cluster()["head"] + 3) % 4
        with Admin(bootstrap=cluster.addresses[asked].unix) as beside:
            for call in calls:
                head = beside.describe_cluster()["head"]
                beside.reset_group("t", "g", "beginning")
                if head == asked:
                    break
                cluster.kill(head)
                call(beside)
        assert {each["name"] for each in admin.list_topics()} == {"t", "new"}
