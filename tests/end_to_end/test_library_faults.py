"""Publishers and readers when brokers stop, die or have no room: everything settles, nothing comes twice or is lost."""

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from broker.errors import BrokerUnavailable, BufferFull, CxlmqError, DeliveryTimeout, PoolFull
from client import Admin, AsyncPublisher, Delivery, Publisher, Subscriber
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config
from tests.end_to_end.library_support import (
    eventually,
    held,
    inspected,
    numbered,
    read,
    read_topic,
    segments_owned,
    settles_to_nothing,
)

TIMEOUT = 2.0


@pytest.fixture(params=["grpc", "attached"])
def transport(request: pytest.FixtureRequest) -> str:
    """How the publishers' batches travel: what is promised does not depend on it."""
    return str(request.param)


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Two brokers, which tests stop and continue."""
    with Cluster(small_config(brokers=2, region_bytes="32MiB", session_lease_seconds=6)) as running:
        yield running
        assert settles_to_nothing(running.name), f"{held(running.name)}: a session whose publisher could not close it ends by itself"


def is_stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped."""
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in Path(f"/proc/{pid}/task").glob("*/stat"))


@contextmanager
def stopped(cluster: Cluster, *brokers: int) -> Iterator[None]:
    """Brokers that do nothing for a while."""
    for broker in brokers or list(cluster.processes):
        cluster.kill(broker, signal.SIGSTOP)
    pids = [pid for broker, pid in cluster.processes.items() if not brokers or broker in brokers]
    assert eventually(lambda: all(map(is_stopped, pids))), "an attached batch is faster than the signal"
    try:
        yield
    finally:
        for broker in brokers or list(cluster.processes):
            cluster.kill(broker, signal.SIGCONT)


@contextmanager
def topic_of(cluster: Cluster, **options: Any) -> Iterator[str]:
    """A topic of its own for a test."""
    name = f"topic-{os.urandom(3).hex()}"
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(name, **options)
        yield name
        admin.delete_topic(name)


def outcome(delivery: Delivery) -> type[BaseException] | None:
    """How a delivery ended; fails when it has not ended within its time-out."""
    error = delivery.exception(TIMEOUT + 10)
    return None if error is None else type(error)


# ---- brokers that are stopped ----------------------------------------------------------------------------------------


def test_every_delivery_settles_when_nobody_answers(pair: Cluster, transport: str) -> None:
    with topic_of(pair) as topic:
        publisher = Publisher(topic, cluster=pair.name, delivery_timeout=TIMEOUT, batch_bytes=1000, transport=transport)
        with publisher:
            acked = publisher.publish(b"before").result()
            with stopped(pair):
                deliveries = [publisher.publish(message) for message in numbered(2000)]
                deliveries.append(publisher.publish(b"packed last"))
                started = time.monotonic()
                assert {outcome(each) for each in deliveries} == {DeliveryTimeout}
                assert time.monotonic() - started < TIMEOUT + 10
                publisher.flush()
            counts = publisher.statistics()
            assert (counts["messages"], counts["acked"], counts["failed"]) == (2002, 1, 2001)
            # And it goes on when they do, with what it was not sure of at most once.
            assert publisher.publish(b"after").result(20).position is not None
        found = read_topic(pair.name, topic)
        assert found[acked.position or 0] == b"before"
        assert found[-1] == b"after"
        assert len(found) == len(set(found))


def test_a_bootstrap_that_does_not_answer_delays_no_timeout(pair: Cluster, transport: str) -> None:
    with topic_of(pair) as topic, \
            Publisher(topic, bootstrap=pair.addresses[1].tcp, delivery_timeout=TIMEOUT,
                      transport=transport) as publisher:
        with stopped(pair):
            started = time.monotonic()
            assert {outcome(publisher.publish(message)) for message in numbered(3)} == {DeliveryTimeout}
            assert time.monotonic() - started < 3 * (TIMEOUT + 3)


def test_an_async_delivery_settles_when_nobody_answers(pair: Cluster, transport: str) -> None:
    async def run(topic: str) -> None:
        async with AsyncPublisher(topic, cluster=pair.name, delivery_timeout=TIMEOUT, transport=transport) as publisher:
            with stopped(pair):
                delivery = await publisher.publish(b"m")
                with pytest.raises(DeliveryTimeout):
                    await asyncio.wait_for(_wait(delivery), TIMEOUT + 10)

    async def _wait(delivery: Delivery) -> object:
        return await delivery

    with topic_of(pair) as topic:
        asyncio.run(run(topic))


