"""Publishers, sync and async: one face over two engines, gRPC and attached."""

import asyncio
import inspect
import numbers
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from broker.config import check_topic_name
from broker.errors import (
    AttachSlotsFull,
    BufferFull,
    ClosedError,
    ConfigError,
    CxlmqError,
    DeliveryTimeout,
    RegionError,
)
from client import unclosed
from client.arguments import WAIT_SECONDS_MAX, as_count
from client.attached import Loan
from client.attached_publisher import AttachedEngine
from client.batch import Delivery
from client.engine import Engine
from client.fork import ForkedEngine, end_in_child, keep
from client.grpc_publisher import PublisherEngine

POLICIES = ("block", "error", "drop_oldest", "drop_newest")
TRANSPORTS = ("auto", "grpc", "attached")
IN_FLIGHT_MAX = 128                     # batches
FRAMING_BYTES_MAX = 16                  # around one message, with its padding


def _check_options(options: dict[str, Any]) -> None:
    """Refuse wrong options before anything is opened; whole numbers of any kind become ints."""
    def one_of(name: str, allowed: tuple[object, ...]) -> None:
        if options[name] not in allowed:
            raise ConfigError(setting=name, value=repr(options[name]), allowed=", ".join(map(str, allowed)))

    def whole(name: str, least: int, most: int = (1 << 63) - 1) -> None:
        if options[name] is not None:
            options[name] = as_count(name, options[name], least, most)

    def number(name: str, allowed: str, fits: Callable[[float], bool]) -> None:
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits(float(value)):
            raise ConfigError(setting=name, value=repr(value), allowed=allowed)
        options[name] = float(value)

    whole("ack", 0, 2)
    for name in ("batch_bytes", "batch_bytes_min", "batch_bytes_max", "buffer_bytes"):
        whole(name, 1)
    whole("in_flight", 1, IN_FLIGHT_MAX)
    whole("client_id", 1, (1 << 64) - 1)
    one_of("when_full", POLICIES)
    one_of("transport", TRANSPORTS)
    one_of("compression", (None, "gzip", "deflate"))
    if options["batch_bytes"] is None and options["batch_bytes_min"] > options["batch_bytes_max"]:
        raise ConfigError(setting="batch_bytes_min", value=options["batch_bytes_min"],
                          allowed=f"at most batch_bytes_max ({options['batch_bytes_max']})")
    number("linger_ms", "0 or more milliseconds", lambda value: 0 <= value <= WAIT_SECONDS_MAX)
    number("delivery_timeout", f"more than 0 seconds, and at most {WAIT_SECONDS_MAX:.0f}: every delivery settles",
           lambda value: 0 < value <= WAIT_SECONDS_MAX)
    for name in ("on_delivery", "on_event"):
        if options[name] is not None and (not callable(options[name]) or inspect.iscoroutinefunction(options[name])):
            raise ConfigError(setting=name, value=repr(options[name]), allowed="None, or a function (no coroutine)")


def _as_rows(rows: Any) -> Any:
    """Rows of messages as they are packed: a 2-D uint8 array; one with gaps is copied. Raises `ConfigError`."""
    import numpy

    found = numpy.asarray(rows)
    if found.dtype != numpy.uint8 or found.ndim != 2 or not len(found):
        raise ConfigError(setting="rows", value=f"an array of {found.dtype} with shape {found.shape}",
                          allowed="a 2-D array of uint8 with at least one row")
    return numpy.ascontiguousarray(found)


