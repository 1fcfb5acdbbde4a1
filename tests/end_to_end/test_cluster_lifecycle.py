"""Ready means answering; whatever ends a cluster, no process and no file of it is left."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import load_config
from broker.errors import PortTaken, RegionForeign, RegionTooSmall, TmpfsTooSmall
from broker.region import attach_region, collect_garbage, find_regions
from client.cluster import (
    BrokerFailed,
    Cluster,
    answers,
    collect_leftovers,
    start_detached,
    stop_cluster,
    supervisor_of,
)
from sim.cxl import region as files
from tests.end_to_end.conftest import small_config, traces, unique
from tests.end_to_end.library_support import eventually

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 15.0


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return files.process_alive(pid, files.process_start_time(pid), files.host_identity())


class Supervised:
    """`cxlmq cluster up` in a process of its own."""

    def __init__(self, *options: str, name: str | None = None) -> None:
        self.name = name or unique("test")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "client.cli.main", "cluster", "up", "--json", "--brokers", "2", "--region-bytes",
             "64MiB", "--name", self.name, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def ready(self) -> list[int]:
        """Wait until it is ready; the brokers' process ids."""
        assert self.process.stdout
        readable, _, _ = select.select([self.process.stdout], [], [], 90.0)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self.process.kill()             # else what it said would have no end
            assert self.process.stderr
            raise AssertionError(self.process.stderr.read().decode())
        return [broker["pid"] for broker in json.loads(line)["brokers"]]


@pytest.fixture
def supervised() -> Iterator[Supervised]:
    """A foreground cluster, whatever the test does to it."""
    running = Supervised()
    yield running
    if running.process.poll() is None:
        running.process.kill()
    running.process.communicate()
    eventually(lambda: not traces(running.name), 5.0)
    collect_leftovers()


# ---- up and down -------------------------------------------------------------------------------------------------


def test_ready_means_answering_and_stop_leaves_nothing() -> None:
    with Cluster(small_config(brokers=3)) as running:
        name, pids = running.name, running.processes
        assert sorted(pids) == sorted(running.addresses) == [0, 1, 2]
        for addresses in running.addresses.values():
            assert answers(addresses.tcp, 1.0)
            assert answers(addresses.unix, 1.0)
        assert supervisor_of(running.config.folder).pid == os.getpid()
    assert traces(name) == []
    assert running.processes == {}
    assert running.exit_codes == {0: 0, 1: 0, 2: 0}


def test_start_imports_nothing_slow() -> None:
    program = "import client.cluster, sys; print([m for m in ('numpy', 'grpc', 'rich', 'psutil') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_second_cluster_beside_a_running_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first = unique("test")
    monkeypatch.setattr("client.cluster.DEFAULT_NAME", first)
    with Cluster(small_config(brokers=2, name=first)) as one, Cluster(small_config(brokers=2, name=first)) as two:
        assert (one.name, two.name) == (first, f"{first}-2")
        assert any(first in note and f"{first}-2" in note for note in two.notes)
        ports = {addresses.tcp for each in (one, two) for addresses in each.addresses.values()}
        assert len(ports) == 4
    assert traces(first) == traces(f"{first}-2") == []


def test_given_name_that_is_taken_is_refused() -> None:
    with Cluster(small_config(brokers=2)) as running:
        with pytest.raises(RegionForeign, match="another cluster name"):
            Cluster(small_config(brokers=2, name=running.name)).start()
        assert len(running.processes) == 2
        assert attach_region(running.name, writable=False).run_id
    assert traces(running.name) == []


def test_name_taken_by_a_cluster_in_another_folder(runtime_folder: Path) -> None:
    with Cluster(small_config(brokers=2, runtime_directory=str(runtime_folder))) as running:
        with pytest.raises(RegionForeign):
            Cluster(small_config(brokers=2, name=running.name)).start()
        assert len(running.processes) == 2
    assert traces(running.name) == []
    assert not list(runtime_folder.glob("*"))


