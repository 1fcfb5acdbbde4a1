"""A region is removed by those it belongs to, and by others only when nobody lives in it; who lives is seen from anywhere."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import ClusterConfig
from broker.errors import CxlmqError, PermissionDenied, RegionForeign, RegionMissing
from broker.layout import BrokerState
from broker.node import BrokerNode, serve
from broker.records import pack
from broker.region import create_region, find_regions
from client.admin import Admin
from client.claim import supervisor_of
from client.cluster import Cluster, collect_leftovers, start_detached, stop_cluster
from client.connection import addresses_of_region
from client.publisher import Publisher
from client.restarts import FAULTS_MAX, endings_in
from client.subscriber import Subscriber
from tests.end_to_end.conftest import SHARED, small_config, traces, unique
from tests.end_to_end.library_support import eventually, inspected, read_topic
from tests.end_to_end.test_cluster_lifecycle import END_SECONDS, free_ports

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [b"only copy %d" % number for number in range(5)]


def fill(name: str) -> None:
    with Admin(cluster=name) as admin:
        admin.create_topic("t")
    with Publisher("t", cluster=name, transport="grpc") as publisher:
        for message in MESSAGES:
            publisher.publish(message).result()


def is_there(name: str) -> bool:
    return (SHARED / f"cxlmq-{name}").exists()


def comes_back(name: str) -> bool:
    """Whether all that was acknowledged can be read."""
    with contextlib.suppress(CxlmqError):
        return read_topic(name, "t", transport="grpc") == MESSAGES
    return False


def by_hand(config: ClusterConfig, broker: int, *options: str) -> "subprocess.Popen[bytes]":
    """A broker that no supervisor knows."""
    process = subprocess.Popen([sys.executable, "-m", "broker.node", "--id", str(broker), "--json-errors", *options],
                               cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(config.to_json().encode())
    process.stdin.close()
    process.stdin = None
    return process


@contextlib.contextmanager
def taken(port: int) -> Iterator[None]:
    """Somebody listens where a broker should."""
    with socket.socket() as blocker:
        blocker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert eventually(lambda: blocker.connect_ex(("127.0.0.1", port)) != 0)
    with socket.socket() as blocker:
        blocker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        blocker.bind(("127.0.0.1", port))
        blocker.listen()
        yield


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_while_its_brokers_are_away_a_supervisor_keeps_the_region(number: signal.Signals) -> None:
    """The broker cannot come back until we let it: its failed starts, and other clusters', remove nothing."""
    config = small_config(brokers=1, listen_port=free_ports(1))
    with Cluster(config) as running:
        fill(running.name)
        running.kill(0, number)
        assert eventually(lambda: 0 in running.exit_codes or bool(running.endings))
        with taken(config.listen_port):
            with Cluster(small_config(brokers=1)) as other:
                assert not any(running.name in note for note in other.notes)
            assert running.name not in collect_leftovers()
            with pytest.raises(RegionForeign):
                Cluster(small_config(brokers=1, name=running.name)).start()
            assert eventually(lambda: sum(code == 2 for _, code in running.endings) >= 2), "two starts have failed"
            assert any("listen_port" in note for note in running.notes), "and it is said why"
            assert is_there(running.name)
            with pytest.raises(CxlmqError, match="has no live broker"):
                addresses_of_region(running.name)
        assert eventually(lambda: comes_back(running.name))
    assert traces(config.name) == []


