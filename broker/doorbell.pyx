"""Wakes a sleeping pipeline. A convenience of the simulation: between real hosts there is no futex, only polling.

A sleeper arms (counts itself, full fence), polls once more, and only then sleeps. A ringer publishes, full fence, looks
at the count of sleepers, and only then increments and wakes: no system call while the peer is awake.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from sim.cxl.memory cimport Memory


cdef class Doorbell:
    """One doorbell line of the coherent area."""

    def __init__(self, Memory memory, uint64_t offset):
        self.memory = memory
        self.offset = offset

    cdef void ring(self) noexcept nogil:
        self.memory.full_fence()
        self.ring_fenced()

    cdef void ring_fenced(self) noexcept nogil:
        # The caller has just done a full fence, for several doorbells at once.
        if self.is_armed():
            self.memory.fetch_add(self.offset, 1)
            self.memory.wake(self.offset)

    cdef bint is_armed(self) noexcept nogil:
        """Whether somebody sleeps here, or is about to."""
        return self.memory.load(self.offset + 8) != 0

    cdef uint32_t arm(self) noexcept nogil:
        cdef uint32_t seen = <uint32_t>self.memory.load(self.offset)
        self.memory.fetch_add(self.offset + 8, 1)
        self.memory.full_fence()
        return seen

    cdef void sleep(self, uint32_t seen, int64_t timeout_ns) noexcept nogil:
        self.memory.wait(self.offset, seen, timeout_ns)

    cdef void disarm(self) noexcept nogil:
        self.memory.fetch_add(self.offset + 8, <uint64_t>-1)

    def sleep_now(self, uint32_t seen, int64_t timeout_ns) -> None:
        """Sleep until somebody rings, unless one has since `seen` was loaded; for tests and tools."""
        with nogil:
            self.sleep(seen, timeout_ns)

    def ring_now(self) -> None:
        """Wake whoever sleeps here."""
        self.ring()
