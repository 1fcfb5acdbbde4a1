"""The bytes of the hot methods, exactly as cxlmq.proto defines them, without protobuf objects around the payload.

Inside a payload, messages lie one behind the other, as in the segments:

    0        4        8                    8 + size, padded with zeroes to a multiple of 8
    | size   | check  | message bytes ...  |

`check` is derived from the size: a damaged size is noticed before it is followed.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset


cdef uint32_t message_check(uint32_t nbytes) noexcept nogil:
    return (nbytes * <uint32_t>2654435761) ^ <uint32_t>0x5C4D514C


cdef void _varint5(uint8_t* at, uint64_t value) noexcept nogil:
    # Five bytes whatever the value: a longer varint than needed is still a varint.
    cdef int i
    for i in range(4):
        at[i] = <uint8_t>((value & 0x7F) | 0x80)
        value >>= 7
    at[4] = <uint8_t>(value & 0x7F)


cdef void write_request_header(uint8_t* at, uint64_t sequence, uint32_t messages, uint64_t published_ns,
                               uint64_t payload_bytes) noexcept nogil:
    """PublishRequest up to its payload: batch_sequence = 2, message_count = 3, published_ns = 4, payload = 15."""
    at[0] = 0x11
    memcpy(at + 1, &sequence, 8)
    at[9] = 0x1D
    memcpy(at + 10, &messages, 4)
    at[14] = 0x21
    memcpy(at + 15, &published_ns, 8)
    at[23] = 0x7A
    _varint5(at + 24, payload_bytes)


cdef void write_batch_header(uint8_t* at, uint64_t position, uint32_t messages, uint32_t broker,
                             uint64_t published_ns, uint64_t payload_bytes) noexcept nogil:
    """One entry of SubscribeResponse.batches up to its payload."""
    at[0] = 0x0A
    _varint5(at + 1, BATCH_HEADER_BYTES - 6 + payload_bytes)
    at[6] = 0x09
    memcpy(at + 7, &position, 8)
    at[15] = 0x15
    memcpy(at + 16, &messages, 4)
    at[20] = 0x1D
    memcpy(at + 21, &broker, 4)
    at[25] = 0x21
    memcpy(at + 26, &published_ns, 8)
    # Two bytes of a field that is always zero keep the payload length where it is.
    at[34] = 0x28
    at[35] = 0x80
    at[36] = 0x00
    at[37] = 0x7A
    _varint5(at + 38, payload_bytes)


cdef int64_t _read_varint(const uint8_t* data, uint64_t nbytes, uint64_t* at) noexcept nogil:
    cdef uint64_t value = 0
    cdef int shift = 0
    while at[0] < nbytes and shift < 63:
        value |= <uint64_t>(data[at[0]] & 0x7F) << shift
        at[0] += 1
        if not data[at[0] - 1] & 0x80:
            return <int64_t>value
        shift += 7
    return -1


cdef bint parse_request(const uint8_t* data, uint64_t nbytes, RequestFields* out) noexcept nogil:
    """Walk a PublishRequest; False when it is malformed. Nothing is copied."""
    cdef uint64_t at = 0
    cdef int64_t tag, length
    memset(out, 0, sizeof(RequestFields))
    while at < nbytes:
        tag = _read_varint(data, nbytes, &at)
        if tag <= 0:
            return False
        if tag & 7 == 2:
            length = _read_varint(data, nbytes, &at)
            if length < 0 or <uint64_t>length > nbytes - at:
                return False
            if tag >> 3 == 15:
                out.payload = data + at
                out.payload_bytes = length
                out.has_payload = True
            elif tag >> 3 == 1:
                out.open = data + at
                out.open_bytes = length
            at += length
        elif tag & 7 == 1:
            if nbytes - at < 8:
                return False
            if tag >> 3 == 2:
                memcpy(&out.batch_sequence, data + at, 8)
            elif tag >> 3 == 4:
                memcpy(&out.published_ns, data + at, 8)
            at += 8
        elif tag & 7 == 5:
            if nbytes - at < 4:
                return False
            if tag >> 3 == 3:
                memcpy(&out.message_count, data + at, 4)
            at += 4
        elif tag & 7 == 0:
            if _read_varint(data, nbytes, &at) < 0:
                return False
        else:
            return False
    return True


cdef int64_t check_messages(const uint8_t* payload, uint64_t nbytes, uint64_t count, uint64_t bytes_max) noexcept nogil:
    """0 when the payload holds exactly `count` well-formed messages; -1 malformed; else the size that is too big."""
    cdef uint64_t at = 0, i
    cdef uint32_t size, check
    for i in range(count):
        if nbytes - at < MESSAGE_HEADER_BYTES:
            return -1
        memcpy(&size, payload + at, 4)
        memcpy(&check, payload + at + 4, 4)
        if check != message_check(size):
            return -1
        if size > bytes_max:
            return size
        if message_stride(size) > nbytes - at:
            return -1
        at += message_stride(size)
    return 0 if at == nbytes and count > 0 else -1


def payload_status(bytes payload, uint64_t count, uint64_t bytes_max) -> int:
    """0 when a payload holds exactly `count` well-formed messages; -1 malformed; else the size that is too big."""
    return check_messages(<const uint8_t*>PyBytes_AS_STRING(payload), len(payload), count, bytes_max)


cdef struct _Ack:
    uint64_t sequence
    uint64_t position
    uint64_t status


cdef bytes encode_acks(void* acks, uint64_t capacity, uint64_t first, uint64_t last, uint64_t epoch):
    """PublishResponse: packed batch_sequences = 1, positions = 2, statuses = 3, and epoch = 4."""
    cdef uint64_t count = last - first, i
    cdef bytes out = PyBytes_FromStringAndSize(NULL, 3 * 6 + count * 20 + 9)
    cdef uint8_t* at = <uint8_t*>PyBytes_AS_STRING(out)
    cdef _Ack* ack
    cdef uint32_t status
    cdef uint8_t* sequences = at + 6
    cdef uint8_t* positions = at + 12 + 8 * count
    cdef uint8_t* statuses = at + 18 + 16 * count
    at[0] = 0x0A
    _varint5(at + 1, 8 * count)
    at[6 + 8 * count] = 0x12
    _varint5(at + 7 + 8 * count, 8 * count)
    at[12 + 16 * count] = 0x1A
    _varint5(at + 13 + 16 * count, 4 * count)
    for i in range(count):
        ack = &(<_Ack*>acks)[(first + i) % capacity]
        memcpy(sequences + 8 * i, &ack.sequence, 8)
        memcpy(positions + 8 * i, &ack.position, 8)
        status = ack.status
        memcpy(statuses + 4 * i, &status, 4)
    at[18 + 20 * count] = 0x21
    memcpy(at + 19 + 20 * count, &epoch, 8)
    return out
