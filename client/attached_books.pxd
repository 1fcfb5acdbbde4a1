"""What an attached publisher has at its brokers: channels, leases, batches in flight, outcomes to be told."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from broker.doorbell cimport Doorbell
from broker.layout cimport Layout
from client.batch cimport Batch, Outcome, PyObject
from client.pages cimport Pages
from sim.cxl.memory cimport Memory

cdef extern from "Python.h":
    # Counting references needs the GIL and runs no Python: in `nogil` functions, which are called with it, both hold.
    void Py_INCREF(PyObject* thing) nogil
    void Py_XDECREF(PyObject* thing)

cdef enum:
    SENT_RING = 1024
    CHANNELS_MAX = 64               # one a broker

cdef enum SentState:
    SENT_FREE = 0
    SENT_WAITING = 1
    SENT_RETRY = 2                  # refused: to be submitted again

cdef struct Channel:
    # Invariant: retired <= using <= granted; completed <= submitted <= completed + ATTACH_RING.
    uint64_t slot
    uint64_t generation
    uint64_t broker
    bint alive
    bint left                       # its slot is somebody else's by now
    bint loaned                     # a loan is open in its lease: nothing else goes there
    bint has_lease
    bint idle                       # gave its leases back, and has not asked for one since
    uint64_t submitted
    uint64_t completed
    uint64_t granted
    uint64_t using
    uint64_t retired
    uint64_t wanted
    uint64_t lease_offset
    uint64_t lease_bytes
    uint64_t lease_used
    int64_t heard_ns                # of its last answer, or since when it has something to answer
    uint64_t lease_waiting[16]      # batches of each lease that are not settled
    uint64_t sequences[64]          # by submission number

cdef struct Sent:
    uint64_t sequence
    uint64_t state
    uint64_t channel
    uint64_t lease
    uint64_t offset
    uint64_t nbytes
    uint64_t messages
    uint64_t wall_ns
    int64_t sent_ns
    double deadline                 # monotonic seconds
    Outcome* holder                 # of the batch that deliveries hold, NULL when nobody does
    bint expired                    # its delivery time-out is over: told, and not to be published again

cdef class AttachedBooks:
    cdef readonly Memory memory
    cdef Layout layout
    cdef object engine
    cdef bint ending                    # the session is being ended: nothing is packed or settled until the next begins
    cdef uint64_t session               # counts those that were begun
    cdef Doorbell bell
    cdef bint woken                 # whether the last submit had to wake somebody up
    cdef Channel* channels
    cdef readonly uint64_t channel_count
    cdef Sent* sent
    cdef readonly uint64_t next_sequence
    cdef readonly uint64_t oldest       # every lower sequence is settled
    cdef readonly uint64_t in_flight
    cdef readonly uint64_t in_flight_bytes
    cdef uint64_t expired               # of those in flight, the ones that were given up
    cdef readonly uint64_t window_bytes
    cdef uint64_t ring_limit            # descriptors of a channel that may be unanswered
    cdef readonly uint64_t batches
    cdef readonly uint64_t acked
    cdef readonly uint64_t duplicates
    cdef readonly uint64_t retries
    cdef readonly uint64_t failed
    cdef uint64_t turn_of               # channel that is asked first
    cdef readonly bint fenced
    cdef readonly bint retry_wanted
    cdef public int level
    cdef public uint64_t epoch
    cdef Outcome* first                 # outcomes that are not told yet
    cdef Outcome* last
    cdef unsigned long telling          # the thread that tells them, 0 none
    cdef uint64_t asleep                # threads that wait without the GIL
    cdef readonly Pages pages
    cdef int64_t* latencies
    cdef uint64_t latency_count

    cdef void count_somewhere(self)
    cdef bint has_lease_for(self, Channel* channel, uint64_t need, bint ask) noexcept nogil
    cdef void retire(self, Channel* channel) noexcept nogil
    cdef void tell(self, Channel* channel) noexcept nogil
    cdef void give_all_back(self) noexcept nogil
    cdef bint takes(self, Channel* channel, uint64_t need, bint ask) noexcept nogil
    cdef int64_t pick(self, uint64_t need) noexcept nogil
    cdef void ring(self, Channel* channel) noexcept nogil
    cdef void ring_all(self) noexcept nogil
    cdef bint news(self, bint leases) noexcept nogil
    cdef int wait_for_news(self, int64_t nanoseconds, bint leases) except -1
    cdef void submit_new(self, uint64_t c, uint64_t offset, uint64_t nbytes, uint64_t messages, uint64_t wall_ns,
            Outcome* holder, bint counted, double deadline) noexcept nogil
    cdef void submit(self, uint64_t c, uint64_t offset, uint64_t nbytes, uint64_t messages, uint64_t sequence,
            uint64_t wall_ns) noexcept nogil
    cdef uint64_t copy_to(self, uint64_t c, const void* payload, uint64_t nbytes) noexcept nogil
    cpdef uint64_t poll(self) except? 0xFFFFFFFFFFFFFFFF
    cdef uint64_t take_answers(self) noexcept nogil
    cdef bint take_answer(self, uint64_t c, uint64_t* done) noexcept nogil
    cdef void settle(self, Sent* sent, int kind, uint64_t position) noexcept nogil
    cdef void note_of(self, Sent* sent, int kind, uint64_t position, PyObject* error) noexcept nogil
    cdef void note(self, Outcome* outcome, int kind, uint64_t position, uint64_t broker, PyObject* error) noexcept nogil
    cdef int tell_outcomes(self) except -1
    cdef int tell_first(self, uint64_t epoch) except -1
    cdef uint64_t give_up(self, Sent* sent, PyObject* error) noexcept nogil

cdef Outcome* held(Batch batch) noexcept
cdef void drop(Outcome* outcome) noexcept
