from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from broker.doorbell cimport Doorbell
from broker.layout cimport BatchHeader, Layout, SequencerCounters, TopicLine
from broker.order_lock cimport OrderLock
from broker.stages.stage cimport Stage
from sim.cxl.clock cimport Clock
from sim.cxl.memory cimport Memory

cdef enum:
    POSITION_BITS = 48          # an index is counted from here on in the word that has index and position
    WINDOW = 256                # batches a session may have in flight beyond the one expected next

cdef struct Held:
    uint64_t sequence_and_one   # 0: empty
    uint32_t broker
    uint64_t slot

cdef struct Session:
    uint64_t state              # generation << 8 | SessionState
    uint64_t client_id
    uint64_t epoch
    uint64_t topic
    uint64_t expected           # every lower sequence is in the log
    uint64_t claimed            # a scanner is changing this session (lock-free order)
    uint64_t messages
    uint64_t position
    uint64_t predecessor_expected
    uint64_t predecessor_epoch
    int64_t gap_since
    uint64_t held_count
    uint64_t touched            # its progress line has to be written
    Held* held                  # order 5: what waits, by sequence % WINDOW
    uint64_t in_log[4]          # order below 5: what is in the log beyond `expected`, bit sequence % WINDOW

cdef struct Done:
    # An entry that was written; it may be passed when its index is there.
    uint64_t index_and_one      # once it is fenced
    uint64_t payload_offset
    uint32_t messages
    uint32_t nbytes
    uint64_t broker

cdef struct TopicOrder:
    # Invariant: reclaimed_index <= committed_index <= assigned index <= reclaimed_index + order entries.
    uint64_t generation
    uint64_t order
    int64_t lease_ns
    uint64_t replicated
    uint64_t assigned           # (index << 48) + position, modulo 2^64: both move with one fetch-add (`place_of`)
    uint64_t committed_index
    uint64_t committed_position
    uint64_t committed_bytes
    uint64_t reclaimed_index
    uint64_t advancing          # a scanner is moving the committed frontier
    uint64_t stalled            # held batches wait for room in the order index
    uint64_t news               # brokers whose line has to be written
    Done* done                  # by index % entries

cdef struct ScanPlace:
    uint64_t scanned
    uint64_t rescan_to          # slots below it may have a result that was taken over from an earlier head
    uint64_t generation

cdef struct Ordered:
    # What a broker has below the committed frontier; whoever moves that adds and writes the line.
    uint64_t scanned            # by the broker's own scanner
    uint64_t messages
    uint64_t nbytes
    uint64_t address

cdef bint in_log(Session* session, uint64_t sequence) noexcept nogil
cdef uint64_t place_of(uint64_t word, uint64_t committed_position, uint64_t committed_index, uint64_t* index) noexcept nogil
cdef void note_in_log(Session* session, uint64_t sequence) noexcept nogil

cdef class OrderState:
    cdef readonly Layout layout
    cdef Memory memory
    cdef readonly OrderLock lock
    cdef readonly int head_broker
    cdef readonly uint64_t control      # the word under which this sequencer serves
    cdef TopicOrder* topics
    cdef Session* sessions
    cdef uint64_t topic_count           # for __dealloc__: by then the collector may have taken `layout` away
    cdef uint64_t session_count
    cdef SequencerCounters* counters
    cdef readonly uint64_t epoch
    cdef readonly int scanners
    cdef uint64_t gaps                  # sessions with a gap
    cdef uint64_t topics_open
    cdef uint64_t replicated_topics
    cdef Ordered* ordered               # topic * brokers + broker
    cdef uint64_t activity_claimed
    cdef uint64_t activity[2048]        # TOPICS_MAX topics, one byte a topic: the copy that the activity line is written from

    cdef void load_sessions(self)
    cdef void open_topic(self, uint64_t topic, TopicLine* line) noexcept nogil
    cdef void close_topic(self, uint64_t topic) noexcept nogil
    cdef void count_activity(self, Memory memory, uint64_t topic) noexcept nogil
    cdef void add(self, uint64_t* counter, uint64_t value) noexcept nogil
    cdef uint64_t end_position(self, TopicOrder* order) noexcept nogil
    cdef bint has_room(self, TopicOrder* order) noexcept nogil
    cdef void write_ordered(self, Memory memory, uint64_t topic, uint64_t broker) noexcept nogil
    cdef void write_window(self, Memory memory, uint64_t number) noexcept nogil

