"""Every error of the product, under `CxlmqError`: a code, a message that says what to do, and details.

    broker raises ──► to_metadata ──► gRPC trailers ──► from_metadata ──► the client raises the same error
                      cxlmq-error: code     cxlmq-details: JSON

A class states its gRPC status and the template of its message; details fill the template and are attributes of the
error (`PoolFull(holder="replica 2").holder`). Status names are plain strings: only the gRPC adapters import grpc.

`comes_back` says what clients do that are open already, over every transport, publishing or reading: where it is true
they try again by themselves (brokers restart, a cluster is recovered, a table has room again); every other error is
final, and is what the user gets.
"""

import json
import os
from collections.abc import Iterable
from typing import Any, ClassVar

ERROR_KEY = "cxlmq-error"
DETAILS_KEY = "cxlmq-details"
# gRPC takes 8 KiB of trailers for granted and 16 KiB at most; a character may take 12 bytes of them.
TEXT_MAX = 128


class _Known(dict[str, object]):
    """Fills a template; what is not known reads as '?'. An error about an error helps nobody."""

    def __missing__(self, key: str) -> str:
        return "?"


class CxlmqError(Exception):
    """Base of all errors. `code` is stable, for programs; `message` is for people; `details` hold the numbers."""

    code: ClassVar[str] = "internal"
    status: ClassVar[str] = "INTERNAL"
    template: ClassVar[str] = "internal error"
    comes_back: ClassVar[bool] = False      # an outage: who was open waits and tries again; else it is for the user

    def __init__(self, message: str | None = None, /, **details: object) -> None:
        self.details: dict[str, object] = details
        self.message = self.template.format_map(_Known(details)) if message is None else message
        super().__init__(self.message)

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.code, self.message, self.details)


class ConfigError(CxlmqError):
    """A setting has a wrong value; details: setting, value, allowed."""

    code = "config"
    status = "INVALID_ARGUMENT"
    template = "setting {setting} cannot be {value}: allowed is {allowed}"


class RegionError(CxlmqError):
    """Something is wrong with the shared region; details: region."""

    code = "region"
    status = "FAILED_PRECONDITION"
    template = "region {region} cannot be used"


class RegionTooSmall(RegionError):
    """The numbers do not fit into the region; the message names the smallest that works."""

    code = "region-too-small"
    status = "INVALID_ARGUMENT"
    template = "the region is too small: make region_bytes larger"


class RegionStale(RegionError):
    """The region is of another version, layout or run."""

    code = "region-stale"
    comes_back = True
    template = "region {region} is stale ({reason}): remove it with `cxlmq region gc`, or attach to the current run"


class RegionForeign(RegionError):
    """The file is no region of ours, or the name belongs to a cluster that runs."""

    code = "region-foreign"
    template = "region {region} is not ours ({reason}): choose another cluster name"

    @classmethod
    def taken(cls, name: str) -> "RegionForeign":
        """Somebody lives under the name that a new cluster is to have."""
        return cls(f"the name {name} is taken, by a cluster of yours that runs (`cxlmq cluster list`) or by another "
                   f"user: use that cluster, end it (`cxlmq cluster down {name}`), or choose another cluster name",
                   region=name)


    @classmethod
    def orphaned(cls, name: str) -> "RegionForeign":
        """The supervisor under the name that a new cluster is to have is dead, and its brokers are not."""
        return cls(f"the supervisor of cluster {name} was killed, and its brokers have not ended yet: end them with "
                   f"`cxlmq cluster down {name}`, which removes what they left, and start again", region=name)


class RegionMissing(RegionError):
    """There is no region of this name, or it did not become ready in time."""

    code = "region-missing"
    status = "NOT_FOUND"
    comes_back = True
    template = "there is no region {region}: start the cluster with `cxlmq cluster up`"


class TmpfsTooSmall(RegionError):
    """tmpfs has no room for the region; details: wanted_bytes, free_bytes."""

    code = "tmpfs-too-small"
    status = "RESOURCE_EXHAUSTED"
    template = ("the region, or a file beside it, needs {wanted_bytes} bytes and /dev/shm has {free_bytes} free: make "
                "region_bytes smaller, "
                "remove leftovers with `cxlmq region gc`, or enlarge /dev/shm")


class MemoryLost(CxlmqError):
    """A broker cannot reach the shared memory, or used it as its hardware does not allow; details: broker, reason."""

    code = "memory-lost"
    status = "UNAVAILABLE"
    comes_back = True
    template = "broker {broker} ends: {reason}"


