from libc.stdint cimport int64_t, uint64_t

from broker.head cimport HeadView
from broker.layout cimport Layout
from sim.cxl.memory cimport Memory

cdef class SegmentPool:
    cdef Memory memory
    cdef Layout layout
    cdef readonly int broker
    cdef uint64_t share             # segments of one broker's part of the bitmap
    cdef uint64_t share_words
    cdef uint64_t hint              # first-fit: nothing of this broker's part is free below
    cdef uint64_t cold_from         # nothing of it is both free and cold below
    cdef bint entitled              # who asks now has less than its share
    cdef readonly uint64_t allocated
    cdef readonly uint64_t released
    cdef readonly uint64_t cold     # allocations that had to take a segment nobody had touched

    cdef int64_t allocate(self, uint64_t run) noexcept nogil
    cdef bint claim(self, uint64_t segment, uint64_t run) noexcept nogil
    cdef void release(self, uint64_t segment) noexcept nogil
    cdef void poll(self) noexcept nogil
    cdef bint is_asking(self) noexcept nogil
    cdef bint is_low(self, uint64_t deficit) noexcept nogil
    cdef bint has_left(self, uint64_t run, uint64_t deficit) noexcept nogil
    cdef bint take_bit(self, uint64_t segment) noexcept nogil
    cdef void give_bit(self, uint64_t segment) noexcept nogil
    cdef uint64_t word_of(self, uint64_t segment) noexcept nogil
    cdef uint64_t bit_of(self, uint64_t segment) noexcept nogil
    cdef uint64_t taken_word(self, uint64_t offset) noexcept nogil
    cdef uint64_t warm_word(self, uint64_t offset) noexcept nogil
    cdef bint is_warm(self, uint64_t segment) noexcept nogil
    cdef void mark_warm(self, uint64_t segment) noexcept nogil
    cdef bint owns(self, uint64_t segment) noexcept nogil
    cdef bint valid(self, uint64_t segment) noexcept nogil
    cdef uint64_t search_shares(self) noexcept nogil
    cdef int64_t allocate_one(self, uint64_t part, bint warm) noexcept nogil
    cdef int64_t allocate_run(self, uint64_t run) noexcept nogil
    cdef void opened(self, uint64_t segment) noexcept nogil
    cdef int64_t take_cold(self) noexcept nogil
    cdef void give_warm(self, uint64_t segment, bint warm) noexcept nogil

cdef class AtomicPool(SegmentPool):
    pass

cdef class PartitionedPool(SegmentPool):
    pass

cdef class LeaderPool(SegmentPool):
    cdef HeadView head
    cdef uint64_t* mine             # segments granted to this broker and free, one bit each
    cdef uint64_t wanted
    cdef uint64_t collected         # granted segments taken from the grant ring
    cdef uint64_t returned
    cdef bint known                 # the counts above are those of the head that serves
    cdef uint64_t asked             # failed allocations since the last wish

    cdef bint knows_head(self) noexcept nogil

cdef class LeaderBitmap(SegmentPool):
    cdef uint64_t* taken            # one bit a segment: granted, or being touched
    cdef uint64_t* warm
    cdef uint64_t grantee           # whom the next allocation is for

    cdef bint take_for(self, uint64_t segment, uint64_t grantee) noexcept nogil
    cdef void note(self, uint64_t segment, uint64_t grantee) noexcept nogil

cdef class PoolLeader:
    cdef Memory memory
    cdef Layout layout
    cdef LeaderBitmap pool
    cdef uint64_t* granted_runs
    cdef uint64_t* granted_segments
    cdef uint64_t* taken
    cdef uint64_t warmed_to         # no cold segment that was free lies below

    cdef bint owes(self, uint64_t b) noexcept nogil
    cdef int64_t take_returns(self, uint64_t b) noexcept nogil
    cdef int64_t step(self) noexcept nogil
    cdef int64_t warm_one(self, uint64_t from_segment) noexcept nogil