def test_flush_says_when_its_own_time_is_over(pair: Cluster, transport: str) -> None:
    with topic_of(pair) as topic, Publisher(topic, cluster=pair.name, transport=transport) as publisher:
        with stopped(pair):
            delivery = publisher.publish(b"m")
            with pytest.raises(DeliveryTimeout):
                publisher.flush(timeout=0.1)
            with pytest.raises(TimeoutError):
                delivery.result(timeout=0.1)
            assert not delivery.done()
        assert delivery.result(20).position == 0


FULL = {"batch_bytes": 10_000, "buffer_bytes": 100_000}


def fill(publisher: Publisher, count: int = 300) -> list[Delivery]:
    """More than the buffer holds."""
    return [publisher.publish(message) for message in numbered(count, 1000)]


def test_policy_error_refuses_what_has_no_room(pair: Cluster, transport: str) -> None:
    with topic_of(pair) as topic, Publisher(topic, cluster=pair.name, when_full="error", transport=transport,
                                            **FULL) as publisher:
        taken: list[Delivery] = []
        with stopped(pair):
            with pytest.raises(BufferFull):
                for message in numbered(300, 1000):
                    taken.append(publisher.publish(message))
            assert publisher.statistics()["buffered_bytes"] <= 100_000
            assert 80 <= len(taken) <= 100
        assert {outcome(each) for each in taken} == {None}
        publisher.flush()
        assert publisher.publish(b"room again").result(20).position == len(taken)
        assert publisher.statistics()["messages"] == len(taken) + 1


def test_policy_drop_newest_keeps_the_first_and_counts(pair: Cluster, transport: str) -> None:
    dropped: list[Delivery] = []
    with topic_of(pair) as topic:
        with Publisher(topic, cluster=pair.name, when_full="drop_newest", on_delivery=dropped.append,
                       **FULL, transport=transport) as publisher:
            with stopped(pair):
                deliveries = fill(publisher)
                assert [each.done() for each in deliveries] == sorted(each.done() for each in deliveries)
                lost = sum(each.done() for each in deliveries)
                assert len(dropped) == lost == publisher.statistics()["dropped_newest"]
            assert [outcome(each) for each in deliveries] == [None] * (300 - lost) + [BufferFull] * lost
            assert publisher.statistics()["acked"] == 300 - lost == publisher.statistics()["messages"]
        assert read_topic(pair.name, topic) == numbered(300, 1000)[:300 - lost]


def test_policy_drop_oldest_keeps_the_last_and_counts(pair: Cluster, transport: str) -> None:
    with topic_of(pair) as topic:
        with Publisher(topic, cluster=pair.name, when_full="drop_oldest", in_flight=2, transport=transport,
                       **FULL) as publisher:
            with stopped(pair):
                deliveries = fill(publisher)
            publisher.flush()
            counts = publisher.statistics()
            outcomes = [outcome(each) for each in deliveries]
            assert counts["messages"] == 300 - counts["dropped_newest"]
            assert counts["acked"] + counts["dropped_oldest"] == counts["messages"]
            assert outcomes.count(BufferFull) == counts["dropped_oldest"] + counts["dropped_newest"] > 100
            assert outcomes[-1] is None
        kept = [message for message, how in zip(numbered(300, 1000), outcomes, strict=True) if how is None]
        assert read_topic(pair.name, topic) == kept


def test_policy_block_waits_and_then_raises(pair: Cluster, transport: str) -> None:
    with topic_of(pair) as topic, \
            Publisher(topic, cluster=pair.name, delivery_timeout=TIMEOUT, **FULL, transport=transport) as publisher:
        waited = threading.Event()
        deliveries: list[Delivery] = []

        def publish() -> None:
            deliveries.extend(fill(publisher))
            waited.set()

        thread = threading.Thread(target=publish)
        with stopped(pair):
            thread.start()
            assert eventually(lambda: publisher.statistics()["buffered_bytes"] > 80_000)
            assert not waited.is_set()
        thread.join(30)
        assert waited.is_set()
        assert {outcome(each) for each in deliveries} == {None}


