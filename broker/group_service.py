"""The Groups service of a broker: what changes a group is passed on to the head, what looks at one is answered here."""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from broker.calls import unary_handlers
from broker.config import check_group_name
from broker.durable_files import write_whole
from broker.errors import (
    BadRequest,
    CommitRefused,
    GroupFenced,
    GroupNotDurable,
    PositionLost,
    UnknownGroup,
)
from broker.group_files import GroupFiles, GroupRecord
from broker.groups import Group, GroupTable, topic_key
from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader
from broker.reading_service import start_index, time_index
from broker.records import HOLDER_BYTES, fitted
from broker.rights import METHODS
from broker.security import CALLER
from broker.topics import TopicEntry
from broker.unread import lost_from

if TYPE_CHECKING:
    from broker.server import BrokerServer

_log = logging.getLogger("cxlmq")

RECOVERY_FILE = "recovery.json"         # in the cluster's folder: what was recovered, and what was not


def start_place(request: Any, reader: OrderReader, at_time: int) -> tuple[int, int]:
    """(position, index) that a request with a start means, for a group. Raises `CommitRefused`, `PositionLost`."""
    index = start_index(request, reader, at_time)
    if request.WhichOneof("start") != "position":
        return reader.position_of(index), index
    frontiers = reader.frontiers()
    if request.position > frontiers["committed_position"]:
        raise CommitRefused(group=request.group, topic=request.topic, position=request.position,
                            committed=frontiers["reclaimed_position"], end_position=frontiers["committed_position"])
    if request.position < frontiers["reclaimed_position"]:
        raise PositionLost(position=request.position, first_available=frontiers["reclaimed_position"])
    return request.position, index


