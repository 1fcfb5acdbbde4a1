"""A region is attached to only when it is the right one, and removed only when nobody holds a lock on it."""

import errno
import gc
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker import region as regions
from broker.config import ClusterConfig, layout_of, load_config
from broker.errors import (
    ConfigError,
    PermissionDenied,
    RegionError,
    RegionForeign,
    RegionMissing,
    RegionStale,
    TmpfsTooSmall,
)
from broker.hardware import report_path
from broker.inspection import inspect_region, region_statistics
from broker.layout import LAYOUT_VERSION, BrokerState, CursorState, HolderKind, Layout, SessionState, TopicState
from broker.layout_page import data_structures_markdown
from broker.region import Region, attach_region, collect_garbage, create_region, find_regions, presence_at_region
from sim.cxl import locks
from sim.cxl import region as files
from sim.cxl.memory import MemoryAccessError, Role
from tests.end_to_end.library_support import eventually

SHARED = Path("/dev/shm")
DEAD_PID = 1 << 22      # above the largest pid that Linux gives out


@pytest.fixture
def config() -> Iterator[ClusterConfig]:
    """A small cluster with a name of its own; whatever the test leaves of it is removed."""
    name = f"test-{os.getpid()}-{os.urandom(4).hex()}"
    # A short path: the sockets below it have at most 107 bytes.
    with tempfile.TemporaryDirectory() as root:
        yield load_config(environment={}, name=name, region_bytes="16MiB", runtime_directory=f"{root}/run")
    for path in (*SHARED.glob(f"cxlmq-{name}*"), *SHARED.glob(f"sem.cxlmq-{name}*")):
        path.unlink(missing_ok=True)


def path_of(config: ClusterConfig) -> Path:
    return SHARED / f"cxlmq-{config.name}"


def overwrite(config: ClusterConfig, offset: int, data: bytes) -> None:
    with path_of(config).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def superblock_offset(field: str) -> int:
    fields = regions.DTYPES["Superblock"].fields
    assert fields is not None
    return fields[field][1]


def put(config: ClusterConfig, field: str, value: int) -> None:
    """Overwrite one number of the superblock."""
    overwrite(config, superblock_offset(field), struct.pack("<Q", value))


def register_broker(region: Region, broker: int, pid: int, start_time: int) -> None:
    line = struct.pack("<8Q", BrokerState.BROKER_READY, pid, start_time, 0, 0, 0, 0, 1)
    region.memory(Role.ROLE_BROKER).write_line_bytes(region.layout.offset_of("broker", broker), line)


def summary_of(config: ClusterConfig) -> regions.RegionSummary:
    return next(each for each in find_regions() if each.name == config.name)


def collect(config: ClusterConfig, **options: Any) -> bool:
    """Collect garbage among this test's regions only; say whether this one counted as garbage."""
    return any(each.name == config.name for each in collect_garbage(folder_root=config.folder.parent, **options))


@pytest.fixture(autouse=True)
def only_own_regions(monkeypatch: pytest.MonkeyPatch, config: ClusterConfig) -> None:
    """Other clusters' leftovers on this machine are not the business of a test."""
    everything = files.list_region_files
    monkeypatch.setattr(files, "list_region_files",
                        lambda: [each for each in everything() if each.file_name.startswith(path_of(config).name)])


# ---- create and attach -------------------------------------------------------------------------------------------


def test_an_attached_region_is_the_one_that_was_created(config: ClusterConfig) -> None:
    with create_region(config) as created, attach_region(config.name) as attached:
        assert attached.run_id == created.run_id
        assert attached.layout.hash() == created.layout.hash()
        assert attached.superblock == created.superblock
        created.memory().store_word(created.layout.offset_of("segment", 0), 42)
        assert attached.memory().load_word(attached.layout.offset_of("segment", 0)) == 42
        assert created.unlink()
    assert not path_of(config).exists()


