from libc.stdint cimport int64_t, uint64_t

from broker.layout cimport SequencerCounters
from sim.cxl.memory cimport Memory

cpdef enum LockMode:
    LOCK_ATOMIC = 0
    LOCK_MUTEX = 1
    LOCK_SEMAPHORE = 2

cdef class OrderLock:
    cdef readonly int mode
    cdef void* mutex
    cdef void* semaphore
    cdef SequencerCounters* counters
    cdef SequencerCounters* own_counters     # NULL: they lie in the region
    cdef Memory memory                      # keeps the mapping of a lock made by `at`
    cdef int64_t held_since

    @staticmethod
    cdef OrderLock make(int mode, void* mutex, SequencerCounters* counters, object semaphore_name, bint initialise)
    cdef void acquire(self) noexcept nogil
    cdef void release(self) noexcept nogil
