"""One publisher, many threads and tasks, over both transports: nothing lost, damaged, doubled, overtaken or unsettled."""

import asyncio
import random
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from broker.errors import BufferFull, ClosedError, LoanHeld, SessionFenced
from client import Admin, AsyncPublisher, Publisher, Subscriber
from client.batch import Delivery
from client.cluster import Cluster
from tests.end_to_end.library_support import eventually

TRANSPORTS = ["grpc", "attached"]
SIZES = (0, 16, 16, 200, 200, 5_000, 33_000, 120_000, 700_000)
READ_SECONDS = 30.0


@pytest.fixture
def fresh(cluster: Cluster, topic: str) -> str:
    """A topic that exists."""
    with Admin(cluster.name) as admin:
        admin.create_topic(topic)
    return topic


def message(thread: int, number: int, nbytes: int) -> bytes:
    """One that says whose it is in every part of it; below 16 bytes an empty one."""
    return b"" if nbytes < 16 else (struct.pack("<QQ", thread, number) * (nbytes // 16 + 1))[:nbytes]


class Reader(threading.Thread):
    """Reads everything meanwhile, so that memory comes back."""

    def __init__(self, cluster: Cluster, topic: str) -> None:
        super().__init__(daemon=True)
        self.where = topic, cluster.name
        self.found: list[bytes] = []
        self.failed: BaseException | None = None
        self.ready, self.stop = threading.Event(), threading.Event()

    def run(self) -> None:
        """Until it is told to stop."""
        try:
            with Subscriber(self.where[0], cluster=self.where[1], transport="grpc") as subscriber:
                self.ready.set()
                while not self.stop.is_set():
                    self.found += [bytes(each.payload) for each in subscriber.fetch(256, timeout=0.2)]
        except BaseException as error:
            self.failed = error
            self.ready.set()

    def read(self, count: int) -> list[bytes]:
        """What was read when so many are there, and a little later."""
        assert eventually(lambda: self.failed is not None or len(self.found) >= count, READ_SECONDS), (
            f"{len(self.found)} of {count}")
        time.sleep(0.3)
        self.stop.set()
        self.join(READ_SECONDS)
        assert self.failed is None, self.failed
        return self.found


class Worker(threading.Thread):
    """Publishes in all the ways there are."""

    def __init__(self, publisher: Publisher, number: int, count: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.publisher, self.number, self.count = publisher, number, count
        self.dice = random.Random(seed * 1000 + number)
        self.sent: list[bytes] = []
        self.deliveries: list[tuple[bytes, Delivery]] = []
        self.failed: BaseException | None = None

    def run(self) -> None:
        """All of them."""
        try:
            while len(self.sent) < self.count:
                self.publish_some()
        except BaseException as error:
            self.failed = error

    def publish_some(self) -> None:
        """A few messages in one way."""
        nbytes = self.dice.choice(SIZES)
        count = min(self.dice.randrange(1, 4), self.count - len(self.sent))
        some = [message(self.number, len(self.sent) + k, nbytes) for k in range(count)]
        way = self.dice.choice(("one", "one", "many", "array", "loan", "flush"))
        if way == "many":
            delivery = self.publisher.publish_many(iter(some))
        elif way == "array" and nbytes:
            delivery = self.publisher.publish_array(numpy.frombuffer(b"".join(some), numpy.uint8).reshape(count, -1))
        elif way == "loan" and self.publisher.transport == "attached":
            some = some[:1]
            with self.publisher.loan(len(some[0])) as view:
                view[:] = some[0]
            delivery = None
        else:
            if way == "flush":
                self.publisher.flush()
            for each in some:
                delivery = self.publisher.publish(each)
        self.sent += some
        if delivery is not None:
            self.deliveries.append((some[-1], delivery))


def check(log: list[bytes], workers: list[Worker]) -> None:
    """Every message once, byte by byte, each thread's in its order."""
    assert len(log) == sum(len(each.sent) for each in workers)
    for worker in workers:
        own = struct.pack("<Q", worker.number)
        mine = [each for each in worker.sent if each]
        assert [each for each in log if each.startswith(own)] == mine, f"thread {worker.number}"
    for worker in workers:
        for sent, delivery in worker.deliveries:
            assert delivery.done(), "a delivery never settled"
            position = delivery.result(0).position
            assert position is None or log[position] == sent, "a receipt names another's message"


@pytest.mark.parametrize("reopens", [False, True])
@pytest.mark.parametrize(("threads", "ack"), [(2, 1), (4, 0), (8, 1)])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_threads_share_a_publisher(cluster: Cluster, fresh: str, transport: str, threads: int, ack: int,
                                   reopens: bool) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    reader = Reader(cluster, fresh)
    reader.start()
    reader.ready.wait(READ_SECONDS)
    with Publisher(fresh, cluster=cluster.name, transport=transport, ack=ack) as publisher:
        workers = [Worker(publisher, number + 1, 240 // threads, seed) for number in range(threads)]
        for each in workers:
            each.start()
        engine, fences = publisher._engine, 0
        while any(each.is_alive() for each in workers):
            time.sleep(0.05)
            if reopens and fences < 5:
                fences += 1
                engine.loop.call_soon_threadsafe(engine.end_session, SessionFenced(reason="a test", committed=0))
        assert [each.failed for each in workers] == [None] * threads
        publisher.flush()
        statistics = publisher.statistics()
        assert statistics["messages"] == statistics["acked"] == sum(len(each.sent) for each in workers)
    check(reader.read(sum(len(each.sent) for each in workers)), workers)


@pytest.mark.parametrize("when_full", ["error", "drop_oldest", "drop_newest"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_a_policy_gives_up_is_told_and_the_rest_is_there(cluster: Cluster, fresh: str, transport: str,
                                                              when_full: str) -> None:
    reader = Reader(cluster, fresh)
    reader.start()
    reader.ready.wait(READ_SECONDS)
    noted: list[tuple[bytes, Delivery]] = []
    with Publisher(fresh, cluster=cluster.name, transport=transport, when_full=when_full,
                   buffer_bytes=400_000) as publisher:
        def work(thread: int) -> None:
            for number in range(150):
                each = message(thread, number, 40_000 if number % 3 == 0 else 400)
                try:
                    noted.append((each, publisher.publish(each)))
                except BufferFull:
                    assert when_full == "error"

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(1, 5)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        publisher.flush()
        assert all(delivery.done() for _, delivery in noted)
    there = [each for each, delivery in noted if delivery.exception() is None]
    found = reader.read(len(there))
    assert sorted(found) == sorted(there)
    for thread in range(1, 5):
        numbers = [struct.unpack_from("<QQ", each)[1] for each in found if each.startswith(struct.pack("<Q", thread))]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_publisher_that_is_closed_while_threads_publish_settles_everything(cluster: Cluster, fresh: str,
                                                                             transport: str) -> None:
    for turn in range(4):
        noted: list[Delivery] = []
        refused: list[BaseException] = []
        publisher = Publisher(fresh, cluster=cluster.name, transport=transport).open()
        publish = publisher.publish         # as a loop keeps it

        def work(publish: Callable[[Any], Delivery] = publish, noted: list[Delivery] = noted,
                 refused: list[BaseException] = refused) -> None:
            number = 0
            try:
                while True:
                    noted.append(publish(bytes(40_000 if number % 20 == 0 else 100)))
                    number += 1
            except BaseException as error:
                refused.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for each in threads:
            each.start()
        time.sleep(0.05 * turn)
        publisher.close()
        for each in threads:
            each.join(READ_SECONDS)
            assert not each.is_alive()
        assert [type(each) for each in refused] == [ClosedError] * 3, refused
        assert eventually(lambda noted=noted: all(each.done() for each in noted), 10.0)
        assert all(each.exception() is None or isinstance(each.exception(), ClosedError) for each in noted)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_callbacks_may_publish_and_every_delivery_has_one(cluster: Cluster, fresh: str, transport: str) -> None:
    told: list[Delivery] = []
    more = threading.Semaphore(200)

    def told_of(delivery: Delivery) -> None:
        told.append(delivery)
        if more.acquire(blocking=False):
            publisher.publish(b"of a callback" * 100)

    with Publisher(fresh, cluster=cluster.name, transport=transport, on_delivery=told_of) as publisher:
        threads = [threading.Thread(target=lambda: [publisher.publish(bytes(50)) for _ in range(200)]) for _ in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert eventually(lambda: len(told) == 800, READ_SECONDS), len(told)
        publisher.flush()
        assert publisher.statistics()["acked"] == 800
    assert len({id(each) for each in told}) == 800


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tasks_share_an_asynchronous_publisher(cluster: Cluster, fresh: str, transport: str) -> None:
    sent: dict[int, list[bytes]] = {}

    async def work(publisher: AsyncPublisher, task: int) -> None:
        dice, sent[task] = random.Random(task), []
        for number in range(40):
            each = message(task, number, dice.choice((16, 200, 5_000, 40_000)))
            sent[task].append(each)
            delivery = await (publisher.publish(each) if number % 3 else publisher.publish_many([each]))
            if number % 10 == 0:
                await delivery
            await asyncio.sleep(0)

    async def everybody() -> None:
        async with AsyncPublisher(fresh, cluster=cluster.name, transport=transport) as publisher:
            await asyncio.gather(*(work(publisher, task) for task in range(1, 7)))
            await publisher.flush()

    asyncio.run(everybody())
    with Subscriber(fresh, cluster=cluster.name, transport="grpc") as subscriber:
        log = [bytes(each.payload) for each in subscriber.get_all()]
    assert len(log) == 240
    for task, each in sent.items():
        assert [found for found in log if found.startswith(struct.pack("<Q", task))] == each


# ---- loans -----------------------------------------------------------------------------------------------------------


def in_log(cluster: Cluster, topic: str) -> list[bytes]:
    """What a topic has."""
    with Subscriber(topic, cluster=cluster.name, transport="grpc") as subscriber:
        return [bytes(each.payload) for each in subscriber.get_all()]


def test_a_loan_that_was_published_is_written_no_more(cluster: Cluster, fresh: str) -> None:
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        loan = publisher.loan(16)
        with loan as view:
            view[:] = b"A" * 16
        assert loan.delivery.result(20).position == 0
        with pytest.raises(ValueError, match="released"):
            view[0] = 66
        for write in (lambda: memoryview(loan), lambda: numpy.frombuffer(loan, numpy.uint8)):
            with pytest.raises(BufferError, match="ended"):
                write()
        with pytest.raises(ClosedError), loan:
            pass
        assert loan.__exit__(None, None, None) is False, "a second end changes nothing"
        by_hand = publisher.loan(16)
        by_hand.__enter__()[:] = b"B" * 16
        memoryview(by_hand)[8:] = b"C" * 8
        by_hand.__exit__(None, None, None)
        by_hand.delivery.result(20)
        with pytest.raises(BufferError):
            memoryview(by_hand)
    assert in_log(cluster, fresh) == [b"A" * 16, b"B" * 8 + b"C" * 8]


@pytest.mark.parametrize("keep", [
    lambda loan, view: numpy.frombuffer(view, numpy.uint8), lambda loan, view: view[4:],
    lambda loan, view: numpy.frombuffer(loan, numpy.uint8)], ids=["an array", "a slice", "an array of the loan"])
def test_a_view_that_is_kept_writes_into_nobodys_message(cluster: Cluster, fresh: str, keep: Callable[..., Any]) -> None:
    with Publisher(fresh, cluster=cluster.name, transport="attached") as publisher:
        loan = publisher.loan(16)
        with pytest.raises(LoanHeld, match="1 views"), loan as view:
            view[:] = b"A" * 16
            kept = keep(loan, view)
        assert loan.delivery is None
        lent = publisher.loan(16)
        with pytest.raises(ZeroDivisionError), lent as view:
            other = keep(lent, view)
            raise ZeroDivisionError
        del view
        messages = [b"%04d" % number * 20 for number in range(2000)]
        publisher.publish_many(messages)
        publisher.publish_array(numpy.zeros((200, 4000), numpy.uint8))
        publisher.flush()
        kept[:] = 0xEE if isinstance(kept, numpy.ndarray) else b"\xee" * len(kept)
        other[:] = 0xEE if isinstance(other, numpy.ndarray) else b"\xee" * len(other)
        assert in_log(cluster, fresh) == [*messages, *[bytes(4000)] * 200]
        del kept, other
        with publisher.loan(4) as view:
            view[:] = b"last"
        publisher.flush()
    assert in_log(cluster, fresh)[-1] == b"last"


def test_a_loan_is_published_behind_what_was_published_meanwhile(cluster: Cluster, fresh: str) -> None:
    with Publisher(fresh, cluster=cluster.name, transport="attached", linger_ms=1000) as publisher:
        publisher.publish(b"first")
        with publisher.loan(6) as view:
            publisher.publish(b"second")
            view[:] = b"third!"
        publisher.publish(b"fourth")
    assert in_log(cluster, fresh) == [b"first", b"second", b"third!", b"fourth"]
