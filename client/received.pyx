"""Received batches: the bytes of a SubscribeResponse, taken apart without copying until someone wants the messages."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from broker.errors import DamagedData
from broker.wire cimport MESSAGE_HEADER_BYTES, message_check, message_stride


def _damaged(text, **where) -> DamagedData:
    return DamagedData(f"what was read is damaged: {text}", **where)


cdef class Message:
    """One message: `payload`, its `position` in the topic's total order, `topic`, `broker`, `timestamp_ns`."""

    cdef readonly object payload
    cdef readonly uint64_t position
    cdef readonly object topic
    cdef readonly uint32_t broker
    cdef readonly uint64_t timestamp_ns

    def __repr__(self):
        return f"Message(position={self.position}, topic={self.topic!r}, {len(self.payload)} bytes)"


cdef class ReceivedBatch:
    """Messages that lie one behind the other: `count` of them, the first at `position`.

    `payload` is a read-only view of the framed bytes. `skip` messages at the front were not asked for.
    """

    @property
    def payload(self):
        """The framed bytes."""
        cdef uint64_t start = self.data - self.base
        return memoryview(self.owner)[start:start + self.nbytes]

    def drop_before(self, uint64_t position) -> None:
        """Forget the messages below a position."""
        cdef uint32_t size
        while self.count and self.position < position:
            size = self._size(0)
            self.data += message_stride(size)
            self.nbytes -= message_stride(size)
            self.position += 1
            self.count -= 1
        self.seen_count = self.seen_bytes = 0

    cdef object _broken(self, text):
        """The error of framing that contradicts itself: which messages it concerns, and where to go on."""
        end = self.position + self.count
        return _damaged(f"the batch at position {self.position} {text}; go on behind it with seek({end})",
                        first=self.position, end=end, topic=self.topic, broker=self.broker)

    cdef uint32_t _size(self, uint64_t at) except? 0xFFFFFFFF:
        cdef uint32_t size, check
        if at + MESSAGE_HEADER_BYTES > self.nbytes:
            raise self._broken("ends within a message")
        memcpy(&size, self.data + at, 4)
        memcpy(&check, self.data + at + 4, 4)
        if check != message_check(size) or at + message_stride(size) > self.nbytes:
            raise self._broken(f"has no message at byte {at}")
        return size

    def messages(self) -> list[bytes]:
        """The payloads, copied out."""
        cdef uint64_t at = 0, i
        cdef uint32_t size
        cdef list out = []
        for i in range(self.count):
            size = self._size(at)
            out.append(PyBytes_FromStringAndSize(<const char*>self.data + at + MESSAGE_HEADER_BYTES, size))
            at += message_stride(size)
        self._check_end(at)
        return out

    cdef int _check_end(self, uint64_t at) except -1:
        if at != self.nbytes:
            raise self._broken(f"has {self.nbytes - at} bytes behind its last message")
        return 0

    def to_messages(self, uint64_t first=0, limit=None) -> list:
        """`Message` objects from the `first` on, at most `limit`."""
        cdef uint64_t at = 0, i, start = 0
        cdef uint64_t end = self.count if limit is None or limit >= self.count else min(self.count, first + <uint64_t>limit)
        cdef uint32_t size
        cdef Message message
        cdef list out = []
        cdef object whole = self.payload if self.is_view else None
        if first >= self.seen_count:        # readers come for a batch in pieces: go on where the last one ended
            start, at = self.seen_count, self.seen_bytes
        for i in range(start, end):
            size = self._size(at)
            if i >= first:
                message = Message.__new__(Message)
                if self.is_view:
                    message.payload = whole[at + MESSAGE_HEADER_BYTES:at + MESSAGE_HEADER_BYTES + size]
                else:
                    message.payload = PyBytes_FromStringAndSize(
                        <const char*>self.data + at + MESSAGE_HEADER_BYTES, size)
                message.position = self.position + i
                message.topic = self.topic
                message.broker = self.broker
                message.timestamp_ns = self.timestamp_ns
                out.append(message)
            at += message_stride(size)
        if end >= start:
            self.seen_count, self.seen_bytes = end, at
        if end == self.count:
            self._check_end(at)
        return out

    def array(self):
        """A read-only numpy view (count, message_bytes), no copy; ValueError unless all messages have one size."""
        import numpy

        cdef uint64_t i, stride
        cdef uint32_t size
        if self.count == 0:
            return numpy.empty((0, 0), numpy.uint8)
        size = self._size(0)
        stride = message_stride(size)
        if stride * self.count != self.nbytes:
            raise ValueError("the messages of this batch differ in size")
        for i in range(self.count):
            if self._size(i * stride) != size:
                raise ValueError("the messages of this batch differ in size")
        rows = numpy.frombuffer(self.payload, numpy.uint8).reshape(self.count, stride)
        return rows[:, MESSAGE_HEADER_BYTES:MESSAGE_HEADER_BYTES + size]


cdef uint64_t _varint(const uint8_t* data, uint64_t nbytes, uint64_t* at) except? 0xFFFFFFFFFFFFFFFF:
    cdef uint64_t value = 0
    cdef int shift = 0
    while at[0] < nbytes and shift < 63:
        value |= <uint64_t>(data[at[0]] & 0x7F) << shift
        at[0] += 1
        if not data[at[0] - 1] & 0x80:
            return value
        shift += 7
    raise _damaged("the response ends within a number")


cdef ReceivedBatch _parse_batch(bytes frame, const uint8_t* data, uint64_t nbytes, object topic):
    cdef ReceivedBatch batch = ReceivedBatch.__new__(ReceivedBatch)
    cdef uint64_t at = 0, tag, length
    cdef uint32_t number
    batch.owner = frame
    batch.base = <const uint8_t*>PyBytes_AS_STRING(frame)
    batch.topic = topic
    batch.data = data
    while at < nbytes:
        tag = _varint(data, nbytes, &at)
        if tag & 7 == 2:
            length = _varint(data, nbytes, &at)
            if length > nbytes - at:
                raise _damaged("a field is longer than its batch")
            if tag >> 3 == 15:
                batch.data = data + at
                batch.nbytes = length
            at += length
        elif tag & 7 == 1 and nbytes - at >= 8:
            if tag >> 3 == 1:
                memcpy(&batch.position, data + at, 8)
            elif tag >> 3 == 4:
                memcpy(&batch.timestamp_ns, data + at, 8)
            at += 8
        elif tag & 7 == 5 and nbytes - at >= 4:
            memcpy(&number, data + at, 4)
            if tag >> 3 == 2:
                batch.count = number
            elif tag >> 3 == 3:
                batch.broker = number
            at += 4
        elif tag & 7 == 0:
            _varint(data, nbytes, &at)
        else:
            raise _damaged("the response has a field of unknown kind")
    return batch


def parse_response(bytes frame, topic) -> list:
    """The batches of an encoded SubscribeResponse, as views of it."""
    cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(frame)
    cdef uint64_t nbytes = len(frame), at = 0, tag, length
    cdef list batches = []
    while at < nbytes:
        tag = _varint(data, nbytes, &at)
        length = _varint(data, nbytes, &at)
        if tag != 0x0A or length > nbytes - at:
            raise _damaged("the response is not a list of batches")
        batches.append(_parse_batch(frame, data + at, length, topic))
        at += length
    return batches
