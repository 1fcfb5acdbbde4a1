"""Acks: follows the results of each publish stream's batches and says when their level is reached.

Level 1 is reached when the batch lies below the topic's committed frontier; level 2 when the durable frontier of every
replica of the topic has passed it as well; where one of them has failed, level 2 is refused. A stream's batches are settled in the order in which they came: only the first waiting
one is polled, so a step costs one look per stream, not per batch. A result is taken from its slot as soon as it is
committed, whatever the level still waits for: the slot is free for the next batch only then. A result counts only when
the frontier has passed it, under the same head: what a replaced head wrote is looked for anew in the bank of the next.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from broker.crash cimport CRASH_BEFORE_ACK, crash_point
from broker.head cimport HeadView
from broker.layout cimport Layout, RESULT_COMMITTED, RESULT_DUPLICATE, RESULT_FENCED, RESULT_UNDURABLE, result_tag
from broker.log cimport BrokerLog, TopicLog, dirty_add
from broker.notifier cimport Notifier
from broker.placement cimport Durable, durable_frontier
from broker.planted cimport PLANT_ACK_EARLY, PLANT_LEVEL_IGNORED, PLANT_OLD_HEAD_ACKS, planted
from broker.stages.stage cimport Stage
from broker.wire cimport encode_acks
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport (
    cxl_count, cxl_load_acquire, cxl_load_relaxed, cxl_store_release,
)

cdef enum:
    STEP_ACKS = 64

cdef uint64_t STATUS_MASK = <uint64_t>0xFF << 40


cdef class AckStage(Stage):
    """The ack stage of one broker, for all its publish streams."""

    def __cinit__(self):
        self.streams = NULL

    def __init__(self, Memory memory, BrokerLog log, Notifier notifier):
        self.memory = memory
        self.head = HeadView(memory, log.layout)
        self.layout = self.head.layout
        self.log = log
        self.broker = log.broker
        self.notifier = notifier
        self.streams = <AckStream*>calloc(STREAM_COUNT, sizeof(AckStream))
        if self.streams == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef int i
        if self.streams != NULL:
            for i in range(STREAM_COUNT):
                free(self.streams[i].waiting)
                free(self.streams[i].acks)
            free(self.streams)

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t i
        cdef int64_t work = 0
        cdef bint notify = False
        cdef AckStream* stream
        for i in range(cxl_load_acquire(&self.stream_limit)):
            stream = &self.streams[i]
            if cxl_load_acquire(&stream.active) == 0:
                continue
            if cxl_load_relaxed(&stream.active) == 2:
                self.let_go(stream)
                cxl_store_release(&stream.active, 0)
            elif stream.waiting_tail != cxl_load_acquire(&stream.waiting_head):
                work += self.poll_stream(stream)
        if self.completion_line:
            self.memory.flush(self.completion_line, 64)
            self.completion_line = 0
        if work:
            self.memory.full_fence()
            for i in range(self.stream_limit):
                if self.streams[i].active == 1 and self.streams[i].slot_and_one and self.streams[i].news:
                    self.streams[i].news = 0
                    self.ring_client(self.streams[i].slot_and_one - 1)
                elif self.streams[i].news:
                    self.streams[i].news = 0
                    notify = True
        if notify:
            self.notifier.notify()
        return work

    cdef void ring_client(self, uint64_t slot) noexcept nogil:
        cdef uint64_t bell = self.layout.attach_doorbell(slot)
        if self.memory.load(bell + 8):
            self.memory.fetch_add(bell, 1)
            self.memory.wake(bell)

    cdef void complete(self, AckStream* stream, Ack* ack) noexcept nogil:
        """Tell an attached client: completion n answers its descriptor n. Four share a line."""
        cdef uint64_t at = self.layout.attach_completion(stream.slot_and_one - 1, stream.acks_head)
        cdef uint64_t line = at & ~<uint64_t>63
        self.memory.store(at + 8, ack.position)
        self.memory.store(at, result_tag(stream.slot_generation, stream.acks_head) | ack.status << 40)
        if self.completion_line and self.completion_line != line:
            self.memory.flush(self.completion_line, 64)
        self.completion_line = line

    cdef int64_t poll_stream(self, AckStream* stream) noexcept nogil:
        cdef int64_t done = 0
        self.take_results(stream)
        while stream.waiting_tail < stream.taken and done < STEP_ACKS:
            if stream.acks_head - cxl_load_acquire(&stream.acks_tail) >= STREAM_BATCHES:
                break                       # the event loop has not taken the earlier ones yet
            if not self.settled(stream, &stream.waiting[stream.waiting_tail % STREAM_BATCHES],
                                &stream.acks[stream.acks_head % STREAM_BATCHES]):
                break
            if stream.slot_and_one:
                self.complete(stream, &stream.acks[stream.acks_head % STREAM_BATCHES])
                stream.acks_tail = stream.acks_head + 1
            cxl_store_release(&stream.waiting_tail, stream.waiting_tail + 1)
            cxl_store_release(&stream.acks_head, stream.acks_head + 1)
            done += 1
        if done:
            crash_point(CRASH_BEFORE_ACK)
            stream.news = 1
            cxl_count(&self.log.counters.acks_sent, done)
        return done

    cdef void take_results(self, AckStream* stream) noexcept nogil:
        """Take the results that are there, and can no longer change, from their slots."""
        cdef uint64_t head = cxl_load_acquire(&stream.waiting_head), mask = self.layout.g.ring_slot_count - 1, at, state
        cdef uint64_t order, status, position, end
        cdef TopicLog* log = &self.log.topics[stream.topic]
        cdef Waiting* waiting
        cdef bint serving = (planted(PLANT_OLD_HEAD_ACKS) and self.head.control != 0) or self.head.begin()
        order = self.layout.topic_order(stream.topic)
        while stream.taken < head:
            waiting = &stream.waiting[stream.taken % STREAM_BATCHES]
            if cxl_load_acquire(&log.opened) != stream.generation:
                waiting.status = RESULT_FENCED          # its topic is gone, and the session with it
            elif not serving:
                break
            else:
                at = self.layout.result(stream.topic, self.broker, waiting.slot)
                self.memory.invalidate(at, 16)
                state = self.memory.load(at)
                if state & ~STATUS_MASK != result_tag(stream.generation, waiting.slot):
                    break
                status = state >> 40 & 0xFF
                position = self.memory.load(at + 8)
                if status == RESULT_COMMITTED or status == RESULT_DUPLICATE:
                    end = position + (waiting.messages if status == RESULT_COMMITTED else 0)
                    self.memory.invalidate(order, 64)
                    if self.memory.load(order + 8) < end and not planted(PLANT_ACK_EARLY):
                        break
                if not self.head.same() and not planted(PLANT_OLD_HEAD_ACKS):
                    break
                waiting.status = status
                waiting.position = position
                cxl_store_release(&log.slots[waiting.slot & mask].awaited, 0)
            stream.taken += 1

    cdef void let_go(self, AckStream* stream) noexcept nogil:
        """Nobody waits for the stream's results any more."""
        cdef uint64_t head = cxl_load_acquire(&stream.waiting_head), mask = self.layout.g.ring_slot_count - 1
        cdef TopicLog* log = &self.log.topics[stream.topic]
        if cxl_load_acquire(&log.opened) == stream.generation:
            while stream.taken < head:
                cxl_store_release(&log.slots[stream.waiting[stream.taken % STREAM_BATCHES].slot & mask].awaited, 0)
                stream.taken += 1
            dirty_add(&self.log.to_release, stream.topic)

    cdef bint settled(self, AckStream* stream, Waiting* waiting, Ack* ack) noexcept nogil:
        """Whether a batch whose result was taken has reached the stream's level; then `ack` says what it is."""
        cdef uint64_t end, failure = 0
        ack.sequence = waiting.sequence
        ack.status = waiting.status
        ack.position = waiting.position
        if ack.status != RESULT_COMMITTED and ack.status != RESULT_DUPLICATE:
            return True
        if cxl_load_acquire(&self.log.topics[stream.topic].opened) != stream.generation:
            ack.status = RESULT_FENCED
            return True
        end = ack.position + (waiting.messages if ack.status == RESULT_COMMITTED else 0)
        if stream.level != 2 or planted(PLANT_LEVEL_IGNORED) or (
                self.head.begin() and self.is_durable(stream, end, &failure) and self.head.same()):
            return True
        if failure:
            ack.status = RESULT_UNDURABLE
            ack.position = failure
        return failure != 0

    cdef bint is_durable(self, AckStream* stream, uint64_t end, uint64_t* failure) noexcept nogil:
        """Whether everything below position `end` is durable. `failure` is set to replica << 32 | errno when one has failed
        which that would take."""
        cdef Durable found = durable_frontier(self.memory, self.layout, stream.topic, stream.generation,
                                              stream.replication_factor)
        failure[0] = found.failure if found.failed_from < end else 0
        return found.position >= end

    cdef uint64_t room(self, uint64_t number) noexcept nogil:
        """How many more batches the stream may have waiting."""
        cdef AckStream* stream = &self.streams[number]
        return STREAM_BATCHES - (stream.waiting_head - cxl_load_acquire(&stream.waiting_tail))

    cdef bint expect(self, uint64_t number, uint64_t sequence, uint64_t slot, uint64_t messages) noexcept nogil:
        """Note a batch that waits for its ack. Called by the receiver of that stream only."""
        cdef AckStream* stream = &self.streams[number]
        cdef Waiting* waiting = &stream.waiting[stream.waiting_head % STREAM_BATCHES]
        if self.room(number) == 0:
            return False
        waiting.sequence = sequence
        waiting.slot = slot
        waiting.messages = messages
        cxl_store_release(&stream.waiting_head, stream.waiting_head + 1)
        return True

    def open_stream(self, uint64_t topic, uint64_t generation, uint64_t level, uint64_t replication_factor) -> int:
        """Register a publish stream; its number. Raises RuntimeError when all are in use."""
        cdef int64_t number = self.open_number(topic, generation, level, replication_factor)
        if number == -2:
            raise MemoryError
        if number < 0:
            raise RuntimeError(f"this broker serves {STREAM_COUNT} publish streams already")
        return number

    cdef int64_t open_number(self, uint64_t topic, uint64_t generation, uint64_t level,
                             uint64_t replication_factor) noexcept nogil:
        """A free stream's number; -1 when all are in use, -2 without memory."""
        cdef uint64_t i
        cdef AckStream* stream
        for i in range(STREAM_COUNT):
            stream = &self.streams[i]
            if cxl_load_acquire(&stream.active):
                continue
            if stream.waiting == NULL:
                stream.waiting = <Waiting*>calloc(STREAM_BATCHES, sizeof(Waiting))
                stream.acks = <Ack*>calloc(STREAM_BATCHES, sizeof(Ack))
                if stream.waiting == NULL or stream.acks == NULL:
                    return -2
            stream.topic = topic
            stream.generation = generation
            stream.level = level
            stream.replication_factor = replication_factor
            stream.slot_and_one = stream.news = 0
            stream.waiting_head = stream.waiting_tail = stream.taken = stream.acks_head = stream.acks_tail = 0
            cxl_store_release(&stream.active, 1)
            if i >= self.stream_limit:
                cxl_store_release(&self.stream_limit, i + 1)
            return i
        return -1

    def close_stream(self, uint64_t number) -> None:
        """Forget a stream; what it has in memory is ordered all the same."""
        cxl_store_release(&self.streams[number].active, 2)

    def has_acks(self, uint64_t number) -> bool:
        """Whether settled batches wait to be taken."""
        return cxl_load_acquire(&self.streams[number].acks_head) != self.streams[number].acks_tail

    def ready_count(self, uint64_t number) -> int:
        """Settled batches that wait to be taken."""
        return cxl_load_acquire(&self.streams[number].acks_head) - self.streams[number].acks_tail

    def waiting_count(self, uint64_t number) -> int:
        """Batches of the stream that are not settled yet."""
        return STREAM_BATCHES - self.room(number)

    def take_acks(self, uint64_t number, uint64_t epoch) -> bytes:
        """The settled batches as an encoded PublishResponse; empty when there is none."""
        cdef AckStream* stream = &self.streams[number]
        cdef uint64_t head = cxl_load_acquire(&stream.acks_head)
        if head == stream.acks_tail:
            return b""
        response = encode_acks(stream.acks, STREAM_BATCHES, stream.acks_tail, head, epoch)
        cxl_store_release(&stream.acks_tail, head)
        return response