class _PublisherBase:
    """What `Publisher` and `AsyncPublisher` share."""

    def __init__(self, topic: str, *, cluster: str | None = None, bootstrap: str | None = None, transport: str = "auto",
                 ack: int | None = None, client_id: int | None = None, batch_bytes: int | None = None,
                 batch_bytes_min: int = 64 << 10, batch_bytes_max: int = 4 << 20, linger_ms: float = 1.0,
                 in_flight: int = 8, buffer_bytes: int | None = None, when_full: str = "block",
                 delivery_timeout: float = 30.0, on_delivery: Callable[[Delivery], None] | None = None,
                 on_event: Callable[[CxlmqError], None] | None = None, compression: str | None = None,
                 security: str | Path | None = None) -> None:
        options: dict[str, Any] = {
            "ack": ack, "client_id": client_id if client_id is not None else secrets.randbits(63) + 1,
            "batch_bytes": batch_bytes, "batch_bytes_min": batch_bytes_min,
            "batch_bytes_max": batch_bytes_max, "linger_ms": linger_ms, "in_flight": in_flight,
            "buffer_bytes": buffer_bytes, "delivery_timeout": delivery_timeout, "compression": compression,
            "when_full": when_full, "on_delivery": on_delivery, "on_event": on_event, "transport": transport}
        check_topic_name(topic)
        _check_options(options)
        del options["transport"]
        options |= {"cluster": cluster, "bootstrap": bootstrap}
        self._topic, self._options, self._security, self._on_delivery = topic, options, security, on_delivery
        # What is compressed goes over a network anyhow.
        self._falls_back = transport == "auto" and compression is None
        self._state = "new"                 # then open, then closed
        self._engine = self._new_engine(AttachedEngine if transport == "attached" or self._falls_back
                                        else PublisherEngine)
        end_in_child(self)

    def after_fork(self) -> None:
        """In a child of the process that opened it. What would be packed there would go where the parent packs."""
        self.__dict__.pop("publish", None)
        if not isinstance(self._engine, ForkedEngine):
            self._engine.after_fork()
            self._engine = cast(Engine, keep(self._engine))

    def _new_engine(self, kind: type[Engine]) -> Engine:
        engine = kind(self._topic, **self._options)
        engine.connection.secured(self._security)
        return engine

    def _may_open(self) -> bool:
        """Whether there is something to open; False when it is open. Raises `ClosedError` once it was closed."""
        if isinstance(self._engine, ForkedEngine):
            _ = self._engine.topic          # which says whose it is
        if self._state == "closed":
            raise ClosedError(what="the publisher")
        if self._state == "new" and self._engine.closed:
            self._engine = self._new_engine(type(self._engine))     # an earlier try failed
        return self._state == "new"

    async def _open_engine(self) -> None:
        """On the client loop. Attaches when it can and may; what stands against it is an error only when asked for."""
        try:
            await self._engine.open()
        except BaseException as error:
            await self._engine.close()
            if not self._falls_back or not isinstance(error, RegionError | AttachSlotsFull):
                raise
            self._engine = self._new_engine(PublisherEngine)
            self._falls_back = False
            await self._open_engine()
            return
        self._state = "open"
        unclosed.note(self._engine)

    async def _undo_opening(self) -> None:
        """On the client loop: whoever opened it did not wait for the end, which may have come all the same."""
        if self._state == "open":
            await self._close_engine()
            self._state = "new"

    async def _close_engine(self) -> None:
        """On the client loop."""
        self._state = "closed"
        if not await unclosed.finished(self._engine):
            await self._engine.close()
            unclosed.forget(self._engine)

    def __del__(self) -> None:
        # Not a ForkedEngine, and not what was never opened: those are not noted.
        engine = self.__dict__.get("_engine")
        if engine is not None:
            unclosed.dropped(engine)

    @property
    def transport(self) -> str:
        """How batches travel: "attached" or "grpc"."""
        return "attached" if isinstance(self._engine, AttachedEngine) else "grpc"

    @property
    def client_id(self) -> int:
        """Identity of this publisher; a later one with the same id takes over its session."""
        return self._engine.session.client_id

    def _noted(self, delivery: Delivery) -> Delivery:
        if self._on_delivery is not None:
            delivery.add_done_callback(self._on_delivery)
        return delivery

    def statistics(self) -> dict[str, int]:
        """Counts so far: messages = acked + failed + dropped_oldest + what is on its way; dropped_newest was not taken.

        Further batches, bytes, duplicates, retries, reopened, batch_bytes_target, buffered_bytes.
        """
        return self._engine.statistics()

    def take_latencies(self) -> Any:
        """Send-to-ack times of the batches settled since the last call: numpy int64, ns."""
        import numpy

        return numpy.array(self._engine.take_latencies(), numpy.int64)


class Publisher(_PublisherBase):
    """Publishes to one topic. `with Publisher("topic") as publisher: publisher.publish(b"...").result()`

    `cluster` names a cluster on this machine, `bootstrap` ("host:port") any broker of one elsewhere. `transport`
    "attached" writes into the region itself, which has to be on this machine; "auto" does so when it is, has a free
    slot, and nothing is to be compressed, and takes "grpc" otherwise. `ack` is the level to wait for (None: the
    topic's). Batches grow from `batch_bytes_min` to `batch_bytes_max` under load (fixed by `batch_bytes`); a
    message waits at most `linger_ms` for company. At most `buffer_bytes` are kept unacknowledged (None: 16 MiB,
    attached 32 MiB); `when_full` says what then: "block", "error", "drop_oldest" or "drop_newest". Every delivery
    settles within `delivery_timeout` seconds. The end of the `with` block, also by an exception, waits so long for what
    was published; a publisher that nobody closes is flushed when the program ends, with a ResourceWarning, and what was
    not delivered is said on stderr. `on_delivery` is called with each settled delivery (of `publish_many`
    and `publish_array`, the last), `on_event` when the session was reopened or the publisher failed; both on the
    library's own thread, where nothing may wait. Raises the typed errors of `client.errors`.
    """

    def open(self) -> "Publisher":
        """Connect and open the session; `with` does it. An open one stays as it is, a closed one is `ClosedError`."""
        if not self._may_open():
            return self
        try:
            self._engine.client_loop.run(self._open_engine())
        except BaseException:
            self._engine.client_loop.submit(self._undo_opening())
            raise
        if self._on_delivery is None:
            # The native method itself: this wrapper would cost as much as packing a small message.
            self.__dict__["publish"] = self._engine.front.append
        return self

    def publish(self, data: Any) -> Delivery:
        """Publish one message (bytes, or anything with the buffer protocol). Does not wait for its ack."""
        delivery = self._engine.front.append(data)
        return delivery if self._on_delivery is None else self._noted(delivery)

    def publish_many(self, messages: Iterable[Any]) -> Delivery:
        """Publish messages; the delivery of the last."""
        return self._noted(self._engine.front.append_many(messages))

    def publish_array(self, rows: Any) -> Delivery:
        """Publish a 2-D uint8 array, one row a message; the delivery of the last."""
        return self._noted(self._engine.front.append_array(_as_rows(rows)))

    def loan(self, nbytes: int) -> "Loan":
        """A writable view of `nbytes` of a segment itself (attached transport only): `with publisher.loan(n) as view:`

        The message is published when the block ends, and given back when it raises; then see the loan's `delivery`.
        """
        if not isinstance(self._engine, AttachedEngine):
            raise ConfigError(setting="transport", value="grpc", allowed="attached, for loans")
        return self._engine.loan(as_count("nbytes", nbytes, 0))

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything published so far is settled. Raises `DeliveryTimeout`."""
        self._engine.flush(timeout)

    def close(self) -> None:
        """Flush, then end the session. In a forked child there is nothing to end: it is the parent's."""
        if isinstance(self._engine, ForkedEngine):
            return
        with unclosed.counted_when_interrupted(self._engine):
            try:
                if self._engine.packer is not None and not self._engine.closed:
                    self._engine.flush(None)
            finally:
                self._end()

    def _end(self) -> None:
        if isinstance(self._engine, ForkedEngine):
            return
        self.__dict__.pop("publish", None)
        self._engine.client_loop.run(self._close_engine())

    def __enter__(self) -> "Publisher":
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Also after an exception: what was published is sent, within its delivery time-out.
        try:
            self.close()
        except CxlmqError as late:
            if error is None:
                raise
            error.add_note(f"what was published before was not all sent: {late}")


