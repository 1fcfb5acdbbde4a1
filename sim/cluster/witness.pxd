from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from broker.layout cimport Layout, OrderEntry
from broker.log cimport BrokerLog
from sim.cxl.memory cimport Memory

cpdef enum Breach:
    BREACH_NONE = 0
    BREACH_ENTRY_MISSING = 1        # T: the committed frontier covers an entry that is not in memory
    BREACH_POSITION = 2             # T: positions have a hole or overlap
    BREACH_PAYLOAD = 3              # N: committed bytes are not what anybody sent
    BREACH_TWICE = 4                # U: a message is in the log twice
    BREACH_GAP = 5                  # P: a session's messages have a gap
    BREACH_BACK = 6                 # M: a frontier went back
    BREACH_BOUNDS = 7               # reclaimed <= ordered <= delegated <= published is broken
    BREACH_EPOCH = 8                # Z: an entry of an old epoch became visible
    BREACH_CHANGED = 9              # A1: a committed batch is not what it was
    BREACH_CURSOR = 10              # C: a cursor went back or passed the tail
    BREACH_RING = 11                # B: a ring holds more than it has slots
    BREACH_HEADER_MISSING = 12      # T: the delegated frontier covers a header that is not in memory

cdef struct Seen:
    # One committed order entry, as it was when the frontier passed it.
    uint64_t position
    uint64_t payload_offset
    uint64_t client
    uint64_t first              # number of its first message
    uint64_t sequence
    uint32_t payload_bytes
    uint32_t count
    uint32_t session_epoch
    uint16_t broker
    uint16_t epoch
    uint64_t step

cdef struct TopicTruth:
    uint64_t generation
    uint64_t order
    uint64_t committed
    uint64_t position
    uint64_t reclaimed
    uint64_t epoch
    uint64_t restored           # order entries below were made by a recovery
    uint64_t capacity
    Seen* seen

cdef class Witness:
    cdef Memory truth
    cdef Layout layout
    cdef list logs                      # BrokerLog or None (no power) by host
    cdef void** log_pointers
    cdef TopicTruth* topics
    cdef uint64_t* delegated            # topic * brokers + broker
    cdef uint64_t* scanned
    cdef uint64_t* by_broker            # messages in the order
    cdef uint64_t* sessions             # state and expected, by session
    cdef uint64_t* cursors              # state and index, by cursor
    cdef int32_t** where                # by client: order entry of each message number, -1 none, -2 lost
    cdef uint64_t* next_number          # by client: what has to come next at order 5
    cdef uint64_t topic_count
    cdef uint64_t client_count
    cdef uint64_t number_count
    cdef uint64_t control               # the control word that was seen last
    cdef public bint gives_up           # clients give messages up: at order 5 numbers grow, with gaps that history judges
    cdef public uint64_t step           # the schedule's, for what is noted
    cdef readonly uint64_t hash
    cdef readonly int breach
    cdef bint blind             # has seen its breach and looks no more
    cdef uint64_t details[5]

    cdef int check(self) noexcept nogil
    cdef bint served(self) noexcept nogil
    cdef int check_topic(self, uint64_t topic) noexcept nogil
    cdef int check_entry(self, uint64_t topic, uint64_t index) noexcept nogil
    cdef void see(self, uint64_t topic, uint64_t index, OrderEntry* entry, uint64_t client, uint64_t first) noexcept nogil
    cdef int check_brokers(self, uint64_t topic) noexcept nogil
    cdef int check_headers(self, uint64_t topic, uint64_t broker, uint64_t delegated) noexcept nogil
    cdef int check_tables(self) noexcept nogil
    cdef int recheck(self) noexcept nogil
    cdef int fail(self, int breach, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e) noexcept nogil
    cdef int grows(self, uint64_t* highest, uint64_t value, uint64_t what, uint64_t topic,
                   uint64_t broker) noexcept nogil
    cdef int reset(self, uint64_t topic, uint64_t generation) noexcept nogil
