from libc.stdint cimport int64_t

cdef class Clock:
    cdef int64_t now_ns(self) noexcept nogil
    cdef int64_t wall_ns(self) noexcept nogil

cdef class SystemClock(Clock):
    pass

cdef class ManualClock(Clock):
    cdef public int64_t time_ns
