"""Tells an event loop that a stage has news: an eventfd that is written only while the loop is not already awake."""

import os

from libc.stdint cimport uint64_t

from sim.cxl.primitives cimport cxl_compare_and_swap, cxl_full_fence, cxl_load_relaxed, cxl_store_release

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void* data, size_t count)
    int close(int fd)


cdef class Notifier:
    """One eventfd. The event loop calls `arm` when the descriptor is readable, and then looks at everything."""

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def __init__(self):
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.armed = 1

    cdef void notify(self) noexcept nogil:
        cdef uint64_t one = 1
        cxl_full_fence()
        if cxl_load_relaxed(&self.armed) and cxl_compare_and_swap(&self.armed, 1, 0):
            write(self.fd, &one, 8)

    def arm(self) -> None:
        """Empty the descriptor and ask for the next notification. Look at everything after this, not before."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass
        cxl_store_release(&self.armed, 1)
        cxl_full_fence()

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
