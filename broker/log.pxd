"""One broker's side of its topics' logs: ring slots, room in segments, and what may be reused."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from broker.head cimport HeadView
from broker.layout cimport BatchHeader, BrokerCounters, Layout, TopicLine
from broker.segments cimport SegmentPool
from sim.cxl.memory cimport Memory

cdef enum:
    DIRTY_WORDS = 256           # TOPICS_MAX topics, one bit each

cpdef enum ReserveStatus:
    RESERVED = 0
    RESERVE_RING_FULL = 1
    RESERVE_POOL_EMPTY = 2
    RESERVE_TOO_BIG = 3
    RESERVE_TOPIC_CLOSED = 4

cdef struct Slot:
    uint32_t first_segment      # segments that the batch touches
    uint32_t last_segment
    uint32_t bytes
    uint32_t messages
    uint64_t awaited            # a stream has not taken its result yet: the slot is kept for it

cdef struct OpenSegment:
    uint64_t used_to            # one past the sequence of the last batch in it, 0 none
    uint64_t leased             # leases by which attached clients may still write here
    uint64_t orphan             # no topic here holds it: its line's owner word, and when that is 0, ours without a topic
    uint64_t end_position       # messages below it are those that the segment holds
    uint32_t holder             # topic + 1 whose log has it; 0 none
    uint32_t next               # segment + 1 of the same log, 0 the last
    uint32_t previous
    uint32_t reserved

cdef struct TopicLog:
    # Invariant: released_to <= tail <= delegated <= head, and head - tail <= ring slots.
    uint64_t generation         # 0 while the topic is closed here
    uint64_t opened             # the generation of this log, kept while the topic is being deleted
    uint64_t filling            # reserved and not yet completed
    uint64_t order
    uint64_t replication_factor
    uint64_t message_bytes_max
    uint64_t head               # next slot sequence
    uint64_t tail               # slots below are resolved and free for reuse
    uint64_t delegated          # slots below are visible to the sequencer
    uint64_t written
    uint64_t written_bytes
    uint64_t cursor             # next free byte of the current run
    uint64_t end                # end of the current run
    uint64_t segment_count      # held
    uint64_t ends_known         # whether all segments' end_position is: until then none of them is given back
    uint64_t release_seen       # reclaimed frontier at the last look for segments to release
    uint64_t release_again      # some could not be released then for a reason that passes
    uint64_t give_up_run        # room is short: the rest of an open run that holds nothing goes back as well
    uint64_t first_held         # segment + 1, the head of the list of those held
    Slot* slots

cdef struct DirtySet:
    uint64_t words[256]

cdef void dirty_add(DirtySet* dirty, uint64_t topic) noexcept nogil
cdef uint64_t dirty_take(DirtySet* dirty, uint64_t word) noexcept nogil

cdef class BrokerLog:
    cdef readonly Layout layout
    cdef Memory memory                  # role: receiver
    cdef HeadView head                  # under the lock
    cdef HeadView topics_head           # of the thread that opens, closes and releases
    cdef readonly SegmentPool pool
    cdef readonly int broker
    cdef TopicLog* topics
    cdef uint64_t topic_count           # for __dealloc__: by then the collector may have taken `layout` away
    cdef OpenSegment* segments          # by segment number; of those that some topic holds
    cdef uint64_t* left                 # segments that an earlier process had, until their topics are open
    cdef uint64_t left_count
    cdef bint left_known
    cdef uint64_t dirty_words
    cdef uint64_t open_count            # topics that are open here
    cdef uint64_t share                 # segments that each of them can always have
    cdef uint64_t deficit               # how many segments they have less than that
    cdef uint64_t short_of              # topic + 1 below its share that was refused, until it gets something
    cdef uint64_t short_tries
    cdef DirtySet to_delegate
    cdef DirtySet to_release
    cdef BrokerCounters* counters
    cdef uint64_t eager                 # attached clients here: they wait for microseconds
    cdef uint64_t lock_words[16]
    cdef uint64_t pressure_sent
    cdef readonly uint64_t pressure_bytes
    cdef public uint64_t first_slot     # where the slots of a new topic's ring are counted from: 0 but in tests
    cdef uint64_t orphan_count          # segments that wait for proof that nobody needs them

    cdef void lock(self) noexcept nogil
    cdef void unlock(self) noexcept nogil
    cdef int reserve(self, uint64_t topic, uint64_t generation, uint64_t nbytes, uint64_t messages,
                     uint64_t* slot, uint64_t* offset) noexcept nogil
    cdef void note_segments(self, uint64_t topic, uint64_t first, uint64_t run, bint leased) noexcept nogil
    cdef void begin_segment(self, uint64_t segment, uint64_t end_position) noexcept nogil
    cdef void abandon_segment(self, uint64_t segment) noexcept nogil
    cdef int64_t free_orphans(self) noexcept nogil
    cdef bint is_gone(self, uint64_t key) noexcept nogil
    cdef bint is_viewed(self, uint64_t key) noexcept nogil
    cdef void drop_segment(self, uint64_t topic, uint64_t segment) noexcept nogil
    cdef void free_segment(self, uint64_t segment) noexcept nogil
    cdef uint64_t segment_of(self, uint64_t offset) noexcept nogil
    cdef int lease(self, uint64_t topic, uint64_t nbytes, uint64_t* offset, uint64_t* granted) noexcept nogil
    cdef void end_lease(self, uint64_t topic, uint64_t offset, uint64_t nbytes) noexcept nogil
    cdef int reserve_leased(self, uint64_t topic, uint64_t generation, uint64_t offset, uint64_t nbytes,
                            uint64_t messages, uint64_t* slot) noexcept nogil
    cdef void take_slot(self, uint64_t topic, uint64_t offset, uint64_t nbytes, uint64_t messages,
                        uint64_t* slot) noexcept nogil
    cdef bint extend(self, uint64_t topic, uint64_t nbytes) noexcept nogil
    cdef void complete(self, uint64_t topic, uint64_t slot, BatchHeader* header) noexcept nogil
    cdef void press(self, uint64_t topic, uint64_t nbytes) noexcept nogil
    cdef void hold(self, uint64_t topic, uint64_t segment) noexcept nogil
    cdef void unhold(self, uint64_t topic, uint64_t segment) noexcept nogil
    cdef void set_shares(self) noexcept nogil
    cdef bint may_take(self, uint64_t topic, uint64_t run) noexcept nogil
    cdef int64_t allocate(self, uint64_t topic, uint64_t run) noexcept nogil
    cdef void lack(self, uint64_t topic, uint64_t nbytes) noexcept nogil
    cdef int find_left(self) except -1
    cdef void adopt_segments(self, uint64_t topic, uint64_t generation) noexcept nogil
    cdef int open_topic(self, uint64_t topic, TopicLine* line) except -1
    cdef int resume_topic(self, uint64_t topic, TopicLine* line) except -1
    cdef bint know_segment_ends(self, uint64_t topic) noexcept nogil
    cdef bint still_serves(self, uint64_t topic, uint64_t generation) noexcept nogil
    cdef void wipe_ring(self, uint64_t topic, uint64_t first, uint64_t last) noexcept nogil
    cdef bint quiesce_topic(self, uint64_t topic) noexcept nogil
    cdef void close_topic(self, uint64_t topic) noexcept nogil
    cdef bint warm_one(self) noexcept nogil
