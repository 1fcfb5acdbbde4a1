from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef class ReceivedBatch:
    cdef readonly uint64_t position
    cdef readonly uint64_t count
    cdef readonly uint32_t broker
    cdef readonly uint64_t timestamp_ns
    cdef readonly object topic
    cdef object owner                   # what keeps the bytes: a response, or a view of a segment
    cdef bint is_view
    cdef const uint8_t* base            # first byte of the owner's buffer
    cdef const uint8_t* data
    cdef readonly uint64_t nbytes
    cdef uint64_t seen_count            # `to_messages` has come so far: messages, and the bytes they take
    cdef uint64_t seen_bytes

    cdef object _broken(self, text)
    cdef int _check_end(self, uint64_t at) except -1
    cdef uint32_t _size(self, uint64_t at) except? 0xFFFFFFFF
