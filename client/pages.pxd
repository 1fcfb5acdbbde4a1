from libc.stdint cimport uint8_t, uint64_t

from broker.layout cimport Layout
from sim.cxl.memory cimport Memory

cdef class Pages:
    cdef Memory memory
    cdef Layout layout
    cdef uint8_t* present
    cdef readonly uint64_t mapped_late      # segments that were mapped when they were needed
    cdef object thread
    cdef uint64_t ending

    cdef void need(self, uint64_t offset, uint64_t nbytes) noexcept nogil
    cdef int see_to_others(self) except -1
