"""Where the brokers are, and the background event loop on which this process talks to them."""

from broker.grpc_options import apply_process_tuning

apply_process_tuning()                  # before the first import of grpc

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Callable, Coroutine
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from broker.config import check_cluster_name, check_socket, default_name, load_config
from broker.errors import (
    BrokerUnavailable,
    ConfigError,
    CxlmqError,
    RegionMissing,
    Unauthenticated,
    from_metadata,
)
from broker.grpc_options import channel_options
from broker.layout import BrokerState
from broker.proto import cxlmq_pb2 as pb
from broker.records import unpack
from broker.region import attach_region, presence_at_region
from broker.security import Security
from client.brokers import BrokerAddress
from client.fork import end_in_child, is_child, note_use, parents_client, refuse_in_child
from sim.cxl.locks import Presence
from sim.cxl.region import memory_identity

T = TypeVar("T")
Identity = tuple[grpc.ChannelCredentials, tuple[tuple[str, str], ...]]
CALL_SECONDS = 30.0
END_SECONDS = 5.0                       # what was given up has ended by then, or is waited for no longer
MESSAGE_LIMIT = (1 << 30) + (1 << 21)


_ADDRESS = re.compile(r"unix:.+|\S+:\d{1,5}")


class ClientLoop:
    """One event loop in a daemon thread, for all clients of this process."""

    _lock = threading.Lock()
    _current: "ClientLoop | None" = None

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="cxlmq-client", daemon=True)
        self.thread.start()
        note_use(self, self.loop)
        end_in_child(self)

    def after_fork(self) -> None:
        """In a child. One that was forked in a callback must not go on with the parent's connections."""
        if threading.current_thread() is self.thread:
            self.loop.stop()

    @classmethod
    def get(cls) -> "ClientLoop":
        """The loop of this process. Raises `ForkedProcess` in a forked child of a process that has one."""
        refuse_in_child()               # also: another thread may have held the lock
        with cls._lock:
            if cls._current is None:
                cls._current = cls()
            return cls._current

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine there; its future. Raises `ForkedProcess` in a forked child, where that thread is not."""
        self._check_process(coroutine)
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine there and wait for its result. Not from a callback: that runs there itself.

        When the wait is given up, the coroutine is cancelled and has ended when this raises.
        """
        if threading.current_thread() is self.thread:
            coroutine.close()
            raise RuntimeError("this waits for the library's own thread, and was called on it (in a callback?)")
        job = self._start(coroutine)
        try:
            return job.ended.result(timeout)
        except (TimeoutError, KeyboardInterrupt):
            job.cancel()
            futures.wait((job.ended,), END_SECONDS)
            raise

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there from a coroutine of another loop. Cancelled, it has ended there when this raises.

        Else what was given up would still do something while the caller does the next thing.
        """
        job = self._start(coroutine)
        waiter = asyncio.wrap_future(job.ended)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            job.cancel()
            waiter.add_done_callback(lambda done: done.cancelled() or done.exception())     # it is given up
            await asyncio.wait((waiter,), timeout=END_SECONDS)
            raise

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> "_Job[T]":
        self._check_process(coroutine)
        return _Job(self.loop, coroutine)

    def _check_process(self, coroutine: Coroutine[Any, Any, T]) -> None:
        if is_child():
            coroutine.close()
            raise parents_client()


class _Job(Generic[T]):
    """A coroutine on the client loop for somebody in another thread, who knows when it has ended, cancelled or not."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> None:
        self.ended: Future[T] = Future()
        self.ended.set_running_or_notify_cancel()       # it cannot be cancelled behind the task's back
        self._loop, self._coroutine = loop, coroutine
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._coroutine)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(task.result())

    def cancel(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())


async def answered(call: Coroutine[Any, Any, T]) -> tuple[T, asyncio.CancelledError | None]:
    """A call's answer, also when we are cancelled before it comes; then the cancellation, which the caller raises."""
    task, cancelled = asyncio.get_running_loop().create_task(call), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    return task.result(), cancelled


# What gRPC says when a TLS handshake fails, or a server that wants one hangs up on clear text.
_TLS_SIGNS = ("ssl", "certificate", "handshake", "tls")


class _Introduced:
    """A channel whose every call says who we are."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata
        self.close = channel.close

    def __getattr__(self, kind: str) -> Any:
        """unary_unary, unary_stream, stream_stream: as the channel's, with our metadata in each call."""
        make = getattr(self._channel, kind)
        return lambda *args, **options: partial(make(*args, **options), metadata=self._metadata)