class TopicError(CxlmqError):
    """Something is wrong with a topic; details: topic."""

    code = "topic"
    status = "INVALID_ARGUMENT"
    template = "topic {topic} cannot be used"


class UnknownTopic(TopicError):
    """No topic of this name exists."""

    code = "unknown-topic"
    status = "NOT_FOUND"
    template = "there is no topic {topic}: create it with `cxlmq topic create {topic}`"


class TopicRecreated(UnknownTopic):
    """The topic was deleted and another one has its name: a client of the first one never goes on in the second."""

    code = "topic-recreated"
    status = "FAILED_PRECONDITION"
    template = ("topic {topic} was deleted, and another one was made with its name: open a new subscriber or publisher "
                "for that one, or accept it with seek(\"beginning\")")


class ClusterReplaced(UnknownTopic):
    """The cluster was started anew without what it had: its topics are not those that the client knew."""

    code = "cluster-replaced"
    status = "FAILED_PRECONDITION"
    template = ("the cluster was started anew and what topic {topic} had is not there: open a new subscriber or "
                "publisher, or accept the new topic with seek(\"beginning\"); `cxlmq cluster up --recover` brings back "
                "what is on disk")


class DuplicateTopic(TopicError):
    """A topic of this name exists already."""

    code = "duplicate-topic"
    status = "ALREADY_EXISTS"
    template = ("topic {topic} exists already: choose another name, delete it first, or say that it may be there "
                "(exist_ok=True, --if-not-exists)")


class BadTopicName(TopicError):
    """The name is not allowed."""

    code = "bad-topic-name"
    template = ("{topic!r} is no topic name: use 1 to 120 letters, digits, '.', '_' and '-', "
                "and do not start with '.' or '__'")


class BadTopicOptions(TopicError):
    """Order, ack, replication factor or retention are wrong or do not fit together."""

    code = "bad-topic-options"
    template = "{option} of topic {topic} cannot be {value}: allowed is {allowed}"


class TopicNotDurable(TopicError):
    """A topic, or its new options, cannot be written to the head's disk; details: topic, reason."""

    code = "topic-not-durable"
    status = "FAILED_PRECONDITION"
    template = ("topic {topic} is altered in memory and not on disk ({reason}): make room in the data directory and "
                "alter it again")


class TopicTableFull(TopicError):
    """The region has no place for another topic; details: topic_count_max, limit, topic_bytes."""

    code = "topic-table-full"
    status = "RESOURCE_EXHAUSTED"
    template = ("all {topic_count_max} places for topics are taken: delete one, or start the cluster with a larger "
                "topic_count_max (--topic-count-max, up to {limit}; a place takes {topic_bytes} bytes of the region "
                "now, and less when ring_slot_count and order_entry_count are left to be chosen)")


class SessionError(CxlmqError):
    """Something is wrong with a publisher's session."""

    code = "session"
    status = "FAILED_PRECONDITION"
    template = "the session cannot be used: open a new one"


class SessionTableFull(SessionError):
    """No place for another session; details: broker, session_count."""

    code = "session-table-full"
    status = "RESOURCE_EXHAUSTED"
    comes_back = True
    template = ("all {session_count} places for sessions of broker {broker} are taken: close publishers, "
                "or raise session_count_max")


class SessionFenced(SessionError):
    """A newer session of the same client took over, or this one's gap lasted too long; details: committed, reason."""

    code = "session-fenced"
    status = "ABORTED"
    template = "the session is fenced ({reason}): everything below batch {committed} is in the log; open a new session"


class SessionUnknown(SessionError):
    """The broker knows no such session."""

    code = "session-unknown"
    status = "NOT_FOUND"
    comes_back = True
    template = "the broker knows no session {session}: open a new one, it resumes from what is committed"


class MessageTooBig(CxlmqError):
    """A message is larger than the cluster takes; details: message_bytes, message_bytes_max."""

    code = "message-too-big"
    status = "INVALID_ARGUMENT"
    template = ("a message of {message_bytes} bytes is too big: at most {message_bytes_max} are allowed; "
                "split it, or raise message_bytes_max of the cluster")


class PoolFull(CxlmqError):
    """A topic gets no segment; details: holder (who keeps segments from being reclaimed), advice (what helps)."""

    code = "pool-full"
    status = "RESOURCE_EXHAUSTED"
    comes_back = True
    template = "no segment is free for this topic: {holder}; {advice}"


