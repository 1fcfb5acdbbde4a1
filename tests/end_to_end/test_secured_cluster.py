"""A cluster with security: who gets in over which transport, what each right allows in every method, and no secret is told."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from broker.errors import BrokerUnavailable, ClearTextRefused, CxlmqError, NotAllowed, Unauthenticated
from broker.proto import cxlmq_pb2 as pb
from broker.rights import METHODS
from broker.security import Security
from client import Admin, AsyncSubscriber, Publisher, Subscriber
from client.cluster import Cluster
from tests.end_to_end.conftest import small_config, traces
from tests.end_to_end.library_support import eventually, numbered, read

SECONDS = 20.0
ROOT = Path(__file__).parents[2]


def cxlmq(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command; what it said."""
    return subprocess.run([sys.executable, "-m", "client.cli.main", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, check=False, env={**os.environ, **environment}, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Security as the command makes it, with some principals."""
    made = tmp_path_factory.mktemp("security") / "lab"
    for arguments in (("init", made), ("add", made, "camera", "--publish", "frames.*"),
                      ("add", made, "viewer", "--subscribe", "frames.*"), ("add", made, "owner", "--admin", "frames.*"),
                      ("add", made, "nobody")):
        done = cxlmq("security", *arguments)
        assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two brokers with security, and a topic."""
    with Cluster(small_config(brokers=2, security=str(folder))) as running:
        with Admin(cluster=running.name, security=folder) as admin:
            admin.create_topic("frames.front")
        yield running
    assert traces(running.name) == []


@pytest.fixture(params=["unix", "tcp"])
def where(request: pytest.FixtureRequest, cluster: Cluster) -> dict[str, str]:
    """How the library finds the brokers."""
    return {"cluster": cluster.name} if request.param == "unix" else {"bootstrap": cluster.addresses[1].tcp}


def identity(folder: Path, name: str) -> Path:
    return folder if name == "admin" else folder / "clients" / name


def publish(**options: Any) -> None:
    with Publisher("frames.front", **options) as publisher:
        publisher.publish(b"m").result(SECONDS)


def subscribe(**options: Any) -> None:
    with Subscriber("frames.front", start="end", **options):
        pass


def test_each_right_allows_what_it_says_and_no_more(folder: Path, where: dict[str, str]) -> None:
    with Admin(**where, security=folder) as admin:
        actions: dict[str, Callable[[Path], Any]] = {
            "publish": lambda path: publish(**where, security=path),
            "subscribe": lambda path: subscribe(**where, security=path),
            "create": lambda path: Admin(**where, security=path).create_topic("frames.new"),
            "create elsewhere": lambda path: Admin(**where, security=path).create_topic("other"),
            "delete": lambda path: Admin(**where, security=path).delete_topic("frames.new"),
            "describe": lambda path: Admin(**where, security=path).describe_topic("frames.front"),
            "cluster": lambda path: Admin(**where, security=path).describe_cluster(),
        }
        allowed = {"admin": set(actions), "camera": {"publish", "describe", "cluster"},
                   "viewer": {"subscribe", "describe", "cluster"},
                   "owner": {"create", "delete", "describe", "cluster"}, "nobody": {"cluster"}}
        for name, may in allowed.items():
            for action, act in actions.items():
                if action in may:
                    act(identity(folder, name))
                    continue
                with pytest.raises(NotAllowed) as raised:
                    act(identity(folder, name))
                assert raised.value.principal == name
            assert [each["name"] for each in Admin(**where, security=identity(folder, name)).list_topics()] == (
                [] if name == "nobody" else ["frames.front", "other"] if name == "admin" else ["frames.front"])
            if name == "admin":
                admin.delete_topic("other")


def test_both_transports_ask_for_the_right(folder: Path, cluster: Cluster) -> None:
    options: dict[str, Any] = {"cluster": cluster.name, "transport": "attached"}
    publish(**options, security=identity(folder, "camera"))
    subscribe(**options, security=identity(folder, "viewer"))
    with pytest.raises(NotAllowed):
        publish(**options, security=identity(folder, "viewer"))
    with pytest.raises(NotAllowed):
        subscribe(**options, security=identity(folder, "camera"))


def test_who_has_no_token_or_certificate_stays_outside(cluster: Cluster, tmp_path: Path) -> None:
    assert cxlmq("security", "init", tmp_path / "other").returncode == 0
    with pytest.raises(Unauthenticated, match="no token"):
        Admin(cluster=cluster.name).list_topics()
    with pytest.raises(Unauthenticated, match="no principal"):
        Admin(cluster=cluster.name, security=tmp_path / "other").list_topics()
    with pytest.raises(BrokerUnavailable, match="security"):
        Admin(bootstrap=cluster.addresses[0].tcp).list_topics()
    with pytest.raises(Unauthenticated, match="another CA"):
        Admin(bootstrap=cluster.addresses[0].tcp, security=tmp_path / "other").list_topics()


def test_tls_alone_is_not_enough_and_a_certificate_is_needed(folder: Path, cluster: Cluster) -> None:
    security = Security.load(folder)
    request = pb.ListTopicsRequest().SerializeToString()
    authority = security.ca.read_bytes()
    whole = grpc.ssl_channel_credentials(authority, security.key.read_bytes(), security.certificate.read_bytes())
    with grpc.secure_channel(cluster.addresses[0].tcp, whole) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/cxlmq.v1.Admin/ListTopics")(request, timeout=SECONDS)
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    with grpc.secure_channel(cluster.addresses[0].tcp, grpc.ssl_channel_credentials(authority)) as channel, \
            pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/cxlmq.v1.Admin/ListTopics")(request, timeout=SECONDS, metadata=security.own_metadata())
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


NAMES = [*(f"cxlmq.v1.{name}" for name in METHODS), "cxlmq.v1.Admin/Nothing",
         "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("metadata", [
    (), (("authorization", "Bearer x"),), (("authorization", "Basic x"),), (("authorization", ""),)], ids=repr)
def test_no_method_answers_without_a_token(cluster: Cluster, method: str, metadata: Any) -> None:
    with grpc.insecure_channel(cluster.addresses[1].unix) as channel, pytest.raises(grpc.RpcError) as raised:
        list(channel.stream_stream(f"/{method}")(iter([b"\xff"]), timeout=SECONDS, metadata=metadata))
    assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_health_needs_no_token_and_reflection_does(folder: Path, cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.addresses[1].unix) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        told = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            asked, timeout=SECONDS, metadata=Security.load(folder).own_metadata()))
        assert told.list_services_response.service


