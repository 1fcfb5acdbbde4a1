"""The region of a cluster: created, attached to, and removed when its owners are dead. broker/inspection.py reads it.

    create    reserved, with its superblock (ready = 0) and locked ──► named ──► prepare ──► ready = 1
    attach    owner ──► magic ──► version ──► ready ──► size ──► layout hash ──► run id

Who lives holds a lock on the file (sim/cxl/locks.py): its supervisor, its brokers, whoever made it, attached clients.
A region that nobody holds is a leftover. Nothing else is removed by others; a broker that leaves last removes it, and
its supervisor does. Process ids in the region are for people.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from broker.config import MEMORIES, ClusterConfig, layout_of, make_folder, runtime_root
from broker.errors import PermissionDenied, RegionError, RegionForeign, RegionMissing, RegionStale, TmpfsTooSmall
from broker.hardware import Hardware, check_hardware, remove_hardware, report_path
from broker.layout import (
    LAYOUT_MAGIC,
    LAYOUT_VERSION,
    POOL_STRATEGIES,
    Layout,
    LayoutError,
)
from broker.record_arrays import DTYPES, decoded, read_indexed, read_one, read_table
from sim.cxl import locks
from sim.cxl import region as files
from sim.cxl.memory import MappedMemory, Memory, Role

LINE_BYTES = 64
SUPERBLOCK_BYTES = DTYPES["Superblock"].itemsize
# A creator writes the superblock within a millisecond. A file that is still blank after this long lost its creator.
UNFINISHED_SECONDS = 60.0
_POLL_SECONDS = 0.002
_WIPED_LATER = ("superblock", "batch-header rings", "results", "order indexes", "further banks",
                "segments")
_LAYOUT_NUMBERS = ("broker_count", "region_bytes", "topic_count_max", "ring_slot_count", "order_entry_count",
                   "session_count_max", "cursor_count_max", "attach_slot_count", "segment_bytes", "message_bytes_max",
                   "batch_bytes_max", "group_count_max")


def file_name_of(name: str) -> str:
    """The region file of a cluster."""
    return f"{files.REGION_PREFIX}{name}"


def semaphore_name_of(name: str) -> str:
    """The named semaphore that the sequencer lock "semaphore" uses; sem_open(3) wants a '/' before it."""
    return f"{files.REGION_PREFIX}{name}-order"


class Region:
    """A mapped region. Memory objects handed out keep the mapping alive after `close`."""

    def __init__(self, name: str, mapping: Any, layout: Layout, superblock: dict[str, Any], writable: bool,
                 folder_root: Path) -> None:
        self.name = name
        self.mapping = mapping
        self.layout = layout
        self.superblock = superblock
        self.writable = writable
        self._folder_root = folder_root
        self.hardware = Hardware(name, mapping, layout, superblock, writable)
        # Without: a copy, which nobody can live in.
        self.locks: locks.FileLocks | None = getattr(mapping, "locks", None)

    @property
    def run_id(self) -> int:
        """Tells this run of the cluster from every other."""
        return int(self.superblock["run_id"])

    @property
    def file_name(self) -> str:
        """Name of the file in /dev/shm."""
        return file_name_of(self.name)

    @property
    def semaphore_name(self) -> str:
        """Name of the cluster's named semaphore."""
        return semaphore_name_of(self.name)

    @property
    def folder(self) -> Path:
        """The cluster's folder (sockets, logs, private replicas)."""
        return Path(self.superblock["folder"])

    def memory(self, role: int = Role.ROLE_ADMIN, statistics_offset: int = 0) -> Memory:
        """A door to the region for a role; 0 counts its accesses privately."""
        return self.hardware.door(int(role), statistics_offset)

    def renew_semaphore(self) -> None:
        """Replace the named semaphore by a free one: whoever holds the old one keeps that."""
        files.remove_semaphore(self.semaphore_name)
        files.create_semaphore(self.semaphore_name).close()

    # ---- who lives --------------------------------------------------------------------------------------------------

    def hold_broker(self, broker: int) -> None:
        """Be this broker, for as long as this region is open. Raises `RegionForeign` when a process is it already."""
        assert self.locks is not None
        if self.locks.take(locks.broker_place(broker)):
            if not self.locks.is_named():
                raise RegionMissing(f"region {self.name} was just removed: start the cluster anew", region=self.name)
            return
        pid = read_one(self.memory(), self.layout, "BrokerLine", "broker", broker)["pid"]
        raise RegionForeign(f"broker {broker} of cluster {self.name} runs already (process {pid}): choose another --id",
                            region=self.name, reason="broker runs")

    def broker_lives(self, broker: int) -> bool:
        """Whether a process is this broker now."""
        return self.locks is not None and self.locks.held(locks.broker_place(broker))

    def client_lives(self, presence: int) -> bool:
        """Whether the process of an attached client, known by the number of its lock, lives."""
        return (self.locks is not None and 0 < presence < locks.CLIENTS_END - locks.CLIENTS
                and self.locks.held(locks.CLIENTS + presence))

    def close(self) -> None:
        """Let go of what we were here, and unmap once no Memory of ours is left."""
        if self.locks is not None:
            self.locks.close()
            self.locks = None
        with contextlib.suppress(BufferError):      # a Memory lives: the mapping goes with the last of them
            self.mapping.close()

    def leave(self) -> bool:
        """Be no broker here any more; remove the region if nobody keeps it going. Whether it was removed."""
        assert self.locks is not None
        self.locks.release(*locks.OWNERS)
        if not self.locks.take(*locks.OWNERS):
            return False
        return self._remove_ours()

    def unlink(self) -> bool:
        """Remove the region file, its semaphore and its folder; False when this run is no longer there.

        For those who own it: whoever lives in it has it no longer under its name.
        """
        with contextlib.suppress(files.RegionFileError), files.locks_of(self.file_name) as judge:
            judge.take(locks.JUDGE)
            if self._is_there():
                return self._remove_ours()
        return False

    def _is_there(self) -> bool:
        if self.locks is not None:
            return self.locks.is_named()
        return _superblock_of(self.file_name).get("run_id") == self.run_id

    def _remove_ours(self) -> bool:
        if not self._is_there():
            return False
        _remove(self.file_name, self.superblock, self._folder_root)
        return True

    def __enter__(self) -> "Region":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- create and attach -------------------------------------------------------------------------------------------