@pytest.mark.parametrize("options", [("--join",), ()])
def test_a_broker_that_cannot_start_removes_nothing(options: tuple[str, ...]) -> None:
    with Cluster(small_config(brokers=2, restart=False)) as running:
        fill(running.name)
        for broker in (0, 1):               # runs already
            failed = by_hand(running.config, broker, "--join")
            assert failed.wait(END_SECONDS) == 2
            assert b"region-foreign" in failed.stderr.read()
        for broker in (1, 0):
            running.kill(broker)
            assert eventually(lambda broker=broker: broker in running.exit_codes)
        port = free_ports(2)
        with taken(port):                   # nobody is there but the supervisor
            wrong = ClusterConfig.from_json(json.dumps({**json.loads(running.config.to_json()), "listen_port": port}))
            failed = by_hand(wrong, 0, *options)
            assert failed.wait(60.0) == 2
            failed.stderr.close()
        assert is_there(running.name)
        joined = by_hand(running.config, 0, "--join")
        try:
            assert eventually(lambda: comes_back(running.name))
        finally:
            joined.terminate()
            assert joined.wait(END_SECONDS) == 0, joined.stderr.read()
        assert is_there(running.name), "an orderly end of the last broker is no end of a supervised cluster"
    assert traces(running.name) == []


def test_a_broker_that_was_started_by_hand_keeps_the_region() -> None:
    running = Cluster(small_config(brokers=2, restart=False)).start()
    joined = None
    try:
        fill(running.name)
        running.kill(1)
        assert eventually(lambda: 1 in running.exit_codes)
        joined = by_hand(running.config, 1, "--join")
        assert eventually(lambda: len(addresses_of_region(running.name)[0]) == 2)
        running.stop()
        assert any("started by hand" in note for note in running.notes)
        assert comes_back(running.name)
        joined.terminate()
        assert joined.wait(END_SECONDS) == 0, joined.stderr.read()
        assert traces(running.name) == [], "who leaves last removes it"
    finally:
        running.stop()
        if joined is not None:
            joined.kill()


@pytest.mark.parametrize("then", ["closed", "same name", "down"])
def test_attached_clients_keep_what_they_have_mapped_but_no_name(then: str) -> None:
    """All of the cluster is killed at once: strangers leave alone what a client looks into; who wants the name has it."""
    config = small_config(brokers=1)
    values = start_detached(config)
    with Admin(cluster=config.name) as admin:
        admin.create_topic("t")
    publisher = Publisher("t", cluster=config.name, transport="attached", delivery_timeout=1.0).__enter__()
    publisher.publish(b"x").result()
    pids = [values["supervisor"], *(each["pid"] for each in values["brokers"])]
    os.kill(pids[0], signal.SIGSTOP)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: [each.reason for each in find_regions() if each.name == config.name] == [
        "clients are attached"])
    assert config.name not in collect_leftovers()
    assert is_there(config.name)
    if then == "closed":
        publisher.close()
        assert config.name in collect_leftovers()
    elif then == "down":
        down = subprocess.run([sys.executable, "-m", "client.cli.main", "cluster", "down", config.name], cwd=ROOT,
                              capture_output=True, text=True, check=False)
        assert (down.returncode, "leftovers are removed" in down.stdout) == (0, True), down.stderr
    else:
        with Cluster(config) as again:
            assert again.name == config.name
            assert not is_there(f"{config.name}-2")
    publisher.close()
    del publisher
    assert traces(config.name) == []


def test_a_broker_that_dies_by_the_same_signal_again_and_again_is_given_up() -> None:
    with Cluster(small_config(brokers=2)) as running:
        fill(running.name)
        for _ in range(FAULTS_MAX):
            assert eventually(lambda: 1 in running.processes)
            pid = running.processes[1]
            os.kill(pid, signal.SIGBUS)
            assert eventually(lambda pid=pid: running.processes.get(1) != pid)
        assert eventually(lambda: any("SIGBUS" in note and "not started any more" in note for note in running.notes))
        assert 1 not in running.processes
        assert len([code for _, code in running.endings if code == -signal.SIGBUS]) == FAULTS_MAX - 1
        assert endings_in(running.config.folder)[1]["given_up"]
        assert f"SIGBUS, {FAULTS_MAX} times in a row" in running.log_path(1).read_text()
        shown = subprocess.run([sys.executable, "-m", "client.cli.main", "cluster", "status", running.name], cwd=ROOT,
                               capture_output=True, text=True, check=False)
        assert shown.returncode == 1
        assert "SIGBUS" in shown.stdout and "not started any more" in shown.stdout
        assert comes_back(running.name), "the other one goes on"
        joined = by_hand(running.config, 1, "--join")   # as the note says: it can be started again
        assert eventually(lambda: len(addresses_of_region(running.name)[0]) == 2)
        joined.terminate()
        assert joined.wait(END_SECONDS) == 0
        joined.stderr.close()
    assert traces(running.name) == []


