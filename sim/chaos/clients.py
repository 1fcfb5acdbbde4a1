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

from broker.errors import CxlmqError, DamagedData, PositionLost, RangeLost
from client.publisher import Publisher
from client.subscriber import Subscriber
from sim.chaos.senders import Sender, fork_and_use
from sim.chaos.trail import Kind, Trail, sender_of

FETCH_SECONDS = 0.2
FETCH_MESSAGES = 16
LOOP_MESSAGES = 3
RETRY_SECONDS = 0.1
FLUSH_SECONDS = 45.0
COMMIT_SECONDS = 0.5
GROUP_WAIT_SECONDS = 5.0
TURN_SECONDS = 0.1
FORK_SHARE = 0.02                   # of the turns
FORKED = 1 << 31                    # added to the number of a client that a forked child opens
THREADS = 3                         # that share one publisher

_stopping = threading.Event()
_looping = threading.Event()        # a loop without an end waits for the next message


def publish(trail: Path, topic: str, cluster: str, client: int, transport: str, ack: int, rate: float,
            delivery_timeout: float) -> None:
    """Publish about `rate` messages a second until told to stop, or until one fails: then this client is done.

    `client` is the first of `THREADS` senders' numbers, and the session's.
    """
    events, failed, chance = Trail(trail), threading.Event(), random.Random(client)

    def opened(number: int) -> Publisher:
        return Publisher(topic, cluster=cluster, transport=transport, ack=ack, client_id=number,
                         delivery_timeout=delivery_timeout)

    with opened(client) as publisher:
        print(f"{publisher.transport}", file=sys.stderr, flush=True)
        senders = [Sender(events, client + number, publisher, failed) for number in range(THREADS)]
        threads = [threading.Thread(target=sender.run, args=(_stopping, rate / THREADS)) for sender in senders]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if chance.random() < FORK_SHARE:
                fork_and_use(lambda: opened(client + FORKED), events, client)
            _stopping.wait(TURN_SECONDS)
            for thread in threads if _stopping.is_set() else ():
                thread.join()
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
        chance = random.Random(self.position)
        with Subscriber(self.topic, start=self.position, **options, **target) as subscriber:
            if self.group and subscriber.position is not None:
                self.position = subscriber.position
                self.events.write(Kind.STARTED, 0, position=self.position)
            while not _stopping.is_set():
                chance.choices((self._by_batches, self._by_messages, self._by_loop), (60, 20, 20))[0](subscriber)
                if self.group and time.monotonic() > committed_at + COMMIT_SECONDS:
                    subscriber.commit()
                    self.events.write(Kind.COMMITTED, 0, position=self.position)
                    committed_at = time.monotonic()

    # ---- ways to read: whatever the mix, what is given out is 0, 1, 2 ... ------------------------------------------

    def _by_batches(self, subscriber: Subscriber) -> int:
        found = 0
        for batch in subscriber.fetch_batches(FETCH_SECONDS):
            found += self._note([(sender_of(message), batch.position + index)
                                 for index, message in enumerate(batch.messages())])
            del batch                       # an attached one holds its segment
        return found

    def _by_messages(self, subscriber: Subscriber) -> int:
        return self._note([(sender_of(message.payload), message.position)
                           for message in subscriber.fetch(FETCH_MESSAGES, FETCH_SECONDS)])

    def _by_loop(self, subscriber: Subscriber) -> None:
        """A loop that is left early. It would wait for ever where nothing comes: only when much has just come."""
        if self._by_messages(subscriber) < FETCH_MESSAGES:
            return
        left = LOOP_MESSAGES
        _looping.set()
        for message in subscriber:
            left -= self._note([(sender_of(message.payload), message.position)])
            if not left:
                break
        _looping.clear()

    def _note(self, reads: list[tuple[tuple[int, int] | None, int]]) -> int:
        if reads:
            self.events.write_reads(reads)
            self.position = reads[-1][1] + 1
        return len(reads)


def _stop(*_: object) -> None:
    _stopping.set()
    if _looping.is_set():
        os._exit(0)                     # its trail is written, and nothing may come any more


def main(what: str, arguments: str) -> int:
    """Run one client."""
    signal.signal(signal.SIGTERM, _stop)
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
