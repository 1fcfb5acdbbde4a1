"""A role's door to memory that is not coherent. The model is in cachelines.pxd."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from sim.cxl.cachelines cimport Host
from sim.cxl.host cimport HostCache
from sim.cxl.memory cimport Memory


cdef class NonCoherentMemory(Memory):
    cdef readonly HostCache host
    cdef Host* h
    cdef public int agent
    cdef uint64_t countdown

    cdef bint enter(self, int operation, uint64_t offset, uint64_t value) noexcept nogil
    cdef int my_agent(self) noexcept nogil
    cdef bint atomic_begin(self, uint64_t offset, uint64_t value, uint64_t site, uint32_t* version) noexcept nogil
    cdef void atomic_end(self, uint64_t offset, uint32_t version) noexcept nogil
    cdef void streamed(self, uint64_t offset, uint64_t count, const uint8_t* source, uint64_t site) noexcept nogil
    cdef uint64_t read_payload(self, uint64_t offset, uint64_t count, uint64_t site) noexcept nogil
    cdef void open(self, HostCache host, int role, uint64_t statistics_offset)
    cdef void write_payload(self, uint64_t offset, uint64_t count, uint64_t site) noexcept nogil
    cdef void poison(self, uint8_t* to, uint64_t offset, uint64_t count) noexcept nogil
