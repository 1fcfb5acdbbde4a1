"""Release: takes back ring slots whose batch has its result, and segments whose messages are reclaimed."""

from libc.stdint cimport int64_t, uint64_t

from broker.layout cimport Layout, RESULT_COMMITTED, SegmentLine, make_tag
from broker.log cimport BrokerLog, DIRTY_WORDS, OpenSegment, Slot, TopicLog, dirty_add, dirty_take
from broker.stages.stage cimport Stage
from libc.string cimport memset
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count, cxl_count_trailing_zeros, cxl_load_relaxed, cxl_store_release

cdef enum:
    STEP_SLOTS = 256

cdef uint64_t STATUS_MASK = <uint64_t>0xFF << 40


cdef class Release(Stage):
    """One broker's release stage, for all its topics."""

    def __init__(self, Memory memory, BrokerLog log):
        self.memory = memory
        self.layout = log.layout
        self.log = log
        self.broker = log.broker

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t word, bits, topic, answer = self.layout.reclaim_answer(self.broker), reclaims
        cdef int64_t work = 0
        self.memory.invalidate(answer, 64)
        reclaims = self.memory.load(answer + 32)
        if reclaims != self.reclaims_seen:
            self.reclaims_seen = reclaims
            self.prepare_to_sleep()
        for word in range(DIRTY_WORDS):
            bits = dirty_take(&self.log.to_release, word)
            while bits:
                topic = word * 64 + cxl_count_trailing_zeros(bits)
                bits &= bits - 1
                if cxl_load_relaxed(&self.log.topics[topic].generation):
                    work += self.release_slots(topic)
                    work += self.release_segments(topic)
        return work

    cdef void prepare_to_sleep(self) noexcept nogil:
        cdef uint64_t topic
        for topic in range(self.layout.g.topic_count_max):
            if cxl_load_relaxed(&self.log.topics[topic].generation):
                dirty_add(&self.log.to_release, topic)

    cdef int64_t release_slots(self, uint64_t topic) noexcept nogil:
        cdef TopicLog* log = &self.log.topics[topic]
        cdef uint64_t tail = log.tail, at, state, end, ordinal
        cdef Slot* slot
        cdef OpenSegment* segment
        while tail < log.delegated and tail - log.tail < STEP_SLOTS:
            at = self.layout.result(topic, self.broker, tail)
            self.memory.invalidate(at, 16)
            state = self.memory.load(at)
            if state & ~STATUS_MASK != make_tag(log.opened, tail):
                break
            slot = &log.slots[tail & (self.layout.g.ring_slot_count - 1)]
            if state >> 40 & 0xFF == RESULT_COMMITTED:
                end = self.memory.load(at + 8) + slot.messages
                for ordinal in range(slot.first_ordinal, slot.last_ordinal + 1):
                    segment = &log.segments[ordinal % self.log.segment_ring]
                    segment.end_position = max(segment.end_position, end)
            tail += 1
        if tail < log.delegated:
            dirty_add(&self.log.to_release, topic)
        end = tail - log.tail
        if end:
            self.memory.store(self.layout.offset_broker(topic, self.broker) + 56, tail)
            cxl_store_release(&log.tail, tail)
        return <int64_t>end

    cdef int64_t release_segments(self, uint64_t topic) noexcept nogil:
        """Give back closed segments below the reclaimed frontier, oldest first."""
        cdef TopicLog* log = &self.log.topics[topic]
        cdef uint64_t reclaimed, current
        cdef OpenSegment* segment
        cdef SegmentLine line
        cdef int64_t done = 0
        if log.segments_tail == log.segments_head:
            return 0
        self.memory.invalidate(self.layout.topic_reclaim(topic), 64)
        reclaimed = self.memory.load(self.layout.topic_reclaim(topic) + 8)
        memset(&line, 0, sizeof(line))
        self.log.lock()
        current = log.run_ordinal + (log.cursor - log.run_start) // self.layout.g.segment_bytes
        while log.segments_tail < current:
            segment = &log.segments[log.segments_tail % self.log.segment_ring]
            if segment.last_slot >= log.tail or segment.end_position > reclaimed:
                break
            self.memory.write_line(self.layout.segment_line(segment.segment), &line)
            self.memory.flush(self.layout.segment_line(segment.segment), 64)
            self.log.pool.release(segment.segment)
            log.segments_tail += 1
            done += 1
        self.log.unlock()
        cxl_count(&self.log.counters.segments_released, done)
        return done
