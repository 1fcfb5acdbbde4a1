"""Publishers that nobody closes lose nothing in silence: at the end of the program, when they are dropped, after an exception."""

import asyncio
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from broker.errors import ClosedError, ConfigError, CxlmqError, DeliveryTimeout
from client.admin import Admin
from client.cluster import Cluster
from client.publisher import AsyncPublisher, Publisher
from tests.end_to_end.conftest import small_config, unique
from tests.end_to_end.library_support import eventually, numbered, read_topic, settles_to_nothing

ROOT = Path(__file__).parents[2]
TRANSPORTS = ["grpc", "attached"]
COUNT = 2000

SYNC = """
from cxlmq import Publisher
publisher = Publisher({topic!r}, cluster={cluster!r}, transport={transport!r}, {options}).open()
for number in range({count}):
    publisher.publish(b"m-%08d-....." % number)
{end}
"""
ASYNC = """
import asyncio
from cxlmq import AsyncPublisher
async def main():
    global publisher
    publisher = await AsyncPublisher({topic!r}, cluster={cluster!r}, transport={transport!r}, {options}).open()
    for number in range({count}):
        await publisher.publish(b"m-%08d-....." % number)
asyncio.run(main())
{end}
"""
ENDS = {
    "returns": ("", 0),
    "exits": ("import sys; sys.exit(3)", 3),
    "raises": ("raise KeyError('the program')", 1),
    "interrupted": ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    "beside a daemon thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()", 0),
    "dropped": ("del publisher", 0),
    "forked": ("import os; child = os.fork()\nif child == 0: raise SystemExit(0)\nos.waitpid(child, 0)", 0),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(small_config(brokers=2)) as running:
        yield running


@pytest.fixture
def topic(cluster: Cluster) -> Iterator[str]:
    name = unique("topic")
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(name)
        yield name
        admin.delete_topic(name)


def stand_still(process: int) -> None:
    """Stop a process, and wait until it stands."""
    os.kill(process, signal.SIGSTOP)
    while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


def run(program: str, cluster: str, topic: str, transport: str, end: str = "", options: str = "",
        count: int = COUNT) -> "subprocess.CompletedProcess[str]":
    script = program.format(topic=topic, cluster=cluster, transport=transport, end=end, options=options, count=count)
    return subprocess.run([sys.executable, "-X", "dev", "-c", script], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)


