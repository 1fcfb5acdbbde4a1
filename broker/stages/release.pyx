"""Release: takes back ring slots whose batch has its result, and segments whose messages are reclaimed."""

from libc.stdint cimport int64_t, uint64_t

from broker.head cimport HeadView
from broker.layout cimport Layout, RESULT_COMMITTED, RESULT_DUPLICATE, result_tag
from broker.log cimport BrokerLog, OpenSegment, Slot, TopicLog, dirty_add, dirty_take
from broker.planted cimport PLANT_HELD_FREED, PLANT_RESULT_NOT_AWAITED, PLANT_SEGMENT_EARLY, planted
from broker.stages.stage cimport LOOK_TOPICS, Stage
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count_trailing_zeros, cxl_load_acquire, cxl_load_relaxed, cxl_store_release

cdef enum:
    STEP_SLOTS = 256
    ORPHAN_STEPS = 4096         # a thread that never sleeps looks so often whether orphaned segments may go

cdef uint64_t STATUS_MASK = <uint64_t>0xFF << 40


cdef class Release(Stage):
    """One broker's release stage, for all its topics."""

    def __init__(self, Memory memory, BrokerLog log):
        self.memory = memory
        self.head = HeadView(memory, log.layout)
        self.layout = self.head.layout
        self.log = log
        self.broker = log.broker

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t word, bits, topic, answer, reclaims
        cdef int64_t work = 0
        if not self.head.begin():
            return 0
        if self.head.control != self.control_seen:
            self.control_seen = self.head.control
            self.look_at_all()
        answer = self.layout.reclaim_answer(self.broker)
        self.memory.invalidate(answer, 64)
        reclaims = self.memory.load(answer + 32)
        if reclaims != self.reclaims_seen:
            self.reclaims_seen = reclaims
            self.look_at_all()
        self.steps += 1
        if self.log.orphan_count and (self.orphans_due or self.steps % ORPHAN_STEPS == 0):
            self.orphans_due = 0
            work += self.log.free_orphans()
        for word in range(self.log.dirty_words):
            bits = dirty_take(&self.log.to_release, word)
            while bits:
                topic = word * 64 + cxl_count_trailing_zeros(bits)
                bits &= bits - 1
                if cxl_load_relaxed(&self.log.topics[topic].generation):
                    work += self.release_slots(topic)
                    work += self.release_segments(topic)
        return work

    cdef void prepare_to_sleep(self) noexcept nogil:
        self.orphans_due = 1
        self.look(min(self.layout.g.topic_count_max, <uint64_t>LOOK_TOPICS))

    cdef void look_at_all(self) noexcept nogil:
        self.orphans_due = 1
        self.look(self.layout.g.topic_count_max)

    cdef void look(self, uint64_t count) noexcept nogil:
        cdef uint64_t i
        for i in range(count):
            if cxl_load_relaxed(&self.log.topics[self.next_look].generation):
                dirty_add(&self.log.to_release, self.next_look)
            self.next_look = (self.next_look + 1) % self.layout.g.topic_count_max

    cdef int64_t release_slots(self, uint64_t topic) noexcept nogil:
        cdef TopicLog* log = &self.log.topics[topic]
        cdef uint64_t tail = log.tail, at, state, end, number, status, committed
        cdef Slot* slot
        cdef OpenSegment* segment
        self.memory.invalidate(self.layout.topic_order(topic), 64)
        committed = self.memory.load(self.layout.topic_order(topic) + 8)
        while tail < log.delegated and tail - log.tail < STEP_SLOTS:
            at = self.layout.result(topic, self.broker, tail)
            self.memory.invalidate(at, 16)
            state = self.memory.load(at)
            if state & ~STATUS_MASK != result_tag(log.opened, tail) and not (
                    planted(PLANT_HELD_FREED)
                    and tail < self.memory.load(self.layout.offset_sequencer(topic, self.broker))):
                break
            slot = &log.slots[tail & (self.layout.g.ring_slot_count - 1)]
            if cxl_load_acquire(&slot.awaited) and not planted(PLANT_RESULT_NOT_AWAITED) and not planted(PLANT_HELD_FREED):
                break                           # the next batch in this slot would overwrite its result
            status = state >> 40 & 0xFF
            end = self.memory.load(at + 8) + (slot.messages if status == RESULT_COMMITTED else 0)
            if (status == RESULT_COMMITTED or status == RESULT_DUPLICATE) and end > committed:
                break                           # the next head may say something else
            if not self.head.same():
                break
            if status == RESULT_COMMITTED:
                for number in range(slot.first_segment, slot.last_segment + 1):
                    segment = &self.log.segments[number]
                    segment.end_position = max(segment.end_position, end)
            tail += 1
        if tail < log.delegated:
            dirty_add(&self.log.to_release, topic)
        end = tail - log.tail
        if end:
            at = self.layout.offset_broker(topic, self.broker)
            self.memory.store(at + 56, tail)
            # The head judges by it which rings are full, and a ring that is full moves nothing else of this line.
            self.memory.flush(at, 64)
            self.memory.fence()
            cxl_store_release(&log.tail, tail)
        return <int64_t>end

    cdef int64_t release_segments(self, uint64_t topic) noexcept nogil:
        """Give back segments below the reclaimed frontier that nobody fills any more."""
        cdef TopicLog* log = &self.log.topics[topic]
        cdef uint64_t reclaimed, filling_from, filling_to, number, following
        cdef OpenSegment* segment
        cdef int64_t done = 0
        if log.segment_count == 0 or not log.ends_known:
            return 0
        self.memory.invalidate(self.layout.topic_reclaim(topic), 64)
        reclaimed = self.memory.load(self.layout.topic_reclaim(topic) + 8)
        if not self.head.same():
            return 0
        if reclaimed == log.release_seen and not log.release_again:
            return 0
        self.log.lock()
        log.release_seen = reclaimed
        log.release_again = 0
        if log.give_up_run:
            log.give_up_run = 0
            self.give_up_run(log, reclaimed)
        # The run that is being filled keeps its segments from the cursor's on.
        filling_from = filling_to = 0
        if log.end:
            filling_from = self.log.segment_of(log.cursor)
            filling_to = self.log.segment_of(log.end)
        following = log.first_held
        while following:
            number = following - 1
            segment = &self.log.segments[number]
            following = segment.next
            if planted(PLANT_SEGMENT_EARLY):
                reclaimed = segment.end_position
            if segment.leased or segment.end_position > reclaimed or filling_from <= number < filling_to:
                continue
            if segment.used_to > log.tail:
                log.release_again = 1           # a batch in it has no result yet
                continue
            self.log.drop_segment(topic, number)
            done += 1
        self.log.unlock()
        return done

    cdef void give_up_run(self, TopicLog* log, uint64_t reclaimed) noexcept nogil:
        """Room is short: an open run whose messages are all reclaimed is no longer kept for the next ones. The lock is held."""
        cdef uint64_t number
        cdef OpenSegment* segment
        if log.end == 0:
            return
        number = self.log.segment_of(log.cursor - 1)
        segment = &self.log.segments[number]
        if segment.used_to > log.tail:
            log.give_up_run = log.release_again = 1
        elif segment.end_position <= reclaimed:
            log.cursor = log.end = 0
