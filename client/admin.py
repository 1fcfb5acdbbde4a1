"""Admin: topics and the state of the cluster, for programs; sync and async."""

import operator
from pathlib import Path
from typing import Any

from broker.config import TopicConfig, check_group_name, check_topic_name
from broker.errors import BadTopicOptions, ConfigError, DuplicateTopic, UnknownGroup, UnknownTopic
from broker.proto import cxlmq_pb2 as pb
from client.connection import ClientLoop, Connection
from client.fork import is_child
from client.start import Start, check_start, fill_start


def whole(value: Any) -> Any:
    """A whole number of whatever type (numpy's as well) as int; what is none stays, to be refused by name."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _topic_dict(topic: pb.Topic) -> dict[str, Any]:
    return {
        "name": topic.name, "order": topic.order, "ack": topic.ack, "replication_factor": topic.replication_factor,
        "retention_bytes": topic.retention_bytes, "number": topic.number, "generation": topic.generation,
        "first_position": topic.first_position, "end_position": topic.end_position,
        "committed_batches": topic.committed_batches, "committed_bytes": topic.committed_bytes,
        "created_unix_ns": topic.created_ns, "holder": topic.holder,
        "degraded": list(topic.degraded)}


def _check_same(wanted: TopicConfig, found: dict[str, Any]) -> None:
    """Raise `DuplicateTopic` when a topic that is there does not promise what is wanted."""
    names = ("order", "ack", "replication_factor", "retention_bytes")
    other = [f"{name} {found[name]} and not {getattr(wanted, name)}" for name in names
             if found[name] != getattr(wanted, name)]
    if other:
        raise DuplicateTopic(
            f"topic {wanted.name} exists already, with {', '.join(other)}: take it as it is, choose another name, or "
            "change its ack and retention (alter_topic, `cxlmq topic alter`)", topic=wanted.name)


def _group_dict(group: pb.Group) -> dict[str, Any]:
    return {
        "topic": group.topic, "group": group.name, "position": group.position, "end_position": group.end_position,
        "lag": max(0, group.end_position - group.position - group.lost_count), "lost": group.lost_count,
        "protected": group.protected, "holder": group.holder, "lease_left_ms": group.lease_left_ms,
        "member_epoch": group.member_epoch, "committed_unix_ns": group.committed_unix_ns}


class AsyncAdmin:
    """Topics and cluster state. `async with AsyncAdmin(cluster="name") as admin: ...`

    `cluster` is the name of a cluster on this machine (default: CXLMQ_NAME, or "default"), `bootstrap` the address of
    any broker of one elsewhere. `security` is the folder that `cxlmq security add` made for us (default:
    CXLMQ_SECURITY, or none). Every method raises the typed errors of `client.errors`.
    """

    def __init__(self, cluster: str | None = None, bootstrap: str | None = None,
                 security: str | Path | None = None) -> None:
        self._loop = ClientLoop.get()
        self._connection = Connection(cluster, bootstrap).secured(security)

    async def create_topic(self, name: str, order: int = 5, ack: int = 1, replication_factor: int = 1,
                           retention_bytes: int = 0, exist_ok: bool = False) -> dict[str, Any]:
        """Create a topic; its description.

        With `exist_ok`, a topic that is there and promises the same is no failure; one that promises something else
        raises `DuplicateTopic` as well, which says what.

        `order` 0 none, 1 per broker, 2 total, 5 total and per-session FIFO (4 is an alias of 5). `ack` is the level
        that publishers wait for unless they say otherwise: 0, 1 (ordered in memory), 2 (durable on
        replication_factor - 1 disks; needs replication_factor of at least 2).
        """
        config, _ = TopicConfig(name=name, order=whole(order), ack=whole(ack), replication_factor=whole(
            replication_factor), retention_bytes=whole(retention_bytes)).validate(None)
        request = pb.CreateTopicRequest(name=config.name, order=config.order, ack=config.ack,
                                        replication_factor=config.replication_factor,
                                        retention_bytes=config.retention_bytes)
        try:
            made = await self._loop.call(
                self._connection.any("Admin/CreateTopic", request, pb.Topic, done=(DuplicateTopic,)))
            if made.name:
                return _topic_dict(made)
            # A try of ours whose answer was lost has made it.
        except DuplicateTopic:
            if not exist_ok:
                raise
        found = await self.describe_topic(config.name)
        _check_same(config, found)
        return found

    async def alter_topic(self, name: str, *, retention_bytes: int | None = None,
                          ack: int | None = None) -> dict[str, Any]:
        """Change what can be changed while a topic is in use; its description.

        `retention_bytes` counts at once. `ack` counts for publishers that are opened from now on and ask for no level
        of their own. Order and replication factor are for the topic's life.
        """
        if retention_bytes is None and ack is None:
            raise BadTopicOptions(topic=name, option="options", value="none", allowed="retention_bytes, ack, or both")
        # What is given is checked here; whether it fits the topic, at the head.
        retention_bytes, ack = whole(retention_bytes), whole(ack)
        TopicConfig(name=name, ack=1 if ack is None else ack, replication_factor=2,
                    retention_bytes=0 if retention_bytes is None else retention_bytes).validate(None)
        request = pb.AlterTopicRequest(name=name, retention_bytes=retention_bytes, ack=ack)
        return _topic_dict(await self._loop.call(self._connection.any("Admin/AlterTopic", request, pb.Topic)))

    async def delete_topic(self, name: str) -> None:
        """Delete a topic and everything in it; its readers and publishers get `UnknownTopic`."""
        check_topic_name(name)
        await self._loop.call(
            self._connection.any("Admin/DeleteTopic", pb.DeleteTopicRequest(name=name), pb.DeleteTopicResponse,
                                 done=(UnknownTopic,)))

    async def list_topics(self) -> list[dict[str, Any]]:
        """All topics."""
        reply = await self._loop.call(
            self._connection.any("Admin/ListTopics", pb.ListTopicsRequest(), pb.ListTopicsResponse))
        return [_topic_dict(topic) for topic in reply.topics]

    async def describe_topic(self, name: str) -> dict[str, Any]:
        """One topic: its options and frontiers."""
        check_topic_name(name)
        return _topic_dict(await self._loop.call(
            self._connection.any("Admin/DescribeTopic", pb.DescribeTopicRequest(name=name), pb.Topic)))

    async def list_groups(self, topic: str = "") -> list[dict[str, Any]]:
        """The consumer groups of a topic, or of all topics: position, lag, holder ..."""
        if topic != "":
            check_topic_name(topic)
        reply = await self._loop.call(
            self._connection.any("Groups/List", pb.ListGroupsRequest(topic=topic), pb.ListGroupsResponse))
        return [_group_dict(group) for group in reply.groups]

    async def describe_group(self, topic: str, group: str) -> dict[str, Any]:
        """One group. Raises `UnknownGroup`."""
        check_topic_name(topic)
        check_group_name(group)
        reply = await self._loop.call(
            self._connection.any("Groups/List", pb.ListGroupsRequest(topic=topic, group=group), pb.ListGroupsResponse))
        return _group_dict(reply.groups[0])

    async def reset_group(self, topic: str, group: str, start: Start | None = None,
                          protect: bool | None = None) -> dict[str, Any]:
        """Put a group that nobody reads somewhere else, or change whether it keeps its data; its description."""
        check_topic_name(topic)
        check_group_name(group)
        if protect not in (None, True, False):
            raise ConfigError(setting="protect", value=repr(protect), allowed="True, False, or None (as it is)")
        request = pb.ResetGroupRequest(topic=topic, group=group, protection={
            None: pb.ResetGroupRequest.KEEP, True: pb.ResetGroupRequest.ON, False: pb.ResetGroupRequest.OFF}[protect])
        if start is not None:
            check_start(start)
            fill_start(request, start)
        return _group_dict(await self._loop.call(self._connection.any("Groups/Reset", request, pb.Group)))

    async def delete_group(self, topic: str, group: str) -> None:
        """Forget a group that nobody reads, and keep nothing for it."""
        check_topic_name(topic)
        check_group_name(group)
        await self._loop.call(self._connection.any(
            "Groups/Delete", pb.DeleteGroupRequest(topic=topic, group=group), pb.DeleteGroupResponse,
            done=(UnknownGroup,)))

    async def describe_cluster(self) -> dict[str, Any]:
        """The cluster: its brokers, addresses, limits."""
        reply = await self._loop.call(
            self._connection.any("Cluster/Describe", pb.DescribeClusterRequest(), pb.ClusterDescription))
        names = ("name", "epoch", "head", "region_bytes", "message_bytes_max", "batch_bytes_max", "host", "run_id")
        brokers = [{field.name: getattr(each, field.name) for field in each.DESCRIPTOR.fields}
                   for each in reply.brokers]
        return {**{name: getattr(reply, name) for name in names}, "brokers": brokers}

    async def close(self) -> None:
        """Close the connections. In a forked child they are the parent's."""
        if not is_child():
            await self._loop.call(self._connection.close())

    async def __aenter__(self) -> "AsyncAdmin":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Admin:
    """As `AsyncAdmin`, for programs without an event loop."""

    def __init__(self, cluster: str | None = None, bootstrap: str | None = None,
                 security: str | Path | None = None) -> None:
        self._admin = AsyncAdmin(cluster, bootstrap, security)
        self._run = ClientLoop.get().run

    def create_topic(self, name: str, order: int = 5, ack: int = 1, replication_factor: int = 1,
                     retention_bytes: int = 0, exist_ok: bool = False) -> dict[str, Any]:
        """See `AsyncAdmin.create_topic`."""
        return self._run(self._admin.create_topic(name, order, ack, replication_factor, retention_bytes, exist_ok))

    def alter_topic(self, name: str, *, retention_bytes: int | None = None, ack: int | None = None) -> dict[str, Any]:
        """See `AsyncAdmin.alter_topic`."""
        return self._run(self._admin.alter_topic(name, retention_bytes=retention_bytes, ack=ack))

    def delete_topic(self, name: str) -> None:
        """See `AsyncAdmin.delete_topic`."""
        self._run(self._admin.delete_topic(name))

    def list_topics(self) -> list[dict[str, Any]]:
        """See `AsyncAdmin.list_topics`."""
        return self._run(self._admin.list_topics())

    def describe_topic(self, name: str) -> dict[str, Any]:
        """See `AsyncAdmin.describe_topic`."""
        return self._run(self._admin.describe_topic(name))

    def list_groups(self, topic: str = "") -> list[dict[str, Any]]:
        """See `AsyncAdmin.list_groups`."""
        return self._run(self._admin.list_groups(topic))

    def describe_group(self, topic: str, group: str) -> dict[str, Any]:
        """See `AsyncAdmin.describe_group`."""
        return self._run(self._admin.describe_group(topic, group))

    def reset_group(self, topic: str, group: str, start: Start | None = None,
                    protect: bool | None = None) -> dict[str, Any]:
        """See `AsyncAdmin.reset_group`."""
        return self._run(self._admin.reset_group(topic, group, start, protect))

    def delete_group(self, topic: str, group: str) -> None:
        """See `AsyncAdmin.delete_group`."""
        self._run(self._admin.delete_group(topic, group))

    def describe_cluster(self) -> dict[str, Any]:
        """See `AsyncAdmin.describe_cluster`."""
        return self._run(self._admin.describe_cluster())

    def close(self) -> None:
        """Close the connections. In a forked child they are the parent's."""
        if not is_child():
            self._run(self._admin.close())

    def __enter__(self) -> "Admin":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