class GroupService:
    """Consumer groups over gRPC, and their files beside the replicas. `forward` calls a method at the head."""

    def __init__(self, server: "BrokerServer", forward: Callable[..., Any]) -> None:
        node = server.node
        self._server, self._node, self._forward = server, node, forward
        self.table: GroupTable = node.groups
        self._files = GroupFiles(node.config.replica_folder(node.broker), node.region.run_id)
        self._lease_ns = node.settings.group_lease_ns
        self._files_failed = False
        self._report_file = node.config.folder / RECOVERY_FILE

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Methods of cxlmq.v1.Groups."""
        return unary_handlers(self._server.guard, "Groups", {
            "Join": (self.join, pb.JoinGroupRequest, pb.GroupMembership),
            "Commit": (self.commit, pb.CommitGroupRequest, pb.GroupMembership),
            "Leave": (self.leave, pb.LeaveGroupRequest, pb.LeaveGroupResponse),
            "List": (self.list, pb.ListGroupsRequest, pb.ListGroupsResponse),
            "Reset": (self.reset, pb.ResetGroupRequest, pb.Group),
            "Delete": (self.delete, pb.DeleteGroupRequest, pb.DeleteGroupResponse),
        })

    def _opened(self, request: Any) -> tuple[TopicEntry, OrderReader]:
        """The topic that a request is about, and a reader of it. Raises `BadGroupName`, `UnknownTopic` and its like."""
        topic = self._server.topic_seen(request) if hasattr(request, "seen") else self._node.topics.find(request.topic)
        check_group_name(request.group)
        return topic, self._reader(topic)

    def _reader(self, topic: TopicEntry) -> OrderReader:
        return OrderReader(self._node.delivery_door, self._node.layout, topic.number, topic.generation)

    async def join(self, request: Any, context: Any) -> pb.GroupMembership:
        topic, reader = self._opened(request)
        if not request.member:
            raise BadRequest(reason="a member needs a number above 0")
        if not self._node.is_head:
            return await self._forward("Groups/Join", request, pb.GroupMembership, context)
        holder = fitted(request.holder, HOLDER_BYTES) or f"member {request.member:x}"
        at_time = await time_index(request, reader)
        group = await self.table.join(
            topic, reader, request.group, request.member, holder, self._lease_ns, request.protect,
            lambda: start_place(request, reader, at_time), self._make_durable)
        return self._membership(topic, group)

    async def commit(self, request: Any, context: Any) -> pb.GroupMembership:
        topic, reader = self._opened(request)
        if not self._node.is_head:
            return await self._forward("Groups/Commit", request, pb.GroupMembership, context)
        try:
            self.table.require_member(topic, request.group, request.member, request.member_epoch)
        except (GroupFenced, UnknownGroup) as error:
            # Members are not on disk: one that joined in an earlier run has not lost its place to anybody.
            error.details["recovered"] = request.seen.run_id not in (0, self._node.region.run_id)
            raise
        if not request.HasField("position"):
            return self._membership(topic, self.table.renew(topic, request.group, request.member, request.member_epoch,
                                                            self._lease_ns))
        group = self.table.commit(topic, reader, request.group, request.member, request.member_epoch, request.position,
                                  self._lease_ns)
        await self._make_durable(topic, group)
        return self._membership(topic, group)

    def _membership(self, topic: TopicEntry, group: Group) -> pb.GroupMembership:
        return pb.GroupMembership(member_epoch=group.member_epoch, position=group.position,
                                  lease_ms=self._lease_ns // 1_000_000,
                                  topic=pb.TopicIdentity(run_id=self._node.region.run_id, created_ns=topic.created_ns))

    async def leave(self, request: Any, context: Any) -> pb.LeaveGroupResponse:
        topic, _ = self._opened(request)
        if not self._node.is_head:
            return await self._forward("Groups/Leave", request, pb.LeaveGroupResponse, context)
        self.table.leave(topic, request.group, request.member, request.member_epoch)
        return pb.LeaveGroupResponse()

    async def list(self, request: Any, context: Any) -> pb.ListGroupsResponse:
        if request.topic and request.group:
            topic, _ = self._opened(request)
            return pb.ListGroupsResponse(groups=[self._describe(topic, self.table.find(topic, request.group))])
        topics = [self._node.topics.find(request.topic)] if request.topic else self._node.topics.entries()
        seen = {topic_key(topic): topic for topic in METHODS["Groups/List"].seen(CALLER.get(), topics)}
        return pb.ListGroupsResponse(groups=[
            self._describe(seen[group.topic], group) for group in self.table.entries(seen)
            if request.group in ("", group.name)])

    def _describe(self, topic: TopicEntry, group: Group) -> pb.Group:
        frontiers = self._node.topics.frontiers(topic)
        left = self.table.lease_left_ns(group) // 1_000_000
        # Only a recovery leaves lost ranges behind.
        entries = self._node.topics.order_entries(topic) if self._report_file.exists() else None
        lost = lost_from(group.position, frontiers["first_position"], frontiers["end_position"], entries,
                         topic.generation)
        return pb.Group(topic=topic.name, name=group.name, position=group.position,
                        first_position=frontiers["first_position"], end_position=frontiers["end_position"],
                        protected=group.protected, holder=group.holder if left > 0 else "", lease_left_ms=max(0, left),
                        member_epoch=group.member_epoch, committed_unix_ns=group.committed_wall_ns, lost_count=lost)

    async def reset(self, request: Any, context: Any) -> pb.Group:
        topic, reader = self._opened(request)
        if not self._node.is_head:
            return await self._forward("Groups/Reset", request, pb.Group, context)
        at_time = await time_index(request, reader)
        start = (lambda: start_place(request, reader, at_time)) if request.WhichOneof("start") else None
        protect = {pb.ResetGroupRequest.ON: True, pb.ResetGroupRequest.OFF: False}.get(request.protection)
        group = await self.table.reset(topic, reader, request.group, start, protect, self._make_durable)
        return self._describe(topic, group)

    async def delete(self, request: Any, context: Any) -> pb.DeleteGroupResponse:
        topic, _ = self._opened(request)
        if not self._node.is_head:
            return await self._forward("Groups/Delete", request, pb.DeleteGroupResponse, context, UnknownGroup)
        group = await self.table.delete(topic, request.group)
        if topic.replication_factor > 1:        # before it is answered, a disk knows that it is gone
            await self._on_disk(self._files.delete, topic, group, (
                f"group {group.name} of topic {topic.name} is deleted, but no disk could be told so yet: until the "
                "brokers, which try again, have done so, a recovery may bring it back; make room on their disks"))
        return pb.DeleteGroupResponse()

    def restore(self, report_file: Path) -> None:
        """After a recovery, before anybody can call: bring back the groups, and say so in the report. Once a region."""
        report = json.loads(report_file.read_text()) if report_file.exists() else {"groups": []}
        if "groups" in report or not self._node.config.data_directory:
            return
        report |= self.table.restore_all(self._node.topics.entries(), self._reader,
                                         Path(self._node.config.data_directory))
        write_whole(report_file, json.dumps(report).encode())

    # ---- files ------------------------------------------------------------------------------------------------------

    async def _make_durable(self, topic: TopicEntry, group: Group) -> None:
        """Before a commit is answered it is on this disk, if the topic's log is on disks at all."""
        if topic.replication_factor > 1:
            await self._on_disk(self._files.store, topic, group)

    async def _on_disk(self, write: Callable[[GroupRecord], None], topic: TopicEntry, group: Group,
                       message: str | None = None) -> None:
        try:
            await asyncio.to_thread(write, group.record(topic))
        except OSError as error:
            raise GroupNotDurable(message, group=group.name, topic=topic.name, position=group.position,
                                  reason=error.strerror or str(error)) from error

    async def forget_deleted(self) -> None:
        """Free the groups of topics that are gone (at the head)."""
        await self.table.forget_deleted({topic_key(topic) for topic in self._node.topics.entries()})

    async def look_after(self) -> None:
        """Every broker keeps copies of the groups of replicated topics: the head's disk alone could go with it."""
        topics = {topic_key(topic): topic for topic in self._node.topics.entries() if topic.replication_factor > 1}
        records = [group.record(topics[group.topic]) for group in self.table.entries(topics)] if topics else []
        known = self._files.stored()
        if self._files.loaded and known == {record.file_name: record.version for record in records}:
            return
        try:
            if not self._files.loaded:
                await asyncio.to_thread(self._files.load)
                return                          # what went before we knew of it is looked at next time
            await asyncio.to_thread(self._files.keep, records, known, {(each.name, each.created_ns)
                                                                       for each in topics.values()})
            self._files_failed = False
        except OSError as error:
            if not self._files_failed:      # once: it is tried again until it works
                _log.error("the groups' files cannot be written: %s", error)
            self._files_failed = True



