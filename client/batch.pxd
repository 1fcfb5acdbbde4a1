from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef class Batch:
    cdef public object frame            # the request's bytes: header, then packed messages
    cdef uint8_t* data                  # where messages are packed
    cdef readonly uint64_t capacity     # payload bytes there is room for
    cdef readonly uint64_t used
    cdef readonly uint64_t count
    cdef public object sequence         # None until stamped
    cdef public object position         # of the first message, once acked
    cdef public object epoch
    cdef public object broker
    cdef public bint duplicate
    cdef public object error
    cdef public bint settled
    cdef public int level
    cdef public double opened
    cdef public double deadline
    cdef public int64_t sent_ns
    cdef public list callbacks
    cdef public object publisher
    cdef public int64_t number          # of sealing, for the publisher's books

    cdef bint append(self, const void* source, uint64_t nbytes) noexcept nogil
    cdef bint fits(self, uint64_t nbytes) noexcept
    cdef int _cut(self, Py_ssize_t size) except -1

cdef class Delivery:
    cdef readonly Batch batch
    cdef readonly uint64_t index
