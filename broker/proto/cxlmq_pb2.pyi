from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BatchStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[BatchStatus]
    COMMITTED: _ClassVar[BatchStatus]
    DUPLICATE: _ClassVar[BatchStatus]
    FENCED: _ClassVar[BatchStatus]
    REFUSED: _ClassVar[BatchStatus]
    VOID: _ClassVar[BatchStatus]
    DAMAGED: _ClassVar[BatchStatus]
    UNDURABLE: _ClassVar[BatchStatus]
NONE: BatchStatus
COMMITTED: BatchStatus
DUPLICATE: BatchStatus
FENCED: BatchStatus
REFUSED: BatchStatus
VOID: BatchStatus
DAMAGED: BatchStatus
UNDURABLE: BatchStatus

class PublishOpen(_message.Message):
    __slots__ = ("topic", "client_id", "session_slot", "session_epoch", "ack", "seen")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_SLOT_FIELD_NUMBER: _ClassVar[int]
    SESSION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    client_id: int
    session_slot: int
    session_epoch: int
    ack: int
    seen: TopicIdentity
    def __init__(self, topic: _Optional[str] = ..., client_id: _Optional[int] = ..., session_slot: _Optional[int] = ..., session_epoch: _Optional[int] = ..., ack: _Optional[int] = ..., seen: _Optional[_Union[TopicIdentity, _Mapping]] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("open", "batch_sequence", "message_count", "published_ns", "compressed", "payload")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BATCH_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_NS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    open: PublishOpen
    batch_sequence: int
    message_count: int
    published_ns: int
    compressed: bytes
    payload: bytes
    def __init__(self, open: _Optional[_Union[PublishOpen, _Mapping]] = ..., batch_sequence: _Optional[int] = ..., message_count: _Optional[int] = ..., published_ns: _Optional[int] = ..., compressed: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("batch_sequence", "code", "message", "details")
    BATCH_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    batch_sequence: int
    code: str
    message: str
    details: str
    def __init__(self, batch_sequence: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., details: _Optional[str] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("batch_sequences", "positions", "statuses", "epoch", "refusals")
    BATCH_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    batch_sequences: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    statuses: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    refusals: _containers.RepeatedCompositeFieldContainer[Refusal]
    def __init__(self, batch_sequences: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., statuses: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., refusals: _Optional[_Iterable[_Union[Refusal, _Mapping]]] = ...) -> None: ...

class TopicIdentity(_message.Message):
    __slots__ = ("run_id", "created_ns")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    run_id: int
    created_ns: int
    def __init__(self, run_id: _Optional[int] = ..., created_ns: _Optional[int] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("topic", "beginning", "end", "position", "published_ns", "frame_bytes", "group", "member", "member_epoch", "seen")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    BEGINNING_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_NS_FIELD_NUMBER: _ClassVar[int]
    FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    MEMBER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    beginning: bool
    end: bool
    position: int
    published_ns: int
    frame_bytes: int
    group: str
    member: int
    member_epoch: int
    seen: TopicIdentity
    def __init__(self, topic: _Optional[str] = ..., beginning: _Optional[bool] = ..., end: _Optional[bool] = ..., position: _Optional[int] = ..., published_ns: _Optional[int] = ..., frame_bytes: _Optional[int] = ..., group: _Optional[str] = ..., member: _Optional[int] = ..., member_epoch: _Optional[int] = ..., seen: _Optional[_Union[TopicIdentity, _Mapping]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("position", "message_count", "broker", "published_ns", "reserved", "payload")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    BROKER_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_NS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    position: int
    message_count: int
    broker: int
    published_ns: int
    reserved: int
    payload: bytes
    def __init__(self, position: _Optional[int] = ..., message_count: _Optional[int] = ..., broker: _Optional[int] = ..., published_ns: _Optional[int] = ..., reserved: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class SubscribeResponse(_message.Message):
    __slots__ = ("batches",)
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedCompositeFieldContainer[Batch]
    def __init__(self, batches: _Optional[_Iterable[_Union[Batch, _Mapping]]] = ...) -> None: ...

class CreateTopicRequest(_message.Message):
    __slots__ = ("name", "order", "ack", "replication_factor", "retention_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    REPLICATION_FACTOR_FIELD_NUMBER: _ClassVar[int]
    RETENTION_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    order: int
    ack: int
    replication_factor: int
    retention_bytes: int
    def __init__(self, name: _Optional[str] = ..., order: _Optional[int] = ..., ack: _Optional[int] = ..., replication_factor: _Optional[int] = ..., retention_bytes: _Optional[int] = ...) -> None: ...

class AlterTopicRequest(_message.Message):
    __slots__ = ("name", "retention_bytes", "ack")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RETENTION_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    name: str
    retention_bytes: int
    ack: int
    def __init__(self, name: _Optional[str] = ..., retention_bytes: _Optional[int] = ..., ack: _Optional[int] = ...) -> None: ...

class DeleteTopicRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteTopicResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTopicsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTopicsResponse(_message.Message):
    __slots__ = ("topics",)
    TOPICS_FIELD_NUMBER: _ClassVar[int]
    topics: _containers.RepeatedCompositeFieldContainer[Topic]
    def __init__(self, topics: _Optional[_Iterable[_Union[Topic, _Mapping]]] = ...) -> None: ...

class DescribeTopicRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Topic(_message.Message):
    __slots__ = ("name", "order", "ack", "replication_factor", "retention_bytes", "number", "generation", "first_position", "end_position", "committed_batches", "committed_bytes", "created_ns", "degraded", "holder", "run_id", "durable_position", "failed_position", "failed_replica")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    REPLICATION_FACTOR_FIELD_NUMBER: _ClassVar[int]
    RETENTION_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    END_POSITION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BATCHES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DURABLE_POSITION_FIELD_NUMBER: _ClassVar[int]
    FAILED_POSITION_FIELD_NUMBER: _ClassVar[int]
    FAILED_REPLICA_FIELD_NUMBER: _ClassVar[int]
    name: str
    order: int
    ack: int
    replication_factor: int
    retention_bytes: int
    number: int
    generation: int
    first_position: int
    end_position: int
    committed_batches: int
    committed_bytes: int
    created_ns: int
    degraded: _containers.RepeatedScalarFieldContainer[str]
    holder: str
    run_id: int
    durable_position: int
    failed_position: int
    failed_replica: int
    def __init__(self, name: _Optional[str] = ..., order: _Optional[int] = ..., ack: _Optional[int] = ..., replication_factor: _Optional[int] = ..., retention_bytes: _Optional[int] = ..., number: _Optional[int] = ..., generation: _Optional[int] = ..., first_position: _Optional[int] = ..., end_position: _Optional[int] = ..., committed_batches: _Optional[int] = ..., committed_bytes: _Optional[int] = ..., created_ns: _Optional[int] = ..., degraded: _Optional[_Iterable[str]] = ..., holder: _Optional[str] = ..., run_id: _Optional[int] = ..., durable_position: _Optional[int] = ..., failed_position: _Optional[int] = ..., failed_replica: _Optional[int] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("topic", "client_id", "session_epoch", "ack", "resume_from", "resume_epoch", "seen", "earlier")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    RESUME_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    EARLIER_FIELD_NUMBER: _ClassVar[int]
    topic: str
    client_id: int
    session_epoch: int
    ack: int
    resume_from: int
    resume_epoch: int
    seen: TopicIdentity
    earlier: _containers.RepeatedCompositeFieldContainer[EarlierBatches]
    def __init__(self, topic: _Optional[str] = ..., client_id: _Optional[int] = ..., session_epoch: _Optional[int] = ..., ack: _Optional[int] = ..., resume_from: _Optional[int] = ..., resume_epoch: _Optional[int] = ..., seen: _Optional[_Union[TopicIdentity, _Mapping]] = ..., earlier: _Optional[_Iterable[_Union[EarlierBatches, _Mapping]]] = ...) -> None: ...

class EarlierBatches(_message.Message):
    __slots__ = ("session_epoch", "first", "end")
    SESSION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    session_epoch: int
    first: int
    end: int
    def __init__(self, session_epoch: _Optional[int] = ..., first: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_slot", "session_epoch", "topic_number", "topic_generation", "order", "window", "message_bytes_max", "batch_bytes_max", "high_water", "positions", "replication_factor", "lease_ms", "resumed_position", "topic", "earlier_positions", "first_position")
    SESSION_SLOT_FIELD_NUMBER: _ClassVar[int]
    SESSION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOPIC_NUMBER_FIELD_NUMBER: _ClassVar[int]
    TOPIC_GENERATION_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    BATCH_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    HIGH_WATER_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    REPLICATION_FACTOR_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    EARLIER_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    session_slot: int
    session_epoch: int
    topic_number: int
    topic_generation: int
    order: int
    window: int
    message_bytes_max: int
    batch_bytes_max: int
    high_water: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    replication_factor: int
    lease_ms: int
    resumed_position: int
    topic: TopicIdentity
    earlier_positions: _containers.RepeatedScalarFieldContainer[int]
    first_position: int
    def __init__(self, session_slot: _Optional[int] = ..., session_epoch: _Optional[int] = ..., topic_number: _Optional[int] = ..., topic_generation: _Optional[int] = ..., order: _Optional[int] = ..., window: _Optional[int] = ..., message_bytes_max: _Optional[int] = ..., batch_bytes_max: _Optional[int] = ..., high_water: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., replication_factor: _Optional[int] = ..., lease_ms: _Optional[int] = ..., resumed_position: _Optional[int] = ..., topic: _Optional[_Union[TopicIdentity, _Mapping]] = ..., earlier_positions: _Optional[_Iterable[int]] = ..., first_position: _Optional[int] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("client_id", "session_slot", "session_epoch")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_SLOT_FIELD_NUMBER: _ClassVar[int]
    SESSION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    client_id: int
    session_slot: int
    session_epoch: int
    def __init__(self, client_id: _Optional[int] = ..., session_slot: _Optional[int] = ..., session_epoch: _Optional[int] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachPublisherRequest(_message.Message):
    __slots__ = ("open", "pid", "presence")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    open: PublishOpen
    pid: int
    presence: int
    def __init__(self, open: _Optional[_Union[PublishOpen, _Mapping]] = ..., pid: _Optional[int] = ..., presence: _Optional[int] = ...) -> None: ...

class AttachSubscriberRequest(_message.Message):
    __slots__ = ("subscribe", "pid", "presence")
    SUBSCRIBE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    subscribe: SubscribeRequest
    pid: int
    presence: int
    def __init__(self, subscribe: _Optional[_Union[SubscribeRequest, _Mapping]] = ..., pid: _Optional[int] = ..., presence: _Optional[int] = ...) -> None: ...

class Attachment(_message.Message):
    __slots__ = ("slot", "generation", "region", "run_id", "topic_number", "topic_generation", "index", "first_position", "end_position", "doorbell", "position", "created_ns")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TOPIC_NUMBER_FIELD_NUMBER: _ClassVar[int]
    TOPIC_GENERATION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    END_POSITION_FIELD_NUMBER: _ClassVar[int]
    DOORBELL_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    CREATED_NS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    generation: int
    region: str
    run_id: int
    topic_number: int
    topic_generation: int
    index: int
    first_position: int
    end_position: int
    doorbell: int
    position: int
    created_ns: int
    def __init__(self, slot: _Optional[int] = ..., generation: _Optional[int] = ..., region: _Optional[str] = ..., run_id: _Optional[int] = ..., topic_number: _Optional[int] = ..., topic_generation: _Optional[int] = ..., index: _Optional[int] = ..., first_position: _Optional[int] = ..., end_position: _Optional[int] = ..., doorbell: _Optional[int] = ..., position: _Optional[int] = ..., created_ns: _Optional[int] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("slot", "generation")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    slot: int
    generation: int
    def __init__(self, slot: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class DetachResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class JoinGroupRequest(_message.Message):
    __slots__ = ("topic", "group", "member", "holder", "protect", "beginning", "end", "position", "published_ns", "seen")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    PROTECT_FIELD_NUMBER: _ClassVar[int]
    BEGINNING_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_NS_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    group: str
    member: int
    holder: str
    protect: bool
    beginning: bool
    end: bool
    position: int
    published_ns: int
    seen: TopicIdentity
    def __init__(self, topic: _Optional[str] = ..., group: _Optional[str] = ..., member: _Optional[int] = ..., holder: _Optional[str] = ..., protect: _Optional[bool] = ..., beginning: _Optional[bool] = ..., end: _Optional[bool] = ..., position: _Optional[int] = ..., published_ns: _Optional[int] = ..., seen: _Optional[_Union[TopicIdentity, _Mapping]] = ...) -> None: ...

class GroupMembership(_message.Message):
    __slots__ = ("member_epoch", "position", "lease_ms", "topic")
    MEMBER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    member_epoch: int
    position: int
    lease_ms: int
    topic: TopicIdentity
    def __init__(self, member_epoch: _Optional[int] = ..., position: _Optional[int] = ..., lease_ms: _Optional[int] = ..., topic: _Optional[_Union[TopicIdentity, _Mapping]] = ...) -> None: ...

class CommitGroupRequest(_message.Message):
    __slots__ = ("topic", "group", "member", "member_epoch", "position", "seen")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    MEMBER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    group: str
    member: int
    member_epoch: int
    position: int
    seen: TopicIdentity
    def __init__(self, topic: _Optional[str] = ..., group: _Optional[str] = ..., member: _Optional[int] = ..., member_epoch: _Optional[int] = ..., position: _Optional[int] = ..., seen: _Optional[_Union[TopicIdentity, _Mapping]] = ...) -> None: ...

class LeaveGroupRequest(_message.Message):
    __slots__ = ("topic", "group", "member", "member_epoch", "seen")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    MEMBER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    group: str
    member: int
    member_epoch: int
    seen: TopicIdentity
    def __init__(self, topic: _Optional[str] = ..., group: _Optional[str] = ..., member: _Optional[int] = ..., member_epoch: _Optional[int] = ..., seen: _Optional[_Union[TopicIdentity, _Mapping]] = ...) -> None: ...

class LeaveGroupResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Group(_message.Message):
    __slots__ = ("topic", "name", "position", "first_position", "end_position", "protected", "holder", "lease_left_ms", "member_epoch", "committed_unix_ns", "lost_count")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    END_POSITION_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    MEMBER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    LOST_COUNT_FIELD_NUMBER: _ClassVar[int]
    topic: str
    name: str
    position: int
    first_position: int
    end_position: int
    protected: bool
    holder: str
    lease_left_ms: int
    member_epoch: int
    committed_unix_ns: int
    lost_count: int
    def __init__(self, topic: _Optional[str] = ..., name: _Optional[str] = ..., position: _Optional[int] = ..., first_position: _Optional[int] = ..., end_position: _Optional[int] = ..., protected: _Optional[bool] = ..., holder: _Optional[str] = ..., lease_left_ms: _Optional[int] = ..., member_epoch: _Optional[int] = ..., committed_unix_ns: _Optional[int] = ..., lost_count: _Optional[int] = ...) -> None: ...

class ListGroupsRequest(_message.Message):
    __slots__ = ("topic", "group")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    topic: str
    group: str
    def __init__(self, topic: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class ResetGroupRequest(_message.Message):
    __slots__ = ("topic", "group", "protection", "beginning", "end", "position", "published_ns")
    class Protection(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KEEP: _ClassVar[ResetGroupRequest.Protection]
        ON: _ClassVar[ResetGroupRequest.Protection]
        OFF: _ClassVar[ResetGroupRequest.Protection]
    KEEP: ResetGroupRequest.Protection
    ON: ResetGroupRequest.Protection
    OFF: ResetGroupRequest.Protection
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PROTECTION_FIELD_NUMBER: _ClassVar[int]
    BEGINNING_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_NS_FIELD_NUMBER: _ClassVar[int]
    topic: str
    group: str
    protection: ResetGroupRequest.Protection
    beginning: bool
    end: bool
    position: int
    published_ns: int
    def __init__(self, topic: _Optional[str] = ..., group: _Optional[str] = ..., protection: _Optional[_Union[ResetGroupRequest.Protection, str]] = ..., beginning: _Optional[bool] = ..., end: _Optional[bool] = ..., position: _Optional[int] = ..., published_ns: _Optional[int] = ...) -> None: ...

class DeleteGroupRequest(_message.Message):
    __slots__ = ("topic", "group")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    topic: str
    group: str
    def __init__(self, topic: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

class DeleteGroupResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BrokerDescription(_message.Message):
    __slots__ = ("id", "state", "tcp_address", "unix_address", "pid", "heartbeat_age_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TCP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    UNIX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    id: int
    state: str
    tcp_address: str
    unix_address: str
    pid: int
    heartbeat_age_ms: int
    def __init__(self, id: _Optional[int] = ..., state: _Optional[str] = ..., tcp_address: _Optional[str] = ..., unix_address: _Optional[str] = ..., pid: _Optional[int] = ..., heartbeat_age_ms: _Optional[int] = ...) -> None: ...

class ClusterDescription(_message.Message):
    __slots__ = ("name", "epoch", "head", "region_bytes", "message_bytes_max", "batch_bytes_max", "brokers", "host", "run_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    BATCH_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    BROKERS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    head: int
    region_bytes: int
    message_bytes_max: int
    batch_bytes_max: int
    brokers: _containers.RepeatedCompositeFieldContainer[BrokerDescription]
    host: str
    run_id: int
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., head: _Optional[int] = ..., region_bytes: _Optional[int] = ..., message_bytes_max: _Optional[int] = ..., batch_bytes_max: _Optional[int] = ..., brokers: _Optional[_Iterable[_Union[BrokerDescription, _Mapping]]] = ..., host: _Optional[str] = ..., run_id: _Optional[int] = ...) -> None: ...