def test_what_a_dead_broker_left_is_not_taken_for_its_successors() -> None:
    config = small_config(brokers=1)
    with create_region(config) as region:
        line = pack("BrokerLine", state=BrokerState.BROKER_READY, pid=1, start_time=1, incarnation=1)
        region.memory().write_line_bytes(region.layout.offset_of("broker", 0), line)
        node = BrokerNode(config, 0, region)
        assert region.broker_lives(0)
        with pytest.raises(RegionMissing, match="no live broker"):
            addresses_of_region(config.name)
        node.stop()
        node.notifier.close()
        assert region.unlink()


def test_a_broker_says_that_it_has_stopped_when_nothing_of_it_runs() -> None:
    config, states = small_config(brokers=1), []
    with create_region(config) as region:
        node = BrokerNode(config, 0, region, founder=True)
        end_stages = node.stop

        def stop() -> None:
            states.append(node.broker_line(0)["state"])
            end_stages()
            states.append(node.broker_line(0)["state"])

        async def run() -> None:
            told = asyncio.Event()
            serving = asyncio.create_task(serve(node, told))
            while not node.was_ready:
                await asyncio.wait([serving], timeout=0.01)
            told.set()
            await serving

        node.stop = stop  # type: ignore[method-assign]
        asyncio.run(run())
        assert states == [BrokerState.BROKER_STOPPING] * 2
        assert node.broker_line(0)["state"] == BrokerState.BROKER_STOPPED
        node.notifier.close()
        assert region.unlink()


