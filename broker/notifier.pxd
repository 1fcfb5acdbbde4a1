from libc.stdint cimport uint64_t

cdef class Notifier:
    cdef readonly int fd
    cdef uint64_t armed

    cdef void notify(self) noexcept nogil
