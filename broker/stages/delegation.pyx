"""Delegation: takes complete batches in ring order, orders them within the broker, and makes their headers visible.

Header lines are flushed in groups of at most 8 batches or 64 KiB of payload, with one fence, and only then does the
frontier move: a sequencer that sees the frontier sees the headers, and through the receiver's fence the payloads.
A step ends by publishing what is left over, so no batch waits for others to come.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from broker.doorbell cimport Doorbell
from broker.layout cimport BatchHeader, Layout, make_tag
from broker.log cimport BrokerLog, TopicLog, dirty_add, dirty_take
from broker.planted cimport PLANT_TAIL_UNFLUSHED, planted
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count, cxl_count_trailing_zeros, cxl_load_acquire

cdef enum:
    GROUP_BATCHES = 8
    GROUP_BYTES = 65536
    STEP_BATCHES = 64


cdef class Delegation(Stage):
    """One broker's delegation stage, for all its topics."""

    def __init__(self, Memory memory, BrokerLog log, Doorbell head_doorbell):
        self.memory = memory
        self.layout = log.layout
        self.log = log
        self.broker = log.broker
        self.head_doorbell = head_doorbell
        self.counts = <uint64_t*>calloc(3 * self.layout.g.topic_count_max, 8)
        if self.counts == NULL:
            raise MemoryError
        self.generations = self.counts + 2 * self.layout.g.topic_count_max
        for word in range((self.layout.g.topic_count_max + 7) // 8):
            self.activity[word] = memory.load(self.layout.broker_activity(self.broker) + word * 8)

    def __dealloc__(self):
        free(self.counts)

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t word, bits, topic
        cdef int64_t work = 0
        for word in range(self.log.dirty_words):
            bits = dirty_take(&self.log.to_delegate, word)
            while bits:
                topic = word * 64 + cxl_count_trailing_zeros(bits)
                bits &= bits - 1
                work += self.delegate(topic)
        if work:
            self.memory.fence()
            self.head_doorbell.ring()
        return work

    cdef int64_t delegate(self, uint64_t topic) noexcept nogil:
        cdef TopicLog* log = &self.log.topics[topic]
        cdef uint64_t first = log.delegated, slot = first, group_bytes = 0, at, count_and_bytes
        cdef uint64_t head = cxl_load_acquire(&log.head), tag
        cdef int64_t done = 0
        if cxl_load_acquire(&log.generation) == 0:
            return 0                        # quiesced: its lines may be another topic's soon
        if self.generations[topic] != log.opened:
            # Zero for a new topic, and for one that an earlier process of this broker served, where it stood.
            self.generations[topic] = log.opened
            self.counts[2 * topic] = self.memory.load(self.layout.offset_broker(topic, self.broker) + 8)
            self.counts[2 * topic + 1] = self.memory.load(self.layout.offset_broker(topic, self.broker) + 16)
        while slot < head and done < STEP_BATCHES:
            at = self.layout.ring(topic, self.broker, slot)
            tag = make_tag(log.opened, slot)
            if self.memory.load(at) != tag:
                break                       # reserved, still being filled: its completion marks the topic again
            count_and_bytes = self.memory.load(at + 16)
            self.counts[2 * topic] += count_and_bytes >> 32
            self.counts[2 * topic + 1] += <uint32_t>count_and_bytes
            # Broker-local order beside the flags, still this broker's line.
            self.memory.store(at + 56, <uint32_t>self.memory.load(at + 56) | (self.counts[2 * topic] << 32))
            group_bytes += <uint32_t>count_and_bytes
            slot += 1
            done += 1
            if slot - first >= GROUP_BATCHES or group_bytes >= GROUP_BYTES:
                self.publish(topic, first, slot)
                first = slot
                group_bytes = 0
        if slot > first and not planted(PLANT_TAIL_UNFLUSHED):
            self.publish(topic, first, slot)
        if done == STEP_BATCHES:
            dirty_add(&self.log.to_delegate, topic)
        return done

    cdef void publish(self, uint64_t topic, uint64_t first, uint64_t last) noexcept nogil:
        cdef uint64_t line = self.layout.offset_broker(topic, self.broker), slot, word
        cdef TopicLog* log = &self.log.topics[topic]
        cdef uint8_t* counts = <uint8_t*>&self.activity[0]
        for slot in range(first, last):
            self.memory.flush(self.layout.ring(topic, self.broker, slot), 64)
        self.memory.fence()
        self.memory.store(line + 8, self.counts[2 * topic])
        self.memory.store(line + 16, self.counts[2 * topic + 1])
        self.memory.store(line + 24, self.memory.load(self.layout.ring(topic, self.broker, last - 1) + 8))
        self.memory.store(line, last)
        self.memory.flush(line, 64)
        counts[topic] += 1
        word = topic // 8
        self.memory.store(self.layout.broker_activity(self.broker) + word * 8, self.activity[word])
        self.memory.flush(self.layout.broker_activity(self.broker) + word * 8, 8)
        log.delegated = last
        dirty_add(&self.log.to_release, topic)
        cxl_count(&self.log.counters.delegation_flushes, 1)
