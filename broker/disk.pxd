from libc.stdint cimport int64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef int64_t disk_write(int fd, const iovec* parts, int count, int64_t offset) noexcept nogil
cdef int disk_sync(int fd) noexcept nogil