def test_replicas_stay_in_a_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Cluster(small_config(brokers=2, data_directory="data")) as running:
        assert running.config.data_directory == str(tmp_path / "data")
    assert traces(running.name) == []


# ---- bad starts --------------------------------------------------------------------------------------------------


def free_ports(count: int) -> int:
    """The first of some neighbouring ports that were free just now."""
    for port in range(20000 + os.getpid() % 10000, 60000, count):
        try:
            for each in range(port, port + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")


def test_port_taken_is_typed() -> None:
    port = free_ports(2)
    config = small_config(brokers=2, listen_port=port)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port + 1))
        holder.listen()
        with pytest.raises(PortTaken, match=f"{port + 1}.*listen_port"):
            Cluster(config).start()
    assert traces(config.name) == []


def test_given_ports_are_used() -> None:
    port = free_ports(2)
    with Cluster(small_config(brokers=2, listen_port=port)) as running:
        assert [each.tcp for each in running.addresses.values()] == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]


def test_region_too_small_is_typed() -> None:
    config = small_config(brokers=16, region_bytes="1MiB")
    with pytest.raises(RegionTooSmall, match="MiB"):
        Cluster(config).start()
    assert traces(config.name) == []


def test_tmpfs_too_small_is_typed() -> None:
    config = small_config(brokers=2, region_bytes=files.tmpfs_free_bytes() + (1 << 30))
    with pytest.raises(TmpfsTooSmall, match="region_bytes"):
        Cluster(config).start()
    assert traces(config.name) == []


def test_broker_that_dies_without_a_word_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "node.py").write_text("raise SystemError('out of luck')")
    monkeypatch.setattr("client.cluster._CODE_FOLDER", tmp_path)
    config = small_config(brokers=2)
    with pytest.raises(BrokerFailed, match="out of luck"):
        Cluster(config).start()
    assert traces(config.name) == []


def test_broker_that_is_never_ready_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "node.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr("client.cluster._CODE_FOLDER", tmp_path)
    config = small_config(brokers=2)
    with pytest.raises(BrokerFailed, match="not ready"):
        Cluster(config, ready_seconds=0.5).start()
    assert traces(config.name) == []


# ---- signals and crashes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_supervisor_stops_everything(supervised: Supervised, number: signal.Signals) -> None:
    pids = supervised.ready()
    supervised.process.send_signal(number)
    assert supervised.process.wait(END_SECONDS) == 0
    assert traces(supervised.name) == []
    assert not any(map(alive, pids))


def test_signal_while_it_starts(supervised: Supervised) -> None:
    folder = load_config(environment={}, name=supervised.name).folder
    assert eventually((folder / "broker-1.log").exists, END_SECONDS)
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.process.wait(END_SECONDS) == 130
    assert traces(supervised.name) == []


def test_kill_of_the_supervisor_leaves_nothing(supervised: Supervised) -> None:
    pids = supervised.ready()
    supervised.process.kill()
    supervised.process.wait()
    assert eventually(lambda: not any(map(alive, pids)), END_SECONDS)
    # The last broker removes the region and the folder with the pid file.
    assert eventually(lambda: not traces(supervised.name), END_SECONDS), traces(supervised.name)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3])
def test_kill_of_the_supervisor_while_it_starts(supervised: Supervised, seconds: float) -> None:
    folder = load_config(environment={}, name=supervised.name).folder
    assert eventually((folder / "broker-1.log").exists, END_SECONDS)
    children = Path(f"/proc/{supervised.process.pid}/task/{supervised.process.pid}/children").read_text().split()
    time.sleep(seconds)
    supervised.process.kill()
    supervised.process.wait()
    assert children
    assert eventually(lambda: not any(alive(int(child)) for child in children), END_SECONDS)
    # What is left has no process and no region, or a dead one: the next start removes it.
    collect_leftovers()
    assert traces(supervised.name) == []


