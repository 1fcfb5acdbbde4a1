"""What publishers over every transport share: the buffer and its policies, time-outs, sessions that are opened anew.

A batch that waits for room lies in private memory (`pending`); how batches in flight travel is the derived engine's:

    publish ─► Packer ─► pending ─► [ stamped with the session's sequence, on its way, acked ] ─► deliveries

What an ended session has in the log is not settled by that: it is `awaited` until its level is reached (`levels`).
"""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence

from broker.config import TopicConfig
from broker.errors import (
    BrokerUnavailable,
    BufferFull,
    ClosedError,
    ConfigError,
    CxlmqError,
    DeliveryTimeout,
    MessageLost,
    MessageTooBig,
    SessionFenced,
)
from broker.proto import cxlmq_pb2 as pb
from broker.sessions import LOST_POSITION, UNKNOWN_POSITION, UNPLACED_POSITION
from client.arguments import as_seconds
from client.batch import Batch, Delivery, Dropped, Packer
from client.connection import BrokerAddress, ClientLoop, Connection
from client.fork import parents_client
from client.levels import Awaited, Outcome
from client.session import answered, open_session
from client.waiter import Waiter
from client.ways import Ways

_log = logging.getLogger("cxlmq")

RECONNECT_SECONDS = 0.5
CLOSE_SESSION_SECONDS = 2.0
BLOCK_GRACE_SECONDS = 1.0
FLUSH_GRACE_SECONDS = 5.0
SILENT_SECONDS = 0.5                    # a broker that has batches and answers none is asked whether it is there
ASK_SECONDS = 1.0
LOOK_UP_SECONDS = 5.0
LEARN_SECONDS = 0.1                     # between two looks at how far levels have come


