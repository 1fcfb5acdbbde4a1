"""The real input: a vehicle capture, one frame a line, through brokers of every kind and back, byte-identical."""

import random
import threading
from pathlib import Path

import pytest

from client import Admin, Publisher, Subscriber
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config

CAPTURE = Path(__file__).resolve().parents[3] / "shared" / "data" / "can-2014.log"


def frames() -> list[bytes]:
    """The capture's lines; where it is not beside the repository, one of the same shape under a fixed seed."""
    if CAPTURE.exists():
        return CAPTURE.read_bytes().splitlines()
    source = random.Random(2014)
    return [b"(1398128223.%06d) can0 %03X#%s" % (number, source.randrange(0x800),
                                                 source.randbytes(source.randrange(9)).hex().upper().encode())
            for number in range(6158)]


def read(cluster: Cluster, topic: str, count: int, transport: str, into: list[bytes]) -> None:
    """The first `count` messages."""
    with Subscriber(topic, cluster=cluster.name, transport=transport) as subscriber:
        while len(into) < count:
            got = subscriber.fetch(count - len(into), timeout=20)
            assert got
            into += [bytes(message.payload) for message in got]


@pytest.mark.parametrize("transport", ["grpc", "attached"])
@pytest.mark.parametrize("batch_bytes", [None, 64])
def test_three_subscribers_started_at_different_times_get_the_same_lines(cluster, topic, transport, batch_bytes):
    lines = frames()
    with Admin(cluster.name) as admin:
        admin.create_topic(topic, order=5)
        results: list[list[bytes]] = [[], [], []]
        threads = [threading.Thread(target=read, args=(cluster, topic, len(lines), transport, into)) for into in results]
        threads[0].start()
        with Publisher(topic, cluster=cluster.name, transport=transport, batch_bytes=batch_bytes) as publisher:
            publisher.publish_many(lines[:3000])
            threads[1].start()
            publisher.publish_many(lines[3000:])
        for thread in threads[:2]:
            thread.join(60)
        assert results[0] == lines
        if batch_bytes is None:             # one batch a frame is more than a small order index keeps for latecomers
            assert results[1] == lines
            threads[2].start()
            threads[2].join(60)
            assert results[2] == lines
        admin.delete_topic(topic)


@pytest.mark.parametrize("settings", [
    {"brokers": 1}, {"brokers": 2, "sequencer_lock": "mutex", "scanners": 2}, {"brokers": 3, "pool": "partitioned"},
    {"brokers": 3, "pool": "leader", "waiting": "saver"}, {"brokers": 2, "thread_plan": "staged", "scanners": 2},
    {"brokers": 6, "sequencer_lock": "semaphore", "waiting": "latency"},
], ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()))
def test_the_capture_comes_back_whatever_the_settings(settings):
    lines = frames()[:2000]
    with Cluster(small_config(**settings)) as cluster, Admin(cluster.name) as admin:
        admin.create_topic("can")
        with Publisher("can", cluster=cluster.name, batch_bytes=500) as publisher:
            publisher.publish_many(lines)
        got: list[bytes] = []
        read(cluster, "can", len(lines), "grpc", got)
        assert got == lines
