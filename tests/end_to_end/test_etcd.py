"""Membership on a real etcd: leases, election, watch; the same failovers as with heartbeats in the region."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.config import load_config
from broker.errors import ConfigError, MembershipUnavailable
from broker.etcd_membership import Etcd, EtcdMembership
from broker.layout import Layout
from client.cluster import Cluster
from cxlmq import Admin, Publisher
from sim.cxl.clock import SystemClock
from sim.cxl.memory import MappedMemory
from tests.end_to_end.conftest import small_config, unique
from tests.end_to_end.library_support import eventually, inspected
from tests.end_to_end.test_failover import assert_base_line, epoch_of, head_of, publish_through

pytest.importorskip("etcd3gw", reason="the client library is not installed: CXLMQ_EXTRAS=etcd scripts/bootstrap.sh")
if shutil.which("etcd") is None:
    pytest.skip("no etcd server here: apt-get install etcd-server", allow_module_level=True)

LEASE = 2.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """A real etcd server of one node, with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.peer = folder, free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoints(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        own, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.peer}"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["etcd", "--data-dir", str(self.folder / "data"), "--listen-client-urls", own,
                 "--advertise-client-urls", own, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                 "--initial-cluster", f"default={peer}"], stdout=log, stderr=log)

        def answers() -> bool:
            try:
                return Etcd(self.endpoints).call(lambda client: client.status()) is not None
            except MembershipUnavailable:
                return False

        assert eventually(answers), (self.folder / "log").read_text()[-2000:]

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def keys(self, name: str) -> list[str]:
        found = Etcd(self.endpoints).call(lambda client: client.get_prefix(f"cxlmq/{name}/"))
        return sorted(each["key"].decode().rpartition(f"{name}/")[2] for _, each in found)


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def member(etcd: Server) -> Iterator[Callable[[int], EtcdMembership]]:
    layout = Layout.compute(broker_count=3, region_bytes=4 << 20, topic_count_max=4, ring_slot_count=16,
                            order_entry_count=16, session_count_max=8, cursor_count_max=8, attach_slot_count=0,
                            group_count_max=4, segment_bytes=16384, message_bytes_max=4096, batch_bytes_max=16384,
                            pool_strategy="atomic")
    memory = MappedMemory(bytearray(layout.numbers["region_bytes"]))
    made: list[EtcdMembership] = []

    def make(broker: int) -> EtcdMembership:
        made.append(EtcdMembership(memory, layout, SystemClock(), broker, broker + 10, "c/1", etcd.endpoints, LEASE))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_one_is_elected_and_when_it_leaves_another_one_is(
        etcd: Server, member: Callable[[int], EtcdMembership]) -> None:
    first, second, third = (member(broker) for broker in range(3))
    assert first.wanted() == 0 and second.wanted() is None and third.wanted() is None
    assert etcd.keys("c/1") == ["brokers/0", "brokers/1", "brokers/2", "head"]
    first.close()
    assert first.wanted() is None and etcd.keys("c/1")[0] == "brokers/1"
    began = time.monotonic()
    assert eventually(lambda: [second.wanted(), third.wanted()].count(0) == 1)
    assert time.monotonic() - began < LEASE, "the watch tells, and nobody waits for a lease"


def test_a_silent_one_loses_its_lease_and_comes_back_as_another_ones_follower(
        etcd: Server, member: Callable[[int], EtcdMembership], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = member(0), member(1)
    monkeypatch.setattr(first, "_keep", lambda: None)       # as if its thread stood still
    assert eventually(lambda: second.wanted() == 0)
    assert first.wanted() is None, "by its own clock it is over before etcd elects another one"
    assert eventually(lambda: etcd.keys("c/1") == ["brokers/1", "head"])
    monkeypatch.undo()
    assert eventually(lambda: etcd.keys("c/1") == ["brokers/0", "brokers/1", "head"])
    assert first.wanted() is None and second.wanted() == 0


def test_without_etcd_nobody_is_elected_and_it_is_found_again(
        etcd: Server, member: Callable[[int], EtcdMembership]) -> None:
    first, second = member(0), member(1)
    etcd.kill()
    assert eventually(lambda: first.wanted() is None and second.wanted() is None)
    etcd.start()
    assert eventually(lambda: [first.wanted(), second.wanted()].count(0) == 1)


def config_on(etcd: Server, **settings: object) -> object:
    return small_config(brokers=3, membership="etcd", etcd_endpoints=etcd.endpoints, **settings)


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_killed_head_is_replaced(etcd: Server, transport: str) -> None:
    with Cluster(config_on(etcd)) as cluster, Admin(cluster=cluster.name) as admin:
        assert eventually(lambda: inspected(cluster.name)["pool"]["warm"] >= inspected(cluster.name)["pool"]["segments"])
        free, epoch = inspected(cluster.name)["pool"]["free"], epoch_of(cluster)
        admin.create_topic("t")
        publish_through(cluster, transport, lambda: cluster.kill(head_of(cluster)))
        assert epoch_of(cluster) == epoch + 1
        assert_base_line(cluster, free)


def test_a_stopped_head_is_replaced_and_changes_nothing_when_it_wakes_up(etcd: Server) -> None:
    with Cluster(config_on(etcd)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")

        def stop_and_wake() -> None:
            head = head_of(cluster)
            cluster.kill(head, signal.SIGSTOP)
            try:
                assert eventually(lambda: head_of(cluster) != head and inspected(cluster.name)["control"]["serving"])
            finally:
                cluster.kill(head, signal.SIGCONT)

        publish_through(cluster, "grpc", stop_and_wake)


def test_without_etcd_the_head_goes_on_and_with_it_failover_works_again(etcd: Server) -> None:
    with Cluster(config_on(etcd)) as cluster, Admin(cluster=cluster.name) as admin:
        admin.create_topic("t")
        head = head_of(cluster)
        etcd.kill()
        with Publisher("t", cluster=cluster.name) as publisher:
            until = time.monotonic() + 2 * LEASE
            while time.monotonic() < until:
                publisher.publish(b"while etcd is away").result(5.0)
        assert head_of(cluster) == head
        etcd.start()
        run = inspected(cluster.name)["superblock"]["run_id"]
        assert eventually(lambda: "head" in etcd.keys(f"{cluster.name}/{run}"))
        epoch = epoch_of(cluster)
        cluster.kill(head_of(cluster))
        with Publisher("t", cluster=cluster.name) as publisher:
            publisher.publish(b"under another head").result(30.0)
        assert epoch_of(cluster) > epoch


def test_an_etcd_that_is_not_there_is_a_typed_error() -> None:
    with pytest.raises(MembershipUnavailable, match="etcd does not answer"):
        Cluster(small_config(membership="etcd", etcd_endpoints=f"127.0.0.1:{free_port()}")).start()


@pytest.mark.parametrize("endpoints", ["", "no port:x", "ftp://a:1", "http://a:1/path"])
def test_wrong_endpoints_are_refused(endpoints: str) -> None:
    with pytest.raises(ConfigError, match="etcd_endpoints"):
        load_config(environment={}, name=unique("test"), membership="etcd", etcd_endpoints=endpoints)
