from libc.stdint cimport int64_t, uint8_t, uint64_t

from broker.doorbell cimport Doorbell
from broker.layout cimport Layout
from broker.log cimport BrokerLog
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory

cdef class Delegation(Stage):
    cdef Memory memory
    cdef Layout layout
    cdef BrokerLog log
    cdef Doorbell head_doorbell
    cdef int broker
    cdef uint64_t activity[2048]    # our own copy of the activity line: TOPICS_MAX topics, one byte each
    cdef uint64_t* generations          # of the topics that the counts are of
    cdef uint64_t* counts           # messages and bytes delegated so far, two words a topic

    cdef int64_t delegate(self, uint64_t topic) noexcept nogil
    cdef void publish(self, uint64_t topic, uint64_t first, uint64_t last) noexcept nogil
