"""One broker's side of its topics' logs: ring slots, room in segments, and what may be reused.

Receivers reserve, copy the payload, and complete; delegation makes the headers visible; release takes back resolved
slots and reclaimed segments. Everything here is this broker's own: other brokers learn of it only through memory.
"""


from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from broker.layout cimport (
    BatchHeader, BrokerCounters, CURSOR_FREE, CursorLine, Layout, OrderEntry, OffsetBrokerLine, SegmentLine, TOPIC_ACTIVE,
    TOPIC_DELETING, TopicLine, make_tag,
)
from broker.planted cimport PLANT_ENDS_UNKNOWN, PLANT_RING_OVERRUN, planted
from broker.segments cimport SegmentPool
from sim.cxl.memory cimport LINE_BYTES, Memory
from sim.cxl.primitives cimport (
    cxl_count, cxl_fetch_add, cxl_load_acquire, cxl_fetch_or, cxl_fetch_and, cxl_load_relaxed, cxl_mutex_init, cxl_mutex_lock,
    cxl_mutex_unlock, cxl_store_release, cxl_wall_ns,
)

cdef enum:
    SHARED_PART = 4             # one of so many segments is kept for topics that have less than their share
    SHORT_TRIES = 64            # refusals of others after which a topic that was refused is waited for no longer