# ---- what a user sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [
    "from client.admin import Admin\nwith Admin(cluster={name!r}) as admin: admin.list_topics()",
    "from client import Publisher\nwith Publisher('t', cluster={name!r}) as publisher: publisher.publish(b'x')",
    "from client import Publisher\nwith Publisher('t', cluster={name!r}, transport='attached') as p: p.publish(b'x')",
    "from client import Subscriber\nwith Subscriber('t', cluster={name!r}, transport='grpc') as s: s.fetch(1, 1)",
    "from client import Subscriber\nwith Subscriber('t', cluster={name!r}, transport='attached') as s: s.fetch(1, 1)",
])
def test_a_cluster_that_is_not_up_is_one_error(program: str) -> None:
    ended = subprocess.run([sys.executable, "-c", program.format(name=unique("nowhere"))], cwd=ROOT,
                           capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert "cxlmq cluster up" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-", ">&-", "2>&-", "<&- 2>&-"])
def test_a_cluster_is_started_by_a_process_without_streams(closed: str) -> None:
    config = small_config(brokers=1)
    program = ("import os, sys; from broker.config import ClusterConfig; from client.cluster import start_detached\n"
               "values = start_detached(ClusterConfig.from_json(sys.argv[1]))\n"
               "os._exit(7 if values['brokers'] else 8)")
    ended = subprocess.run(["bash", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, program, config.to_json()],
                           cwd=ROOT, check=False, timeout=120)
    try:
        assert ended.returncode == 7
        assert len(addresses_of_region(config.name)[0]) == 1
    finally:
        assert stop_cluster(config.folder)
    assert traces(config.name) == []


# ---- across process-id namespaces --------------------------------------------------------------------------------


@contextlib.contextmanager
def boxed(config: ClusterConfig) -> Iterator["subprocess.Popen[bytes]"]:
    """A cluster in a process-id namespace of its own, as in a container that shares /dev/shm and /tmp."""
    program = ("import sys; from broker.config import ClusterConfig; from client.cluster import Cluster\n"
               "with Cluster(ClusterConfig.from_json(sys.argv[1])) as running:\n    print(1, flush=True); sys.stdin.read()")
    with subprocess.Popen(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", program,
                           config.to_json()], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as box:
        assert box.stdin and box.stdout and box.stderr
        if not box.stdout.readline():
            pytest.skip(f"no process-id namespace here: {box.stderr.read().decode()[-200:]}")
        try:
            yield box
        finally:
            box.kill()


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_cluster_of_another_namespace_is_used_and_kept(transport: str) -> None:
    config = small_config(brokers=2)
    with boxed(config) as box:
        fill(config.name)
        bootstrap = addresses_of_region(config.name)[0][0].target
        for how in ({"cluster": config.name}, {"bootstrap": bootstrap}):
            with Publisher("t", transport=transport, **how) as publisher:
                publisher.publish(b"from outside").result()
                assert eventually(lambda: publisher.statistics()["acked"] == 1)
        assert config.name not in collect_leftovers()
        with pytest.raises(RegionForeign):
            Cluster(small_config(brokers=2, name=config.name)).start()
        assert supervisor_of(config.folder) is not None
        with pytest.raises(RegionForeign, match="container"):
            stop_cluster(config.folder)
        assert len(addresses_of_region(config.name)[0]) == 2
        box.kill()
        box.wait()
    assert eventually(lambda: supervisor_of(config.folder) is None)
    with pytest.raises(RegionMissing, match="no live broker"):
        assert eventually(lambda: not addresses_of_region(config.name))
    assert eventually(lambda: not any(each.live for each in find_regions() if each.name == config.name))
    with Cluster(small_config(brokers=2, name=config.name)) as again:
        assert again.name == config.name, "the name is free"
    assert traces(config.name) == []


# ---- what is not ours is not trusted -----------------------------------------------------------------------------


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def lone() -> Iterator[Cluster]:
    """A cluster whose files a test gives to others."""
    with Cluster(small_config(brokers=1)) as running:
        yield running


@needs_root
@pytest.mark.parametrize("what", ["region", "folder", "socket"])
def test_nothing_of_another_users_is_talked_to(lone: Cluster, what: str) -> None:
    target = {"region": SHARED / f"cxlmq-{lone.name}", "folder": lone.config.folder,
              "socket": lone.config.folder / "broker-0.sock"}[what]
    os.chown(target, 65534, 65534)
    try:
        for client in (Admin(cluster=lone.name), Publisher("t", cluster=lone.name, transport="grpc"),
                       Publisher("t", cluster=lone.name, transport="attached"),
                       Subscriber("t", cluster=lone.name, transport="grpc"),
                       Subscriber("t", cluster=lone.name, transport="attached")):
            with pytest.raises(PermissionDenied, match="65534"), client:
                assert isinstance(client, Admin)
                client.list_topics()
        if what == "folder":
            assert supervisor_of(lone.config.folder) is None
    finally:
        os.chown(target, 0, 0)
    with Admin(cluster=lone.name) as admin:
        assert admin.list_topics() == []


def test_a_folder_that_others_may_write_into_is_not_used(lone: Cluster, tmp_path: Path) -> None:
    lone.config.folder.chmod(0o777)
    with pytest.raises(PermissionDenied, match="chmod go-w"), Admin(cluster=lone.name) as admin:
        admin.list_topics()
    assert supervisor_of(lone.config.folder) is None
    lone.config.folder.chmod(0o700)
    other = small_config(brokers=1, runtime_directory=str(tmp_path))
    other.folder.mkdir(mode=0o755)
    with Cluster(other) as running:
        assert running.config.folder.stat().st_mode & 0o777 == 0o700
    other.folder.mkdir()
    other.folder.chmod(0o777)
    with pytest.raises(PermissionDenied, match="chmod go-w"):
        Cluster(other).start()
    other.folder.rmdir()
    other.folder.symlink_to(lone.config.folder)
    with pytest.raises(PermissionDenied, match="link"):
        Cluster(other).start()
    assert not is_there(other.name)


# ---- the command that stops them -----------------------------------------------------------------------------------


def test_down_all_goes_on_behind_a_cluster_that_it_may_not_stop(tmp_path: Path) -> None:
    """In a /dev/shm of its own: it stops all there are."""
    script = '''
        mount -t tmpfs -o size=1g none /dev/shm || exit 99
        cxlmq() { "$PYTHON" -m client.cli.main "$@"; }
        small="--brokers 1 --region-bytes 32MiB"
        unshare --pid --fork --mount-proc --kill-child "$PYTHON" -m client.cli.main cluster up --name b $small >/dev/null &
        for try in $(seq 300); do cxlmq cluster status b >/dev/null 2>&1 && break; sleep 0.1; done
        cxlmq cluster status b >/dev/null || exit 99
        cxlmq cluster up -d --name a $small >/dev/null && cxlmq cluster up -d --name c $small >/dev/null || exit 98
        cxlmq cluster down --all --json
        echo "exit code $?"
        cxlmq cluster list --json
        kill -9 %1; wait
    '''
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    ended = subprocess.run(["unshare", "--mount", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True,
                           check=False, timeout=180, env={**os.environ, "PYTHON": sys.executable,
                                                          "CXLMQ_RUNTIME_DIRECTORY": str(runtime)})
    if ended.returncode == 99 or "unshare failed" in ended.stderr:
        pytest.skip(f"no namespaces here: {ended.stderr[-200:]}")
    text, _, listed = ended.stdout.partition("exit code ")
    told = json.loads(text)
    assert [(each["name"], each["how"]) for each in told["stopped"]] == [("a", "is stopped"), ("c", "is stopped")]
    assert [each["name"] for each in told["not_stopped"]] == ["b"]
    assert "1 of 3 clusters are not stopped" in ended.stderr and "container" in ended.stderr
    code, _, rest = listed.partition("\n")
    assert code == "1"
    assert [each["name"] for each in json.loads(rest) if each["live"]] == ["b"]


# Its supervisor is a child of a process of the same session that takes its orphans: else the kernel would end those that
# are stopped.
_KEPT_ORPHANS = """
import ctypes, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
program = ("import sys; from broker.config import ClusterConfig; from client.cluster import Cluster\\n"
           "with Cluster(ClusterConfig.from_json(sys.argv[1])) as running: print(1, flush=True); sys.stdin.read()")
with subprocess.Popen([sys.executable, "-c", program, sys.argv[1]], process_group=0, stdin=subprocess.PIPE,
                      stdout=subprocess.PIPE) as supervisor:
    supervisor.stdout.readline()
    print(supervisor.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("stands_still", [False, True], ids=["end by themselves", "stand still"])
def test_after_the_supervisors_death_the_name_is_free_or_what_helps_is_said(stands_still: bool) -> None:
    config = small_config(brokers=2)
    with subprocess.Popen([sys.executable, "-c", _KEPT_ORPHANS, config.to_json()], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, start_new_session=True) as keeper:
        try:
            assert keeper.stdout
            supervisor = int(keeper.stdout.readline())
            brokers = [each["pid"] for each in inspected(config.name)["brokers"]]
            for broker in brokers if stands_still else ():
                os.kill(broker, signal.SIGSTOP)
            os.kill(supervisor, signal.SIGKILL)
            assert eventually(lambda: supervisor_of(config.folder) is None)
            if stands_still:
                with pytest.raises(RegionForeign, match=f"was killed.*cxlmq cluster down {config.name}"):
                    Cluster(config, exact_name=True).start()
                done = subprocess.run([sys.executable, "-m", "client.cli.main", "cluster", "down", config.name], cwd=ROOT,
                                      check=False, timeout=100, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
            with Cluster(config, exact_name=True) as again:
                assert again.name == config.name
        finally:
            keeper.kill()
            for broker in brokers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(broker, signal.SIGKILL)
    assert traces(config.name) == []
