from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    MESSAGE_HEADER_BYTES = 8
    # Every field of a batch's request header has a fixed width, so a frame is built in place before its size is known.
    REQUEST_HEADER_BYTES = 29
    BATCH_HEADER_BYTES = 43
    PUBLISHED_NS_AT = 15            # of the request header

cdef struct RequestFields:
    const uint8_t* payload
    uint64_t payload_bytes
    uint64_t batch_sequence
    uint64_t message_count
    uint64_t published_ns
    const uint8_t* open
    uint64_t open_bytes
    bint has_payload

cdef uint32_t message_check(uint32_t nbytes) noexcept nogil
cdef void write_request_header(uint8_t* at, uint64_t sequence, uint32_t messages, uint64_t published_ns,
                               uint64_t payload_bytes) noexcept nogil
cdef bint parse_request(const uint8_t* data, uint64_t nbytes, RequestFields* out) noexcept nogil
cdef int64_t check_messages(const uint8_t* payload, uint64_t nbytes, uint64_t count, uint64_t bytes_max) noexcept nogil
cdef bytes encode_acks(void* acks, uint64_t capacity, uint64_t first, uint64_t last, uint64_t epoch)
cdef void write_batch_header(uint8_t* at, uint64_t position, uint32_t messages, uint32_t broker,
                             uint64_t published_ns, uint64_t payload_bytes) noexcept nogil
cdef inline uint64_t message_stride(uint64_t nbytes) noexcept nogil:
    return MESSAGE_HEADER_BYTES + (nbytes + 7) // 8 * 8
