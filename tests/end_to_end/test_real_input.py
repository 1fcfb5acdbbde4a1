"""A real capture goes in and comes out: the same lines, byte for byte, in the file's order, whatever the settings."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.coherence import load, report_text
from broker.hardware import report_path
from client import Admin, Publisher, Subscriber
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config, unique
from tests.end_to_end.library_support import eventually, inspected, read, segments_owned, settles_to_nothing

ROOT = Path(__file__).resolve().parents[2]
CAPTURE = ROOT / "tests/data/can-2014.log"
LINES = 6158


@pytest.fixture(scope="module")
def capture() -> Path:
    """The capture as a file."""
    return CAPTURE


@pytest.fixture(scope="module")
def frames(capture: Path) -> list[bytes]:
    """Its frames, one a line."""
    lines = capture.read_bytes().split(b"\n")
    assert lines.pop() == b"", "the last line ends with a newline as well"
    assert len(lines) == LINES
    return lines


@pytest.fixture(scope="module", params=["mapped", "noncoherent", "checked"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four brokers, whose order index keeps a whole capture also when every frame is a batch."""
    config = small_config(brokers=4, order_entry_count=8192, topic_count_max=8, memory=request.param)
    with Cluster(config) as running:
        yield running
        assert settles_to_nothing(running.name)
        assert eventually(lambda: segments_owned(running.name) == 0)
    assert_coherent(running)


def assert_coherent(cluster: Cluster) -> None:
    """The checker has looked at every access, when memory was checked, and found nothing."""
    path = report_path(cluster.name, cluster.config.folder.parent)
    report = load(path)
    assert (report is None) == (cluster.config.memory != "checked")
    if report is not None:
        path.unlink()
        assert report["reports"] == [], report_text(report)


@pytest.fixture
def named(cluster: Cluster) -> Iterator[str]:
    """A topic with order 5."""
    name = unique("can")
    with Admin(cluster=cluster.name) as admin:
        assert admin.create_topic(name, order=5)["order"] == 5
        yield name
        admin.delete_topic(name)


class Reader(threading.Thread):
    """A subscriber in a thread, which takes a number of messages."""

    def __init__(self, cluster: str, topic: str, count: int, **options: Any) -> None:
        super().__init__()
        self.found: list[bytes] = []
        self.positions: list[int] = []
        self._subscriber = Subscriber(topic, cluster=cluster, **options).open()
        self._count = count
        self.start()

    def run(self) -> None:
        """Read as it comes."""
        while len(self.found) < self._count:
            messages = self._subscriber.fetch(97, timeout=30)
            if not messages:
                break
            self.found += [bytes(message.payload) for message in messages]
            self.positions += [message.position for message in messages]
        self._subscriber.close()

    def finish(self) -> list[bytes]:
        """Wait until it has everything."""
        self.join(90)
        assert not self.is_alive()
        assert self.positions == list(range(len(self.found)))
        return self.found


