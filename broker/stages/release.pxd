from libc.stdint cimport int64_t, uint64_t

from broker.head cimport HeadView
from broker.layout cimport Layout
from broker.log cimport BrokerLog, TopicLog
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory

cdef class Release(Stage):
    cdef Memory memory
    cdef Layout layout
    cdef BrokerLog log
    cdef HeadView head
    cdef uint64_t control_seen
    cdef int broker
    cdef uint64_t reclaims_seen
    cdef uint64_t steps
    cdef uint64_t orphans_due
    cdef uint64_t next_look             # where the look before sleeping goes on

    cdef void look_at_all(self) noexcept nogil
    cdef void look(self, uint64_t count) noexcept nogil
    cdef int64_t release_slots(self, uint64_t topic) noexcept nogil
    cdef void give_up_run(self, TopicLog* log, uint64_t reclaimed) noexcept nogil
    cdef int64_t release_segments(self, uint64_t topic) noexcept nogil