cdef void dirty_add(DirtySet* dirty, uint64_t topic) noexcept nogil:
    cdef uint64_t bit = <uint64_t>1 << (topic % 64)
    if not cxl_load_acquire(&dirty.words[topic // 64]) & bit:
        cxl_fetch_or(&dirty.words[topic // 64], bit)


cdef uint64_t dirty_take(DirtySet* dirty, uint64_t word) noexcept nogil:
    if not cxl_load_relaxed(&dirty.words[word]):
        return 0
    return cxl_fetch_and(&dirty.words[word], 0)


cdef uint64_t kept_back(BrokerLog log) noexcept nogil:
    """Segments that are kept for topics that have less than their share: so many, and no more than the part for that."""
    return min(log.deficit, log.layout.g.segment_count // log.layout.g.broker_count // SHARED_PART)


cdef class BrokerLog:
    """The logs of all topics at one broker.

    `memory` is the receiver's door; `counters_offset` is where this broker's counters lie in the region.
    """

    def __cinit__(self):
        self.topics = NULL

    def __init__(self, Memory memory, Layout layout, SegmentPool pool, int broker):
        self.layout = layout
        self.memory = memory
        self.head = HeadView(memory, layout)
        self.topics_head = HeadView(memory, layout)
        self.pool = pool
        self.broker = broker
        self.topic_count = layout.g.topic_count_max
        self.topics = <TopicLog*>calloc(self.topic_count, sizeof(TopicLog))
        if self.topics == NULL:
            raise MemoryError
        self.dirty_words = (self.topic_count + 63) // 64
        self.segments = <OpenSegment*>calloc(layout.g.segment_count, sizeof(OpenSegment))
        if self.segments == NULL:
            raise MemoryError
        self.counters = <BrokerCounters*>memory.coherent_area(layout.broker_counters(broker))
        cxl_mutex_init(self.lock_words)

    def __dealloc__(self):
        cdef uint64_t t
        if self.topics != NULL:
            for t in range(self.topic_count):
                free(self.topics[t].slots)
            free(self.topics)
        free(self.left)
        free(self.segments)

    cdef void lock(self) noexcept nogil:
        cxl_mutex_lock(self.lock_words)

    cdef void unlock(self) noexcept nogil:
        cxl_mutex_unlock(self.lock_words)

    cdef int open_topic(self, uint64_t topic, TopicLine* line) except -1:
        """Begin the log of a topic that became active: its ring and its line are ours, and wiped first."""
        cdef TopicLog* log = &self.topics[topic]
        cdef OffsetBrokerLine offset
        cdef uint64_t at = self.layout.offset_broker(topic, self.broker), generation = line.state >> 8
        if log.slots == NULL:
            log.slots = <Slot*>calloc(self.layout.g.ring_slot_count, sizeof(Slot))
            if log.slots == NULL:
                raise MemoryError
        self.find_left()
        log.head = log.tail = log.delegated = self.first_slot
        log.written = log.written_bytes = 0
        log.cursor = log.end = 0
        log.order = line.order
        log.replication_factor = line.replication_factor
        log.message_bytes_max = line.message_bytes_max
        log.ends_known = 1
        if self.still_serves(topic, generation):
            return self.resume_topic(topic, line)
        self.wipe_ring(topic, self.first_slot, self.first_slot + self.layout.g.ring_slot_count)
        # The whole line: our cache may still have it with the frontiers of an earlier topic.
        memset(&offset, 0, sizeof(offset))
        offset.delegated = offset.reclaimed = self.first_slot
        offset.headers_start = self.layout.ring(topic, self.broker, 0)
        self.memory.write_line(at, &offset)
        self.memory.flush(at, 64)
        # Whoever sees the generation must see an empty ring.
        self.memory.fence()
        self.memory.store(at + 48, generation)
        self.memory.flush(at, 64)
        self.memory.fence()
        self.adopt_segments(topic, generation)
        log.opened = generation
        cxl_store_release(&log.generation, generation)
        self.lock()
        self.set_shares()
        self.unlock()
        return 0

    cdef bint still_serves(self, uint64_t topic, uint64_t generation) noexcept nogil:
        """Whether an earlier process of this broker served the topic, and ended without a word."""
        self.memory.invalidate(self.layout.offset_broker(topic, self.broker), 64)
        return self.memory.load(self.layout.offset_broker(topic, self.broker) + 48) == generation

    cdef int resume_topic(self, uint64_t topic, TopicLine* line) except -1:
        """Go on where an earlier process of this broker stood.

        What it delegated is ordered, or will be; what it only received is gone: its publishers send it again.
        """
        cdef TopicLog* log = &self.topics[topic]
        cdef uint64_t at = self.layout.offset_broker(topic, self.broker), generation = line.state >> 8, slot, segment
        cdef BatchHeader header
        cdef Slot* record
        log.delegated = log.head = self.memory.load(at)
        log.tail = self.memory.load(at + 56)
        log.written = self.memory.load(at + 8)
        log.written_bytes = self.memory.load(at + 16)
        # What was complete and not delegated has the tags that the next batches will have.
        self.wipe_ring(topic, log.head, log.tail + self.layout.g.ring_slot_count)
        self.adopt_segments(topic, generation)
        for slot in range(log.tail, log.head):
            self.memory.read_line(self.layout.ring(topic, self.broker, slot), &header)
            record = &log.slots[slot & (self.layout.g.ring_slot_count - 1)]
            record.first_segment, record.last_segment = 1, 0
            record.messages = header.message_count
            record.awaited = 0
            if header.payload_bytes and header.payload_offset >= self.layout.g.segments:
                record.first_segment = self.segment_of(header.payload_offset)
                record.last_segment = min(self.segment_of(header.payload_offset + header.payload_bytes - 1),
                                          self.layout.g.segment_count - 1)
            for segment in range(record.first_segment, record.last_segment + 1):
                self.segments[segment].used_to = slot + 1
        self.know_segment_ends(topic)
        log.release_again = 1
        dirty_add(&self.to_release, topic)
        log.opened = generation
        cxl_store_release(&log.generation, generation)
        self.lock()
        self.set_shares()
        self.unlock()
        return 0

    cdef bint know_segment_ends(self, uint64_t topic) noexcept nogil:
        """How far the messages in our segments reach, from the order index: what is not released yet is added later.

        False when the head fell meanwhile. Then nobody knows, no segment is given back, and the next look asks again.
        """
        cdef TopicLog* log = &self.topics[topic]
        cdef uint64_t index, segment, first, last
        cdef OrderEntry entry
        cdef bint done = False
        log.ends_known = planted(PLANT_ENDS_UNKNOWN)
        if log.ends_known:
            return True
        while not done and self.topics_head.begin():
            done = True
            index = self.memory.load(self.topics_head.layout.topic_reclaim(topic))
            while index < self.memory.load(self.topics_head.layout.topic_order(topic)):
                self.memory.invalidate(self.topics_head.layout.order_entry(topic, index), 64)
                self.memory.read_line(self.topics_head.layout.order_entry(topic, index), &entry)
                if not self.topics_head.same():
                    done = False
                    break
                index += 1
                if entry.broker != <uint64_t>self.broker or entry.payload_bytes == 0:
                    continue
                first = self.segment_of(entry.payload_offset)
                last = self.segment_of(entry.payload_offset + entry.payload_bytes - 1)
                for segment in range(first, min(last + 1, self.layout.g.segment_count)):
                    self.segments[segment].end_position = max(self.segments[segment].end_position,
                                                              entry.position + entry.message_count)
        if done:
            log.ends_known = log.release_again = 1
            dirty_add(&self.to_release, topic)
        return done

    # ---- segments that no topic holds -----------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Give back the segments that an earlier process of this broker had, and that nobody needs; how many.

        Called when all topics are known and nothing is taken yet. What a client may still write into, or view, comes back
        later. -1 while no head says which topics there are: ask again.
        """
        cdef uint64_t segment
        cdef int64_t swept = 0
        if not self.topics_head.begin():
            return -1
        self.lock()
        for segment in range(self.layout.g.segment_count):
            if (not self.segments[segment].orphan and not self.segments[segment].holder
                    and self.pool.owns(segment)):
                self.abandon_segment(segment)
        self.unlock()
        if not self.topics_head.same():
            return -1                       # what the pool says of the rest is what another head granted
        with nogil:
            swept = self.free_orphans()
        return swept

    cdef void abandon_segment(self, uint64_t segment) noexcept nogil:
        """No topic here holds this segment of ours any more: it waits for proof that nobody needs it. The lock is held."""
        cdef uint64_t owner
        if self.segments[segment].orphan == 0:
            owner = self.memory.load(self.layout.segment_line(segment))
            self.segments[segment].orphan = owner if owner else <uint64_t>self.broker + 1
            self.orphan_count += 1

    cdef int64_t free_orphans(self) noexcept nogil:
        """Give back the segments of topics that are gone: when the head says so, and no client writes there or views what it
        was given; how many."""
        cdef uint64_t segment, key, judged = <uint64_t>-1
        cdef bint gone = False
        cdef int64_t freed = 0
        if self.orphan_count == 0 or not self.topics_head.begin():
            return 0
        self.lock()
        for segment in range(self.layout.g.segment_count):
            if not self.segments[segment].orphan or self.segments[segment].leased:
                continue
            key = self.segments[segment].orphan >> 16
            if key != judged:
                gone = self.is_gone(key) and not self.is_viewed(key) and self.topics_head.same()
                judged = key
            if gone:
                self.segments[segment].orphan = 0
                self.orphan_count -= 1
                self.free_segment(segment)
                freed += 1
        self.unlock()
        return freed

    cdef bint is_gone(self, uint64_t key) noexcept nogil:
        """Whether the head's table says that the topic (generation << 16 | number) is no more."""
        cdef uint64_t topic = key & 0xFFFF, generation = key >> 16, state
        if generation == 0 or topic >= self.topic_count:
            return True                     # taken, and not given to any topic yet
        self.memory.invalidate(self.topics_head.layout.topic(topic), 64)
        state = self.memory.load(self.topics_head.layout.topic(topic))
        if state == 0:
            return False                    # the place had a topic: a line that knows of none says nothing
        return state >> 8 != generation or (state & 0xFF != TOPIC_ACTIVE and state & 0xFF != TOPIC_DELETING)

    cdef bint is_viewed(self, uint64_t key) noexcept nogil:
        """Whether an attached reader of the topic may still view its segments. Others copy, and look afterwards."""
        cdef uint64_t cursor
        cdef CursorLine line
        for cursor in range(self.layout.g.cursor_count_max):
            self.memory.invalidate(self.layout.cursor(cursor), 64)
            self.memory.read_line(self.layout.cursor(cursor), &line)
            if line.state & 0xFF != CURSOR_FREE and line.topic == key and line.presence:
                return True
        return False

    cdef int find_left(self) except -1:
        """Know, once, the segments that an earlier process of this broker had, or a recovery filled: each topic that opens
        looks through these, and not through the whole table."""
        cdef uint64_t segment
        if self.left_known:
            return 0
        self.left_known = True
        self.left = <uint64_t*>calloc(self.layout.g.segment_count, 8)
        if self.left == NULL:
            raise MemoryError
        for segment in range(self.layout.g.segment_count):
            if self.memory.load(self.layout.segment_line(segment)) & 0xFFFF == <uint64_t>self.broker + 1:
                self.left[self.left_count] = segment
                self.left_count += 1
        return 0

    cdef void adopt_segments(self, uint64_t topic, uint64_t generation) noexcept nogil:
        """Segments of a restored topic are ours when the segment table says so."""
        cdef uint64_t i = 0, segment, owner = (self.broker + 1) | topic << 16 | generation << 32
        cdef SegmentLine line
        while i < self.left_count:
            segment = self.left[i]
            if self.memory.load(self.layout.segment_line(segment)) != owner:
                i += 1
                continue
            self.left_count -= 1
            self.left[i] = self.left[self.left_count]
            self.memory.read_line(self.layout.segment_line(segment), &line)
            self.begin_segment(segment, line.end_position)
            self.hold(topic, segment)

    # ---- who holds what, and how much of it each topic may ------------------------------------------------------------

    cdef void hold(self, uint64_t topic, uint64_t segment) noexcept nogil:
        """The segment is one of this topic's log from now on."""
        cdef TopicLog* log = &self.topics[topic]
        cdef OpenSegment* open = &self.segments[segment]
        if log.segment_count < self.share and log.opened:
            self.deficit -= 1
        open.holder = topic + 1
        open.previous = 0
        open.next = log.first_held
        if log.first_held:
            self.segments[log.first_held - 1].previous = segment + 1
        log.first_held = segment + 1
        log.segment_count += 1

    cdef void unhold(self, uint64_t topic, uint64_t segment) noexcept nogil:
        cdef TopicLog* log = &self.topics[topic]
        cdef OpenSegment* open = &self.segments[segment]
        if open.previous:
            self.segments[open.previous - 1].next = open.next
        else:
            log.first_held = open.next
        if open.next:
            self.segments[open.next - 1].previous = open.previous
        open.holder = open.next = open.previous = 0
        log.segment_count -= 1
        if log.segment_count < self.share and log.opened:
            self.deficit += 1

    cdef void set_shares(self) noexcept nogil:
        """What each open topic can always have: an equal part of a quarter of the segments that are ours to take.

        The lock is held.
        """
        cdef uint64_t topic, ours = self.layout.g.segment_count // self.layout.g.broker_count
        self.open_count = self.deficit = 0
        for topic in range(self.topic_count):
            self.open_count += self.topics[topic].opened != 0
        self.share = max(ours // SHARED_PART // max(self.open_count, <uint64_t>1), <uint64_t>1)
        for topic in range(self.topic_count):
            if self.topics[topic].opened:
                self.deficit += self.share - min(self.share, self.topics[topic].segment_count)

    cdef bint may_take(self, uint64_t topic, uint64_t run) noexcept nogil:
        """Whether a topic that has its share leaves the others theirs. A topic that has nothing may take what it needs.

        Invariant: what is free is enough for what the topics of this broker have less than their share, or only a topic
        below its share takes of it.
        """
        cdef TopicLog* log = &self.topics[topic]
        if log.segment_count == 0 or log.segment_count + run <= self.share:
            return True
        return self.pool.has_left(run, kept_back(self)) and (not self.short_of or self.short_of == topic + 1)

    cdef int64_t allocate(self, uint64_t topic, uint64_t run) noexcept nogil:
        """First segment of a free run that the topic may take, or -1."""
        cdef TopicLog* log = &self.topics[topic]
        cdef int64_t first = -1
        if self.may_take(topic, run):
            self.pool.entitled = log.segment_count + run <= self.share or log.segment_count == 0 or self.deficit == 0
            first = self.pool.allocate(run)
            if first >= 0 and self.short_of == topic + 1:
                self.short_of = 0
            elif first < 0 and self.short_of == 0 and (
                    log.segment_count == 0 or log.segment_count + run <= self.share):
                self.short_of = topic + 1
                self.short_tries = 0
        if first < 0 and self.short_of:
            self.short_tries += 1
            if self.short_tries > SHORT_TRIES:
                self.short_of = 0               # whoever wanted it may have gone
        return first

    cdef void lack(self, uint64_t topic, uint64_t nbytes) noexcept nogil:
        """There is no room: ask for some, and take back what lies open and holds nothing."""
        cdef uint64_t other
        cdef TopicLog* log
        cxl_count(&self.counters.pool_empty, 1)
        if not self.pool.is_asking():
            self.press(topic, nbytes)
        for other in range(self.topic_count):
            log = &self.topics[other]
            if log.end and log.opened and (other == topic or log.head == cxl_load_acquire(&log.tail)):
                log.give_up_run = log.release_again = 1
                dirty_add(&self.to_release, other)
        self.topics[topic].release_again = 1
        dirty_add(&self.to_release, topic)

    # ---- rings -------------------------------------------------------------------------------------------------------------

    cdef void wipe_ring(self, uint64_t topic, uint64_t first, uint64_t last) noexcept nogil:
        """Make the slots of these sequences empty: nothing in them is taken for complete."""
        cdef uint64_t slot
        for slot in range(first, last):
            self.memory.store(self.layout.ring(topic, self.broker, slot), 0)
            self.memory.flush(self.layout.ring(topic, self.broker, slot), 64)
        self.memory.fence()

    cdef bint quiesce_topic(self, uint64_t topic) noexcept nogil:
        """Take no more batches; True once none is being filled, which is then told to the head."""
        cdef TopicLog* log = &self.topics[topic]
        cdef uint64_t at = self.layout.offset_broker(topic, self.broker)
        self.lock()
        cxl_store_release(&log.generation, 0)
        self.unlock()
        if cxl_load_acquire(&log.filling):
            return False
        self.memory.store(at + 48, 0)
        self.memory.flush(at, 64)
        self.memory.fence()
        return True

    cdef void close_topic(self, uint64_t topic) noexcept nogil:
        """Give every segment back that nobody needs. All brokers have quiesced: none reads or fills them any more."""
        cdef TopicLog* log = &self.topics[topic]
        cdef uint64_t segment
        self.lock()
        while log.first_held:
            segment = log.first_held - 1
            self.unhold(topic, segment)
            self.abandon_segment(segment)
        log.cursor = log.end = 0
        log.opened = 0
        self.set_shares()
        self.unlock()
        self.free_orphans()

    cdef void press(self, uint64_t topic, uint64_t nbytes) noexcept nogil:
        """Ask the reclaimer for room for a topic, once until it has answered. It is told what the topic holds here:
        what is not committed yet is seen nowhere else."""
        cdef uint64_t wish = self.layout.pool_wish(self.broker), answer
        self.pressure_bytes = nbytes
        if not self.head.begin():
            return                          # nobody reclaims now
        answer = self.head.layout.reclaim_answer(self.broker)
        self.memory.invalidate(answer, 64)
        if self.memory.load(answer) == self.pressure_sent:
            self.pressure_sent += 1
            self.memory.store(wish + 40,
                              self.topics[topic].segment_count << 32 | self.topics[topic].opened << 16 | topic)
            self.memory.store(wish + 32, nbytes)
            self.memory.store(wish + 24, self.pressure_sent)
            self.memory.flush(wish, 64)
            self.memory.fence()

    cdef uint64_t segment_of(self, uint64_t offset) noexcept nogil:
        return (offset - self.layout.g.segments) // self.layout.g.segment_bytes

    cdef bint extend(self, uint64_t topic, uint64_t nbytes) noexcept nogil:
        """Make room for `nbytes`: the segments right behind the current run when free, a new run otherwise."""
        cdef TopicLog* log = &self.topics[topic]
        cdef uint64_t size = self.layout.g.segment_bytes, run, next_segment
        cdef int64_t first
        if log.end:
            run = (log.cursor + nbytes - log.end + size - 1) // size
            next_segment = self.segment_of(log.end)
            if self.may_take(topic, run) and self.pool.claim(next_segment, run):
                log.end += run * size
                self.note_segments(topic, next_segment, run, False)
                return True
        run = (nbytes + size - 1) // size
        first = self.allocate(topic, run)
        if first < 0:
            return False
        log.release_again = 1           # the old run is no longer being filled
        log.cursor = self.layout.segment(first)
        log.end = log.cursor + run * size
        self.note_segments(topic, first, run, False)
        return True

    cdef void note_segments(self, uint64_t topic, uint64_t first, uint64_t run, bint leased) noexcept nogil:
        """Write down that these segments are ours."""
        cdef TopicLog* log = &self.topics[topic]
        cdef SegmentLine line
        cdef uint64_t segment
        memset(&line, 0, sizeof(line))
        line.owner = (self.broker + 1) | topic << 16 | log.generation << 32
        line.opened_ns = cxl_wall_ns()
        for segment in range(first, first + run):
            self.begin_segment(segment, 0)
            self.segments[segment].leased += leased
            self.hold(topic, segment)
            self.memory.write_line(self.layout.segment_line(segment), &line)
            self.memory.flush(self.layout.segment_line(segment), 64)
        if self.pool.is_low(kept_back(self)):
            self.press(topic, run * self.layout.g.segment_bytes)
        cxl_count(&self.counters.segments_allocated, run)
        self.counters.segments_cold = self.pool.cold

    cdef void begin_segment(self, uint64_t segment, uint64_t end_position) noexcept nogil:
        """A topic here holds the segment from now on. Its leases are counted on: a client whose end nobody wrote down may have
        one of before."""
        self.segments[segment].used_to = 0
        self.segments[segment].end_position = end_position
        if self.segments[segment].orphan:
            self.segments[segment].orphan = 0
            self.orphan_count -= 1

    cdef void drop_segment(self, uint64_t topic, uint64_t segment) noexcept nogil:
        """Give a topic's segment back to the pool. The lock is held."""
        self.unhold(topic, segment)
        self.free_segment(segment)

    cdef void free_segment(self, uint64_t segment) noexcept nogil:
        cdef SegmentLine line
        memset(&line, 0, sizeof(line))
        self.memory.write_line(self.layout.segment_line(segment), &line)
        self.memory.flush(self.layout.segment_line(segment), 64)
        # The next owner writes this line too: ours is in memory before he can take the segment.
        self.memory.fence()
        self.pool.release(segment)
        cxl_count(&self.counters.segments_released, 1)

    cdef int lease(self, uint64_t topic, uint64_t nbytes, uint64_t* offset, uint64_t* granted) noexcept nogil:
        """Set whole segments aside for an attached client; a `ReserveStatus`."""
        cdef uint64_t size = self.layout.g.segment_bytes, run = (nbytes + size - 1) // size
        cdef int64_t first
        cdef int status = RESERVED
        self.lock()
        if self.topics[topic].generation == 0:
            status = RESERVE_TOPIC_CLOSED
        else:
            first = self.allocate(topic, run)
            if first >= 0:
                offset[0] = self.layout.segment(first)
                granted[0] = run * size
                self.note_segments(topic, first, run, True)
            else:
                status = RESERVE_POOL_EMPTY
                self.lack(topic, nbytes)
        self.unlock()
        return status

    cdef void end_lease(self, uint64_t topic, uint64_t offset, uint64_t nbytes) noexcept nogil:
        """The client writes there no more: what was not used is a hole that goes with the segment."""
        cdef uint64_t first = self.segment_of(offset), segment
        self.lock()
        for segment in range(first, first + nbytes // self.layout.g.segment_bytes):
            if self.segments[segment].leased:
                self.segments[segment].leased -= 1
        self.topics[topic].release_again = 1
        self.unlock()
        self.free_orphans()
        dirty_add(&self.to_release, topic)

    cdef int reserve_leased(self, uint64_t topic, uint64_t generation, uint64_t offset, uint64_t nbytes,
                            uint64_t messages, uint64_t* slot) noexcept nogil:
        """Reserve a ring slot for a payload that lies in a lease already; a `ReserveStatus`."""
        cdef TopicLog* log = &self.topics[topic]
        cdef int status = RESERVED
        self.lock()
        # Looked at under the lock: deleted and made again since the caller looked, it is another topic, and a slot whose
        # result no stream of that one takes would block its ring.
        if log.generation == 0 or log.generation != generation:
            status = RESERVE_TOPIC_CLOSED
        elif log.head - cxl_load_acquire(&log.tail) >= self.layout.g.ring_slot_count + (
                4 if planted(PLANT_RING_OVERRUN) else 0):
            cxl_count(&self.counters.ring_full, 1)
            status = RESERVE_RING_FULL
        else:
            self.take_slot(topic, offset, nbytes, messages, slot)
        self.unlock()
        return status

    cdef void take_slot(self, uint64_t topic, uint64_t offset, uint64_t nbytes, uint64_t messages,
                        uint64_t* slot) noexcept nogil:
        cdef TopicLog* log = &self.topics[topic]
        cdef Slot* record = &log.slots[log.head & (self.layout.g.ring_slot_count - 1)]
        cdef uint64_t segment
        slot[0] = log.head
        if nbytes:
            record.first_segment = self.segment_of(offset)
            record.last_segment = self.segment_of(offset + nbytes - 1)
        else:
            record.first_segment = 1            # touches none
            record.last_segment = 0
        record.bytes = nbytes
        record.messages = messages
        cxl_store_release(&record.awaited, messages > 0)
        for segment in range(record.first_segment, record.last_segment + 1):
            self.segments[segment].used_to = log.head + 1
        log.written += messages
        log.written_bytes += nbytes
        cxl_fetch_add(&log.filling, 1)
        cxl_store_release(&log.head, log.head + 1)

    cdef int reserve(self, uint64_t topic, uint64_t generation, uint64_t nbytes, uint64_t messages,
                     uint64_t* slot, uint64_t* offset) noexcept nogil:
        """Reserve a ring slot and room for a payload; a `ReserveStatus`. What is reserved must be completed."""
        cdef TopicLog* log = &self.topics[topic]
        cdef uint64_t need = (nbytes + LINE_BYTES - 1) // LINE_BYTES * LINE_BYTES
        cdef int status = RESERVED
        if nbytes == 0 or nbytes > self.layout.g.batch_bytes_max:
            return RESERVE_TOO_BIG
        self.lock()
        # Looked at under the lock: deleted and made again since the caller looked, it is another topic, and a slot whose
        # result no stream of that one takes would block its ring.
        if log.generation == 0 or log.generation != generation:
            status = RESERVE_TOPIC_CLOSED
        elif log.head - cxl_load_acquire(&log.tail) >= self.layout.g.ring_slot_count + (
                4 if planted(PLANT_RING_OVERRUN) else 0):
            cxl_count(&self.counters.ring_full, 1)
            status = RESERVE_RING_FULL
        elif log.cursor + need > log.end and not self.extend(topic, need):
            self.lack(topic, need)
            status = RESERVE_POOL_EMPTY
        else:
            offset[0] = log.cursor
            log.cursor += need
            self.take_slot(topic, offset[0], need, messages, slot)
        self.unlock()
        return status

    cdef void complete(self, uint64_t topic, uint64_t slot, BatchHeader* header) noexcept nogil:
        """Publish the header of a reserved slot inside this host. The payload is already fenced."""
        header.complete = make_tag(self.topics[topic].opened, slot)
        self.memory.write_line(self.layout.ring(topic, self.broker, slot), header)
        cxl_fetch_add(&self.topics[topic].filling, <uint64_t>-1)
        dirty_add(&self.to_delegate, topic)
        cxl_count(&self.counters.batches_received, 1)
        cxl_count(&self.counters.messages_received, header.message_count)
        cxl_count(&self.counters.bytes_received, header.payload_bytes)

    cdef bint warm_one(self) noexcept nogil:
        """Make one cold free segment's pages present, ahead of use; False when none is left or tmpfs is full."""
        cdef int64_t segment
        cdef int result
        self.lock()
        segment = self.pool.take_cold()
        self.unlock()
        if segment < 0:
            return False
        result = self.memory.touch(self.layout.segment(segment), self.layout.g.segment_bytes)
        self.lock()
        self.pool.give_warm(segment, result == 0)
        self.unlock()
        cxl_count(&self.counters.pages_touched, self.layout.g.segment_bytes // 4096)
        return result == 0

    def warm_segment(self) -> bool:
        """Touch one cold free segment ahead of use, without the GIL; False when none is left."""
        cdef bint more
        with nogil:
            more = self.warm_one()
        return more

    def map_segment(self, uint64_t segment) -> bool:
        """Map a segment that somebody has touched into this process as well; False while it is cold."""
        cdef int result = -1
        with nogil:
            if self.pool.is_warm(segment):
                result = self.memory.touch(self.layout.segment(segment), self.layout.g.segment_bytes)
        return result == 0

    def note_cpu(self, uint64_t nanoseconds) -> None:
        """Keep this process's CPU time among its counters."""
        self.counters.cpu_ns = nanoseconds

    def note_delivered(self, uint64_t nbytes) -> None:
        """Count a frame that a subscriber was given."""
        cxl_count(&self.counters.batches_delivered, 1)
        cxl_count(&self.counters.bytes_delivered, nbytes)

    def topic_state(self, uint64_t topic) -> dict:
        """This broker's view of a topic's log, for tests and tools."""
        cdef TopicLog* log = &self.topics[topic]
        return {"generation": log.generation, "head": log.head, "tail": log.tail, "delegated": log.delegated,
                "written": log.written, "segments": log.segment_count, "ends_known": bool(log.ends_known)}
