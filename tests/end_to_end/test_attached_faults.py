"""Attached clients that are killed or stopped at the worst moments: others go on, nothing invalid is seen, all comes back."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.errors import PoolFull
from broker.region import attach_region
from client import Admin, Publisher, Subscriber
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config
from tests.end_to_end.library_support import eventually, inspected, numbered, read_topic, settles_to_nothing

ROOT = Path(__file__).resolve().parents[2]
LEASE_SECONDS = 2
REPEAT = 120_000                        # of 8 bytes: less than a segment

# A thread that acts on its own process while the copy of a large message goes on.
IN_MID_COPY = """
    import os, signal, sys, threading
    from client import Publisher
    def strike():
        while not publisher._engine.core.busy:
            pass
        os.kill(os.getpid(), signal.{signal})
    with Publisher(sys.argv[2], cluster=sys.argv[1], transport="attached", client_id=7, delivery_timeout=60) as publisher:
        for number in range(20):
            publisher.publish(b"before-%d" % number).result()
        striking = threading.Thread(target=strike)
        striking.start()
        number = 0
        while striking.is_alive() or number < 10:
            publisher.publish(b"%08d" % number * {repeat})
            number += 1
        publisher.flush()
        print(number if publisher.statistics()["failed"] == 0 else "failed", flush=True)
