"""What a broker says to input that breaks the contract, spoken with grpc and sockets directly; and that nothing is lost.

Every test here leaves the cluster as it found it: a normal publisher works, and no session, cursor, ring slot, segment
or stream is held.
"""

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from broker.errors import DETAILS_KEY, ERROR_KEY, UnknownTopic
from broker.proto import cxlmq_pb2 as pb
from broker.publish_stream import OPEN_SECONDS, STREAMS_BEGINNING_MAX
from client import Admin, Publisher
from client.cluster import Cluster
from tests.end_to_end.library_support import (
    NOTHING,
    eventually,
    held,
    numbered,
    read_topic,
    segments_owned,
    settles_to_nothing,
)

SECONDS = 20.0
METHODS = {
    "Admin/CreateTopic": pb.Topic, "Admin/DeleteTopic": pb.DeleteTopicResponse,
    "Admin/ListTopics": pb.ListTopicsResponse, "Admin/DescribeTopic": pb.Topic, "Admin/OpenSession": pb.Session,
    "Admin/CloseSession": pb.CloseSessionResponse, "Admin/AttachPublisher": pb.Attachment,
    "Admin/AttachSubscriber": pb.Attachment, "Admin/Detach": pb.DetachResponse,
    "Cluster/Describe": pb.ClusterDescription, "Groups/Join": pb.GroupMembership,
    "Groups/Commit": pb.GroupMembership, "Groups/Leave": pb.LeaveGroupResponse, "Groups/List": pb.ListGroupsResponse,
    "Groups/Reset": pb.Group, "Groups/Delete": pb.DeleteGroupResponse,
}
GARBAGE = [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05ab", b"\x07", b"\x00" * 9]


class Raw:
    """A broker spoken to without the library."""

    def __init__(self, address: str, topic: str) -> None:
        self.topic = topic
        self.channel = grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
        self.session = pb.Session()

    def unary(self, method: str, request: bytes) -> Any:
        """Call a method with these bytes."""
        call = self.channel.unary_unary(f"/cxlmq.v1.{method}", None, METHODS[method].FromString)
        return call(request, timeout=SECONDS)

    def open_session(self, client_id: int = 5, epoch: int = 1) -> pb.Session:
        """A session to misuse."""
        self.session = self.unary("Admin/OpenSession", pb.OpenSessionRequest(
            topic=self.topic, client_id=client_id, session_epoch=epoch, ack=1).SerializeToString())
        return self.session

    def open(self, **changed: Any) -> bytes:
        """The first message of a stream, right but for what is changed."""
        values = {"topic": self.topic, "client_id": 5, "session_slot": self.session.session_slot,
                  "session_epoch": 1, "ack": 1, **changed}
        return pb.PublishRequest(open=pb.PublishOpen(**values)).SerializeToString()

    def publish(self, *frames: bytes) -> list[pb.PublishResponse]:
        """Send these messages, close, and take all answers."""
        call = self.channel.stream_stream("/cxlmq.v1.PubSub/Publish", None, pb.PublishResponse.FromString)
        return list(call(iter(frames), timeout=SECONDS))

    def subscribe(self, request: bytes) -> Any:
        """A running subscription."""
        return self.channel.unary_stream("/cxlmq.v1.PubSub/Subscribe", None, pb.SubscribeResponse.FromString)(
            request, timeout=SECONDS)


def framed(messages: list[bytes]) -> bytes:
    """Messages as a payload."""
    return b"".join(struct.pack("<II", len(each), (len(each) * 2654435761 & 0xFFFFFFFF) ^ 0x5C4D514C) + each
                    + bytes(-len(each) % 8) for each in messages)


def batch(sequence: int = 0, messages: list[bytes] | None = None, **changed: Any) -> bytes:
    """A batch, right but for what is changed."""
    payload = framed(messages or [b"m"])
    return pb.PublishRequest(**{"batch_sequence": sequence, "message_count": len(messages or [b"m"]),
                                "payload": payload, **changed}).SerializeToString()


@pytest.fixture
def made(cluster: Cluster, topic: str) -> Iterator[str]:
    """A topic; afterwards everything is as it was, and publishing still works."""
    assert settles_to_nothing(cluster.name)
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
        yield topic
        with pytest.raises(UnknownTopic):
            admin.describe_topic(f"{topic}-never")
        if topic not in [each["name"] for each in admin.list_topics()]:
            admin.create_topic(topic)
        before = admin.describe_topic(topic)["end_position"]
        with Publisher(topic, cluster=cluster.name, batch_bytes=100) as publisher:
            deliveries = [publisher.publish(message) for message in numbered(20, tag="good")]
            assert [each.result(20).position for each in deliveries] == list(range(before, before + 20))
        assert read_topic(cluster.name, topic)[-20:] == numbered(20, tag="good")
        assert settles_to_nothing(cluster.name), f"still held: {held(cluster.name)}"
        admin.delete_topic(topic)
        assert eventually(lambda: segments_owned(cluster.name) == 0), "every segment comes back"


@pytest.fixture
def raw(cluster: Cluster, made: str) -> Iterator[Raw]:
    """Broker 1, with an open session."""
    speaker = Raw(cluster.addresses[1].tcp, made)
    speaker.open_session()
    yield speaker
    speaker.unary("Admin/CloseSession", pb.CloseSessionRequest(
        client_id=5, session_slot=speaker.session.session_slot, session_epoch=1).SerializeToString())
    speaker.channel.close()


def refused(call: Callable[[], Any], status: str, code: str) -> dict[str, Any]:
    """A call fails with this status and this cxlmq-error; its details."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error: Any = raised.value
    trailers = dict(error.trailing_metadata() or ())
    assert (error.code().name, trailers.get(ERROR_KEY)) == (status, code), error.details()
    assert error.details(), "people get a message as well"
    return dict(json.loads(trailers[DETAILS_KEY]))


def length_of(cluster: Cluster, topic: str) -> int:
    """Messages in a topic."""
    with Admin(cluster=cluster.name) as admin:
        return int(admin.describe_topic(topic)["end_position"])


# ---- publish ---------------------------------------------------------------------------------------------------------


def test_a_right_stream_is_taken(raw: Raw, cluster: Cluster) -> None:
    """What the other tests change, unchanged: half-closed after the last batch, it gets all its acks and OK."""
    answers = raw.publish(raw.open(), batch(0), batch(1, [b"", b"two"]))
    acks = [pair for answer in answers for pair in zip(answer.batch_sequences, answer.positions, answer.statuses,
                                                       strict=True)]
    assert acks == [(0, 0, pb.COMMITTED), (1, 1, pb.COMMITTED)]
    assert read_topic(cluster.name, raw.topic) == [b"m", b"", b"two"]
    assert raw.publish() == raw.publish(raw.open()) == [], "nothing sent, nothing answered"


def test_open_and_the_first_batch_may_be_one_message(raw: Raw, cluster: Cluster) -> None:
    assert [list(each.positions) for each in raw.publish(raw.open() + batch(0))] == [[0]]


@pytest.mark.parametrize("first", [b"", batch(0), *GARBAGE], ids=repr)
def test_a_stream_begins_with_open(raw: Raw, first: bytes) -> None:
    refused(lambda: raw.publish(first), "INVALID_ARGUMENT", "bad-batch")


def test_streams_that_never_begin_are_few_and_soon_ended(raw: Raw, cluster: Cluster) -> None:
    silent = threading.Event()

    def nothing() -> Iterator[bytes]:
        silent.wait(4 * OPEN_SECONDS)
        yield from ()

    call = raw.channel.stream_stream("/cxlmq.v1.PubSub/Publish", None, pb.PublishResponse.FromString)
    streams = [call(nothing(), timeout=SECONDS) for _ in range(STREAMS_BEGINNING_MAX + 20)]
    try:
        ended = Counter(dict(each.trailing_metadata())[ERROR_KEY] for each in streams)      # which waits for its end
        assert ended == {"stream-table-full": 20, "bad-batch": STREAMS_BEGINNING_MAX}
        assert [each for answer in raw.publish(raw.open(), batch()) for each in answer.batch_sequences] == [0]
    finally:
        silent.set()


@pytest.mark.parametrize("inner", [b"\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"])
def test_open_has_to_be_one(raw: Raw, inner: bytes) -> None:
    refused(lambda: raw.publish(b"\x0a" + bytes([len(inner)]) + inner), "INVALID_ARGUMENT", "bad-batch")


@pytest.mark.parametrize(("changed", "status", "code"), [
    ({"topic": "never-made"}, "NOT_FOUND", "unknown-topic"),
    ({"topic": ""}, "INVALID_ARGUMENT", "bad-topic-name"),
    ({"topic": "../etc"}, "INVALID_ARGUMENT", "bad-topic-name"),
    ({"client_id": 6}, "NOT_FOUND", "session-unknown"),
    ({"session_epoch": 2}, "NOT_FOUND", "session-unknown"),
    ({"session_epoch": 0}, "NOT_FOUND", "session-unknown"),
    ({"session_slot": 0xFFFFFFFF}, "NOT_FOUND", "session-unknown"),
    ({"session_slot": 127}, "NOT_FOUND", "session-unknown"),
    ({"ack": 2}, "INVALID_ARGUMENT", "bad-topic-options"),
    ({"ack": 7}, "INVALID_ARGUMENT", "bad-topic-options"),
], ids=str)
def test_open_has_to_name_what_exists(raw: Raw, changed: dict[str, Any], status: str, code: str) -> None:
    refused(lambda: raw.publish(raw.open(**changed), batch(0)), status, code)


def test_a_session_belongs_to_its_topic(raw: Raw, cluster: Cluster) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(f"{raw.topic}-2")
        refused(lambda: raw.publish(raw.open(topic=f"{raw.topic}-2"), batch(0)), "NOT_FOUND", "session-unknown")
        assert length_of(cluster, f"{raw.topic}-2") == 0
        admin.delete_topic(f"{raw.topic}-2")


def test_a_publisher_needs_a_number(raw: Raw) -> None:
    # 0 stands for nobody in the region: a broker that starts again would take a slot of it for a reader's.
    details = refused(lambda: raw.unary("Admin/OpenSession", pb.OpenSessionRequest(
        topic=raw.topic, session_epoch=1, ack=1).SerializeToString()), "INVALID_ARGUMENT", "bad-request")
    assert "client_id" in details["reason"]


def test_a_fenced_session_is_told_so(raw: Raw) -> None:
    newer = raw.unary("Admin/OpenSession", pb.OpenSessionRequest(
        topic=raw.topic, client_id=5, session_epoch=9, ack=1).SerializeToString())
    try:
        details = refused(lambda: raw.publish(raw.open(), batch(0)), "ABORTED", "session-fenced")
        assert details["committed"] == 0
        details = refused(lambda: raw.unary("Admin/OpenSession", pb.OpenSessionRequest(
            topic=raw.topic, client_id=5, session_epoch=9, ack=1).SerializeToString()), "ABORTED", "session-fenced")
        assert details["newest_epoch"] == 9
    finally:
        raw.unary("Admin/CloseSession", pb.CloseSessionRequest(
            client_id=5, session_slot=newer.session_slot, session_epoch=9).SerializeToString())


MALFORMED = {
    "garbage": b"\xff\xff\xff",
    "empty": b"",
    "no payload": pb.PublishRequest(batch_sequence=0, message_count=1).SerializeToString(),
    "cut in the payload": batch(0, [b"x" * 100])[:-1],
    "cut in a number": batch(0)[:5],
    "count 0": batch(0, message_count=0),
    "count too small": batch(0, [b"a", b"b"], message_count=1),
    "count too large": batch(0, [b"a", b"b"], message_count=3),
    "count huge": batch(0, [b"a"], message_count=0xFFFFFFFF),
    "empty payload": batch(0, payload=b""),
    "half a header": batch(0, payload=b"1234"),
    "size without its check": batch(0, payload=struct.pack("<II", 1, 0) + bytes(8)),
    "size beyond the payload": batch(0, payload=framed([b"x" * 64])[:-8]),
    "size near the end of numbers": batch(
        0, payload=struct.pack("<II", 0xFFFFFFFF, (0xFFFFFFFF * 2654435761 & 0xFFFFFFFF) ^ 0x5C4D514C)),
    "bytes behind the last message": batch(0, payload=framed([b"m"]) + bytes(8)),
    "a field of a kind that does not exist": batch(0) + b"\x0e\x00",
    "field number 0": batch(0) + b"\x00\x00",
}


@pytest.mark.parametrize("frame", [
    pytest.param(frame, id=name) for name, frame in MALFORMED.items()])
def test_a_malformed_batch_is_refused_whole(raw: Raw, cluster: Cluster, frame: bytes) -> None:
    # What came before it is in the log; of itself and what came after, nothing is.
    code = "message-too-big" if frame == MALFORMED["size near the end of numbers"] else "bad-batch"
    refused(lambda: raw.publish(raw.open(), batch(0), frame, batch(1)), "INVALID_ARGUMENT", code)
    assert eventually(lambda: length_of(cluster, raw.topic) == 1)
    assert read_topic(cluster.name, raw.topic) == [b"m"]
    # The session goes on with a new stream.
    assert [list(each.statuses) for each in raw.publish(raw.open(), batch(1))] == [[pb.COMMITTED]]


def test_fields_of_a_later_version_are_passed_over(raw: Raw) -> None:
    later = b"\xa0\x06\x05" + b"\xa2\x06\x03abc" + b"\xa5\x06\x01\x02\x03\x04" + b"\xa1\x06" + bytes(8)
    assert [list(each.positions) for each in raw.publish(raw.open() + later, later + batch(0) + later)] == [[0]]


def test_messages_that_are_too_big(raw: Raw, cluster: Cluster) -> None:
    largest = raw.session.message_bytes_max
    details = refused(lambda: raw.publish(raw.open(), batch(0, [bytes(largest + 1)])),
                      "INVALID_ARGUMENT", "message-too-big")
    assert details["message_bytes_max"] == largest
    refused(lambda: raw.publish(raw.open(), batch(0, [bytes(raw.session.batch_bytes_max // 2)] * 2)),
            "INVALID_ARGUMENT", "message-too-big")
    # Beyond what gRPC itself takes, it is gRPC that says so.
    with pytest.raises(grpc.RpcError) as raised:
        raw.publish(raw.open(), bytes(raw.session.batch_bytes_max + (4 << 20)))
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    assert length_of(cluster, raw.topic) == 0


def test_the_same_batch_again_is_a_duplicate_on_any_broker(raw: Raw, cluster: Cluster) -> None:
    other = Raw(cluster.addresses[2].unix, raw.topic)
    other.session = raw.session
    assert [list(each.statuses) for each in raw.publish(raw.open(), batch(0))] == [[pb.COMMITTED]]
    for speaker in (raw, other, raw):
        assert [list(each.statuses) for each in speaker.publish(speaker.open(), batch(0))] == [[pb.DUPLICATE]]
    assert read_topic(cluster.name, raw.topic) == [b"m"]
    other.channel.close()


def test_a_sequence_beyond_the_window_is_refused_and_may_come_later(raw: Raw, cluster: Cluster) -> None:
    far = raw.session.window + 5
    assert [list(each.statuses) for each in raw.publish(raw.open(), batch(far))] == [[pb.REFUSED]]
    sequences = [each for answer in raw.publish(raw.open(), *(batch(number) for number in range(far + 1)))
                 for each in answer.batch_sequences]
    assert sorted(sequences) == list(range(far + 1))
    assert length_of(cluster, raw.topic) == far + 1


def test_a_gap_holds_only_its_own_session(raw: Raw, cluster: Cluster) -> None:
    requests: list[bytes] = [raw.open(), batch(3), batch(1)]
    call = raw.channel.stream_stream("/cxlmq.v1.PubSub/Publish", None, pb.PublishResponse.FromString)
    answers = call(iter(requests), timeout=SECONDS)
    with Publisher(raw.topic, cluster=cluster.name) as publisher:
        assert publisher.publish(b"other").result(20).position == 0
    assert read_topic(cluster.name, raw.topic) == [b"other"]
    # The gap is filled through another stream: both get their answers.
    raw.publish(raw.open(), batch(0, [b"0"]), batch(2, [b"2"]))
    assert sorted(each for answer in answers for each in answer.batch_sequences) == [1, 3]
    assert read_topic(cluster.name, raw.topic) == [b"other", b"0", b"m", b"2", b"m"]


def test_a_topic_deleted_under_a_stream_ends_it(raw: Raw, cluster: Cluster) -> None:
    send: list[bytes] = [raw.open(), batch(0)]
    more = iter_until_told(send)
    call = raw.channel.stream_stream("/cxlmq.v1.PubSub/Publish", None, pb.PublishResponse.FromString)
    answers = call(more, timeout=SECONDS)
    assert list(next(answers).positions) == [0]
    with Admin(cluster=cluster.name) as admin:
        admin.delete_topic(raw.topic)
        admin.create_topic(f"{raw.topic}-next")     # takes the same place in the table
        refused(lambda: next(answers), "NOT_FOUND", "unknown-topic")
        assert length_of(cluster, f"{raw.topic}-next") == 0
        admin.delete_topic(f"{raw.topic}-next")
    more.close()


def test_a_stream_of_a_deleted_topic_cannot_reach_the_next_one(raw: Raw, cluster: Cluster) -> None:
    # Batches without pause: one of them always comes between deletion and creation, and right after both.
    call = raw.channel.stream_stream("/cxlmq.v1.PubSub/Publish", None, pb.PublishResponse.FromString)
    running = True

    def without_pause() -> Iterator[bytes]:
        yield raw.open()
        sequence = 0
        while running:
            yield batch(sequence, [b"of the old topic"])
            sequence += 1

    answers = call(without_pause(), timeout=SECONDS)
    next(answers)
    with Admin(cluster=cluster.name) as admin:
        admin.delete_topic(raw.topic)
        admin.create_topic(f"{raw.topic}-next")
        refused(lambda: list(answers), "NOT_FOUND", "unknown-topic")
        running = False
        assert length_of(cluster, f"{raw.topic}-next") == 0
        admin.delete_topic(f"{raw.topic}-next")


class iter_until_told(Iterator[bytes]):
    """Requests that do not end by themselves."""

    def __init__(self, requests: list[bytes]) -> None:
        import queue

        self._queue: Any = queue.SimpleQueue()
        for request in requests:
            self._queue.put(request)

    def __next__(self) -> bytes:
        request = self._queue.get()
        if request is None:
            raise StopIteration
        return bytes(request)

    def close(self) -> None:
        """No more requests."""
        self._queue.put(None)


# ---- connections that break ------------------------------------------------------------------------------------------


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: str, value: str) -> bytes:
    """A header, spelled out."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Wire:
    """A gRPC call made of bytes, so that it can end anywhere."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), SECONDS)
        headers = b"".join(literal(*each) for each in (
            (":method", "POST"), (":scheme", "http"), (":path", "/cxlmq.v1.PubSub/Publish"), (":authority", "x"),
            ("te", "trailers"), ("content-type", "application/grpc")))
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, headers))

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.socket.sendall(data)

    def message(self, data: bytes, sent: int | None = None) -> None:
        """One gRPC message, or the beginning of one."""
        whole = b"\x00" + len(data).to_bytes(4, "big") + data
        self.send(frame(0, 0, 1, whole[:sent]))


@pytest.mark.parametrize("sent", [0, 1, 5, 6, 40, 5000])
@pytest.mark.parametrize("how", ["close", "reset stream", "garbage"])
def test_a_stream_that_breaks_in_mid_batch_leaves_nothing(raw: Raw, cluster: Cluster, sent: int, how: str) -> None:
    wire = Wire(cluster.addresses[1].tcp)
    wire.message(raw.open())
    wire.message(batch(0, [b"whole"]))
    wire.message(batch(1, [b"x" * 10_000]), sent)
    assert eventually(lambda: length_of(cluster, raw.topic) == 1), "the batch before it is in the log"
    if how == "reset stream":
        wire.send(frame(3, 0, 1, (8).to_bytes(4, "big")))
    elif how == "garbage":
        wire.send(b"\xff" * 100)
    wire.socket.close()
    assert [list(each.statuses) for each in raw.publish(raw.open(), batch(1, [b"again"]))] == [[pb.COMMITTED]]
    assert read_topic(cluster.name, raw.topic) == [b"whole", b"again"]


def test_a_connection_of_garbage_harms_nobody(raw: Raw, cluster: Cluster) -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 1000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100, b""):
        with socket.create_connection(cluster.addresses[1].tcp.rsplit(":", 1), SECONDS) as connection:
            connection.sendall(data)


def test_a_cancelled_stream_gives_everything_back(raw: Raw, cluster: Cluster) -> None:
    for number in range(20):
        requests = iter_until_told([raw.open(), batch(number)])
        call = raw.channel.stream_stream("/cxlmq.v1.PubSub/Publish", None, pb.PublishResponse.FromString)
        answers = call(requests, timeout=SECONDS)
        assert list(next(answers).positions) == [number]
        answers.cancel()
        requests.close()


def test_a_publisher_that_does_not_read_its_acks_stops_nobody(raw: Raw, cluster: Cluster) -> None:
    requests = iter_until_told([raw.open(), *(batch(number) for number in range(2000))])
    call = raw.channel.stream_stream("/cxlmq.v1.PubSub/Publish", None, pb.PublishResponse.FromString)
    answers = call(requests, timeout=SECONDS)
    with Publisher(raw.topic, cluster=cluster.name) as publisher:
        assert publisher.publish(b"m").result(20).position is not None
    assert eventually(lambda: length_of(cluster, raw.topic) == 2001)
    requests.close()
    assert sorted(each for answer in answers for each in answer.batch_sequences) == list(range(2000))


# ---- subscribe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("request_bytes", "status", "code"), [
    *((garbage, "INVALID_ARGUMENT", "bad-request") for garbage in GARBAGE[:3]),
    (b"", "INVALID_ARGUMENT", "bad-topic-name"),
    (pb.SubscribeRequest(topic="never-made").SerializeToString(), "NOT_FOUND", "unknown-topic"),
    (pb.SubscribeRequest(topic=".").SerializeToString(), "INVALID_ARGUMENT", "bad-topic-name"),
], ids=repr)
def test_a_subscription_to_nothing_is_refused(raw: Raw, request_bytes: bytes, status: str, code: str) -> None:
    refused(lambda: list(raw.subscribe(request_bytes)), status, code)


def test_nobody_reads_for_a_group_that_is_not_there_or_was_not_joined(raw: Raw) -> None:
    for name in ("x", "x" * 10_000, "ä" * 40):
        request = pb.SubscribeRequest(topic=raw.topic, group=name, member=1, member_epoch=1).SerializeToString()
        refused(lambda request=request: list(raw.subscribe(request)), "NOT_FOUND", "unknown-group")


def test_subscriptions_cancelled_at_once_keep_no_cursor(raw: Raw, cluster: Cluster) -> None:
    for _ in range(100):
        raw.subscribe(pb.SubscribeRequest(topic=raw.topic).SerializeToString()).cancel()
    assert eventually(lambda: held(cluster.name)["cursors"] == [])


def test_more_readers_than_places_are_refused_with_what_to_do(raw: Raw, cluster: Cluster) -> None:
    calls = []
    try:
        for _ in range(cluster.config.cursor_count_max // 4):
            calls.append(raw.subscribe(pb.SubscribeRequest(topic=raw.topic).SerializeToString()))
            calls[-1].initial_metadata()
        details = refused(lambda: list(raw.subscribe(pb.SubscribeRequest(topic=raw.topic).SerializeToString())),
                          "RESOURCE_EXHAUSTED", "cursor-table-full")
        assert details["broker"] == 1
    finally:
        for call in calls:
            call.cancel()


def test_a_reader_that_does_not_read_stops_nobody(raw: Raw, cluster: Cluster) -> None:
    slow = raw.subscribe(pb.SubscribeRequest(topic=raw.topic).SerializeToString())
    slow.initial_metadata()
    messages = numbered(200, 60_000)
    with Publisher(raw.topic, cluster=cluster.name) as publisher:
        publisher.publish_many(messages)
        publisher.flush()
        assert publisher.statistics()["failed"] == 0
    assert read_topic(cluster.name, raw.topic, broker=1) == messages
    slow.cancel()


@pytest.mark.parametrize("frame_bytes", [0, 1, 1000, 0xFFFFFFFF])
def test_any_wanted_frame_size_works(raw: Raw, cluster: Cluster, frame_bytes: int) -> None:
    messages = numbered(50, 10_000)
    with Publisher(raw.topic, cluster=cluster.name, batch_bytes=30_000) as publisher:
        publisher.publish_many(messages)
    call = raw.subscribe(pb.SubscribeRequest(topic=raw.topic, frame_bytes=frame_bytes).SerializeToString())
    count = 0
    for response in call:
        count += sum(each.message_count for each in response.batches)
        if count == 50:
            break
    call.cancel()


# ---- admin -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(set(METHODS)))
def test_garbage_gets_a_typed_answer_from_every_method(raw: Raw, method: str) -> None:
    for garbage in GARBAGE[:3]:
        refused(lambda garbage=garbage: raw.unary(method, garbage), "INVALID_ARGUMENT", "bad-request")


def test_a_method_that_does_not_exist(raw: Raw) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        raw.channel.unary_unary("/cxlmq.v1.Admin/Explode")(b"", timeout=SECONDS)
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


@pytest.mark.parametrize("broker", [0, 1], ids=["head", "another broker"])
@pytest.mark.parametrize(("wrong", "code"), [
    ({"name": "a/b"}, "bad-topic-name"), ({"name": ""}, "bad-topic-name"), ({"order": 3}, "bad-topic-options"),
    ({"ack": 2}, "bad-topic-options"), ({"ack": 3}, "bad-topic-options"),
    ({"ack": 2, "replication_factor": 5}, "bad-topic-options"), ({"replication_factor": 0}, "bad-topic-options"),
    ({"retention_bytes": -5}, "bad-topic-options"),
], ids=str)
def test_a_wrong_topic_is_refused_at_creation(cluster: Cluster, made: str, broker: int, wrong: dict[str, Any],
                                              code: str) -> None:
    speaker = Raw(cluster.addresses[broker].tcp, made)
    request = pb.CreateTopicRequest(**{"name": f"{made}-x", "order": 5, "ack": 1, "replication_factor": 1, **wrong})
    refused(lambda: speaker.unary("Admin/CreateTopic", request.SerializeToString()), "INVALID_ARGUMENT", code)
    with Admin(cluster=cluster.name) as admin:
        assert [each["name"] for each in admin.list_topics()] == [made]
    speaker.channel.close()


@pytest.mark.parametrize("broker", [0, 1], ids=["head", "another broker"])
def test_topics_that_exist_and_that_do_not(cluster: Cluster, made: str, broker: int) -> None:
    speaker = Raw(cluster.addresses[broker].tcp, made)
    again = pb.CreateTopicRequest(name=made, order=4, ack=1, replication_factor=1).SerializeToString()
    refused(lambda: speaker.unary("Admin/CreateTopic", again), "ALREADY_EXISTS", "duplicate-topic")
    never = pb.DeleteTopicRequest(name="never-made").SerializeToString()
    refused(lambda: speaker.unary("Admin/DeleteTopic", never), "NOT_FOUND", "unknown-topic")
    other = pb.CreateTopicRequest(name=f"{made}-x", order=4, ack=1, replication_factor=1).SerializeToString()
    assert speaker.unary("Admin/CreateTopic", other).order == 5
    speaker.unary("Admin/DeleteTopic", pb.DeleteTopicRequest(name=f"{made}-x").SerializeToString())
    speaker.channel.close()


def test_sessions_that_are_not_there_are_closed_without_harm(raw: Raw) -> None:
    for slot, client, epoch in ((0, 1, 1), (0xFFFFFFFF, 5, 1), (raw.session.session_slot, 6, 1),
                                (raw.session.session_slot, 5, 2)):
        raw.unary("Admin/CloseSession", pb.CloseSessionRequest(
            client_id=client, session_slot=slot, session_epoch=epoch).SerializeToString())
    assert [list(each.positions) for each in raw.publish(raw.open(), batch(0))] == [[0]]


def test_an_old_session_is_told_in_time_however_long_it_was(raw: Raw) -> None:
    # Only the batches that may be unsettled are looked up: not the many that somebody's earlier life has published.
    for first in range(0, 3000, 100):
        raw.publish(raw.open(), *(batch(number) for number in range(first, first + 100)))
    for resume_from, resume_epoch in ((0, 0), (0, 1), (2990, 1), (1 << 63, 1), (0, 77)):
        session = raw.unary("Admin/OpenSession", pb.OpenSessionRequest(
            topic=raw.topic, client_id=5, session_epoch=2 + resume_epoch + resume_from % 1000, ack=1,
            resume_from=resume_from, resume_epoch=resume_epoch).SerializeToString())
        assert len(session.positions) <= session.window
        if resume_epoch == 1:
            assert session.high_water == 3000
            assert list(session.positions) == list(range(resume_from, min(3000, resume_from + 256)))
        raw.unary("Admin/CloseSession", pb.CloseSessionRequest(
            client_id=5, session_slot=session.session_slot, session_epoch=session.session_epoch).SerializeToString())


def test_more_sessions_than_places_are_refused_with_what_to_do(raw: Raw, cluster: Cluster) -> None:
    opened = []
    try:
        def fill() -> None:
            for number in range(cluster.config.session_count_max):
                opened.append((100 + number, raw.unary("Admin/OpenSession", pb.OpenSessionRequest(
                    topic=raw.topic, client_id=100 + number, session_epoch=1, ack=1).SerializeToString())))

        details = refused(fill, "RESOURCE_EXHAUSTED", "session-table-full")
        assert details["session_count"] == cluster.config.session_count_max // 4
    finally:
        for client, session in opened:
            raw.unary("Admin/CloseSession", pb.CloseSessionRequest(
                client_id=client, session_slot=session.session_slot, session_epoch=1).SerializeToString())


# ---- what gRPC users expect --------------------------------------------------------------------------------------------


def test_health_answers_for_every_service(cluster: Cluster) -> None:
    for broker in range(4):
        with grpc.insecure_channel(cluster.addresses[broker].tcp) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "cxlmq.v1.PubSub", "cxlmq.v1.Admin", "cxlmq.v1.Cluster"):
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as raised:
                stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=SECONDS)
            assert raised.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_reflection_tells_the_contract(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.addresses[2].tcp) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(stub.ServerReflectionInfo(iter([asked]), timeout=SECONDS))
        services = {each.name for each in answer.list_services_response.service}
        assert {"cxlmq.v1.PubSub", "cxlmq.v1.Admin", "cxlmq.v1.Cluster", "grpc.health.v1.Health"} <= services
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="cxlmq.v1.PubSub")
        answer = next(stub.ServerReflectionInfo(iter([asked]), timeout=SECONDS))
        assert b"PublishRequest" in answer.file_descriptor_response.file_descriptor_proto[0]


def test_the_region_holds_nothing_in_the_end(cluster: Cluster) -> None:
    assert settles_to_nothing(cluster.name)
    assert held(cluster.name) == NOTHING
