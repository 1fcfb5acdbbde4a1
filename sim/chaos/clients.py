"""The clients of a chaos run, processes of their own: `python -m sim.chaos.clients publish|read|group JSON`.

They run until SIGTERM, or until they are killed. Whatever they do they write to a trail.
"""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from broker.errors import BufferFull, CxlmqError, DamagedData, MessageTooBig, PoolFull, PositionLost, RangeLost
from client.batch import Delivery
from client.publisher import Publisher
from client.subscriber import Subscriber
from sim.chaos.trail import Kind, Trail, make_message, sender_of

FETCH_SECONDS = 0.2
RETRY_SECONDS = 0.1
FLUSH_SECONDS = 45.0
COMMIT_SECONDS = 0.5
GROUP_WAIT_SECONDS = 5.0
_NOT_IN_THE_LOG = (BufferFull, PoolFull, MessageTooBig)

_stopping = threading.Event()


def publish(trail: Path, topic: str, cluster: str, client: int, transport: str, ack: int, rate: float,
            body_bytes_max: int, delivery_timeout: float) -> None:
    """Publish about `rate` messages a second until told to stop, or until one fails: then this client is done."""
    events, chance = Trail(trail), random.Random(client)
    failed = threading.Event()

    def settled(number: int, delivery: Delivery) -> None:
        error = delivery.exception()
        if error is None:
            receipt = delivery.receipt()
            position = -1 if receipt.position is None else receipt.position
            events.write(Kind.ACKED, client, number, position, receipt.epoch, receipt.broker)
            return
        events.write(Kind.FAILED if isinstance(error, _NOT_IN_THE_LOG) else Kind.UNKNOWN, client, number)
        if not failed.is_set():
            print(f"message {number}: {error.message} ({error.code})", file=sys.stderr, flush=True)
        failed.set()

    with Publisher(topic, cluster=cluster, transport=transport, ack=ack, client_id=client,
                   delivery_timeout=delivery_timeout) as publisher:
        print(f"{publisher.transport}", file=sys.stderr, flush=True)
        number, due = 0, time.monotonic()
        while not _stopping.is_set() and not failed.is_set():
            message = make_message(client, number, int(body_bytes_max ** chance.random()))
            events.write(Kind.SENT, client, number)
            publisher.publish(message).add_done_callback(lambda delivery, number=number: settled(number, delivery))
            number += 1
            due = max(due + chance.expovariate(rate), time.monotonic() - 0.5)
            if due > time.monotonic():
                _stopping.wait(due - time.monotonic())
        publisher.flush(FLUSH_SECONDS)


def read(trail: Path, topic: str, cluster: str, transport: str, start: int, group: str = "") -> None:
    """Follow the topic from a position on; go on behind what is gone."""
    follower = _Follower(Trail(trail), topic, start, group)
    if not group:
        follower.events.write(Kind.STARTED, 0, position=start)
    while not _stopping.is_set():
        try:
            follower.follow(cluster=cluster, transport=transport)
        except PositionLost as lost:
            follower.position = max(follower.position + 1, int(str(lost.details.get("first_available", 0))))
            follower.events.write(Kind.GAP, 0, position=follower.position)
        except (DamagedData, RangeLost) as error:
            follower.events.write(Kind.DAMAGED, 0, position=follower.position)
            follower.position += 1
            _tell(error)
        except CxlmqError as error:
            _tell(error)


def _tell(error: CxlmqError) -> None:
    print(f"{error.message} ({error.code})", file=sys.stderr, flush=True)
    time.sleep(RETRY_SECONDS)


class _Follower:
    """Reads a topic on; `position` is where it is, whatever comes between."""

    def __init__(self, events: Trail, topic: str, position: int, group: str) -> None:
        self.events, self.topic, self.position, self.group = events, topic, position, group

    def follow(self, **target: Any) -> None:
        """Read until told to stop. Raises what reading raises."""
        options: dict[str, Any] = {"group": self.group, "group_wait": GROUP_WAIT_SECONDS} if self.group else {}
        committed_at = time.monotonic()
        with Subscriber(self.topic, start=self.position, **options, **target) as subscriber:
            if self.group and subscriber.position is not None:
                self.position = subscriber.position
                self.events.write(Kind.STARTED, 0, position=self.position)
            while not _stopping.is_set():
                for batch in subscriber.fetch_batches(FETCH_SECONDS):
                    self.events.write_reads([(sender_of(message), batch.position + index)
                                             for index, message in enumerate(batch.messages())])
                    self.position = batch.position + batch.count
                    del batch           # an attached one holds its segment
                if self.group and time.monotonic() > committed_at + COMMIT_SECONDS:
                    subscriber.commit()
                    self.events.write(Kind.COMMITTED, 0, position=self.position)
                    committed_at = time.monotonic()


def main(what: str, arguments: str) -> int:
    """Run one client."""
    signal.signal(signal.SIGTERM, lambda *_: _stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the run, which ends its clients
    _end_with_parent()
    settings = json.loads(arguments)
    settings["trail"] = Path(settings["trail"])
    try:
        if what == "publish":
            publish(**settings)
        else:
            read(**settings)
    except CxlmqError as error:
        print(f"{error.message} ({error.code})", file=sys.stderr, flush=True)
        return 1
    return 0


def _end_with_parent() -> None:
    """Nobody is left behind when the run is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1], sys.argv[2]))
