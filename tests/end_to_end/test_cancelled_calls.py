"""Cancelled at every one of its steps, a call leaves its object usable and the cluster as before, or has done all of it."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

import pytest

from broker.errors import CommitRefused, DuplicateTopic, UnknownTopic
from client import Admin, AsyncAdmin, AsyncSubscriber, Publisher, Subscriber
from client.cluster import Cluster
from client.connection import ClientLoop, _Job
from tests.end_to_end.conftest import small_config, traces, unique
from tests.end_to_end.library_support import held, settles_to_nothing

END, STEPS_MAX = 100, 80
LEASE = 60.0                            # whoever waits for that to end waits too long
TRANSPORTS = ("grpc", "attached")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two brokers with long leases, and a topic with a hundred messages."""
    with Cluster(small_config(brokers=2, group_lease_seconds=LEASE)) as running:
        with Admin(cluster=running.name) as admin:
            admin.create_topic("t")
            with Publisher("t", cluster=running.name, batch_bytes=300) as publisher:
                publisher.publish_many([b"%d" % number for number in range(END)]).result()
        yield running
        assert settles_to_nothing(running.name), held(running.name)
    assert traces(running.name) == []


class CancelledAt:
    """Awaits a coroutine whose task is cancelled when it waits for the nth time."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], number: int, reached: list[int]) -> None:
        self.coroutine, self.number, self.reached = coroutine, number, reached

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self.coroutine.__await__()
        sent: Any = None
        for step in itertools.count():
            try:
                waits_for = inner.send(sent) if not isinstance(sent, BaseException) else inner.throw(sent)
            except StopIteration as done:
                return done.value
            if step == self.number:
                self.reached.append(step)
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                sent = yield waits_for
            except BaseException as error:
                sent = error


@contextlib.contextmanager
def cancelled_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The first call meanwhile is cancelled at that step; the list says whether it came so far."""
    reached: list[int] = []
    first = [True]

    async def whole(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await CancelledAt(coroutine, number, reached)

    def start(self: ClientLoop, coroutine: Coroutine[Any, Any, Any]) -> _Job[Any]:
        if first.pop() if first else False:
            coroutine = whole(coroutine)
        return _Job(self.loop, coroutine)

    with monkeypatch.context() as patched:
        patched.setattr(ClientLoop, "_start", start)
        yield reached


def every_step(monkeypatch: pytest.MonkeyPatch, once: Callable[[Callable[[], Any]], None]) -> None:
    """`once` is given what starts the cancelling; until a call is done before it is cancelled."""
    for number in range(STEPS_MAX):
        happened: list[int] = []

        @contextlib.contextmanager
        def cancelling(number: int = number, happened: list[int] = happened) -> Iterator[None]:
            with cancelled_at(number, monkeypatch) as reached, contextlib.suppress(asyncio.CancelledError):
                yield
            happened += reached

        once(cancelling)
        if not happened:
            assert number > 0, "it never waited"
            return
    raise AssertionError(f"not done after {STEPS_MAX} steps")


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_opening(cluster: Cluster, transport: str, group: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(cancelling: Callable[[], Any]) -> None:
        options: dict[str, Any] = {"cluster": cluster.name, "transport": transport, "group": "g" if group else None}
        subscriber = Subscriber("t", **options)
        with cancelling():
            subscriber.open()
        with contextlib.ExitStack() as stack:
            if not subscriber._engine.opened:
                another = stack.enter_context(Subscriber("t", **options, group_wait=5.0))     # nobody holds the group
                assert another.fetch(1, 10)[0].position == 0
        subscriber.open()
        assert [each.position for each in subscriber.fetch(3, 10)] == [0, 1, 2][:3]
        subscriber.close()

    every_step(monkeypatch, once)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_seeking(cluster: Cluster, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Subscriber("t", cluster=cluster.name, transport=transport) as subscriber:
        def once(cancelling: Callable[[], Any]) -> None:
            subscriber.seek(0)
            assert subscriber.fetch(1, 10)[0].position == 0
            with cancelling():
                subscriber.seek(50)
            position = subscriber.position
            assert position in (1, 50)
            got: list[int] = []
            while len(got) < 20:
                got += [each.position for each in subscriber.fetch(20 - len(got), 10)]
            assert got == list(range(position, position + 20)), "what was given up does nothing later"

        every_step(monkeypatch, once)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_committing_and_closing(cluster: Cluster, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(cancelling: Callable[[], Any], what: str) -> None:
        name = unique("g")
        subscriber = Subscriber("t", cluster=cluster.name, transport=transport, group=name,
                                auto_commit=60.0 if what == "close" else None).open()
        given = subscriber.fetch(5, 10)[-1].position + 1
        with cancelling():
            getattr(subscriber, what)()
        if what == "commit":
            with contextlib.suppress(CommitRefused):
                subscriber.commit()
        subscriber.close()
        with Admin(cluster=cluster.name) as admin:
            found = admin.describe_group("t", name)
            assert (found["position"], found["holder"]) == (given, "")
            admin.delete_group("t", name)

    for what in ("commit", "close"):
        every_step(monkeypatch, lambda cancelling, what=what: once(cancelling, what))  # type: ignore[misc]


def test_topics_and_groups(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with Admin(cluster=cluster.name) as admin:
        def once(cancelling: Callable[[], Any]) -> None:
            name = unique("topic")
            with cancelling():
                admin.create_topic(name)
            with contextlib.suppress(DuplicateTopic):
                admin.create_topic(name)
            with Publisher(name, cluster=cluster.name) as publisher:
                publisher.publish(b"x").result()
            with cancelling():
                admin.delete_topic(name)
            with contextlib.suppress(UnknownTopic):
                admin.delete_topic(name)
            admin.create_topic(name)
            admin.delete_topic(name)

        every_step(monkeypatch, once)

        def reset(cancelling: Callable[[], Any]) -> None:
            with Subscriber("t", cluster=cluster.name, group="r") as subscriber:
                subscriber.commit(20)
            with cancelling():
                admin.reset_group("t", "r", 10)
            assert admin.describe_group("t", "r")["position"] in (10, 20)
            assert admin.reset_group("t", "r", 10)["position"] == 10

        every_step(monkeypatch, reset)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_cancelled_call_of_a_coroutine_has_ended_when_it_raises(cluster: Cluster, transport: str) -> None:
    async def run(passes: int) -> None:
        async with AsyncSubscriber("t", cluster=cluster.name, transport=transport) as subscriber:
            assert (await subscriber.fetch(1, 10))[0].position == 0
            for step in (subscriber.seek(50), subscriber.fetch(1, 0), subscriber.get_all()):
                before = subscriber.position
                task = asyncio.create_task(step)
                await asyncio.sleep(passes * 0.0005)
                task.cancel()
                found = (await asyncio.gather(task, return_exceptions=True))[0]
                taken = found if isinstance(found, list) else []
                position = subscriber.position
                assert position in (before + len(taken), 50)
                if position < END:
                    assert (await subscriber.fetch(1, 10))[0].position == position
        async with AsyncAdmin(cluster=cluster.name) as admin:
            assert (await admin.describe_topic("t"))["end_position"] == END

    for passes in range(12):
        asyncio.run(run(passes))