def test_produce_and_three_consumers_started_at_different_times(cluster: Cluster, named: str, capture: Path) -> None:
    """The commands as people type them; each consumer's output is the file."""
    def command(*arguments: str, **options: Any) -> Any:
        return subprocess.Popen([sys.executable, "-m", "client.cli.main", *arguments, "--cluster", cluster.name],
                                cwd=ROOT, **options)

    def consumer() -> Any:
        return command("consume", named, "--follow", "--count", str(LINES), stdout=subprocess.PIPE)

    before = consumer()
    whole = capture.read_bytes()
    middle = whole.index(b"\n", len(whole) // 2) + 1
    producer = command("produce", named, stdin=subprocess.PIPE)
    producer.stdin.write(whole[:middle])
    producer.stdin.flush()
    with Subscriber(named, cluster=cluster.name) as first:
        assert first.fetch(1, timeout=30)               # the capture is on its way
    during = consumer()
    producer.stdin.write(whole[middle:])
    producer.stdin.close()
    assert producer.wait(60) == 0
    after = consumer()
    for process in (before, during, after):
        assert process.communicate(timeout=60)[0] == whole
        assert process.returncode == 0


@pytest.mark.parametrize("transport", ["grpc", "attached"])
@pytest.mark.parametrize("batch_bytes", [1, 100, 5000, None], ids=lambda each: f"batches of {each}")
def test_three_subscribers_get_the_same_lines(cluster: Cluster, named: str, frames: list[bytes],
                                              batch_bytes: int | None, transport: str) -> None:
    """With batch_bytes of 1, every frame is a batch of its own, and neighbours go to different brokers."""
    before = Reader(cluster.name, named, LINES, broker=0, transport=transport)
    with Publisher(named, cluster=cluster.name, batch_bytes=batch_bytes, transport=transport) as publisher:
        half = [publisher.publish(frame) for frame in frames[:3000]]
        half[1500].result()
        during = Reader(cluster.name, named, LINES, broker=2, transport=transport)
        rest = [publisher.publish(frame) for frame in frames[3000:]]
        assert [each.result().position for each in half + rest] == list(range(LINES))
        counts = publisher.statistics()
        assert counts["batches"] == LINES if batch_bytes == 1 else counts["batches"] < LINES
        assert (counts["acked"], counts["failed"], counts["reopened"]) == (LINES, 0, 0)
    after = Reader(cluster.name, named, LINES, broker=3, transport=transport)
    for reader in (before, during, after):
        assert reader.finish() == frames


def test_each_line_alone_and_waited_for(cluster: Cluster, named: str, frames: list[bytes]) -> None:
    with Publisher(named, cluster=cluster.name) as publisher:
        assert [publisher.publish(frame).result().position for frame in frames[:500]] == list(range(500))
    with Subscriber(named, cluster=cluster.name) as subscriber:
        assert read(subscriber, 500) == frames[:500]


def test_several_captures_at_once_each_keep_their_order(cluster: Cluster, named: str, frames: list[bytes]) -> None:
    def publish(tag: bytes) -> None:
        with Publisher(named, cluster=cluster.name, batch_bytes=700) as publisher:
            for frame in frames:
                publisher.publish(tag + frame)

    threads = [threading.Thread(target=publish, args=(tag,)) for tag in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    found = Reader(cluster.name, named, 3 * LINES).finish()
    for thread in threads:
        thread.join()
    for tag in (b"a", b"b", b"c"):
        assert [each[1:] for each in found if each[:1] == tag] == frames


@pytest.mark.parametrize("order", [0, 1, 2])
def test_weaker_orders_lose_nothing_either(cluster: Cluster, frames: list[bytes], order: int) -> None:
    """Order 0 to 2 promise less about the order; what they promise is that all is there once, in one sequence."""
    name = unique("can")
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(name, order=order)
        readers = [Reader(cluster.name, name, LINES, broker=broker) for broker in (0, 1)]
        with Publisher(name, cluster=cluster.name, batch_bytes=500) as publisher:
            deliveries = [publisher.publish(frame) for frame in frames]
            positions = [each.result().position for each in deliveries]
            brokers = [each.result().broker for each in deliveries]
        found = [reader.finish() for reader in readers]
        assert found[0] == found[1]
        assert sorted(positions) == list(range(LINES))  # type: ignore[type-var]
        assert [found[0][position or 0] for position in positions] == frames
        for broker in range(4):
            through = [position for position, each in zip(positions, brokers, strict=True) if each == broker]
            assert through == sorted(through), "what came through one broker is in order"  # type: ignore[type-var]
        admin.delete_topic(name)


# ---- every setting ----------------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"brokers": 1}, {"brokers": 2}, {"brokers": 3}, {"brokers": 6},
    *({"sequencer_lock": lock, "scanners": scanners} for lock in ("mutex", "semaphore", "atomic")
      for scanners in (1, 2, 4)),
    *({"sequencer_lock": lock, "scanners": 3, "thread_plan": "staged"} for lock in ("mutex", "atomic")),
    {"thread_plan": "staged"}, {"waiting": "latency"}, {"waiting": "saver"},
    {"waiting": "saver", "thread_plan": "staged"}, {"pool": "partitioned"}, {"pool": "leader"},
    {"pool": "partitioned", "brokers": 3}, {"pool": "leader", "brokers": 1},
    {"pool": "leader", "scanners": 2, "sequencer_lock": "mutex"},
    *({"memory": "noncoherent", "pool": pool} for pool in ("partitioned", "leader")),
    *({"memory": memory, "hosts": "0,0,1,1", "eviction_period": 20} for memory in ("noncoherent", "checked")),
    {"memory": "checked", "thread_plan": "staged", "scanners": 4, "pool": "leader"},
    {"memory": "noncoherent", "thread_plan": "staged", "scanners": 4, "coherent_bytes": 512, "pool": "partitioned"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: " ".join(f"{key}={each[key]}" for key in each))
def test_the_capture_goes_through_under_every_setting(settings: dict[str, Any], frames: list[bytes]) -> None:
    """Small region, tiny batches, two publishers, a reader from the start and one from the end of it."""
    with Cluster(small_config(**{"brokers": 4, "region_bytes": "16MiB", **settings})) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("can")
            reader = Reader(cluster.name, "can", 2 * LINES)
            publishers = [Publisher("can", cluster=cluster.name, batch_bytes=300).open() for _ in range(2)]
            deliveries = [publisher.publish(tag + frame) for frame in frames
                          for tag, publisher in zip((b"a", b"b"), publishers, strict=True)]
            for publisher in publishers:
                publisher.flush()
                publisher.close()
            assert sorted(each.result().position or 0 for each in deliveries) == list(range(2 * LINES))
            found = reader.finish()
            for tag in (b"a", b"b"):
                assert [each[1:] for each in found if each[:1] == tag] == frames
            last = cluster.config.brokers - 1
            with Subscriber("can", cluster=cluster.name, start=2 * LINES - 100, broker=last) as late:
                assert read(late, 100) == found[-100:]
            assert settles_to_nothing(cluster.name)
            admin.delete_topic("can")
        assert eventually(lambda: segments_owned(cluster.name) == 0)
        pool = inspected(cluster.name)["pool"]
        assert pool["strategy"] == settings.get("pool", "atomic")
    assert_coherent(cluster)


@pytest.mark.parametrize("pool", ["atomic", "partitioned", "leader"])
def test_more_than_the_region_in_tiny_pieces(pool: str, frames: list[bytes]) -> None:
    """The capture again and again, until the smallest useful region was filled three times."""
    rounds = 5
    with Cluster(small_config(brokers=2, region_bytes="4MiB", pool=pool)) as cluster, \
            Admin(cluster=cluster.name) as admin:
        admin.create_topic("can")
        reader = Reader(cluster.name, "can", rounds * LINES)
        with Publisher("can", cluster=cluster.name, batch_bytes=1000) as publisher:
            for number in range(rounds):
                publisher.publish_many(b"%d" % number + frame + b" " * 200 for frame in frames)
        found = reader.finish()
        assert [each[1:].rstrip() for each in found] == frames * rounds
        assert sum(map(len, found)) > 3 * (4 << 20) / 2
        assert admin.describe_topic("can")["first_position"] > 0, "the oldest part gave way"
