"""`NonCoherentMemory`: the door of a host with a private write-back cache. The model is in cachelines.pxd."""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from sim.cxl.cachelines cimport (
    AGENT_LISTS, AGENT_MINE, Access, CONTROL_CRASHED, CONTROL_EVICT, CONTROL_LINK_LOST, CONTROL_TRACE, CXL_EXTENT,
    CXL_TRACE_PRIME, FAULT_ATOMIC, Host, LINE_ABSENT, LINE_CLEAN, LINE_COHERENT, LINE_DIRTY, LINE_PENDING,
    LINE_STREAMED, LOCKED, LineObserver, OP_ATOMIC, OP_COPY_IN, OP_COPY_OUT, OP_FENCE, OP_FLUSH, OP_FULL_FENCE, OP_INVALIDATE, OP_LOAD,
    OP_POINTER, OP_READ_LINE, OP_STORE, OP_WRITE_LINE, STATE_MASK, VERSION_SHIFT, add_pending, cxl_caller, cxl_random,
    cxl_thread_number, cxl_version_store, delay, drain, drop, ensure, fill, lock_line, next_order, present, settle,
    spontaneous, take_version, transfer, unlock_dirty, unreachable, word_of,
)
from sim.cxl.host cimport HostCache
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport (
    cxl_compare_and_swap, cxl_copy_kind, cxl_copy_nontemporal, cxl_count, cxl_fetch_add, cxl_fetch_and, cxl_fetch_or,
    cxl_flush_kind, cxl_full_fence, cxl_futex_wait, cxl_futex_wake, cxl_load_acquire, cxl_load_relaxed, cxl_now_ns,
    cxl_read_line,
    cxl_store_fence, cxl_store_release, cxl_stream, cxl_stream_finish, cxl_stream_message, cxl_stream_start,
    cxl_touch_pages, cxl_write_line,
)

cdef enum:
    POISON = 0xDB               # what a stale cached copy of payload reads as