def test_a_region_is_private_and_begins_as_zeros(config: ClusterConfig) -> None:
    with create_region(config) as region:
        assert path_of(config).stat().st_mode & 0o777 == 0o600
        assert path_of(config).stat().st_size == region.layout.numbers["region_bytes"]
        content = region.memory().read_bytes(512, region.layout.numbers["region_bytes"] - 512)
        assert content.count(0) == len(content)


def test_readers_attach_read_only(config: ClusterConfig) -> None:
    with create_region(config), attach_region(config.name, writable=False) as reader:
        with pytest.raises(MemoryAccessError, match="read-only"):
            reader.memory().store_word(1024, 1)
        assert reader.memory(Role.ROLE_CLIENT, 4096).load_word(0) == 1


@pytest.mark.parametrize("region_bytes", ["5MiB", "17000001", "64MiB"])
@pytest.mark.parametrize("pool", ["atomic", "partitioned", "leader"])
def test_any_size_can_be_attached(config: ClusterConfig, region_bytes: str, pool: str) -> None:
    config = load_config(environment={}, name=config.name, region_bytes=region_bytes, pool=pool, brokers=3,
                         runtime_directory=config.runtime_directory)
    with create_region(config) as created, attach_region(config.name) as attached:
        assert attached.layout.numbers == created.layout.numbers


def test_a_missing_region_is_said_to_be_missing(config: ClusterConfig) -> None:
    with pytest.raises(RegionMissing, match="cluster up"):
        attach_region(config.name)


def test_attach_waits_for_a_region_that_comes(config: ClusterConfig) -> None:
    code = ("import sys, time; from broker.config import ClusterConfig; from broker.region import create_region\n"
            "time.sleep(0.2); create_region(ClusterConfig.from_json(sys.argv[1]), "
            "prepare=lambda region: time.sleep(0.2)); time.sleep(30)")
    child = subprocess.Popen([sys.executable, "-c", code, config.to_json()])
    try:
        with attach_region(config.name, timeout_seconds=20) as region:
            assert region.superblock["owner_pid"] == child.pid
            assert region.superblock["ready"] == 1
    finally:
        child.kill()
        child.wait()


def test_an_unfinished_region_is_not_attached_to(config: ClusterConfig) -> None:
    create_region(config).close()
    put(config, "ready", 0)
    start = time.monotonic()
    with pytest.raises(RegionMissing, match="not ready"):
        attach_region(config.name, timeout_seconds=0.05)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("field", "value", "reason"), [
    ("version", LAYOUT_VERSION + 1, "version"), ("layout_hash", 1, "another build"),
    ("pool_strategy", 77, "damaged"), ("ring_slot_count", 100, "damaged"), ("segment_bytes", 0, "damaged"),
    ("broker_count", 0, "damaged"), ("topic_count_max", 17, "another build"), ("batch_bytes_max", 1 << 63, "."),
])
def test_a_stale_region_is_refused(config: ClusterConfig, field: str, value: int, reason: str) -> None:
    create_region(config).close()
    put(config, field, value)
    with pytest.raises(RegionStale, match=reason):
        attach_region(config.name)


def test_a_region_of_another_run_is_refused(config: ClusterConfig) -> None:
    with create_region(config) as region:
        attach_region(config.name, run_id=region.run_id).close()
        with pytest.raises(RegionStale, match="another run"):
            attach_region(config.name, run_id=region.run_id + 1)


def test_a_foreign_file_is_refused(config: ClusterConfig) -> None:
    path_of(config).write_bytes(b"somebody else's data" * 1000)
    with pytest.raises(RegionForeign, match="magic"):
        attach_region(config.name)


@pytest.mark.parametrize("keep", [600, 4096, 1 << 20])
def test_a_truncated_region_is_refused(config: ClusterConfig, keep: int) -> None:
    create_region(config).close()
    os.truncate(path_of(config), keep)
    with pytest.raises(RegionForeign, match="truncated"):
        attach_region(config.name)


