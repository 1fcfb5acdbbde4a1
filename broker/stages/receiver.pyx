"""The receiver: takes a batch from whoever brought it straight into the segment, by one reservation and one copy.

It runs in the thread that has the bytes (the gRPC handler): no extra stage, no extra copy.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint64_t

from broker.crash cimport (
    CRASH_MID_PAYLOAD, CRASH_RESERVED, CRASH_SLOT_CLAIMED, CRASH_SLOT_VALID, crash_point, crash_point_armed,
)
from broker.doorbell cimport Doorbell
from broker.layout cimport BATCH_VOID, BatchHeader, Layout
from broker.log cimport BrokerLog, RESERVED
from broker.stages.ack cimport AckStage
from broker.wire cimport RequestFields, check_messages, parse_request
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count, cxl_load_acquire

RECEIVED = 0
RING_FULL = 1
POOL_EMPTY = 2
TOO_BIG = 3
TOPIC_CLOSED = 4
MALFORMED = 5
WINDOW_FULL = 6


cdef class Receiver:
    """Receives the batches of every publish stream of one broker; called from one thread."""

    def __init__(self, Memory memory, BrokerLog log, AckStage acks, Doorbell own_doorbell, Doorbell head_doorbell):
        self.memory = memory
        self.layout = log.layout
        self.log = log
        self.acks = acks
        self.broker = log.broker
        self.own_doorbell = own_doorbell
        self.head_doorbell = head_doorbell

    cdef int receive_payload(self, uint64_t topic, uint64_t generation, const void* payload, uint64_t nbytes,
                             uint64_t messages, uint64_t client, uint64_t session, uint64_t session_epoch, uint64_t sequence,
                             uint64_t published_ns, uint64_t* slot) noexcept nogil:
        cdef BatchHeader header
        cdef uint64_t offset = 0
        cdef int status = self.log.reserve(topic, generation, nbytes, messages, slot, &offset)
        if status != RESERVED:
            return status
        crash_point(CRASH_RESERVED)
        if crash_point_armed(CRASH_MID_PAYLOAD):
            self.memory.copy_in(offset, payload, nbytes // 2)
            crash_point(CRASH_MID_PAYLOAD)
        self.memory.copy_in(offset, payload, nbytes)
        # The payload is fenced first: whoever sees the header complete must see the payload.
        self.memory.fence()
        crash_point(CRASH_SLOT_CLAIMED)
        header.payload_offset = offset
        header.payload_bytes = nbytes
        header.message_count = messages
        header.client_id = client
        header.session_slot = session
        header.session_epoch = session_epoch
        header.batch_sequence = sequence
        header.received_wall_ns = published_ns
        header.flags = 0
        header.local_order = 0
        self.log.complete(topic, slot[0], &header)
        crash_point(CRASH_SLOT_VALID)
        return status

    def receive(self, bytes frame, uint64_t stream, uint64_t topic, uint64_t client, uint64_t session,
                uint64_t session_epoch) -> int:
        """Take one encoded PublishRequest of an open stream; a status constant of this module (0: received).

        Nothing is reserved unless the batch is well-formed and fits. The GIL is released while bytes move.
        """
        cdef RequestFields fields
        cdef const uint8_t* data = frame
        cdef uint64_t nbytes = len(frame), slot = 0
        cdef int64_t checked
        cdef int status
        if not parse_request(data, nbytes, &fields) or not fields.has_payload:
            cxl_count(&self.log.counters.batches_refused, 1)
            return MALFORMED
        # The topic's number may belong to another topic by now.
        if cxl_load_acquire(&self.log.topics[topic].generation) != self.acks.streams[stream].generation:
            return TOPIC_CLOSED
        if self.acks.room(stream) == 0:
            return WINDOW_FULL
        with nogil:
            checked = check_messages(fields.payload, fields.payload_bytes, fields.message_count,
                                     self.log.topics[topic].message_bytes_max)
            if checked == 0:
                status = self.receive_payload(topic, self.acks.streams[stream].generation, fields.payload,
                                              fields.payload_bytes, fields.message_count, client, session, session_epoch, fields.batch_sequence,
                                              fields.published_ns, &slot)
        if checked:
            cxl_count(&self.log.counters.batches_refused, 1)
            return MALFORMED if checked < 0 else TOO_BIG
        if status == RESERVED:
            self.acks.expect(stream, fields.batch_sequence, slot, fields.message_count)
            self.own_doorbell.ring()
        elif status == POOL_EMPTY:
            self.head_doorbell.ring()
            self.own_doorbell.ring()
        elif status == RING_FULL:
            self.head_doorbell.ring()       # it relieves a ring that is full of batches which wait for their order
            self.own_doorbell.ring()
        return status

    def abandon(self, uint64_t topic) -> int:
        """Reserve a slot and complete it void, as a handler does that fails after reserving; for tests."""
        cdef BatchHeader header
        cdef uint64_t slot = 0, offset = 0
        cdef int status = self.log.reserve(topic, self.log.topics[topic].generation, 64, 0, &slot, &offset)
        if status == RESERVED:
            header.payload_offset = offset
            header.payload_bytes = header.message_count = 0
            header.client_id = header.batch_sequence = header.received_wall_ns = 0
            header.session_slot = header.session_epoch = header.local_order = 0
            header.flags = BATCH_VOID
            self.log.complete(topic, slot, &header)
            self.own_doorbell.ring()
        return status

    @staticmethod
    def sequence_of(bytes frame):
        """(batch_sequence, has_open, has_payload) of an encoded PublishRequest, or None when malformed."""
        cdef RequestFields fields
        cdef const uint8_t* data = frame
        if not parse_request(data, len(frame), &fields):
            return None
        opened = fields.open[:fields.open_bytes] if fields.open != NULL else None
        return fields.batch_sequence, opened, fields.has_payload
