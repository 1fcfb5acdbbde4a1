"""The sequencer: one scanner per broker gives every batch its place in the one total order.

A scanner follows a broker's delegated frontier, classifies each batch by its session, takes an order number (under
the global lock, or by one fetch-add), writes the order entry and the batch's result, and fences. Only then does the
committed frontier of the topic move, over a contiguous prefix: readers and acks follow the frontier, so a hole left by
a crash is never passed. Held batches take no number and keep their ring slot.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from broker.crash cimport (
    CRASH_BEFORE_NUMBER, CRASH_COMMITTED, CRASH_ENTRY_WRITTEN, CRASH_MID_ENTRY, CRASH_NUMBER_TAKEN,
    CRASH_PROGRESS_WRITTEN, crash_point, crash_point_armed,
)
from broker.doorbell cimport Doorbell
from broker.head cimport make_control
from broker.layout cimport (
    BATCH_FENCE, BATCH_VOID, BatchHeader, CONTROL_SERVING, Layout, OrderEntry, RESULT_COMMITTED, RESULT_DAMAGED, RESULT_DUPLICATE, RESULT_FENCED,
    RESULT_REFUSED, RESULT_VOID, SESSION_CLOSED, SESSION_CLOSING, SESSION_FENCED, SESSION_FREE, SESSION_OPEN,
    OffsetSequencerLine, SequencerCounters, SessionLine, SessionProgressLine, SessionWindowLine, TopicLine, make_tag,
    result_tag,
)
from broker.order_lock cimport LOCK_ATOMIC, OrderLock
from broker.placement cimport live_brokers
from broker.planted cimport (
    PLANT_DONE_BEFORE_FENCE, PLANT_DUPLICATE_TWICE, PLANT_GAP_SKIPPED, PLANT_INDEX_OVERRUN, PLANT_ORDERED_OVERWRITTEN,
    PLANT_SKIPPED_NUMBERED, PLANT_VOID_BLOCKS, planted,
)
from broker.stages.stage cimport LOOK_TOPICS, Stage
from broker.wire cimport MESSAGE_HEADER_BYTES
from sim.cxl.clock cimport Clock
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport (
    cxl_compare_and_swap, cxl_count_trailing_zeros, cxl_fetch_add, cxl_fetch_and, cxl_fetch_or, cxl_full_fence,
    cxl_load_acquire, cxl_load_relaxed, cxl_pause, cxl_store_release, cxl_yield,
)

cdef enum:
    STEP_BATCHES = 64               # a scanner looks at so many batches of one topic and broker at a time
    GAP_CHECK_NS = 1000000
    RELIEF_NS = 20000000            # a session that is stuck for longer (or half its lease) may not fill up rings

SESSION_WINDOW = WINDOW             # for Python
cdef uint64_t RESULT_STATUS = <uint64_t>0xFF << 40
cdef uint64_t POSITION_MASK = (<uint64_t>1 << POSITION_BITS) - 1


cdef uint64_t place_of(uint64_t word, uint64_t committed_position, uint64_t committed_index, uint64_t* index) noexcept nogil:
    """The position that an assigned word stands for, and its index: each is counted from a committed one before it.

    A word is a plain sum, so its low bits are those of the position, and what the position has above them is added to the
    index. What is assigned and not committed is at most 32,768 entries of less than 2^32 messages: 2^47.
    """
    cdef uint64_t position = committed_position + ((word - committed_position) & POSITION_MASK)
    index[0] = committed_index + <uint16_t>((word >> POSITION_BITS) - (position >> POSITION_BITS) - committed_index)
    return position


cdef bint in_log(Session* session, uint64_t sequence) noexcept nogil:
    return session.in_log[sequence % WINDOW // 64] >> (sequence % 64) & 1


cdef void note_in_log(Session* session, uint64_t sequence) noexcept nogil:
    """Below order 5: a batch of the window is in the log; `expected` moves over all that are."""
    session.in_log[sequence % WINDOW // 64] |= <uint64_t>1 << (sequence % 64)
    while in_log(session, session.expected):
        session.in_log[session.expected % WINDOW // 64] &= ~(<uint64_t>1 << (session.expected % 64))
        session.expected += 1


cdef class OrderState:
    """What the scanners of one sequencer share: counters of order, sessions, the lock.

    `memory` is the sequencer's door; `layout` has the bank that this head writes. All of it can be rebuilt from memory;
    nothing here is the only copy. Without `control` it is the first head of a new region, and serves at once;
    otherwise `Takeover` fills it.
    """

    def __cinit__(self):
        self.topics = NULL
        self.sessions = NULL

    def __init__(self, Memory memory, Layout layout, int head_broker, int lock_mode, int scanners, uint64_t epoch=1,
                 semaphore_name=None, uint64_t control=0):
        self.memory = memory
        self.layout = layout
        self.head_broker = head_broker
        self.epoch = epoch
        self.scanners = scanners
        self.topic_count = layout.g.topic_count_max
        self.session_count = layout.g.session_count_max
        self.topics = <TopicOrder*>calloc(layout.g.topic_count_max, sizeof(TopicOrder))
        self.sessions = <Session*>calloc(layout.g.session_count_max, sizeof(Session))
        self.ordered = <Ordered*>calloc(layout.g.topic_count_max * layout.g.broker_count, sizeof(Ordered))
        if self.topics == NULL or self.sessions == NULL or self.ordered == NULL:
            raise MemoryError
        self.counters = <SequencerCounters*>memory.coherent_area(layout.sequencer_counters())
        self.lock = OrderLock.make(lock_mode, memory.coherent_area(layout.order_lock()), self.counters,
                                   semaphore_name, True)
        memory.store(layout.head_line() + 8, head_broker)
        memory.store(layout.head_line() + 16, scanners)
        memory.store(layout.head_line() + 24, lock_mode)
        memory.store(layout.head_line(), epoch)
        memory.flush(layout.head_line(), 64)
        memory.fence()
        self.control = control
        if control == 0:
            self.control = make_control(epoch, head_broker, layout.g.bank, 0, CONTROL_SERVING)
            if not memory.compare_and_swap(layout.control(), 0, self.control):
                raise RuntimeError("this region has a head: take it over")
            self.load_sessions()

    cdef void load_sessions(self):
        """Know the sessions that were restored; a new region has none."""
        cdef uint64_t number
        cdef SessionLine line
        cdef SessionProgressLine progress
        cdef Session* session
        for number in range(self.session_count):
            self.memory.read_line(self.layout.session_progress(number), &progress)
            if progress.state == 0:
                continue
            self.memory.read_line(self.layout.session(number), &line)
            if line.topic & 0xFFFF >= self.topic_count:
                continue                        # damaged
            session = &self.sessions[number]
            session.held = <Held*>calloc(WINDOW, sizeof(Held))
            session.client_id = line.client_id
            session.epoch = line.session_epoch
            session.topic = line.topic
            session.expected = progress.expected
            session.messages = progress.committed_messages
            session.position = progress.committed_position
            session.state = progress.state

    def __dealloc__(self):
        cdef uint64_t i
        if self.topics != NULL:
            for i in range(self.topic_count):
                free(self.topics[i].done)
            free(self.topics)
        if self.sessions != NULL:
            for i in range(self.session_count):
                free(self.sessions[i].held)
            free(self.sessions)
        free(self.ordered)

    cdef void open_topic(self, uint64_t topic, TopicLine* line) noexcept nogil:
        cdef TopicOrder* order = &self.topics[topic]
        cdef uint64_t entries = self.layout.g.order_entry_count
        if order.done == NULL:
            order.done = <Done*>calloc(entries, sizeof(Done))
        memset(order.done, 0, entries * sizeof(Done))
        order.order = line.order
        order.lease_ns = line.lease_ns
        order.replicated = line.replication_factor > 1
        self.replicated_topics += order.replicated
        # A restored topic goes on where its lines say; those of a new one are zero.
        order.committed_index = self.memory.load(self.layout.topic_order(topic))
        order.committed_position = self.memory.load(self.layout.topic_order(topic) + 8)
        order.committed_bytes = self.memory.load(self.layout.topic_order(topic) + 24)
        order.assigned = (order.committed_index << POSITION_BITS) + order.committed_position
        order.reclaimed_index = self.memory.load(self.layout.topic_reclaim(topic))
        order.advancing = order.stalled = order.news = 0
        memset(&self.ordered[topic * self.layout.g.broker_count], 0, self.layout.g.broker_count * sizeof(Ordered))
        self.topics_open += 1
        cxl_store_release(&order.generation, line.state >> 8)

    cdef void close_topic(self, uint64_t topic) noexcept nogil:
        if self.topics[topic].generation:
            self.topics_open -= 1
            self.replicated_topics -= self.topics[topic].replicated
        cxl_store_release(&self.topics[topic].generation, 0)

    cdef void count_activity(self, Memory memory, uint64_t topic) noexcept nogil:
        """Change the topic's byte of the activity line. Eight topics share a word: one scanner at a time."""
        cdef uint64_t at = self.layout.sequencer_activity() + topic // 8 * 8
        while not cxl_compare_and_swap(&self.activity_claimed, 0, 1):
            cxl_pause()
        (<uint8_t*>&self.activity[0])[topic] += 1
        memory.store(at, self.activity[topic // 8])
        memory.flush(at, 8)
        cxl_store_release(&self.activity_claimed, 0)

    cdef void add(self, uint64_t* counter, uint64_t value) noexcept nogil:
        """Add to a counter that every scanner adds to."""
        if self.scanners > 1:
            cxl_fetch_add(counter, value)
        else:
            counter[0] += value

    cdef bint has_room(self, TopicOrder* order) noexcept nogil:
        # Each scanner may be between this check and its fetch-add: leave a place for every one of them.
        cdef uint64_t index, position = cxl_load_acquire(&order.committed_position)     # before the word: never beyond it
        cdef uint64_t reclaimed = cxl_load_acquire(&order.reclaimed_index), used
        place_of(cxl_load_acquire(&order.assigned), position, reclaimed, &index)
        used = index - reclaimed
        return used + self.scanners < self.layout.g.order_entry_count or planted(PLANT_INDEX_OVERRUN)

    cdef uint64_t end_position(self, TopicOrder* order) noexcept nogil:
        """The position behind all that has a number."""
        cdef uint64_t index, position = cxl_load_acquire(&order.committed_position)
        return place_of(cxl_load_acquire(&order.assigned), position, 0, &index)

    cdef void write_ordered(self, Memory memory, uint64_t topic, uint64_t broker) noexcept nogil:
        """Write how much of this broker is below the committed frontier. One store: none of it is newer than the rest."""
        cdef Ordered* ordered = &self.ordered[topic * self.layout.g.broker_count + broker]
        cdef uint64_t at = self.layout.offset_sequencer(topic, broker)
        cdef OffsetSequencerLine line
        memset(&line, 0, sizeof(line))
        line.scanned = cxl_load_acquire(&ordered.scanned)
        line.ordered = ordered.messages
        line.ordered_bytes = ordered.nbytes
        line.ordered_address = ordered.address
        line.counted_index = self.topics[topic].committed_index
        memory.write_line(at, &line)
        memory.flush(at, 64)

    cdef void write_window(self, Memory memory, uint64_t number) noexcept nogil:
        """Write what is in the log beyond the expected batch. What was written before stays true: the log only grows."""
        cdef Session* session = &self.sessions[number]
        cdef SessionWindowLine line
        cdef uint64_t at = self.layout.session_window(number)
        if not (session.in_log[0] | session.in_log[1] | session.in_log[2] | session.in_log[3]):
            return
        memset(&line, 0, sizeof(line))
        line.base = session.expected
        line.generation = session.state >> 8
        memcpy(line.in_log, session.in_log, sizeof(line.in_log))
        memory.write_line(at, &line)
        memory.flush(at, 64)

    def session_state(self, uint64_t number) -> dict:
        """A session as the sequencer sees it, for tests."""
        cdef Session* s = &self.sessions[number]
        return {"state": s.state & 0xFF, "expected": s.expected, "held": s.held_count, "epoch": s.epoch}


cdef class Scanner(Stage):
    """One scanner: reads the brokers of `brokers`, shares `state` with the others.

    `doorbells` has one doorbell a broker, rung when that broker has results or waits for commits.
    """

    def __init__(self, OrderState state, Memory memory, Clock clock, int number, brokers, doorbells,
                 replication_bells=()):
        cdef uint64_t b, count = state.layout.g.broker_count, topics = state.layout.g.topic_count_max
        self.state = state
        self.memory = memory
        self.layout = state.layout
        self.clock = clock
        self.number = number
        for b in brokers:
            self.broker_mask |= <uint64_t>1 << b
        self.doorbell_objects = [*doorbells, *replication_bells]
        self.replication_bells = bool(replication_bells)
        self.activity_words = (topics + 7) // 8
        self.pending_words = (topics + 63) // 64
        self.places = <ScanPlace*>calloc(topics * count, sizeof(ScanPlace))
        self.seen_activity = <uint64_t*>calloc(count * self.activity_words, 8)
        self.pending = <uint64_t*>calloc(count * self.pending_words, 8)
        self.sessions_seen = <uint64_t*>calloc(count, 8)
        self.doorbells = <void**>calloc(2 * count, sizeof(void*))
        self.fresh = <Fresh*>calloc(65536, sizeof(Fresh))
        self.touched_sessions = <uint64_t*>calloc(state.layout.g.session_count_max, 8)
        self.touched_topics = <uint64_t*>calloc(self.pending_words, 8)
        if (self.places == NULL or self.seen_activity == NULL or self.pending == NULL or self.fresh == NULL
                or self.sessions_seen == NULL or self.doorbells == NULL or self.touched_sessions == NULL
                or self.touched_topics == NULL):
            raise MemoryError
        for b in range(<uint64_t>len(self.doorbell_objects)):
            self.doorbells[b] = <void*>self.doorbell_objects[b]

    def __dealloc__(self):
        free(self.places)
        free(self.seen_activity)
        free(self.pending)
        free(self.sessions_seen)
        free(self.doorbells)
        free(self.fresh)
        free(self.touched_sessions)
        free(self.touched_topics)

    # ---- one step ------------------------------------------------------------------------------------------------

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t b, word, bits, topic
        cdef int64_t work = 0
        cxl_store_release(&self.in_step, 1)
        cxl_full_fence()
        for b in range(self.layout.g.broker_count):
            if not self.broker_mask >> b & 1:
                continue
            work += self.look_for_news(b)
            for word in range(self.pending_words):
                bits = self.pending[b * self.pending_words + word]
                while bits:
                    topic = word * 64 + cxl_count_trailing_zeros(bits)
                    bits &= bits - 1
                    work += self.scan(topic, b)
        if self.state.gaps and self.number == 0:
            work += self.check_gaps()
        if work:
            if self.state.counters.order_full:
                work += self.retry_stalled()
            self.finish()
        elif self.state.counters.order_full:
            work = self.retry_stalled()
            if work:
                self.finish()
        self.steps += 1
        cxl_store_release(&self.in_step, 0)
        return work

    cdef void leave(self) noexcept nogil:
        self.memory.full_fence()

    cdef void prepare_to_sleep(self) noexcept nogil:
        cdef uint64_t b, t, i
        # Of very many topics, some each time: a mark is lost when a count of one byte came round, which is seldom.
        for i in range(min(self.layout.g.topic_count_max, <uint64_t>LOOK_TOPICS)):
            t = self.next_look
            self.next_look = (t + 1) % self.layout.g.topic_count_max
            if cxl_load_relaxed(&self.state.topics[t].generation):
                for b in range(self.layout.g.broker_count):
                    self.pending[b * self.pending_words + t // 64] |= <uint64_t>1 << (t % 64)

    cdef int64_t look_for_news(self, uint64_t broker) noexcept nogil:
        """Read the broker's activity line and session count; mark the topics that changed."""
        cdef uint64_t line = self.layout.broker_activity(broker), word, now, changed, i, topic
        cdef uint64_t* seen = &self.seen_activity[broker * self.activity_words]
        cdef uint64_t version
        self.memory.invalidate(line, self.activity_words * 8)
        for word in range(self.activity_words):
            now = self.memory.load(line + word * 8)
            changed = now ^ seen[word]
            if changed:
                seen[word] = now
                for i in range(8):
                    if changed >> (8 * i) & 0xFF:
                        topic = word * 8 + i
                        self.pending[broker * self.pending_words + topic // 64] |= <uint64_t>1 << (topic % 64)
        self.memory.invalidate(self.layout.broker(broker), 64)
        version = self.memory.load(self.layout.broker(broker) + 40)
        if version != self.sessions_seen[broker]:
            self.sessions_seen[broker] = version
            return self.look_at_sessions(broker)
        return 0

    cdef int64_t scan(self, uint64_t topic, uint64_t broker) noexcept nogil:
        """Look at this broker's next batches of one topic. Clears its pending mark when it saw all of them."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef ScanPlace* place = &self.places[topic * self.layout.g.broker_count + broker]
        cdef uint64_t line = self.layout.offset_broker(topic, broker), delegated, at
        cdef uint64_t generation = cxl_load_acquire(&order.generation)
        cdef BatchHeader header
        cdef int64_t done = 0
        if generation and place.generation != generation:
            self.open_place(topic, broker, generation)
        if generation == 0:
            self.pending[broker * self.pending_words + topic // 64] &= ~(<uint64_t>1 << (topic % 64))
            return 0
        self.memory.invalidate(line, 64)
        # Its broker may not have opened this topic yet: then the line speaks of an earlier one.
        delegated = self.memory.load(line) if self.memory.load(line + 48) == generation else 0
        # What an earlier head answered may have been released and written over before we come to it.
        if delegated > max(place.scanned, place.rescan_to) + self.layout.g.ring_slot_count:
            self.state.add(&self.state.counters.damaged, 1)
            delegated = 0                   # a ring cannot hold that much: a damaged frontier is not followed
        while place.scanned < delegated and done < STEP_BATCHES:
            if place.scanned < place.rescan_to and self.is_answered(topic, broker, place.scanned, generation):
                place.scanned += 1
                done += 1
                continue
            at = self.layout.ring(topic, broker, place.scanned)
            self.memory.invalidate(at, 64)
            if not self.memory.read_line(at, &header) or header.complete != make_tag(generation, place.scanned):
                if cxl_load_acquire(&order.generation) != generation:
                    break                   # the topic is being deleted
                # The frontier says that it is there, so the line is damaged. Its publisher is told; others go on.
                self.state.add(&self.state.counters.damaged, 1)
                self.answer(topic, broker, place.scanned, RESULT_DAMAGED, 0)
            elif not self.classify(topic, broker, place.scanned, &header):
                break                       # no room in the order index: try again later
            place.scanned += 1
            done += 1
        if place.scanned >= delegated:
            self.pending[broker * self.pending_words + topic // 64] &= ~(<uint64_t>1 << (topic % 64))
        if done:
            self.touched_topics[topic // 64] |= <uint64_t>1 << (topic % 64)
            cxl_store_release(&self.state.ordered[topic * self.layout.g.broker_count + broker].scanned,
                              max(place.scanned, place.rescan_to))
            cxl_fetch_or(&order.news, <uint64_t>1 << broker)
        return done

    cdef bint is_answered(self, uint64_t topic, uint64_t broker, uint64_t slot, uint64_t generation) noexcept nogil:
        """Whether the takeover found a result that stands."""
        return self.memory.load(self.layout.result(topic, broker, slot)) & ~RESULT_STATUS == result_tag(generation, slot)

    cdef void open_place(self, uint64_t topic, uint64_t broker, uint64_t generation) noexcept nogil:
        cdef ScanPlace* place = &self.places[topic * self.layout.g.broker_count + broker]
        memset(place, 0, sizeof(ScanPlace))
        place.generation = generation
        # Zero, unless tests let the topic's counters begin elsewhere.
        self.memory.invalidate(self.layout.offset_broker(topic, broker), 64)
        if self.memory.load(self.layout.offset_broker(topic, broker) + 48) == generation:
            place.scanned = place.rescan_to = self.memory.load(self.layout.offset_broker(topic, broker) + 56)

    # ---- classification ----------------------------------------------------------------------------------------------

    cdef bint classify(self, uint64_t topic, uint64_t broker, uint64_t slot, BatchHeader* header) noexcept nogil:
        """Give one batch its result, now or (held) later; False when the order index has no room for it."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef Session* session
        cdef bint done
        if header.flags & BATCH_VOID:
            if planted(PLANT_VOID_BLOCKS):
                return False
            self.state.add(&self.state.counters.voids, 1)
            if header.flags & BATCH_FENCE and header.session_slot < self.layout.g.session_count_max:
                session = &self.state.sessions[header.session_slot]
                if (session.state & 0xFF == SESSION_OPEN and session.client_id == header.client_id
                        and session.epoch == header.session_epoch):
                    self.fence_session(header.session_slot, SESSION_FENCED)
            self.answer(topic, broker, slot, RESULT_VOID, 0)
            return True
        if (header.payload_offset < self.layout.g.segments or header.payload_offset % 64
                or header.payload_bytes > self.layout.g.batch_bytes_max or header.message_count == 0
                or header.message_count > header.payload_bytes // MESSAGE_HEADER_BYTES
                or header.payload_offset > self.layout.g.region_bytes - header.payload_bytes
                or header.session_slot >= self.layout.g.session_count_max):
            self.state.add(&self.state.counters.damaged, 1)
            self.answer(topic, broker, slot, RESULT_DAMAGED, 0)
            return True
        session = &self.state.sessions[header.session_slot]
        self.claim(session)
        done = self.classify_session(order, topic, broker, slot, header, session)
        if self.state.scanners > 1:
            # Another scanner may write the session's progress as soon as we let go: its entries must be there first.
            self.memory.fence()
        self.unclaim(session)
        return done

    cdef bint classify_session(self, TopicOrder* order, uint64_t topic, uint64_t broker, uint64_t slot,
                               BatchHeader* header, Session* session) noexcept nogil:
        cdef uint64_t sequence = header.batch_sequence, state = session.state & 0xFF
        cdef Held* held
        if (session.client_id != header.client_id or session.epoch != header.session_epoch or state == SESSION_FREE
                or session.topic != (order.generation << 16 | topic)):
            self.state.add(&self.state.counters.refused, 1)
            self.answer(topic, broker, slot, RESULT_FENCED, 0)
            return True
        if sequence < session.expected and not planted(PLANT_DUPLICATE_TWICE):
            if planted(PLANT_SKIPPED_NUMBERED):
                cxl_fetch_add(&order.assigned, (<uint64_t>1 << POSITION_BITS) + header.message_count)
            self.state.add(&self.state.counters.duplicates, 1)
            self.answer(topic, broker, slot, RESULT_DUPLICATE, self.state.end_position(order))
            return True
        if state != SESSION_OPEN:
            self.state.add(&self.state.counters.refused, 1)
            self.answer(topic, broker, slot, RESULT_FENCED, 0)
            return True
        if sequence - session.expected >= WINDOW:
            self.state.add(&self.state.counters.refused, 1)
            self.answer(topic, broker, slot, RESULT_REFUSED, 0)
            return True
        held = &session.held[sequence % WINDOW]
        if held.sequence_and_one == sequence + 1:
            # The first copy is still held; this one needs no result of its own kind: resend until it commits.
            self.state.add(&self.state.counters.duplicates, 1)
            self.answer(topic, broker, slot, RESULT_REFUSED, 0)
            return True
        if order.order != 5 and in_log(session, sequence):
            self.state.add(&self.state.counters.duplicates, 1)
            self.answer(topic, broker, slot, RESULT_DUPLICATE, self.state.end_position(order))
            return True
        if order.order == 5 and sequence > session.expected and not planted(PLANT_GAP_SKIPPED):
            held.sequence_and_one = sequence + 1
            held.broker = broker
            held.slot = slot
            self.state.add(&self.state.counters.held_now, 1)
            self.state.counters.held_peak = max(self.state.counters.held_peak, self.state.counters.held_now)
            session.held_count += 1
            if session.gap_since == 0:
                session.gap_since = self.clock.now_ns()
                cxl_fetch_add(&self.state.gaps, 1)
            self.touch(session)
            return True
        if not self.commit(order, topic, broker, slot, header, session):
            return False
        if order.order == 5:
            session.expected += 1
            self.commit_held(order, topic, session)
        else:
            note_in_log(session, sequence)
        self.touch(session)
        return True

    cdef void commit_held(self, TopicOrder* order, uint64_t topic, Session* session) noexcept nogil:
        """Commit what waited for the batch that just came, as far as it is contiguous."""
        cdef Held* held
        cdef BatchHeader header
        while session.held_count:
            held = &session.held[session.expected % WINDOW]
            if held.sequence_and_one != session.expected + 1:
                break
            self.memory.read_line(self.layout.ring(topic, held.broker, held.slot), &header)
            if not self.commit(order, topic, held.broker, held.slot, &header, session):
                cxl_store_release(&order.stalled, 1)
                break
            held.sequence_and_one = 0
            session.held_count -= 1
            self.state.add(&self.state.counters.held_now, <uint64_t>-1)
            session.expected += 1
        if session.gap_since:
            if session.held_count == 0:
                session.gap_since = 0
                cxl_fetch_add(&self.state.gaps, <uint64_t>-1)
            else:
                session.gap_since = self.clock.now_ns()     # the expected sequence advanced: the clock starts anew

    cdef bint commit(self, TopicOrder* order, uint64_t topic, uint64_t broker, uint64_t slot,
                     BatchHeader* header, Session* session) noexcept nogil:
        """Take an order number and write the entry and the result; False when the index is full."""
        cdef uint64_t taken, index = 0, position, at
        cdef OrderEntry entry
        cdef Done* done
        if self.fresh_count >= 65536 or not self.state.has_room(order):
            self.state.add(&self.state.counters.order_full, 1)
            return False
        crash_point(CRASH_BEFORE_NUMBER)
        taken = (<uint64_t>1 << POSITION_BITS) + header.message_count
        if self.state.lock.mode == LOCK_ATOMIC and self.state.scanners > 1:
            taken = cxl_fetch_add(&order.assigned, taken)
        else:
            order.assigned += taken
            taken = order.assigned - taken
        # Both committed ones are of an entry before ours, and need not be of the same: only 16 bits of the index travel in
        # the word, and it is at most 32,768 ahead.
        position = place_of(taken, cxl_load_acquire(&order.committed_position), cxl_load_acquire(&order.committed_index),
                            &index)
        entry.commit = make_tag(order.generation, index)
        entry.position = position
        entry.payload_offset = header.payload_offset
        entry.payload_bytes = header.payload_bytes
        entry.message_count = header.message_count
        entry.client_id = header.client_id
        entry.batch_sequence = header.batch_sequence
        entry.session_epoch = header.session_epoch
        entry.broker = broker
        entry.epoch = self.state.epoch
        entry.wall_ns = header.received_wall_ns
        at = self.layout.order_entry(topic, index)
        crash_point(CRASH_NUMBER_TAKEN)
        if crash_point_armed(CRASH_MID_ENTRY):
            self.memory.store(at + 8, entry.position)
            self.memory.store(at + 16, entry.payload_offset)
            crash_point(CRASH_MID_ENTRY)
        self.memory.write_line(at, &entry)
        self.memory.flush(at, 64)
        done = &order.done[index & (self.layout.g.order_entry_count - 1)]
        done.payload_offset = header.payload_offset
        done.messages = header.message_count
        done.nbytes = header.payload_bytes
        done.broker = broker
        self.fresh[self.fresh_count].topic = topic
        self.fresh[self.fresh_count].index = index
        self.fresh_count += 1
        session.messages += header.message_count
        session.position = entry.position + header.message_count
        self.state.add(&self.state.counters.batches_ordered, 1)
        self.state.add(&self.state.counters.messages_ordered, header.message_count)
        self.touched_topics[topic // 64] |= <uint64_t>1 << (topic % 64)
        self.answer(topic, broker, slot, RESULT_COMMITTED, entry.position)
        return True

    cdef void answer(self, uint64_t topic, uint64_t broker, uint64_t slot, uint64_t status,
                     uint64_t position) noexcept nogil:
        """Write a batch's result. Four share a line: it is flushed when another line begins."""
        cdef uint64_t at = self.layout.result(topic, broker, slot), line = at & ~<uint64_t>63
        cdef uint64_t generation = self.state.topics[topic].generation
        self.memory.store(at + 8, position)
        self.memory.store(at, result_tag(generation, slot) | status << 40)
        if self.result_line and self.result_line != line:
            self.memory.flush(self.result_line, 64)
        self.result_line = line
        self.answered |= <uint64_t>1 << broker

    cdef void claim(self, Session* session) noexcept nogil:
        # One session at a time, or under the lock all of them. Two scanners meet at a session only when its batches
        # arrive by two brokers at the same moment.
        cdef int tries = 0
        if self.state.lock.mode != LOCK_ATOMIC:
            self.state.lock.acquire()
            return
        while not cxl_compare_and_swap(&session.claimed, 0, 1):
            tries += 1
            if tries == 1:
                self.state.add(&self.state.counters.lock_contended, 1)
            if tries < 32:
                cxl_pause()
            else:
                cxl_yield()
        self.state.add(&self.state.counters.lock_acquisitions, 1)

    cdef void unclaim(self, Session* session) noexcept nogil:
        if self.state.lock.mode == LOCK_ATOMIC:
            cxl_store_release(&session.claimed, 0)
        else:
            self.state.lock.release()

    cdef void touch(self, Session* session) noexcept nogil:
        # Claimed by this scanner: its progress line is written at the end of the step.
        if not session.touched:
            session.touched = 1
            self.touched_sessions[self.touched_count] = session - self.state.sessions
            self.touched_count += 1

    # ---- the end of a step -----------------------------------------------------------------------------------------

    cdef void finish(self) noexcept nogil:
        """Fence what was written, then the sessions, then move the committed frontiers, then wake whom it concerns.

        Progress says no more than entries, and the frontier no more than progress: so a next head finds every entry
        that a session counts, and counts every entry that is committed, wherever this one ends.
        """
        cdef uint64_t i, word, bits, b, interested = self.answered
        if self.fresh_count and self.state.scanners > 1:
            interested = <uint64_t>-1       # our entries may let those pass that other scanners answered before
        cdef TopicOrder* order
        if self.result_line:
            self.memory.flush(self.result_line, 64)
            self.result_line = 0
        if not planted(PLANT_DONE_BEFORE_FENCE):
            self.memory.fence()
        crash_point(CRASH_ENTRY_WRITTEN)
        if self.touched_count:
            for i in range(self.touched_count):
                self.write_progress(self.touched_sessions[i])
            self.touched_count = 0
            if not planted(PLANT_DONE_BEFORE_FENCE):
                self.memory.fence()
        crash_point(CRASH_PROGRESS_WRITTEN)
        # Entries and results are in memory: now, and not before, the frontier may pass them.
        for i in range(self.fresh_count):
            order = &self.state.topics[self.fresh[i].topic]
            cxl_store_release(&order.done[self.fresh[i].index & (self.layout.g.order_entry_count - 1)].index_and_one,
                              self.fresh[i].index + 1)
        self.fresh_count = 0
        for word in range(self.pending_words):
            bits = self.touched_topics[word]
            self.touched_topics[word] = 0
            while bits:
                self.advance(word * 64 + cxl_count_trailing_zeros(bits))
                bits &= bits - 1
        self.memory.full_fence()
        crash_point(CRASH_COMMITTED)
        for b in range(self.layout.g.broker_count):
            if interested >> b & 1 or self.memory.load(self.layout.broker(b) + 32):
                (<Doorbell>self.doorbells[b]).ring_fenced()
            if self.replication_bells and self.state.replicated_topics:
                (<Doorbell>self.doorbells[self.layout.g.broker_count + b]).ring_fenced()
        self.answered = 0

    cdef void advance(self, uint64_t topic) noexcept nogil:
        """Move the committed frontier over every entry that is fenced, in order. One scanner at a time."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef uint64_t mask = self.layout.g.order_entry_count - 1, index, start, line, brokers
        cdef Done* done
        cdef Ordered* ordered
        while True:
            if not cxl_compare_and_swap(&order.advancing, 0, 1):
                return                      # whoever advances looks again after letting go
            brokers = cxl_fetch_and(&order.news, 0)
            start = index = order.committed_index
            done = &order.done[index & mask]
            while cxl_load_acquire(&done.index_and_one) == index + 1:
                cxl_store_release(&order.committed_position, order.committed_position + done.messages)
                order.committed_bytes += done.nbytes
                ordered = &self.state.ordered[topic * self.layout.g.broker_count + done.broker]
                ordered.messages = done.messages + (0 if planted(PLANT_ORDERED_OVERWRITTEN) else ordered.messages)
                ordered.nbytes += done.nbytes
                ordered.address = done.payload_offset
                brokers |= <uint64_t>1 << done.broker
                index += 1
                done = &order.done[index & mask]
            if index != start:
                cxl_store_release(&order.committed_index, index)
                line = self.layout.topic_order(topic)
                # The position comes last: acks follow it, and what is acknowledged must be below the index that a
                # recovery finds, also when the power goes between the two.
                self.memory.store(line, index)
                self.memory.store(line + 16, self.state.epoch)
                self.memory.store(line + 24, order.committed_bytes)
                self.memory.store(line + 8, order.committed_position)
                self.memory.flush(line, 64)
                self.state.count_activity(self.memory, topic)
            while brokers and cxl_load_acquire(&order.generation):
                self.state.write_ordered(self.memory, topic, cxl_count_trailing_zeros(brokers))
                brokers &= brokers - 1
            cxl_store_release(&order.advancing, 0)
            cxl_full_fence()
            if cxl_load_acquire(&done.index_and_one) != index + 1 and not cxl_load_relaxed(&order.news):
                return

    cdef void write_progress(self, uint64_t number) noexcept nogil:
        if self.state.scanners > 1:                     # another scanner may change the session meanwhile
            self.claim(&self.state.sessions[number])
            self.put_progress(number)
            self.unclaim(&self.state.sessions[number])
        else:
            self.put_progress(number)

    cdef void put_progress(self, uint64_t number) noexcept nogil:
        cdef Session* session = &self.state.sessions[number]
        cdef SessionProgressLine line
        cdef uint64_t at = self.layout.session_progress(number)
        session.touched = 0
        self.state.write_window(self.memory, number)
        line.state = session.state
        line.expected = session.expected
        line.committed_messages = session.messages
        line.committed_position = session.position
        line.predecessor_expected = session.predecessor_expected
        line.predecessor_epoch = session.predecessor_epoch
        line.gap_since_ns = session.gap_since
        line.held = session.held_count
        self.memory.write_line(at, &line)
        self.memory.flush(at, 64)

    # ---- sessions ----------------------------------------------------------------------------------------------------

    cdef int64_t look_at_sessions(self, uint64_t broker) noexcept nogil:
        """A session line of this broker changed: open, close, or renew what differs."""
        cdef uint64_t first = broker * self.layout.g.sessions_per_broker, number, state
        cdef Session* session
        cdef int64_t work = 0
        for number in range(first, first + self.layout.g.sessions_per_broker):
            self.memory.invalidate(self.layout.session(number), 64)
            state = self.memory.load(self.layout.session(number))
            session = &self.state.sessions[number]
            if state >> 8 != session.state >> 8 and state & 0xFF == SESSION_OPEN:
                self.open_session(number, state)
                work += 1
            elif state >> 8 == session.state >> 8 and state & 0xFF == SESSION_CLOSING and \
                    session.state & 0xFF != SESSION_CLOSED:
                self.fence_session(number, SESSION_CLOSED)
                work += 1
        return work

    cdef void open_session(self, uint64_t number, uint64_t state) noexcept nogil:
        """Begin a session; an earlier one of the same client and topic is fenced and tells where it ended."""
        cdef Session* session = &self.state.sessions[number]
        cdef Session* other
        cdef SessionLine line
        cdef uint64_t i, epoch
        cdef bint same, is_open
        self.memory.read_line(self.layout.session(number), &line)
        if line.topic & 0xFFFF >= self.layout.g.topic_count_max:
            line.topic = 0                      # damaged: a session of no topic
        # The slot may be taken over from a session that nobody closed: what that one held gets its answer.
        self.fence_session(number, SESSION_CLOSED)
        self.claim(session)
        if session.held == NULL:
            session.held = <Held*>calloc(WINDOW, sizeof(Held))
        memset(session.held, 0, WINDOW * sizeof(Held))
        memset(session.in_log, 0, sizeof(session.in_log))
        session.predecessor_expected = session.predecessor_epoch = 0
        session.expected = session.messages = session.position = session.held_count = 0
        session.gap_since = 0
        session.epoch = line.session_epoch
        session.topic = line.topic
        session.client_id = line.client_id
        session.state = state
        self.unclaim(session)
        # Another scanner may open one of the same client just now. Each says that it is there before it looks for the other,
        # and no processor may turn that round: one of the two sees the other, complete.
        cxl_full_fence()
        for i in range(self.layout.g.session_count_max):
            other = &self.state.sessions[i]
            if i == number or other.client_id != line.client_id or other.topic != line.topic:
                continue
            self.claim(other)                   # what is being opened is read as a whole
            same = other.client_id == line.client_id and other.topic == line.topic
            epoch, is_open = other.epoch, other.state & 0xFF == SESSION_OPEN
            self.unclaim(other)
            if not same:
                continue
            if epoch >= line.session_epoch and is_open:
                session.state = (state & ~<uint64_t>0xFF) | SESSION_FENCED     # an old epoch comes late
            elif epoch < line.session_epoch:
                if is_open:
                    self.fence_session(i, SESSION_FENCED)
                if epoch >= session.predecessor_epoch:
                    session.predecessor_epoch = epoch
                    session.predecessor_expected = other.expected
        self.memory.fence()
        self.write_progress(number)
        self.answered |= <uint64_t>1 << (number // self.layout.g.sessions_per_broker)

    cdef void fence_session(self, uint64_t number, uint64_t new_state) noexcept nogil:
        """End a session. No other scanner commits for it meanwhile: its high-water mark is final."""
        cdef Session* session = &self.state.sessions[number]
        self.claim(session)
        self.fence_claimed(number, new_state)
        self.unclaim(session)

    cdef void fence_claimed(self, uint64_t number, uint64_t new_state) noexcept nogil:
        """First the high-water mark is in memory, then what the session held is dropped."""
        cdef Session* session = &self.state.sessions[number]
        if session.state & 0xFF == SESSION_FREE:
            return
        session.state = (session.state & ~<uint64_t>0xFF) | new_state
        if new_state == SESSION_FENCED:
            self.state.add(&self.state.counters.fenced_sessions, 1)
        self.memory.fence()                     # its entries come before what counts them
        self.put_progress(number)
        self.memory.fence()
        self.drop_held(session, RESULT_FENCED)
        self.touch(session)
        self.answered |= <uint64_t>1 << (number // self.layout.g.sessions_per_broker)

    cdef void drop_held(self, Session* session, uint64_t status) noexcept nogil:
        cdef uint64_t i, topic = session.topic & 0xFFFF
        cdef bint alive = self.state.topics[topic].generation == session.topic >> 16    # else its ring is another's
        cdef Held* held
        if session.held_count:
            for i in range(WINDOW):
                held = &session.held[i]
                if held.sequence_and_one:
                    if alive:
                        self.answer(topic, held.broker, held.slot, status, 0)
                    held.sequence_and_one = 0
                    self.state.add(&self.state.counters.held_now, <uint64_t>-1)
        session.held_count = 0
        if session.gap_since:
            session.gap_since = 0
            cxl_fetch_add(&self.state.gaps, <uint64_t>-1)

    cdef int64_t check_gaps(self) noexcept nogil:
        """Fence the sessions whose gap outlived their lease; nothing else fences."""
        cdef int64_t now = self.clock.now_ns(), work = 0, elapsed
        cdef uint64_t i
        cdef Session* session
        if now < self.next_gap_check:
            return 0
        elapsed = now - (self.next_gap_check - GAP_CHECK_NS)
        self.next_gap_check = now + GAP_CHECK_NS
        for i in range(self.layout.g.session_count_max):
            session = &self.state.sessions[i]
            if session.gap_since == 0:
                continue
            self.claim(session)
            if self.is_gap(session, now, elapsed):
                self.fence_claimed(i, SESSION_FENCED)
                work += 1
            elif session.gap_since and now - session.gap_since > self.patience(session):
                work += self.relieve(session)
            self.unclaim(session)
        return work

    cdef int64_t patience(self, Session* session) noexcept nogil:
        return min(<int64_t>RELIEF_NS, self.state.topics[session.topic & 0xFFFF].lease_ns // 2)

    cdef bint is_crowded(self, uint64_t topic, uint64_t broker) noexcept nogil:
        """Whether a ring is so full that its broker pushes publishers back."""
        cdef uint64_t line = self.layout.offset_broker(topic, broker)
        self.memory.invalidate(line, 64)
        return self.memory.load(line) >= self.memory.load(line + 56) + self.layout.g.ring_slot_count // 4 * 3

    cdef int64_t relieve(self, Session* session) noexcept nogil:
        """Refuse what a stuck session holds at the end of rings that fill up behind it: others, and what it waits for,
        have to get in. Its publisher sends it again."""
        cdef uint64_t topic = session.topic & 0xFFFF, quarter = self.layout.g.ring_slot_count // 4, i
        cdef Held* held
        cdef int64_t refused = 0
        if self.state.topics[topic].generation != session.topic >> 16:
            return 0
        for i in range(WINDOW):
            held = &session.held[i]
            if not held.sequence_and_one:
                continue
            if not self.is_crowded(topic, held.broker) or held.slot >= quarter + self.memory.load(
                    self.layout.offset_broker(topic, held.broker) + 56):
                continue
            self.answer(topic, held.broker, held.slot, RESULT_REFUSED, 0)
            held.sequence_and_one = 0
            refused += 1
        if refused:
            session.held_count -= refused
            self.state.add(&self.state.counters.held_now, <uint64_t>-refused)
            self.state.add(&self.state.counters.refused, refused)
            self.touch(session)
        if session.held_count == 0:
            session.gap_since = 0
            cxl_fetch_add(&self.state.gaps, <uint64_t>-1)
        return refused

    cdef bint is_gap(self, Session* session, int64_t now, int64_t elapsed) noexcept nogil:
        """Whether the session's gap has outlived its lease. Back-pressure is no gap: meanwhile the clock stands still."""
        cdef TopicOrder* order = &self.state.topics[session.topic & 0xFFFF]
        cdef bint waits = session.held[session.expected % WINDOW].sequence_and_one == session.expected + 1
        cdef uint64_t live, b
        if session.gap_since == 0:
            return False
        if order.generation == session.topic >> 16 and (waits or not self.state.has_room(order)):
            session.gap_since = min(now, session.gap_since + elapsed)
            return False
        if now - session.gap_since > self.patience(session) and order.generation == session.topic >> 16:
            live = live_brokers(self.memory, self.layout)
            for b in range(self.layout.g.broker_count):
                if live >> b & 1 and self.is_crowded(session.topic & 0xFFFF, b):
                    session.gap_since = now - self.patience(session) - 1    # what is missing may not get in; relieve
                    return False
        return now - session.gap_since >= order.lease_ns

    cdef int64_t retry_stalled(self) noexcept nogil:
        """Held batches that found the order index full are committed once there is room again."""
        cdef uint64_t topic, i
        cdef TopicOrder* order
        cdef Session* session
        cdef int64_t work = 0
        for topic in range(self.layout.g.topic_count_max):
            order = &self.state.topics[topic]
            if not cxl_load_relaxed(&order.stalled) or not self.state.has_room(order):
                continue
            order.stalled = 0
            for i in range(self.layout.g.session_count_max):
                session = &self.state.sessions[i]
                if session.held_count == 0 or session.topic != (order.generation << 16 | topic):
                    continue
                self.claim(session)
                if session.state & 0xFF == SESSION_OPEN:
                    self.commit_held(order, topic, session)
                    self.touch(session)
                self.unclaim(session)
                work += 1
        return work