def translated(error: grpc.aio.AioRpcError, address: str = "") -> CxlmqError:
    """The typed error that a failed call stands for."""
    message = error.details() or str(error.code())
    found = from_metadata(error.code().name, message, tuple(error.trailing_metadata() or ()))
    if isinstance(found, BrokerUnavailable) and "address" not in found.details:
        if any(sign in message.lower() for sign in _TLS_SIGNS):
            return Unauthenticated(reason=f"no TLS connection to {address or 'the broker'} came about: the cluster "
                                          "has security and we have none, or our certificates are of another CA")
        if address and not address.startswith("unix:"):
            return BrokerUnavailable(f"no broker answers at {address}: is the cluster up, and does it want security "
                                     "(security=DIR, --security DIR or CXLMQ_SECURITY)?", address=address)
        return BrokerUnavailable(address=address or "the cluster")
    return found


def addresses_of_region(cluster: str) -> tuple[list[BrokerAddress], int]:
    """The live brokers of a cluster on this machine, and how many it has in all, read from its region.

    Raises `RegionMissing`.
    """
    with attach_region(cluster, writable=False) as region:
        memory, layout = region.memory(), region.layout
        found = []
        broker_count = layout.numbers["broker_count"]
        for broker in range(broker_count):
            line = unpack("BrokerLine", memory.read_line_bytes(layout.offset_of("broker", broker)))
            if line["state"] != BrokerState.BROKER_READY or not region.broker_lives(broker):
                continue
            address = unpack("BrokerAddress", memory.read_bytes(layout.offset_of("broker_address", broker), 256))
            found.append(BrokerAddress(broker, address["unix_address"] or address["tcp_address"]))
        del memory
    if not found:
        raise RegionMissing(f"cluster {cluster} has no live broker: start it with `cxlmq cluster up`", region=cluster)
    return found, broker_count


