from libc.stdint cimport int64_t

cdef enum:
    LOOK_TOPICS = 256           # how many topics a stage looks at before it sleeps, whatever the hints say

cdef class Stage:
    cdef public object failure      # what its Python part raised; whoever owns the thread passes it on
    cdef int64_t step(self) noexcept nogil
    cdef void prepare_to_sleep(self) noexcept nogil
    cdef void leave(self) noexcept nogil