def test_closing_wakes_a_blocked_publisher(pair: Cluster, transport: str) -> None:
    raised: list[type[BaseException]] = []
    with topic_of(pair) as topic:
        publisher = Publisher(topic, cluster=pair.name, **FULL, transport=transport).open()

        def publish() -> None:
            try:
                fill(publisher, 100_000)
            except CxlmqError as error:
                raised.append(type(error))

        thread = threading.Thread(target=publish)
        with stopped(pair):
            thread.start()
            assert eventually(lambda: publisher.statistics()["buffered_bytes"] > 80_000)
            with pytest.raises(ZeroDivisionError):
                publisher.__exit__(ZeroDivisionError, *_raised())
                raise ZeroDivisionError
            thread.join(20)
            assert not thread.is_alive()
    assert len(raised) == 1


def _raised() -> tuple[BaseException, None]:
    return ZeroDivisionError(), None


def test_batches_grow_under_load_and_stay_within_their_bounds(pair: Cluster, transport: str) -> None:
    with topic_of(pair) as topic, \
            Publisher(topic, cluster=pair.name, batch_bytes_min=4096, batch_bytes_max=65536,
                      transport=transport) as publisher:
        assert publisher.statistics()["batch_bytes_target"] == 4096
        with stopped(pair):
            for message in numbered(3000, 1000):
                publisher.publish(message)
            assert publisher.statistics()["batch_bytes_target"] == 65536
        publisher.flush()

        def idle() -> bool:
            publisher.publish(b"m").result(20)
            return publisher.statistics()["batch_bytes_target"] == 4096

        assert eventually(idle), "without load, batches become small again"
        with Subscriber(topic, cluster=pair.name) as subscriber:
            count, sizes = 0, []
            while count < 3000:
                found = subscriber.fetch_batches(10)
                count += sum(batch.count for batch in found)
                sizes += [batch.nbytes for batch in found]
        assert 60_000 < max(sizes) <= 65536


def test_a_publisher_opens_beside_a_stopped_broker_and_admin_calls_go_elsewhere(pair: Cluster, transport: str) -> None:
    with topic_of(pair) as topic:
        with stopped(pair, 1), Admin(cluster=pair.name) as admin, \
                Publisher(topic, cluster=pair.name, delivery_timeout=30, transport=transport) as publisher:
            assert admin.describe_topic(topic)["name"] == topic
            deliveries = [publisher.publish(message) for message in numbered(10)]
            pair.kill(1, signal.SIGCONT)
            assert {outcome(each) for each in deliveries} == {None}


# ---- no room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_bytes", [16 << 10, 1 << 20])
def test_three_times_the_region_for_a_reader_that_follows(batch_bytes: int, transport: str) -> None:
    count, nbytes = 48 * 1024 // 16, 16 << 10
    with Cluster(small_config(brokers=4, region_bytes="16MiB")) as cluster, topic_of(cluster) as topic:
        with Subscriber(topic, cluster=cluster.name) as subscriber, \
                Publisher(topic, cluster=cluster.name, batch_bytes=batch_bytes, transport=transport) as publisher:
            thread = threading.Thread(target=publisher.publish_many, args=(numbered(count, nbytes),))
            thread.start()
            for number in range(count):
                message = subscriber.get_next(timeout=30)
                assert message is not None, f"nothing after {number} messages"
                assert message.payload == numbered_one(number, nbytes)
            thread.join()
            publisher.flush()
            assert publisher.statistics()["failed"] == 0
            assert subscriber.fetch(1, timeout=0.05) == []


def numbered_one(number: int, nbytes: int) -> bytes:
    """What `numbered` has at this place."""
    return f"m-{number:08d}-".encode().ljust(nbytes, b".")


