from libc.stdint cimport int64_t, uint64_t

from broker.doorbell cimport Doorbell
from broker.layout cimport Layout
from broker.log cimport BrokerLog
from broker.stages.ack cimport AckStage
from sim.cxl.memory cimport Memory

cdef class Receiver:
    cdef Memory memory
    cdef Layout layout
    cdef BrokerLog log
    cdef AckStage acks
    cdef Doorbell own_doorbell
    cdef Doorbell head_doorbell
    cdef int broker

    cdef int receive_payload(self, uint64_t topic, uint64_t generation, const void* payload, uint64_t nbytes,
                             uint64_t messages, uint64_t client, uint64_t session, uint64_t session_epoch, uint64_t sequence,
                             uint64_t published_ns, uint64_t* slot) noexcept nogil