@cython.no_gc_clear                     # views that the collector takes later still publish through it
cdef class NonCoherentMemory(Memory):
    """A role's door of one host. `agent` says which thread accesses; by default the calling one."""

    def __init__(self, HostCache host, int role=0, uint64_t statistics_offset=0):
        self.open(host, role, statistics_offset)

    cdef void open(self, HostCache host, int role, uint64_t statistics_offset):
        self.host = host
        self.h = &host.h
        self.owner = host.device.owner
        self.base = host.device.base
        self.bytes = host.device.bytes
        self.writable = host.device.writable
        self.role = role
        self.agent = AGENT_MINE
        self.fault = &self.h.fault
        self.countdown = 1
        self.count_at(statistics_offset)

    cpdef Memory with_role(self, int role, uint64_t statistics_offset=0):
        cdef NonCoherentMemory other = NonCoherentMemory.__new__(NonCoherentMemory)
        other.open(self.host, role, statistics_offset)
        other.agent = self.agent
        return other

    cpdef raise_fault(self):
        self.host.raise_fault()

    cdef void note_caller(self):
        if self.host.observer is not None:
            self.host.observer.called_from_python()

    cdef int my_agent(self) noexcept nogil:
        return (cxl_thread_number() if self.agent < 0 else self.agent) % AGENT_LISTS

    cdef bint enter(self, int operation, uint64_t offset, uint64_t value) noexcept nogil:
        """The slow way in: faults, the trace, what happens by itself. False when the access must have no effect."""
        cdef Host* h = self.h
        if h.control & CONTROL_CRASHED:
            return False
        if h.control & CONTROL_TRACE:
            h.operations += 1
            if h.crash_at and h.operations >= h.crash_at:
                h.control |= CONTROL_CRASHED
                return False
            h.trace_hash = (h.trace_hash ^ <uint64_t>operation ^ offset << 4) * CXL_TRACE_PRIME
            h.trace_hash = (h.trace_hash ^ value) * CXL_TRACE_PRIME
        if h.control & CONTROL_EVICT:
            self.countdown -= 1
            if self.countdown == 0:
                self.countdown = 1 + cxl_random(&h.random) % (2 * h.eviction_period)
                spontaneous(h)
        if h.control & CONTROL_LINK_LOST:
            h.fault_role = self.role
            unreachable(h, offset)
        return True

    # ---- words and lines ---------------------------------------------------------------------------------------------

    cdef uint64_t load(self, uint64_t offset) noexcept nogil:
        cdef Host* h = self.h
        cdef uint64_t kind, value
        cdef Access who
        if h.control and not self.enter(OP_LOAD, offset, 0):
            return 0
        if offset >= h.line_bytes:
            return cxl_load_acquire(self.base + offset)
        kind = cxl_load_acquire(&h.states[offset >> 6]) & STATE_MASK
        if kind == LINE_COHERENT:
            value = cxl_load_acquire(self.base + offset)
        else:
            if kind == LINE_ABSENT:
                ensure(h, offset >> 6)
            value = cxl_load_acquire(h.lines + offset)
            if h.observer != NULL:
                who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
                (<LineObserver>h.observer).loaded(h, offset >> 6, &who)
        if h.control & CONTROL_TRACE:
            h.trace_hash = (h.trace_hash ^ value) * CXL_TRACE_PRIME
        return value

    cdef void store(self, uint64_t offset, uint64_t value) noexcept nogil:
        cdef Host* h = self.h
        cdef uint64_t line = offset >> 6, state
        cdef Access who
        cxl_count(&self.statistics.lines_written, 1)
        if h.control and not self.enter(OP_STORE, offset, value):
            return
        if offset >= h.line_bytes or cxl_load_relaxed(&h.states[line]) & STATE_MASK == LINE_COHERENT:
            if not unreachable(h, offset):
                cxl_store_release(self.base + offset, value)
            return
        state = present(h, line, lock_line(&h.states[line]))
        cxl_store_release(h.lines + offset, value)
        if h.observer != NULL:
            who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
            (<LineObserver>h.observer).stored(h, line, &who)
        unlock_dirty(h, line, state)

    cdef bint read_line(self, uint64_t offset, void* line) noexcept nogil:
        cdef Host* h = self.h
        cdef uint64_t number = offset >> 6, state
        cdef Access who
        cxl_count(&self.statistics.lines_read, 1)
        if h.control and not self.enter(OP_READ_LINE, offset, 0):
            memset(line, 0, 64)
            return True
        if offset >= h.line_bytes or cxl_load_relaxed(&h.states[number]) & STATE_MASK == LINE_COHERENT:
            return cxl_read_line(line, self.base + offset)
        state = lock_line(&h.states[number])
        if state & STATE_MASK == LINE_ABSENT:
            state = fill(h, number)
        memcpy(line, h.lines + offset, 64)
        if h.observer != NULL:
            who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
            (<LineObserver>h.observer).loaded(h, number, &who)
        cxl_store_release(&h.states[number], state)
        if h.control & CONTROL_TRACE:
            h.trace_hash = (h.trace_hash ^ (<uint64_t*>line)[0]) * CXL_TRACE_PRIME
        return True

    cdef void write_line(self, uint64_t offset, const void* line) noexcept nogil:
        cdef Host* h = self.h
        cdef uint64_t number = offset >> 6, state
        cdef Access who
        cxl_count(&self.statistics.lines_written, 1)
        if h.control and not self.enter(OP_WRITE_LINE, offset, (<const uint64_t*>line)[0]):
            return
        if offset >= h.line_bytes or cxl_load_relaxed(&h.states[number]) & STATE_MASK == LINE_COHERENT:
            if not unreachable(h, offset):
                cxl_write_line(self.base + offset, line)
            return
        state = present(h, number, lock_line(&h.states[number]))
        if state & STATE_MASK != LINE_DIRTY:        # all of it is replaced: nothing of an old copy can come back
            state = <uint64_t>(h.versions[number] & ~<uint32_t>1) << VERSION_SHIFT
        cxl_write_line(h.lines + offset, line)
        if h.observer != NULL:
            who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
            (<LineObserver>h.observer).stored(h, number, &who)
        unlock_dirty(h, number, state)

    # ---- atomics: in the coherent area, or by the device ---------------------------------------------------------------

    cdef bint atomic_begin(self, uint64_t offset, uint64_t value, uint64_t site, uint32_t* version) noexcept nogil:
        """Whether an atomic may act on the device's bytes; the device's line is locked when it is an ordinary one."""
        cdef Host* h = self.h
        cdef Access who
        cdef bint allowed
        cxl_count(&self.statistics.atomics, 1)
        if h.control and not self.enter(OP_ATOMIC, offset, value):
            return False
        if unreachable(h, offset):
            return False
        version[0] = 1                  # odd: nothing to unlock
        if offset < h.line_bytes and cxl_load_relaxed(&h.states[offset >> 6]) & STATE_MASK == LINE_COHERENT:
            return True
        allowed = h.device_atomics
        if h.observer != NULL:
            who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, site, offset
            (<LineObserver>h.observer).atomic(h, offset, allowed, &who)
        if not allowed:
            if not h.fault:
                h.fault_offset = offset
                h.fault_role = self.role
                h.fault = FAULT_ATOMIC
            return False
        if offset < h.line_bytes:
            settle(h, offset >> 6)
            drop(h, offset >> 6)
            version[0] = take_version(&h.versions[offset >> 6])
        return True

    cdef void atomic_end(self, uint64_t offset, uint32_t version) noexcept nogil:
        if not version & 1:
            cxl_version_store(&self.h.versions[offset >> 6], version + 2)

    cdef uint64_t fetch_add(self, uint64_t offset, uint64_t value) noexcept nogil:
        cdef uint32_t version
        cdef uint64_t found
        if not self.atomic_begin(offset, value, cxl_caller(), &version):
            return 0
        found = cxl_fetch_add(self.base + offset, value)
        self.atomic_end(offset, version)
        return found

    cdef uint64_t fetch_or(self, uint64_t offset, uint64_t value) noexcept nogil:
        cdef uint32_t version
        cdef uint64_t found
        if not self.atomic_begin(offset, value, cxl_caller(), &version):
            return 0
        found = cxl_fetch_or(self.base + offset, value)
        self.atomic_end(offset, version)
        return found

    cdef uint64_t fetch_and(self, uint64_t offset, uint64_t value) noexcept nogil:
        cdef uint32_t version
        cdef uint64_t found
        if not self.atomic_begin(offset, value, cxl_caller(), &version):
            return 0
        found = cxl_fetch_and(self.base + offset, value)
        self.atomic_end(offset, version)
        return found

    cdef bint compare_and_swap(self, uint64_t offset, uint64_t expected, uint64_t desired) noexcept nogil:
        cdef uint32_t version
        cdef bint done
        if not self.atomic_begin(offset, desired, cxl_caller(), &version):
            # A crashed host must not spin on what it will never get.
            return (self.h.control & CONTROL_CRASHED) != 0
        done = cxl_compare_and_swap(self.base + offset, expected, desired)
        self.atomic_end(offset, version)
        return done

    # ---- bulk copies -----------------------------------------------------------------------------------------------------

    cdef void streamed(self, uint64_t offset, uint64_t count, const uint8_t* source, uint64_t site) noexcept nogil:
        """Lines written around the cache. A part of a line goes through it and is flushed. `source` NULL: it is there."""
        cdef Host* h = self.h
        cdef int agent = self.my_agent()
        cdef uint64_t line, state, start, here
        cdef Access who
        who.agent, who.role, who.site, who.offset = agent, self.role, site, offset
        while count:
            line = offset >> 6
            start = offset & 63
            here = min(64 - start, count)
            if cxl_load_relaxed(&h.states[line]) & STATE_MASK == LINE_COHERENT:
                memcpy(h.base + offset, source, here)
            else:
                state = lock_line(&h.states[line])
                if here < 64 and state & STATE_MASK == LINE_CLEAN:
                    state = fill(h, line)       # a store around the cache takes an old copy out of it
                elif here < 64:
                    state = present(h, line, state)
                else:
                    state = <uint64_t>(h.versions[line] & ~<uint32_t>1) << VERSION_SHIFT
                if source != NULL:
                    memcpy(h.lines + offset, source, here)
                if h.observer != NULL:
                    (<LineObserver>h.observer).stored(h, line, &who)
                    (<LineObserver>h.observer).flushed(h, line, LINE_STREAMED, &who)
                cxl_store_release(&h.states[line], word_of(LINE_STREAMED if here == 64 else LINE_PENDING, next_order(h),
                                                           state >> VERSION_SHIFT))
                add_pending(&h.pending[agent], line, 0, 1)
            offset += here
            count -= here
            if source != NULL:
                source += here

    cdef void write_payload(self, uint64_t offset, uint64_t count, uint64_t site) noexcept nogil:
        """Payload was put around the cache: this host's copies of it are gone, it is visible once it is fenced."""
        cdef Host* h = self.h
        cdef uint64_t first = (offset - h.line_bytes) >> 6, lines = (offset % 64 + count + 63) >> 6
        cdef int agent = self.my_agent()
        cdef Access who
        if lines == 0:
            return
        memset(h.payload_known + first, 0, lines)
        if h.device.on:
            transfer(&h.device.write_until, count, h.device.write_fs)
        if h.observer != NULL:
            who.agent, who.role, who.site, who.offset = agent, self.role, site, offset
            (<LineObserver>h.observer).payload_written(h, offset, count, &who)
        add_pending(&h.pending[agent], CXL_EXTENT | first, lines, 2)

    cdef void copy_in(self, uint64_t offset, const void* source, uint64_t count) noexcept nogil:
        cdef Host* h = self.h
        cdef uint64_t head = 0
        cxl_count(&self.statistics.bytes_in, count)
        if count == 0 or h.control and not self.enter(OP_COPY_IN, offset, count):
            return
        if offset < h.line_bytes:
            head = min(count, h.line_bytes - offset)
            self.streamed(offset, head, <const uint8_t*>source, cxl_caller())
        if head < count and not unreachable(h, offset):
            cxl_copy_nontemporal(self.base + offset + head, <const uint8_t*>source + head, count - head,
                                 cxl_copy_kind(), cxl_flush_kind())
            self.write_payload(offset + head, count - head, cxl_caller())

    cdef void stream_start(self, cxl_stream* stream, uint64_t offset) noexcept nogil:
        cxl_stream_start(stream, (self.base if offset >= self.h.line_bytes else self.h.lines) + offset)

    cdef void stream_messages(self, cxl_stream* stream, const void* source, uint64_t count, uint64_t messages,
                              uint32_t check) noexcept nogil:
        cdef uint64_t i
        cxl_count(&self.statistics.bytes_in, count * messages)
        for i in range(messages):
            if self.h.control and not self.enter(OP_COPY_IN, 0, count):
                return
            cxl_stream_message(stream, <const uint8_t*>source + i * count, count, check, cxl_copy_kind(),
                               cxl_flush_kind())

    cdef void stream_finish(self, cxl_stream* stream) noexcept nogil:
        cdef Host* h = self.h
        cxl_stream_finish(stream, cxl_copy_kind(), cxl_flush_kind())
        if h.control & CONTROL_CRASHED:
            return
        if h.lines <= stream.start < h.lines + h.line_bytes:
            self.streamed(stream.start - h.lines, stream.at - stream.start, NULL, cxl_caller())
        else:
            self.write_payload(stream.start - h.base, stream.at - stream.start, cxl_caller())

    cdef uint64_t read_payload(self, uint64_t offset, uint64_t count, uint64_t site) noexcept nogil:
        """Payload is looked at: its lines are cached from now on; how many were stale."""
        cdef Host* h = self.h
        cdef uint64_t first = (offset - h.line_bytes) >> 6, lines = (offset % 64 + count + 63) >> 6, i, stale = 0
        cdef uint8_t* known = h.payload_known + first
        cdef uint8_t* version = h.payload_versions + first
        cdef Access who
        for i in range(lines):
            stale += known[i] != 0 and known[i] != version[i] + 1
            known[i] = version[i] + 1 if known[i] == 0 else known[i]
        h.stale_payload += stale
        if h.device.on:
            delay(cxl_now_ns(), h.device.load_ns)
            transfer(&h.device.read_until, count, h.device.read_fs)
        if h.observer != NULL:
            who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, site, offset
            (<LineObserver>h.observer).payload_read(h, offset, count, stale, &who)
        return stale

    cdef void copy_out(self, void* target, uint64_t offset, uint64_t count) noexcept nogil:
        cdef Host* h = self.h
        cdef uint8_t* to = <uint8_t*>target
        cdef uint64_t here, line, state
        cdef Access who
        cxl_count(&self.statistics.bytes_out, count)
        if h.control and not self.enter(OP_COPY_OUT, offset, count):
            memset(target, 0, count)
            return
        who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
        while count and offset < h.line_bytes:
            line = offset >> 6
            here = min(64 - (offset & 63), count)
            if cxl_load_relaxed(&h.states[line]) & STATE_MASK == LINE_COHERENT:
                memcpy(to, h.base + offset, here)
            else:
                state = lock_line(&h.states[line])
                if state & STATE_MASK == LINE_ABSENT:
                    state = fill(h, line)
                memcpy(to, h.lines + offset, here)
                if h.observer != NULL:
                    (<LineObserver>h.observer).loaded(h, line, &who)
                cxl_store_release(&h.states[line], state)
            to += here
            offset += here
            count -= here
        if count:
            state = self.read_payload(offset, count, who.site)
            memcpy(to, h.base + offset, count)
            if state:
                self.poison(to, offset, count)

    cdef void poison(self, uint8_t* to, uint64_t offset, uint64_t count) noexcept nogil:
        """Spoil what was read from stale cached copies, as hardware would have given old bytes."""
        cdef Host* h = self.h
        cdef uint64_t here, line
        while count:
            line = (offset - h.line_bytes) >> 6
            here = min(64 - (offset & 63), count)
            if h.payload_known[line] and h.payload_known[line] != h.payload_versions[line] + 1:
                memset(to, POISON, here)
            to += here
            offset += here
            count -= here

    cdef const uint8_t* payload(self, uint64_t offset, uint64_t count) noexcept nogil:
        cdef Host* h = self.h
        cdef uint64_t line
        cdef Access who
        if h.control:
            self.enter(OP_POINTER, offset, count)
        if offset >= h.line_bytes:
            self.read_payload(offset, count, cxl_caller())
            return self.base + offset
        who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
        for line in range(offset >> 6, (offset + count + 63) >> 6):
            ensure(h, line)
            if h.observer != NULL:
                (<LineObserver>h.observer).loaded(h, line, &who)
        return h.lines + offset

    cdef uint8_t* payload_writable(self, uint64_t offset, uint64_t count) noexcept nogil:
        # What is stored through the pointer becomes visible by a flush of the range, and a fence.
        cdef Host* h = self.h
        cdef uint64_t line
        cdef Access who
        if h.control:
            self.enter(OP_POINTER, offset, count)
        if offset >= h.line_bytes:
            return self.base + offset
        who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
        for line in range(offset >> 6, (offset + count + 63) >> 6):
            state = present(h, line, lock_line(&h.states[line]))
            if h.observer != NULL:
                (<LineObserver>h.observer).stored(h, line, &who)
            unlock_dirty(h, line, state)
        return h.lines + offset

    # ---- flush, invalidate, fence ------------------------------------------------------------------------------------------

    cdef void flush(self, uint64_t offset, uint64_t count) noexcept nogil:
        cdef Host* h = self.h
        cdef uint64_t line, end = (offset + count + 63) >> 6, state
        cdef Access who
        cxl_count(&self.statistics.flushes, (offset % 64 + count + 63) // 64)
        if h.control and not self.enter(OP_FLUSH, offset, count):
            return
        who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
        for line in range(offset >> 6, min(end, h.line_bytes >> 6)):
            if cxl_load_relaxed(&h.states[line]) & STATE_MASK == LINE_COHERENT:
                continue
            state = lock_line(&h.states[line])
            if h.observer != NULL:
                (<LineObserver>h.observer).flushed(h, line, state & STATE_MASK, &who)
            if state & STATE_MASK == LINE_DIRTY:
                if h.device.on:
                    delay(cxl_now_ns(), h.device.flush_ns)
                state = (state & ~<uint64_t>STATE_MASK) | LINE_PENDING
                add_pending(&h.pending[who.agent], line, 0, 1)
            cxl_store_release(&h.states[line], state)
        if offset + count > h.line_bytes:
            self.write_payload(max(offset, h.line_bytes), offset + count - max(offset, h.line_bytes), who.site)

    cdef void invalidate(self, uint64_t offset, uint64_t count) noexcept nogil:
        cdef Host* h = self.h
        cdef uint64_t line, first, end = (offset + count + 63) >> 6, state
        cdef Access who
        cxl_count(&self.statistics.invalidates, (offset % 64 + count + 63) // 64)
        if h.control and not self.enter(OP_INVALIDATE, offset, count):
            return
        who.agent, who.role, who.site, who.offset = self.my_agent(), self.role, cxl_caller(), offset
        for line in range(offset >> 6, min(end, h.line_bytes >> 6)):
            state = cxl_load_relaxed(&h.states[line])
            if h.observer != NULL:
                (<LineObserver>h.observer).invalidated(h, line, state & STATE_MASK, &who)
            if state & (STATE_MASK | LOCKED) != LINE_ABSENT:
                drop(h, line)
        if offset + count > h.line_bytes:
            first = (max(offset, h.line_bytes) - h.line_bytes) >> 6
            memset(h.payload_known + first, 0, end - (h.line_bytes >> 6) - first)

    cdef void fence(self) noexcept nogil:
        cdef uint64_t drained
        cdef Access who
        cxl_count(&self.statistics.fences, 1)
        if self.h.control and not self.enter(OP_FENCE, 0, 0):
            return
        who.agent = self.my_agent()
        cxl_store_fence()
        drained = drain(self.h, &self.h.pending[who.agent])
        if self.h.observer != NULL:
            who.role, who.site = self.role, cxl_caller()
            (<LineObserver>self.h.observer).fenced(self.h, drained, &who)

    cdef void full_fence(self) noexcept nogil:
        cdef uint64_t drained
        cdef Access who
        cxl_count(&self.statistics.fences, 1)
        if self.h.control and not self.enter(OP_FULL_FENCE, 0, 0):
            return
        who.agent = self.my_agent()
        drained = drain(self.h, &self.h.pending[who.agent])
        cxl_full_fence()
        if self.h.observer != NULL and drained:
            who.role, who.site = self.role, cxl_caller()
            (<LineObserver>self.h.observer).fenced(self.h, drained, &who)

    def order_all(self) -> None:
        """Order every load and store, and complete this thread's flushes, as `mfence` does."""
        self.full_fence()

    def load_fence(self) -> None:
        """Order loads, as `lfence` does: it completes no flush. For tests of what it does not do."""

    # ---- conveniences of the simulation ---------------------------------------------------------------------------------------

    cdef void wait(self, uint64_t offset, uint32_t expected, int64_t timeout_ns) noexcept nogil:
        if not self.h.control & (CONTROL_CRASHED | CONTROL_LINK_LOST):
            cxl_futex_wait(self.base + offset, expected, timeout_ns)

    cdef void wake(self, uint64_t offset) noexcept nogil:
        cxl_futex_wake(self.base + offset, 1 << 30)

    cdef int touch(self, uint64_t offset, uint64_t count) noexcept nogil:
        return cxl_touch_pages(self.base + offset, count)

    cdef void* coherent_area(self, uint64_t offset) noexcept nogil:
        return self.base + offset