class AsyncPublisher(_PublisherBase):
    """As `Publisher`, for coroutines: `async with AsyncPublisher("topic") as publisher: ...`"""

    async def open(self) -> "AsyncPublisher":
        """Connect and open the session; `async with` does it. See `Publisher.open`."""
        if self._may_open():
            try:
                await self._engine.client_loop.call(self._open_engine())
            except BaseException:
                self._engine.client_loop.submit(self._undo_opening())
                raise
        return self

    async def publish(self, data: Any) -> Delivery:
        """Publish one message; waits for room in the buffer, not for the ack. `await` the delivery for its receipt."""
        await self._room(memoryview(data).nbytes)
        return self._noted(self._engine.front.append(data))

    async def publish_many(self, messages: Iterable[Any]) -> Delivery:
        """Publish messages, as room comes; the delivery of the last."""
        delivery: Delivery | None = None
        for data in messages:
            await self._room(memoryview(data).nbytes)
            delivery = self._engine.front.append(data)
        if delivery is None:
            raise ValueError("publish_many needs at least one message")
        return self._noted(delivery)

    async def publish_array(self, rows: Any) -> Delivery:
        """Publish a 2-D uint8 array, one row a message, as room comes; the delivery of the last."""
        rows = _as_rows(rows)
        count = max(1, self._engine.front.target // (rows.shape[1] + FRAMING_BYTES_MAX))
        for first in range(0, len(rows), count):
            await self._room(rows[first:first + count].nbytes)
            delivery = self._engine.front.append_array(rows[first:first + count])
        return self._noted(delivery)

    async def _room(self, nbytes: int) -> None:
        """Wait until packing so much cannot block: it may end the current batch and begin another."""
        engine = self._engine
        if engine.when_full != "block" or not engine.buffered:
            return
        deadline = time.monotonic() + engine.delivery_timeout
        while engine.buffered and not engine.closed and engine.buffered + 2 * max(
                self._engine.front.target, nbytes + FRAMING_BYTES_MAX) > engine.buffer_bytes:
            if time.monotonic() > deadline:
                raise BufferFull(buffer_bytes=engine.buffer_bytes)
            await asyncio.sleep(0.001)

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until everything published so far is settled. Raises `DeliveryTimeout`, `ConfigError`."""
        limit = self._engine.limit(timeout)
        done = self._engine.flushed()
        deadline = time.monotonic() + limit
        while not done():
            if time.monotonic() > deadline:
                raise DeliveryTimeout(timeout_seconds=limit)
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        """As `Publisher.close`; cancelled, it is done all the same, and nobody waits."""
        engine = self._engine
        if isinstance(engine, ForkedEngine):
            return
        try:
            if engine.packer is not None and not engine.closed:
                await self.flush()
        except asyncio.CancelledError:
            self._state = "closed"
            unclosed.go_on(engine)
            raise
        except BaseException:
            await engine.client_loop.call(self._close_engine())
            raise
        await engine.client_loop.call(self._close_engine())

    async def __aenter__(self) -> "AsyncPublisher":
        return await self.open()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            await self.close()
        except CxlmqError as late:
            if error is None:
                raise
            error.add_note(f"what was published before was not all sent: {late}")


__all__ = ["AsyncPublisher", "Publisher"]
