from libc.stdint cimport int64_t, uint32_t, uint64_t

from sim.cxl.memory cimport Memory

cdef class Doorbell:
    cdef Memory memory
    cdef uint64_t offset

    cdef void ring(self) noexcept nogil
    cdef void ring_fenced(self) noexcept nogil
    cdef bint is_armed(self) noexcept nogil
    cdef uint32_t arm(self) noexcept nogil
    cdef void sleep(self, uint32_t seen, int64_t timeout_ns) noexcept nogil
    cdef void disarm(self) noexcept nogil
