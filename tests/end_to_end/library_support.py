"""What the end-to-end tests share: waiting for a state, and what a cluster holds in its region."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from broker.inspection import inspect_region
from broker.region import attach_region
from client.admin import Admin
from client.cluster import Cluster
from client.subscriber import Subscriber

SECONDS = 30.0


def eventually(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def read(subscriber: Subscriber, count: int, seconds: float = SECONDS) -> list[bytes]:
    """The next `count` payloads, or fewer when they do not come in time."""
    out: list[bytes] = []
    deadline = time.monotonic() + seconds
    while len(out) < count and time.monotonic() < deadline:
        out += [message.payload for message in subscriber.fetch(count - len(out), timeout=1.0)]
    return out


def read_topic(cluster: str, topic: str, **options: Any) -> list[bytes]:
    """Every payload that a topic has now."""
    with Subscriber(topic, cluster=cluster, **options) as subscriber:
        return [message.payload for message in subscriber.get_all()]


def numbered(count: int, nbytes: int = 16, tag: str = "m") -> list[bytes]:
    """Messages that say who they are."""
    return [f"{tag}-{number:08d}-".encode().ljust(nbytes, b".") for number in range(count)]


def inspected(cluster: str) -> dict[str, Any]:
    """The region as it is."""
    with attach_region(cluster, writable=False) as region:
        return inspect_region(region)


def held(cluster: str) -> dict[str, Any]:
    """What clients hold in the region: sessions, cursors, ring slots that wait. Nothing when nobody is there."""
    found = inspected(cluster)
    return {
        "sessions": [each["session"] for each in found["sessions"]
                     if each["state"] == "open" and each["sequencer_state"] == "open"],
        "cursors": [each["cursor"] for each in found["cursors"]],
        "attached": [each["slot"] for each in found["attached"]],
        "slots": [(topic["name"], place["broker"]) for topic in found["topics"] for place in topic["brokers"]
                  if place["delegated"] != place["reclaimed"]],
    }


NOTHING: dict[str, Any] = {"sessions": [], "cursors": [], "attached": [], "slots": []}


def settles_to_nothing(cluster: str, seconds: float = SECONDS) -> bool:
    """Whether sessions, cursors and slots go back to none."""
    return eventually(lambda: held(cluster) == NOTHING, seconds)


def segments_owned(cluster: str) -> int:
    """Segments that belong to a topic."""
    return sum(each["segments"] for each in inspected(cluster)["pool"]["owners"])


@contextmanager
def made_topic(cluster: Cluster, name: str, **options: Any) -> Iterator[dict[str, Any]]:
    """A topic for a while."""
    with Admin(cluster=cluster.name) as admin:
        described = admin.create_topic(name, **options)
        try:
            yield described
        finally:
            admin.delete_topic(name)
