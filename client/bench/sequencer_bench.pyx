"""The hot loops of the stage benchmarks, without the GIL: filling rings, stepping scanners, feeding whole pipelines.

The stages are the product's own objects over a private region; nothing here stands in for them.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from broker.layout cimport RESULT_COMMITTED, Layout
from broker.log cimport RESERVED, TopicLog
from broker.stages.ack cimport STREAM_BATCHES, AckStage, AckStream
from broker.stages.receiver cimport Receiver
from broker.stages.sequencer cimport OrderState, Scanner, TopicOrder
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_load_acquire, cxl_now_ns, cxl_store_release, cxl_yield

cdef enum:
    PAYLOAD_BYTES = 64
    TOPICS_MAX = 64
    GIVE_UP_NS = 30000000000

BATCH_BYTES = PAYLOAD_BYTES


class BenchError(RuntimeError):
    """A stage did not do what the benchmark needs; the message says what."""


# ---- the sequencer alone -------------------------------------------------------------------------------------------


def fill_ring(Receiver receiver, uint64_t topic, uint64_t client, uint64_t session, uint64_t first_sequence,
              uint64_t count) -> None:
    """Receive `count` batches of one tiny message of a session (epoch 1). Raises `BenchError`."""
    cdef uint8_t payload[PAYLOAD_BYTES]
    cdef uint64_t i, slot = 0
    cdef int status = RESERVED
    cdef TopicLog* log = &receiver.log.topics[topic]
    memset(payload, 0, PAYLOAD_BYTES)
    with nogil:
        for i in range(count):
            status = receiver.receive_payload(topic, log.generation, payload, PAYLOAD_BYTES, 1, client, session, 1,
                                              first_sequence + i, 0, &slot)
            if status != RESERVED:
                break
            # No stream will take the result: the slot need not be kept for one.
            cxl_store_release(&log.slots[slot & (receiver.layout.g.ring_slot_count - 1)].awaited, 0)
    if status != RESERVED:
        raise BenchError(f"batch {i} of {count} was not received: reserve status {status}")


cdef bint _is_behind(Scanner scanner, uint64_t* topics, uint64_t count) noexcept nogil:
    """Whether one of the scanner's brokers has delegated what the scanner has not looked at."""
    cdef uint64_t b, i, brokers = scanner.layout.g.broker_count
    for i in range(count):
        for b in range(brokers):
            if (scanner.broker_mask >> b & 1 and scanner.places[topics[i] * brokers + b].scanned
                    < scanner.memory.load(scanner.layout.offset_broker(topics[i], b))):
                return True
    return False


def run_scanner(Scanner scanner, topics, int64_t start_at_ns) -> tuple[int, int]:
    """Step a scanner from `start_at_ns` on until it has ordered all that is delegated; (begun, ended) in ns.

    `topics` are at most `TOPICS_MAX` numbers. Raises `BenchError` when it takes for ever.
    """
    cdef int64_t begun, ended
    cdef bint late = False
    cdef uint64_t numbers[TOPICS_MAX]
    cdef uint64_t count = len(topics), i
    if count > TOPICS_MAX:
        raise ValueError(f"at most {TOPICS_MAX} topics, not {count}")
    for i in range(count):
        numbers[i] = topics[i]
    with nogil:
        while cxl_now_ns() < start_at_ns:
            cxl_yield()                     # there may be more scanners than cores
        begun = cxl_now_ns()
        while _is_behind(scanner, numbers, count):
            if scanner.step() == 0:
                cxl_yield()
                if cxl_now_ns() - begun > GIVE_UP_NS:
                    late = True
                    break
        ended = cxl_now_ns()
    if late:
        raise BenchError(f"scanner {scanner.number} did not order what is delegated")
    return begun, ended


def committed_index(OrderState order, uint64_t topic) -> int:
    """Batches of the topic that are in the order index without a hole."""
    return cxl_load_acquire(&order.topics[topic].committed_index)


def forget_committed(OrderState order, Memory memory, uint64_t topic) -> None:
    """Move the reclaimed frontier over everything committed: there are no readers here."""
    cdef TopicOrder* state = &order.topics[topic]
    cdef uint64_t at = order.layout.topic_reclaim(topic), index = cxl_load_acquire(&state.committed_index)
    memory.store(at + 8, state.committed_position)
    memory.store(at, index)
    memory.flush(at, 64)
    memory.fence()
    cxl_store_release(&state.reclaimed_index, index)


# ---- the whole pipeline --------------------------------------------------------------------------------------------


cdef struct Lane:
    # One publisher: a session on a topic, its batches striped over all brokers.
    uint64_t topic
    uint64_t client
    uint64_t session
    uint64_t sent               # also the next batch's sequence
    uint64_t acked
    uint64_t end                # send so many