class BufferFull(CxlmqError):
    """The publisher's own memory is full; details: buffer_bytes."""

    code = "buffer-full"
    status = "RESOURCE_EXHAUSTED"
    comes_back = True
    template = ("the publisher already holds {buffer_bytes} bytes that are not acknowledged: wait with flush(), "
                "raise buffer_bytes, or choose another policy for a full buffer")


class DeliveryTimeout(CxlmqError):
    """No acknowledgement came in time; details: timeout_seconds. The message may be in the log, once."""

    code = "delivery-timeout"
    status = "DEADLINE_EXCEEDED"
    template = ("no acknowledgement within {timeout_seconds} s: the message may be in the log or not; "
                "publish through the same session to have it there once, or raise delivery_timeout")


class MessageLost(CxlmqError):
    """A message was in the log without a receipt, and a recovery found it nowhere; details: topic."""

    code = "message-lost"
    status = "DATA_LOSS"
    template = ("the message was in the log of topic {topic}, and no disk had it when the cluster was recovered: it is "
                "not there any more; publish it again if it is wanted")


class PositionLost(CxlmqError):
    """The wanted messages are reclaimed; details: position, first_available."""

    code = "position-lost"
    status = "OUT_OF_RANGE"
    template = "position {position} is gone, the first available is {first_available}: seek there, or use a cursor"


class BrokerUnavailable(CxlmqError):
    """A broker does not answer; details: address."""

    code = "broker-unavailable"
    status = "UNAVAILABLE"
    comes_back = True
    template = "no broker answers at {address}: is the cluster up (`cxlmq cluster status`)?"


class MembershipUnavailable(CxlmqError):
    """etcd does not answer; details: endpoints, reason."""

    code = "membership-unavailable"
    status = "UNAVAILABLE"
    comes_back = True
    template = "etcd does not answer at {endpoints} ({reason}): start it, or set etcd_endpoints or membership"


class BadBatch(CxlmqError):
    """A batch contradicts itself; details: reason."""

    code = "bad-batch"
    status = "INVALID_ARGUMENT"
    template = "the batch is malformed ({reason}): nothing of it was taken; send it as the contract says"


class BadRequest(CxlmqError):
    """A request is not what the contract says; details: reason."""

    code = "bad-request"
    status = "INVALID_ARGUMENT"
    template = "the request is malformed ({reason}): send it as cxlmq.proto says"


class DamagedData(CxlmqError):
    """What came from a broker, or lies in the region, contradicts itself. The message says where."""

    code = "damaged"
    status = "DATA_LOSS"
    template = "the data is damaged: run `cxlmq region inspect` for what is intact"


class ReplicaFailed(CxlmqError):
    """The disk of a replica failed, so that level 2 cannot be promised; details: replica (a broker), errno, reason.

    The message is in the log, in memory: readers get it. It is not durable.
    """

    code = "replica-failed"
    status = "DATA_LOSS"
    template = ("the message is in the log, but not durable: the disk of the replica at broker {replica} failed "
                "({reason}); repair it (the replica then goes on by itself) and publish again what has to be durable")


def replica_failed(word: int) -> ReplicaFailed:
    """The error that an ack stands for: replica << 32 | errno."""
    number = word & 0xFFFFFFFF
    return ReplicaFailed(replica=word >> 32, errno=number, reason=os.strerror(number))


class RangeLost(CxlmqError):
    """No replica had these messages when the cluster was recovered; details: topic, first, end (the next position)."""

    code = "range-lost"
    status = "DATA_LOSS"
    template = "messages {first} up to {end} of topic {topic} were lost: go on with seek({end})"


class RecoveryError(CxlmqError):
    """A cluster cannot be rebuilt from these files; details: folder, reason."""

    code = "recovery"
    status = "FAILED_PRECONDITION"
    template = "cannot recover from {folder}: {reason}"


class DataDirectoryUsed(CxlmqError):
    """A cluster would begin anew where an earlier one left its data; details: data_directory, topics."""

    code = "data-directory-used"
    status = "FAILED_PRECONDITION"
    template = ("{data_directory} has the replicas of an earlier cluster ({shown}): start with --recover "
                "{data_directory} to have them again, or with --fresh to set them aside (in the library: recover=, "
                "fresh=True)")


class DataDirectoryBusy(CxlmqError):
    """Brokers of another cluster write into this data directory; details: data_directory."""

    code = "data-directory-busy"
    status = "FAILED_PRECONDITION"
    template = ("{data_directory} is used by a cluster that runs: stop it first, or choose another data_directory")