cdef struct Fresh:
    uint64_t topic
    uint64_t index

cdef class Scanner(Stage):
    cdef readonly OrderState state
    cdef Memory memory
    cdef Layout layout
    cdef Clock clock
    cdef list doorbell_objects
    cdef void** doorbells               # one a broker, then one for each broker's replication
    cdef bint replication_bells
    cdef readonly int number
    cdef uint64_t broker_mask           # the brokers that this scanner reads
    cdef ScanPlace* places              # topic * brokers + broker
    cdef uint64_t* seen_activity        # words, broker * words + word
    cdef uint64_t* pending              # topics to look at, broker * words + word
    cdef uint64_t activity_words
    cdef uint64_t pending_words
    cdef uint64_t next_look             # where the look before sleeping goes on
    cdef uint64_t* sessions_seen        # sessions_version of each broker
    cdef Fresh* fresh                   # entries written in this step
    cdef uint64_t fresh_count
    cdef uint64_t answered              # brokers that got results in this step
    cdef uint64_t result_line           # a result line not flushed yet, 0 none
    cdef int64_t next_gap_check
    cdef uint64_t in_step
    cdef uint64_t steps
    cdef uint64_t* touched_sessions
    cdef uint64_t touched_count
    cdef uint64_t* touched_topics

    cdef int64_t look_for_news(self, uint64_t broker) noexcept nogil
    cdef int64_t scan(self, uint64_t topic, uint64_t broker) noexcept nogil
    cdef bint classify(self, uint64_t topic, uint64_t broker, uint64_t slot, BatchHeader* header) noexcept nogil
    cdef bint classify_session(self, TopicOrder* order, uint64_t topic, uint64_t broker, uint64_t slot,
                               BatchHeader* header, Session* session) noexcept nogil
    cdef bint commit(self, TopicOrder* order, uint64_t topic, uint64_t broker, uint64_t slot,
                     BatchHeader* header, Session* session) noexcept nogil
    cdef void commit_held(self, TopicOrder* order, uint64_t topic, Session* session) noexcept nogil
    cdef void answer(self, uint64_t topic, uint64_t broker, uint64_t slot, uint64_t status,
                     uint64_t position) noexcept nogil
    cdef void claim(self, Session* session) noexcept nogil
    cdef void unclaim(self, Session* session) noexcept nogil
    cdef void touch(self, Session* session) noexcept nogil
    cdef void finish(self) noexcept nogil
    cdef void advance(self, uint64_t topic) noexcept nogil
    cdef void write_progress(self, uint64_t number) noexcept nogil
    cdef void put_progress(self, uint64_t number) noexcept nogil
    cdef int64_t look_at_sessions(self, uint64_t broker) noexcept nogil
    cdef void open_session(self, uint64_t number, uint64_t state) noexcept nogil
    cdef void fence_session(self, uint64_t number, uint64_t new_state) noexcept nogil
    cdef void fence_claimed(self, uint64_t number, uint64_t new_state) noexcept nogil
    cdef int64_t patience(self, Session* session) noexcept nogil
    cdef bint is_crowded(self, uint64_t topic, uint64_t broker) noexcept nogil
    cdef int64_t relieve(self, Session* session) noexcept nogil
    cdef bint is_gap(self, Session* session, int64_t now, int64_t elapsed) noexcept nogil
    cdef void drop_held(self, Session* session, uint64_t status) noexcept nogil
    cdef int64_t check_gaps(self) noexcept nogil
    cdef int64_t retry_stalled(self) noexcept nogil
    cdef bint is_answered(self, uint64_t topic, uint64_t broker, uint64_t slot, uint64_t generation) noexcept nogil
    cdef void open_place(self, uint64_t topic, uint64_t broker, uint64_t generation) noexcept nogil