class Connection:
    """Channels to a cluster's brokers, opened when first used. All methods run on the client loop.

    `cluster` names a cluster on this machine (None: as the command does, CXLMQ_NAME or "default"); `bootstrap`
    ("host:port", "unix:/path") is any broker of one. Raises `ConfigError`.
    """

    def __init__(self, cluster: str | None, bootstrap: str | None) -> None:
        if cluster is not None:
            check_cluster_name(cluster)
        if bootstrap is not None and (not isinstance(bootstrap, str) or not _ADDRESS.fullmatch(bootstrap)):
            raise ConfigError(setting="bootstrap", value=repr(bootstrap),
                              allowed="HOST:PORT, or unix:/PATH of a socket")
        self.cluster = default_name() if cluster is None and bootstrap is None else cluster
        self.bootstrap = bootstrap
        self._channels: dict[str, Any] = {}
        self._undoing: set[asyncio.Task[None]] = set()
        self._identity: Identity | None = None
        self.description: pb.ClusterDescription | None = None
        self.broker_count = 0                       # those that are not live now as well

    def secured(self, path: str | Path | None) -> "Connection":
        """Use this certificate and token (None: those of CXLMQ_SECURITY, if any). Raises `ConfigError`."""
        path = load_config(security=path).security
        if path is not None:
            security = Security.load(path)
            credentials = grpc.ssl_channel_credentials(
                security.ca.read_bytes(), security.key.read_bytes(), security.certificate.read_bytes())
            self._identity = credentials, security.own_metadata()
        return self

    def channel(self, target: str) -> Any:
        """The channel to an address. With security, TLS for all but unix sockets: a token goes nowhere in the clear.

        Raises `PermissionDenied` for a socket that is another user's: he would get our token, and our messages.
        """
        if target not in self._channels:
            if target.startswith("unix:"):
                check_socket(target)
            options = channel_options(MESSAGE_LIMIT)
            if self._identity is None:
                channel: Any = grpc.aio.insecure_channel(target, options=options)
            else:
                credentials, metadata = self._identity
                channel = _Introduced(
                    grpc.aio.insecure_channel(target, options=options) if target.startswith("unix:")
                    else grpc.aio.secure_channel(target, credentials, options=options), metadata)
            self._channels[target] = channel
        return self._channels[target]

    async def brokers(self) -> list[BrokerAddress]:
        """The live brokers, asked anew. Raises `BrokerUnavailable`, `RegionMissing`."""
        if self.bootstrap is None:
            live, self.broker_count = addresses_of_region(str(self.cluster))
            return live
        known = [self.bootstrap]
        if self.description is not None:
            known += [self._as_reached(each.tcp_address) for each in self.description.brokers]
        error: CxlmqError | None = None
        for target in dict.fromkeys(known):
            try:
                self.description = await self.unary(
                    target, "Cluster/Describe", pb.DescribeClusterRequest(), pb.ClusterDescription, timeout=5.0)
                break
            except CxlmqError as failed:
                error = failed
        else:
            raise error or BrokerUnavailable(address=self.bootstrap)
        self.broker_count = len(self.description.brokers)
        here = self.description.host == memory_identity()
        return [BrokerAddress(each.id, each.unix_address if here and _reachable(each.unix_address)
                              and not self._wants_tcp() else self._as_reached(each.tcp_address))
                for each in self.description.brokers if each.state == "ready"]

    async def check_host(self) -> None:
        """Raise `RegionMissing` unless the cluster's region is on this machine."""
        if self.bootstrap is None:
            return                          # found by its region
        await self.brokers()
        assert self.description is not None
        if self.description.host != memory_identity():
            raise RegionMissing(f"the region of the cluster at {self.bootstrap} is on another machine: attaching is "
                                'for clients beside it; use transport="grpc"', region=self.bootstrap)

    async def presence(self) -> Presence:
        """This process's lock on the cluster's region, to be held while attached. Raises `RegionMissing`."""
        if self.bootstrap is not None and self.description is None:
            await self.brokers()
        return presence_at_region((self.cluster or "default") if self.description is None else self.description.name)

    def _wants_tcp(self) -> bool:
        return self.bootstrap is not None and not self.bootstrap.startswith("unix:")

    def _as_reached(self, address: str) -> str:
        """A broker's address from here: one that listens everywhere is where the one is that we know."""
        host, _, port = address.rpartition(":")
        if self.bootstrap is None or host.strip("[]") not in ("0.0.0.0", "::"):
            return address
        return f"{self.bootstrap.rpartition(':')[0]}:{port}"

    async def unary(self, target: str, method: str, request: Any, reply: Any, timeout: float = CALL_SECONDS) -> Any:
        """Call a method at one broker; typed errors."""
        call = self.channel(target).unary_unary(
            f"/cxlmq.v1.{method}", request.__class__.SerializeToString, reply.FromString)
        try:
            return await call(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise BrokerUnavailable(f"{target} did not answer {method} within {timeout:g} s: is it stopped or "
                                        "overloaded (`cxlmq cluster status`)?", address=target, silent=True) from None
            failure = translated(error, target)
            if "failed to connect" in (error.details() or ""):
                failure.details["unsent"] = True
            raise failure from None

    async def is_silent(self, target: str, seconds: float) -> bool:
        """Whether a broker says nothing at all: its process stands still. One that is gone is not silent."""
        try:
            await self.unary(target, "Cluster/Describe", pb.DescribeClusterRequest(), pb.ClusterDescription, seconds)
        except BrokerUnavailable as error:
            return "silent" in error.details
        except CxlmqError:
            pass
        return False

    async def any(self, method: str, request: Any, reply: Any, timeout: float = CALL_SECONDS,
                  done: tuple[type[CxlmqError], ...] = ()) -> Any:
        """Call a method at any broker that answers.

        `done` are errors that say, when a broker was asked before and its answer did not come, that it has done it all
        the same: the reply is empty then.
        """
        error: CxlmqError = BrokerUnavailable(address=self.bootstrap or f"cluster {self.cluster}")
        asked = False
        for broker in await self.brokers():
            try:
                return await self.unary(broker.target, method, request, reply, timeout)
            except BrokerUnavailable as failed:
                error, asked = failed, asked or "unsent" not in failed.details
            except done:
                if not asked:
                    raise
                return reply()
        raise error

    async def undoable(self, call: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, object]]) -> T:
        """Await a call whose effect is undone when we are cancelled before its answer comes.

        The call itself is not cancelled: nobody would know then what of it was done.
        """
        task = asyncio.get_running_loop().create_task(call)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            undoing = asyncio.get_running_loop().create_task(self._undo(task, undo))
            self._undoing.add(undoing)
            undoing.add_done_callback(self._undoing.discard)
            await asyncio.wait((undoing,), timeout=END_SECONDS / 2)
            raise

    @staticmethod
    async def _undo(task: "asyncio.Task[T]", undo: Callable[[T], Coroutine[Any, Any, object]]) -> None:
        with contextlib.suppress(CxlmqError):           # it was refused, or nobody answers: leases end by themselves
            await undo(await task)

    async def close(self) -> None:
        """Close all channels, when what is being undone is done."""
        if self._undoing:
            await asyncio.wait(self._undoing, timeout=END_SECONDS / 2)
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()


def _reachable(unix_address: str) -> bool:
    return bool(unix_address) and os.path.exists(unix_address.removeprefix("unix:"))
