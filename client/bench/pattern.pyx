"""Deterministic messages: each byte follows from publisher, sequence and place, so a reader knows what must be there.

    row      | stamp | body ........ | stamp | body ........ | stamp | body ... |
             0       16              4096                    8192
    stamp    publisher (with the chunk's number in its upper half), sequence: 8 bytes each, little endian
    body     one fixed random block, rotated and XORed by a key made of publisher, sequence modulo `period`, and chunk

A row shorter than a stamp is a prefix of it. `period` (0: none) lets a publisher that must not cost anything keep its
rows: `period` rows later only the stamps differ, one in each 4 KiB, and `restamp` writes just those.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from broker.wire cimport MESSAGE_HEADER_BYTES, message_check, message_stride

cdef enum:
    STAMP = 16
    CHUNK = 4096
    CHUNK_WORDS = 512
    PUBLISHERS_MAX = 255            # a message of one byte still names its publisher

cdef enum:
    FRAMING = 1
    FRAME_SIZE = 2
    PADDING = 3
    PUBLISHER = 4
    SEQUENCE = 5
    CONTENT = 6
    REPEATED = 7
    UNPUBLISHED = 8
    TRAILING = 9

STAMP_BYTES = STAMP
CHUNK_BYTES = CHUNK

# Rows have any length, so words lie at any address: a packed struct tells the compiler.
cdef packed struct Word:
    uint64_t value

cdef uint64_t TEMPLATE[2 * CHUNK_WORDS]


cdef uint64_t _mix(uint64_t value) noexcept nogil:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of the input changes half of the output."""
    value = (value ^ (value >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * <uint64_t>0x94D049BB133111EB
    return value ^ (value >> 31)


cdef void _make_template() noexcept:
    cdef uint64_t state = 0x6378_6C6D_71, k
    for k in range(CHUNK_WORDS):
        state += <uint64_t>0x9E3779B97F4A7C15
        TEMPLATE[k] = TEMPLATE[k + CHUNK_WORDS] = _mix(state)


_make_template()


cdef inline uint64_t _key(uint64_t publisher, uint64_t residue, uint64_t chunk) noexcept nogil:
    return _mix(_mix(publisher * <uint64_t>0x9E3779B97F4A7C15 + residue) + chunk)


cdef inline void _stamp(uint8_t* to, uint64_t nbytes, uint64_t publisher, uint64_t sequence,
                        uint64_t chunk) noexcept nogil:
    cdef uint64_t stamp[2]
    stamp[0] = publisher | chunk << 32
    stamp[1] = sequence
    if nbytes >= STAMP:
        (<Word*>to)[0].value = stamp[0]
        (<Word*>to)[1].value = stamp[1]
    else:
        memcpy(to, stamp, nbytes)


cdef void _fill_chunk(uint8_t* to, uint64_t nbytes, uint64_t publisher, uint64_t sequence, uint64_t residue,
                      uint64_t chunk) noexcept nogil:
    cdef uint64_t key = _key(publisher, residue, chunk), words = nbytes // 8, k, last
    cdef uint64_t* body = TEMPLATE + (key & (CHUNK_WORDS - 1))
    cdef Word* target = <Word*>to
    _stamp(to, nbytes, publisher, sequence, chunk)
    for k in range(2, words):
        target[k].value = body[k] ^ key
    if nbytes > STAMP and nbytes % 8:
        last = body[words] ^ key
        memcpy(to + 8 * words, &last, nbytes % 8)


cdef int64_t _compare_chunk(const uint8_t* data, uint64_t nbytes, uint64_t publisher, uint64_t sequence,
                            uint64_t residue, uint64_t chunk) noexcept nogil:
    """-1 when the chunk is as it was filled, else the index of its first byte that differs."""
    cdef uint64_t key = _key(publisher, residue, chunk), words = nbytes // 8, k, last, wrong = 0
    cdef uint64_t* body = TEMPLATE + (key & (CHUNK_WORDS - 1))
    cdef const Word* source = <const Word*>data
    cdef uint8_t expected[CHUNK]
    if nbytes >= STAMP:
        wrong = (source[0].value ^ (publisher | chunk << 32)) | (source[1].value ^ sequence)
        for k in range(2, words):
            wrong |= source[k].value ^ body[k] ^ key
        if nbytes % 8:
            last = body[words] ^ key
            wrong |= memcmp(data + 8 * words, &last, nbytes % 8) != 0
        if wrong == 0:
            return -1
    _fill_chunk(expected, nbytes, publisher, sequence, residue, chunk)
    for k in range(nbytes):
        if expected[k] != data[k]:
            return <int64_t>k
    return -1


cdef inline uint64_t _residue(uint64_t sequence, uint64_t period) noexcept nogil:
    return sequence % period if period else sequence


def fill(uint8_t[:, ::1] rows, uint64_t publisher, uint64_t first_sequence, uint64_t period=0) -> None:
    """Write one message a row: `first_sequence` and the following of `publisher` (1 to 255)."""
    cdef uint64_t count = rows.shape[0], nbytes = rows.shape[1], i, at, sequence
    cdef uint8_t* row
    _check_publisher(publisher)
    if count == 0 or nbytes == 0:
        return
    row = &rows[0, 0]
    with nogil:
        for i in range(count):
            sequence = first_sequence + i
            at = 0
            while at < nbytes:
                _fill_chunk(row + at, min(nbytes - at, CHUNK), publisher, sequence, _residue(sequence, period),
                            at // CHUNK)
                at += CHUNK
            row += nbytes


def restamp(uint8_t[:, ::1] rows, uint64_t publisher, uint64_t first_sequence) -> None:
    """Write only the stamps: rows that were filled for a sequence a multiple of their `period` earlier are then right."""
    cdef uint64_t count = rows.shape[0], nbytes = rows.shape[1], i, at
    cdef uint8_t* row
    _check_publisher(publisher)
    if count == 0 or nbytes == 0:
        return
    row = &rows[0, 0]
    with nogil:
        for i in range(count):
            at = 0
            while at < nbytes:
                _stamp(row + at, min(nbytes - at, CHUNK), publisher, first_sequence + i, at // CHUNK)
                at += CHUNK
            row += nbytes


def _check_publisher(publisher: int) -> None:
    if not 1 <= publisher <= PUBLISHERS_MAX:
        raise ValueError(f"publisher must be 1 to {PUBLISHERS_MAX}, not {publisher}")


class Difference(Exception):
    """The first message that is not what was published; its attributes say where."""

    def __init__(self, reason: str, position: int, publisher: int | None = None, sequence: int | None = None,
                 byte_index: int | None = None) -> None:
        who = "" if publisher is None else f", publisher {publisher}"
        if sequence is not None:
            who += f", sequence {sequence}"
        if byte_index is not None:
            who += f", byte {byte_index}"
        super().__init__(f"position {position}{who}: {reason}")
        self.reason = reason
        self.position = position
        self.publisher = publisher
        self.sequence = sequence
        self.byte_index = byte_index


cdef struct Failure:
    int code
    uint64_t message                # index in the batch
    uint64_t publisher
    uint64_t sequence               # the one found
    uint64_t expected
    int64_t byte_index


cdef class Verifier:
    """Checks what a subscriber received against what `publishers` publishers (numbered from 1) published.

    Every byte, every position, and completeness; with `ordered` also that each publisher's messages come in its order.
    `check` raises `Difference` at the first fault. Messages shorter than a stamp carry only part of their identity:
    in order, all their bytes are checked all the same; without order, messages below 16 bytes are checked for their
    publisher and counted. Empty messages are counted.
    """

    cdef readonly uint64_t message_bytes
    cdef readonly uint64_t period
    cdef readonly int publishers
    cdef readonly bint ordered
    cdef readonly uint64_t position     # of the next message
    cdef readonly uint64_t messages
    cdef readonly uint64_t verified_bytes
    cdef uint64_t* next                 # sequences below were seen (ordered), or how many were seen
    cdef uint64_t* first                # first sequence of the current round
    cdef uint64_t* end                  # sequences below may come
    cdef uint8_t** seen                 # one bit a sequence of the current round
    cdef uint64_t anonymous             # empty messages seen

    def __cinit__(self):
        self.next = NULL
        self.seen = NULL

    def __init__(self, int publishers, uint64_t message_bytes, bint ordered=True, uint64_t period=0,
                 uint64_t position=0):
        _check_publisher(publishers)
        self.publishers = publishers
        self.message_bytes = message_bytes
        self.ordered = ordered
        self.period = period
        self.position = position
        self.next = <uint64_t*>calloc(3 * (publishers + 1), 8)
        self.seen = <uint8_t**>calloc(publishers + 1, sizeof(uint8_t*))
        if self.next == NULL or self.seen == NULL:
            raise MemoryError
        self.first = self.next + publishers + 1
        self.end = self.first + publishers + 1

    def __dealloc__(self):
        cdef int i
        if self.seen != NULL:
            for i in range(self.publishers + 1):
                free(self.seen[i])
        free(self.seen)
        free(self.next)

    def expect(self, int publisher, uint64_t count) -> None:
        """The publisher has published `count` more messages. Begins its next round: the last must be complete."""
        if not 1 <= publisher <= self.publishers:
            raise ValueError(f"publisher must be 1 to {self.publishers}, not {publisher}")
        self.first[publisher] = self.end[publisher]
        self.end[publisher] += count
        if not self.ordered and self.message_bytes >= STAMP:
            free(self.seen[publisher])
            self.seen[publisher] = <uint8_t*>calloc(count // 8 + 1, 1)
            if self.seen[publisher] == NULL:
                raise MemoryError

    @property
    def missing(self) -> int:
        """Messages that are still to come."""
        cdef int i
        cdef uint64_t count = 0
        for i in range(1, self.publishers + 1):
            count += self.end[i] - self.next[i]
        return count - self.anonymous

    def finish(self) -> None:
        """Raise `Difference` when messages have not come."""
        for publisher in range(1, self.publishers + 1):
            if self.next[publisher] < self.end[publisher] and self.missing:
                raise Difference(f"{self.missing} messages were published and did not come", self.position, publisher,
                                 self.next[publisher] if self.ordered else None)

    def check(self, payload, uint64_t count, uint64_t position) -> int:
        """Check a batch: `count` messages, framed as in a segment, the first at `position`; the message bytes verified.

        Without the GIL. Raises `Difference`.
        """
        cdef Py_buffer view
        cdef Failure failure
        cdef int code
        if position != self.position:
            raise Difference(f"the batch begins at position {position}, expected was {self.position}", self.position)
        PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                code = self.check_batch(<const uint8_t*>view.buf, view.len, count, &failure)
            if code:
                self.fail(&failure)
        finally:
            PyBuffer_Release(&view)
        self.position += count
        self.messages += count
        self.verified_bytes += count * self.message_bytes
        return count * self.message_bytes

    cdef int check_batch(self, const uint8_t* data, uint64_t nbytes, uint64_t count, Failure* failure) noexcept nogil:
        cdef uint64_t stride = message_stride(self.message_bytes), i
        cdef uint32_t check = message_check(<uint32_t>self.message_bytes)
        for i in range(count):
            failure.message = i
            failure.publisher = 0
            failure.code = self.check_frame(data, nbytes, stride, check, failure)
            if failure.code == 0:
                failure.code = self.check_message(data + MESSAGE_HEADER_BYTES, failure)
            if failure.code:
                return failure.code
            data += stride
            nbytes -= stride
        failure.message = count
        failure.code = TRAILING if nbytes else 0
        return failure.code

    cdef int check_frame(self, const uint8_t* data, uint64_t nbytes, uint64_t stride, uint32_t check,
                         Failure* failure) noexcept nogil:
        cdef uint32_t size, found
        cdef uint64_t k
        if nbytes < stride:
            return FRAMING
        memcpy(&size, data, 4)
        memcpy(&found, data + 4, 4)
        if size != self.message_bytes:
            failure.sequence = size
            return FRAME_SIZE
        if found != check:
            return FRAMING
        for k in range(MESSAGE_HEADER_BYTES + self.message_bytes, stride):
            if data[k]:
                return PADDING
        return 0

    cdef int check_message(self, const uint8_t* data, Failure* failure) noexcept nogil:
        cdef uint64_t publisher = 0, sequence
        if self.message_bytes == 0:
            self.anonymous += 1
            return 0
        memcpy(&publisher, data, min(self.message_bytes, 8))
        failure.publisher = publisher
        if not 1 <= publisher <= <uint64_t>self.publishers:
            return PUBLISHER
        sequence = self.next[publisher]
        if self.message_bytes >= STAMP:
            memcpy(&sequence, data + 8, 8)
            failure.sequence = sequence
            failure.expected = self.next[publisher]
            if self.ordered and sequence != self.next[publisher]:
                return SEQUENCE
        failure.sequence = sequence
        if sequence >= self.end[publisher]:
            return UNPUBLISHED
        if (self.ordered or self.message_bytes >= STAMP) and not self.same(data, publisher, sequence, failure):
            return CONTENT
        if not self.ordered and self.message_bytes >= STAMP and not self.mark(publisher, sequence):
            return REPEATED
        self.next[publisher] += 1
        return 0

    cdef bint same(self, const uint8_t* data, uint64_t publisher, uint64_t sequence, Failure* failure) noexcept nogil:
        cdef uint64_t at = 0, residue = _residue(sequence, self.period)
        cdef int64_t wrong
        while at < self.message_bytes:
            wrong = _compare_chunk(data + at, min(self.message_bytes - at, CHUNK), publisher, sequence, residue,
                                   at // CHUNK)
            if wrong >= 0:
                failure.byte_index = at + wrong
                return False
            at += CHUNK
        return True

    cdef bint mark(self, uint64_t publisher, uint64_t sequence) noexcept nogil:
        """Note that a message came; False when it came before, in this round or an earlier one."""
        cdef uint64_t index = sequence - self.first[publisher]
        cdef uint8_t bit = <uint8_t>(1 << (index & 7))
        if sequence < self.first[publisher] or self.seen[publisher][index // 8] & bit:
            return False
        self.seen[publisher][index // 8] |= bit
        return True

    cdef fail(self, Failure* failure):
        position, code = self.position + failure.message, failure.code
        if code == FRAMING:
            raise Difference("no well-formed message is here", position)
        if code == FRAME_SIZE:
            raise Difference(f"a message of {failure.sequence} bytes, {self.message_bytes} were published", position)
        if code == PADDING:
            raise Difference("the padding behind the message is not zero", position)
        if code == TRAILING:
            raise Difference("the batch has bytes behind its last message", position)
        if code == PUBLISHER:
            raise Difference(f"a message of a publisher that does not exist ({failure.publisher})", position,
                             byte_index=0)
        where = position, failure.publisher, failure.sequence
        if code == SEQUENCE:
            raise Difference(f"sequence {failure.expected} was expected: "
                             + ("this one came before" if failure.sequence < failure.expected else
                                "messages are lost or out of order"), *where)
        if code == REPEATED:
            raise Difference("this message came before", *where)
        if code == UNPUBLISHED:
            raise Difference("this message was not published", *where)
        raise Difference("the content differs from what was published", *where, failure.byte_index)
