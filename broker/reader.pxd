from libc.stdint cimport int64_t, uint64_t

from broker.head cimport HeadView
from broker.layout cimport Layout, OrderEntry
from sim.cxl.memory cimport Memory

cpdef enum ReadStatus:
    READ_OK = 1
    READ_NOTHING = 0
    READ_LOST = -1          # reclaimed before it was read
    READ_CLOSED = -2        # the topic is gone
    READ_DAMAGED = -3
    READ_GONE = -4          # no replica had these messages at recovery

cdef enum:
    ANY_POSITION = -1

cdef class OrderReader:
    cdef readonly Memory memory
    cdef readonly HeadView head
    cdef readonly Layout layout     # of the head that serves
    cdef readonly uint64_t topic
    cdef readonly uint64_t generation
    cdef readonly uint64_t index
    cdef uint64_t next_position     # where the entry at `index` has to begin; unknown after a jump

    cdef int peek(self, uint64_t index, OrderEntry* entry) noexcept nogil
    cdef int look(self, uint64_t index, OrderEntry* entry) noexcept nogil
    cdef dict frontiers_now(self)
    cdef bint positions(self, uint64_t* first, uint64_t* committed) noexcept nogil
    cdef uint64_t committed_index(self) noexcept nogil
    cdef uint64_t committed_position(self) noexcept nogil
    cdef uint64_t reclaimed_index(self) noexcept nogil
