"""Names of clusters on this machine: who has one, and what dead clusters have left under theirs.

A supervisor holds the lock on its pid file in the cluster's folder for as long as it lives, and one on the region
(sim/cxl/locks.py). What is in the file is for signals and for people.
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from broker.config import FOLDER_PREFIX, ClusterConfig, check_folder, make_folder, runtime_root
from broker.errors import PermissionDenied
from broker.records import record_bytes, unpack
from sim.cxl import region as files
from sim.cxl.locks import BROKERS, BROKERS_END, OWNERS, SUPERVISOR, FileLocks
from sim.cxl.memory import MappedMemory

PID_FILE = "supervisor.pid"
_POLL_SECONDS = 0.005
_CLAIM_SECONDS = 1.0
_ORPHANS_SECONDS = 5.0                 # brokers whose supervisor died end by themselves, unless they stand still


class Claim:
    """Holds a cluster's name: a lock on the supervisor's pid file, which goes with its process."""

    def __init__(self, folder: Path, lock: FileLocks) -> None:
        self.folder = folder
        self._lock = lock

    def release(self) -> None:
        """Remove the cluster's folder and free the name."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def give_back(self) -> None:
        """Free the name; the folder belongs to somebody else."""
        with contextlib.suppress(OSError):
            (self.folder / PID_FILE).unlink()
        self._lock.close()


def claim_name(config: ClusterConfig) -> Claim | None:
    """Take a cluster's name for this process; None when it is taken. Raises `PermissionDenied`."""
    begun = time.monotonic()
    deadline, orphans_end = begun + _CLAIM_SECONDS, begun + _ORPHANS_SECONDS
    while time.monotonic() < deadline:
        if supervisor_of(config.folder):
            return None
        if not name_is_free(config.name, config.folder.parent):
            if time.monotonic() > orphans_end or not is_orphaned(config):
                return None
            deadline = time.monotonic() + _CLAIM_SECONDS
            time.sleep(_POLL_SECONDS)
            continue
        try:
            folder = make_folder(config)
            lock = _lock(folder / PID_FILE)
        except PermissionDenied:
            if config.folder.parent.is_dir() and config.folder.exists() and not _is_mine(config.folder):
                return None                 # another user has this name; an unusable parent is an error
            raise
        if lock is None:                    # somebody starts with this name, or removes what is left of it
            time.sleep(_POLL_SECONDS)
            continue
        claim = Claim(folder, lock)
        if _region_exists(config.name):
            claim.give_back()
            return None
        text = json.dumps({"pid": os.getpid(), "start_time": files.process_start_time(),
                           "boot_id": files.host_identity()})
        (folder / PID_FILE).write_text(text)
        return claim
    return None


def is_orphaned(config: ClusterConfig) -> bool:
    """Whether a cluster's supervisor was killed, and brokers of it live on: they were told to end."""
    try:
        if not (_is_mine(config.folder) and (config.folder / PID_FILE).is_file()) or supervisor_of(config.folder):
            return False
        with files.locks_of(files.REGION_PREFIX + config.name) as seen:
            return seen.held_by_others(BROKERS, BROKERS_END) and not seen.held_by_others(SUPERVISOR)
    except (files.RegionFileError, OSError):
        return False


def _is_mine(folder: Path) -> bool:
    return folder.lstat().st_uid == os.geteuid()


def _lock(path: Path) -> FileLocks | None:
    """Create and lock a file; None when it is locked, or has gone while we took it."""
    try:
        lock = FileLocks.open(str(path), os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        return None
    if lock.take(SUPERVISOR) and lock.is_named():
        return lock
    lock.close()
    return None


def name_is_free(name: str, folder_root: Path) -> bool:
    """Whether no region has this name, once what a dead cluster left under it is removed."""
    if not _region_exists(name):
        return True
    from broker.region import make_way  # slow to import, and seldom needed

    return make_way(name, folder_root)


def _region_exists(name: str) -> bool:
    try:
        files.region_file(files.REGION_PREFIX + name)
    except files.RegionFileMissing:
        return False
    return True


class Supervisor(NamedTuple):
    """The process that looks after a cluster. Its process id means something where `boot_id` is `host_identity()`."""

    pid: int
    start_time: int
    boot_id: str
    folder: Path

    @property
    def alive(self) -> bool:
        """Whether this very process still runs: its lock says so, and where we can see it the process table."""
        if supervisor_of(self.folder) == self:
            return True
        return self.boot_id == files.host_identity() and files.process_alive(self.pid, self.start_time, self.boot_id)


def supervisor_of(folder: Path) -> Supervisor | None:
    """The living supervisor of the cluster with this folder; None when there is none.

    Nothing is read from a folder that another user may write into.
    """
    try:
        check_folder(folder)
        with FileLocks.open(str(folder / PID_FILE), os.O_RDONLY) as seen:
            if not seen.held_by_others(SUPERVISOR):
                return None
            values = json.loads((folder / PID_FILE).read_text())
        return Supervisor(int(values["pid"]), int(values["start_time"]), str(values["boot_id"]), folder)
    except (PermissionDenied, OSError, ValueError, KeyError, TypeError):
        return None


# ---- leftovers ---------------------------------------------------------------------------------------------------


def collect_leftovers(folder_root: Path | None = None, dry_run: bool = False) -> list[str]:
    """Remove the regions and folders of clusters that nobody holds; return their names."""
    root = folder_root or runtime_root()
    names: list[str] = []
    if any(_may_be_dead(file) for file in files.list_region_files()):
        from broker.region import collect_garbage  # slow to import, and seldom needed

        names = [each.name for each in collect_garbage(dry_run, root)]
    return sorted({*names, *_collect_folders(root, dry_run)})


def _may_be_dead(file: files.RegionFile) -> bool:
    """Whether a closer look is worth it: nobody holds it."""
    try:
        with files.locks_of(file.file_name) as seen:
            return not seen.held_by_others(*OWNERS)
    except files.RegionFileError:
        return False


def _collect_folders(root: Path, dry_run: bool) -> list[str]:
    """Remove folders of supervisors that died before there was a region, or after it had gone."""
    found = []
    for folder in root.glob(f"{FOLDER_PREFIX}*") if root.is_dir() else ():
        name = folder.name.removeprefix(FOLDER_PREFIX)
        pid_file = folder / PID_FILE
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not pid_file.is_file() or not _is_mine(folder):
                continue
            if _region_exists(name) or (lock := _lock(pid_file)) is None:
                continue
            with lock:
                if not _region_exists(name):
                    found.append(name)
                    if not dry_run:
                        shutil.rmtree(folder, ignore_errors=True)
    return found


def remove_region(config: ClusterConfig, held: FileLocks | None, owner_pids: set[int]) -> bool:
    """Remove the region that a supervisor's brokers made; all of those have ended. False when one lives there.

    `held` are its locks on that region. Without, it never saw it whole: then the region is its own when one of its
    brokers (`owner_pids`) has made it.
    """
    file_name = files.REGION_PREFIX + config.name
    if held is None:
        try:
            mapping = files.map_region_file(file_name, writable=False)
        except files.RegionFileError:
            return True                     # there is none, or it is none of ours
        if len(mapping) < record_bytes("Superblock") or unpack("Superblock", MappedMemory(mapping).read_bytes(
                0, record_bytes("Superblock")))["owner_pid"] not in owner_pids:
            return True
        held = mapping.locks
    if not held.is_named():                 # the last broker has removed it
        return not _region_exists(config.name)
    from broker.region import remove_held  # slow to import, and seldom needed: brokers tidy up

    return remove_held(config.name, held, config.folder.parent)
