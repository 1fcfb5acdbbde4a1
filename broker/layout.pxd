"""The records in shared memory and where they lie. The only definition: sizes, dtypes, the printed map derive from it.

    superblock | brokers | offsets (brokers' and replicas' parts of the TInodes) | batch-header rings | sessions
    | cursors | attached-client slots | segment table | coherent area | statistics | banks | segments

What a head writes lies in a bank of its own: head line, directory, topics (the heads' part of the TInodes), results,
order indexes, progress of sessions, grants, groups, answers. The control word says whose bank counts: readers look at it before
and after (`broker/head.pyx`). So a head that was replaced may store whatever it wants: nobody reads it.

Every record is made of whole 64-byte lines (results: four to a line) with one writer role each; word 0 of a line is its
commit word, stored last. Words that many hosts change lie in the coherent area and nowhere else.
A tag is `(generation << 48) | (sequence + 1) % 2^48`: leftovers of another lap or of a deleted topic never match. A result's
tag has the low 40 bits alone, with its status above them. Sequences that agree in those are 2^40 slots apart, and the ring
was written over many times in between.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from sim.cxl.memory cimport AccessStatistics, Memory

cdef enum:
    NAME_BYTES = 128
    ADDRESS_BYTES = 128
    POOL_RING = 64              # grants and returns under way to and from the leader's pool
    TOPICS_MAX = 16384          # sizes what stages keep of every topic
    TOPIC_CHANGES = 24          # of the topic table, the last ones, in the directory line
    ATTACH_RING = 64            # descriptors and completions per attached client
    LEASE_RING = 16             # leases that an attached client may hold at once
    LOST_BROKER = 0xFFFF        # `broker` of an order entry whose messages no replica had at recovery
    ATTACH_PAGE = 4096          # who writes differs from page to page, so that mappings can be limited

cpdef enum ControlBits:
    CONTROL_BROKER = 0xFF       # the head
    CONTROL_BANK_SHIFT = 8
    CONTROL_SOURCE_SHIFT = 16   # bank + 1 of the last head that served, while the next one recovers; 0 none
    CONTROL_SERVING = 1 << 24
    CONTROL_EPOCH_SHIFT = 32

cpdef enum BatchFlag:
    BATCH_VOID = 1              # reserved and never filled: takes no position, frees its slot
    BATCH_FENCE = 2             # with BATCH_VOID: its session broke the contract and is fenced

cpdef enum AttachState:
    ATTACH_FREE = 0
    ATTACH_OPEN = 1
    ATTACH_FENCED = 2           # a bad descriptor, or its lease ended: nothing more is taken
    ATTACH_CLOSING = 3

cpdef enum ResultStatus:
    RESULT_NONE = 0
    RESULT_COMMITTED = 1
    RESULT_DUPLICATE = 2        # sequence below the session's expected one: already in the log
    RESULT_FENCED = 3           # its session is fenced
    RESULT_REFUSED = 4          # beyond the hold window or of a closed session: not in the log
    RESULT_VOID = 5
    RESULT_DAMAGED = 6          # the header contradicts the layout
    RESULT_UNDURABLE = 7        # an ack only: in the log, and not on every disk, because a replica failed

cpdef enum TopicState:
    TOPIC_FREE = 0
    TOPIC_CREATING = 1
    TOPIC_ACTIVE = 2
    TOPIC_DELETING = 3

cpdef enum SessionState:
    SESSION_FREE = 0
    SESSION_OPEN = 1
    SESSION_FENCED = 2
    SESSION_CLOSING = 3
    SESSION_CLOSED = 4

cpdef enum BrokerState:
    BROKER_ABSENT = 0
    BROKER_STARTING = 1
    BROKER_READY = 2
    BROKER_STOPPED = 3                      # no stage of its runs any more
    BROKER_STOPPING = 4                     # takes nothing new; its stages still run

cpdef enum CursorState:
    CURSOR_FREE = 0
    CURSOR_WANTED = 1           # waits for the reclaimer's grant
    CURSOR_LIVE = 2

cpdef enum GroupState:
    GROUP_FREE = 0
    GROUP_OPEN = 1              # keeps its place, and not the data
    GROUP_PROTECTED = 2         # keeps the data from its place on, even while nobody reads

cdef packed struct Superblock:              # 8 lines, written once by the creating broker
    uint64_t ready                          # stored last
    uint64_t magic
    uint64_t version
    uint64_t layout_hash
    uint64_t run_id
    uint64_t region_bytes
    uint64_t created_wall_ns
    uint64_t broker_count
    uint64_t topic_count_max
    uint64_t ring_slot_count
    uint64_t order_entry_count
    uint64_t session_count_max
    uint64_t cursor_count_max
    uint64_t attach_slot_count
    uint64_t segment_bytes
    uint64_t segment_count
    uint64_t message_bytes_max
    uint64_t batch_bytes_max
    uint64_t pool_strategy
    uint64_t owner_pid
    uint64_t owner_start
    uint64_t group_count_max
    uint64_t memory                         # number in MEMORIES of broker.config | eviction_period << 8
    uint64_t memory_seed                    # of garbage and of what caches do by themselves
    char boot_id[64]
    char name[128]
    char folder[128]

cdef packed struct ControlLine:             # coherent area: whoever becomes head changes it by compare-and-swap
    uint64_t control                        # epoch << 32 | CONTROL_SERVING | (source + 1) << 16 | bank << 8 | broker
    uint64_t incarnations                   # starts of brokers so far, by fetch-add
    uint64_t reserved[6]

cdef packed struct BankLine:                # coherent area: who may write into a bank
    uint64_t owner                          # incarnation << 8 | broker + 1; 0 free. Changed by compare-and-swap
    uint64_t reserved[7]

cdef packed struct HeadLine:                # writer: sequencer
    uint64_t epoch
    uint64_t broker
    uint64_t scanners
    uint64_t lock_mode
    uint64_t source_epoch                   # the epoch whose state was taken over
    uint64_t live_brokers                   # one bit a broker, for the choice of replicas; 0: all are taken to live
    uint64_t adopted                        # entries of that epoch which were written and not yet committed
    uint64_t served_ns

cdef packed struct DirectoryLine:           # writer: admin
    uint64_t topics_version                 # changes whenever a topic appears or goes
    uint64_t topic_generations              # last generation given out
    uint16_t changed[24]                    # the topic that version n changed, at n % TOPIC_CHANGES

cdef packed struct ActivityLine:            # one byte a topic: changes when the topic has news
    uint8_t counts[64]

cdef packed struct BrokerLine:              # writer: broker. Whether it lives is said by its lock on the region file
    uint64_t state
    uint64_t pid                            # this and the next are hints for people
    uint64_t start_time
    uint64_t heartbeat_ns
    uint64_t commit_watchers                # subscribers and replicas here that wait for commits
    uint64_t sessions_version               # changes whenever a session line of this broker changes
    uint64_t cursors_version                # changes whenever a cursor of this broker wants a grant
    uint64_t incarnation

cdef packed struct BrokerAddress:           # writer: broker, before it is ready
    char tcp_address[128]
    char unix_address[128]

cdef packed struct PoolWishLine:            # writer: broker
    uint64_t wanted                         # runs asked of the leader so far
    uint64_t run                            # segments in the run asked for last
    uint64_t returned                       # segments given back so far
    uint64_t pressure                       # requests to the reclaimer so far: this broker lacks segments
    uint64_t pressure_bytes                 # how much it lacks
    uint64_t pressure_topic                 # for which topic: generation << 16 | topic number
    uint64_t entitled                       # 1: the run is for a topic that has less than its share
    uint64_t reserved

cdef packed struct PoolGrantLine:           # writer: sequencer (leader)
    uint64_t granted                        # runs granted so far
    uint64_t granted_segments               # segments granted so far
    uint64_t taken                          # returns taken back so far
    uint64_t reserved[5]

cdef packed struct PoolRing:                # 8 lines
    uint64_t segments[64]

cdef packed struct TopicLine:               # writer: admin
    uint64_t state                          # generation << 8 | TopicState
    uint64_t order
    uint32_t ack
    uint32_t alteration                     # how often its options were changed: on disks the highest counts
    uint64_t replication_factor
    uint64_t retention_bytes
    uint64_t created_wall_ns
    uint64_t message_bytes_max
    uint64_t lease_ns                       # a session's gap may last this long

cdef packed struct TopicName:               # writer: admin
    char text[128]

cdef packed struct TopicOrderLine:          # writer: sequencer
    uint64_t committed_index                # order entries below it are complete, without a hole
    uint64_t committed_position             # messages below it are readable
    uint64_t epoch
    uint64_t committed_bytes
    uint64_t reserved[4]

cdef packed struct TopicReclaimLine:        # writer: reclaim
    uint64_t reclaimed_index                # order entries below it may be overwritten
    uint64_t reclaimed_position             # messages below it are gone
    uint64_t reclaimed_bytes
    uint64_t holder                         # who holds the frontier back: kind << 32 | number
    uint64_t holder_index
    uint64_t reserved[3]

cdef packed struct OffsetBrokerLine:        # writer: broker (delegation)
    uint64_t delegated                      # batch headers below this slot sequence are flushed and fenced
    uint64_t written                        # messages
    uint64_t written_bytes
    uint64_t written_address                # region offset of the last batch
    uint64_t log_start                      # region offset of the first segment
    uint64_t headers_start                  # region offset of the batch-header ring
    uint64_t generation                     # the topic generation that this line belongs to
    uint64_t reclaimed                      # slots below this sequence are free for reuse

cdef packed struct OffsetSequencerLine:     # writer: sequencer
    uint64_t scanned                        # slots below this sequence were looked at
    uint64_t ordered                        # messages
    uint64_t ordered_bytes
    uint64_t ordered_address                # region offset of the last ordered batch
    uint64_t counted_index                  # order entries below it are counted here
    uint64_t reserved[3]

cdef packed struct ReplicaLine:             # writer: replica
    uint64_t replicated_index               # order entries below it are durable here
    uint64_t replicated_position
    uint64_t replicated_bytes
    uint64_t generation
    uint64_t failed                         # errno of the last failure, 0 when healthy
    uint64_t reserved[3]

cdef packed struct BatchHeader:             # one line of a ring; writer: broker
    uint64_t complete                       # tag(generation, slot sequence), stored last
    uint64_t payload_offset
    uint32_t payload_bytes
    uint32_t message_count
    uint64_t client_id
    uint32_t session_slot
    uint32_t session_epoch
    uint64_t batch_sequence
    uint64_t received_wall_ns
    uint32_t flags
    uint32_t local_order                    # low bits of the broker-local message number

cdef packed struct BatchResult:             # 16 bytes, four to a line; writer: sequencer
    uint64_t state                          # tag(generation, slot sequence) with the status in bits 40..47
    uint64_t position                       # of the first message; for a duplicate, the frontier to wait for

cdef packed struct OrderEntry:              # writer: sequencer
    uint64_t commit                         # tag(generation, index), stored last
    uint64_t position                       # of the first message
    uint64_t payload_offset
    uint32_t payload_bytes
    uint32_t message_count
    uint64_t client_id
    uint64_t batch_sequence
    uint32_t session_epoch
    uint16_t broker
    uint16_t epoch                          # the sequencer's, low bits
    uint64_t wall_ns

cdef packed struct SessionLine:             # writer: the broker that opened it
    uint64_t state                          # generation << 8 | SessionState
    uint64_t client_id
    uint64_t session_epoch
    uint64_t topic                          # generation << 16 | topic number
    uint64_t ack
    uint64_t opened_ns
    uint64_t found_from                     # a recovered session's batches from it on, and below
    uint64_t found_end                      # this one, were in the log: they are there only if they are found there

cdef packed struct SessionProgressLine:     # writer: sequencer
    uint64_t state                          # generation << 8 | SessionState
    uint64_t expected                       # next batch sequence; all below are in the log
    uint64_t committed_messages
    uint64_t committed_position
    uint64_t predecessor_expected           # where the client's earlier session was fenced
    uint64_t predecessor_epoch
    uint64_t gap_since_ns
    uint64_t held

cdef packed struct SessionWindowLine:       # writer: sequencer, before SessionProgressLine; at order levels below 5
    uint64_t base                           # the batch expected then
    uint64_t generation                     # of the session
    uint64_t in_log[4]                      # bit n % 256: of those from base on, batch n is in the log
    uint64_t reserved[2]

cdef packed struct CursorLine:              # writer: the broker that serves the reader
    uint64_t state                          # request number << 8 | CursorState
    uint64_t topic                          # generation << 16 | topic number
    uint64_t index                          # first order entry that the reader still needs
    uint64_t position
    uint64_t pid                            # a hint for people
    uint64_t presence                       # an attached reader's: number of its process's lock on the region file
    uint64_t copies                         # 1: its reader checks, after each copy, that it was still kept
    uint64_t reserved

cdef packed struct CursorName:              # writer: as CursorLine; the group that reads, empty for a lone reader
    char text[64]

cdef packed struct CursorGrantLine:         # writer: reclaim
    uint64_t granted                        # request number that is granted
    uint64_t index                          # never below the reclaimed frontier
    uint64_t evicted                        # request number whose place is beyond the retention: it is to be let go
    uint64_t reserved[5]

cdef packed struct GroupLine:               # a consumer group of one topic; writer: admin, at the head
    uint64_t state                          # version << 8 | GroupState; the version counts changes of place
    uint64_t topic                          # generation << 16 | topic number
    uint64_t position                       # everything below it was committed by the group
    uint64_t index                          # order entry that holds the position
    uint64_t member                         # who reads now, 0 nobody
    uint64_t member_epoch                   # raised by each joining: a member with another one is fenced
    uint64_t lease_until_ns
    uint64_t committed_wall_ns

cdef packed struct GroupName:               # writer: as GroupLine, before it
    char text[64]

cdef packed struct GroupHolder:             # writer: as GroupLine; who the member is, for people
    char text[64]

cdef packed struct ReclaimAnswerLine:       # writer: reclaim, one a broker
    uint64_t answered                       # the last pressure request that was acted on
    uint64_t freed_bytes
    uint64_t holder                         # who holds the oldest data back, 0 nobody: HolderKind << 32 | number
    uint64_t holder_topic
    uint64_t reclaims                       # changes whenever a reclaimed frontier moved
    uint64_t reserved[3]

cpdef enum HolderKind:
    HOLDER_NONE = 0
    HOLDER_CURSOR = 1           # a live reader; number: its cursor
    HOLDER_PROTECTED = 2        # a protected consumer group; number: its place in the group table
    HOLDER_REPLICA = 3          # a replica that is behind; number: its broker
    HOLDER_RETENTION = 4        # a topic that never drops; number: the topic
    HOLDER_UNCOMMITTED = 5      # batches that wait for order; number: the topic
    HOLDER_OTHERS = 6           # other topics within their shares; number: the topic that lacks room

cdef packed struct AttachLine:              # writer: receiver (the attach stage)
    uint64_t state                          # generation << 8 | AttachState
    uint64_t topic                          # generation << 16 | topic number
    uint64_t granted                        # leases given so far
    uint64_t session_slot
    uint64_t session_epoch
    uint64_t client_id
    uint64_t taken                          # descriptors taken so far
    uint64_t owner                          # whose it is (Principal.number): nobody else may detach it

cdef packed struct Lease:                   # 16 bytes, LEASE_RING of them; writer: receiver
    uint64_t offset
    uint64_t nbytes

cdef enum:
    NO_LEASE = 0xFFFFFFFF       # an idle client wants none

cdef packed struct AttachClientLine:        # writer: client
    uint64_t heartbeat_ns
    uint64_t using_lease                    # the lease that it fills now; a subscriber's: entries below were viewed
    uint64_t retired                        # leases it is done with
    uint64_t wanted_bytes                   # smallest lease that is of use to it; NO_LEASE: none now
    uint64_t left                           # 1: it is gone, and writes no more
    uint64_t released_index                 # a subscriber's: order entries below it are no longer viewed
    uint64_t pid                            # a hint for people
    uint64_t presence                       # number of the lock on the region file that its process holds

cdef packed struct Descriptor:              # one line of the submission ring; writer: client
    uint64_t commit                         # tag(generation, submission number), stored last
    uint64_t payload_offset
    uint32_t payload_bytes
    uint32_t message_count
    uint64_t lease
    uint64_t batch_sequence
    uint64_t published_wall_ns
    uint64_t processor                      # on which the client runs, plus 1; 0: unknown
    uint64_t reserved

cdef packed struct SegmentLine:             # writer: the broker that owns the segment
    uint64_t owner                          # 0 free; else broker + 1 | topic << 16 | generation << 32
    uint64_t opened_ns
    uint64_t used_bytes
    uint64_t end_position                   # of a restored segment: messages below it are those that it holds
    uint64_t reserved[4]

cdef packed struct DoorbellLine:            # coherent area: a convenience of the simulation, not of the hardware
    uint64_t sequence
    uint64_t sleepers
    uint64_t reserved[6]

cdef packed struct LockLine:                # coherent area: a process-shared robust mutex
    uint64_t words[8]

cdef packed struct BrokerCounters:          # 3 lines; writer: broker
    uint64_t batches_received
    uint64_t messages_received
    uint64_t bytes_received
    uint64_t batches_refused
    uint64_t acks_sent
    uint64_t ring_full
    uint64_t pool_empty
    uint64_t delegation_flushes
    uint64_t segments_allocated
    uint64_t segments_released
    uint64_t segments_cold
    uint64_t pages_touched
    uint64_t batches_delivered
    uint64_t bytes_delivered
    uint64_t replicated_bytes
    uint64_t replication_syncs
    uint64_t sleeps
    uint64_t wakeups
    uint64_t loops
    uint64_t idle_loops
    uint64_t replication_errors
    uint64_t cpu_ns
    uint64_t reserved[2]

cdef packed struct SequencerCounters:       # 3 lines; writer: sequencer
    uint64_t batches_ordered
    uint64_t messages_ordered
    uint64_t duplicates
    uint64_t held_now
    uint64_t held_peak
    uint64_t fenced_sessions
    uint64_t refused
    uint64_t voids
    uint64_t lock_acquisitions
    uint64_t lock_contended
    uint64_t lock_wait_ns
    uint64_t lock_hold_ns
    uint64_t lock_hold_samples
    uint64_t order_full
    uint64_t damaged
    uint64_t first_order_ns
    uint64_t last_order_ns
    uint64_t reserved[7]

cdef packed struct Geometry:
    uint64_t broker_count
    uint64_t topic_count_max
    uint64_t ring_slot_count
    uint64_t order_entry_count
    uint64_t session_count_max
    uint64_t cursor_count_max
    uint64_t attach_slot_count
    uint64_t segment_bytes
    uint64_t segment_count
    uint64_t region_bytes
    uint64_t message_bytes_max
    uint64_t batch_bytes_max
    uint64_t pool_strategy
    uint64_t group_count_max
    uint64_t sessions_per_broker
    uint64_t cursors_per_broker
    uint64_t attach_per_broker
    uint64_t brokers
    uint64_t broker_stride
    uint64_t offsets
    uint64_t offset_stride
    uint64_t rings
    uint64_t sessions
    uint64_t cursors
    uint64_t attach
    uint64_t attach_stride
    uint64_t segment_table
    uint64_t coherent
    uint64_t statistics
    uint64_t bank_count
    uint64_t bank_stride
    uint64_t bank               # the one that what follows lies in
    uint64_t head
    uint64_t topics
    uint64_t topic_stride
    uint64_t answers
    uint64_t progress
    uint64_t windows
    uint64_t grantees
    uint64_t grants
    uint64_t groups
    uint64_t results
    uint64_t order
    uint64_t segments


cdef class Layout:
    cdef Geometry g
    cdef readonly object sections            # list of (name, offset, bytes)
    cdef uint64_t _bitmap_bytes
    cdef dict _places

    cdef uint64_t control(self) noexcept nogil
    cdef uint64_t bank_owner(self, uint64_t bank) noexcept nogil
    cdef uint64_t head_line(self) noexcept nogil
    cdef void use_bank(self, uint64_t bank) noexcept nogil
    cdef uint64_t directory(self) noexcept nogil
    cdef uint64_t sequencer_activity(self) noexcept nogil
    cdef uint64_t broker(self, uint64_t b) noexcept nogil
    cdef uint64_t broker_address(self, uint64_t b) noexcept nogil
    cdef uint64_t broker_activity(self, uint64_t b) noexcept nogil
    cdef uint64_t pool_wish(self, uint64_t b) noexcept nogil
    cdef uint64_t pool_grant(self, uint64_t b) noexcept nogil
    cdef uint64_t reclaim_answer(self, uint64_t b) noexcept nogil
    cdef uint64_t pool_grants(self, uint64_t b) noexcept nogil
    cdef uint64_t pool_returns(self, uint64_t b) noexcept nogil
    cdef uint64_t topic(self, uint64_t t) noexcept nogil
    cdef uint64_t topic_order(self, uint64_t t) noexcept nogil
    cdef uint64_t topic_reclaim(self, uint64_t t) noexcept nogil
    cdef uint64_t offset_broker(self, uint64_t t, uint64_t b) noexcept nogil
    cdef uint64_t offset_sequencer(self, uint64_t t, uint64_t b) noexcept nogil
    cdef uint64_t replica(self, uint64_t t, uint64_t b, uint64_t r) noexcept nogil
    cdef uint64_t ring(self, uint64_t t, uint64_t b, uint64_t slot) noexcept nogil
    cdef uint64_t result(self, uint64_t t, uint64_t b, uint64_t slot) noexcept nogil
    cdef uint64_t order_entry(self, uint64_t t, uint64_t index) noexcept nogil
    cdef uint64_t session(self, uint64_t s) noexcept nogil
    cdef uint64_t session_progress(self, uint64_t s) noexcept nogil
    cdef uint64_t session_window(self, uint64_t s) noexcept nogil
    cdef uint64_t cursor(self, uint64_t c) noexcept nogil
    cdef uint64_t cursor_name(self, uint64_t c) noexcept nogil
    cdef uint64_t cursor_grant(self, uint64_t c) noexcept nogil
    cdef uint64_t group(self, uint64_t number) noexcept nogil
    cdef uint64_t attach_line(self, uint64_t a) noexcept nogil
    cdef uint64_t attach_lease(self, uint64_t a, uint64_t number) noexcept nogil
    cdef uint64_t attach_completion(self, uint64_t a, uint64_t number) noexcept nogil
    cdef uint64_t attach_client(self, uint64_t a) noexcept nogil
    cdef uint64_t attach_statistics(self, uint64_t a) noexcept nogil
    cdef uint64_t attach_doorbell(self, uint64_t a) noexcept nogil
    cdef uint64_t attach_descriptor(self, uint64_t a, uint64_t number) noexcept nogil
    cdef uint64_t segment_line(self, uint64_t s) noexcept nogil
    cdef uint64_t segment(self, uint64_t s) noexcept nogil
    cdef uint64_t segment_owner(self, uint64_t segment) noexcept nogil
    cdef uint64_t grantee(self, uint64_t segment) noexcept nogil
    cdef uint64_t bitmap(self) noexcept nogil
    cdef uint64_t warm_bitmap(self) noexcept nogil
    cdef uint64_t bitmap_words(self) noexcept nogil
    cdef uint64_t doorbell(self, uint64_t b, uint64_t which) noexcept nogil
    cdef uint64_t order_lock(self) noexcept nogil       # of the head that has the bank
    cdef uint64_t role_statistics(self, uint64_t b, uint64_t role) noexcept nogil
    cdef uint64_t broker_counters(self, uint64_t b) noexcept nogil
    cdef uint64_t sequencer_counters(self) noexcept nogil

cdef inline uint64_t make_tag(uint64_t generation, uint64_t sequence) noexcept nogil:
    return generation << 48 | ((sequence + 1) & <uint64_t>0xFFFFFFFFFFFF)

cdef inline uint64_t result_tag(uint64_t generation, uint64_t sequence) noexcept nogil:
    return generation << 48 | ((sequence + 1) & <uint64_t>0xFFFFFFFFFF)
