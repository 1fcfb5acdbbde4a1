"""Region files on tmpfs, and named semaphores. The only module that imports mmap and posix_ipc.

A region is a file `/dev/shm/cxlmq-<name>`, private to its user: another owner, a mode that lets others in, or a link
is refused before a byte is read. Its memory is reserved when it is made: whoever has the file can write all of it.
It outlives its processes; who lives is said by locks on the file itself (sim/cxl/locks.py).
"""

import contextlib
import errno
import mmap
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import posix_ipc

from sim.cxl.locks import CREATOR, FileLocks, Presence, presence_at

SHARED_MEMORY_FOLDER = "/dev/shm"
REGION_PREFIX = "cxlmq-"
SIDE_PREFIX = "cxlmqside-"              # what the model of a memory keeps beside it
CHECK_PREFIX = "cxlmqcheck-"            # what the checker keeps of a region's lines
HOST_PREFIX = "cxlmqhost"               # the cache of a host that is several processes: cxlmqhost<number>-<name>
RESERVE_BYTES = 256 << 20


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


class RegionMapping(mmap.mmap):
    """A mapped region file, with the locks on that very file.

    `presence` is held for as long as anything of the mapping is in use.
    """

    locks: FileLocks
    presence: Presence | None = None


def path_of(file_name: str) -> str:
    """Where a region file lies."""
    return os.path.join(SHARED_MEMORY_FOLDER, file_name)


def tmpfs_free_bytes() -> int:
    """Room for a new region. What others were given is theirs already: it is reserved."""
    room = os.statvfs(SHARED_MEMORY_FOLDER)
    return room.f_bavail * room.f_frsize


def create_region_file(file_name: str, nbytes: int, content: bytes = b"") -> RegionMapping:
    """Create and map a region file, mode 0600: `content`, then zeros. Its locks hold `CREATOR`.

    It gets its name when it is whole: reserved, locked and with its content. So nobody meets it half made, and a
    process that ends before leaves nothing. Raises `TmpfsFull`, `RegionFileExists` when the name is taken.
    """
    free = tmpfs_free_bytes()
    if nbytes > free:
        raise _full(nbytes, free)
    with _translated(file_name, nbytes):
        descriptor = os.open(SHARED_MEMORY_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with _translated(file_name, nbytes):
            reserve(descriptor, nbytes)
            os.pwrite(descriptor, content, 0)
            os.fchmod(descriptor, 0o600)
            locks = FileLocks(path_of(file_name), os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC))
            locks.take(CREATOR)
            _name(descriptor, path_of(file_name))
    finally:
        os.close(descriptor)
    try:                                    # by its name: a mapping of what had none shows as a deleted file
        mapping = map_region_file(file_name)
        mapping.locks.close()
        mapping.locks = locks
        return mapping
    except BaseException:
        os.unlink(path_of(file_name))
        raise