cdef class Feeder:
    """Publishers that cost nothing: writes headers for several sessions, takes their acks, keeps a window in flight.

    `receivers` and `acks` are the stages of each broker; `lanes` are (topic, generation, client, session slot) of a
    session each. Every lane has a stream to every broker.
    """

    cdef list receiver_objects, ack_objects
    cdef uint64_t brokers
    cdef uint64_t lane_count
    cdef uint64_t window
    cdef Lane* lanes
    cdef uint64_t* streams              # stream number, lane * brokers + broker
    cdef void** receivers
    cdef void** acks
    cdef readonly uint64_t refused      # results that were no commit
    cdef readonly uint64_t pushed_back  # ring or pool full, tried again

    def __cinit__(self):
        self.lanes = NULL
        self.streams = NULL
        self.receivers = NULL

    def __init__(self, receivers, acks, lanes, uint64_t window=64):
        cdef uint64_t i, b
        self.receiver_objects, self.ack_objects = list(receivers), list(acks)
        self.brokers, self.lane_count, self.window = len(self.receiver_objects), len(lanes), window
        self.lanes = <Lane*>calloc(self.lane_count, sizeof(Lane))
        self.streams = <uint64_t*>calloc(self.lane_count * self.brokers, 8)
        self.receivers = <void**>calloc(2 * self.brokers, sizeof(void*))
        if self.lanes == NULL or self.streams == NULL or self.receivers == NULL:
            raise MemoryError
        self.acks = self.receivers + self.brokers
        for b in range(self.brokers):
            self.receivers[b] = <void*>self.receiver_objects[b]
            self.acks[b] = <void*>self.ack_objects[b]
        for i, (topic, generation, client, session) in enumerate(lanes):
            self.lanes[i].topic, self.lanes[i].client, self.lanes[i].session = topic, client, session
            for b in range(self.brokers):
                self.streams[i * self.brokers + b] = self.ack_objects[b].open_stream(topic, generation, 1, 1)

    def __dealloc__(self):
        free(self.lanes)
        free(self.streams)
        free(self.receivers)

    def run(self, uint64_t batches) -> int:
        """Send `batches` batches a session, wait for all acks; ns from the first header to the last ack.

        Raises `BenchError` when a batch was refused or acks do not come.
        """
        cdef int64_t begun, ended, progressed
        cdef uint64_t i, moved, open_lanes
        cdef Lane* lane
        cdef bint late = False
        cdef uint64_t refused = self.refused
        with nogil:
            begun = progressed = cxl_now_ns()
            for i in range(self.lane_count):
                self.lanes[i].end += batches
            open_lanes = self.lane_count
            while open_lanes:
                moved = open_lanes = 0
                for i in range(self.lane_count):
                    lane = &self.lanes[i]
                    moved += self.take_acks(i)
                    moved += self.send(i)
                    open_lanes += lane.acked < lane.end
                if moved:
                    progressed = cxl_now_ns()
                elif cxl_now_ns() - progressed > GIVE_UP_NS:
                    late = True
                    break
                else:
                    cxl_yield()
            ended = cxl_now_ns()
        if late:
            raise BenchError("acks do not come")
        if self.refused != refused:
            raise BenchError(f"{self.refused - refused} batches were not committed")
        return ended - begun

    cdef uint64_t send(self, uint64_t number) noexcept nogil:
        """Fill a session's window; every touched broker is woken once."""
        cdef uint8_t payload[PAYLOAD_BYTES]
        cdef Lane* lane = &self.lanes[number]
        cdef uint64_t slot = 0, broker, done = 0, touched = 0
        cdef int status
        memset(payload, 0, PAYLOAD_BYTES)
        while lane.sent < lane.end and lane.sent - lane.acked < self.window:
            broker = lane.sent % self.brokers
            status = (<Receiver>self.receivers[broker]).receive_payload(
                lane.topic, (<AckStage>self.acks[broker]).streams[self.streams[number * self.brokers + broker]].generation, payload, PAYLOAD_BYTES, 1, lane.client, lane.session, 1, lane.sent, 0, &slot)
            touched |= <uint64_t>1 << broker
            if status != RESERVED:
                self.pushed_back += 1
                (<Receiver>self.receivers[broker]).head_doorbell.ring()
                break
            (<AckStage>self.acks[broker]).expect(self.streams[number * self.brokers + broker], lane.sent, slot, 1)
            lane.sent += 1
            done += 1
        for broker in range(self.brokers):
            if touched >> broker & 1:
                (<Receiver>self.receivers[broker]).own_doorbell.ring()
        return done

    cdef uint64_t take_acks(self, uint64_t number) noexcept nogil:
        cdef uint64_t b, head, at, taken = 0
        cdef AckStream* stream
        for b in range(self.brokers):
            stream = &(<AckStage>self.acks[b]).streams[self.streams[number * self.brokers + b]]
            head = cxl_load_acquire(&stream.acks_head)
            for at in range(stream.acks_tail, head):
                self.refused += stream.acks[at % STREAM_BATCHES].status != RESULT_COMMITTED
            taken += head - stream.acks_tail
            cxl_store_release(&stream.acks_tail, head)
        self.lanes[number].acked += taken
        return taken