def create_region(config: ClusterConfig, layout: Layout | None = None,
                  prepare: Callable[[Region], None] | None = None) -> Region:
    """Create the region of a cluster, its folder, and its semaphore if the configuration asks for one.

    `prepare` runs before the region is ready, for what must be there when others attach (locks). A leftover of the
    same name is removed first. Raises `RegionForeign` (name taken), `TmpfsTooSmall`, `RegionTooSmall`,
    `PermissionDenied`. Nothing is left behind when it raises.
    """
    layout = layout or layout_of(config)
    if layout_from(_numbers_of(layout)).hash() != layout.hash():
        raise RegionError("the layout is not settled: take it from layout_of(config)", region=config.name)
    check_hardware(config, layout)
    superblock = _new_superblock(config, layout)
    mapping = _create_file(config, layout.numbers["region_bytes"], _encoded(superblock))
    region = Region(config.name, mapping, layout, superblock, True, Path(config.folder.parent))
    try:
        remove_hardware(config.name)        # of a cluster whose region is gone
        report_path(config.name, config.folder.parent).unlink(missing_ok=True)
        region.hardware.fill_garbage()
        region.hardware.use_profile(config.profile)
        _clear_tables(region.memory(), layout)
        make_folder(config)
        if config.sequencer_lock == "semaphore":
            files.remove_semaphore(region.semaphore_name)
            files.create_semaphore(region.semaphore_name).close()
        if prepare is not None:
            prepare(region)
        superblock["ready"] = 1
        _store_ready(region.memory())
    except BaseException as error:
        region.unlink()
        region.close()
        if isinstance(error, files.TmpfsFull):
            raise too_small(config.name, error) from None
        raise
    return region


