"""The calls that put bytes on a disk and wait for them, in one place: whoever simulates disks stands behind them.

Without a watcher these are pwritev(2), write(2), fdatasync(2) and fsync(2). One watcher may be set in a process. After
each write it says how much of it there is (`wrote(fd, offset, nbytes)`, below 0 an error number), and before each sync
whether it works (`synced(fd)`, an error number, 0 when it did): so it knows what a loss of power would leave.
"""

import os

from libc.errno cimport errno
from libc.stdint cimport int64_t

cdef extern from "<sys/uio.h>" nogil:
    ssize_t pwritev(int fd, const iovec* parts, int count, int64_t offset)

cdef extern from "<unistd.h>" nogil:
    int fdatasync(int fd)

cdef object watcher = None
cdef bint watched = False


def watch(by) -> None:
    """Let this object see every write and sync of this process; None: nobody does."""
    global watcher, watched
    watcher, watched = by, by is not None


cdef int64_t ask_wrote(int fd, int64_t offset, int64_t nbytes) noexcept nogil:
    with gil:
        return watcher.wrote(fd, offset, nbytes)


cdef int ask_synced(int fd) noexcept nogil:
    with gil:
        return watcher.synced(fd)


cdef int64_t disk_write(int fd, const iovec* parts, int count, int64_t offset) noexcept nogil:
    """Write these parts; the bytes that were written, below 0 an error number."""
    cdef int64_t written = pwritev(fd, parts, count, offset)
    if written < 0:
        return -errno
    return ask_wrote(fd, offset, written) if watched else written


cdef int disk_sync(int fd) noexcept nogil:
    """Wait until the bytes of a file are durable; 0, or an error number."""
    if watched:
        return ask_synced(fd)
    return 0 if fdatasync(fd) == 0 else errno


def write(int fd, data) -> int:
    """Write at the file's place; how many bytes. Raises OSError."""
    cdef int64_t offset, written
    if not watched:
        return os.write(fd, data)
    offset = os.lseek(fd, 0, os.SEEK_CUR)
    written = watcher.wrote(fd, offset, os.write(fd, data))
    if written < 0:
        raise OSError(-written, os.strerror(-written))
    return written


def sync(int fd) -> None:
    """Wait until the bytes of a file are durable. Raises OSError."""
    cdef int number
    if not watched:
        os.fdatasync(fd)
    elif number := watcher.synced(fd):
        raise OSError(number, os.strerror(number))


def sync_names(int fd) -> None:
    """Wait until the names in a folder are durable. Raises OSError."""
    cdef int number
    if not watched:
        os.fsync(fd)
    elif number := watcher.synced(fd):
        raise OSError(number, os.strerror(number))
