from libc.stdint cimport int64_t, uint32_t, uint64_t

from broker.head cimport HeadView
from broker.layout cimport Layout
from broker.log cimport BrokerLog
from broker.notifier cimport Notifier
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory

cdef enum:
    STREAM_BATCHES = 1024       # batches of one stream that may wait for their ack
    STREAM_COUNT = 1024

cdef struct Waiting:
    uint64_t sequence
    uint64_t slot
    uint64_t messages
    uint64_t position           # the result, once it was taken
    uint64_t status

cdef struct Ack:
    uint64_t sequence
    uint64_t position
    uint64_t status

cdef struct AckStream:
    # Invariant: acks_tail <= acks_head, waiting_tail <= taken <= waiting_head; one thread writes each of them.
    uint64_t active             # 0 free, 1 open, 2 closing
    uint64_t topic
    uint64_t generation
    uint64_t level
    uint64_t replication_factor
    uint64_t waiting_head       # the receiver's
    uint64_t waiting_tail       # the stage's
    uint64_t taken              # the stage's: results of batches below it were taken from their slots
    uint64_t acks_head          # the stage's
    uint64_t acks_tail          # the event loop's
    uint64_t slot_and_one       # attached client's slot + 1: its acks go into memory; 0 none
    uint64_t slot_generation
    uint64_t news               # something was settled in this step
    Waiting* waiting
    Ack* acks

cdef class AckStage(Stage):
    cdef Memory memory
    cdef Layout layout
    cdef BrokerLog log
    cdef HeadView head
    cdef Notifier notifier
    cdef int broker
    cdef AckStream* streams
    cdef uint64_t stream_limit          # streams at and above were never opened
    cdef uint64_t completion_line       # a line of completions not flushed yet, 0 none

    cdef int64_t poll_stream(self, AckStream* stream) noexcept nogil
    cdef void complete(self, AckStream* stream, Ack* ack) noexcept nogil
    cdef void ring_client(self, uint64_t slot) noexcept nogil
    cdef int64_t open_number(self, uint64_t topic, uint64_t generation, uint64_t level,
                             uint64_t replication_factor) noexcept nogil
    cdef void take_results(self, AckStream* stream) noexcept nogil
    cdef void let_go(self, AckStream* stream) noexcept nogil
    cdef bint is_durable(self, AckStream* stream, uint64_t end, uint64_t* failure) noexcept nogil
    cdef bint settled(self, AckStream* stream, Waiting* waiting, Ack* ack) noexcept nogil
    cdef bint expect(self, uint64_t number, uint64_t sequence, uint64_t slot, uint64_t messages) noexcept nogil
    cdef uint64_t room(self, uint64_t number) noexcept nogil
