"""Region files on tmpfs, named semaphores, and who owns them. The only module that imports mmap and posix_ipc.

A region is a POSIX shared memory object, `/dev/shm/cxlmq-<name>`, private to its user. It outlives its processes, so
its superblock names its owners by (pid, start time, host): a pid alone may have been given to somebody else since.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import posix_ipc

SHARED_MEMORY_FOLDER = "/dev/shm"
REGION_PREFIX = "cxlmq-"
SIDE_PREFIX = "cxlmqside-"              # what the model of a memory keeps beside it
CHECK_PREFIX = "cxlmqcheck-"            # what the checker keeps of a region's lines
HOST_PREFIX = "cxlmqhost"               # the cache of a host that is several processes: cxlmqhost<number>-<name>


class RegionFileError(Exception):
    """A region file or a semaphore could not be created, found or mapped."""


class RegionFileExists(RegionFileError):
    """Somebody already has a region or a semaphore of this name."""


class RegionFileMissing(RegionFileError):
    """No region or semaphore of this name exists."""


class RegionFileDenied(RegionFileError):
    """The file belongs to another user, or is no file of its own."""


class TmpfsFull(RegionFileError):
    """tmpfs has no room for the region. Checked first: writing to a tmpfs that ran full is a SIGBUS."""

    def __init__(self, message: str, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


@dataclass(frozen=True)
class RegionFile:
    """What the file system says about a region file, without opening it."""

    file_name: str
    bytes: int
    allocated_bytes: int
    user_id: int
    age_seconds: float


# ---- region files ------------------------------------------------------------------------------------------------


def tmpfs_free_bytes() -> int:
    """Room for a new region: free tmpfs, less what existing regions were promised and have not touched yet."""
    room = os.statvfs(SHARED_MEMORY_FOLDER)
    promised = 0
    for entry in _region_entries():
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            promised += max(0, status.st_size - status.st_blocks * 512)
    return max(0, room.f_bavail * room.f_frsize - promised)


def create_region_file(file_name: str, nbytes: int) -> mmap.mmap:
    """Create and map a region file of zeros, mode 0600.

    Raises `TmpfsFull` before anything is created, `RegionFileExists` when the name is taken.
    """
    free = tmpfs_free_bytes()
    if nbytes > free:
        raise TmpfsFull(
            f"{SHARED_MEMORY_FOLDER} has {free} bytes free and the region needs {nbytes}", nbytes, free)
    with _translated(file_name):
        shared = posix_ipc.SharedMemory(f"/{file_name}", posix_ipc.O_CREX, mode=0o600, size=nbytes)
    try:
        return mmap.mmap(shared.fd, nbytes)
    except BaseException:
        remove_region_file(file_name)
        raise
    finally:
        shared.close_fd()


def map_region_file(file_name: str, writable: bool = True) -> mmap.mmap:
    """Map a whole region file. Raises `RegionFileMissing`, `RegionFileDenied`, or `RegionFileError` when empty."""
    flags = os.O_RDWR if writable else os.O_RDONLY
    with _translated(file_name):
        descriptor = os.open(os.path.join(SHARED_MEMORY_FOLDER, file_name), flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise RegionFileError(f"{file_name} is empty")
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def map_path(path: Path) -> mmap.mmap:
    """Map a region file wherever it lies, a copy for instance, read-only. Raises as `map_region_file`."""
    with _translated(str(path)):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise RegionFileError(f"{path} is empty")
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def private_mapping(nbytes: int) -> mmap.mmap:
    """Memory of this process alone (and of what it forks), aligned as a region is, for tests and simulations."""
    return mmap.mmap(-1, nbytes)


def map_region_part(file_name: str, offset: int, nbytes: int) -> tuple[mmap.mmap, int]:
    """Map a part of a region file read-write; the mapping, and where `offset` lies in it.

    For clients that may change their own pages only. Raises `RegionFileError`.
    """
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with _translated(file_name):
        descriptor = os.open(os.path.join(SHARED_MEMORY_FOLDER, file_name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, offset + nbytes - start, offset=start), offset - start
    finally:
        os.close(descriptor)


def remove_region_file(file_name: str) -> bool:
    """Unlink a region file; False when there was none. Processes that have mapped it keep their mapping."""
    try:
        with _translated(file_name):
            posix_ipc.unlink_shared_memory(f"/{file_name}")
    except RegionFileMissing:
        return False
    return True


@contextlib.contextmanager
def locked_region_file(file_name: str) -> Iterator[bool]:
    """Hold the file's lock; yields False when the file has gone, or another took its name, while we waited.

    Whoever removes a region file holds its lock while it judges and unlinks. So nobody unlinks a new region because
    he has judged an old one of the same name.
    """
    path = os.path.join(SHARED_MEMORY_FOLDER, file_name)
    try:
        with _translated(file_name):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except RegionFileMissing:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(descriptor), os.lstat(path))
        except FileNotFoundError:
            same = False
        yield same
    finally:
        os.close(descriptor)


def region_file(file_name: str) -> RegionFile:
    """Describe one region file. Raises `RegionFileMissing`."""
    with _translated(file_name):
        status = os.lstat(os.path.join(SHARED_MEMORY_FOLDER, file_name))
    age_seconds = max(0.0, time.time() - status.st_mtime)
    return RegionFile(file_name, status.st_size, status.st_blocks * 512, status.st_uid, age_seconds)


def list_region_files() -> list[RegionFile]:
    """All region files with our prefix, whoever owns them, by name."""
    found = []
    for entry in _region_entries():
        with contextlib.suppress(RegionFileError):
            found.append(region_file(entry.name))
    return sorted(found, key=lambda each: each.file_name)


def processes_mapping(file_name: str) -> list[int]:
    """Other processes that have this region file mapped now, as far as we may look."""
    path, found = os.path.join(SHARED_MEMORY_FOLDER, file_name), []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(line.endswith(path) for line in (folder / "maps").read_text().splitlines()):
                found.append(int(folder.name))
    return found


def _region_entries() -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(SHARED_MEMORY_FOLDER) as entries:
            return [each for each in entries
                    if each.name.startswith(REGION_PREFIX) and each.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    """Raise the system's errors as our own."""
    try:
        yield
    except (posix_ipc.ExistentialError, FileExistsError, FileNotFoundError) as error:
        exists = isinstance(error, FileExistsError) or "already exists" in str(error)
        kind, what = (RegionFileExists, "already exists") if exists else (RegionFileMissing, "does not exist")
        raise kind(f"{name} {what}") from error
    except (posix_ipc.PermissionsError, PermissionError) as error:
        raise RegionFileDenied(f"{name} belongs to another user") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RegionFileDenied(f"{name} is a symbolic link") from error
        if error.errno == errno.ENOSPC:
            raise TmpfsFull(f"{SHARED_MEMORY_FOLDER} is full", 0, 0) from error
        raise


