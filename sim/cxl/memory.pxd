"""The contract of simulated CXL memory: the one door to everything that hosts share.

    writer                         memory                        reader
    store / write_line  ─────►  (private until)
    flush(line)         ─────►   pending
    fence               ─────►   visible   ─────►  invalidate(line), then load / read_line

A store is visible to another host only after flush and fence; a load sees it only after an invalidate. Lines are 64
bytes. Word 0 of a line is its commit word: `write_line` stores it last, `read_line` loads it first. Bulk payload goes
around the cache: `copy_in` needs a fence and never a flush. Offsets count bytes from the start of the region; nobody
but the door sees a pointer, except for payload views that attached clients hold.
Atomic read-modify-write is for words that the layout marks as shared, and only where the hardware allows it.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from sim.cxl.primitives cimport cxl_stream

cdef enum:
    LINE_BYTES = 64

# Who accesses: statistics are counted by role, and the coherence checker knows each line's one writer role.
cpdef enum Role:
    ROLE_ADMIN = 0          # the head broker creating and removing structures
    ROLE_BROKER = 1         # the broker's own lines: identity, heartbeat, sessions opened here
    ROLE_RECEIVER = 2
    ROLE_DELEGATION = 3
    ROLE_SEQUENCER = 4
    ROLE_REPLICATION = 5
    ROLE_ACK = 6
    ROLE_DELIVERY = 7
    ROLE_RECLAIM = 8
    ROLE_CLIENT = 9         # attached publishers and subscribers
    ROLE_COUNT = 10

cdef packed struct AccessStatistics:
    uint64_t flushes        # lines written back
    uint64_t fences
    uint64_t lines_read
    uint64_t lines_written  # lines and single words stored
    uint64_t invalidates    # lines
    uint64_t atomics
    uint64_t bytes_in       # bulk copies into the region
    uint64_t bytes_out

cdef class Memory:
    cdef object owner                       # keeps the mapping alive
    cdef uint8_t* base
    cdef readonly uint64_t bytes
    cdef readonly int role
    cdef readonly bint writable
    cdef AccessStatistics* statistics
    cdef AccessStatistics private_statistics
    cdef const uint64_t* fault              # not 0 once this host cannot go on: see raise_fault

    cdef uint64_t load(self, uint64_t offset) noexcept nogil
    cdef void store(self, uint64_t offset, uint64_t value) noexcept nogil
    cdef bint read_line(self, uint64_t offset, void* line) noexcept nogil
    cdef void write_line(self, uint64_t offset, const void* line) noexcept nogil
    cdef uint64_t fetch_add(self, uint64_t offset, uint64_t value) noexcept nogil
    cdef uint64_t fetch_or(self, uint64_t offset, uint64_t value) noexcept nogil
    cdef uint64_t fetch_and(self, uint64_t offset, uint64_t value) noexcept nogil
    cdef bint compare_and_swap(self, uint64_t offset, uint64_t expected, uint64_t desired) noexcept nogil
    cdef void copy_in(self, uint64_t offset, const void* source, uint64_t count) noexcept nogil
    cdef void stream_start(self, cxl_stream* stream, uint64_t offset) noexcept nogil
    cdef void stream_messages(self, cxl_stream* stream, const void* source, uint64_t count, uint64_t messages,
                              uint32_t check) noexcept nogil
    cdef void stream_finish(self, cxl_stream* stream) noexcept nogil
    cdef void copy_out(self, void* target, uint64_t offset, uint64_t count) noexcept nogil
    cdef void flush(self, uint64_t offset, uint64_t count) noexcept nogil
    cdef void invalidate(self, uint64_t offset, uint64_t count) noexcept nogil
    cdef void fence(self) noexcept nogil
    cdef void full_fence(self) noexcept nogil
    cdef const uint8_t* payload(self, uint64_t offset, uint64_t count) noexcept nogil
    cdef uint8_t* payload_writable(self, uint64_t offset, uint64_t count) noexcept nogil
    cdef void wait(self, uint64_t offset, uint32_t expected, int64_t timeout_ns) noexcept nogil
    cdef void wake(self, uint64_t offset) noexcept nogil
    cdef uint64_t processor(self) noexcept nogil
    cdef int touch(self, uint64_t offset, uint64_t count) noexcept nogil
    cdef void* coherent_area(self, uint64_t offset) noexcept nogil
    cdef void count_at(self, uint64_t offset) noexcept
    cdef void note_caller(self)
    cdef object _checked(self, object result)
    cdef bint failed(self) noexcept nogil
    cpdef raise_fault(self)
    cpdef Memory with_role(self, int role, uint64_t statistics_offset=*)

cdef class MappedMemory(Memory):
    cdef int flush_kind
    cdef int copy_kind
    cdef readonly bint coherent
