"""The gRPC adapter of a broker: turns calls into receiver, admin and reader steps, and errors into statuses."""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from broker.admin_service import AdminService
from broker.calls import Doorkeeper, errors_as_statuses, introduce, parsed, unary_handlers
from broker.config import host_and_port
from broker.errors import (
    BrokerUnavailable,
    PoolFull,
    PortTaken,
)
from broker.group_service import RECOVERY_FILE, GroupService
from broker.grpc_options import PROCESS_AGENT, server_options
from broker.head import control_word, epoch_of, head_of
from broker.holders import who_stops, why_full
from broker.layout import BrokerState
from broker.listening import why_not_bound
from broker.proto import cxlmq_pb2 as pb
from broker.publish_stream import PublishStream
from broker.reader import OrderReader, ReadError
from broker.removals import Removals
from broker.rights import METHODS, may_see
from broker.security import Guard
from broker.topics import TopicEntry
from sim.cxl.region import memory_identity

_log = logging.getLogger("cxlmq")

if TYPE_CHECKING:
    from broker.node import BrokerNode

SERVICES = ("cxlmq.v1.PubSub", "cxlmq.v1.Admin", "cxlmq.v1.Groups", "cxlmq.v1.Cluster")
FRAME_BYTES = 1 << 20
CLOSE_SECONDS = 5.0
# What all streams of a broker may be receiving at once: gRPC holds a message several times while it is put together.
RECEIVING_BYTES_MAX = 24 << 20
# A stream that has its turn may have nothing to send: the others wait no longer than this.
RECEIVING_WAIT_SECONDS = 0.1
LOOK_SECONDS = 0.4


@dataclass(eq=False)
class Place:
    """Where a subscriber reads; its cursor is None when it was passed over."""

    cursor: int | None
    reader: OrderReader


def _process_of(context: Any) -> tuple[int, int]:
    """The process that a subscriber says it is, for people; without a start time: it may be on another machine."""
    agent = str(dict(context.invocation_metadata() or ()).get("user-agent", ""))
    said = re.match(PROCESS_AGENT + r"/(\d{1,18})\b", agent)
    return int(said[1]) if said else 0, 0