def test_tmpfs_too_small_is_found_before_anything_is_created(
        config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def nearly_full(path: str) -> os.statvfs_result:
        return os.statvfs_result((*real(path)[:3], 10, 10, *real(path)[5:]))

    monkeypatch.setattr(files.os, "statvfs", nearly_full)
    with pytest.raises(TmpfsTooSmall, match="region gc") as caught:
        create_region(config)
    assert caught.value.wanted_bytes == layout_of(config).numbers["region_bytes"]
    assert caught.value.free_bytes <= 10 * real("/dev/shm").f_frsize
    assert not path_of(config).exists()
    assert not config.folder.exists()


def test_what_other_regions_have_not_touched_yet_is_not_free(config: ClusterConfig) -> None:
    before = files.tmpfs_free_bytes()
    create_region(config).close()
    promised = layout_of(config).numbers["region_bytes"]
    assert files.tmpfs_free_bytes() <= before - promised + (8 << 20)     # others use /dev/shm meanwhile


def test_a_dead_cluster_gives_its_room_to_a_new_one(config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    create_region(config).close()
    room = [0, 1 << 40]
    monkeypatch.setattr(files, "tmpfs_free_bytes", lambda: room.pop(0))
    other = load_config(environment={}, name=config.name + "-b", region_bytes="16MiB",
                        runtime_directory=config.runtime_directory)
    with create_region(other) as region:
        assert not path_of(config).exists()
        assert region.unlink()


def test_nothing_is_left_when_creation_fails(config: ClusterConfig) -> None:
    def fail(_: Region) -> None:
        raise ZeroDivisionError

    locked = load_config(environment={}, name=config.name, region_bytes="16MiB", sequencer_lock="semaphore",
                         runtime_directory=config.runtime_directory)
    with pytest.raises(ZeroDivisionError):
        create_region(locked, prepare=fail)
    assert not path_of(config).exists()
    assert not (SHARED / f"sem.cxlmq-{config.name}-order").exists()
    assert not config.folder.exists()


def test_a_layout_that_nobody_could_attach_to_is_refused(config: ClusterConfig) -> None:
    # Segments larger than their alignment: rounding the size down changes the tables in front of them.
    config = load_config(environment={}, name=config.name, region_bytes="256MiB", segment_bytes="8MiB",
                         runtime_directory=config.runtime_directory)
    numbers = layout_of(config).numbers
    unsettled = Layout.compute(**{**{name: numbers[name] for name in regions._LAYOUT_NUMBERS},
                                  "region_bytes": config.region_bytes})
    with pytest.raises(RegionError, match="layout_of"):
        create_region(config, unsettled)
    with create_region(config) as created, attach_region(config.name) as attached:
        assert attached.layout.numbers == created.layout.numbers == numbers


# ---- names that are taken ----------------------------------------------------------------------------------------


def test_the_name_of_a_live_region_is_taken(config: ClusterConfig) -> None:
    with create_region(config) as region:
        with pytest.raises(RegionForeign, match="choose another cluster name"):
            create_region(config)
        assert attach_region(config.name).run_id == region.run_id


def test_a_leftover_makes_way_for_a_new_region(config: ClusterConfig) -> None:
    first = create_region(config)
    (config.folder / "old").write_text("")
    first.close()
    second = create_region(config)
    assert second.run_id != first.run_id
    assert config.folder.is_dir()
    assert not (config.folder / "old").exists()


def test_an_old_run_does_not_unlink_a_new_one(config: ClusterConfig) -> None:
    first = create_region(config)
    first.close()
    second = create_region(config)
    assert first.unlink() is False
    assert path_of(config).exists()
    assert second.unlink() is True
    assert second.unlink() is False


def test_whoever_leaves_last_removes_everything(config: ClusterConfig) -> None:
    create_region(config).close()
    with attach_region(config.name, folder_root=config.folder.parent) as region:
        assert region.unlink()
    assert not path_of(config).exists()
    assert not config.folder.exists()


def test_whoever_lives_in_a_region_keeps_it(config: ClusterConfig) -> None:
    create_region(config).close()
    assert not summary_of(config).live
    broker = attach_region(config.name)
    broker.hold_broker(2)
    register_broker(broker, 2, os.getpid(), files.process_start_time())
    register_broker(broker, 3, os.getpid(), files.process_start_time())     # the pid was given out again
    assert summary_of(config).live
    assert (summary_of(config).brokers_alive, summary_of(config).brokers_dead) == (1, 1)
    presence, supervisor = files.presence_of(path_of(config).name), files.locks_of(path_of(config).name)
    assert supervisor.take(locks.SUPERVISOR)
    for who, leave in (("1 brokers run", broker.close), ("supervisor", supervisor.close), ("clients", presence.leave)):
        assert who in summary_of(config).reason
        assert not collect(config)
        assert path_of(config).exists()
        if who != "clients":
            with pytest.raises(RegionForeign):
                create_region(config)
            leave()
    assert path_of(config).exists()
    create_region(config).close()           # who wants the name does not wait for clients of a dead cluster
    presence.leave()
    assert not summary_of(config).live
    assert collect(config)


def test_a_broker_number_is_given_once(config: ClusterConfig) -> None:
    with create_region(config) as region, attach_region(config.name) as other:
        region.hold_broker(1)
        assert region.broker_lives(1) and other.broker_lives(1) and not other.broker_lives(0)
        with pytest.raises(RegionForeign, match="choose another --id"):
            other.hold_broker(1)
        other.hold_broker(0)
        assert region.broker_lives(0)
    with attach_region(config.name) as later:
        later.hold_broker(1)


def test_a_broker_does_not_come_to_life_in_a_region_that_was_removed(config: ClusterConfig) -> None:
    create_region(config).close()
    with attach_region(config.name) as late:
        assert collect(config)
        with pytest.raises(RegionMissing, match="start the cluster"):
            late.hold_broker(0)


@pytest.mark.parametrize("last", [0, 1])
def test_the_last_broker_removes_the_region_and_nobody_else(config: ClusterConfig, last: int) -> None:
    create_region(config).close()
    root = config.folder.parent
    brokers = [attach_region(config.name, folder_root=root) for _ in range(2)]
    for number, each in enumerate(brokers):
        each.hold_broker(number)
    assert not brokers[1 - last].leave()
    assert path_of(config).exists()
    with files.locks_of(path_of(config).name) as supervisor:
        assert supervisor.take(locks.SUPERVISOR)
        assert not brokers[last].leave(), "its supervisor will start it anew"
        assert path_of(config).exists()
    brokers[last].hold_broker(last)
    assert brokers[last].leave()
    assert not path_of(config).exists()
    assert not config.folder.exists()


def test_locks_are_not_inherited_and_go_with_their_process(config: ClusterConfig) -> None:
    region = create_region(config)
    region.hold_broker(0)
    presence = files.presence_of(path_of(config).name)
    said, say = os.pipe()
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:                          # lives on when its parent has left
        try:
            mine = files.presence_of(path_of(config).name)
            os.write(say, b"held" if mine.number != presence.number and region.client_lives(mine.number) else b"none")
            os.read(wait, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.read(said, 4) == b"held"
    region.close()
    presence.leave()
    seen = files.locks_of(path_of(config).name)
    assert not seen.held(*locks.OWNERS), "the child holds nothing of its parent's"
    assert seen.held(*locks.EVERYBODY), "the child is a client of its own"
    os.write(go, b"x")
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)     # still a zombie
    assert not seen.held(*locks.EVERYBODY)
    os.waitpid(child, 0)
    for each in (said, say, wait, go):
        os.close(each)


def test_a_presence_lasts_as_long_as_anything_that_is_viewed(config: ClusterConfig) -> None:
    with create_region(config) as region:
        name = path_of(config).name
        presence = files.presence_of(name)
        number = presence.number
        assert files.presence_of(name) is presence, "one for all clients of a process"
        attached = attach_region(config.name)
        attached.mapping.presence = presence
        view = memoryview(attached.mapping)
        attached.close()
        del attached, presence
        assert region.client_lives(number)
        del view
        gc.collect()
        assert not region.client_lives(number)
        assert not region.client_lives(0) and not region.client_lives(1 << 63)


def test_judges_wait_for_each_other(config: ClusterConfig) -> None:
    create_region(config).close()
    with files.locks_of(path_of(config).name) as judge, ThreadPoolExecutor() as pool:
        assert judge.take(*locks.EVERYBODY)
        starting = pool.submit(create_region, config)
        time.sleep(0.1)
        assert not starting.done(), "it is not refused: nobody lives there"
        judge.close()
        starting.result(10.0).close()


# ---- garbage -----------------------------------------------------------------------------------------------------


def test_only_dead_regions_are_collected(config: ClusterConfig) -> None:
    dead = load_config(environment={}, name=config.name + "-dead", region_bytes="16MiB", sequencer_lock="semaphore",
                       runtime_directory=config.runtime_directory)
    live_region, dead_region = create_region(config), create_region(dead)
    register_broker(dead_region, 0, DEAD_PID, 5)
    dead_region.close()
    assert collect(dead, dry_run=True)
    assert path_of(dead).exists()
    assert [each.name for each in collect_garbage(folder_root=config.folder.parent)] == [dead.name]
    assert not path_of(dead).exists()
    assert not dead.folder.exists()
    assert not (SHARED / f"sem.cxlmq-{dead.name}-order").exists()
    assert path_of(config).exists()
    assert config.folder.exists()
    assert collect_garbage(folder_root=config.folder.parent) == []
    assert live_region.unlink()


def test_a_killed_creator_leaves_garbage(config: ClusterConfig) -> None:
    code = ("import sys, os; from broker.config import ClusterConfig; from broker.region import create_region\n"
            "create_region(ClusterConfig.from_json(sys.argv[1])); os.kill(os.getpid(), 9)")
    child = subprocess.Popen([sys.executable, "-c", code, config.to_json()])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)     # still a zombie
    assert not summary_of(config).live
    child.wait()
    assert not summary_of(config).live
    assert "dead" in summary_of(config).reason
    assert collect(config)


def test_process_ids_of_a_region_decide_nothing(config: ClusterConfig) -> None:
    with create_region(config) as region:
        register_broker(region, 1, DEAD_PID, 1)
        put(config, "owner_pid", DEAD_PID)
        assert summary_of(config).live
    put(config, "owner_pid", os.getpid())
    put(config, "owner_start", files.process_start_time())
    boot, namespace = files.host_identity().split(":")
    overwrite(config, superblock_offset("boot_id"), f"{boot}:{int(namespace) + 1}".encode().ljust(64, b"\0"))
    assert not summary_of(config).live


def test_a_process_of_another_namespace_is_seen(config: ClusterConfig) -> None:
    code = ("import sys; from broker.config import ClusterConfig; from broker.region import create_region\n"
            "region = create_region(ClusterConfig.from_json(sys.argv[1])); region.hold_broker(0); print(1, flush=True)\n"
            "sys.stdin.read()")
    with subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", code, config.to_json()],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as box:
        assert box.stdin and box.stdout and box.stderr
        if not box.stdout.readline():
            pytest.skip(f"no process-id namespace here: {box.stderr.read().decode()[-200:]}")
        assert summary_of(config).live
        with attach_region(config.name, writable=False) as region:
            assert region.broker_lives(0)
        with pytest.raises(RegionForeign):
            create_region(config)
        box.kill()
    with attach_region(config.name, writable=False) as region:
        assert eventually(lambda: not region.broker_lives(0), 10.0)
    assert not summary_of(config).live
    create_region(config).close()


# ---- who may be trusted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602, 0o644, 0o640, 0o604])
def test_a_region_that_others_can_open_is_refused(config: ClusterConfig, mode: int) -> None:
    with create_region(config):
        path_of(config).chmod(mode)
        for writable in (False, True):
            with pytest.raises(PermissionDenied, match="chmod 600"):
                attach_region(config.name, writable)
        path_of(config).chmod(0o600)
        attach_region(config.name).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_region_of_another_user_is_refused_by_root_too(config: ClusterConfig) -> None:
    with create_region(config):
        os.chown(path_of(config), 65534, 65534)
        for attempt in (lambda: attach_region(config.name, writable=False), lambda: attach_region(config.name),
                        lambda: presence_at_region(config.name)):
            with pytest.raises(PermissionDenied, match="65534"):
                attempt()
        assert find_regions() == []
        with pytest.raises(RegionForeign):
            create_region(config)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_and_not_waited_for(config: ClusterConfig, make: Callable[[Path], None]) -> None:
    make(path_of(config))
    try:
        with pytest.raises((PermissionDenied, RegionForeign)):
            attach_region(config.name, writable=False)
        with pytest.raises((PermissionDenied, RegionForeign)):
            create_region(config)
    finally:
        path_of(config).unlink() if make is os.mkfifo else path_of(config).rmdir()


# ---- memory is reserved ------------------------------------------------------------------------------------------


def test_the_memory_of_a_region_is_reserved(config: ClusterConfig) -> None:
    with create_region(config) as region:
        assert path_of(config).stat().st_blocks * 512 >= region.layout.numbers["region_bytes"]


@pytest.mark.parametrize("memory", ["noncoherent", "checked"])
def test_files_beside_a_region_are_reserved(config: ClusterConfig, memory: str) -> None:
    simulated = msgspec.structs.replace(config, memory=memory)
    with create_region(simulated) as region:
        beside = [path for path in SHARED.glob(f"cxlmq?*-{config.name}") if path != path_of(config)]
        assert len(beside) == (2 if memory == "checked" else 1)
        for path in beside:
            assert path.stat().st_blocks * 512 >= path.stat().st_size > 0
        assert region.unlink()


@pytest.mark.parametrize(("memory", "file"), [("mapped", "region"), ("checked", "region"), ("checked", "side")])
def test_a_shared_memory_that_fills_up_meanwhile_is_refused(
        config: ClusterConfig, monkeypatch: pytest.MonkeyPatch, memory: str, file: str) -> None:
    """What was free when we looked is taken by others when we reserve it."""
    reserve = files.reserve

    def full(descriptor: int, nbytes: int) -> None:
        if file == "region" or nbytes != layout_of(config).numbers["region_bytes"]:
            raise OSError(errno.ENOSPC, "full")
        reserve(descriptor, nbytes)

    monkeypatch.setattr(files, "reserve", full)
    with pytest.raises(TmpfsTooSmall, match="region_bytes") as refused:
        create_region(msgspec.structs.replace(config, memory=memory))
    assert refused.value.details["wanted_bytes"] > 0
    assert not list(SHARED.glob(f"*{config.name}*"))


def test_a_creator_that_is_killed_while_it_reserves_leaves_nothing(config: ClusterConfig) -> None:
    code = ("import os, sys; from sim.cxl import region as files\n"
            "files._name = lambda *_: os.kill(os.getpid(), 9)\nfiles.create_region_file(sys.argv[1], 1 << 20)")
    assert subprocess.run([sys.executable, "-c", code, path_of(config).name], check=False).returncode == -9
    assert not path_of(config).exists()


@pytest.mark.parametrize("content", [b"somebody else's", b"x" * 10_000, bytes(512) + b"data", bytes(5000) + b"data"])
def test_files_that_are_not_ours_are_left_alone(config: ClusterConfig, content: bytes) -> None:
    path_of(config).write_bytes(content)
    os.utime(path_of(config), (0, 0))
    assert not collect(config)
    assert path_of(config).read_bytes() == content
    with pytest.raises(RegionForeign):
        create_region(config)


def test_a_link_is_not_followed(config: ClusterConfig, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(bytes(4096))
    path_of(config).symlink_to(tmp_path / "precious")
    assert find_regions() == []
    with pytest.raises(PermissionDenied):
        attach_region(config.name)
    with pytest.raises(RegionForeign):
        create_region(config)
    assert (tmp_path / "precious").exists()


def test_a_file_that_its_creator_never_wrote_is_collected_after_a_while(config: ClusterConfig) -> None:
    for size in (0, 1 << 20):
        path_of(config).write_bytes(b"")
        os.truncate(path_of(config), size)
        assert summary_of(config).live
        assert not collect(config)
        os.utime(path_of(config), (0, 0))
        assert collect(config)
        assert not path_of(config).exists()


def test_a_region_of_another_version_is_collected_when_nobody_maps_it(config: ClusterConfig) -> None:
    create_region(config).close()
    put(config, "version", LAYOUT_VERSION + 1)
    code = ("import sys, mmap; file = open(sys.argv[1], 'r+b'); mapping = mmap.mmap(file.fileno(), 0)\n"
            "print('mapped', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(path_of(config))], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert summary_of(config).live
        assert not collect(config)
    assert collect(config)


def test_only_our_own_folder_is_removed(config: ClusterConfig, tmp_path: Path) -> None:
    create_region(config).close()
    at = superblock_offset("folder")
    for foreign in (tmp_path / "home", tmp_path / "elsewhere" / config.folder.name):
        foreign.mkdir(parents=True)
        (foreign / "precious").write_text("")
        overwrite(config, at, str(foreign).encode().ljust(128, b"\0"))
        assert collect(config)
        assert (foreign / "precious").exists()
        create_region(config).close()


# ---- looking in --------------------------------------------------------------------------------------------------


def test_a_dead_region_can_be_read(config: ClusterConfig) -> None:
    region = create_region(config)
    register_broker(region, 1, DEAD_PID, 5)
    address = b"127.0.0.1:4000".ljust(128, b"\0") + b"/run/b1".ljust(128, b"\0")
    memory, layout = region.memory(), region.layout
    for start in range(0, 256, 64):
        memory.write_line_bytes(layout.offset_of("broker_address", 1) + start, address[start:start + 64])
    memory.fetch_or_word(layout.offset_of("bitmap"), 0b111)
    memory.fetch_or_word(layout.offset_of("warm_bitmap"), 0b11111)
    for segment, topic in ((0, 3), (1, 3), (2, 4)):
        memory.write_line_bytes(layout.offset_of("segment_line", segment),
                                struct.pack("<8Q", 2 | topic << 16 | 9 << 32, *[0] * 7))
    memory.write_line_bytes(layout.offset_of("topic", 3),
                            struct.pack("<8Q", 9 << 8 | TopicState.TOPIC_ACTIVE, 5, 1, 2, (1 << 64) - 1, 0, 100, 0))
    memory.write_bytes(layout.offset_of("topic_name", 3), b"orders")
    memory.write_line_bytes(layout.offset_of("topic_order", 3), struct.pack("<8Q", 9, 90, 0, 0, 0, 0, 0, 0))
    memory.write_line_bytes(layout.offset_of("topic_reclaim", 3),
                            struct.pack("<8Q", 7, 70, 700, HolderKind.HOLDER_REPLICA << 32 | 2, 8, 0, 0, 0))
    memory.write_line_bytes(layout.offset_of("session", 5),
                            struct.pack("<8Q", 4 << 8 | SessionState.SESSION_OPEN, 77, 1, 9 << 16 | 3, 1, 0, 1, 0))
    memory.write_line_bytes(layout.offset_of("cursor", 6),
                            struct.pack("<8Q", 2 << 8 | CursorState.CURSOR_LIVE, 9 << 16 | 3, 11, 12, 0, 0, 0, 0))
    seen = inspect_region(attach_region(config.name, writable=False))
    assert seen["brokers"][1] == {**seen["brokers"][1], "broker": 1, "state": "ready", "alive": False,
                                  "tcp_address": "127.0.0.1:4000", "unix_address": "/run/b1"}
    pool = seen["pool"]
    assert (pool["used"], pool["warm"], pool["free"]) == (3, 5, layout.numbers["segment_count"] - 3)
    assert pool["owners"] == [{"broker": 1, "topic": 3, "generation": 9, "segments": 2},
                              {"broker": 1, "topic": 4, "generation": 9, "segments": 1}]
    (topic,), (session,), (cursor,) = seen["topics"], seen["sessions"], seen["cursors"]
    assert (topic["name"], topic["state"], topic["generation"]) == ("orders", "active", 9)
    assert (topic["retention_bytes"], len(topic["brokers"])) == (-1, 4)
    assert topic["holder"] == "topic orders, which never drops data"
    assert (session["session"], session["state"], session["topic"], session["client_id"]) == (5, "open", 3, 77)
    assert (cursor["cursor"], cursor["state"], cursor["topic_generation"], cursor["index"]) == (6, "live", 9, 11)


def test_statistics_are_summed_by_role(config: ClusterConfig) -> None:
    with create_region(config) as region:
        for broker in range(2):
            at = region.layout.offset_of("role_statistics", broker, Role.ROLE_SEQUENCER)
            region.memory(Role.ROLE_SEQUENCER, at).store_fence()
        counted = region_statistics(region)
        assert counted["roles"]["sequencer"]["fences"] == counted["total"]["fences"] == 2
        assert counted["roles_by_broker"][1]["sequencer"]["fences"] == 1
        assert counted["roles"]["delivery"]["fences"] == 0
        assert len(counted["brokers"]) == 4
        assert counted["sequencer"]["batches_ordered"] == 0


def test_the_printed_map_names_every_field(config: ClusterConfig) -> None:
    page = data_structures_markdown(layout_of(config))
    for record, dtype in regions.DTYPES.items():
        assert f"### {record}\n" in page
        for field in dtype.names or ():
            assert f"| {field} |" in page
    assert "stored last" in page
    assert page == data_structures_markdown(layout_of(config))


# ---- processes and semaphores ------------------------------------------------------------------------------------


def test_a_process_is_known_by_pid_start_and_host() -> None:
    start, host = files.process_start_time(), files.host_identity()
    assert start > 0
    assert files.process_alive(os.getpid(), start, host)
    assert not files.process_alive(os.getpid(), start + 1, host)
    assert not files.process_alive(DEAD_PID, start, host)
    assert not files.process_alive(0, 0, host)
    assert not files.process_alive(os.getpid(), start, "another boot")
    assert files.process_start_time(DEAD_PID) == 0


def test_a_named_semaphore_is_created_once_and_free(config: ClusterConfig) -> None:
    name = regions.semaphore_name_of(config.name)
    semaphore = files.create_semaphore(name)
    with pytest.raises(files.RegionFileExists):
        files.create_semaphore(name)
    other = files.open_semaphore(name)
    semaphore.acquire(1)
    assert other.value == 0
    other.release()
    assert files.remove_semaphore(name) is True
    assert files.remove_semaphore(name) is False
    with pytest.raises(files.RegionFileMissing):
        files.open_semaphore(name)


@pytest.mark.parametrize("memory", ["noncoherent", "checked"])
def test_memory_without_coherence_comes_full_of_garbage_and_leaves_nothing(memory: str, tmp_path: Path) -> None:
    config = load_config(environment={}, name=f"garbage-{os.getpid()}", region_bytes="16MiB", memory=memory,
                         runtime_directory=str(tmp_path))
    with create_region(config) as region:
        rings = region.layout.offset_of("ring", 0, 0, 0)
        segment = region.layout.offset_of("segment", 3)
        door = region.memory()
        assert door.read_bytes(rings, 4096).count(0) < 100 and door.read_bytes(segment, 4096).count(0) < 100
        assert door.read_bytes(region.layout.offset_of("session", 0), 4096) == bytes(4096), "tables are cleared"
        assert list(Path("/dev/shm").glob(f"*{config.name}*"))
        del door
        assert region.unlink()
    assert not list(Path("/dev/shm").glob(f"*{config.name}*"))
    kept = report_path(config.name, tmp_path)
    assert kept.is_file() == (memory == "checked")
    with pytest.raises(ConfigError, match="at least"):
        create_region(msgspec.structs.replace(config, coherent_bytes=64))