def test_crashed_script_leaves_nothing() -> None:
    config = small_config(brokers=2)
    program = ("import sys, os\nfrom broker.config import ClusterConfig\nfrom client.cluster import Cluster\n"
               f"running = Cluster(ClusterConfig.from_json({config.to_json()!r})).start()\n"
               "print(*running.processes.values(), flush=True)\nos._exit(3)")
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    assert eventually(lambda: not traces(config.name), END_SECONDS), traces(config.name)


def test_kill_of_everything_leaves_a_leftover_that_gc_removes(supervised: Supervised) -> None:
    pids = supervised.ready()
    os.kill(supervised.process.pid, signal.SIGSTOP)     # so that it does not tidy up when its brokers die
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    supervised.process.kill()
    supervised.process.wait()
    assert eventually(lambda: not any(map(alive, pids)), END_SECONDS)
    assert [each.live for each in find_regions() if each.name == supervised.name] == [False]
    assert supervised.name in [each.name for each in collect_garbage(dry_run=True)]
    assert traces(supervised.name)
    assert supervised.name in [each.name for each in collect_garbage()]
    assert traces(supervised.name) == []


def test_next_start_takes_the_name_of_a_dead_cluster(supervised: Supervised) -> None:
    pids = supervised.ready()
    os.kill(supervised.process.pid, signal.SIGSTOP)
    for pid in (*pids, supervised.process.pid):
        os.kill(pid, signal.SIGKILL)
    supervised.process.wait()
    assert eventually(lambda: not any(map(alive, pids)), END_SECONDS)
    with Cluster(small_config(brokers=2, name=supervised.name)) as again:
        assert again.name == supervised.name
        assert any("leftovers" in note for note in again.notes)
    assert traces(supervised.name) == []


def test_folder_of_a_supervisor_that_died_early_is_collected() -> None:
    config = small_config(brokers=2)
    config.folder.mkdir(parents=True)
    (config.folder / "supervisor.pid").write_text(json.dumps({"pid": 1 << 22, "start_time": 1, "boot_id": "gone:1"}))
    assert config.name in collect_leftovers(dry_run=True)
    assert config.folder.exists()
    assert config.name in collect_leftovers()
    assert traces(config.name) == []


def test_killed_broker_is_said_and_the_rest_stops_clean() -> None:
    with Cluster(small_config(brokers=3, restart=False)) as running:
        running.kill(2)
        assert not running.wait(0.5)
        assert sorted(running.processes) == [0, 1]
        assert any("broker 2" in note and "SIGKILL" in note for note in running.notes)
        with pytest.raises(ProcessLookupError):
            running.kill(2)
    assert traces(running.name) == []


def test_all_brokers_killed_ends_the_wait_and_leaves_nothing() -> None:
    with Cluster(small_config(brokers=2, restart=False)) as running:
        for broker in (0, 1):
            running.kill(broker, signal.SIGKILL)
        assert running.wait(END_SECONDS)
    assert traces(running.name) == []


def test_stopped_broker_is_killed_after_the_time_out() -> None:
    with Cluster(small_config(brokers=2), stop_seconds=0.5) as running:
        running.kill(1, signal.SIGSTOP)
    assert running.exit_codes[1] == -signal.SIGKILL
    assert traces(running.name) == []


# ---- in the background -------------------------------------------------------------------------------------------


def test_detached_cluster_goes_on_and_is_stopped_by_name() -> None:
    config = small_config(brokers=2)
    values = start_detached(config)
    try:
        assert [broker["id"] for broker in values["brokers"]] == [0, 1]
        assert alive(values["supervisor"])
        assert supervisor_of(config.folder).pid == values["supervisor"]
        assert answers(values["brokers"][0]["unix_address"], 1.0)
    finally:
        assert stop_cluster(config.folder)
    assert traces(config.name) == []
    assert not stop_cluster(config.folder)


def test_detached_start_raises_what_went_wrong() -> None:
    with Cluster(small_config(brokers=2)) as running:
        with pytest.raises(RegionForeign):
            start_detached(small_config(brokers=2, name=running.name))