class DeletionNotDurable(TopicError):
    """A topic is deleted, and no disk could be told so yet; details: topic, reason."""

    code = "deletion-not-durable"
    status = "FAILED_PRECONDITION"
    template = ("topic {topic} is deleted, but that could not be written down ({reason}): until the brokers, which try "
                "again, have done so, a recovery may bring it back; make room on their disks")


class CursorTableFull(CxlmqError):
    """No place for another reader; details: broker, cursor_count."""

    code = "cursor-table-full"
    status = "RESOURCE_EXHAUSTED"
    comes_back = True
    template = ("all {cursor_count} places for readers of broker {broker} are taken: close subscribers, "
                "or raise cursor_count_max")


class GroupError(CxlmqError):
    """Something is wrong with a consumer group; details: group, topic."""

    code = "group"
    status = "INVALID_ARGUMENT"
    template = "group {group} of topic {topic} cannot be used"


class BadGroupName(GroupError):
    """The name is not allowed."""

    code = "bad-group-name"
    template = ("{group!r} is no group name: use 1 to 63 letters, digits, '.', '_' and '-', "
                "and do not start with '.' or '__'")


class UnknownGroup(GroupError):
    """The topic has no such group."""

    code = "unknown-group"
    status = "NOT_FOUND"
    template = "topic {topic} has no group {group}: a subscriber makes it (group=..., `cxlmq consume --group`)"


class GroupTableFull(GroupError):
    """The region has no place for another group; details: group_count_max."""

    code = "group-table-full"
    status = "RESOURCE_EXHAUSTED"
    template = ("all {group_count_max} places for groups are taken: delete one (`cxlmq group delete`), "
                "or raise group_count_max")


class GroupBusy(GroupError):
    """Somebody else reads for the group; details: holder, lease_seconds_left."""

    code = "group-busy"
    status = "FAILED_PRECONDITION"
    template = ("group {group} of topic {topic} is read by {holder}: close it, wait (its lease ends in "
                "{lease_seconds_left} s unless it renews it; group_wait), or use another group")


class GroupFenced(GroupError):
    """This member's lease ended and another one reads, or the group was reset; details: holder."""

    code = "group-fenced"
    status = "ABORTED"
    template = ("this member of group {group} reads no more: now it is {holder}; what it did not commit is read again "
                "by that one; subscribe again to take turns")


class CommitRefused(GroupError):
    """A group's place never goes back by itself nor beyond the end; details: position, committed, end_position."""

    code = "commit-refused"
    status = "OUT_OF_RANGE"
    template = ("group {group} cannot commit position {position}: allowed is {committed} to {end_position}; "
                "`cxlmq group reset` goes back")


class GroupNotDurable(GroupError):
    """The commit is in memory and not on the head's disk; details: position, reason."""

    code = "group-not-durable"
    status = "FAILED_PRECONDITION"
    template = ("position {position} of group {group} is committed in memory and not on disk ({reason}): "
                "make room in the data directory and commit again")


class StreamTableFull(CxlmqError):
    """A broker serves no more publish streams; details: broker."""

    code = "stream-table-full"
    status = "RESOURCE_EXHAUSTED"
    comes_back = True
    template = "broker {broker} serves as many publish streams as it can: close publishers, or start more brokers"


class AttachSlotsFull(CxlmqError):
    """No slot for another attached client; details: broker."""

    code = "attach-slots-full"
    status = "RESOURCE_EXHAUSTED"
    comes_back = True
    template = ("all slots for attached clients of broker {broker} are taken: close some, raise attach_slot_count, "
                "or use transport=\"grpc\"")


class PortTaken(CxlmqError):
    """Another process listens there; details: address."""

    code = "port-taken"
    status = "ALREADY_EXISTS"
    template = "{address} is in use: choose another listen_port, or 0 for any that is free"


class PermissionDenied(CxlmqError):
    """The caller may not do this; details: what."""

    code = "permission-denied"
    status = "PERMISSION_DENIED"
    template = "not allowed: {what} belongs to another user"


class ClearTextRefused(ConfigError):
    """A cluster would listen in clear text where others can listen in; details: host."""

    code = "clear-text-refused"
    template = ("listen_host {host} is reached from other machines, in clear text and by anybody: turn on security "
                "(`cxlmq security init DIR`, then --security DIR), listen at 127.0.0.1, or say --insecure-clear-text")


class Unauthenticated(CxlmqError):
    """The broker does not know who calls; details: reason."""

    code = "unauthenticated"
    status = "UNAUTHENTICATED"
    template = ("the cluster does not know who you are ({reason}): give security=DIR, --security DIR or "
                "CXLMQ_SECURITY, with the folder that `cxlmq security add` made for you")