def shared_file(file_name: str, nbytes: int) -> mmap.mmap:
    """Map a file of the simulation that several processes share, made of zeros by whoever comes first."""
    with _translated(file_name):
        try:
            shared = posix_ipc.SharedMemory(f"/{file_name}", posix_ipc.O_CREAT, mode=0o600, size=nbytes)
            return mmap.mmap(shared.fd, nbytes)
        finally:
            with contextlib.suppress(NameError):
                shared.close_fd()


# ---- named semaphores --------------------------------------------------------------------------------------------


def create_semaphore(name: str) -> posix_ipc.Semaphore:
    """Create a named semaphore that is free (value 1), mode 0600. Raises `RegionFileExists`."""
    with _translated(name):
        return posix_ipc.Semaphore(f"/{name}", posix_ipc.O_CREX, mode=0o600, initial_value=1)


def open_semaphore(name: str) -> posix_ipc.Semaphore:
    """Open an existing named semaphore. Raises `RegionFileMissing`."""
    with _translated(name):
        return posix_ipc.Semaphore(f"/{name}")


def remove_semaphore(name: str) -> bool:
    """Unlink a named semaphore; False when there was none."""
    try:
        with _translated(name):
            posix_ipc.unlink_semaphore(f"/{name}")
    except RegionFileMissing:
        return False
    return True


# ---- who a process is --------------------------------------------------------------------------------------------


def process_start_time(pid: int | None = None) -> int:
    """Clock ticks from boot to the start of a process (field 22 of /proc/<pid>/stat); 0 when it does not run."""
    fields = _process_stat(os.getpid() if pid is None else pid)
    return int(fields[19]) if fields else 0


@cache
def host_identity() -> str:
    """Boot id and process-id namespace: two processes can judge each other's pids only when these are equal."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def process_alive(pid: int, start_time: int, boot_id: str) -> bool:
    """Whether the very process (pid, start time, host identity) still runs.

    A zombie is dead. A process of another boot is dead; one of another container on this boot cannot be seen from
    here and counts as alive, because nothing that may be alive is ever removed.
    """
    boot, _, namespace = boot_id.partition(":")
    here_boot, _, here_namespace = host_identity().partition(":")
    if boot != here_boot:
        return False
    if namespace != here_namespace:
        return True
    fields = _process_stat(pid)
    return bool(fields) and fields[0] not in ("Z", "X") and int(fields[19]) == start_time


def _process_stat(pid: int) -> list[str]:
    """Fields 3 onwards of /proc/<pid>/stat; the command before them may hold spaces and brackets."""
    if pid <= 0:
        return []
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