def test_a_reader_that_stands_still_is_named_and_then_all_resolves(transport: str) -> None:
    nbytes = 32 << 10
    with Cluster(small_config(brokers=2, region_bytes="16MiB")) as cluster, topic_of(cluster) as topic:
        with Subscriber(topic, cluster=cluster.name, buffer_bytes=1) as reader, \
                Publisher(topic, cluster=cluster.name, delivery_timeout=5, batch_bytes=64 << 10,
                          buffer_bytes=4 << 20, transport=transport) as publisher:
            publisher.publish(b"first").result()
            assert read(reader, 1) == [b"first"]
            deliveries: list[Delivery] = []
            refused: CxlmqError | None = None
            started = time.monotonic()
            for number in itertools.count():
                deliveries.append(publisher.publish(numbered_one(number, nbytes)))
                done = next((each for each in deliveries if each.done() and each.exception() is not None), None)
                if done is not None:
                    refused = done.exception()
                    break
                assert time.monotonic() - started < 60
            assert isinstance(refused, PoolFull)
            assert "reader" in refused.message
            assert f"process {os.getpid()}" in str(refused.details["holder"])
            # The reader goes on: whatever was acknowledged is there once and in order, and there is room again.
            thread_done = threading.Event()
            got: list[bytes] = []

            def follow() -> None:
                while not thread_done.is_set():
                    got.extend(each.payload for each in reader.fetch(100, timeout=0.1))

            thread = threading.Thread(target=follow)
            thread.start()
            outcomes = [outcome(each) for each in deliveries]
            last = publisher.publish(b"last").result(20)
            assert eventually(lambda: got[-1:] == [b"last"])
            thread_done.set()
            thread.join()
        acked = [numbered_one(number, nbytes) for number, how in enumerate(outcomes) if how is None]
        definite = {numbered_one(number, nbytes) for number, how in enumerate(outcomes) if how is PoolFull}
        assert len(got) == len(set(got)) == last.position
        assert [each for each in got if each in set(acked)] == acked
        assert not definite & set(got), "what was refused is not in the log"
        assert segments_owned(cluster.name) > 0


def test_a_topic_that_keeps_everything_says_that_it_is_full(transport: str) -> None:
    with Cluster(small_config(brokers=2, region_bytes="16MiB")) as cluster:
        with topic_of(cluster, retention_bytes=-1) as topic:
            with Publisher(topic, cluster=cluster.name, delivery_timeout=3, batch_bytes=64 << 10,
                           buffer_bytes=1 << 20, transport=transport) as publisher:
                deliveries = []
                while not any(each.done() and each.exception() is not None for each in deliveries):
                    deliveries.append(publisher.publish(numbered_one(len(deliveries), 60_000)))
                outcomes = [outcome(each) for each in deliveries]
            assert PoolFull in outcomes
            error = next(each.exception() for each in deliveries if outcome(each) is PoolFull)
            assert "never drops" in str(error.details["holder"])
            got = read_topic(cluster.name, topic)
            acked, refused = ([numbered_one(number, 60_000) for number, how in enumerate(outcomes) if how is what]
                              for what in (None, PoolFull))
            assert [each for each in got if each in set(acked)] == acked
            assert not set(refused) & set(got), "what was refused is not in the log"
        with topic_of(cluster) as topic, Publisher(topic, cluster=cluster.name, transport=transport) as publisher:
            assert publisher.publish(bytes(60_000)).result().position == 0


def test_a_small_region_takes_batches_as_large_as_it_allows(transport: str) -> None:
    with Cluster(small_config(brokers=4, region_bytes="16MiB")) as cluster, topic_of(cluster) as topic:
        with Admin(cluster=cluster.name) as admin:
            largest = admin.describe_cluster()["message_bytes_max"]
        with Publisher(topic, cluster=cluster.name, delivery_timeout=20, transport=transport) as publisher:
            deliveries = [publisher.publish(bytes(largest)) for _ in range(40)]
            assert {outcome(each) for each in deliveries} == {None}


