"""How a chaos run publishes: several threads share one publisher, and each takes every way there is.

    publish | publish_many | publish_array | loan (attached)   sizes up to a few KiB, now and then up to 4 MiB

Each thread is a sender with a number of its own: what it published is in its order, and whole.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

import numpy

from broker.errors import BufferFull, CxlmqError, MessageTooBig, PoolFull
from client.batch import Delivery
from client.publisher import Publisher
from sim.chaos.trail import BODY_BYTES_MAX, Kind, Trail, make_message

SMALL_BODY_BYTES = 4096
LARGE_SHARE = 0.01                  # of the messages
MANY = 12                           # messages of one call at most
FORK_SECONDS = 20                   # a child that has not ended by then hangs
_NOT_IN_THE_LOG = (BufferFull, PoolFull, MessageTooBig)


class Sender:
    """One thread's part of a publisher."""

    def __init__(self, events: Trail, client: int, publisher: Publisher, failed: threading.Event) -> None:
        self._events, self._client, self._publisher, self._failed = events, client, publisher, failed
        self._chance = random.Random(client)
        self._next = 0

    def run(self, stopping: threading.Event, rate: float) -> None:
        """Publish about `rate` messages a second until told to stop, or until one fails."""
        due = time.monotonic()
        while not stopping.is_set() and not self._failed.is_set():
            before = self._next
            try:
                self._chance.choices((self._one, self._many, self._array, self._loan), (70, 12, 12, 6))[0]()
            except CxlmqError as error:
                # What such a call took before it failed may be in the log.
                self._give_up(before, error)
            due = max(due + self._chance.expovariate(rate / max(1, self._next - before)), time.monotonic() - 0.5)
            if due > time.monotonic():
                stopping.wait(due - time.monotonic())

    # ---- ways to publish --------------------------------------------------------------------------------------------

    def _message(self, body_bytes: int | None = None) -> bytes:
        if body_bytes is None:
            most = BODY_BYTES_MAX if self._chance.random() < LARGE_SHARE else SMALL_BODY_BYTES
            body_bytes = int(most ** self._chance.random())
        message = make_message(self._client, self._next, body_bytes)
        self._events.write(Kind.SENT, self._client, self._next)
        self._next += 1
        return message

    def _follow(self, delivery: Delivery) -> None:
        number = self._next - 1
        delivery.add_done_callback(lambda settled: self._settled(number, settled))

    def _one(self) -> None:
        self._follow(self._publisher.publish(self._message()))

    def _many(self) -> None:
        self._follow(self._publisher.publish_many([self._message() for _ in range(self._chance.randint(1, MANY))]))

    def _array(self) -> None:
        size = int(SMALL_BODY_BYTES ** self._chance.random())
        rows = [self._message(size) for _ in range(self._chance.randint(1, MANY))]
        self._follow(self._publisher.publish_array(
            numpy.frombuffer(b"".join(rows), numpy.uint8).reshape(len(rows), -1)))

    def _loan(self) -> None:
        if self._publisher.transport != "attached":
            return self._one()
        message = self._message()
        loan = self._publisher.loan(len(message))
        with loan as view:
            view[:] = message
        return self._follow(loan.delivery)

    # ---- what became of it ------------------------------------------------------------------------------------------

    def _settled(self, number: int, delivery: Delivery) -> None:
        error = delivery.exception()
        if error is not None:
            self._tell(number, error)
            self._events.write(Kind.FAILED if isinstance(error, _NOT_IN_THE_LOG) else Kind.UNKNOWN, self._client,
                               number)
            return
        receipt = delivery.receipt()
        position = -1 if receipt.position is None else receipt.position
        self._events.write(Kind.ACKED, self._client, number, position, receipt.epoch, receipt.broker)

    def _give_up(self, first: int, error: CxlmqError) -> None:
        self._tell(first, error)
        for number in range(first, self._next):
            self._events.write(Kind.UNKNOWN, self._client, number)

    def _tell(self, number: int, error: BaseException) -> None:
        if not self._failed.is_set():
            print(f"message {number}: {error} ({getattr(error, 'code', type(error).__name__)})", file=sys.stderr,
                  flush=True)
        self._failed.set()


def fork_and_use(make: Callable[[], Publisher], events: Trail, client: int) -> None:
    """A child of a process with an open client wants one of its own: it gets one or a typed error, and ends."""
    child = os.fork()
    if child == 0:
        signal.alarm(FORK_SECONDS)
        try:
            with make():
                pass
        except CxlmqError:
            os._exit(0)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        events.write(Kind.CHILD, client, status)