def too_small(name: str, error: files.TmpfsFull) -> TmpfsTooSmall:
    """The error of a cluster for whose region, or a file beside it, there is no room."""
    return TmpfsTooSmall(region=name, wanted_bytes=error.wanted_bytes, free_bytes=error.free_bytes)


def _create_file(config: ClusterConfig, nbytes: int, content: bytes) -> Any:
    """The new file's mapping; what dead clusters left is removed where it is in the way."""
    name, collected = config.name, False
    while True:
        try:
            if not make_way(name, config.folder.parent):
                raise RegionForeign.taken(name)
            return files.create_region_file(file_name_of(name), nbytes, content)
        except files.RegionFileExists:
            continue                        # somebody was faster: judge his
        except files.TmpfsFull as error:
            if collected or not collect_garbage(folder_root=config.folder.parent):
                raise too_small(name, error) from None
            collected = True
        except files.RegionFileDenied as error:
            raise _denied(name, error) from None


def _denied(name: str, error: files.RegionFileDenied) -> PermissionDenied:
    """What is read from such a file would be another user's word: where brokers are, and who may know our token."""
    path = files.path_of(file_name_of(name))
    return PermissionDenied(f"not allowed: {error}. Nothing of it is used: `chmod 600 {path}` if it is yours and you "
                            "trust who could open it, let its owner remove it, or choose another cluster name",
                            what=f"region {name}")


def attach_region(name: str, writable: bool = True, *, run_id: int | None = None,
                  timeout_seconds: float = 0.0, folder_root: Path | None = None) -> Region:
    """Map the region of a running or dead cluster, after checking that it is what this process understands.

    Waits up to `timeout_seconds` for it to exist and be ready. `folder_root` (default: the user's runtime directory)
    is where `unlink` may remove the cluster's folder. Raises `RegionMissing`, `RegionStale` (another
    version, layout or run), `RegionForeign` (no region, or truncated), `PermissionDenied`.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return _attach_once(name, writable, run_id, folder_root or runtime_root())
        except RegionMissing:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_SECONDS)


def presence_at_region(name: str) -> locks.Presence:
    """This process's lock as a client of a region. Raises `RegionMissing`, `PermissionDenied`."""
    try:
        return files.presence_of(file_name_of(name))
    except files.RegionFileMissing:
        raise RegionMissing(region=name) from None
    except files.RegionFileDenied as error:
        raise _denied(name, error) from None


def _attach_once(name: str, writable: bool, run_id: int | None, folder_root: Path) -> Region:
    try:
        mapping = files.map_region_file(file_name_of(name), writable)
    except files.RegionFileMissing:
        raise RegionMissing(region=name) from None
    except files.RegionFileDenied as error:
        raise _denied(name, error) from None
    except files.RegionFileError:
        raise RegionMissing(f"region {name} is not ready: it is empty", region=name) from None
    try:
        superblock, layout = _check_superblock(name, mapping, run_id)
        files.check_private(mapping, file_name_of(name))
    except files.RegionFileDenied as error:
        mapping.close()
        raise _denied(name, error) from None
    except BaseException:
        mapping.close()
        raise
    return Region(name, mapping, layout, superblock, writable, folder_root)