# ---- brokers that die --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "graceful stop"])
@pytest.mark.parametrize("ack", [0, 1])
def test_a_broker_lost_in_mid_stream_loses_and_doubles_nothing(number: signal.Signals, ack: int,
                                                               transport: str) -> None:
    messages = numbered(30_000)
    with Cluster(small_config(brokers=4, restart=False)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        readers = [Subscriber("t", cluster=cluster.name, broker=broker).open() for broker in (0, 2, 3)]
        with Publisher("t", cluster=cluster.name, batch_bytes=500, ack=ack, transport=transport) as publisher:
            deliveries = [publisher.publish(message) for message in messages[:10_000]]
            deliveries[5_000].result()
            cluster.kill(2, number)
            deliveries += [publisher.publish(message) for message in messages[10_000:]]
            assert {outcome(each) for each in deliveries} == {None}
        for reader in readers:
            # Also at level 0: what no broker has answered is sent again.
            assert read(reader, len(messages)) == messages
            reader.close()
        assert settles_to_nothing_at_living(cluster)


def settles_to_nothing_at_living(cluster: Cluster) -> bool:
    """As `settles_to_nothing`, without what the dead brokers' own lines still say."""
    def nothing() -> bool:
        found = inspected(cluster.name)
        share = {kind: len_max // 4 for kind, len_max in (
            ("sessions", cluster.config.session_count_max), ("cursors", cluster.config.cursor_count_max))}
        mine = [each for each in found["sessions"] if each["session"] // share["sessions"] in cluster.processes
                and each["state"] == "open" and each["sequencer_state"] == "open"]
        cursors = [each for each in found["cursors"] if each["cursor"] // share["cursors"] in cluster.processes]
        return not mine and not cursors

    return eventually(nothing)


def test_a_stopped_broker_that_goes_on_again_breaks_nothing(transport: str) -> None:
    messages = numbered(20_000)
    with Cluster(small_config(brokers=4)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        with Subscriber("t", cluster=cluster.name, broker=1) as there, \
                Subscriber("t", cluster=cluster.name, broker=3) as elsewhere, \
                Publisher("t", cluster=cluster.name, batch_bytes=500, transport=transport) as publisher:
            deliveries = [publisher.publish(message) for message in messages[:10_000]]
            with stopped(cluster, 1):
                deliveries += [publisher.publish(message) for message in messages[10_000:]]
                time.sleep(0.3)             # some of them are on their way to the stopped broker now
            assert {outcome(each) for each in deliveries} == {None}
            assert read(there, 20_000) == messages
            assert read(elsewhere, 20_000) == messages


def test_publishers_go_on_when_one_of_them_dies_in_mid_batch(transport: str) -> None:
    # A publisher that dies leaves a gap in its session at worst: the others' batches do not wait for it.
    program = ("import sys; from client import Publisher\n"
               "with Publisher('t', cluster=sys.argv[1], batch_bytes=2000, transport=sys.argv[2]) as p:\n"
               "    print('ready', flush=True)\n"
               "    while True: p.publish(b'dying' * 20)\n")
    import subprocess
    import sys

    with Cluster(small_config(brokers=2)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        dying = subprocess.Popen([sys.executable, "-c", program, cluster.name, transport], stdout=subprocess.PIPE)
        assert dying.stdout
        assert dying.stdout.readline() == b"ready\n"
        with Publisher("t", cluster=cluster.name, transport=transport) as publisher:
            assert publisher.publish(b"with it").result().position is not None
            dying.kill()
            dying.communicate()
            assert publisher.publish(b"without it").result(20).position is not None
        found = read_topic(cluster.name, "t")
        assert found[-1] == b"without it"
        assert set(found) <= {b"dying" * 20, b"with it", b"without it"}


def test_what_only_a_head_can_do_is_done_by_the_next_one() -> None:
    def created() -> bool:
        with suppress(BrokerUnavailable):           # for as long as there is none, it says so
            admin.create_topic("u")
            return True
        return False

    with Cluster(small_config(brokers=2, restart=False)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        cluster.kill(0)
        assert eventually(created)
        assert {each["name"] for each in admin.list_topics()} == {"t", "u"}


# ---- memory ------------------------------------------------------------------------------------------------------------


def beside_the_region(pid: int, name: str) -> int:
    """Resident bytes of a process, its mapping of the region not counted."""
    return sum(each.rss for each in psutil.Process(pid).memory_maps(grouped=True)
               if f"cxlmq-{name}" not in each.path)


def test_brokers_stay_small_under_large_batches() -> None:
    with Cluster(small_config(brokers=2, region_bytes="256MiB")) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        publishers = [Publisher("t", cluster=cluster.name, batch_bytes=4 << 20, transport="grpc").open()
                      for _ in range(4)]
        data = bytes(1 << 20)
        for _ in range(60):
            for publisher in publishers:
                publisher.publish(data)
        for publisher in publishers:
            publisher.close()
        for pid in cluster.processes.values():
            assert beside_the_region(pid, cluster.name) <= 120 << 20
