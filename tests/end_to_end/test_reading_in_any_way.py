"""Whatever mix of loops, calls, seeks and commits a reader makes, over either transport: every message once, in its order."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.errors import CommitRefused
from client import Admin, AsyncSubscriber, Publisher, Subscriber
from client.cluster import Cluster
from client.group import Processed
from tests.end_to_end.conftest import small_config, traces, unique
from tests.end_to_end.library_support import eventually, settles_to_nothing

END = 3000
STEPS = st.lists(st.tuples(st.sampled_from(
    ("for", "nested", "raise", "fetch", "batches", "next", "all", "seek", "commit", "cancel")), st.integers(1, 60)),
    min_size=1, max_size=12)
few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two brokers; topic "large" in few batches, "small" in batches of one message, "mixed" in batches of any size."""
    with Cluster(small_config(brokers=2, group_lease_seconds=3.0)) as running:
        with Admin(cluster=running.name) as admin:
            for name, batch_bytes in (("large", 1 << 20), ("small", 16), ("mixed", 400)):
                admin.create_topic(name)
                with Publisher(name, cluster=running.name, batch_bytes=batch_bytes) as publisher:
                    publisher.publish_many([b"%d" % number for number in range(END)]).result()
        yield running
        assert settles_to_nothing(running.name)
    assert traces(running.name) == []


class Model:
    """What must come next, and how far a commit may go."""

    def __init__(self) -> None:
        self.next = self.given = self.furthest = 0

    def took(self, positions: list[int]) -> None:
        assert positions == list(range(self.next, self.next + len(positions)))
        self.next += len(positions)
        if positions:
            self.given, self.furthest = self.next, max(self.furthest, self.next)

    def sought(self, position: int) -> None:
        self.next, self.given = position, min(self.given, position)


async def steps_of(reader: Any, model: Model, steps: list[tuple[str, int]], call: Callable[..., Awaitable[Any]],
                   loop: Callable[..., Awaitable[list[int]]]) -> None:
    """Take the steps; `call` and `loop` do what is awaited or not."""
    for kind, count in steps:
        left = min(count, END - model.next)
        if kind in ("for", "nested", "raise") and left:
            model.took(await loop(kind, left))
        elif kind == "fetch" and left:
            found = await call(reader.fetch, count, 10)
            assert 0 < len(found) <= count
            model.took([each.position for each in found])
        elif kind == "batches" and left:
            for batch in await call(reader.fetch_batches, 10):
                model.took([each.position for each in batch.to_messages()])
        elif kind == "next" and left:
            model.took([(await call(reader.get_next, 10)).position])
        elif kind == "all":
            model.took([each.position for each in await call(reader.get_all)])
        elif kind == "seek":
            await call(reader.seek, count)
            model.sought(count)
        elif kind == "commit":
            with contextlib.suppress(CommitRefused):        # when a seek went back behind what is committed
                await call(reader.commit)
        elif kind == "cancel" and isinstance(reader, AsyncSubscriber):
            task = asyncio.create_task(reader.fetch(count, 0.2) if count % 2 else reader.seek(model.next))
            for _ in range(count % 7):
                await asyncio.sleep(0)
            task.cancel()
            found = (await asyncio.gather(task, return_exceptions=True))[0]
            model.took([each.position for each in found] if isinstance(found, list) else [])
        assert reader.position == model.next


def sync_loop(reader: Subscriber) -> Callable[..., Awaitable[list[int]]]:
    async def loop(kind: str, count: int) -> list[int]:
        got: list[int] = []
        try:
            for message in reader:
                got.append(message.position)
                if len(got) == count:
                    if kind == "raise":
                        raise ZeroDivisionError
                    break
                if kind == "nested":
                    for inner in reader:
                        got.append(inner.position)
                        break
                    if len(got) >= count:
                        break
        except ZeroDivisionError:
            pass
        return got

    return loop


def async_loop(reader: AsyncSubscriber) -> Callable[..., Awaitable[list[int]]]:
    async def loop(kind: str, count: int) -> list[int]:
        got: list[int] = []
        try:
            async for message in reader:
                got.append(message.position)
                if len(got) == count:
                    if kind == "raise":
                        raise ZeroDivisionError
                    break
                if kind == "nested":
                    got.append((await reader.fetch(1, 10))[0].position)
                    if len(got) >= count:
                        break
        except ZeroDivisionError:
            pass
        return got

    return loop