"""


@pytest.fixture
def pair() -> Iterator[Cluster]:
    """Two brokers, short leases, large segments: a copy into one has to take long enough to be struck."""
    with running_pair("256MiB") as running:
        yield running


@pytest.fixture
def small_pair() -> Iterator[Cluster]:
    """Two brokers whose region fills soon."""
    with running_pair("32MiB") as running:
        yield running


@contextmanager
def running_pair(region_bytes: str) -> Iterator[Cluster]:
    """Two brokers that hold nothing any more when the test is done."""
    with Cluster(small_config(brokers=2, region_bytes=region_bytes, session_lease_seconds=LEASE_SECONDS)) as running, \
            Admin(cluster=running.name) as admin:
        admin.create_topic("t")
        yield running
        admin.delete_topic("t")
        assert settles_to_nothing(running.name)
        assert eventually(lambda: used_segments(running) == 0), "every segment comes back"
        assert eventually(lambda: open_slots(running) == 0), "every slot comes back"


def used_segments(cluster: Cluster) -> int:
    """Segments in use, as the bitmap says."""
    return int(inspected(cluster.name)["pool"]["used"])


def open_slots(cluster: Cluster) -> int:
    """Attached-client slots in use."""
    with attach_region(cluster.name, writable=False) as region:
        memory, layout = region.memory(), region.layout
        count = layout.numbers["attach_per_broker"] * layout.numbers["broker_count"]
        return sum(memory.load_word(layout.offset_of("attach_line", slot)) & 0xFF in (1, 2) for slot in range(count))


@contextmanager
def child(program: str, cluster: Cluster, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A client process."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), cluster.name, "t", *arguments], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: "subprocess.Popen[str]") -> str:
    """What a client says next."""
    assert process.stdout
    return process.stdout.readline().strip()


def is_stopped(process: "subprocess.Popen[str]") -> bool:
    """Whether it has stopped itself."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def publish_over_the_region(cluster: Cluster, rounds: float = 1.5) -> None:
    """Publish more than the region holds, and read it: every segment that may be reused is."""
    count = int(rounds * cluster.config.region_bytes) // 60_000
    with Publisher("t", cluster=cluster.name, transport="attached") as publisher, \
            Subscriber("t", cluster=cluster.name, start="end", transport="attached") as subscriber:
        for number in range(count):
            publisher.publish(b"%08d" % number * 7500)
            if number % 64 == 63:
                for message in subscriber.fetch(64, timeout=10):
                    assert bytes(message.payload) == bytes(message.payload[:8]) * (len(message.payload) // 8)
        publisher.flush()


# ---- publishers ------------------------------------------------------------------------------------------------------


BEFORE = [b"before-%d" % number for number in range(20)]


def large(count: int) -> list[bytes]:
    """What the struck publisher publishes."""
    return [b"%08d" % number * REPEAT for number in range(count)]


def test_a_publisher_killed_in_mid_copy_leaves_no_part_of_its_message(pair: Cluster) -> None:
    with child(IN_MID_COPY.format(signal="SIGKILL", repeat=REPEAT), pair) as victim:
        assert victim.wait(60) == -signal.SIGKILL
    with Publisher("t", cluster=pair.name, transport="attached", client_id=7) as publisher:
        publisher.publish(b"goes on").result()
    *found, last = read_topic(pair.name, "t")
    assert last == b"goes on"
    whole = [*BEFORE, *large(int(found[-1][:8]) + 1 if len(found[-1]) > 10 else 0)]
    assert found == whole[-len(found):]
    publish_over_the_region(pair)


def test_a_publisher_stopped_in_mid_copy_for_longer_than_its_lease_goes_on_exactly(pair: Cluster) -> None:
    with child(IN_MID_COPY.format(signal="SIGSTOP", repeat=REPEAT), pair) as victim:
        assert eventually(lambda: is_stopped(victim))
        with Publisher("t", cluster=pair.name, transport="attached") as other:
            until = time.monotonic() + 2 * LEASE_SECONDS
            while time.monotonic() < until:
                other.publish(b"other").result()
                time.sleep(0.02)
        # It was fenced meanwhile, and what it still writes to is nobody else's.
        victim.send_signal(signal.SIGCONT)
        count = int(line_of(victim))
        assert victim.wait(20) == 0
    mine = [message for message in read_topic(pair.name, "t") if message != b"other"]
    # The oldest may be forgotten already: how much it published until it was struck is chance.
    assert len(mine) > 20
    assert mine == [*BEFORE, *large(count)][-len(mine):], "everything, once, in order"


def test_what_a_stopped_publisher_still_writes_to_is_reused_by_nobody(pair: Cluster) -> None:
    with child(IN_MID_COPY.format(signal="SIGSTOP", repeat=REPEAT), pair) as victim:
        assert eventually(lambda: is_stopped(victim))
        time.sleep(1.5 * LEASE_SECONDS)
        publish_over_the_region(pair)
        victim.send_signal(signal.SIGCONT)
        publish_over_the_region(pair)
        assert int(line_of(victim)) > 0


AFTER_SUBMIT = """
    import sys
    from client import Publisher
    publisher = Publisher(sys.argv[2], cluster=sys.argv[1], transport="attached", client_id=7, batch_bytes=500).open()
    publisher.publish(b"before").result()
    print("open", flush=True)
    import time
    while not __import__("os").path.exists(sys.argv[3]):
        time.sleep(0.01)
    for number in range(50):
        publisher.publish(b"%04d" % number)
    publisher._engine.core.flush_open()
    print(publisher._engine.core.in_flight, flush=True)
    time.sleep(60)
"""


def test_a_publisher_killed_after_submit_and_before_the_ack_has_all_of_a_prefix(pair: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with child(AFTER_SUBMIT, pair, str(go)) as victim:
        assert line_of(victim) == "open"
        for broker in (0, 1):
            pair.kill(broker, signal.SIGSTOP)
        try:
            go.touch()
            assert int(line_of(victim)) > 1, "nobody could ack"
            victim.kill()
            victim.wait()
        finally:
            for broker in (0, 1):
                pair.kill(broker, signal.SIGCONT)
    with Publisher("t", cluster=pair.name, transport="attached", client_id=7) as publisher:
        publisher.publish(b"again").result()
    found = read_topic(pair.name, "t")
    assert found[0] == b"before"
    assert found[-1] == b"again"
    assert found[1:-1] == [b"%04d" % number for number in range(len(found) - 2)], "a prefix, once, in order"


def test_the_same_publisher_goes_on_after_its_brokers_were_stopped_for_longer_than_its_lease(pair: Cluster) -> None:
    with Publisher("t", cluster=pair.name, transport="attached", batch_bytes=500) as publisher:
        publisher.publish(b"before").result()
        for broker in (0, 1):
            pair.kill(broker, signal.SIGSTOP)
        deliveries = [publisher.publish(message) for message in numbered(200)]
        time.sleep(1.5 * LEASE_SECONDS)
        for broker in (0, 1):
            pair.kill(broker, signal.SIGCONT)
        assert [delivery.exception() for delivery in deliveries] == [None] * 200
    assert read_topic(pair.name, "t") == [b"before", *numbered(200)]


# ---- subscribers -----------------------------------------------------------------------------------------------------

HOLDS_VIEWS = """
    import sys, time
    from client import Subscriber
    with Subscriber(sys.argv[2], cluster=sys.argv[1], transport="attached") as subscriber:
        held = subscriber.fetch(5, timeout=10)
        print(len(held), flush=True)
        time.sleep(600)
"""


def test_a_subscriber_killed_with_views_lets_go_and_nobody_elses_views_change(small_pair: Cluster) -> None:
    with Publisher("t", cluster=small_pair.name, transport="attached", delivery_timeout=3) as publisher, \
            Subscriber("t", cluster=small_pair.name, transport="attached") as mine:
        publisher.publish_many([b"%d" % number * 1000 for number in range(5)]).result()
        with child(HOLDS_VIEWS, small_pair) as reader:
            assert line_of(reader) == "5"
            assert reader.pid in [each["pid"] for each in inspected(small_pair.name)["cursors"]], "it shows as the holder"
            mine.fetch(5, timeout=10)           # and is not held
            filling = [publisher.publish(bytes(60_000)) for _ in range(2 * small_pair.config.region_bytes // 60_000)]
            refused = next(error for each in filling if (error := each.exception()) is not None)
            assert isinstance(refused, PoolFull)
            assert f"process {reader.pid}" in refused.message
            reader.kill()
            reader.wait()
        mine.seek("end")
        assert publisher.publish(b"held by me").result(20).position is not None
        held = next(each.payload for each in mine if each.payload == b"held by me")
        assert eventually(lambda: reader.pid not in [each["pid"] for each in inspected(small_pair.name)["cursors"]])
        filling = [publisher.publish(bytes([1]) * 60_000) for _ in range(2 * small_pair.config.region_bytes // 60_000)]
        outcomes = {type(each.exception()) for each in filling}
        assert PoolFull in outcomes
        assert held == b"held by me"
        del held
        mine.seek("end")
        assert publisher.publish(b"room").result(20).position is not None


# ---- counting --------------------------------------------------------------------------------------------------------


def test_what_attached_clients_flush_and_fence_is_counted_in_the_region(pair: Cluster) -> None:
    from broker.inspection import region_statistics

    def client() -> dict[str, int]:
        with attach_region(pair.name, writable=False) as region:
            return dict(region_statistics(region)["roles"]["client"])

    before = client()
    with Publisher("t", cluster=pair.name, transport="attached", batch_bytes=1000) as publisher:
        publisher.publish_many([bytes(100)] * 90)
        publisher.flush()
    after = client()
    # Each batch has its descriptor flushed, and fences around it.
    assert after["flushes"] - before["flushes"] >= 10
    assert after["fences"] - before["fences"] >= 20
    assert after["bytes_in"] - before["bytes_in"] >= 9000


