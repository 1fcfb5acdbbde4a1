"""What is told of lines (see cachelines.pxd, which has the model)."""

from libc.stdint cimport uint32_t, uint64_t


cdef class LineObserver:
    cdef void stored(self, Host* h, uint64_t line, Access* who) noexcept nogil: pass
    cdef void loaded(self, Host* h, uint64_t line, Access* who) noexcept nogil: pass
    cdef void filled(self, Host* h, uint64_t line) noexcept nogil: pass
    cdef void written_back(self, Host* h, uint64_t line, uint32_t expected, uint32_t found) noexcept nogil: pass
    cdef void flushed(self, Host* h, uint64_t line, uint64_t state, Access* who) noexcept nogil: pass
    cdef void invalidated(self, Host* h, uint64_t line, uint64_t state, Access* who) noexcept nogil: pass
    cdef void fenced(self, Host* h, uint64_t drained, Access* who) noexcept nogil: pass
    cdef void atomic(self, Host* h, uint64_t offset, bint allowed, Access* who) noexcept nogil: pass
    cdef void crashed(self, Host* h) noexcept nogil: pass
    cdef void payload_written(self, Host* h, uint64_t offset, uint64_t count, Access* who) noexcept nogil: pass
    cdef void payload_fenced(self, Host* h, uint64_t offset, uint64_t count) noexcept nogil: pass
    cdef void payload_read(self, Host* h, uint64_t offset, uint64_t count, uint64_t stale,
                           Access* who) noexcept nogil: pass

    cdef void called_from_python(self):
        """The next access comes from a Python function: which one, its frame says."""

    cdef void watch(self, Host* h, object cache, object store):
        """A host is about to be used; `cache` owns its lines, `store` is a buffer for what is kept of it, or None."""
