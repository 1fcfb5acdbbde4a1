"""A device, and the hosts with their caches over it."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from sim.cxl.cachelines cimport Host, LineObserver


cdef class Device:
    cdef object owner
    cdef object side_owner
    cdef uint8_t* base
    cdef uint8_t* side
    cdef readonly uint64_t bytes
    cdef readonly uint64_t line_bytes
    cdef readonly bint writable
    cdef readonly bint device_atomics
    cdef readonly object coherent           # list of (offset, bytes)
    cdef uint32_t* versions
    cdef uint8_t* payload_versions


cdef class HostCache:
    cdef readonly Device device
    cdef readonly str name
    cdef object owner
    cdef Host h
    cdef LineObserver observer
    cdef void event(self) noexcept nogil