def _check_superblock(name: str, mapping: Any, run_id: int | None) -> tuple[dict[str, Any], Layout]:
    superblock = read_superblock(mapping)
    if superblock.get("magic", 0) == 0:     # written last
        raise RegionMissing(f"region {name} is not ready: its creator has not written it yet", region=name)
    if superblock["magic"] != LAYOUT_MAGIC:
        raise RegionForeign(region=name, reason="the file has not our magic number")
    if superblock["version"] != LAYOUT_VERSION:
        raise RegionStale(region=name, reason=f"layout version {superblock['version']}, here it is {LAYOUT_VERSION}")
    if run_id is not None and superblock["run_id"] != run_id:
        raise RegionStale(region=name, reason="it belongs to another run of the cluster")
    if not superblock["ready"]:
        raise RegionMissing(f"region {name} is not ready: its creator is still at work, or died", region=name)
    if len(mapping) != superblock["region_bytes"]:
        raise RegionForeign(region=name, reason=f"the file has {len(mapping)} bytes, its superblock says "
                                                f"{superblock['region_bytes']}: truncated")
    try:
        layout = layout_from(superblock)
    except (LayoutError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise RegionStale(region=name, reason=f"its superblock is damaged: {error}") from error
    if layout.hash() != superblock["layout_hash"]:
        raise RegionStale(region=name, reason="it was laid out by another build")
    if superblock["memory"] & 0xFF >= len(MEMORIES):
        raise RegionStale(region=name, reason="its superblock is damaged: there is no such kind of memory")
    return superblock, layout


def _numbers_of(layout: Layout) -> dict[str, int]:
    return {key: int(value) for key, value in layout.numbers.items()}


def layout_from(numbers: dict[str, Any]) -> Layout:
    """The layout that a superblock's numbers describe."""
    strategy = POOL_STRATEGIES[numbers["pool_strategy"]]
    return Layout.compute(pool_strategy=strategy, **{key: numbers[key] for key in _LAYOUT_NUMBERS})


# ---- superblock --------------------------------------------------------------------------------------------------


def _new_superblock(config: ClusterConfig, layout: Layout) -> dict[str, Any]:
    numbers = _numbers_of(layout)
    return {
        "ready": 0, "magic": LAYOUT_MAGIC, "version": LAYOUT_VERSION, "layout_hash": layout.hash(),
        "run_id": secrets.randbits(62) + 1, "created_wall_ns": time.time_ns(),
        **{key: numbers[key] for key in (*_LAYOUT_NUMBERS, "segment_count", "pool_strategy")},
        "owner_pid": os.getpid(), "owner_start": files.process_start_time(), "boot_id": files.host_identity(),
        "name": config.name, "folder": str(config.folder),
        "memory": MEMORIES.index(config.memory) | config.eviction_period << 8,
        "memory_seed": config.memory_seed,
    }


def _encoded(superblock: dict[str, Any]) -> bytes:
    record = numpy.zeros(1, DTYPES["Superblock"])
    for key, value in superblock.items():
        record[key] = value.encode() if isinstance(value, str) else value
    return bytes(record.tobytes())


def _clear_tables(memory: Memory, layout: Layout) -> None:
    """Zero every table whose first state is read from it; memory need not come as zeroes.

    Rings, results and order indexes are wiped when a topic is created, segments are read behind an order entry only.
    """
    for name, offset, nbytes in layout.sections:
        if name not in _WIPED_LATER:
            memory.write_bytes(offset, bytes(nbytes))
    memory.store_fence()


def _store_ready(memory: Memory) -> None:
    memory.store_word(0, 1)
    memory.flush_range(0, LINE_BYTES)
    memory.store_fence()


def read_superblock(mapping: Any) -> dict[str, Any]:
    """The superblock as Python values; empty for a file too short to have one."""
    if len(mapping) < SUPERBLOCK_BYTES:
        return {}
    return decoded(read_table(MappedMemory(mapping), "Superblock", 0, 1)[0])


def _superblock_of(file_name: str) -> dict[str, Any]:
    """The superblock of a file; empty when it has none or is not readable."""
    try:
        mapping = files.map_region_file(file_name, writable=False, private=False)
    except files.RegionFileError:
        return {}
    try:
        return read_superblock(mapping)
    finally:
        mapping.close()


def _is_blank(superblock: dict[str, Any]) -> bool:
    return not any(superblock.values())


# ---- find and collect --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionSummary:
    """A region file of this user, and whether it is in use."""

    name: str
    bytes: int
    brokers_alive: int
    brokers_dead: int
    age_seconds: float
    live: bool          # False only when it is known that nobody holds it
    reason: str         # why it counts as live or dead, for people


def find_regions() -> list[RegionSummary]:
    """All region files of this user. Files of other users are left out."""
    found = []
    for file in files.list_region_files():
        with contextlib.suppress(files.RegionFileMissing, files.RegionFileDenied):      # gone while we looked
            if file.user_id == os.geteuid():
                with files.locks_of(file.file_name) as seen:
                    found.append(_judge(file, seen))
    return found


def collect_garbage(dry_run: bool = False, folder_root: Path | None = None) -> list[RegionSummary]:
    """Remove the regions that nobody holds, with their semaphores and folders; return what was (or would be).

    A folder is removed only when it lies right below `folder_root` (default: the user's runtime directory), is a
    folder of this user and has the region's name.
    """
    removed = []
    for summary in find_regions():
        if not summary.live and (dry_run or _remove_leftover(file_name_of(summary.name), folder_root)):
            removed.append(summary)
    return removed


def make_way(name: str, folder_root: Path | None = None) -> bool:
    """Remove what a dead cluster left under a name that is wanted; True when the name is free now.

    Attached clients do not keep a name from those who want it: what they have mapped stays theirs without it, and
    they may be waiting for just this cluster to come back.
    """
    return _remove_leftover(file_name_of(name), folder_root, keepers=locks.OWNERS)


def _remove_leftover(file_name: str, folder_root: Path | None, keepers: tuple[int, int] = locks.EVERYBODY) -> bool:
    """Remove a region unless one of its keepers lives; True when the name is free now.

    Their locks are ours while we judge and remove: nobody can come to life in it, or remove a new one of that name
    because he has judged this one.
    """
    try:
        with files.locks_of(file_name) as judge:
            if not judge.take(*keepers):
                return False
            if not judge.is_named():
                return True
            file = files.region_file(file_name)
            if file.user_id != os.geteuid() or _judge(file, judge, keepers).live:
                return False
            _remove(file_name, _superblock_of(file_name), folder_root or runtime_root())
    except files.RegionFileMissing:
        return True
    except files.RegionFileDenied:
        return False
    return True


def remove_held(name: str, held: locks.FileLocks, folder_root: Path) -> bool:
    """Remove the region that a supervisor made its brokers make, and none of them lives in; False when one does.

    Attached clients keep what they have mapped. A region of another run under that name is left alone.
    """
    if not held.take(*locks.OWNERS):
        return False
    if held.is_named():
        _remove(file_name_of(name), _superblock_of(file_name_of(name)), folder_root)
    return True


def _remove(file_name: str, superblock: dict[str, Any], folder_root: Path) -> None:
    """Remove the folder, the semaphore, and last the file, so that an interrupted removal is found again."""
    folder = Path(superblock.get("folder") or "/")
    with contextlib.suppress(OSError):
        if (folder.parent == folder_root and folder.name == file_name and folder.is_dir() and not folder.is_symlink()
                and folder.stat().st_uid == os.geteuid()):
            shutil.rmtree(folder, ignore_errors=True)
    files.remove_semaphore(semaphore_name_of(file_name.removeprefix(files.REGION_PREFIX)))
    _save_report(file_name, superblock, folder_root)
    remove_hardware(file_name.removeprefix(files.REGION_PREFIX))
    files.remove_region_file(file_name)


def _save_report(file_name: str, superblock: dict[str, Any], folder_root: Path) -> None:
    """What the checker found outlives the region."""
    if (superblock.get("version") != LAYOUT_VERSION or not superblock["ready"]
            or superblock["memory"] & 0xFF != MEMORIES.index("checked")):
        return
    with contextlib.suppress(OSError, LayoutError, files.RegionFileError):
        mapping = files.map_region_file(file_name)
        name = file_name.removeprefix(files.REGION_PREFIX)
        Hardware(name, mapping, layout_from(superblock), superblock, True).save_report(folder_root)


def _judge(file: files.RegionFile, seen: locks.FileLocks,
           keepers: tuple[int, int] = locks.EVERYBODY) -> RegionSummary:
    """Say whether a region is in use. In doubt it is. What `seen` itself holds is no sign of life."""
    age = file.age_seconds
    superblock = _superblock_of(file.file_name)
    brokers = _brokers_seen(file, superblock)
    alive = sum(seen.held_by_others(locks.broker_place(broker)) for broker in brokers or ())
    dead = len(brokers or ()) - alive

    def summary(live: bool, reason: str) -> RegionSummary:
        name = file.file_name.removeprefix(files.REGION_PREFIX)
        return RegionSummary(name, file.bytes, alive, dead, age, live, reason)

    for (first, end), who in ((_BROKER_PLACES, f"{max(alive, 1)} brokers run"), (_SUPERVISOR, "its supervisor runs"),
                              (_CREATOR, "its creator runs"), (_CLIENT_PLACES, "clients are attached"),
                              (_JUDGE, "somebody judges it just now")):
        if end <= keepers[1] and seen.held_by_others(first, end):
            return summary(True, who)
    if _is_blank(superblock):
        if not _is_unwritten(file):
            return summary(True, "not a region of ours: left alone")
        live = age < UNFINISHED_SECONDS or bool(files.processes_mapping(file.file_name))
        return summary(live, "its creator is at work" if live else "its creator died before it was written")
    if superblock["magic"] != LAYOUT_MAGIC:
        return summary(True, "not a region of ours: left alone")
    if brokers is None:                     # builds before this one held no locks
        users = files.processes_mapping(file.file_name)
        return summary(bool(users), f"another version or layout, or damaged; mapped by {len(users)} processes")
    age = max(0.0, time.time() - superblock["created_wall_ns"] / 1e9)
    return summary(False, "all owners are dead")


_JUDGE, _SUPERVISOR, _CREATOR = ((place, place + 1) for place in (locks.JUDGE, locks.SUPERVISOR, locks.CREATOR))
_BROKER_PLACES, _CLIENT_PLACES = (locks.BROKERS, locks.BROKERS_END), (locks.CLIENTS, locks.CLIENTS_END)


def _is_unwritten(file: files.RegionFile) -> bool:
    """Whether nobody ever wrote a byte: at most its first page exists (we have just read that), and it is zero."""
    if file.bytes == 0:
        return True
    if file.allocated_bytes > 4096:
        return False
    mapping = files.map_region_file(file.file_name, writable=False, private=False)
    try:
        return not any(mapping[:4096])
    finally:
        mapping.close()


def _brokers_seen(file: files.RegionFile, superblock: dict[str, Any]) -> list[int] | None:
    """Every broker that ever registered; None when the layout is not ours to read."""
    try:
        if superblock.get("version") != LAYOUT_VERSION:
            return None
        layout = layout_from(superblock)
        if layout.hash() != superblock["layout_hash"] or file.bytes != superblock["region_bytes"]:
            return None
        mapping = files.map_region_file(file.file_name, writable=False, private=False)
    except (LayoutError, IndexError, OverflowError, ZeroDivisionError, files.RegionFileError):
        return None
    try:
        lines = read_indexed(MappedMemory(mapping), layout, "BrokerLine", "broker", layout.numbers["broker_count"])
        return [int(broker) for broker in numpy.nonzero(lines["pid"])[0]]
    finally:
        mapping.close()
