"""Takeover: makes this broker head. It raises the epoch, rebuilds all that the last head knew in a bank of its own, and serves.

    raise the epoch ─► reclaimed, committed frontiers ─► sessions ─► entries, results, topic by topic ─► serve

The source is read in the opposite order of how a head writes it (entries, progress, frontier): whatever a frontier covers
is found, and whatever a session counts. Entries beyond the frontier that a session counts are adopted: they get the
next numbers, without a hole. All others are void: their batches lie in the rings and are classified anew.
It may be killed at any point: until it serves, the next one starts from the same source.
"""

from libc.stdint cimport int64_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from broker.crash cimport CRASH_EPOCH_RAISED, CRASH_HALF_RECOVERED, CRASH_RECOVERED, crash_point
from broker.head cimport make_control
from broker.layout cimport (
    BatchHeader, BatchResult, CONTROL_BANK_SHIFT, CONTROL_EPOCH_SHIFT, CONTROL_SERVING, CONTROL_SOURCE_SHIFT, HeadLine, Layout,
    OffsetSequencerLine, OrderEntry, RESULT_COMMITTED, RESULT_DUPLICATE, SESSION_CLOSED, SESSION_OPEN, SessionLine,
    SessionProgressLine, SessionWindowLine, TOPIC_ACTIVE, TOPIC_FREE, TopicLine, TopicReclaimLine, make_tag, result_tag,
)
from broker.planted cimport PLANT_HALF_BANK, planted
from broker.stages.sequencer cimport (
    Held, OrderState, Ordered, POSITION_BITS, ScanPlace, Scanner, Session, TopicOrder, WINDOW, note_in_log,
)
from broker.stages.stage cimport Stage
from sim.cxl.clock cimport Clock
from sim.cxl.memory cimport Memory

cdef uint64_t STATUS_MASK = <uint64_t>0xFF << 40
cdef uint64_t NOWHERE = <uint64_t>-1

cdef enum:
    TAKE_NOTHING = 0
    TAKE_TABLES = 1
    TAKE_TOPICS = 2
    TAKE_SESSIONS = 3
    TAKE_SERVE = 4
    TAKE_DONE = 5
    TAKE_LOST = 6