@pytest.mark.parametrize("program", [SYNC, ASYNC], ids=["sync", "async"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("end", ENDS)
def test_what_was_published_is_there_when_the_program_has_ended(
        cluster: Cluster, topic: str, transport: str, program: str, end: str) -> None:
    statement, code = ENDS[end]
    ended = run(program, cluster.name, topic, transport, statement, "linger_ms=60000.0, batch_bytes=1 << 20")
    assert ended.returncode == code, ended.stderr
    assert read_topic(cluster.name, topic) == numbered(COUNT)
    assert "ResourceWarning" in ended.stderr
    assert topic in ended.stderr
    assert "not delivered" not in ended.stderr
    assert settles_to_nothing(cluster.name)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_could_not_be_sent_is_said_with_its_count(transport: str) -> None:
    with Cluster(small_config(brokers=1, restart=False)) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("t")
        stop = f"from tests.end_to_end.test_publisher_exit import stand_still; stand_still({cluster.processes[0]})"
        begun = time.monotonic()
        ended = run(SYNC.replace("for number", stop + "\nfor number"), cluster.name, "t", transport, "",
                    "delivery_timeout=2.0, linger_ms=60000.0", count=7)
        os.kill(cluster.processes[0], signal.SIGCONT)
        assert ended.returncode == 0
        assert "cxlmq: 7 messages to topic t were not delivered when the program ended" in ended.stderr
        assert time.monotonic() - begun < 30


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("way", ["close", "with"])
def test_what_an_interrupted_close_gives_up_is_said_with_its_count(transport: str, way: str) -> None:
    with Cluster(small_config(brokers=1, restart=False)) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("t")
        stop = ("import os, signal, threading\n"
                "from tests.end_to_end.test_publisher_exit import stand_still\n"
                f"stand_still({cluster.processes[0]})\n")
        interrupt = "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        end = interrupt + ("publisher.close()" if way == "close" else "with publisher: pass")
        ended = run(SYNC.replace("for number", stop + "for number"), cluster.name, "t", transport, end,
                    "delivery_timeout=60.0, linger_ms=60000.0", count=7)
        os.kill(cluster.processes[0], signal.SIGCONT)
        assert ended.returncode == -signal.SIGINT, ended.stderr
        assert ended.stderr.count("not delivered") == 1
        assert "cxlmq: 7 messages to topic t were not delivered when close() was interrupted: there was no time for " \
               "them" in ended.stderr


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("raised", [KeyError("the block"), KeyboardInterrupt(), GeneratorExit()],
                         ids=lambda each: type(each).__name__)
def test_an_exception_in_the_block_loses_nothing_that_was_published_before(
        cluster: Cluster, topic: str, transport: str, raised: BaseException) -> None:
    deliveries = []
    with pytest.raises(type(raised)) as seen, \
            Publisher(topic, cluster=cluster.name, transport=transport, linger_ms=60_000.0) as publisher:
        deliveries += [publisher.publish(each) for each in numbered(COUNT)]
        raise raised
    assert seen.value is raised
    assert [each.result().position for each in deliveries] == list(range(COUNT))
    assert read_topic(cluster.name, topic) == numbered(COUNT)
    assert settles_to_nothing(cluster.name)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_exception_or_a_cancellation_in_an_async_block_loses_nothing_either(
        cluster: Cluster, topic: str, transport: str) -> None:
    async def publish(raised: BaseException | None, first: int) -> None:
        async with AsyncPublisher(topic, cluster=cluster.name, transport=transport, linger_ms=60_000.0) as publisher:
            for each in numbered(COUNT)[first:first + COUNT // 2]:
                await publisher.publish(each)
            if raised is not None:
                raise raised
            await asyncio.sleep(1000)

    async def main() -> None:
        with pytest.raises(KeyError):
            await publish(KeyError("the block"), 0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(publish(None, COUNT // 2), 3.0)

    asyncio.run(main())
    assert read_topic(cluster.name, topic) == numbered(COUNT)
    assert settles_to_nothing(cluster.name)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_close_that_is_cancelled_is_done_all_the_same(cluster: Cluster, topic: str, transport: str) -> None:
    async def main() -> list[int | None]:
        publisher = AsyncPublisher(topic, cluster=cluster.name, transport=transport, linger_ms=60_000.0)
        await publisher.open()
        deliveries = [await publisher.publish(each) for each in numbered(COUNT)]
        for pid in cluster.processes.values():
            os.kill(pid, signal.SIGSTOP)
        try:
            closing = asyncio.ensure_future(publisher.close())
            await asyncio.sleep(0)          # it waits for what was published
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
        finally:
            for pid in cluster.processes.values():
                os.kill(pid, signal.SIGCONT)
        with pytest.raises(ClosedError):
            await publisher.open()
        receipts = [await each for each in deliveries]
        await publisher.close()
        return [each.position for each in receipts]

    assert asyncio.run(main()) == list(range(COUNT))
    assert read_topic(cluster.name, topic) == numbered(COUNT)
    assert settles_to_nothing(cluster.name)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_exception_stays_what_it_is_when_the_rest_cannot_be_sent(transport: str) -> None:
    with Cluster(small_config(brokers=1, restart=False)) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("t")
        with pytest.raises(KeyError), \
                Publisher("t", cluster=cluster.name, transport=transport, delivery_timeout=1.0) as publisher:
            stand_still(cluster.processes[0])
            delivery = publisher.publish(b"m")
            raise KeyError("the block")
        assert isinstance(delivery.exception(), CxlmqError)
        os.kill(cluster.processes[0], signal.SIGCONT)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_publisher_that_the_collector_takes_is_flushed_and_closed(
        cluster: Cluster, topic: str, transport: str) -> None:
    def drop() -> None:
        publisher = Publisher(topic, cluster=cluster.name, transport=transport, linger_ms=60_000.0).open()
        publisher.cycle = publisher             # type: ignore[attr-defined]    # only the collector finds it
        publisher.publish_many(numbered(COUNT))

        del publisher
        gc.collect()

    with pytest.warns(ResourceWarning, match=topic):
        drop()
    assert eventually(lambda: read_topic(cluster.name, topic) == numbered(COUNT))
    assert settles_to_nothing(cluster.name)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_open_is_for_once(cluster: Cluster, topic: str, transport: str) -> None:
    publisher = Publisher(topic, cluster=cluster.name, transport=transport)
    with publisher.open() as same:
        assert same is publisher.open() is publisher        # open already: nothing happens
        publisher.publish(b"m").result()
    with pytest.raises(ClosedError):
        publisher.open()
    with pytest.raises(ClosedError):
        publisher.publish(b"m")
    publisher.close()
    assert settles_to_nothing(cluster.name)

    async def main() -> None:
        other = AsyncPublisher(topic, cluster=cluster.name, transport=transport)
        async with await other.open():
            await (await other.publish(b"m"))
        with pytest.raises(ClosedError):
            await other.open()
        with pytest.raises(ClosedError):
            await other.publish(b"m")

    asyncio.run(main())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_opening_that_failed_can_be_tried_again(transport: str) -> None:
    config = small_config(brokers=1)
    publisher = Publisher("t", cluster=config.name, transport=transport)
    for _ in range(2):
        with pytest.raises(CxlmqError):
            publisher.open()
    with Cluster(config) as cluster:
        with pytest.raises(CxlmqError):
            publisher.open()                    # there is no such topic
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("t")
        with publisher:
            assert publisher.publish(b"m").result().position == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_opening_that_is_cancelled_anywhere_leaves_nothing_open(
        cluster: Cluster, topic: str, transport: str) -> None:
    async def main() -> None:
        for wait in range(12):
            publisher = AsyncPublisher(topic, cluster=cluster.name, transport=transport)
            opening = asyncio.ensure_future(publisher.open())
            await asyncio.sleep(wait * 0.004)
            opening.cancel()
            await asyncio.wait([opening])
            if not opening.cancelled():
                await publisher.close()

    threads = threading.active_count()
    asyncio.run(main())
    assert settles_to_nothing(cluster.name)
    assert threading.active_count() <= threads + 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_of_any_stride_are_published_and_others_are_refused(cluster: Cluster, topic: str, transport: str) -> None:
    rows = numpy.arange(64 * 48, dtype=numpy.uint8).reshape(64, 48)
    views = [rows, rows[::2], rows[::-1], rows[:, ::3], rows[:, 5:20], rows.T, numpy.asfortranarray(rows),
             numpy.broadcast_to(rows[0], (4, 48)), memoryview(rows)]
    wrong = [rows.astype(float), rows.astype(numpy.int8), rows[0], rows.reshape(8, 8, 48), rows[:0], [[1, 2]], b"ab", None]

    async def publish_async() -> None:
        async with AsyncPublisher(topic, cluster=cluster.name, transport=transport) as publisher:
            for view in views:
                await publisher.publish_array(view)
            for each in wrong:
                with pytest.raises(ConfigError):
                    await publisher.publish_array(each)

    with Publisher(topic, cluster=cluster.name, transport=transport) as publisher:
        for view in views:
            publisher.publish_array(view)
        for each in wrong:
            with pytest.raises(ConfigError):
                publisher.publish_array(each)
    asyncio.run(publish_async())
    wanted = [bytes(row) for view in views for row in numpy.asarray(view)]
    assert read_topic(cluster.name, topic) == wanted * 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_times_to_wait_mean_the_same_over_every_transport(cluster: Cluster, topic: str, transport: str) -> None:
    with Publisher(topic, cluster=cluster.name, transport=transport, linger_ms=60_000.0) as publisher:
        assert publisher.publish(b"m").result(math.inf).position == 0
        publisher.publish(b"m")
        publisher.flush(math.inf)
        with pytest.raises(ConfigError):
            publisher.flush(math.nan)
        with pytest.raises(ConfigError):
            publisher.publish(b"m").result(math.nan)
        stand_still_all(cluster)
        try:
            waiting = publisher.publish(b"m")
            with pytest.raises(TimeoutError):
                waiting.result(0)
            with pytest.raises(DeliveryTimeout):
                publisher.flush(-1)
        finally:
            for process in cluster.processes.values():
                os.kill(process, signal.SIGCONT)
        waiting.result()


def stand_still_all(cluster: Cluster) -> None:
    for process in cluster.processes.values():
        stand_still(process)
