"""Locks on a file that prove that somebody lives: gone with the last process that holds them, however it ended.

    byte           held by
    0              whoever judges or removes the file, just then
    1              the supervisor of a cluster
    2              whoever made the file, while it looks after it
    3 + K          broker K
    2^32 + N       a client's process that drew the number N

They are open file description locks (fcntl(2), F_OFD_SETLK): right across process-id namespaces, where a process id
says nothing. The bytes lie far beyond the end of any file. The kernel takes a process's memory away before its files:
who finds a lock free knows that its holder stores nothing any more.
"""

import fcntl
import os
import secrets
import struct
import threading
import time
import weakref

JUDGE, SUPERVISOR, CREATOR = 0, 1, 2
BROKERS, BROKERS_END = 3, 1 << 16
CLIENTS, CLIENTS_END = 1 << 32, 1 << 61
OWNERS = JUDGE, CLIENTS                 # who keeps a cluster going: all but its clients
EVERYBODY = JUDGE, CLIENTS_END
JUDGE_SECONDS = 2.0                     # a judgement takes a millisecond; a judge may have been stopped
_BASE = 1 << 61
_PAUSE_SECONDS = 0.001
_FLOCK = struct.Struct("hhqqi4x")       # struct flock of a 64-bit Linux

_open: "weakref.WeakSet[FileLocks]" = weakref.WeakSet()
_drawing = threading.Lock()


def broker_place(broker: int) -> int:
    """The byte of a broker."""
    return BROKERS + broker


class FileLocks:
    """The locks that one open file holds, and what can be seen of those of others.

    Every instance has an open file of its own, which is never mapped (a mapping would keep it, and so its locks) and
    not inherited by a child: there it holds nothing.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        """Takes over the descriptor."""
        self.path, self._descriptor = path, descriptor
        self._own: set[tuple[int, int]] = set()
        _open.add(self)

    @classmethod
    def open(cls, path: str, flags: int = os.O_RDWR) -> "FileLocks":
        """Of the file at a path; with O_RDONLY to look only. Raises `OSError`."""
        return cls(path, os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600))

    # ---- take and release -------------------------------------------------------------------------------------------

    def take(self, first: int, end: int = 0) -> bool:
        """Hold the bytes from `first` to before `end` (default: that one); False when somebody has one of them.

        Waits, boundedly, while it is only a judge who is in the way.
        """
        end = end or first + 1
        deadline = time.monotonic() + JUDGE_SECONDS
        while True:
            try:
                self._set(fcntl.F_WRLCK, first, end)
            except (BlockingIOError, PermissionError):      # fcntl(2): EAGAIN or EACCES
                if not self._is_judged(first, end) or time.monotonic() > deadline:
                    return False
                time.sleep(_PAUSE_SECONDS)
                continue
            self._own.add((first, end))
            return True

    def release(self, first: int, end: int = 0) -> None:
        """Let go of what was taken of these bytes."""
        end = end or first + 1
        self._own = {(low, high) for low, high in self._own if not first <= low < end}
        self._set(fcntl.F_UNLCK, first, end)

    def _set(self, kind: int, first: int, end: int) -> None:
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, _BASE + first, end - first, 0))

    def _is_judged(self, first: int, end: int) -> bool:
        """Whether nobody but a judge has one of these bytes: a judge holds his own with them."""
        found = self._found(first, end)
        return found is None or found[0] == JUDGE

    def _found(self, first: int, end: int) -> tuple[int, int] | None:
        """Where the lock of another lies that keeps us from these bytes."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _BASE + first, end - first, 0)
        kind, _, start, length, _ = _FLOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else (start - _BASE, length)

    # ---- look -------------------------------------------------------------------------------------------------------

    def held(self, first: int, end: int = 0) -> bool:
        """Whether anybody, we too, holds one of these bytes."""
        end = end or first + 1
        return any(low < end and first < high for low, high in self._own) or self.held_by_others(first, end)

    def held_by_others(self, first: int, end: int = 0) -> bool:
        """Whether another open file holds one of these bytes."""
        return self._found(first, end or first + 1) is not None

    def is_named(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def is_file_of(self, descriptor: int) -> bool:
        """Whether another open file is the same one."""
        return os.path.samestat(os.fstat(self._descriptor), os.fstat(descriptor))

    def status(self) -> os.stat_result:
        """What the file system says about the file."""
        return os.fstat(self._descriptor)

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._descriptor < 0

    def close(self) -> None:
        """Let go of everything."""
        descriptor, self._descriptor = self._descriptor, -1
        self._own.clear()
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "FileLocks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _leave_to_parent(self) -> None:
        """In a child: the open file is the parent's, and so are its locks. Ours is another one, without any."""
        if self._descriptor < 0:
            return
        shared, self._descriptor = self._descriptor, -1
        self._own.clear()
        try:
            self._descriptor = os.open(f"/proc/self/fd/{shared}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            pass                            # it can be seen no longer, and held neither
        finally:
            os.close(shared)


def _in_child() -> None:
    global _drawing
    _drawing = threading.Lock()             # whoever held it is no thread of the child's
    for locks in list(_open):
        locks._leave_to_parent()


os.register_at_fork(after_in_child=_in_child)


# ---- clients -----------------------------------------------------------------------------------------------------


class Presence:
    """The lock of this process as a client of one region file: as long as it is held, what it views is kept for it."""

    def __init__(self, locks: FileLocks) -> None:
        """Draws a number that nobody has. Takes over the locks."""
        self._locks = locks
        self.number = secrets.randbits(48) + 1
        while not locks.take(CLIENTS + self.number):
            self.number = secrets.randbits(48) + 1

    def leave(self) -> None:
        """Be here no more, at once."""
        self._locks.close()

    def is_current(self) -> bool:
        """Whether the region file of that name is still this one, and this process the one that holds the lock."""
        return bool(self._locks._own) and self._locks.is_named()


_presences: "weakref.WeakValueDictionary[tuple[int, int], Presence]" = weakref.WeakValueDictionary()


def presence_at(path: str) -> Presence:
    """This process's presence at a region file, one for all its clients; held until the last of them drops it.

    Raises `OSError`.
    """
    with _drawing:
        while True:
            locks = FileLocks.open(path)
            status = locks.status()
            found = _presences.get((status.st_dev, status.st_ino))
            if found is not None and found.is_current():
                locks.close()
                return found
            found = Presence(locks)
            if found.is_current():          # else it was removed just before we had our number
                _presences[status.st_dev, status.st_ino] = found
                return found