class BrokerServer:
    """All services of one broker."""

    def __init__(self, node: "BrokerNode") -> None:
        self.node = node
        self.guard = Guard(node.config.security)
        self.guard.check()
        self.sessions, self.cursors = node.sessions, node.cursors
        self.publish_streams: dict[int, PublishStream] = {}
        self.streams_beginning = 0
        self._commit_events: dict[int, set[asyncio.Event]] = {}
        self._places = set[Place]()
        self._receiving_bytes = 0
        self._receiving_free = asyncio.Condition()
        self._health = HealthServicer()
        self._stopping = asyncio.Event()
        self._caretaker: asyncio.Task[None] | None = None
        numbers = node.layout.numbers
        self.message_limit = max(numbers["batch_bytes_max"], numbers["message_bytes_max"]) + FRAME_BYTES
        self._server = grpc.aio.server(options=server_options(self.message_limit),
                                       interceptors=[Doorkeeper(self.guard)] if self.guard.security else None)
        self._admin = AdminService(self)
        self.groups = GroupService(self, self._admin.forward)
        self._add_services()

    def _add_services(self) -> None:
        services = {
            "PubSub": {"Publish": grpc.stream_stream_rpc_method_handler(self._publish),
                       "Subscribe": grpc.unary_stream_rpc_method_handler(self._subscribe)},
            "Admin": self._admin.handlers(), "Groups": self.groups.handlers(),
            "Cluster": unary_handlers(self.guard, "Cluster", {
                "Describe": (self._describe_cluster, pb.DescribeClusterRequest, pb.ClusterDescription)}),
        }
        assert {f"{service}/{name}" for service, handlers in services.items() for name in handlers} == METHODS.keys()
        self._server.add_generic_rpc_handlers(tuple(
            grpc.method_handlers_generic_handler(f"cxlmq.v1.{service}", handlers)
            for service, handlers in services.items()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._server)

    # ---- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> tuple[str, str]:
        """Listen; the TCP and the unix address. Raises `PortTaken`."""
        config = self.node.config
        if self.node.is_head:
            self.groups.restore(config.folder / RECOVERY_FILE)
        port = config.listen_port + self.node.broker if config.listen_port else 0
        previous = self.node.broker_line(self.node.broker)["tcp_address"].rpartition(":")[2]
        if not port and previous:           # an earlier process of this broker: clients know it by this address
            with contextlib.suppress(PortTaken):
                return await self._listen(int(previous))
        return await self._listen(port)

    async def _listen(self, port: int) -> tuple[str, str]:
        config = self.node.config
        wanted = host_and_port(config.listen_host, port)
        unix = f"unix:{config.folder / f'broker-{self.node.broker}.sock'}"
        try:
            bound = self._server.add_secure_port(wanted, credentials) if (
                credentials := self._credentials()) else self._server.add_insecure_port(wanted)
            self._server.add_insecure_port(unix)
        except RuntimeError:
            raise why_not_bound(config.listen_host, port) from None
        await self._server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        asyncio.get_running_loop().add_reader(self.node.notifier.fd, self._notified)
        self._caretaker = asyncio.create_task(self._look_after())
        return host_and_port(config.listen_host, bound), unix

    def _credentials(self) -> Any:
        """TLS that asks the caller for a certificate of our CA; None while security is off."""
        security = self.guard.security
        return security and grpc.ssl_server_credentials(
            [(security.key.read_bytes(), security.certificate.read_bytes())], security.ca.read_bytes(),
            require_client_auth=True)

    async def stop(self) -> None:
        """Refuse new calls, let the running ones end, then cancel them."""
        if self._caretaker is not None:
            self._caretaker.cancel()
        await self._health.enter_graceful_shutdown()
        self._stopping.set()
        for events in self._commit_events.values():
            for event in events:
                event.set()
        await self._server.stop(grace=0.2)
        await self._admin.close()
        asyncio.get_running_loop().remove_reader(self.node.notifier.fd)

    async def _look_after(self) -> None:
        """What nobody else would notice: deleted topics whose streams are idle, sessions whose publisher is gone."""
        seen = -1
        removals = Removals(self.node)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with contextlib.suppress(BrokerUnavailable):        # a new head is taking over: next time
                if seen != (now := self.node.topics.version()):
                    self._tell_of_deletions()
                    await self._write_down_alterations()
                    seen = now
                await self.sessions.end_idle(self.node.config.session_lease_seconds)
                if self.node.is_head:
                    await self.node.topics.complete_deletions(self.node.live_brokers)
                self._let_go_of_lost()
                await self.groups.look_after()
                await removals.look_after()

    async def _write_down_alterations(self) -> None:
        """Every broker's disk says what topics promise: the head's alone could go with it."""
        try:
            for entry in self.node.topics.entries():
                if entry.alteration:
                    await asyncio.to_thread(self.node.replica_folder.topic_altered, entry)
        except OSError as error:            # its restart writes them as they are then
            _log.error("what topics promise cannot be written: %s", error)

    def raise_if_failed(self) -> None:
        """Raise what ended the looking after: a broker without it would fill up in silence."""
        if self._caretaker is not None and self._caretaker.done():
            self._caretaker.result()

    def _tell_of_deletions(self) -> None:
        for stream in self.publish_streams.values():
            if stream.entry is not None and not self.node.topics.is_open(stream.entry):
                stream.topic_is_gone()
        for events in self._commit_events.values():
            for event in events:
                event.set()                 # its reader looks, and finds the topic closed

    def _notified(self) -> None:
        """A stage has news: acks of some stream, commits of some topic."""
        self.node.notifier.arm()
        for stream in self.publish_streams.values():
            stream.wake()
        for topic in self.node.watch.take_fired():
            for event in self._commit_events.get(topic, ()):
                event.set()

    # ---- what the services share ------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def receiving(self, nbytes: int) -> AsyncIterator[None]:
        """Bounds what is being received at once: a stream waits its turn, for a while, when others take large batches.

        Whether a stream that has its turn receives anything, or is idle, nobody can tell: hence the while.
        """
        if nbytes < FRAME_BYTES * 2:
            yield
            return
        async with self._receiving_free:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECEIVING_WAIT_SECONDS):
                    await self._receiving_free.wait_for(
                        lambda: self._receiving_bytes == 0 or self._receiving_bytes + nbytes <= RECEIVING_BYTES_MAX)
        self._receiving_bytes += nbytes
        try:
            yield
        finally:
            self._receiving_bytes -= nbytes
            async with self._receiving_free:
                self._receiving_free.notify_all()

    def epoch(self) -> int:
        """The sequencer's epoch."""
        return epoch_of(control_word(self.node.memory, self.node.layout))

    def head(self) -> int:
        """The broker that is head, or becomes it."""
        return head_of(control_word(self.node.memory, self.node.layout))

    def why_full(self, topic: int) -> PoolFull:
        """Why this broker gives a topic no segment."""
        return why_full(self.node.head, self.node.layout, self.node.broker, topic, may_see)

    def who_stops(self, topic: int) -> str:
        """Why a topic takes no batch although there are segments, and what helps."""
        return who_stops(self.node.head, self.node.layout, topic, may_see)

    # ---- publish ----------------------------------------------------------------------------------------------------

    async def _publish(self, _: Any, context: Any) -> None:
        async with errors_as_statuses(context):
            introduce(self.guard, context)
            await PublishStream(self, context).run()

    # ---- subscribe --------------------------------------------------------------------------------------------------

    async def _subscribe(self, data: bytes, context: Any) -> None:
        async with errors_as_statuses(context):
            caller = introduce(self.guard, context)
            request = parsed(pb.SubscribeRequest, data)
            METHODS["PubSub/Subscribe"].check(caller, request)
            try:
                await self._deliver(request, context)
            except ReadError as error:
                raise self.node.reading_service.read_error(request, error) from error

    async def _deliver(self, request: Any, context: Any) -> None:
        node = self.node
        entry = self.topic_seen(request)
        place = Place(*await node.reading_service.place(request, entry, _process_of(context), copies=True))
        reader = place.reader
        self._places.add(place)
        node.watch_commits(+1)
        event = asyncio.Event()
        self._commit_events.setdefault(entry.number, set()).add(event)
        try:
            told = node.reading_service.described(entry, reader)
            await context.send_initial_metadata((
                ("cxlmq-position", str(told.position)), ("cxlmq-first-position", str(told.first_position)),
                ("cxlmq-end-position", str(told.end_position)), ("cxlmq-run-id", str(told.run_id)),
                ("cxlmq-created-ns", str(told.created_ns))))
            await self._follow(request, context, reader, place, event)
        finally:
            self._commit_events[entry.number].discard(event)
            node.watch_commits(-1)
            self._places.discard(place)
            self._let_go(place)

    def _let_go(self, place: "Place") -> None:
        if place.cursor is not None:
            self.cursors.close(place.cursor)
            place.cursor = None

    def _let_go_of_lost(self) -> None:
        """Readers that were passed over, and stand still: they learn of it when they read on, and need no place now."""
        for place in self._places:
            if place.reader.index < place.reader.frontiers()["reclaimed_index"]:
                self._let_go(place)

    def topic_seen(self, request: Any) -> TopicEntry:
        """The topic that a request is about. Raises as `TopicTable.find_seen`."""
        return self.node.reading_service.topic_of(request)

    async def _follow(self, request: Any, context: Any, reader: OrderReader, place: "Place",
                      event: asyncio.Event) -> None:
        """Send what is there, wait for what comes, until the reader goes."""
        frame_bytes = min(request.frame_bytes or FRAME_BYTES, self.message_limit - FRAME_BYTES)
        while not self._stopping.is_set():
            frame = reader.read_frame(frame_bytes)
            if frame:
                await context.write(frame)
                if place.cursor is not None:
                    self.cursors.move(place.cursor, reader.index)
                self.node.log.note_delivered(len(frame))
                del frame
                continue
            event.clear()
            self.node.watch.want(reader.topic)
            if not reader.has_news():
                await event.wait()
        raise BrokerUnavailable("this broker is shutting down: subscribe at another one", address="")

    # ---- cluster ----------------------------------------------------------------------------------------------------

    async def _describe_cluster(self, request: Any, context: Any) -> pb.ClusterDescription:
        node, numbers, now = self.node, self.node.layout.numbers, self.node.clock.now()
        live = set(node.live_brokers())
        brokers = []
        for broker in range(numbers["broker_count"]):
            line = node.broker_line(broker)
            state = BrokerState(line["state"]).name.removeprefix("BROKER_").lower()
            if state == "ready" and broker not in live:
                state = "dead"
            brokers.append(pb.BrokerDescription(
                id=broker, state=state, tcp_address=line["tcp_address"], unix_address=line["unix_address"],
                pid=line["pid"], heartbeat_age_ms=max(0, now - line["heartbeat_ns"]) // 1_000_000))
        return pb.ClusterDescription(
            name=node.config.name, epoch=self.epoch(), head=self.head(), region_bytes=numbers["region_bytes"],
            message_bytes_max=numbers["message_bytes_max"], batch_bytes_max=numbers["batch_bytes_max"],
            brokers=brokers, host=memory_identity(), run_id=node.region.run_id)