cdef class Takeover(Stage):
    """One attempt of one broker. `begin` raises the epoch; then `step` until `done` or `lost`.

    `memory` is the door of whoever hands records over (admin), `order_memory` the sequencer's. When done, `order` is ready
    for scanners; `prepare` makes one continue.
    """

    cdef Memory memory
    cdef Layout layout              # of our own bank
    cdef Layout source              # of the last head that served; None for a new region
    cdef Clock clock
    cdef readonly int broker
    cdef readonly OrderState order
    cdef readonly uint64_t control
    cdef readonly uint64_t adopted
    cdef object make_order
    cdef uint64_t source_epoch
    cdef uint64_t bank_epoch        # of the head that wrote our bank last
    cdef uint64_t topic_count       # for __dealloc__
    cdef int phase
    cdef uint64_t next_topic
    cdef uint64_t* committed        # by topic: the source's frontier, and its position
    cdef uint64_t* positions
    cdef ScanPlace* places          # topic * brokers + broker
    cdef uint64_t* sessions_by_key  # open addressing: session + 1
    cdef uint64_t key_mask

    def __init__(self, Memory memory, Layout layout, Clock clock, int broker, int lock_mode, int scanners,
                 semaphore_name=None, Memory order_memory=None):
        self.memory = memory
        self.layout = layout.with_bank(0)
        self.clock = clock
        self.broker = broker
        self.topic_count = layout.g.topic_count_max
        self.committed = <uint64_t*>calloc(2 * self.topic_count, 8)
        self.places = <ScanPlace*>calloc(self.topic_count * layout.g.broker_count, sizeof(ScanPlace))
        self.key_mask = 1
        while self.key_mask < 2 * layout.g.session_count_max:
            self.key_mask *= 2
        self.sessions_by_key = <uint64_t*>calloc(self.key_mask, 8)
        self.key_mask -= 1
        if self.committed == NULL or self.places == NULL or self.sessions_by_key == NULL:
            raise MemoryError
        self.positions = self.committed + self.topic_count
        self.make_order = lambda epoch, control: OrderState(
            order_memory or memory, self.layout, broker, lock_mode, scanners, epoch, semaphore_name, control)

    def __dealloc__(self):
        free(self.committed)
        free(self.places)
        free(self.sessions_by_key)

    @property
    def done(self) -> bool:
        """Whether this broker serves as head."""
        return self.phase == TAKE_DONE

    @property
    def lost(self) -> bool:
        """Whether somebody else was faster."""
        return self.phase == TAKE_LOST

    def begin(self, uint64_t seen, uint64_t bank) -> bool:
        """Raise the epoch above that of the control word `seen`; our bank is `bank`, which nobody else writes.

        False when the word has changed meanwhile. From here on nothing that an earlier head writes counts.
        """
        cdef uint64_t epoch = (seen >> CONTROL_EPOCH_SHIFT) + 1, source
        source = (seen >> CONTROL_BANK_SHIFT & 0xFF) + 1 if seen & CONTROL_SERVING or (
            planted(PLANT_HALF_BANK) and seen >> CONTROL_BANK_SHIFT & 0xFF != bank) else seen >> CONTROL_SOURCE_SHIFT & 0xFF
        assert self.phase == TAKE_NOTHING and bank + 1 != source
        self.control = make_control(epoch, self.broker, bank, source, 0)
        if not self.memory.compare_and_swap(self.layout.control(), seen, self.control):
            self.phase = TAKE_LOST
            return False
        crash_point(CRASH_EPOCH_RAISED)
        self.layout.use_bank(bank)
        self.memory.invalidate(self.layout.head_line(), 64)
        self.bank_epoch = self.memory.load(self.layout.head_line())
        if source:
            self.source = self.layout.with_bank(source - 1)
            self.memory.invalidate(self.source.head_line(), 64)
            self.source_epoch = self.memory.load(self.source.head_line())
        self.order = self.make_order(epoch, self.control ^ CONTROL_SERVING)
        self.phase = TAKE_TABLES
        return True

    cdef int64_t step(self) noexcept nogil:
        if self.phase == TAKE_NOTHING or self.phase >= TAKE_DONE:
            return 0
        if self.memory.load(self.layout.control()) != self.control:
            # Our bank is for others as soon as we say so: nothing that we flushed may come there later.
            self.memory.full_fence()
            self.phase = TAKE_LOST
        elif self.phase == TAKE_TABLES:
            if self.source is not None:
                self.take_tables()
                self.read_sessions()
            else:
                self.wipe_tables()
            self.forget_old_entries()
            self.phase = TAKE_TOPICS
        elif self.phase == TAKE_TOPICS:
            if self.source is None or self.next_topic == self.topic_count:
                self.phase = TAKE_SESSIONS
            else:
                self.take_topic(self.next_topic)
                self.next_topic += 1
                if self.next_topic == self.topic_count // 2:
                    crash_point(CRASH_HALF_RECOVERED)
        elif self.phase == TAKE_SESSIONS:
            self.write_sessions()
            self.phase = TAKE_SERVE
        else:
            self.serve()
        return 1

    # ---- tables ------------------------------------------------------------------------------------------------------

    cdef void copy(self, uint64_t target, uint64_t source, uint64_t nbytes) noexcept nogil:
        """Copy lines of one bank to the other: whole ones, or what this host knows of the target's earlier use came back."""
        cdef uint64_t i
        cdef uint64_t[8] line
        self.memory.invalidate(source, nbytes)
        for i in range(0, nbytes, 64):
            self.memory.read_line(source + i, line)
            self.memory.write_line(target + i, line)
        self.memory.flush(target, nbytes)

    cdef void zero(self, uint64_t target, uint64_t nbytes) noexcept nogil:
        cdef uint64_t i
        cdef uint64_t[8] line
        memset(line, 0, sizeof(line))
        for i in range(0, nbytes, 64):
            self.memory.write_line(target + i, line)
        self.memory.flush(target, nbytes)

    cdef void forget_old_entries(self) noexcept nogil:
        """Entries have the low 16 bits of their epoch: what a head left here in an earlier round of them must not be taken for
        what the last one wrote. So a bank holds entries of one round alone."""
        cdef uint64_t t
        if self.bank_epoch >> 16 != (self.control >> CONTROL_EPOCH_SHIFT) >> 16:
            for t in range(self.topic_count):
                self.zero(self.layout.order_entry(t, 0), self.layout.g.order_entry_count * sizeof(OrderEntry))
            self.memory.fence()

    cdef void wipe_tables(self) noexcept nogil:
        """A new region: nothing was there before us, but a head that died before it served."""
        self.zero(self.layout.directory(), self.layout.g.results - self.layout.directory())

    cdef uint64_t copied_last(self) noexcept nogil:
        return self.source.g.grantees if self.source.g.grantees else self.source.g.results

    cdef void take_tables(self) noexcept nogil:
        """Topics, reclaimed and then committed frontiers, grants and answers."""
        cdef uint64_t t, line
        cdef TopicLine topic
        # The reclaimed frontier is read before the committed one: it is never beyond.
        self.copy(self.layout.directory(), self.source.directory(), self.copied_last() - self.source.directory())
        # To whom segments were granted is noted before the grants are counted, which have just been read.
        self.copy(self.layout.g.results - self.source.g.results + self.copied_last(), self.copied_last(),
                  self.source.g.results - self.copied_last())
        for t in range(self.topic_count):
            line = self.source.topic_order(t)
            self.memory.invalidate(line, 64)
            self.positions[t] = self.memory.load(line + 8)      # written last, read first: never of a later index
            self.committed[t] = self.memory.load(line)
            self.memory.read_line(self.layout.topic(t), &topic)
            if topic.state & 0xFF == TOPIC_ACTIVE:
                self.order.open_topic(t, &topic)

    # ---- sessions ------------------------------------------------------------------------------------------------------

    cdef void read_sessions(self) noexcept nogil:
        """What the source counts of every session. A slot that its broker has given to a new one is opened later."""
        cdef uint64_t number
        cdef SessionLine line
        cdef SessionProgressLine progress
        cdef Session* session
        for number in range(self.layout.g.session_count_max):
            session = &self.order.sessions[number]
            self.memory.invalidate(self.source.session_progress(number), 64)
            self.memory.read_line(self.source.session_progress(number), &progress)
            if progress.state == 0:
                continue
            self.memory.invalidate(self.layout.session(number), 64)
            self.memory.read_line(self.layout.session(number), &line)
            session.state = progress.state
            session.expected = progress.expected
            session.messages = progress.committed_messages
            session.position = progress.committed_position
            session.predecessor_expected = progress.predecessor_expected
            session.predecessor_epoch = progress.predecessor_epoch
            if line.state >> 8 != progress.state >> 8:
                session.state = (progress.state & ~<uint64_t>0xFF) | SESSION_CLOSED
                continue
            session.client_id = line.client_id
            session.epoch = line.session_epoch
            session.topic = line.topic
            session.held = <Held*>calloc(WINDOW, sizeof(Held))
            self.read_window(number)
            self.remember(number)

    cdef void read_window(self, uint64_t number) noexcept nogil:
        """At order levels below 5: what lies beyond the expected batch and is in the log."""
        cdef Session* session = &self.order.sessions[number]
        cdef SessionWindowLine line
        cdef uint64_t sequence, at = self.source.session_window(number)
        if self.order.topics[session.topic & 0xFFFF].order == 5:
            return
        self.memory.invalidate(at, 64)
        self.memory.read_line(at, &line)
        if line.generation != session.state >> 8 or line.base + WINDOW <= session.expected or (
                line.base > session.expected + WINDOW):
            return                              # of an earlier session, filled long since, or damaged
        for sequence in range(max(line.base, session.expected), min(line.base, session.expected) + WINDOW):
            if line.in_log[sequence % WINDOW // 64] >> (sequence % 64) & 1:
                note_in_log(session, sequence)

    cdef uint64_t key_of(self, uint64_t client, uint64_t epoch, uint64_t topic) noexcept nogil:
        return ((client ^ epoch << 17 ^ topic << 5) * <uint64_t>0x9E3779B97F4A7C15) >> 20

    cdef void remember(self, uint64_t number) noexcept nogil:
        cdef Session* session = &self.order.sessions[number]
        cdef uint64_t at = self.key_of(session.client_id, session.epoch, session.topic)
        while self.sessions_by_key[at & self.key_mask]:
            at += 1
        self.sessions_by_key[at & self.key_mask] = number + 1

    cdef Session* session_of(self, OrderEntry* entry, uint64_t topic) noexcept nogil:
        """The session that an entry belongs to; NULL when its slot has another one by now."""
        cdef uint64_t at = self.key_of(entry.client_id, entry.session_epoch, topic), number
        cdef Session* session
        while True:
            number = self.sessions_by_key[at & self.key_mask]
            if number == 0:
                return NULL
            session = &self.order.sessions[number - 1]
            if session.client_id == entry.client_id and session.epoch == entry.session_epoch and session.topic == topic:
                return session
            at += 1

    cdef void write_sessions(self) noexcept nogil:
        """Everything that the next head, and the brokers, have to know of the sessions."""
        cdef uint64_t number
        cdef SessionProgressLine line
        cdef Session* session
        for number in range(self.layout.g.session_count_max):
            session = &self.order.sessions[number]
            memset(&line, 0, sizeof(line))
            line.state = session.state
            line.expected = session.expected
            line.committed_messages = session.messages
            line.committed_position = session.position
            line.predecessor_expected = session.predecessor_expected
            line.predecessor_epoch = session.predecessor_epoch
            self.order.write_window(self.memory, number)
            self.memory.write_line(self.layout.session_progress(number), &line)
            self.memory.flush(self.layout.session_progress(number), 64)
        self.memory.fence()

    # ---- topics --------------------------------------------------------------------------------------------------------

    cdef void take_topic(self, uint64_t topic) noexcept nogil:
        """Entries and results of one topic."""
        cdef TopicOrder* order = &self.order.topics[topic]
        cdef TopicReclaimLine reclaim
        cdef uint64_t index, position, b
        if order.generation == 0:
            return
        self.memory.read_line(self.layout.topic_reclaim(topic), &reclaim)
        position = self.place_of(topic, reclaim.reclaimed_index)
        if position != reclaim.reclaimed_position and position != NOWHERE:
            # The line was copied while it was written: index and position of it do not belong together.
            reclaim.reclaimed_position = position
            self.memory.write_line(self.layout.topic_reclaim(topic), &reclaim)
            self.memory.flush(self.layout.topic_reclaim(topic), 64)
        order.reclaimed_index = reclaim.reclaimed_index
        order.committed_bytes = reclaim.reclaimed_bytes
        for index in range(reclaim.reclaimed_index, self.committed[topic]):
            self.take_entry(topic, index)
        order.committed_index = self.committed[topic]
        order.committed_position = self.positions[topic] = self.end_of(topic, &reclaim)
        for b in range(self.layout.g.broker_count):
            self.take_ordered(topic, b)
        self.adopt(topic)
        order.assigned = (order.committed_index << POSITION_BITS) + order.committed_position
        for b in range(self.layout.g.broker_count):
            self.take_results(topic, b)
            self.order.write_ordered(self.memory, topic, b)
        self.write_frontier(topic)
        self.memory.fence()

    cdef bint read_entry(self, uint64_t topic, uint64_t index, OrderEntry* entry) noexcept nogil:
        """The source's entry at an index; False when another one, or a damaged one, is there."""
        cdef uint64_t at = self.source.order_entry(topic, index)
        self.memory.invalidate(at, 64)
        return self.memory.read_line(at, entry) and entry.commit == make_tag(self.order.topics[topic].generation, index)

    cdef void take_entry(self, uint64_t topic, uint64_t index) noexcept nogil:
        """Copy a committed entry as it is: also a damaged one, which its readers are told of. Its session's progress
        counts it already."""
        cdef TopicOrder* order = &self.order.topics[topic]
        cdef OrderEntry entry
        cdef bint found = self.read_entry(topic, index, &entry)
        self.memory.write_line(self.layout.order_entry(topic, index), &entry)
        self.memory.flush(self.layout.order_entry(topic, index), 64)
        if found and entry.payload_bytes <= self.layout.g.batch_bytes_max:
            order.committed_bytes += entry.payload_bytes

    cdef uint64_t place_of(self, uint64_t topic, uint64_t index) noexcept nogil:
        """The position of a committed entry, if what lies behind it agrees; else `NOWHERE`."""
        cdef OrderEntry entry, following
        if index >= self.committed[topic] or not self.read_entry(topic, index, &entry):
            return NOWHERE
        if index + 1 == self.committed[topic]:
            following.position = self.positions[topic]
        elif not self.read_entry(topic, index + 1, &following):
            return NOWHERE
        return entry.position if entry.position + entry.message_count == following.position else NOWHERE

    cdef uint64_t end_of(self, uint64_t topic, TopicReclaimLine* reclaim) noexcept nogil:
        """The position behind the last committed entry. The frontier's own may be of an earlier index, when the power
        went between the two: then entries lead on from there. No single entry is believed: it may be damaged."""
        cdef uint64_t position = max(self.positions[topic], reclaim.reclaimed_position)
        cdef uint64_t index = self.committed[topic], first = index
        cdef OrderEntry entry
        while index > reclaim.reclaimed_index:
            index -= 1
            if not self.read_entry(topic, index, &entry) or entry.position < position:
                break
            if entry.position == position:
                first = index
        for index in range(first, self.committed[topic]):
            if not self.read_entry(topic, index, &entry) or entry.position != position:
                break
            position += entry.message_count
        return position

    cdef void count_in(self, TopicOrder* order, Session* session, OrderEntry* entry) noexcept nogil:
        """Make sure that a session counts an entry which is in the log."""
        if order.order == 5:
            session.expected = max(session.expected, entry.batch_sequence + 1)
        elif entry.batch_sequence >= session.expected and entry.batch_sequence - session.expected < WINDOW:
            note_in_log(session, entry.batch_sequence)

    cdef void take_ordered(self, uint64_t topic, uint64_t broker) noexcept nogil:
        cdef uint64_t at = self.layout.offset_sequencer(topic, broker), i = topic * self.layout.g.broker_count + broker
        cdef OffsetSequencerLine line
        cdef uint64_t index, committed = self.committed[topic]
        cdef OrderEntry entry
        cdef Ordered* ordered = &self.order.ordered[i]
        self.memory.read_line(at, &line)
        ordered.scanned = line.scanned
        ordered.messages = line.ordered
        ordered.nbytes = line.ordered_bytes
        ordered.address = line.ordered_address
        # Written with the frontier and after it, and either may have been lost: what lies between the two is counted.
        for index in range(max(line.counted_index, self.order.topics[topic].reclaimed_index), committed):
            self.memory.read_line(self.layout.order_entry(topic, index), &entry)
            if entry.broker == broker:
                ordered.messages += entry.message_count
                ordered.nbytes += entry.payload_bytes
        for index in range(committed, min(line.counted_index, committed + self.layout.g.order_entry_count)):
            if self.is_uncommitted(topic, index, &entry) and entry.broker == broker:
                ordered.messages -= entry.message_count
                ordered.nbytes -= entry.payload_bytes

    cdef void adopt(self, uint64_t topic) noexcept nogil:
        """Give the next numbers to what the last head had written and not committed, as far as its session is whole."""
        cdef TopicOrder* order = &self.order.topics[topic]
        cdef uint64_t index, at, key = order.generation << 16 | topic
        cdef OrderEntry entry
        cdef Session* session
        for index in range(self.committed[topic], order.reclaimed_index + self.layout.g.order_entry_count):
            if not self.is_uncommitted(topic, index, &entry):
                continue
            session = self.session_of(&entry, key)
            if session != NULL:
                if order.order == 5 and entry.batch_sequence > session.expected:
                    continue                    # what comes before it is not there: it lies in a ring, and waits for it
                if order.order == 5 and entry.batch_sequence == session.expected and (
                        session.state & 0xFF != SESSION_OPEN):
                    continue                    # its high-water mark is final
                self.count_in(order, session, &entry)
            self.renumber(topic, &entry)
            if session != NULL:
                session.position = max(session.position, order.committed_position)

    cdef bint is_uncommitted(self, uint64_t topic, uint64_t index, OrderEntry* entry) noexcept nogil:
        """Whether the last head wrote this entry; if not, an earlier one left it, or it is not whole."""
        return (self.read_entry(topic, index, entry) and entry.epoch == <uint16_t>self.source_epoch
                and self.is_sound(entry))

    cdef bint is_sound(self, OrderEntry* entry) noexcept nogil:
        return (entry.message_count > 0 and entry.broker < self.layout.g.broker_count and entry.payload_offset % 64 == 0
                and entry.payload_offset >= self.layout.g.segments
                and entry.payload_bytes <= self.layout.g.batch_bytes_max
                and entry.payload_offset <= self.layout.g.region_bytes - entry.payload_bytes)

    cdef void renumber(self, uint64_t topic, OrderEntry* entry) noexcept nogil:
        cdef TopicOrder* order = &self.order.topics[topic]
        cdef uint64_t at = self.layout.order_entry(topic, order.committed_index)
        cdef Ordered* ordered = &self.order.ordered[topic * self.layout.g.broker_count + entry.broker]
        entry.commit = make_tag(order.generation, order.committed_index)
        entry.position = order.committed_position
        entry.epoch = <uint16_t>self.order.epoch
        self.memory.write_line(at, entry)
        self.memory.flush(at, 64)
        order.committed_index += 1
        order.committed_position += entry.message_count
        order.committed_bytes += entry.payload_bytes
        ordered.messages += entry.message_count
        ordered.nbytes += entry.payload_bytes
        self.adopted += 1

    # ---- results -------------------------------------------------------------------------------------------------------

    cdef void take_results(self, uint64_t topic, uint64_t broker) noexcept nogil:
        """Results that stand, for what is not released; the rest of the ring is empty, and what lies there classified anew."""
        cdef TopicOrder* order = &self.order.topics[topic]
        cdef uint64_t line = self.layout.offset_broker(topic, broker), slots = self.layout.g.ring_slot_count, slot, at
        cdef uint64_t tail, delegated
        cdef ScanPlace* place = &self.places[topic * self.layout.g.broker_count + broker]
        cdef BatchHeader header
        cdef BatchResult result
        self.zero(self.layout.result(topic, broker, 0), slots * sizeof(BatchResult))
        place.generation = order.generation
        place.scanned = place.rescan_to = 0
        self.memory.invalidate(line, 64)
        if self.memory.load(line + 48) != order.generation:
            return
        # Read before the frontier that it must not pass: a broker releases while we look.
        tail = self.memory.load(line + 56)
        delegated = self.memory.load(line)
        if delegated < tail or delegated - tail > slots:
            return                              # damaged: the scanner counts it
        place.scanned = tail
        place.rescan_to = delegated
        for slot in range(tail, delegated):
            at = self.layout.ring(topic, broker, slot)
            self.memory.invalidate(at, 64)
            if not self.memory.read_line(at, &header) or header.complete != make_tag(order.generation, slot):
                continue
            if self.standing(topic, broker, slot, &header, &result):
                at = self.layout.result(topic, broker, slot)
                self.memory.store(at + 8, result.position)
                self.memory.store(at, result.state)
                self.memory.flush(at, 16)

    cdef bint standing(self, uint64_t topic, uint64_t broker, uint64_t slot, BatchHeader* header,
                       BatchResult* result) noexcept nogil:
        """Whether the source's result of a slot stands, or follows from what was adopted."""
        cdef TopicOrder* order = &self.order.topics[topic]
        cdef uint64_t at = self.source.result(topic, broker, slot), tag = result_tag(order.generation, slot), status
        self.memory.invalidate(at, 16)
        result.state = self.memory.load(at)
        result.position = self.memory.load(at + 8)
        if result.state & ~STATUS_MASK != tag:
            # Lost with the old head, and the entry was not: as a duplicate of itself it would not hold its payload.
            result.state = tag | <uint64_t>RESULT_COMMITTED << 40
            return self.is_adopted(topic, broker, header, result)
        status = result.state >> 40 & 0xFF
        if status == RESULT_COMMITTED:
            return (result.position + header.message_count <= self.positions[topic]
                    or self.is_adopted(topic, broker, header, result))
        return status != RESULT_DUPLICATE or result.position <= self.positions[topic]

    cdef bint is_adopted(self, uint64_t topic, uint64_t broker, BatchHeader* header,
                         BatchResult* result) noexcept nogil:
        """Whether the very batch of a header is in the log by an adopted entry; its position."""
        cdef uint64_t index
        cdef OrderEntry entry
        for index in range(self.committed[topic], self.order.topics[topic].committed_index):
            self.memory.read_line(self.layout.order_entry(topic, index), &entry)
            if entry.payload_offset == header.payload_offset and entry.broker == broker:
                result.position = entry.position
                return True
        return False

    cdef void write_frontier(self, uint64_t topic) noexcept nogil:
        cdef TopicOrder* order = &self.order.topics[topic]
        cdef uint64_t line = self.layout.topic_order(topic)
        self.memory.fence()
        self.memory.store(line + 16, self.order.epoch)
        self.memory.store(line + 24, order.committed_bytes)
        self.memory.store(line, order.committed_index)
        self.memory.store(line + 8, order.committed_position)
        self.memory.flush(line, 64)

    # ---- the end -------------------------------------------------------------------------------------------------------

    cdef void serve(self) noexcept nogil:
        cdef HeadLine line
        self.memory.read_line(self.layout.head_line(), &line)
        line.source_epoch = self.source_epoch
        line.live_brokers = self.memory.load(self.source.head_line() + 40) if self.source is not None else 0
        line.adopted = self.adopted
        line.served_ns = self.clock.now_ns()
        self.memory.write_line(self.layout.head_line(), &line)
        self.memory.flush(self.layout.head_line(), 64)
        self.memory.fence()
        self.memory.full_fence()
        crash_point(CRASH_RECOVERED)
        if self.memory.compare_and_swap(self.layout.control(), self.control, self.order.control):
            self.phase = TAKE_DONE
        else:
            self.phase = TAKE_LOST

    def prepare(self, Scanner scanner) -> None:
        """Let a scanner of `order` go on where the rings were released, and look everywhere."""
        cdef uint64_t i, b
        for i in range(self.topic_count * self.layout.g.broker_count):
            scanner.places[i] = self.places[i]
        for b in range(self.layout.g.broker_count):
            scanner.sessions_seen[b] = ~self.memory.load(self.layout.broker(b) + 40)
        scanner.prepare_to_sleep()