class NotAllowed(CxlmqError):
    """The caller is known and lacks a right; details: principal, right, topic."""

    code = "not-allowed"
    status = "PERMISSION_DENIED"
    template = ("{principal} has no right to {right} on topic {topic}: an owner of the cluster's security folder gives "
                "rights with `cxlmq security add`")


class ClosedError(CxlmqError):
    """The object was closed; details: what."""

    code = "closed"
    status = "CANCELLED"
    template = "{what} is closed: open a new one"


class LoanHeld(CxlmqError, BufferError):
    """A loan's block ended while somebody held a view of it: the message was not published; details: views."""

    code = "loan-held"
    status = "FAILED_PRECONDITION"
    template = ("{views} views of the loan (memoryviews, arrays) are held beyond its block, so the message was not "
                "published: release or delete them before the block ends, or publish a copy")


class ForkedProcess(ClosedError):
    """This process was forked from one that uses the library; details: what."""

    code = "forked"
    status = "FAILED_PRECONDITION"
    template = ("this process was forked from one that uses cxlmq, whose threads and connections no fork survives: "
                "{what} cannot be used here: start the process anew (multiprocessing.get_context('spawn'), subprocess "
                "or os.exec*)")


def _all_errors(base: type[CxlmqError]) -> list[type[CxlmqError]]:
    return [base, *(each for child in base.__subclasses__() for each in _all_errors(child))]


ERRORS: dict[str, type[CxlmqError]] = {each.code: each for each in _all_errors(CxlmqError)}

# What a bare gRPC status means when no trailers came: gRPC itself raised it, or something between. A broker that dies
# in the middle of an answer leaves any of the first three.
STATUS_ERRORS: dict[str, type[CxlmqError]] = {
    "CANCELLED": BrokerUnavailable,
    "UNKNOWN": BrokerUnavailable,
    "INTERNAL": BrokerUnavailable,
    "INVALID_ARGUMENT": BadBatch,
    "DEADLINE_EXCEEDED": DeliveryTimeout,
    "NOT_FOUND": UnknownTopic,
    "ALREADY_EXISTS": DuplicateTopic,
    "PERMISSION_DENIED": PermissionDenied,
    "UNAUTHENTICATED": Unauthenticated,
    "RESOURCE_EXHAUSTED": MessageTooBig,
    "FAILED_PRECONDITION": SessionError,
    "ABORTED": SessionFenced,
    "OUT_OF_RANGE": PositionLost,
    "DATA_LOSS": DamagedData,
    "UNAVAILABLE": BrokerUnavailable,
}


def status_of(error: BaseException) -> str:
    """The gRPC status name for an error; "INTERNAL" for what is not ours."""
    return error.status if isinstance(error, CxlmqError) else "INTERNAL"


def from_code(code: str, message: str, /, **details: object) -> CxlmqError:
    """Rebuild an error; a code that this version does not know gives a `CxlmqError` that still carries it."""
    kind = ERRORS.get(code)
    if kind is not None:
        return kind(message, **details)
    return CxlmqError(message, **{**details, "unknown_code": code})


def from_status(status: str, message: str) -> CxlmqError:
    """The nearest error for a bare gRPC status."""
    return STATUS_ERRORS.get(status, CxlmqError)(message)


def to_metadata(error: BaseException) -> tuple[tuple[str, str], ...]:
    """The trailers that carry an error's code and details, in ASCII; the message is gRPC's own status message."""
    if not isinstance(error, CxlmqError):
        return ((ERROR_KEY, CxlmqError.code),)
    return (ERROR_KEY, error.code), (DETAILS_KEY, json.dumps(
        {key: shortened(value) if isinstance(value, str) else value for key, value in error.details.items()},
        default=lambda value: shortened(str(value))))


def shortened(text: str, most: int = TEXT_MAX) -> str:
    """A text that fits: what somebody sends us comes back in errors, and metadata of a call has little room."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def from_metadata(status: str, message: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> CxlmqError:
    """The error that a failed call stands for: from its trailers, or else from its status."""
    values = {key: value.decode() if isinstance(value, bytes) else value for key, value in metadata or ()
              if key in (ERROR_KEY, DETAILS_KEY)}
    if ERROR_KEY not in values:
        return from_status(status, message)
    try:
        details = dict(json.loads(values.get(DETAILS_KEY, "{}")))
    except (ValueError, TypeError):
        details = {}
    return _rebuild(values[ERROR_KEY], message, details)


def _rebuild(code: str, message: str, details: dict[str, object]) -> CxlmqError:
    return from_code(code, message, **details)
