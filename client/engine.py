"""What publishers over every transport share: the buffer and its policies, threads that wait, and calls to brokers.

    publish ─► Packer ─► pending ─► [ client.publishing.Session: stamped, on its way, acked ] ─► deliveries

What is promised is decided by the session, which does no I/O. Here its commands are done, on the client loop, and what
came of them is told to it.
"""

import itertools
import threading
import time
from abc import abstractmethod
from array import array
from collections.abc import Callable

from broker.errors import (
    BufferFull,
    ClosedError,
    ConfigError,
    CxlmqError,
    DeliveryTimeout,
    MessageTooBig,
)
from client.arguments import as_seconds
from client.batch import Batch, Delivery, Dropped, Packer
from client.fork import parents_client
from client.publishing.commands import Settle
from client.publishing.driver import Driver
from client.waiter import Waiter

BLOCK_GRACE_SECONDS = 1.0
FLUSH_GRACE_SECONDS = 5.0


class Engine(Driver):
    """A publisher's state. Its coroutines and callbacks run on the client loop; the rest may be called anywhere.

    Invariant: a batch is in exactly one of: a packer, the session, the native core, settled.
    """

    BUFFER_BYTES = 16 << 20

    def __init__(self, topic: str, *, cluster: str | None, bootstrap: str | None, ack: int | None, client_id: int,
                 batch_bytes: int | None, batch_bytes_min: int, batch_bytes_max: int, linger_ms: float,
                 in_flight: int, buffer_bytes: int | None, when_full: str, delivery_timeout: float,
                 on_delivery: Callable[[Delivery], None] | None, on_event: Callable[[CxlmqError], None] | None,
                 compression: str | None) -> None:
        self.sealing = threading.RLock()            # held while batches go from one place to another
        super().__init__(topic, cluster=cluster, bootstrap=bootstrap, ack=ack, client_id=client_id,
                         delivery_timeout=delivery_timeout, on_event=on_event)
        self.fixed_batch = batch_bytes is not None
        self.batch_bytes = (batch_bytes or batch_bytes_min, batch_bytes_min, batch_bytes_max)
        self.linger = linger_ms / 1000
        self.in_flight = in_flight
        self.buffer_bytes = buffer_bytes or self.BUFFER_BYTES
        self.when_full = when_full
        self.on_delivery = on_delivery
        self.compression = compression
        self.pending = self.session.pending
        self.unsettled: dict[int, Batch] = {}       # what is in private memory, by number of sealing
        self.sealed = itertools.count(1)
        self.held = 0                               # bytes of `unsettled`
        self.account = threading.Lock()
        self.taken: list[Batch] = []                # out of the packer, not pending yet, in the order of packing
        self.packer: Packer | None = None
        self.changed = threading.Condition()
        self.waiters = 0
        self.sealing_now = False
        self.pump_scheduled = False
        self.linger_armed = False
        self.forked = False
        self.failure: CxlmqError | None = None
        self.last_error: CxlmqError | None = None   # that a batch settled with
        self.counts = dict.fromkeys(
            ("batches", "acked", "duplicates", "failed", "dropped_oldest", "dropped_newest"), 0)

    @abstractmethod
    def _opened(self) -> None:
        """The first session is open, its limits are known."""

    def _is_loaded(self) -> bool:
        """Whether so much is under way that larger batches pay."""
        return len(self.unsettled) >= self.session.flights.connected()

    def _set_limits(self) -> None:
        """What the first session says about sizes. Raises `ConfigError`."""
        most = self.session.opened.batch_bytes_max
        if self.fixed_batch and self.batch_bytes[0] > most:
            raise ConfigError(setting="batch_bytes", value=self.batch_bytes[0],
                              allowed=f"at most {most} (the cluster's batch_bytes_max)")
        first, least, limit = self.batch_bytes[0], self.batch_bytes[1], min(self.batch_bytes[2], most)
        self.batch_bytes = min(first, most), min(least, limit), limit
        self.packer = Packer(self, self.send_full, self.batch_bytes[0], self.session.opened.message_bytes_max)
        self._opened()

    # ---- from the packer (any thread) -------------------------------------------------------------------------------

    @property
    def front(self) -> Packer:
        """What takes messages: `append`, `append_many`, `append_array`, `target`. Raises `ClosedError`."""
        if self.packer is None:
            raise ClosedError("the publisher is not open: use it in a `with` block", what="the publisher")
        return self.packer

    @property
    def buffered(self) -> int:
        """Bytes that are not settled."""
        return self.held

    def statistics(self) -> dict[str, int]:
        """Counts so far."""
        packer = self.packer
        return {"messages": packer.messages if packer else 0, "bytes": packer.nbytes if packer else 0,
                "batch_bytes_target": packer.target if packer else 0, "buffered_bytes": self.buffered, **self.counts,
                "retries": self.session.retries, "reopened": self.session.reopened}

    def undecided(self) -> int:
        """Messages whose outcome is not known."""
        counts = self.statistics()
        return counts["messages"] - counts["acked"] - counts["failed"] - counts["dropped_oldest"]

    def why_failed(self) -> str:
        """Why what failed last failed, in words."""
        error = self.failure or self.last_error or DeliveryTimeout(timeout_seconds=self.delivery_timeout)
        return error.message

    @abstractmethod
    def take_latencies(self) -> "array[int]":
        """Send-to-ack times since the last call, ns."""

    def too_big(self, nbytes: int) -> None:
        """Refuse a message before anything is packed."""
        raise MessageTooBig(message_bytes=nbytes, message_bytes_max=self.session.opened.message_bytes_max)

    def make_room(self, nbytes: int) -> None:
        """Account for a new batch of up to `nbytes`; the policy decides when there is no room."""
        self.raise_if_closed()
        if self.buffered and self.buffered + nbytes > self.buffer_bytes:
            self._when_full(nbytes)
            self.raise_if_closed()
        if not self.linger_armed:
            self.linger_armed = True
            self.loop.call_soon_threadsafe(self._arm_linger)

    def after_fork(self) -> None:
        """In a child: all of this is the parent's, and its locks may be held by threads that are not here."""
        self.sealing, self.account, self.changed = threading.RLock(), threading.Lock(), threading.Condition()
        self.failure, self.closed, self.forked = parents_client(), True, True
        if self.packer is not None:
            self.packer.after_fork()

    def raise_if_closed(self) -> None:
        """Raise what ended the publisher."""
        if self.closed:
            raise self.failure or ClosedError(what="the publisher")

    def _when_full(self, nbytes: int) -> None:
        def room() -> bool:
            return self.closed or not self.buffered or self.buffered + nbytes <= self.buffer_bytes

        error = BufferFull(buffer_bytes=self.buffer_bytes)
        if self.when_full == "error":
            raise error
        if self.when_full == "drop_oldest":
            while not room() and self._drop_oldest():
                pass
            if room():
                return
        if self.when_full in ("drop_oldest", "drop_newest"):
            with self.account:
                self.counts["dropped_newest"] += 1
            raise Dropped(BufferFull("dropped: the buffer was full", buffer_bytes=self.buffer_bytes))
        if self.is_on_loop():
            raise error                     # waiting here would stop what makes room
        with self._waiting():
            if not self.changed.wait_for(room, self.delivery_timeout + BLOCK_GRACE_SECONDS):
                raise error

    def _drop_oldest(self) -> bool:
        """Drop the oldest batch that is not on its way yet; False when there is none."""
        try:
            oldest = self.pending.popleft()
        except IndexError:
            return False                    # the loop was faster
        self._settle(Settle(oldest, None, BufferFull("dropped: the buffer was full and this was the oldest",
                                                     buffer_bytes=self.buffer_bytes)), outcome="dropped_oldest")
        self._notify()
        return True

    def send_full(self) -> None:
        """The packer's batch is full: it goes, and under load the next one may be larger."""
        assert self.packer is not None
        with self.sealing:
            taken = self.packer.take_to(self.taken)
            if taken is not None and not self.fixed_batch and self._is_loaded():
                self.packer.target = min(self.packer.target * 2, self.batch_bytes[2])
            self._seal_taken()
        self._sealed()

    def _seal_taken(self) -> None:
        """Make pending what was taken. A finalizer of this thread may come in here again with a batch of its own: that
        one waits behind. After Ctrl-C in the middle, the next caller goes on with the same batch."""
        if self.sealing_now:
            return
        self.sealing_now = True
        try:
            while self.taken:
                self._seal(self.taken[0])
                del self.taken[0]
        finally:
            self.sealing_now = False

    def _sealed(self) -> None:
        """Callbacks may run here, so no lock is held."""
        if self.closed:
            self._give_up()                 # it was closed meanwhile
        self._schedule_pump()

    def _seal(self, batch: Batch) -> None:
        assert self.ack is not None
        batch.seal(time.time_ns())
        batch.level = self.ack
        batch.deadline = batch.opened + self.delivery_timeout
        if batch.number == 0:
            with self.account:
                self.counts["batches"] += 1
            self.keep(batch)
        elif batch.number not in self.unsettled or batch.sequence is not None or batch in self.pending:
            return                          # it was placed already, by whoever was interrupted
        self.pending.append(batch)

    def keep(self, batch: Batch) -> None:
        """Note a batch that lies in private memory."""
        with self.account:
            batch.number = next(self.sealed)
            self.held += batch.nbytes
            self.unsettled[batch.number] = batch

    def _kept(self) -> list[Batch]:
        with self.account:
            return list(self.unsettled.values())

    def _schedule_pump(self) -> None:
        if not self.pump_scheduled:
            self.pump_scheduled = True
            self.loop.call_soon_threadsafe(self._pump)

    def urge(self, batch: Batch) -> None:
        """Somebody waits for this batch: do not linger. Raises `ForkedProcess` in a child, where nobody hears of it."""
        if self.forked:
            raise parents_client()
        if self.packer is not None and self.packer.batch is batch:
            self.seal_current()

    def is_packed(self) -> bool:
        """Whether there is something in the packer. Any thread: another one may take it at once."""
        batch = self.packer.batch if self.packer is not None else None
        return batch is not None and batch.count > 0

    def seal_current(self) -> None:
        """Send what is packed so far. When that is little, the next batch need not be as large."""
        if self.packer is None:
            return
        with self.sealing:
            taken = self.packer.take_to(self.taken)
            if taken is None and not self.taken:
                return
            if taken is not None and not self.fixed_batch and taken.nbytes < self.packer.target // 2:
                self.packer.target = max(self.packer.target // 2, self.batch_bytes[1])
            self._seal_taken()
        self._sealed()

    # ---- waiting (any thread but the loop's) ------------------------------------------------------------------------

    def is_on_loop(self) -> bool:
        """Whether the caller is the library's own thread, in a callback: it must not wait."""
        return threading.current_thread() is self.client_loop.thread

    def _waiting(self) -> Waiter:
        if self.is_on_loop():
            raise RuntimeError("a delivery callback cannot wait for other deliveries: it runs where they are settled")
        return Waiter(self)

    def wait_for_batch(self, batch: Batch, timeout: float | None) -> None:
        """Wait until a batch is settled. Raises TimeoutError."""
        limit = self.limit(timeout)
        self.urge(batch)
        if not self._wait(lambda: batch.settled, limit):
            raise TimeoutError(f"the outcome is not known after {limit} s")

    def limit(self, timeout: float | None) -> float:
        """How long to wait, seconds: without a limit, until all must be settled. Raises `ConfigError`."""
        seconds = as_seconds("timeout", timeout)
        return self.delivery_timeout + FLUSH_GRACE_SECONDS if seconds is None else seconds

    def _wait(self, done: Callable[[], bool], limit: float) -> bool:
        with self._waiting():
            return self.changed.wait_for(done, limit)

    def flushed(self) -> Callable[[], bool]:
        """Send what is packed; what it returns says whether everything published until now is settled."""
        self.seal_current()
        batches = self._kept()
        return lambda: all(batch.settled for batch in batches)

    def flush(self, timeout: float | None) -> None:
        """Wait until everything published so far is settled. Raises `DeliveryTimeout`, `ConfigError`."""
        limit = self.limit(timeout)
        if not self._wait(self.flushed(), limit):
            raise DeliveryTimeout(timeout_seconds=limit)

    # ---- on the loop ------------------------------------------------------------------------------------------------

    def _arm_linger(self) -> None:
        self.loop.call_later(self.linger, self._linger)

    def _linger(self) -> None:
        """Send a batch that lingered long enough; come again while there is one."""
        assert self.packer is not None
        batch = self.packer.batch
        if batch is None or batch.count == 0 or self.closed:
            self.linger_armed = False
            # One may have begun just now.
            if self.is_packed() and not self.linger_armed and not self.closed:
                self.linger_armed = True
                self._arm_linger()
            return
        age = time.monotonic() - batch.opened
        # While the pipe is full, lingering costs nothing and fills batches.
        if age >= self.linger and not self.session.flights.is_saturated():
            self.seal_current()
            age = 0.0
        self.loop.call_later(max(self.linger - age, self.linger / 4, 0.0001), self._linger)

    def _step(self) -> None:
        """Time has passed. Nothing here waits for a broker."""
        if self.taken:
            self.seal_current()             # whoever sealed it was interrupted
        if self.is_packed() and not self.linger_armed:
            self.linger_armed = True        # it began just when nobody seemed to need that any more
            self._arm_linger()
        self.session.tick(self.now())
        self._perform()

    def _pump(self) -> None:
        """Send what is pending, as far as there is room."""
        self.pump_scheduled = False
        self.session.pump(self.now())
        self._perform()

    # ---- outcomes ---------------------------------------------------------------------------------------------------

    def _settle(self, command: Settle, outcome: str = "") -> None:
        """Let go of a batch; tell who published it, unless that was told when it was sent (level 0). Any thread."""
        batch, error = command.batch, command.error
        batch.release()
        self.last_error = error or self.last_error
        with self.account:
            if self.unsettled.pop(batch.number, None) is None:
                return                      # another thread gave it up
            self.held -= batch.nbytes
            self.counts["duplicates"] += command.duplicate
            if not batch.settled:
                self.counts[outcome or ("acked" if error is None else "failed")] += batch.count
        batch.settle(command.position, command.epoch, batch.broker, command.duplicate, error)

    def settled_at_send(self, batch: Batch) -> None:
        """Level 0: whoever published it is told now. The batch is kept until a broker has it: none is lost because
        a broker had no room, and none is sent faster than brokers take them."""
        if not batch.settled:
            with self.account:
                self.counts["acked"] += batch.count
            batch.settle(None, 0, batch.broker, False, None)
            self._notify()

    def _notify(self) -> None:
        if self.waiters:
            with self.changed:
                self.changed.notify_all()

    def _fail(self, error: CxlmqError) -> None:
        """Nothing more can be published: everything settles with this error, and so does what comes later."""
        self.failure = error
        self.closed = True
        self._give_up()
        self._tell(error)

    def _give_up(self) -> None:
        """Settle what a closed publisher still has. Any thread."""
        error = self.failure or ClosedError(what="the publisher")
        if self.packer is not None:
            self.packer.end()
        current = self.packer.take() if self.packer is not None else None
        if current is not None:
            current.settle(None, None, None, False, error)
            current.release()
            with self.account:
                self.counts["failed"] += current.count
        self.session.forget()
        with self.account:
            left = list(self.unsettled.values())
        for batch in left:
            self._settle(Settle(batch, None, error))
        self._notify()
