"""The library against a running cluster: what a receipt promises, what readers get, and that everything ends."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from broker.errors import (
    BadTopicName,
    BadTopicOptions,
    BrokerUnavailable,
    ClosedError,
    ConfigError,
    DuplicateTopic,
    MessageTooBig,
    PositionLost,
    RegionMissing,
    SessionFenced,
    UnknownTopic,
)
from client import Admin, AsyncAdmin, AsyncPublisher, AsyncSubscriber, Delivery, Publisher, Subscriber
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config, unique
from tests.end_to_end.library_support import eventually, numbered, read, read_topic, segments_owned, settles_to_nothing


@pytest.fixture
def made(cluster: Cluster, topic: str) -> str:
    """A topic with order 5, ack 1."""
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
    return topic


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(cluster: Cluster) -> Iterator[None]:
    """Whatever the tests of this module did: sessions, cursors, slots and segments come back."""
    yield
    assert settles_to_nothing(cluster.name)
    assert eventually(lambda: segments_owned(cluster.name) == 0)


# ---- receipts and ack levels ---------------------------------------------------------------------------------------


def test_a_receipt_tells_position_level_and_broker(cluster: Cluster, made: str) -> None:
    messages = numbered(50)
    with Publisher(made, cluster=cluster.name, batch_bytes=200) as publisher:
        deliveries = [publisher.publish(message) for message in messages]
        receipts = [delivery.result() for delivery in deliveries]
    assert [receipt.position for receipt in receipts] == list(range(50))
    assert {(receipt.level, receipt.epoch, receipt.duplicate) for receipt in receipts} == {(1, 1, False)}
    assert {receipt.broker for receipt in receipts} == {0, 1, 2, 3}, "batches go to all brokers in turn"
    assert all(delivery.done() and delivery.exception() is None for delivery in deliveries)
    with Subscriber(made, cluster=cluster.name) as subscriber:
        found = subscriber.get_all()
    assert [(each.position, each.payload) for each in found] == list(enumerate(messages))
    assert [each.broker for each in found] == [receipt.broker for receipt in receipts]


def test_a_later_message_has_a_higher_position_than_an_acked_one(cluster: Cluster, made: str) -> None:
    with Publisher(made, cluster=cluster.name) as one, Publisher(made, cluster=cluster.name) as other:
        positions = [publisher.publish(b"m").result().position for _ in range(20) for publisher in (one, other)]
    assert positions == list(range(40))


def test_level_0_is_settled_when_sent_and_still_keeps_the_order(cluster: Cluster, made: str) -> None:
    messages = numbered(20_000)
    with Publisher(made, cluster=cluster.name, ack=0, batch_bytes=256) as publisher:
        deliveries = [publisher.publish(message) for message in messages]
        publisher.flush()
        assert {(each.result().position, each.result().level) for each in deliveries} == {(None, 0)}
        assert publisher.statistics()["acked"] == 20_000
    assert read_topic(cluster.name, made) == messages


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_level_2_means_on_another_brokers_disk(cluster: Cluster, topic: str, order: int) -> None:
    messages = numbered(200, 100, tag=f"durable{order}")
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic, order=order, ack=2, replication_factor=2)
    with Publisher(topic, cluster=cluster.name, batch_bytes=2000) as publisher:
        receipts = [publisher.publish(message) for message in messages]
        assert {each.result().level for each in receipts} == {2}
        # Asked while nothing is flushed by a shutdown: what is acked is in the files now.
        files = {path: path.read_bytes() for path in Path(cluster.config.folder).glob(f"replicas/*/{topic}.*")}
    assert len(files) == 4
    for message, receipt in zip(messages, receipts, strict=True):
        (holder,) = (path for path, data in files.items() if message in data)
        assert f".s{receipt.result().broker}." in holder.name
        assert holder.parent.name != f"broker-{receipt.result().broker}"


def test_a_publisher_may_ask_for_less_than_the_topic_gives(cluster: Cluster, topic: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic, ack=2, replication_factor=2)
    for ack in (0, 1, 2):
        with Publisher(topic, cluster=cluster.name, ack=ack) as publisher:
            assert publisher.publish(b"m").result().level == ack


# ---- deliveries ------------------------------------------------------------------------------------------------------


def test_callbacks_come_once_for_every_message(cluster: Cluster, made: str) -> None:
    called: list[Delivery] = []
    single: list[Delivery] = []
    with Publisher(made, cluster=cluster.name, on_delivery=called.append) as publisher:
        deliveries = [publisher.publish(message) for message in numbered(100)]
        deliveries[7].add_done_callback(single.append)
        publisher.flush()
        assert sorted(each.receipt().position or 0 for each in called) == list(range(100))
        deliveries[7].add_done_callback(single.append)
    assert single == [deliveries[7], deliveries[7]]


def test_a_failing_callback_stops_nothing(cluster: Cluster, made: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Delivery) -> None:
        raise RuntimeError("mine")

    with Publisher(made, cluster=cluster.name, on_delivery=fail, batch_bytes=100) as publisher:
        for message in numbered(50):
            publisher.publish(message)
        publisher.flush()
        assert publisher.statistics()["acked"] == 50
    assert "mine" in caplog.text


def test_a_callback_may_publish_but_not_wait(cluster: Cluster, made: str) -> None:
    outcomes: list[object] = []

    def chain(_: Delivery) -> None:
        second = publisher.publish(b"second")
        try:
            second.result()
        except RuntimeError as error:
            outcomes.append(error)
        second.add_done_callback(outcomes.append)

    with Publisher(made, cluster=cluster.name) as publisher:
        publisher.publish(b"first").add_done_callback(chain)
        assert eventually(lambda: len(outcomes) == 2)
    assert "cannot wait" in str(outcomes[0])
    assert read_topic(cluster.name, made) == [b"first", b"second"]


def test_one_message_goes_without_flush(cluster: Cluster, made: str) -> None:
    with Publisher(made, cluster=cluster.name, linger_ms=1) as publisher:
        delivery = publisher.publish(b"alone")
        assert eventually(delivery.done)


def test_linger_gathers_messages(cluster: Cluster, made: str) -> None:
    with Publisher(made, cluster=cluster.name, linger_ms=60_000) as publisher:
        for message in numbered(100):
            publisher.publish(message)
        publisher.flush()                   # does not linger
        assert publisher.statistics()["batches"] == 1
        assert publisher.publish(b"waited for").result().position == 100


def test_leaving_the_block_delivers_everything(cluster: Cluster, made: str) -> None:
    with Publisher(made, cluster=cluster.name, linger_ms=60_000) as publisher:
        delivery = publisher.publish(b"m")
    assert delivery.result().position == 0


def test_an_exception_in_the_block_sends_what_was_published_before_it(cluster: Cluster, made: str) -> None:
    with pytest.raises(ZeroDivisionError), Publisher(made, cluster=cluster.name, linger_ms=60_000) as publisher:
        delivery = publisher.publish(b"packed, not sent")
        _ = 1 / 0
    assert delivery.done()
    assert delivery.receipt().position == 0
    with pytest.raises(ClosedError):
        publisher.publish(b"after")
    publisher.close()                       # once more does no harm
    assert read_topic(cluster.name, made) == [b"packed, not sent"]


def test_flush_waits_only_for_what_was_published_before(cluster: Cluster, made: str) -> None:
    stop = threading.Event()
    with Publisher(made, cluster=cluster.name, batch_bytes=1000, buffer_bytes=100_000) as publisher:
        def publish() -> None:
            while not stop.is_set():
                publisher.publish(b"x" * 50)

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            for _ in range(20):
                delivery = publisher.publish(b"mine")
                publisher.flush()
                assert delivery.done()
        finally:
            stop.set()
            thread.join()


def test_several_threads_share_a_publisher(cluster: Cluster, made: str) -> None:
    def publish(number: int) -> None:
        for message in numbered(2000, tag=f"t{number}"):
            deliveries[number].append(publisher.publish(message))

    deliveries: list[list[Delivery]] = [[], [], []]
    with Publisher(made, cluster=cluster.name, batch_bytes=500) as publisher:
        threads = [threading.Thread(target=publish, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        publisher.flush()
    found = read_topic(cluster.name, made)
    for number in range(3):
        mine = numbered(2000, tag=f"t{number}")
        assert [each for each in found if each in set(mine)] == mine
        assert [found[each.result().position or 0] for each in deliveries[number]] == mine


def test_arrays_and_generators_are_messages_too(cluster: Cluster, made: str) -> None:
    rows = numpy.arange(3000 * 24, dtype=numpy.uint32).astype(numpy.uint8).reshape(3000, 24)
    with Publisher(made, cluster=cluster.name, batch_bytes=5000) as publisher:
        assert publisher.publish_array(rows).result().position == 2999
        assert publisher.publish_many(bytes(row) for row in rows[:10]).result().position == 3009
        assert publisher.statistics()["messages"] == 3010
    with Subscriber(made, cluster=cluster.name) as subscriber:
        batches, count = [], 0
        while count < 3010:
            batches += subscriber.fetch_batches(timeout=10)
            count = sum(batch.count for batch in batches)
    found = numpy.concatenate([batch.array() for batch in batches])
    assert (found[:3000] == rows).all()
    assert (found[3000:] == rows[:10]).all()
    assert [batch.position for batch in batches] == [0, *numpy.cumsum([batch.count for batch in batches])[:-1]]


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_each_of_many_messages_is_packed_before_the_next_is_asked_for(cluster: Cluster, made: str,
                                                                      transport: str) -> None:
    """Whoever makes them may write the next one into the same memory, wait for the last one, or fail."""
    memory = bytearray(8)

    def messages(subscriber: Subscriber) -> Iterator[bytearray]:
        for number in range(3):
            memory[:] = b"%08d" % number
            yield memory
            assert [bytes(each.payload) for each in subscriber.fetch(1, timeout=10)] == [memory]
        raise OSError("no more")

    with Publisher(made, cluster=cluster.name, transport=transport) as publisher:
        publisher.publish_many(memory[:0] for _ in range(1)).result()
        with Subscriber(made, cluster=cluster.name, start="end") as subscriber, pytest.raises(OSError, match="no more"):
            publisher.publish_many(messages(subscriber))
        with pytest.raises(ValueError, match="at least one"):
            publisher.publish_many([])
    assert read_topic(cluster.name, made) == [b"", b"00000000", b"00000001", b"00000002"]


def test_compressed_batches_arrive_as_they_were(cluster: Cluster, made: str) -> None:
    messages = numbered(5000, 200)
    for compression in ("gzip", "deflate"):
        with Publisher(made, cluster=cluster.name, transport="grpc", compression=compression) as publisher:
            publisher.publish_many(messages)
    assert read_topic(cluster.name, made) == messages * 2


# ---- async -----------------------------------------------------------------------------------------------------------


def test_the_async_twins_do_the_same(cluster: Cluster, topic: str) -> None:
    messages = numbered(300)

    async def run() -> list[bytes]:
        found: list[bytes] = []
        async with AsyncAdmin(cluster=cluster.name) as admin:
            assert (await admin.create_topic(topic))["order"] == 5
            assert topic in [each["name"] for each in await admin.list_topics()]
            with pytest.raises(DuplicateTopic):
                await admin.create_topic(topic)
            async with AsyncPublisher(topic, cluster=cluster.name) as publisher:
                delivery = await publisher.publish(messages[0])
                assert (await delivery).position == 0
                assert (await (await publisher.publish_many(messages[1:200])))
                rows = numpy.frombuffer(b"".join(messages[200:]), numpy.uint8).reshape(100, -1)
                await publisher.publish_array(rows)
                await publisher.flush()
                assert publisher.statistics()["acked"] == 300
            async with AsyncSubscriber(topic, cluster=cluster.name) as subscriber:
                first = await subscriber.get_next()
                assert first is not None
                found += [first.payload, *(each.payload for each in await subscriber.get_all())]
                assert await subscriber.fetch(1, timeout=0.01) == []
                assert await subscriber.get_next(timeout=0.01) is None
                await subscriber.seek(250)
                assert (await subscriber.fetch(1))[0].payload == messages[250]
            assert (await admin.describe_topic(topic))["end_position"] == 300
            assert (await admin.describe_cluster())["name"] == cluster.name
        return found

    assert asyncio.run(run()) == messages


def test_async_for_follows_what_comes(cluster: Cluster, made: str) -> None:
    async def run() -> list[bytes]:
        found: list[bytes] = []
        async with AsyncSubscriber(made, cluster=cluster.name) as subscriber, \
                AsyncPublisher(made, cluster=cluster.name) as publisher:
            await publisher.publish(b"0")
            async for message in subscriber:
                found.append(message.payload)
                if len(found) == 50:
                    break
                await (await publisher.publish(str(len(found)).encode()))
        return found

    assert asyncio.run(run()) == [str(number).encode() for number in range(50)]


def test_many_coroutines_await_their_deliveries(cluster: Cluster, made: str) -> None:
    async def one(publisher: AsyncPublisher, number: int) -> int | None:
        return (await (await publisher.publish(b"%d" % number))).position

    async def run() -> list[int | None]:
        async with AsyncPublisher(made, cluster=cluster.name) as publisher:
            return await asyncio.gather(*(one(publisher, number) for number in range(500)))

    assert sorted(asyncio.run(run())) == list(range(500))  # type: ignore[type-var]


def test_an_async_publisher_waits_for_room_without_blocking_its_loop(cluster: Cluster, made: str) -> None:
    async def run() -> int:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.001)
                beats += 1

        task = asyncio.create_task(beat())
        async with AsyncPublisher(made, cluster=cluster.name, batch_bytes=64 << 10, buffer_bytes=256 << 10) as publisher:
            for _ in range(200):
                await publisher.publish(bytes(60 << 10))
                assert publisher.statistics()["buffered_bytes"] <= 256 << 10
        task.cancel()
        return beats

    assert asyncio.run(run()) > 0
    with Admin(cluster=cluster.name) as admin:
        assert admin.describe_topic(made)["end_position"] == 200


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_fetch_is_empty_when_nothing_comes(cluster: Cluster, made: str) -> None:
    with Subscriber(made, cluster=cluster.name) as subscriber:
        assert subscriber.fetch(10, timeout=0.0) == []
        assert subscriber.fetch(10, timeout=0.05) == []
        assert subscriber.fetch_batches(timeout=0.05) == []
        assert subscriber.get_next(timeout=0.01) is None
        assert subscriber.get_all() == []
        assert subscriber.position == 0


def test_readers_start_where_they_say(cluster: Cluster, made: str) -> None:
    messages = numbered(1000)
    with Publisher(made, cluster=cluster.name, batch_bytes=700) as publisher:
        publisher.publish_many(messages[:600]).result()
        with Subscriber(made, cluster=cluster.name, start="end") as end, \
                Subscriber(made, cluster=cluster.name, start=123) as middle, \
                Subscriber(made, cluster=cluster.name, start=900) as ahead, \
                Subscriber(made, cluster=cluster.name) as beginning:
            assert (end.position, middle.position, ahead.position, beginning.position) == (600, 123, 900, 0)
            publisher.publish_many(messages[600:]).result()
            assert read(end, 400) == messages[600:]
            assert read(middle, 877) == messages[123:]
            assert read(ahead, 100) == messages[900:]
            assert read(beginning, 1000) == messages
            assert {each.position for each in (end, middle, ahead, beginning)} == {1000}


def test_seek_goes_anywhere(cluster: Cluster, made: str) -> None:
    messages = numbered(500)
    with Publisher(made, cluster=cluster.name, batch_bytes=300) as publisher, \
            Subscriber(made, cluster=cluster.name) as subscriber:
        publisher.publish_many(messages).result()
        for position in (499, 0, 250, 17, 498):
            subscriber.seek(position)
            assert subscriber.position == position
            assert [each.payload for each in subscriber.fetch(1, timeout=10)] == [messages[position]]
            assert subscriber.position == position + 1
        subscriber.seek("end")
        assert subscriber.fetch(1, timeout=0.05) == []
        publisher.publish(b"new").result()
        assert read(subscriber, 1) == [b"new"]
        subscriber.seek("beginning")
        assert read(subscriber, 500) == messages


def test_one_message_at_a_time_from_a_large_batch(cluster: Cluster, made: str) -> None:
    # 200,000 messages in one batch: taking each from the start again would take minutes.
    rows = numpy.arange(200_000, dtype="<u4").view(numpy.uint8).reshape(-1, 4)
    with Publisher(made, cluster=cluster.name, batch_bytes=4_000_000) as publisher:
        publisher.publish_array(rows).result()
    started = time.monotonic()
    with Subscriber(made, cluster=cluster.name) as subscriber:
        for number in range(len(rows)):
            message = subscriber.get_next(timeout=10)
            assert message is not None
            assert message.payload == number.to_bytes(4, "little")
    assert time.monotonic() - started < 60


def test_any_broker_serves_any_reader(cluster: Cluster, made: str) -> None:
    messages = numbered(400)
    with Publisher(made, cluster=cluster.name, batch_bytes=300) as publisher:
        publisher.publish_many(messages)
    for broker in range(4):
        assert read_topic(cluster.name, made, broker=broker) == messages
    with pytest.raises(BrokerUnavailable), Subscriber(made, cluster=cluster.name, broker=4):
        pass


def test_closing_wakes_a_waiting_reader(cluster: Cluster, made: str) -> None:
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            subscriber.fetch(1, timeout=60)
        except ClosedError as error:
            raised.append(error)

    with Subscriber(made, cluster=cluster.name) as subscriber:
        thread = threading.Thread(target=wait)
        thread.start()
    thread.join(30)
    assert len(raised) == 1


# ---- where the cluster is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_one_address_is_enough(cluster: Cluster, topic: str, kind: str) -> None:
    messages = numbered(300)
    for broker in range(4):
        address = getattr(cluster.addresses[broker], kind)
        name = f"{topic}-{broker}"
        with Admin(bootstrap=address) as admin:
            admin.create_topic(name)
            with Publisher(name, bootstrap=address, batch_bytes=500) as publisher:
                deliveries = [publisher.publish(message) for message in messages]
                seen = {each.result().broker for each in deliveries}
                # Which broker gets which batch is decided by who is free: each gets some sooner or later.
                for _ in range(10_000):
                    if seen == {0, 1, 2, 3}:
                        break
                    seen.add(publisher.publish(b"more").result().broker)
                assert seen == {0, 1, 2, 3}
            with Subscriber(name, bootstrap=address) as subscriber:
                assert read(subscriber, 300) == messages
            assert admin.describe_cluster()["name"] == cluster.name
            admin.delete_topic(name)


def test_nobody_there_is_a_typed_error() -> None:
    for arguments, kind in (({"cluster": unique("nobody")}, RegionMissing), ({"bootstrap": "127.0.0.1:1"}, BrokerUnavailable)):
        for make in (lambda **where: Publisher("t", **where), lambda **where: Subscriber("t", **where)):
            with pytest.raises(kind), make(**arguments):
                pass
        with pytest.raises(kind), Admin(**arguments) as admin:
            admin.list_topics()


def test_two_clusters_do_not_know_each_other(cluster: Cluster, made: str) -> None:
    with Cluster(small_config(brokers=2, region_bytes="16MiB")) as other, Admin(cluster=other.name) as admin:
        admin.create_topic(made)
        with Publisher(made, cluster=other.name) as there, Publisher(made, cluster=cluster.name) as here:
            there.publish_many(numbered(100, tag="there"))
            here.publish_many(numbered(100, tag="here"))
        assert read_topic(other.name, made) == numbered(100, tag="there")
        assert read_topic(cluster.name, made) == numbered(100, tag="here")
        admin.delete_topic(made)
        assert read_topic(cluster.name, made) == numbered(100, tag="here")


# ---- topics ----------------------------------------------------------------------------------------------------------


def test_order_4_is_called_5(cluster: Cluster, topic: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        assert admin.create_topic(topic, order=4)["order"] == 5
        assert admin.describe_topic(topic)["order"] == 5


@pytest.mark.parametrize("options", [
    {"ack": 2}, {"ack": 2, "replication_factor": 1}, {"ack": 3}, {"ack": -1}, {"order": 3}, {"order": 6},
    {"replication_factor": 0}, {"replication_factor": 5}, {"retention_bytes": -2},
], ids=str)
def test_options_that_do_not_fit_are_refused_and_create_nothing(cluster: Cluster, topic: str, options: Any) -> None:
    with Admin(cluster=cluster.name) as admin:
        with pytest.raises(BadTopicOptions):
            admin.create_topic(topic, **options)
        with pytest.raises(UnknownTopic):
            admin.describe_topic(topic)


@pytest.mark.parametrize("name", ["", ".hidden", "__internal", "a/b", "a b", "x" * 121, "ä", "a\0b"])
def test_names_that_are_not_allowed_are_refused_by_every_method(cluster: Cluster, name: str) -> None:
    calls: list[Callable[[], Any]] = [lambda: Publisher(name, cluster=cluster.name),
                                      lambda: Subscriber(name, cluster=cluster.name),
                                      lambda: AsyncPublisher(name), lambda: AsyncSubscriber(name)]
    with Admin(cluster=cluster.name) as admin:
        calls += [lambda: admin.create_topic(name), lambda: admin.delete_topic(name),
                  lambda: admin.describe_topic(name)]
        for call in calls:
            with pytest.raises(BadTopicName):
                call()


def test_an_unknown_topic_is_said_by_every_method(cluster: Cluster, topic: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        for call in (admin.delete_topic, admin.describe_topic):
            with pytest.raises(UnknownTopic, match=f"topic create {topic}"):
                call(topic)
    for use in (Publisher, Subscriber):
        with pytest.raises(UnknownTopic), use(topic, cluster=cluster.name):
            pass

    async def run(kind: Any) -> None:
        async with kind(topic, cluster=cluster.name):
            pass

    for kind in (AsyncPublisher, AsyncSubscriber):
        with pytest.raises(UnknownTopic):
            asyncio.run(run(kind))


def test_a_name_is_taken_once(cluster: Cluster, made: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        with pytest.raises(DuplicateTopic):
            admin.create_topic(made)
        assert admin.describe_topic(made)["generation"]


@pytest.mark.parametrize("ack", [2, 3, -1])
def test_a_level_that_the_topic_cannot_give_is_refused_by_the_publisher(cluster: Cluster, made: str, ack: int) -> None:
    with pytest.raises((BadTopicOptions, ConfigError)), Publisher(made, cluster=cluster.name, ack=ack):
        pass


def test_topics_come_and_go_under_traffic(cluster: Cluster, made: str) -> None:
    stop = threading.Event()
    published: list[bytes] = []
    failures: list[BaseException] = []

    def traffic() -> None:
        try:
            with Publisher(made, cluster=cluster.name, batch_bytes=2000, transport="grpc") as publisher:
                while not stop.is_set():
                    messages = numbered(100, tag=f"r{len(published)}")
                    publisher.publish_many(messages).result()
                    published.extend(messages)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        with Admin(cluster=cluster.name) as admin:
            for number in range(15):
                name = f"{made}-{number}"
                # The same name again: nothing of the earlier topic may be seen in it.
                for generation in range(2):
                    admin.create_topic(name)
                    mine = numbered(50, tag=f"{number}-{generation}")
                    with Publisher(name, cluster=cluster.name) as publisher:
                        assert publisher.publish_many(mine).result().position == 49
                    assert read_topic(cluster.name, name) == mine
                    admin.delete_topic(name)
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert read_topic(cluster.name, made) == published


def test_deleting_a_topic_reaches_everybody_who_uses_it(cluster: Cluster, topic: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
        events: list[Exception] = []
        with Subscriber(topic, cluster=cluster.name) as idle_reader, \
                Publisher(topic, cluster=cluster.name, on_event=events.append) as idle, \
                Publisher(topic, cluster=cluster.name, linger_ms=60_000) as lingering:
            idle.publish(b"m").result()
            assert read(idle_reader, 1) == [b"m"]
            waiting = lingering.publish(b"packed")
            admin.delete_topic(topic)
            with pytest.raises(UnknownTopic):
                idle_reader.fetch(1, timeout=20)
            assert eventually(lambda: bool(events)), "an idle publisher is told, too"
            with pytest.raises(UnknownTopic):
                idle.publish(b"after")
            with pytest.raises(UnknownTopic):
                waiting.result(20)
        admin.create_topic(topic)
        assert read_topic(cluster.name, topic) == []


def test_more_topics_than_places_are_refused() -> None:
    from broker.errors import TopicTableFull

    with Cluster(small_config(brokers=2, topic_count_max=16)) as cluster, Admin(cluster=cluster.name) as admin:
        for number in range(16):
            admin.create_topic(f"topic-{number}")
        with pytest.raises(TopicTableFull, match="topic_count_max"):
            admin.create_topic("one-more")
        assert len(admin.list_topics()) == 16
        for number in range(16):
            admin.delete_topic(f"topic-{number}")
        assert admin.create_topic("one-more")["name"] == "one-more"


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_messages_of_every_size_up_to_the_largest(cluster: Cluster, made: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        largest = admin.describe_cluster()["message_bytes_max"]
    sizes = [0, 1, 7, 8, 9, 63, 64, 65, 4095, 65535, 65536, 65537, 262143, 262144, 1 << 20, largest - 1, largest, 0]
    messages = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    with Publisher(made, cluster=cluster.name) as publisher:
        deliveries = [publisher.publish(message) for message in messages]
        for publish in (publisher.publish, lambda data: publisher.publish_many([b"first", data])):
            with pytest.raises(MessageTooBig, match=str(largest)):
                publish(bytes(largest + 1))
        assert [each.result().position for each in deliveries] == list(range(len(sizes)))
    assert read_topic(cluster.name, made) == [*messages, b"first"]


def test_too_big_is_said_before_anything_is_sent(cluster: Cluster, made: str) -> None:
    with Publisher(made, cluster=cluster.name) as publisher:
        with pytest.raises(MessageTooBig):
            publisher.publish(bytes(64 << 20))
        assert publisher.statistics()["messages"] == publisher.statistics()["batches"] == 0

    async def run() -> None:
        async with AsyncPublisher(made, cluster=cluster.name) as publisher:
            with pytest.raises(MessageTooBig):
                await publisher.publish(bytes(64 << 20))

    asyncio.run(run())


def test_messages_of_16_mib_from_several_publishers() -> None:
    # The second publisher's second message comes while the first publisher is idle, and has to get its turn.
    messages = [bytes([number]) * (16 << 20) for number in range(6)]
    with Cluster(small_config(brokers=1, region_bytes="512MiB")) as cluster, Admin(cluster=cluster.name) as admin:
        assert admin.describe_cluster()["message_bytes_max"] == 16 << 20
        admin.create_topic("large")
        with Publisher("large", cluster=cluster.name) as one, Publisher("large", cluster=cluster.name) as other:
            for number, message in enumerate(messages):
                publisher = one if number in (0, 1) else other
                assert publisher.publish(message).result(timeout=20).position == number
            with pytest.raises(MessageTooBig):
                one.publish(bytes((16 << 20) + 1))
        assert read_topic(cluster.name, "large") == messages


# ---- who a publisher is ----------------------------------------------------------------------------------------------


def test_a_second_publisher_of_the_same_client_id_takes_over(cluster: Cluster, made: str) -> None:
    with Publisher(made, cluster=cluster.name, client_id=77) as first:
        first.publish_many(numbered(10, tag="first")).result()
        with Publisher(made, cluster=cluster.name, client_id=77) as second:
            assert second.publish(b"second").result().position == 10
            late = first.publish(b"late")
            with pytest.raises(SessionFenced):
                late.result(20)
            with pytest.raises(SessionFenced):
                first.publish(b"later")
            assert second.publish(b"still").result().position == 11
    assert read_topic(cluster.name, made) == [*numbered(10, tag="first"), b"second", b"still"]


def test_a_fenced_publisher_of_level_0_notices(cluster: Cluster, made: str) -> None:
    with Publisher(made, cluster=cluster.name, client_id=78, ack=0) as first, \
            Publisher(made, cluster=cluster.name, client_id=78):
        def fenced() -> bool:
            try:
                first.publish(b"into the void")
            except SessionFenced:
                return True
            return False

        assert eventually(fenced)
    assert read_topic(cluster.name, made) == []


def test_a_client_id_can_be_used_again_and_again(cluster: Cluster, made: str) -> None:
    for number in range(5):
        with Publisher(made, cluster=cluster.name, client_id=79, batch_bytes=100) as publisher:
            deliveries = [publisher.publish(message) for message in numbered(300, tag=f"life{number}")]
            assert [each.result().position for each in deliveries] == list(range(number * 300, number * 300 + 300))
            assert not any(each.result().duplicate for each in deliveries)


def test_the_same_client_id_on_two_topics_is_two_sessions(cluster: Cluster, made: str, topic: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(f"{made}-2")
        with Publisher(made, cluster=cluster.name, client_id=80) as one, \
                Publisher(f"{made}-2", cluster=cluster.name, client_id=80) as two:
            for _ in range(5):
                assert not one.publish(b"1").result().duplicate
                assert not two.publish(b"2").result().duplicate
        admin.delete_topic(f"{made}-2")


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"batch_bytes": 0}, {"batch_bytes": 1 << 40}, {"batch_bytes_min": 0}, {"in_flight": 0}, {"in_flight": 1000},
    {"buffer_bytes": 0}, {"linger_ms": -1}, {"linger_ms": float("nan")}, {"delivery_timeout": 0}, {"client_id": 0},
    {"client_id": 1 << 64}, {"compression": "zip"}, {"when_full": "panic"}, {"transport": "pigeon"}, {"ack": 9},
    {"batch_bytes_min": 1 << 20, "batch_bytes_max": 1 << 16},
], ids=str)
def test_wrong_options_name_the_setting(cluster: Cluster, made: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised, Publisher(made, cluster=cluster.name, **options):
        pass
    assert raised.value.details["setting"] in options


@pytest.mark.parametrize("start", ["middle", -1, 1.5, None, True])
def test_a_wrong_start_is_refused(cluster: Cluster, made: str, start: Any) -> None:
    with pytest.raises(ConfigError):
        Subscriber(made, cluster=cluster.name, start=start)
    with Subscriber(made, cluster=cluster.name) as subscriber, pytest.raises(ConfigError):
        subscriber.seek(start)


def test_a_closed_subscriber_says_so(cluster: Cluster, made: str) -> None:
    with Subscriber(made, cluster=cluster.name) as subscriber:
        pass
    with pytest.raises(ClosedError):
        subscriber.fetch(1, timeout=5)


def test_a_position_that_is_reclaimed_is_said(topic: str) -> None:
    with Cluster(small_config(brokers=2, region_bytes="16MiB")) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic, retention_bytes=1 << 20)
        with Publisher(topic, cluster=cluster.name, batch_bytes=64 << 10) as publisher:
            for _ in range(100):
                publisher.publish(bytes(60_000))
            publisher.flush()
            assert eventually(lambda: admin.describe_topic(topic)["first_position"] > 10)
            with pytest.raises(PositionLost) as raised, Subscriber(topic, cluster=cluster.name, start=5):
                pass
            assert raised.value.details["position"] == 5
            first = raised.value.details["first_available"]
            with Subscriber(topic, cluster=cluster.name, start=first) as subscriber:
                assert subscriber.fetch(1, timeout=10)[0].position == first
                with pytest.raises(PositionLost):
                    subscriber.seek(5)
                assert subscriber.fetch(1, timeout=10)[0].position == first + 1, "refused: it goes on where it was"
                subscriber.seek("beginning")
                assert subscriber.fetch(1, timeout=10)[0].position >= first