def _name(descriptor: int, path: str) -> None:
    """Give a file without a name one that is free. Raises `FileExistsError`."""
    folder = os.open(SHARED_MEMORY_FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:                                    # with a folder, Python calls linkat(2), which follows the link in /proc
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def reserve(descriptor: int, nbytes: int) -> None:
    """Give a file its size, and the memory for it. Raises `OSError` (ENOSPC, ENOMEM): a write would be a SIGBUS."""
    for start in range(0, nbytes, RESERVE_BYTES):       # in steps: a signal gets a word in
        os.posix_fallocate(descriptor, start, min(RESERVE_BYTES, nbytes - start))


def map_region_file(file_name: str, writable: bool = True, private: bool = True) -> RegionMapping:
    """Map a whole region file, with its locks.

    Raises `RegionFileMissing`, `RegionFileDenied` (another owner; with `private` also when others may write into it),
    `RegionFileError` when it is empty.
    """
    descriptor = _open_region_file(file_name, os.O_RDWR if writable else os.O_RDONLY, private)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise RegionFileError(f"{file_name} is empty")
        mapping = RegionMapping(descriptor, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        mapping.locks = _locks_beside(file_name, descriptor)
        return mapping
    finally:
        os.close(descriptor)


def _open_region_file(file_name: str, flags: int, private: bool = True) -> int:
    with _translated(file_name):            # not to wait for whoever writes into a pipe of that name
        descriptor = os.open(path_of(file_name), flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        check_ours(os.fstat(descriptor), file_name, private)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _locks_beside(file_name: str, descriptor: int) -> FileLocks:
    """The locks of the file that a descriptor has open, in an open file of their own."""
    with _translated(file_name):
        locks = FileLocks.open(path_of(file_name))
    if not locks.is_file_of(descriptor):
        locks.close()
        raise RegionFileMissing(f"{file_name} was just replaced")
    return locks


def check_ours(status: os.stat_result, what: str, private: bool = True) -> None:
    """Raise `RegionFileDenied` unless it is a regular file of this user's, and (`private`) only his to write."""
    if not stat.S_ISREG(status.st_mode):
        raise RegionFileDenied(f"{what} is no regular file")
    if status.st_uid != os.geteuid():
        raise RegionFileDenied(f"{what} belongs to the user with number {status.st_uid}, and we are {os.geteuid()}")
    if private and status.st_mode & 0o022:
        raise RegionFileDenied(f"other users may write into {what} (mode {stat.S_IMODE(status.st_mode):o})")


def check_private(mapping: RegionMapping, what: str) -> None:
    """Raise `RegionFileDenied` when others may read a mapped file."""
    if mapping.locks.status().st_mode & 0o077:
        raise RegionFileDenied(f"other users may read {what}")


def locks_of(file_name: str) -> FileLocks:
    """The locks of a region file. Raises `RegionFileMissing`, `RegionFileDenied`."""
    with _translated(file_name):
        locks = FileLocks.open(path_of(file_name))
    try:
        check_ours(locks.status(), file_name, private=False)
    except BaseException:
        locks.close()
        raise
    return locks


def presence_of(file_name: str) -> Presence:
    """This process's presence as a client of a region. Raises `RegionFileMissing`, `RegionFileDenied`."""
    os.close(_open_region_file(file_name, os.O_RDWR))
    with _translated(file_name):
        return presence_at(path_of(file_name))


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
    descriptor = _open_region_file(file_name, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, offset + nbytes - start, offset=start), offset - start
    finally:
        os.close(descriptor)


def remove_region_file(file_name: str) -> bool:
    """Unlink a region file; False when there was none. Processes that have mapped it keep their mapping.

    Whether it may be removed is for those to know who hold its locks.
    """
    try:
        with _translated(file_name):
            os.unlink(path_of(file_name))
    except RegionFileMissing:
        return False
    return True


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


def _full(wanted: int, free: int) -> TmpfsFull:
    return TmpfsFull(f"{SHARED_MEMORY_FOLDER} has {free} bytes free and {wanted} are needed", wanted, free)


@contextlib.contextmanager
def _translated(name: str, nbytes: int = 0) -> Iterator[None]:
    """Raise the system's errors as our own. `nbytes` is what was asked for."""
    try:
        yield
    except (posix_ipc.ExistentialError, FileExistsError, FileNotFoundError) as error:
        exists = isinstance(error, FileExistsError) or "already exists" in str(error)
        kind, what = (RegionFileExists, "already exists") if exists else (RegionFileMissing, "does not exist")
        raise kind(f"{name} {what}") from error
    except (posix_ipc.PermissionsError, PermissionError) as error:
        raise RegionFileDenied(f"{name} belongs to another user") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise RegionFileDenied(f"{name} is no regular file, but a link, a folder or a socket") from error
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise _full(nbytes, min(nbytes, tmpfs_free_bytes())) from error
        raise


def shared_file(file_name: str, nbytes: int) -> mmap.mmap:
    """Map a file of the simulation that several processes share, made of zeros by whoever comes first.

    Reserved like a region. Raises `TmpfsFull`, with nothing left of it, and `RegionFileDenied`.
    """
    while True:
        try:
            descriptor = _open_region_file(file_name, os.O_RDWR)
        except RegionFileMissing:
            with contextlib.suppress(RegionFileExists):     # somebody was faster: his is the one
                create_region_file(file_name, nbytes).close()
            continue
        try:
            if os.fstat(descriptor).st_size < nbytes:
                raise RegionFileError(f"{file_name} is smaller than it should be: of another region, or damaged")
            return mmap.mmap(descriptor, nbytes)
        finally:
            os.close(descriptor)


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
def memory_identity() -> str:
    """Boot id and device of /dev/shm: two processes can meet in a region exactly when these are equal."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:shm{os.stat(SHARED_MEMORY_FOLDER).st_dev}"


@cache
def host_identity() -> str:
    """Boot id and process-id namespace: two processes can judge each other's pids only when these are equal."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def process_alive(pid: int, start_time: int, boot_id: str) -> bool:
    """Whether the very process (pid, start time, host identity) still runs, as far as a process id tells.

    For people and for signals; what may be removed is decided by locks. A zombie is dead, a process of another boot
    as well; one of another container on this boot cannot be seen from here and counts as alive.
    """
    boot, _, namespace = boot_id.partition(":")
    here_boot, _, here_namespace = host_identity().partition(":")
    if boot != here_boot:
        return False
    if namespace != here_namespace:
        return True
    fields = _process_stat(pid)
    # A zombie whose other threads are not through yet still has its memory and its locks.
    ended = not fields or (fields[0] in ("Z", "X") and int(fields[17]) <= 1)
    return not ended and int(fields[19]) == start_time


def _process_stat(pid: int) -> list[str]:
    """Fields 3 onwards of /proc/<pid>/stat; the command before them may hold spaces and brackets."""
    if pid <= 0:
        return []
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
