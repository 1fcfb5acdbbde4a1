from libc.stdint cimport int64_t, uint64_t

from broker.doorbell cimport Doorbell
from broker.layout cimport CursorLine, Layout
from broker.segments cimport PoolLeader
from broker.stages.sequencer cimport OrderState, TopicOrder
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory

cdef class Reclaim(Stage):
    cdef Memory memory
    cdef Layout layout
    cdef OrderState state
    cdef PoolLeader leader
    cdef uint64_t* cursors_seen
    cdef uint64_t* answered
    cdef uint64_t* retention            # by topic; read when its generation is new, or the table of topics has changed
    cdef uint64_t options_seen          # version of the table of topics
    cdef uint64_t* replication
    cdef uint64_t* generations
    cdef uint64_t* reclaimed_bytes
    cdef uint64_t* reclaimed_position
    cdef uint64_t holder
    cdef uint64_t holder_topic
    cdef uint64_t reclaims
    cdef uint64_t* activity_seen        # of the sequencer's activity: topics that committed since
    cdef uint64_t activity_words
    cdef uint64_t next_look             # where the look before sleeping goes on
    cdef uint64_t evict_below           # order entries below are beyond the retention, and readers hold none of them
    cdef list doorbell_objects
    cdef void** doorbells

    cdef int64_t grant_cursors(self, uint64_t broker) noexcept nogil
    cdef bint know(self, uint64_t topic) noexcept nogil
    cdef void read_options(self, uint64_t topic) noexcept nogil
    cdef void look_at_options(self) noexcept nogil
    cdef uint64_t limit(self, uint64_t topic) noexcept nogil
    cdef uint64_t limit_of_others(self, uint64_t topic, uint64_t lowest) noexcept nogil
    cdef int64_t reclaim_bytes(self, uint64_t topic, uint64_t nbytes, uint64_t entries) noexcept nogil
    cdef uint64_t first_kept(self, uint64_t topic, uint64_t index, uint64_t position) noexcept nogil
    cdef uint64_t kept_bytes(self, uint64_t topic) noexcept nogil
    cdef int64_t answer_pressure(self, uint64_t broker) noexcept nogil
    cdef int64_t keep_retention(self, uint64_t topic) noexcept nogil
    cdef int64_t keep_news(self) noexcept nogil
    cdef bint is_beyond(self, uint64_t topic) noexcept nogil
    cdef uint64_t margin(self) noexcept nogil
    cdef bint passes_over(self, uint64_t cursor, CursorLine* line) noexcept nogil
    cdef int64_t evict_beyond_retention(self, uint64_t topic, uint64_t nbytes, uint64_t entries) noexcept nogil
    cdef int64_t take_from_retained(self, uint64_t step) noexcept nogil
    cdef int64_t take_from_largest(self, uint64_t presser, uint64_t wanted, uint64_t held) noexcept nogil
    cdef uint64_t capacity(self) noexcept nogil
    cdef void ring(self, uint64_t broker) noexcept nogil
    cdef void tell_brokers(self) noexcept nogil
