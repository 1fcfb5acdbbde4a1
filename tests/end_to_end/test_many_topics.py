"""A topic costs what it holds: many of them in little memory, each with its messages, over both transports.

`pytest tests/end_to_end/test_many_topics.py --topics 10000` has ten thousand of them in 1 GiB: 18 minutes on two busy cores.
"""

import asyncio

import pytest

from broker.config import GIB, MIB
from broker.errors import TopicTableFull
from client.admin import Admin, AsyncAdmin
from client.cluster import Cluster
from client.publisher import AsyncPublisher, Publisher
from client.subscriber import AsyncSubscriber
from tests.end_to_end.conftest import small_config
from tests.end_to_end.library_support import inspected

TRANSPORTS = ["grpc", "attached"]
TOPIC_BYTES = GIB // 10_000                     # of the region, for each topic
TOGETHER = 16                                   # clients at a time
LARGE_BYTES, ROUNDS = 30_000, 200


async def for_each(topics: list[str], work) -> None:                    # type: ignore[no-untyped-def]
    """Do something with each topic, some at a time."""
    waiting = iter(topics)

    async def go_on() -> None:
        for topic in waiting:
            await work(topic)

    await asyncio.gather(*(go_on() for _ in range(TOGETHER)))


async def fill_and_read(cluster: str, topics: list[str]) -> None:
    """Create the topics, give each a message over each transport, and read all back over the other one."""
    async with AsyncAdmin(cluster=cluster) as admin:
        for topic in topics:
            await admin.create_topic(topic)

    async def publish(topic: str) -> None:
        for transport in TRANSPORTS:
            async with AsyncPublisher(topic, cluster=cluster, transport=transport) as publisher:
                receipt = await (await publisher.publish(f"{topic} over {transport}".encode()))
                assert receipt.position == TRANSPORTS.index(transport)

    async def read(topic: str) -> None:
        transport = TRANSPORTS[len(topic) % 2]
        async with AsyncSubscriber(topic, cluster=cluster, transport=transport) as subscriber:
            assert [bytes(each.payload) for each in await subscriber.get_all()] == [
                f"{topic} over {each}".encode() for each in TRANSPORTS]

    await for_each(topics, publish)
    await for_each(topics, read)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("brokers", "pool"), [(4, "atomic"), (2, "partitioned"), (2, "leader")])
def test_each_of_many_topics_keeps_its_messages(brokers: int, pool: str, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--topics")
    topics = ["t" * (1 + number % 2) + str(number) for number in range(count)]
    config = small_config(brokers=brokers, pool=pool, topic_count_max=count, region_bytes=max(16 * MIB, count * TOPIC_BYTES))
    with Cluster(config) as cluster:
        asyncio.run(fill_and_read(cluster.name, topics))
        for transport in TRANSPORTS:            # one that is busy takes nothing from the others
            with Publisher(topics[0], cluster=cluster.name, transport=transport) as publisher:
                for _ in range(ROUNDS):
                    publisher.publish(bytes(LARGE_BYTES))
        found = {each["name"]: each for each in inspected(cluster.name)["topics"]}
        assert len(found) == count
        kept = {name: (found[name]["reclaimed_position"], found[name]["committed_position"]) for name in topics[1:]}
        assert {name: each for name, each in kept.items() if each != (0, len(TRANSPORTS))} == {}
        with Admin(cluster=cluster.name) as admin, pytest.raises(TopicTableFull, match="--topic-count-max"):
            admin.create_topic("one-more")


def test_a_hundred_and_fifty_seven_topics_of_a_byte_leave_room() -> None:
    topics = [f"t{number}" for number in range(157)]
    with Cluster(small_config(brokers=2, topic_count_max=256)) as cluster, Admin(cluster=cluster.name) as admin:
        for number, topic in enumerate(topics):
            admin.create_topic(topic, retention_bytes=-1)
            with Publisher(topic, cluster=cluster.name, transport=TRANSPORTS[number % 2]) as publisher:
                assert publisher.publish(b"x").result(30).position == 0
        pool = inspected(cluster.name)["pool"]
        assert pool["free"] > pool["segments"] // 2
