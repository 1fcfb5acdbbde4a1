"""Seeded garbage on every gRPC method: each call ends with a status that means something, no broker falls, nothing leaks.

A failure names its seed; `pytest tests/end_to_end/test_fuzz_grpc.py --fuzz-seeds 7:8` replays it, `--fuzz-seeds 0:1000` looks
for longer.
"""

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field

from broker.errors import CxlmqError
from broker.proto import cxlmq_pb2 as pb
from broker.security import Security
from client import Admin, Publisher
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config, traces
from tests.end_to_end.library_support import eventually, held, numbered, read_topic, segments_owned
from tests.end_to_end.test_bad_input import batch, frame, literal

ROUNDS = 120                            # calls of one seed
SECONDS = 20.0
TOPICS = ("fuzz", "fuzz-2")
# Connections that this process keeps for a moment, and threads that a pool has started meanwhile and keeps.
FILES_SLACK, THREADS_SLACK = 6, 12
# What garbage may be answered with. INTERNAL and UNKNOWN are not among them: they mean that somebody did not think of it.
STATUSES = {
    "OK", "CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "UNAUTHENTICATED", "DATA_LOSS"}
UNARY = {
    "Admin/CreateTopic": pb.CreateTopicRequest, "Admin/DeleteTopic": pb.DeleteTopicRequest,
    "Admin/ListTopics": pb.ListTopicsRequest, "Admin/DescribeTopic": pb.DescribeTopicRequest,
    "Admin/OpenSession": pb.OpenSessionRequest, "Admin/CloseSession": pb.CloseSessionRequest,
    "Admin/AttachPublisher": pb.AttachPublisherRequest, "Admin/AttachSubscriber": pb.AttachSubscriberRequest,
    "Admin/Detach": pb.DetachRequest, "Cluster/Describe": pb.DescribeClusterRequest,
    "Groups/Join": pb.JoinGroupRequest, "Groups/Commit": pb.CommitGroupRequest, "Groups/Leave": pb.LeaveGroupRequest,
    "Groups/List": pb.ListGroupsRequest, "Groups/Reset": pb.ResetGroupRequest, "Groups/Delete": pb.DeleteGroupRequest,
}
OTHERS = ("/cxlmq.v2.Admin/ListTopics", "/cxlmq.v1.Admin/Nothing", "/cxlmq.v1.PubSub", "//", "/grpc.health.v1.Health/Check",
          "/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")


class Fuzzer:
    """Makes requests that are nearly right, from one seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.sessions: list[pb.Session] = []
        self.memberships: list[int] = [1]

    def number(self, bits: int) -> int:
        """A number, rather one on an edge."""
        choice = self.dice.random()
        if choice < 0.5:
            return self.dice.choice((0, 1, 2, 3, 5, 7, 100))
        if choice < 0.7:
            edge = 1 << self.dice.choice((7, 8, 15, 16, 31, 32, 48, 62, 63, 64))
            return max(0, min(edge + self.dice.choice((-1, 0, 1)), (1 << bits) - 1))
        return self.dice.getrandbits(bits)

    def text(self, name: str) -> str:
        """A name, rather one that is there."""
        if self.dice.random() < 0.75:
            return {"group": self.dice.choice(("g", "h")), "holder": "me"}.get(name, self.dice.choice(TOPICS))
        return self.dice.choice(("", "x", "a/b", ".", "\0", "ä" * 40, "x" * 63, "x" * 200, "y" * 9000, "fuzz\n", "*", "broker-0"))

    def fill(self, message: Any, depth: int = 0) -> Any:
        """Set some fields of a message to something."""
        for field in message.DESCRIPTOR.fields:
            if self.dice.random() < 0.2:
                continue
            name = field.name
            if field.cpp_type == Field.CPPTYPE_MESSAGE and field.is_repeated:
                for _ in range(self.dice.randrange(6)):
                    self.fill(getattr(message, name).add(), depth + 1)
            elif field.cpp_type == Field.CPPTYPE_MESSAGE:
                self.fill(getattr(message, name), depth + 1)
            elif field.cpp_type == Field.CPPTYPE_STRING:
                setattr(message, name, self.text(name) if field.type == Field.TYPE_STRING else self.noise(200))
            elif field.cpp_type == Field.CPPTYPE_BOOL:
                setattr(message, name, self.dice.random() < 0.5)
            elif field.cpp_type == Field.CPPTYPE_ENUM:
                setattr(message, name, self.dice.choice((0, 1, 2, 99)))
            else:
                self.set_number(message, name, field.cpp_type)
        return message

    def set_number(self, message: Any, name: str, kind: int) -> None:
        bits = {Field.CPPTYPE_UINT32: 32, Field.CPPTYPE_INT32: 31, Field.CPPTYPE_INT64: 63}.get(kind, 64)
        known = self.dice.random() < 0.6
        if name in ("session_slot", "session_epoch") and known and self.sessions:
            value = getattr(self.dice.choice(self.sessions), name)
        elif name in ("order", "ack", "replication_factor") and known:
            value = self.dice.choice({"order": (0, 1, 2, 4, 5), "ack": (0, 1), "replication_factor": (1, 2)}[name])
        elif name in ("client_id", "member", "member_epoch") and known:
            value = self.dice.randint(1, 3)
        elif name == "pid" and known:
            value = os.getpid()
        else:
            value = self.number(bits)
        setattr(message, name, -value if kind == Field.CPPTYPE_INT64 and self.dice.random() < 0.3 else value)

    def noise(self, most: int) -> bytes:
        return self.dice.randbytes(self.dice.randrange(most))

    def damage(self, data: bytes) -> bytes:
        """Perhaps break an encoded message."""
        choice = self.dice.random()
        if choice < 0.55:
            return data
        at = self.dice.randrange(len(data) + 1)
        if choice < 0.65 and data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << self.dice.randrange(8)]) + data[at + 1:]
        if choice < 0.75:
            return data[:at]
        if choice < 0.85:
            return data[:at] + self.noise(20) + data[at:]
        if choice < 0.95:
            return data + data
        return self.noise(5000)

    def metadata(self) -> list[tuple[str, str | bytes]]:
        """Now and then something that a server may look at."""
        choice = self.dice.random()
        if choice < 0.7:
            return []
        return [self.dice.choice((
            ("authorization", "Bearer " + "x" * self.dice.randrange(3000)), ("authorization", "Basic eDp4"),
            ("grpc-encoding", "gzip"), ("x-bin", self.noise(100)), ("cxlmq-error", "internal"), ("te", "x")))]

    def stream(self) -> list[bytes]:
        """Messages of a publish stream."""
        opened = pb.PublishRequest(open=self.fill(pb.PublishOpen()))
        if self.sessions and self.dice.random() < 0.7:
            session = self.dice.choice(self.sessions)
            opened.open.topic, opened.open.client_id, opened.open.ack = TOPICS[0], 1, 1
            opened.open.session_slot, opened.open.session_epoch = session.session_slot, session.session_epoch
        batches = [batch(self.number(64) if self.dice.random() < 0.3 else each, [self.noise(300) or b"m"])
                   for each in range(self.dice.randrange(6))]
        return [self.damage(each) for each in (opened.SerializeToString(), *batches)]


def refused_well(error: Any, what: str) -> None:
    status = error.code().name
    assert status in STATUSES, f"{what} was answered with {status}: {error.details()}"


def call_unary(fuzzer: Fuzzer, channel: grpc.Channel, slow_ok: bool = False) -> None:
    method = fuzzer.dice.choice(list(UNARY))
    request = fuzzer.fill(UNARY[method]())
    data = fuzzer.damage(request.SerializeToString())
    try:
        answer = channel.unary_unary(f"/cxlmq.v1.{method}")(data, timeout=SECONDS, metadata=fuzzer.metadata())
    except grpc.RpcError as error:
        refused_well(error, f"{method} with {data!r} ({request})")
        return
    if method == "Admin/OpenSession":
        fuzzer.sessions.append(pb.Session.FromString(answer))


def call_other(fuzzer: Fuzzer, channel: grpc.Channel) -> None:
    """Methods that are not there, or called in another way than they are meant."""
    method = fuzzer.dice.choice([*OTHERS, *(f"/cxlmq.v1.{each}" for each in UNARY), "/cxlmq.v1.PubSub/Subscribe"])
    call = channel.stream_stream(method)(iter([fuzzer.noise(100) for _ in range(fuzzer.dice.randrange(4))]),
                                         timeout=SECONDS, metadata=fuzzer.metadata())
    ended = threading.Timer(0.3, call.cancel)
    ended.start()
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        # Too many requests, or none, for a method that takes one: gRPC itself says that with these, and so do the stock
        # services for what they cannot parse.
        if error.code().name not in ("INTERNAL", "UNKNOWN"):  # type: ignore[attr-defined]
            refused_well(error, method)
    finally:
        ended.cancel()


def drain(call: Any, seconds: float, what: str) -> None:
    """Take what a stream gives, and cancel it after some seconds."""
    ended = threading.Timer(seconds, call.cancel)
    ended.start()
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        refused_well(error, what)
    finally:
        ended.cancel()


def call_publish(fuzzer: Fuzzer, channel: grpc.Channel) -> None:
    frames = fuzzer.stream()
    pauses = fuzzer.dice.random() < 0.3

    def send() -> Iterator[bytes]:
        for each in frames:
            yield each
            if pauses:
                time.sleep(0.01)

    call = channel.stream_stream("/cxlmq.v1.PubSub/Publish", None, pb.PublishResponse.FromString)(
        send(), timeout=SECONDS, metadata=fuzzer.metadata())
    drain(call, fuzzer.dice.choice((0.0, 0.05, 0.5)), f"Publish of {frames!r}")


def call_subscribe(fuzzer: Fuzzer, channel: grpc.Channel) -> None:
    data = fuzzer.damage(fuzzer.fill(pb.SubscribeRequest()).SerializeToString())
    call = channel.unary_stream("/cxlmq.v1.PubSub/Subscribe", None, pb.SubscribeResponse.FromString)(
        data, timeout=SECONDS, metadata=fuzzer.metadata())
    drain(call, fuzzer.dice.choice((0.0, 0.02, 0.2)), f"Subscribe with {data!r}")


def call_raw(fuzzer: Fuzzer, address: str) -> None:
    """HTTP/2 by hand: half a message, a slow one, resets, frames nobody asked for; and then silence."""
    dice = fuzzer.dice
    host, port = address.rsplit(":", 1)
    path = dice.choice(["/cxlmq.v1.PubSub/Publish", "/cxlmq.v1.Admin/CreateTopic", "/x", ""])
    headers = b"".join(literal(*each) for each in (
        (":method", dice.choice(("POST", "GET", "PUT"))), (":scheme", "http"), (":path", path), (":authority", "x"),
        ("te", "trailers"), ("content-type", dice.choice(("application/grpc", "text/html")))))
    whole = b"\x00" + len(data := fuzzer.stream()[0]).to_bytes(4, "big") + data
    pieces = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""), frame(1, 4, 1, headers)]
    pieces += dice.choice([
        [frame(0, 1, 1, whole)], [frame(0, 1, 1, whole[:-1])], [frame(0, 0, 1, whole[:dice.randrange(1 + len(whole))])],
        [frame(0, 0, 1, bytes([each])) for each in whole[:20]], [frame(0, 1, 1, b"\x00\xff\xff\xff\xff" + b"x" * 100)],
        [frame(0, 0, 1, b"\x01" + whole[1:]), frame(3, 0, 1, (8).to_bytes(4, "big"))], [fuzzer.noise(200)],
        [frame(dice.randrange(12), dice.randrange(256), dice.randrange(4), fuzzer.noise(50)) for _ in range(10)]])
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), SECONDS) as connection:
        for piece in pieces:
            connection.sendall(piece)
            if dice.random() < 0.2:
                time.sleep(0.005)
        connection.settimeout(0.05)
        connection.recv(4096)


def counts(cluster: Cluster, what: str) -> dict[int, int]:
    """File descriptors ("fd") or threads ("task") of each broker."""
    return {broker: len(os.listdir(f"/proc/{pid}/{what}")) for broker, pid in cluster.processes.items()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three brokers with short leases, so that what nobody closes ends soon."""
    with Cluster(small_config(brokers=3, session_lease_seconds=2.0, group_lease_seconds=1.0)) as running:
        works(running, "first")
        yield running
    assert traces(running.name) == []


@pytest.fixture(scope="module")
def base_line(cluster: Cluster) -> dict[str, dict[int, int]]:
    """What the brokers held before the first seed: a leak of any seed adds to those of the others."""
    return {what: counts(cluster, what) for what in ("fd", "task")}


def works(cluster: Cluster, topic: str) -> None:
    """Who speaks properly is served."""
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
        for broker in range(3):
            with Publisher(topic, bootstrap=cluster.addresses[broker].tcp, batch_bytes=100) as publisher:
                publisher.publish_many(numbered(20, tag=str(broker))).result(SECONDS)
        assert len(read_topic(cluster.name, topic)) == 60
        admin.delete_topic(topic)


def clean(cluster: Cluster) -> None:
    with Admin(cluster=cluster.name) as admin:
        for each in admin.list_topics():
            with contextlib.suppress(CxlmqError):
                admin.delete_topic(each["name"])
        for name in TOPICS:
            admin.create_topic(name)


def gone(cluster: Cluster) -> bool:
    """No session, reader, slot, attached client or group is left."""
    from tests.end_to_end.library_support import NOTHING, inspected

    found = inspected(cluster.name)
    return held(cluster.name) == NOTHING and not found["groups"]


def test_garbage_on_every_method(cluster: Cluster, fuzz_seed: int, base_line: dict[str, dict[int, int]]) -> None:
    clean(cluster)
    processes = cluster.processes
    fuzzer = Fuzzer(fuzz_seed)
    channels = [grpc.insecure_channel(each, options=[("grpc.max_send_message_length", -1)])
                for broker in range(3) for each in cluster.addresses[broker]]
    calls = (call_unary, call_unary, call_unary, call_publish, call_publish, call_subscribe, call_other)
    for _ in range(ROUNDS):
        if fuzzer.dice.random() < 0.1:
            call_raw(fuzzer, cluster.addresses[fuzzer.dice.randrange(3)].tcp)
        else:
            fuzzer.dice.choice(calls)(fuzzer, fuzzer.dice.choice(channels))
        assert cluster.processes == processes, f"a broker fell: {cluster.exit_codes}"
    for channel in channels:
        channel.close()
    with Admin(cluster=cluster.name) as admin:
        for each in admin.list_topics():
            admin.delete_topic(each["name"])
    assert eventually(lambda: gone(cluster)), f"still held: {held(cluster.name)}"
    assert eventually(lambda: segments_owned(cluster.name) == 0), "every segment comes back"
    works(cluster, "proper")
    for what, slack in (("fd", FILES_SLACK), ("task", THREADS_SLACK)):
        assert eventually(lambda what=what, slack=slack: all(
            count <= base_line[what][broker] + slack for broker, count in counts(cluster, what).items())), (
            f"{what}: {base_line[what]} before, {counts(cluster, what)} now")
    for broker in range(3):
        assert "Traceback" not in cluster.log_path(broker).read_bytes().decode(errors="replace")


def test_garbage_from_who_has_no_token_and_from_who_has_one(tmp_path: Path, fuzz_seed: int) -> None:
    root = Path(__file__).parents[2]
    for arguments in (("init", tmp_path / "s"), ("add", tmp_path / "s", "reader", "--subscribe", "fuzz")):
        subprocess.run([sys.executable, "-m", "client.cli.main", "security", *map(str, arguments)], cwd=root, check=True,
                       capture_output=True)
    token = Security.load(tmp_path / "s" / "clients" / "reader").own_metadata()
    with Cluster(small_config(brokers=1, security=str(tmp_path / "s"))) as running:
        fuzzer = Fuzzer(fuzz_seed)
        with Admin(cluster=running.name, security=tmp_path / "s") as admin:
            for name in TOPICS:
                admin.create_topic(name)
            with grpc.insecure_channel(running.addresses[0].unix) as channel:
                for _ in range(ROUNDS):
                    method = fuzzer.dice.choice(list(UNARY))
                    data = fuzzer.damage(fuzzer.fill(UNARY[method]()).SerializeToString())
                    known = fuzzer.dice.random() < 0.5
                    metadata = token if known else fuzzer.metadata()
                    call = channel.unary_unary(f"/cxlmq.v1.{method}").future(data, timeout=SECONDS, metadata=metadata)
                    if (error := call.exception()) is not None:
                        refused_well(error, f"{method} with {data!r}")
                    # gRPC refuses its own compression before it asks anybody who that is.
                    compressed = ("grpc-encoding", "gzip") in metadata
                    refusal = grpc.StatusCode.UNIMPLEMENTED if compressed else grpc.StatusCode.UNAUTHENTICATED
                    assert known or call.code() == refusal, f"{method} answered {call.code()}"
            for _ in range(10):
                call_raw(fuzzer, running.addresses[0].tcp)
            assert {each["name"] for each in admin.list_topics()} == set(TOPICS), "nobody had the right to change them"
            assert running.processes
