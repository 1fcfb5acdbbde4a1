from libc.stdint cimport int64_t, uint64_t

from broker.doorbell cimport Doorbell
from broker.head cimport HeadView
from broker.layout cimport Descriptor, Layout
from broker.log cimport BrokerLog
from broker.stages.ack cimport AckStage
from broker.stages.stage cimport Stage
from sim.cxl.clock cimport Clock
from sim.cxl.memory cimport Memory

cdef struct HeldLease:
    uint64_t offset
    uint64_t nbytes
    uint64_t used               # bytes below are taken by descriptors

cdef struct AttachSlot:
    # Invariant: retired <= granted <= retired + LEASE_RING; taken counts descriptors, in order.
    uint64_t state              # AttachState
    uint64_t generation
    uint64_t topic
    uint64_t topic_generation
    uint64_t session_slot
    uint64_t session_epoch
    uint64_t client_id
    uint64_t owner              # the principal that attached
    uint64_t level
    uint64_t stream
    uint64_t taken
    uint64_t granted
    uint64_t retired
    uint64_t subscriber         # cursor + 1 of a subscriber, which views and does not write; 0 a publisher
    uint64_t released           # a subscriber's released index
    uint64_t committed          # the committed index that a subscriber was told of
    uint64_t closing
    uint64_t evicting           # a subscriber beyond the retention: its place is let go as soon as it views nothing
    uint64_t lease_bytes        # what the next lease is to have: more each time one was filled
    uint64_t fence_due          # its session is to be fenced as soon as the ring has room for that
    int64_t heard_at
    uint64_t heartbeat
    HeldLease leases[16]

cdef class AttachStage(Stage):
    cdef Memory memory
    cdef Layout layout
    cdef HeadView head
    cdef BrokerLog log
    cdef AckStage acks
    cdef Clock clock
    cdef int broker
    cdef AttachSlot* slots
    cdef uint64_t first                 # number of this broker's first slot in the region
    cdef uint64_t count
    cdef uint64_t limit                 # slots at and above were never opened
    cdef int64_t lease_ns
    cdef uint64_t lease_bytes_max       # leases of a busy client grow up to this
    cdef int64_t next_check
    cdef int64_t met_at                 # when a client was on our processor
    cdef int64_t next_move              # not before

    cdef resume_slot(self, uint64_t i)
    cdef int64_t take(self, uint64_t i) noexcept nogil
    cdef void make_way(self, uint64_t processor) noexcept nogil
    cdef bint accept(self, AttachSlot* slot, Descriptor* descriptor) noexcept nogil
    cdef int64_t follow(self, uint64_t i) noexcept nogil
    cdef int64_t grant(self, uint64_t i) noexcept nogil
    cdef void fence_slot(self, uint64_t i) noexcept nogil
    cdef bint fence_session(self, AttachSlot* slot) noexcept nogil
    cdef void write_line(self, uint64_t i) noexcept nogil
    cdef void end_leases(self, AttachSlot* slot, uint64_t up_to) noexcept nogil
    cdef int64_t claim_slot(self, uint64_t topic, uint64_t topic_generation, uint64_t pid, uint64_t presence,
                            uint64_t owner)
    cdef void publish_slot(self, uint64_t i) noexcept nogil
    cdef int64_t finish(self, uint64_t i) noexcept nogil
    cdef int64_t evict(self, uint64_t i) noexcept nogil
