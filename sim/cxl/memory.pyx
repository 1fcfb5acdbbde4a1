"""`Memory`, the one door to the region, and `MappedMemory`, which uses real instructions on the mapping."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from sim.cxl.primitives cimport (
    CXL_COPY_AVX512, CXL_COPY_MEMCPY, CXL_COPY_MOVDIR64B, CXL_COPY_PAGES, CXL_COPY_SSE, CXL_COPY_STNP,
    cxl_compare_and_swap, cxl_copy_kind, cxl_copy_nontemporal, cxl_count, cxl_fetch_add, cxl_fetch_and, cxl_fetch_or,
    cxl_flush_kind, cxl_flush_range, cxl_full_fence, cxl_futex_wait, cxl_futex_wake, cxl_invalidate_range,
    cxl_leave_processor, cxl_load_acquire, cxl_processor, cxl_read_line, cxl_store_fence, cxl_store_release, cxl_stream,
    cxl_stream_finish, cxl_stream_message, cxl_stream_start, cxl_touch_pages, cxl_write_line,
)


class MemoryAccessError(Exception):
    """An access outside the region or not aligned, or a write through a read-only attachment."""


class MemoryFault(Exception):
    """This host cannot reach the memory, or used it in a way that its hardware does not offer. It does not go away.

    `kind` is "atomic", "link" or "device".
    """

    def __init__(self, message: str, kind: str, offset: int, role: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.offset = offset
        self.role = role


cdef uint64_t NO_FAULT = 0


@cython.no_gc_clear                     # views that the collector takes later still publish through it
cdef class Memory:
    """The contract (see memory.pxd) and, for tools and tests, its Python face.

    Stages call the native methods without the GIL; the `def` methods below check their arguments and raise
    `MemoryAccessError`, and are for tools, tests and one-time set-up.
    """

    def __cinit__(self, *args, **kwargs):
        self.statistics = &self.private_statistics
        self.fault = &NO_FAULT

    # The native contract. A memory overrides all of it. Nothing here may be reached.
    cdef uint64_t load(self, uint64_t offset) noexcept nogil: return 0
    cdef void store(self, uint64_t offset, uint64_t value) noexcept nogil: pass
    cdef bint read_line(self, uint64_t offset, void* line) noexcept nogil: return False
    cdef void write_line(self, uint64_t offset, const void* line) noexcept nogil: pass
    cdef uint64_t fetch_add(self, uint64_t offset, uint64_t value) noexcept nogil: return 0
    cdef uint64_t fetch_or(self, uint64_t offset, uint64_t value) noexcept nogil: return 0
    cdef uint64_t fetch_and(self, uint64_t offset, uint64_t value) noexcept nogil: return 0
    cdef bint compare_and_swap(self, uint64_t offset, uint64_t expected, uint64_t desired) noexcept nogil: return False
    cdef void copy_in(self, uint64_t offset, const void* source, uint64_t count) noexcept nogil: pass
    cdef void stream_start(self, cxl_stream* stream, uint64_t offset) noexcept nogil: pass
    cdef void stream_messages(self, cxl_stream* stream, const void* source, uint64_t count, uint64_t messages,
                              uint32_t check) noexcept nogil: pass
    cdef void stream_finish(self, cxl_stream* stream) noexcept nogil: pass
    cdef void copy_out(self, void* target, uint64_t offset, uint64_t count) noexcept nogil: pass
    cdef void flush(self, uint64_t offset, uint64_t count) noexcept nogil: pass
    cdef void invalidate(self, uint64_t offset, uint64_t count) noexcept nogil: pass
    cdef void fence(self) noexcept nogil: pass
    cdef void full_fence(self) noexcept nogil: pass
    cdef const uint8_t* payload(self, uint64_t offset, uint64_t count) noexcept nogil: return NULL
    cdef uint8_t* payload_writable(self, uint64_t offset, uint64_t count) noexcept nogil: return NULL
    cdef void wait(self, uint64_t offset, uint32_t expected, int64_t timeout_ns) noexcept nogil: pass
    cdef void wake(self, uint64_t offset) noexcept nogil: pass
    cdef uint64_t processor(self) noexcept nogil: return 0
    cdef int touch(self, uint64_t offset, uint64_t count) noexcept nogil: return 0
    cdef void* coherent_area(self, uint64_t offset) noexcept nogil: return NULL

    cdef void note_caller(self):
        """A Python caller is about to access: memories that name places in code remember it."""
        pass

    cdef bint failed(self) noexcept nogil:
        return self.fault[0] != 0

    cpdef raise_fault(self):
        """Raise `MemoryFault` if this host has one; what it loads since then means nothing."""
        pass

    cpdef Memory with_role(self, int role, uint64_t statistics_offset=0):
        """Return a door to the same memory for another role.

        `statistics_offset` is the region offset of that role's statistics line; 0 counts privately.
        """
        raise NotImplementedError

    cdef void count_at(self, uint64_t offset) noexcept:
        # Counters are an instrument, not part of the simulated memory: they are kept in place so that they
        # outlive the process, and are never flushed.
        self.statistics = <AccessStatistics*>(self.base + offset) if offset and self.writable else &self.private_statistics

    def statistics_dict(self) -> dict[str, int]:
        """What this door has counted: flushes, fences, lines, invalidates, atomics, bulk bytes in and out."""
        return dict(self.statistics[0])

    def _check(self, uint64_t offset, uint64_t count, bint write, uint64_t align=1):
        if offset > self.bytes or count > self.bytes - offset:
            raise MemoryAccessError(f"bytes {offset}..{offset + count} are outside the region of {self.bytes} bytes")
        if offset % align:
            raise MemoryAccessError(f"offset {offset} is not aligned to {align} bytes")
        if write and not self.writable:
            raise MemoryAccessError("this attachment is read-only; attach with writable=True to change memory")
        self.note_caller()

    cdef object _checked(self, object result):
        if self.fault[0]:
            self.raise_fault()
        return result

    def load_word(self, uint64_t offset) -> int:
        """Load 8 bytes (acquire)."""
        self._check(offset, 8, False, 8)
        return self._checked(self.load(offset))

    def store_word(self, uint64_t offset, uint64_t value) -> None:
        """Store 8 bytes (release)."""
        self._check(offset, 8, True, 8)
        self.store(offset, value)
        self._checked(None)

    def fetch_add_word(self, uint64_t offset, uint64_t value) -> int:
        """Add to 8 shared bytes; return what was there."""
        self._check(offset, 8, True, 8)
        return self._checked(self.fetch_add(offset, value))

    def fetch_or_word(self, uint64_t offset, uint64_t value) -> int:
        """Or into 8 shared bytes; return what was there."""
        self._check(offset, 8, True, 8)
        return self._checked(self.fetch_or(offset, value))

    def fetch_and_word(self, uint64_t offset, uint64_t value) -> int:
        """And into 8 shared bytes; return what was there."""
        self._check(offset, 8, True, 8)
        return self._checked(self.fetch_and(offset, value))

    def compare_and_swap_word(self, uint64_t offset, uint64_t expected, uint64_t desired) -> bool:
        """Replace 8 shared bytes if they hold `expected`; say whether they did."""
        self._check(offset, 8, True, 8)
        return self._checked(self.compare_and_swap(offset, expected, desired))

    def read_line_bytes(self, uint64_t offset) -> bytes:
        """Read one 64-byte line; word 0 first."""
        cdef uint8_t line[64]
        self._check(offset, 64, False, 64)
        while not self.read_line(offset, line):
            pass
        return self._checked(line[:64])

    def write_line_bytes(self, uint64_t offset, bytes line) -> None:
        """Write one 64-byte line; word 0 last."""
        if len(line) != 64:
            raise MemoryAccessError(f"a line has 64 bytes, not {len(line)}")
        self._check(offset, 64, True, 64)
        self.write_line(offset, <const void*>PyBytes_AS_STRING(line))
        self._checked(None)

    def write_bytes(self, uint64_t offset, data) -> None:
        """Copy `data` (anything with the buffer protocol) in around the cache. Needs a fence to be visible."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self._check(offset, view.len, True)
            with nogil:
                self.copy_in(offset, view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        self._checked(None)

    def read_bytes(self, uint64_t offset, uint64_t count) -> bytes:
        """Copy `count` bytes out."""
        self._check(offset, count, False)
        cdef object out = PyBytes_FromStringAndSize(NULL, count)
        cdef void* target = PyBytes_AS_STRING(out)
        with nogil:
            self.copy_out(target, offset, count)
        return self._checked(out)

    def flush_range(self, uint64_t offset, uint64_t count) -> None:
        """Write back every line of the range; a fence completes it."""
        self._check(offset, count, False)
        self.flush(offset, count)
        self._checked(None)

    def invalidate_range(self, uint64_t offset, uint64_t count) -> None:
        """Drop every cached line of the range, so that the next load sees memory."""
        self._check(offset, count, False)
        self.invalidate(offset, count)
        self._checked(None)

    def store_fence(self) -> None:
        """Complete earlier flushes and bulk copies before any later store."""
        self.note_caller()
        self.fence()
        self._checked(None)

    def touch_range(self, uint64_t offset, uint64_t count) -> None:
        """Make the range's pages present without changing a byte; raises OSError when tmpfs is full."""
        cdef int result
        self._check(offset, count, False)
        with nogil:
            result = self.touch(offset, count)
        if result < 0:
            raise OSError(-result, f"cannot make bytes {offset}..{offset + count} of the region present")


cdef class MappedMemory(Memory):
    """Real instructions on the mapping.

    `mapping` is an object with the buffer protocol (the region's mmap). On coherent hardware `invalidate` needs no
    instruction and is only counted (`coherent=True`); with `coherent=False` every invalidate flushes the line.
    """

    def __init__(self, mapping, int role=ROLE_ADMIN, bint coherent=True, uint64_t statistics_offset=0):
        cdef Py_buffer view
        try:
            PyObject_GetBuffer(mapping, &view, PyBUF_WRITABLE)
            self.writable = True
        except BufferError:
            PyObject_GetBuffer(mapping, &view, PyBUF_SIMPLE)
            self.writable = False
        self.base = <uint8_t*>view.buf
        self.bytes = view.len
        PyBuffer_Release(&view)
        # A memoryview keeps the mapping from being closed under us.
        self.owner = memoryview(mapping)
        self.role = role
        self.coherent = coherent
        self.flush_kind = cxl_flush_kind()
        self.copy_kind = cxl_copy_kind()
        self.count_at(statistics_offset)

    cpdef Memory with_role(self, int role, uint64_t statistics_offset=0):
        cdef MappedMemory other = MappedMemory.__new__(MappedMemory)
        other.owner = self.owner
        other.base = self.base
        other.bytes = self.bytes
        other.writable = self.writable
        other.role = role
        other.coherent = self.coherent
        other.flush_kind = self.flush_kind
        other.copy_kind = self.copy_kind
        other.count_at(statistics_offset)
        return other

    cdef uint64_t load(self, uint64_t offset) noexcept nogil:
        return cxl_load_acquire(self.base + offset)

    cdef void store(self, uint64_t offset, uint64_t value) noexcept nogil:
        cxl_count(&self.statistics.lines_written, 1)
        cxl_store_release(self.base + offset, value)

    cdef bint read_line(self, uint64_t offset, void* line) noexcept nogil:
        cxl_count(&self.statistics.lines_read, 1)
        return cxl_read_line(line, self.base + offset)

    cdef void write_line(self, uint64_t offset, const void* line) noexcept nogil:
        cxl_count(&self.statistics.lines_written, 1)
        cxl_write_line(self.base + offset, line)

    cdef uint64_t fetch_add(self, uint64_t offset, uint64_t value) noexcept nogil:
        cxl_count(&self.statistics.atomics, 1)
        return cxl_fetch_add(self.base + offset, value)

    cdef uint64_t fetch_or(self, uint64_t offset, uint64_t value) noexcept nogil:
        cxl_count(&self.statistics.atomics, 1)
        return cxl_fetch_or(self.base + offset, value)

    cdef uint64_t fetch_and(self, uint64_t offset, uint64_t value) noexcept nogil:
        cxl_count(&self.statistics.atomics, 1)
        return cxl_fetch_and(self.base + offset, value)

    cdef bint compare_and_swap(self, uint64_t offset, uint64_t expected, uint64_t desired) noexcept nogil:
        cxl_count(&self.statistics.atomics, 1)
        return cxl_compare_and_swap(self.base + offset, expected, desired)

    cdef void copy_in(self, uint64_t offset, const void* source, uint64_t count) noexcept nogil:
        cxl_count(&self.statistics.bytes_in, count)
        cxl_copy_nontemporal(self.base + offset, source, count, self.copy_kind, self.flush_kind)

    cdef void stream_start(self, cxl_stream* stream, uint64_t offset) noexcept nogil:
        cxl_stream_start(stream, self.base + offset)

    cdef void stream_messages(self, cxl_stream* stream, const void* source, uint64_t count, uint64_t messages,
                              uint32_t check) noexcept nogil:
        # `messages` of `count` bytes each, one behind the other.
        cdef uint64_t i
        cxl_count(&self.statistics.bytes_in, count * messages)
        for i in range(messages):
            cxl_stream_message(stream, <const uint8_t*>source + i * count, count, check, self.copy_kind, self.flush_kind)

    cdef void stream_finish(self, cxl_stream* stream) noexcept nogil:
        cxl_stream_finish(stream, self.copy_kind, self.flush_kind)

    cdef void copy_out(self, void* target, uint64_t offset, uint64_t count) noexcept nogil:
        cxl_count(&self.statistics.bytes_out, count)
        memcpy(target, self.base + offset, count)

    cdef void flush(self, uint64_t offset, uint64_t count) noexcept nogil:
        cxl_count(&self.statistics.flushes, (offset % 64 + count + 63) // 64)
        cxl_flush_range(self.base + offset, count, self.flush_kind)

    cdef void invalidate(self, uint64_t offset, uint64_t count) noexcept nogil:
        cxl_count(&self.statistics.invalidates, (offset % 64 + count + 63) // 64)
        if not self.coherent:
            cxl_invalidate_range(self.base + offset, count)

    cdef void fence(self) noexcept nogil:
        cxl_count(&self.statistics.fences, 1)
        cxl_store_fence()

    cdef void full_fence(self) noexcept nogil:
        cxl_count(&self.statistics.fences, 1)
        cxl_full_fence()

    cdef const uint8_t* payload(self, uint64_t offset, uint64_t count) noexcept nogil:
        return self.base + offset

    cdef uint8_t* payload_writable(self, uint64_t offset, uint64_t count) noexcept nogil:
        return self.base + offset

    cdef void wait(self, uint64_t offset, uint32_t expected, int64_t timeout_ns) noexcept nogil:
        cxl_futex_wait(self.base + offset, expected, timeout_ns)

    cdef void wake(self, uint64_t offset) noexcept nogil:
        cxl_futex_wake(self.base + offset, 1 << 30)

    cdef uint64_t processor(self) noexcept nogil:
        return cxl_processor()

    cdef int touch(self, uint64_t offset, uint64_t count) noexcept nogil:
        return cxl_touch_pages(self.base + offset, count)

    cdef void* coherent_area(self, uint64_t offset) noexcept nogil:
        return self.base + offset


def current_processor() -> int:
    """The processor that this thread runs on, plus 1; 0 when nobody knows."""
    return cxl_processor()


def leave_processor(int processor) -> None:
    """Let this thread go on on another processor that it may use, if there is one."""
    cxl_leave_processor(processor)


def processor_features() -> dict[str, object]:
    """What this processor offers: the flush instruction and the bulk copy that `MappedMemory` uses here."""
    names = {CXL_COPY_MEMCPY: "memcpy+flush", CXL_COPY_SSE: "non-temporal SSE", CXL_COPY_AVX512: "non-temporal AVX-512",
             CXL_COPY_MOVDIR64B: "movdir64b", CXL_COPY_STNP: "stnp"}
    flushes = ("clflush", "clflushopt", "clwb", "dc cvac")
    pages = ", four pages in turn" if cxl_copy_kind() & CXL_COPY_PAGES else ""
    return {"flush": flushes[cxl_flush_kind()], "bulk_copy": names[cxl_copy_kind() & ~CXL_COPY_PAGES] + pages}