class Engine(Ways):
    """A publisher's state. Its coroutines and callbacks run on the client loop; the rest may be called anywhere.

    Invariant: a batch is in exactly one of: a packer, `pending` (no sequence yet), in flight (by sequence), `awaited`,
    settled.
    """

    BUFFER_BYTES = 16 << 20

    def __init__(self, topic: str, *, cluster: str | None, bootstrap: str | None, ack: int | None, client_id: int,
                 batch_bytes: int | None, batch_bytes_min: int, batch_bytes_max: int, linger_ms: float,
                 in_flight: int, buffer_bytes: int | None, when_full: str, delivery_timeout: float,
                 on_delivery: Callable[[Delivery], None] | None, on_event: Callable[[CxlmqError], None] | None,
                 compression: str | None) -> None:
        self.topic = topic
        self.client_loop = ClientLoop.get()
        self.loop = self.client_loop.loop
        self.connection = Connection(cluster, bootstrap)
        self.ack = ack
        self.client_id = client_id
        self.fixed_batch = batch_bytes is not None
        self.batch_bytes = (batch_bytes or batch_bytes_min, batch_bytes_min, batch_bytes_max)
        self.linger = linger_ms / 1000
        self.in_flight = in_flight
        self.buffer_bytes = buffer_bytes or self.BUFFER_BYTES
        self.when_full = when_full
        self.delivery_timeout = delivery_timeout
        self.on_delivery = on_delivery
        self.on_event = on_event
        self.compression = compression
        self.session = pb.Session()
        self.session_target = ""
        self.session_open = False
        self.epoch = 0
        self.tried: set[int] = set()                # epochs that we asked for and may have got
        self.awaited = Awaited(topic)
        self.lost_meanwhile: list[Outcome] = []
        self.learning: asyncio.Task[None] | None = None
        self.next_learning = 0.0
        self.pending: deque[Batch] = deque()
        self.unsettled: dict[int, Batch] = {}       # what is in private memory, by number of sealing
        self.sealed = itertools.count(1)
        self.held = 0                               # bytes of `unsettled`
        self.account = threading.Lock()
        self.sealing = threading.RLock()            # held while batches go from one place to another
        self.taken: list[Batch] = []                # out of the packer, not pending yet, in the order of packing
        self.packer: Packer | None = None
        self.changed = threading.Condition()
        self.waiters = 0
        self.sealing_now = False
        self.pump_scheduled = False
        self.linger_armed = False
        self.reopening = False
        self.closed = self.forked = False
        self.failure: CxlmqError | None = None
        self.last_error: CxlmqError | None = None   # that a batch settled with
        self.ticker: asyncio.Task[None] | None = None
        self.reconnecting: asyncio.Task[None] | None = None
        self.next_reconnect = 0.0
        self.asking: dict[int, asyncio.Task[None]] = {}
        self.silent: set[int] = set()               # brokers that stand still: nothing is sent to them
        self.latencies = array("q")
        self.counts = dict.fromkeys(
            ("batches", "acked", "duplicates", "failed", "dropped_oldest", "dropped_newest", "retries", "reopened"), 0)

    def _is_loaded(self) -> bool:
        """Whether so much is under way that larger batches pay."""
        return len(self.unsettled) >= self._connected()

    # ---- opening ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find the brokers, open the session and a way to every broker."""
        brokers = await self.connection.brokers()
        topic = await self.connection.any("Admin/DescribeTopic", pb.DescribeTopicRequest(name=self.topic), pb.Topic,
                                          LOOK_UP_SECONDS)
        if self.ack is None:
            self.ack = topic.ack
        TopicConfig(name=topic.name, order=topic.order, ack=self.ack,
                    replication_factor=topic.replication_factor).validate(max(2, topic.replication_factor))
        await self._open_session(brokers, resume_from=0)
        limit = min(self.batch_bytes[2], self.session.batch_bytes_max)
        if self.fixed_batch and self.batch_bytes[0] > self.session.batch_bytes_max:
            raise ConfigError(setting="batch_bytes", value=self.batch_bytes[0],
                              allowed=f"at most {self.session.batch_bytes_max} (the cluster's batch_bytes_max)")
        self.batch_bytes = (min(self.batch_bytes[0], self.session.batch_bytes_max),
                            min(self.batch_bytes[1], limit), limit)
        self.packer = Packer(self, self.send_full, self.batch_bytes[0], self.session.message_bytes_max)
        self._opened()
        await self._connect(brokers)
        self.ticker = self.loop.create_task(self._tick())

    async def _open_session(self, brokers: Sequence[BrokerAddress], resume_from: int) -> None:
        """Open the session's next epoch.

        Raises `SessionFenced` when a later publisher of this client id took over, `TopicRecreated`, `ClusterReplaced`.
        """
        assert self.ack is not None
        request = pb.OpenSessionRequest(
            topic=self.topic, client_id=self.client_id, ack=self.ack, resume_from=resume_from,
            resume_epoch=self.epoch, seen=self.session.topic, earlier=self.awaited.earlier())
        # Cancelled not before the answer: nobody else could close what it opened.
        (self.session, self.session_target), cancelled = await answered(
            open_session(self.connection, self._awake(brokers), request, self.tried))
        self.epoch = self.session.session_epoch
        self.session_open = True
        self.lost_meanwhile = self.awaited.looked_up(request.earlier, self.session)
        if cancelled is not None:
            raise cancelled

    def _awake(self, brokers: Sequence[BrokerAddress]) -> Sequence[BrokerAddress]:
        """Those that do not stand still, if there are any."""
        return [each for each in brokers if each.id not in self.silent] or brokers

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
                "batch_bytes_target": packer.target if packer else 0, "buffered_bytes": self.buffered, **self.counts}

    def undecided(self) -> int:
        """Messages whose outcome is not known."""
        counts = self.statistics()
        return counts["messages"] - counts["acked"] - counts["failed"] - counts["dropped_oldest"]

    def why_failed(self) -> str:
        """Why what failed last failed, in words."""
        error = self.failure or self.last_error or DeliveryTimeout(timeout_seconds=self.delivery_timeout)
        return error.message

    def take_latencies(self) -> "array[int]":
        """Send-to-ack times since the last call, ns."""
        taken, self.latencies = self.latencies, array("q")
        return taken

    def too_big(self, nbytes: int) -> None:
        """Refuse a message before anything is packed."""
        raise MessageTooBig(message_bytes=nbytes, message_bytes_max=self.session.message_bytes_max)

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
        self._settle(oldest, None, BufferFull("dropped: the buffer was full and this was the oldest",
                                              buffer_bytes=self.buffer_bytes), outcome="dropped_oldest")
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
            self._keep(batch)
        elif batch.number not in self.unsettled or batch.sequence is not None or batch in self.pending:
            return                          # it was placed already, by whoever was interrupted
        self.pending.append(batch)

    def _keep(self, batch: Batch) -> None:
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
            batch = self.packer.batch       # one may have begun just now
            if batch is not None and batch.count and not self.linger_armed and not self.closed:
                self.linger_armed = True
                self._arm_linger()
            return
        age = time.monotonic() - batch.opened
        # While the pipe is full, lingering costs nothing and fills batches.
        if age >= self.linger and not self._is_saturated():
            self.seal_current()
            age = 0.0
        self.loop.call_later(max(self.linger - age, self.linger / 4, 0.0001), self._linger)

    async def _tick(self) -> None:
        while not self.closed:
            await asyncio.sleep(self._pause())
            self._step()

    def _step(self) -> None:
        """Deadlines, retries, and lost brokers that came back. Nothing here waits for a broker."""
        self._expire()
        if self.taken:
            self.seal_current()             # whoever sealed it was interrupted
        packed = self.packer.batch if self.packer is not None else None
        if packed is not None and packed.count and not self.linger_armed:
            self.linger_armed = True        # it began just when nobody seemed to need that any more
            self._arm_linger()
        self._ask_quiet()
        self._resend_due()
        now = time.monotonic()
        if now >= self.next_reconnect and not self.reopening and self._lacks_brokers() and (
                self.reconnecting is None or self.reconnecting.done()):
            self.next_reconnect = now + RECONNECT_SECONDS
            self.reconnecting = self.loop.create_task(self._reconnect())
        if self.awaited and now >= self.next_learning and (self.learning is None or self.learning.done()):
            self.next_learning = now + LEARN_SECONDS
            self.learning = self.loop.create_task(self._learn())
        if self.pending:
            self._pump()

    def _ask_quiet(self) -> None:
        for broker in self._quiet_brokers() if not self.reopening else ():
            if broker.id not in self.asking:
                task = self.asking[broker.id] = self.loop.create_task(self._ask(broker))
                task.add_done_callback(lambda _, key=broker.id: self.asking.pop(key, None))  # type: ignore[misc]

    async def _ask(self, broker: BrokerAddress) -> None:
        """Ask a quiet broker whether it is there. As long as it does not answer, it is left alone: at order 5 what all
        brokers have would wait for what it has."""
        while not self.closed and await self.connection.is_silent(broker.target, ASK_SECONDS):
            if broker.id not in self.silent:
                self.silent.add(broker.id)
                self._lose(broker)
        self.silent.discard(broker.id)
        await asyncio.sleep(ASK_SECONDS)

    def _lacks_brokers(self) -> bool:
        return self._connected() < self.connection.broker_count

    async def _reconnect(self) -> None:
        try:
            brokers = await self.connection.brokers()
        except CxlmqError:
            return
        if self.closed or self.reopening:
            return
        with contextlib.suppress(CxlmqError):       # come again
            await self._connect(brokers)

    def _expire(self) -> None:
        """Settle what nobody took or answered in time."""
        now = time.monotonic()
        expired = False
        while (batch := self._overdue(now)) is not None:
            self._settle(batch, None, self._why_not_sent())
            expired = True
        expired |= self._tell_outcomes(self.awaited.overdue(now, self.delivery_timeout))
        if self._expire_in_flight(now):
            # A sequence that was given up may never arrive: the session has to end, or everything behind it would
            # wait for ever.
            self._start_reopening(SessionFenced(reason="a batch was given up", committed=self._oldest()))
            expired = True
        if expired:
            self._notify()

    def _overdue(self, now: float) -> Batch | None:
        """Take the oldest batch that is not sent, when its time is over."""
        try:
            return self.pending.popleft() if self.pending[0].deadline <= now else None
        except IndexError:
            return None

    def _settle(self, batch: Batch, position: int | None, error: CxlmqError | None, *, epoch: int = 0,
                duplicate: bool = False, outcome: str = "") -> None:
        """Let go of a batch; tell who published it, unless that was told when it was sent (level 0)."""
        batch.release()
        self.last_error = error or self.last_error
        with self.account:
            if self.unsettled.pop(batch.number, None) is None:
                return                      # another thread gave it up
            self.held -= batch.nbytes
            self.counts["duplicates"] += duplicate
            if not batch.settled:
                self.counts[outcome or ("acked" if error is None else "failed")] += batch.count
        batch.settle(position, epoch, batch.broker, duplicate, error)

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

    # ---- a session that ended ---------------------------------------------------------------------------------------

    def _start_reopening(self, reason: CxlmqError) -> None:
        if not self.reopening and not self.closed:
            self.reopening = True
            self.loop.create_task(self._reopen(reason))

    async def _reopen(self, reason: CxlmqError) -> None:
        """Open the next epoch, settle what is in the log, and send the rest again, renumbered from 0."""
        self._abandon()
        resume_from, ended = self._oldest(), self.epoch
        while not self.closed:
            try:
                brokers = await self.connection.brokers()
                await self._open_session(brokers, resume_from)
                break
            except CxlmqError as error:
                if not error.comes_back:
                    self._fail_everything(error)
                    return
                await asyncio.sleep(RECONNECT_SECONDS / 5)
                self._expire()
        if self.closed:
            return
        self.counts["reopened"] += 1
        self._resume(resume_from, ended)
        self.reopening = False
        with contextlib.suppress(CxlmqError):       # `_reconnect` comes again
            await self._connect(brokers)
        self._pump()
        self._notify()
        self.next_learning = 0.0            # what is awaited has most often reached its level
        self._tell(reason)

    def _resume(self, resume_from: int, ended: int = 0) -> None:
        """Keep for their level what the ended session has in the log; the rest goes before everything that waits."""
        self._tell_outcomes(self.lost_meanwhile)
        high_water, positions = self.session.high_water, list(self.session.positions)
        left = []
        for sequence, batch in self._take_in_flight():
            at = sequence - resume_from
            position = positions[at] if 0 <= at < len(positions) else UNKNOWN_POSITION
            if position == LOST_POSITION:
                self._settle(batch, None, MessageLost(topic=self.topic))
            elif sequence < high_water or position != UNKNOWN_POSITION:
                self._await_level(batch, None if position >= UNPLACED_POSITION else position, ended, sequence)
            else:
                left.append(batch)
        self.pending.extendleft(reversed(left))

    def _await_level(self, batch: Batch, position: int | None, epoch: int, sequence: int) -> None:
        """A batch is in the log: at level 0 that is all there is to know."""
        if batch.level == 0:
            self._settle(batch, None, None, duplicate=True)
            return
        batch.release()
        self.awaited.add(batch, position, self.session, epoch, sequence)

    async def _learn(self) -> None:
        """Settle what is awaited and has reached its level, or cannot."""
        with contextlib.suppress(CxlmqError):       # come again; what ends the publisher is found on other ways
            topic = await self._describe()
            if topic.run_id != self.session.topic.run_id:   # recovered: the next session says what it still has
                self._start_reopening(SessionFenced(reason="the cluster was recovered", committed=self._oldest()))
            elif self._tell_outcomes(self.awaited.decided(topic)):
                self._notify()

    def _tell_outcomes(self, outcomes: list[Outcome]) -> bool:
        for each in outcomes:
            self._settle(each.batch, each.position, each.error, duplicate=each.error is None)
        return bool(outcomes)

    async def _describe(self) -> pb.Topic:
        """The topic as it is now, from the first broker that answers."""
        error: CxlmqError = BrokerUnavailable(address=f"the brokers of topic {self.topic}")
        for broker in self._awake(await self.connection.brokers()):
            try:
                return await self.connection.unary(broker.target, "Admin/DescribeTopic",
                                                   pb.DescribeTopicRequest(name=self.topic), pb.Topic, ASK_SECONDS)
            except BrokerUnavailable as failed:
                error = failed
        raise error

    def _fail_everything(self, error: CxlmqError) -> None:
        """Nothing more can be published: everything settles with this error, and so does what comes later."""
        self.failure = error
        self.closed = True
        self._give_up()
        self._tell(error)

    def _tell(self, event: CxlmqError) -> None:
        if self.on_event is not None:
            try:
                self.on_event(event)
            except Exception:
                _log.exception("the callback for events failed")

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
        self.pending.clear()
        self.awaited.clear()
        with self.account:
            left = list(self.unsettled.values())
        for batch in left:
            self._settle(batch, None, error)
        self._notify()

    # ---- closing ----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End all ways and the session. What is not settled is given up."""
        self.closed = True
        for task in (self.ticker, self.reconnecting, self.learning, *self.asking.values()):
            if task is not None:
                task.cancel()
        await self._disconnect()
        await self._close_session()
        self._give_up()
        await self.connection.close()

    async def _close_session(self) -> None:
        if not self.session_open:
            return
        self.session_open = False
        request = pb.CloseSessionRequest(client_id=self.client_id, session_slot=self.session.session_slot,
                                         session_epoch=self.session.session_epoch)
        with contextlib.suppress(CxlmqError):       # a session without streams ends by itself
            await self.connection.unary(self.session_target, "Admin/CloseSession", request, pb.CloseSessionResponse,
                                        timeout=CLOSE_SESSION_SECONDS)
