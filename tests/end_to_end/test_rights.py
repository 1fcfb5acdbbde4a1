"""Every method asks every caller for the same rights: at the start, after a broker's restart, and under another head."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from broker.inspection import inspect_region
from broker.proto import cxlmq_pb2 as pb
from broker.region import attach_region
from broker.rights import METHODS
from broker.security import Security
from client import Admin, Publisher, Subscriber
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config, traces
from tests.end_to_end.library_support import eventually

SECONDS = 20.0
ROOT = Path(__file__).parents[2]
TOPIC, HIDDEN, GROUP = "frames.front", "secret-project.front", "payroll"
PRINCIPALS = {"camera": ("--publish", "frames.*"), "viewer": ("--subscribe", "frames.*"), "owner": ("--admin", "frames.*"),
              "nobody": (), "elsewhere": ("--publish", "orders", "--subscribe", "orders", "--admin", "orders")}
PUBLISH, SUBSCRIBE, ADMIN = {"camera", "admin"}, {"viewer", "admin"}, {"owner", "admin"}
ALL = {*PRINCIPALS, "admin"}
# Requests that do no harm when they are let in, and who is: written out, not taken from the table that is tested.
CALLS: dict[str, tuple[Any, set[str]]] = {
    "PubSub/Publish": (pb.PublishRequest(open=pb.PublishOpen(topic=TOPIC, ack=9)), PUBLISH),
    "PubSub/Subscribe": (pb.SubscribeRequest(topic=TOPIC, group="x", member=1), SUBSCRIBE),
    "Admin/CreateTopic": (pb.CreateTopicRequest(name=TOPIC, order=3), ADMIN),
    "Admin/AlterTopic": (pb.AlterTopicRequest(name=TOPIC, ack=9), ADMIN),
    "Admin/DeleteTopic": (pb.DeleteTopicRequest(name="frames.none"), ADMIN),
    "Admin/ListTopics": (pb.ListTopicsRequest(), ALL),
    "Admin/DescribeTopic": (pb.DescribeTopicRequest(name=TOPIC), PUBLISH | SUBSCRIBE | ADMIN),
    "Admin/OpenSession": (pb.OpenSessionRequest(topic=TOPIC, ack=9), PUBLISH),
    "Admin/CloseSession": (pb.CloseSessionRequest(), ALL),          # whose it is: tested below
    "Admin/AttachPublisher": (pb.AttachPublisherRequest(open=pb.PublishOpen(topic=TOPIC, ack=9)), PUBLISH),
    "Admin/AttachSubscriber": (pb.AttachSubscriberRequest(
        subscribe=pb.SubscribeRequest(topic=TOPIC, group="x", member=1)), SUBSCRIBE),
    "Admin/Detach": (pb.DetachRequest(slot=1 << 20), ALL),          # whose it is: tested below
    "Groups/Join": (pb.JoinGroupRequest(topic=TOPIC, group="x"), SUBSCRIBE),
    "Groups/Commit": (pb.CommitGroupRequest(topic=TOPIC, group="x", member=1), SUBSCRIBE),
    "Groups/Leave": (pb.LeaveGroupRequest(topic=TOPIC, group="x", member=1), SUBSCRIBE),
    "Groups/List": (pb.ListGroupsRequest(topic=TOPIC), PUBLISH | SUBSCRIBE | ADMIN),
    "Groups/Reset": (pb.ResetGroupRequest(topic=TOPIC, group="x"), ADMIN),
    "Groups/Delete": (pb.DeleteGroupRequest(topic=TOPIC, group="x"), ADMIN),
    "Cluster/Describe": (pb.DescribeClusterRequest(), ALL),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Security with somebody for each right."""
    made = tmp_path_factory.mktemp("security") / "lab"
    for arguments in (("init", made), *(("add", made, name, *rights) for name, rights in PRINCIPALS.items())):
        subprocess.run([sys.executable, "-m", "client.cli.main", "security", *map(str, arguments)], cwd=ROOT, check=True,
                       capture_output=True, timeout=60)
    return made


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Three brokers, a topic for some and one for nobody but the admin, which a group reads."""
    with Cluster(small_config(brokers=3, security=str(folder))) as running:
        with Admin(cluster=running.name, security=folder) as admin:
            admin.create_topic(TOPIC)
            admin.create_topic(HIDDEN)
        with Subscriber(HIDDEN, cluster=running.name, security=folder, group=GROUP):
            pass
        yield running
    assert traces(running.name) == []


def call(folder: Path, target: str, name: str, method: str, request: Any) -> tuple[str, bytes]:
    """A method as somebody calls it; the status, and the first answer."""
    who = Security.load(folder if name == "admin" else folder / "clients" / name).own_metadata()
    with grpc.insecure_channel(target) as channel:
        made = channel.stream_stream(f"/cxlmq.v1.{method}")(
            iter([request.SerializeToString()]), timeout=SECONDS, metadata=who, wait_for_ready=True)
        try:
            return "OK", b"".join(made)
        except grpc.RpcError as error:
            return error.code().name, (error.details() or "").encode()  # type: ignore[attr-defined]


def check_every_method(folder: Path, cluster: Cluster) -> None:
    """Each caller is refused where it has no right, at every broker, and nowhere else."""
    for broker, address in cluster.addresses.items():
        for method, (request, allowed) in CALLS.items():
            for name in sorted(ALL):
                status, told = call(folder, address.unix, name, method, request)
                assert (status == "PERMISSION_DENIED") == (name not in allowed), (broker, method, name, status, told)
        for request in (pb.ListGroupsRequest(), pb.ListGroupsRequest(group=GROUP), pb.ListGroupsRequest(group="x")):
            for name in ALL:
                status, told = call(folder, address.unix, name, "Groups/List", request)
                found = [each.topic for each in pb.ListGroupsResponse.FromString(told).groups]
                assert status == "OK"
                assert found == ([HIDDEN] if name == "admin" and request.group != "x" else [])
        for name in ALL:
            _, told = call(folder, address.unix, name, "Admin/ListTopics", pb.ListTopicsRequest())
            found = sorted(each.name for each in pb.ListTopicsResponse.FromString(told).topics)
            assert found == {"nobody": [], "elsewhere": [], "admin": [TOPIC, HIDDEN]}.get(name, [TOPIC])


def restarted(cluster: Cluster, broker: int) -> None:
    """Kill a broker and wait until its next process serves."""
    before = cluster.processes[broker]
    cluster.kill(broker, signal.SIGKILL)

    def back() -> bool:
        with attach_region(cluster.name, writable=False) as region:
            line = inspect_region(region)["brokers"][broker]
        return bool(line["pid"] != before and line["state"] == "ready" and line["alive"])

    assert eventually(back, SECONDS)


def attached(cluster: Cluster) -> list[dict[str, Any]]:
    with attach_region(cluster.name, writable=False) as region:
        return list(inspect_region(region)["attached"])


def test_the_calls_are_all_there_are() -> None:
    assert CALLS.keys() == METHODS.keys()


def test_rights_are_the_same_at_the_start_after_a_restart_and_under_another_head(folder: Path, cluster: Cluster) -> None:
    check_every_method(folder, cluster)
    restarted(cluster, 2)
    check_every_method(folder, cluster)
    restarted(cluster, 0)                   # the head: another one takes over
    check_every_method(folder, cluster)


@pytest.mark.parametrize("kind", ["publisher", "subscriber"])
def test_nobody_else_detaches_a_slot_before_or_after_the_brokers_restart(
        folder: Path, cluster: Cluster, kind: str) -> None:
    name = {"publisher": "camera", "subscriber": "viewer"}[kind]
    others = ALL - {name}
    program = ("import sys, time; from cxlmq import Publisher, Subscriber; kind, cluster, security = sys.argv[1:]\n"
               f"client = Publisher({TOPIC!r}, cluster=cluster, security=security, transport='attached')\n"
               "if kind == 'publisher': client.open().publish(b'x').result(20)\n"
               f"else: client = Subscriber({TOPIC!r}, cluster=cluster, security=security, transport='attached',"
               " broker=1).open()\n"
               "print('there', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", program, kind, cluster.name, str(folder / "clients" / name)], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "there\n"
            os.kill(client.pid, signal.SIGSTOP)     # it cannot answer by attaching again
            slot = next(each for each in attached(cluster) if each["pid"] == client.pid)
            request = pb.DetachRequest(slot=slot["slot"], generation=slot["generation"])
            target = cluster.addresses[slot["broker"]].unix
            for _ in range(2):
                for each in sorted(others):
                    assert call(folder, target, each, "Admin/Detach", request)[0] == "PERMISSION_DENIED"
                    wrong = pb.DetachRequest(slot=slot["slot"], generation=slot["generation"] + 1)
                    assert call(folder, target, each, "Admin/Detach", wrong)[0] == "OK"     # nobody's: nothing happens
                assert slot["slot"] in [each["slot"] for each in attached(cluster) if each["pid"] == client.pid]
                restarted(cluster, slot["broker"])
            assert call(folder, target, name, "Admin/Detach", request)[0] == "OK"
            assert eventually(lambda: slot["slot"] not in [each["slot"] for each in attached(cluster)], SECONDS)
        finally:
            client.kill()


def test_nobody_without_the_right_closes_a_session(folder: Path, cluster: Cluster) -> None:
    with Publisher(TOPIC, cluster=cluster.name, security=folder / "clients" / "camera", transport="grpc") as publisher:
        publisher.publish(b"first").result(SECONDS)
        with attach_region(cluster.name, writable=False) as region:
            session = next(each for each in inspect_region(region)["sessions"]
                           if each["client_id"] == publisher.client_id)
        request = pb.CloseSessionRequest(client_id=publisher.client_id, session_slot=session["session"],
                                         session_epoch=session["session_epoch"])
        for address in cluster.addresses.values():
            for name in sorted(ALL - PUBLISH):
                assert call(folder, address.unix, name, "Admin/CloseSession", request)[0] == "PERMISSION_DENIED"
        assert publisher.publish(b"second").result(SECONDS).position is not None


@pytest.mark.parametrize("method", ["Admin/ListTopics", "Cluster/Describe", "PubSub/Publish", "PubSub/Subscribe"])
def test_nobody_makes_a_broker_inflate_what_it_sends(folder: Path, cluster: Cluster, method: str) -> None:
    address = cluster.addresses[1]

    def peak_bytes() -> int:
        status = Path(f"/proc/{cluster.processes[1]}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10

    who = Security.load(folder / "clients" / "nobody").own_metadata()
    before, bomb = peak_bytes(), bytes(100 << 20)
    with grpc.insecure_channel(address.unix, options=[("grpc.max_send_message_length", -1)]) as channel:
        calls = [channel.stream_stream(f"/cxlmq.v1.{method}")(
            iter([bomb]), metadata=who, timeout=SECONDS, compression=compression)
            for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate) for _ in range(4)]
        for each in calls:
            with pytest.raises(grpc.RpcError) as raised:
                list(each)
            assert raised.value.code().name in ("UNIMPLEMENTED", "RESOURCE_EXHAUSTED")
    assert peak_bytes() - before < 32 << 20