def test_only_who_attached_may_detach(folder: Path, cluster: Cluster) -> None:
    with Subscriber("frames.front", cluster=cluster.name, transport="attached", broker=0,
                    security=identity(folder, "viewer")) as reader:
        attachment = reader._engine.attachment  # type: ignore[union-attr]
        request = pb.DetachRequest(slot=attachment.slot, generation=attachment.generation).SerializeToString()
        with grpc.insecure_channel(cluster.addresses[0].unix) as channel, pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/cxlmq.v1.Admin/Detach")(
                request, timeout=SECONDS, metadata=Security.load(identity(folder, "camera")).own_metadata())
        assert raised.value.code() == grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
        publish(cluster=cluster.name, security=folder)
        assert read(reader, 1)


def test_many_messages_over_tls_arrive_as_they_were(folder: Path, cluster: Cluster) -> None:
    messages = numbered(2000, 1000)
    with Subscriber("frames.front", bootstrap=cluster.addresses[0].tcp, start="end", security=folder) as reader, \
            Publisher("frames.front", bootstrap=cluster.addresses[0].tcp, security=folder) as publisher:
        publisher.publish_many(messages)
        assert read(reader, len(messages)) == messages

    async def first() -> Any:
        async with AsyncSubscriber("frames.front", bootstrap=cluster.addresses[0].tcp, security=folder) as reader:
            return await reader.get_next(SECONDS)

    assert asyncio.run(first()) is not None


def test_somebody_who_is_removed_is_out_within_seconds(folder: Path, cluster: Cluster) -> None:
    assert cxlmq("security", "add", folder, "guest", "--subscribe", "*").returncode == 0
    kept = identity(folder, "guest").with_name("copy")
    identity(folder, "guest").rename(kept)
    assert eventually(lambda: let_in(cluster, kept)), "a new principal is let in"
    assert cxlmq("security", "remove", folder, "guest").returncode == 0
    assert eventually(lambda: not let_in(cluster, kept)), "a removed principal stayed in"


def let_in(cluster: Cluster, path: Path) -> bool:
    try:
        subscribe(cluster=cluster.name, security=path)
    except Unauthenticated:
        return False
    return True


def test_no_secret_is_told_anywhere(folder: Path, cluster: Cluster) -> None:
    secrets = [file.read_text().strip() for file in folder.rglob("*.token")]
    secrets += [file.read_text().splitlines()[1] for file in folder.rglob("*.key")]
    assert len(secrets) > 8
    told = [cxlmq(*command, CXLMQ_SECURITY=str(folder)) for command in (
        ("cluster", "status", cluster.name, "--json"), ("security", "list", folder, "--json"),
        ("topic", "list", "--cluster", cluster.name, "--json", "--debug"),
        ("topic", "create", "a/b", "--cluster", cluster.name, "--json", "--debug"))]
    wrong = cxlmq("topic", "list", "--cluster", cluster.name, "--json", "--debug", CXLMQ_SECURITY="")
    assert json.loads(wrong.stderr.splitlines()[-1])["error"] == "unauthenticated"
    texts = [each.stdout + each.stderr for each in (*told, wrong)]
    for pid in (os.getpid(), *cluster.processes.values()):
        texts += [Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace") for file in ("cmdline", "environ")]
    texts += [cluster.log_path(broker).read_text() for broker in range(2)] + [cluster.config.to_json()]
    for secret in secrets:
        assert not any(secret in text for text in texts)


def test_the_region_and_the_sockets_are_the_owners_alone(cluster: Cluster) -> None:
    files = list(Path("/dev/shm").glob(f"*cxlmq-{cluster.name}*"))
    assert files
    assert all(each.stat().st_mode & 0o077 == 0 for each in files)
    assert cluster.config.folder.stat().st_mode & 0o077 == 0


def test_clear_text_on_every_address_is_refused_before_anything_starts() -> None:
    with pytest.raises(ClearTextRefused):
        small_config(listen_host="0.0.0.0")
    done = cxlmq("cluster", "up", "-d", "--name", "never", "--listen-host", "0.0.0.0", "--json")
    assert (done.returncode, json.loads(done.stderr)["error"]) == (2, "clear-text-refused")
    assert not list(Path("/dev/shm").glob("*cxlmq-never*"))


def test_a_cluster_on_every_address_is_reached_by_the_one_that_is_known(folder: Path) -> None:
    with Cluster(small_config(brokers=2, security=str(folder), listen_host="0.0.0.0")) as running:
        port = running.addresses[0].tcp.rpartition(":")[2]
        with Admin(bootstrap=f"localhost:{port}", security=folder) as admin:
            admin.create_topic("frames.front")
        publish(bootstrap=f"localhost:{port}", security=folder)


def test_a_wrong_security_setting_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(CxlmqError, match="security init"), Cluster(small_config(security=str(tmp_path))):
        pass