@pytest.mark.parametrize("transport", ["grpc", "attached", "auto"])
@pytest.mark.parametrize("topic", ["large", "small", "mixed"])
@few
@given(steps=STEPS, auto=st.booleans(), asynchronous=st.booleans())
def test_any_mix_of_calls(cluster: Cluster, topic: str, transport: str, steps: list[tuple[str, int]], auto: bool,
                          asynchronous: bool) -> None:
    model, group = Model(), unique("g")
    options: dict[str, Any] = {"cluster": cluster.name, "transport": transport, "group": group,
                               "auto_commit": 0.01 if auto else None}

    async def plain(method: Callable[..., Any], *arguments: Any) -> Any:
        return method(*arguments)

    async def awaited(method: Callable[..., Any], *arguments: Any) -> Any:
        return await method(*arguments)

    async def run() -> None:
        async with AsyncSubscriber(topic, **options) as reader:
            await steps_of(reader, model, steps, awaited, async_loop(reader))

    with Admin(cluster=cluster.name) as admin:
        try:
            if asynchronous:
                asyncio.run(run())
            else:
                with Subscriber(topic, **options) as reader:
                    asyncio.run(steps_of(reader, model, steps, plain, sync_loop(reader)))
            committed = admin.describe_group(topic, group)["position"]
        finally:
            admin.delete_group(topic, group)
    assert committed <= model.furthest, "never ahead of what was given out"
    if auto and not any(kind == "seek" for kind, _ in steps):
        assert committed == model.given, "a clean end commits all of it"


@pytest.mark.parametrize("transport", ["grpc", "attached"])
@pytest.mark.parametrize("topic", ["large", "small"])
def test_threads_that_share_a_reader_share_its_messages(cluster: Cluster, topic: str, transport: str) -> None:
    got: list[list[int]] = [[] for _ in range(6)]

    def take(number: int, reader: Subscriber) -> None:
        mine = got[number]
        while True:
            if number % 3 == 0:
                found = [each.position for each in reader.fetch(7, 0.5)]
            elif number % 3 == 1:
                found = [each.position for batch in reader.fetch_batches(0.5) for each in batch.to_messages()]
            else:
                one = reader.get_next(0.5)
                found = [] if one is None else [one.position]
            if not found:
                return
            assert found == sorted(found)
            mine += found

    with Subscriber(topic, cluster=cluster.name, transport=transport) as reader:
        threads = [threading.Thread(target=take, args=(number, reader)) for number in range(len(got))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(position for mine in got for position in mine) == list(range(END))


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_tasks_that_share_a_reader_share_its_messages(cluster: Cluster, transport: str) -> None:
    async def run() -> list[int]:
        async with AsyncSubscriber("small", cluster=cluster.name, transport=transport) as reader:
            async def take() -> list[int]:
                mine: list[int] = []
                while found := await reader.fetch(5, 0.5):
                    mine += [each.position for each in found]
                return mine

            return [each for mine in await asyncio.gather(*(take() for _ in range(5))) for each in mine]

    assert sorted(asyncio.run(run())) == list(range(END))


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_what_one_thread_is_at_work_on_is_not_committed_because_another_asks(cluster: Cluster, transport: str) -> None:
    group = unique("g")

    def others(reader: Subscriber) -> None:
        assert [each.position for each in (reader.get_next(10) for _ in range(20)) if each] == list(range(10, 30))
        for message in reader:
            assert message.position == 30
            return

    def position(admin: Admin) -> int:
        return int(admin.describe_group("small", group)["position"])

    with Admin(cluster=cluster.name) as admin, Subscriber(
            "small", cluster=cluster.name, transport=transport, group=group, auto_commit=0.05) as reader:
        assert reader._membership is not None
        assert len(reader.fetch(10, 10)) == 10
        thread = threading.Thread(target=others, args=(reader,))
        thread.start()
        thread.join(60)
        assert reader._membership.processed == 0, "0 to 9 are still at work on"
        assert reader.get_next(10)
        assert eventually(lambda: position(admin) == 31)    # whoever has ended is at work on nothing


def test_nor_what_one_task_is_at_work_on(cluster: Cluster) -> None:
    async def run() -> list[int | None]:
        async with AsyncSubscriber("small", cluster=cluster.name, group=unique("g"), auto_commit=60.0) as reader:
            membership = reader._membership
            assert membership is not None

            async def work(seen: list[int | None]) -> None:
                for _ in range(3):
                    await reader.fetch(5, 10)
                    seen.append(membership.processed)

            seen: list[int | None] = []
            await reader.fetch(10, 10)
            await asyncio.gather(work(seen))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await reader.fetch(1 << 40, 10)
                    await asyncio.sleep(10)
            await reader.fetch(1, 0)
            return [*seen, membership.processed]

    assert asyncio.run(run()) == [0, 0, 0, END]


def test_who_gets_nothing_or_commits_holds_nothing_back() -> None:
    work, other = Processed(), threading.Thread()
    main = threading.current_thread()
    assert work.asks(main, 0) == 0
    assert work.asks(main, 5) == 5
    work.got_nothing(main)
    assert work.asks(other, 9) == 9
    assert work.asks(main, 12) == 12, "a thread that does not run has ended"
    running, stop = threading.Event(), threading.Event()
    alive = threading.Thread(target=lambda: (running.set(), stop.wait(30)))
    alive.start()
    try:
        assert work.asks(alive, 20) == 12
        assert work.asks(main, 30) == 20
        work.committed(25)
        assert work.asks(main, 40) == 25
    finally:
        stop.set()
        alive.join()
    assert work.asks(main, 50) == 50
