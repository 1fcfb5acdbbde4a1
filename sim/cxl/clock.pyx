"""Clocks that stages are given: the machine's, or one that a simulation moves by hand."""

from libc.stdint cimport int64_t

from sim.cxl.primitives cimport cxl_now_ns, cxl_wall_ns


cdef class Clock:
    """Monotonic and wall time in ns. The monotonic clock is the same for all processes of one boot."""

    cdef int64_t now_ns(self) noexcept nogil: return 0
    cdef int64_t wall_ns(self) noexcept nogil: return 0

    def now(self) -> int:
        """Monotonic time in ns."""
        return self.now_ns()

    def wall(self) -> int:
        """Time since 1970 in ns."""
        return self.wall_ns()


cdef class SystemClock(Clock):
    """CLOCK_MONOTONIC and CLOCK_REALTIME."""

    cdef int64_t now_ns(self) noexcept nogil: return cxl_now_ns()
    cdef int64_t wall_ns(self) noexcept nogil: return cxl_wall_ns()


cdef class ManualClock(Clock):
    """A clock that stands still until someone moves it."""

    def __init__(self, int64_t time_ns=0):
        self.time_ns = time_ns

    cdef int64_t now_ns(self) noexcept nogil: return self.time_ns
    cdef int64_t wall_ns(self) noexcept nogil: return self.time_ns

    def advance(self, int64_t nanoseconds) -> None:
        """Move the clock forward."""
        self.time_ns += nanoseconds
