"""The Admin service of a broker: topics, sessions, and the slots of attached clients."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from broker.calls import unary_handlers
from broker.config import TopicConfig, check_ack
from broker.errors import (
    CxlmqError,
    DeletionNotDurable,
    DuplicateTopic,
    NotAllowed,
    TopicNotDurable,
    UnknownTopic,
)
from broker.head_calls import HeadCalls
from broker.holders import Holders, holders_of
from broker.proto import cxlmq_pb2 as pb
from broker.rights import METHODS
from broker.security import CALLER
from broker.topics import TopicEntry

if TYPE_CHECKING:
    from broker.server import BrokerServer


def _altered(request: Any, entry: TopicEntry) -> TopicConfig:
    """A topic's options as a request wants them. Raises `BadTopicOptions`."""
    if request.HasField("ack"):
        check_ack(entry.name, request.ack, entry.replication_factor)
    config, _ = TopicConfig(
        name=entry.name, order=entry.order, replication_factor=entry.replication_factor,
        ack=request.ack if request.HasField("ack") else entry.ack,
        retention_bytes=request.retention_bytes if request.HasField("retention_bytes") else entry.retention_bytes,
    ).validate(None)
    return config


class AdminService:
    """Topics and sessions. What only the head may do is passed on to it."""

    def __init__(self, server: "BrokerServer") -> None:
        self._server = server
        self._node = server.node
        self._head_calls = HeadCalls(server.node, server.guard.own_metadata)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Methods of cxlmq.v1.Admin."""
        return unary_handlers(self._server.guard, "Admin", {
            "CreateTopic": (self.create_topic, pb.CreateTopicRequest, pb.Topic),
            "AlterTopic": (self.alter_topic, pb.AlterTopicRequest, pb.Topic),
            "DeleteTopic": (self.delete_topic, pb.DeleteTopicRequest, pb.DeleteTopicResponse),
            "ListTopics": (self.list_topics, pb.ListTopicsRequest, pb.ListTopicsResponse),
            "DescribeTopic": (self.describe_topic, pb.DescribeTopicRequest, pb.Topic),
            "OpenSession": (self.open_session, pb.OpenSessionRequest, pb.Session),
            "CloseSession": (self.close_session, pb.CloseSessionRequest, pb.CloseSessionResponse),
            "AttachPublisher": (self.attach_publisher, pb.AttachPublisherRequest, pb.Attachment),
            "AttachSubscriber": (self.attach_subscriber, pb.AttachSubscriberRequest, pb.Attachment),
            "Detach": (self.detach, pb.DetachRequest, pb.DetachResponse),
        })

    async def forward(self, method: str, request: Any, reply: Any, context: Any,
                      done: type[CxlmqError] | None = None) -> Any:
        """Call a method at the head; its error comes through as it is. See `HeadCalls.call`."""
        try:
            return await self._head_calls.call(method, request, reply, done)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details(), tuple(error.trailing_metadata() or ()))

    async def close(self) -> None:
        """Close the channels to heads."""
        await self._head_calls.close()

    async def create_topic(self, request: Any, context: Any) -> pb.Topic:
        count = self._node.layout.numbers["broker_count"]
        config, _ = TopicConfig(
            name=request.name, order=request.order, ack=request.ack, replication_factor=request.replication_factor,
            retention_bytes=request.retention_bytes).validate(count)
        if not self._node.is_head:
            made = await self.forward("Admin/CreateTopic", request, pb.Topic, context, DuplicateTopic)
            return made if made.name else self._made_before(config)
        lease_ns = int(self._node.config.session_lease_seconds * 1e9)
        return self._describe(await self._node.topics.create(config, lease_ns, self._node.live_brokers, self._written))

    @contextlib.asynccontextmanager
    async def _written(self, entry: TopicEntry) -> AsyncIterator[None]:
        """A topic is made while this disk knows of it: what is not, is not written down. Raises `TopicNotDurable`."""
        folder = self._node.replica_folder
        writing = asyncio.ensure_future(asyncio.to_thread(folder.announce, entry))
        try:
            await asyncio.shield(writing)
            yield
        except BaseException as error:
            await asyncio.wait({writing})       # the thread goes on, whoever went away
            await asyncio.to_thread(folder.retract, entry)
            if error is writing.exception() and isinstance(error, OSError):
                raise TopicNotDurable(
                    f"topic {entry.name} is not created: the data directory cannot be written "
                    f"({error.strerror or error}); make room there and create it again",
                    topic=entry.name, reason=error.strerror or str(error)) from error
            raise

    def _made_before(self, config: TopicConfig) -> pb.Topic:
        """The topic that a try made whose answer was lost. Raises `DuplicateTopic` when it is another one."""
        entry = self._node.topics.find(config.name)
        if any(getattr(entry, name) != getattr(config, name) for name in (
                "order", "ack", "replication_factor", "retention_bytes")):
            raise DuplicateTopic(topic=config.name)
        return self._describe(entry)

    async def alter_topic(self, request: Any, context: Any) -> pb.Topic:
        """Change what can be changed while a topic is in use."""
        changed = partial(_altered, request)
        changed(self._node.topics.find(request.name))
        if not self._node.is_head:
            return await self.forward("Admin/AlterTopic", request, pb.Topic, context)
        entry = await self._node.topics.alter(request.name, changed)
        try:
            await asyncio.to_thread(self._node.replica_folder.topic_altered, entry)
        except OSError as error:
            raise TopicNotDurable(topic=entry.name, reason=error.strerror or str(error)) from error
        return self._describe(entry)

    async def delete_topic(self, request: Any, context: Any) -> pb.DeleteTopicResponse:
        entry = self._node.topics.find(request.name)
        if not self._node.is_head:
            return await self.forward("Admin/DeleteTopic", request, pb.DeleteTopicResponse, context, UnknownTopic)
        try:
            await self._node.topics.delete(request.name, self._node.live_brokers)
            # What is answered outlives the memory, also where a broker is away.
            await asyncio.to_thread(self._node.replica_folder.say_deleted, entry.name, entry.created_ns)
        except OSError as error:
            raise DeletionNotDurable(topic=entry.name, reason=error.strerror or str(error)) from error
        finally:                            # also when the caller goes away
            await self._server.groups.forget_deleted()
        return pb.DeleteTopicResponse()

    async def list_topics(self, request: Any, context: Any) -> pb.ListTopicsResponse:
        seen = METHODS["Admin/ListTopics"].seen(CALLER.get(), self._node.topics.entries())
        holders = holders_of(self._node.head, self._node.layout)
        return pb.ListTopicsResponse(topics=[self._describe(entry, holders) for entry in seen])

    async def describe_topic(self, request: Any, context: Any) -> pb.Topic:
        return self._describe(self._node.topics.find(request.name))

    def _describe(self, entry: TopicEntry, holders: Holders | None = None) -> pb.Topic:
        holders = holders or holders_of(self._node.head, self._node.layout)
        topic = self._node.session_service.levels(entry)
        topic.MergeFrom(pb.Topic(
            name=entry.name, order=entry.order, ack=entry.ack, replication_factor=entry.replication_factor,
            retention_bytes=entry.retention_bytes, number=entry.number, generation=entry.generation,
            created_ns=entry.created_ns, holder=holders.of(entry.number).text,
            degraded=self._node.topics.degraded(entry)))
        return topic

    async def open_session(self, request: Any, context: Any) -> pb.Session:
        return await self._node.session_service.open(request)

    async def close_session(self, request: Any, context: Any) -> pb.CloseSessionResponse:
        rights = METHODS["Admin/CloseSession"].rights
        await self._node.session_service.close(request, lambda topic: CALLER.get().require(rights, topic.name))
        return pb.CloseSessionResponse()

    async def attach_publisher(self, request: Any, context: Any) -> pb.Attachment:
        return self._node.session_service.attach(request, CALLER.get().number)

    async def attach_subscriber(self, request: Any, context: Any) -> pb.Attachment:
        attachment: pb.Attachment = await self._node.reading_service.attach(request, CALLER.get().number)
        attachment.region = self._node.region.name
        return attachment

    async def detach(self, request: Any, context: Any) -> pb.DetachResponse:
        caller = CALLER.get()
        owner = self._node.attach.owner_of(request.slot, request.generation)
        if owner is not None and owner != caller.number:
            raise NotAllowed("this slot belongs to another principal: only who attached may detach", topic="",
                             principal=caller.name, right="detach")
        clients = self._node.attached_clients
        clients.close(request.slot, request.generation)
        while clients.is_ending(request.slot, request.generation):
            await asyncio.sleep(0.001)
            clients.end_cursors()
        return pb.DetachResponse()
