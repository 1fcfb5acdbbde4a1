"""The doors of simulated hosts. A `SimDoor` stands before any `Memory` and hands everything on, unless

- the host's power went at an earlier operation: then stores, flushes and fences have no effect any more, and the step
  that was under way runs to its end without doing anything;
- a planted bug says that this operation is left out or goes astray (`plant`).

Before some fences it lets a part of what was flushed get to memory, in any order, and has the witness look: as if the
power had gone just then.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from sim.cluster.witness cimport Witness
from sim.cxl.cachelines cimport CXL_EXTENT, PendingList, cxl_random, settle
from sim.cxl.memory cimport Memory
from sim.cxl.noncoherent cimport NonCoherentMemory
from sim.cxl.primitives cimport cxl_stream

cdef uint64_t MIX = 0x9E3779B97F4A7C15ULL


cdef class HostControl:
    """One host's power switch, operation counter and meter of simulated time.

    `costs` gives ns by operation (`Operation`), `bytes_per_us` the rate of bulk copies. Before one fence in
    `probe_period` (0: none) memory is looked at as if the power had gone just then.
    """

    def __init__(self, int host, costs=(), uint64_t bytes_per_us=10_000, Witness witness=None, uint64_t seed=0,
                 uint64_t probe_period=0):
        self.host = host
        self.witness = witness
        self.random = seed
        self.probe_period = probe_period if witness is not None else 0
        self.bytes_per_us = max(bytes_per_us, <uint64_t>1)
        for number, nanoseconds in enumerate(costs):
            self.cost[number] = nanoseconds

    def __dealloc__(self):
        free(self.trail)

    def record(self, uint64_t capacity) -> None:
        """Note the next operations, as many at most."""
        free(self.trail)
        self.trail = <uint64_t*>calloc(capacity, 8)
        self.trail_count, self.trail_capacity = 0, capacity
        if self.trail == NULL:
            raise MemoryError

    def recorded(self) -> list:
        """(operation, offset) of each, the first of them first."""
        cdef uint64_t i
        return [(int(self.trail[i] & 15), int(self.trail[i] >> 4)) for i in range(self.trail_count)]

    cdef void call_now(self) noexcept nogil:
        with gil:
            try:
                self.call()
            except BaseException as error:
                self.raised = error         # for whoever looks: nobody between here and there can pass it on

    cdef bint tap(self, int operation, uint64_t offset, uint64_t value) noexcept nogil:
        """Count an operation; False when the host has no power."""
        if self.dead:
            return False
        self.operations += 1
        if self.trail_count < self.trail_capacity:
            self.trail[self.trail_count] = offset * 16 + operation
            self.trail_count += 1
        if self.operations == self.call_at:
            self.call_now()
        if self.operations == self.crash_at:
            self.dead = True
            return False
        if self.crash_fences and (operation == OP_FENCE or operation == OP_FULL_FENCE):
            self.crash_fences -= 1
            if self.crash_fences == 0:
                self.dead = True
                return False
        self.cost_ns += self.cost[operation]
        if operation == OP_COPY_IN or operation == OP_COPY_OUT:
            self.cost_ns += value * 1000 // self.bytes_per_us
        self.hash = (self.hash ^ (offset * 16 + operation)) * MIX
        self.hash ^= self.hash >> 29
        return True


cdef class SimDoor(Memory):
    """A door of one role of one host to `inner`."""

    def __init__(self, Memory inner, HostControl control):
        self.inner = inner
        self.control = control
        self.base = inner.base
        self.bytes = inner.bytes
        self.role = inner.role
        self.writable = inner.writable
        self.owner = inner.owner
        self.statistics = inner.statistics
        if isinstance(inner, NonCoherentMemory):
            self.cache = (<NonCoherentMemory>inner).h
            self.agent = (<NonCoherentMemory>inner).agent

    def plant(self, int mutation, int operation, target, int64_t distance=64) -> None:
        """From now on `operation` is mutated where it meets `target`: (start, end, stride, first, last)."""
        self.mutation = mutation
        self.mutated_operation = operation
        self.distance = distance
        self.target.start, self.target.end, self.target.stride, self.target.first, self.target.last = target

    def planted_matches(self) -> int:
        """How often the planted bug had its chance."""
        return self.matches

    cpdef Memory with_role(self, int role, uint64_t statistics_offset=0):
        return SimDoor(self.inner.with_role(role, statistics_offset), self.control)

    cdef int mutate(self, int operation, uint64_t offset) noexcept nogil:
        """What becomes of an operation: `Mutation`, MUTATE_NOTHING for most."""
        cdef uint64_t at
        if self.mutation == MUTATE_NOTHING:
            return MUTATE_NOTHING
        if self.mutation == MUTATE_FENCE_AFTER and (operation == OP_FENCE or operation == OP_FULL_FENCE):
            if not self.fence_due:
                return MUTATE_NOTHING
            self.fence_due = False
            return MUTATE_DROP
        if operation != self.mutated_operation:
            return MUTATE_NOTHING
        if operation != OP_FENCE and operation != OP_FULL_FENCE:
            if offset < self.target.start or offset >= self.target.end:
                return MUTATE_NOTHING
            at = (offset - self.target.start) % self.target.stride
            if at < self.target.first or at >= self.target.last:
                return MUTATE_NOTHING
        self.matches += 1
        if self.mutation == MUTATE_FENCE_AFTER:
            self.fence_due = True
            return MUTATE_NOTHING
        if self.mutation == MUTATE_SOMETIMES:
            return MUTATE_DROP if self.matches % 8 else MUTATE_NOTHING
        return self.mutation

    cdef uint64_t load(self, uint64_t offset) noexcept nogil:
        self.control.tap(OP_LOAD, offset, 0)
        return self.inner.load(offset)

    cdef void store(self, uint64_t offset, uint64_t value) noexcept nogil:
        cdef int what
        if not self.control.tap(OP_STORE, offset, value):
            return
        what = self.mutate(OP_STORE, offset)
        if what != MUTATE_DROP:
            self.inner.store(offset + (self.distance if what == MUTATE_MOVE else 0), value)

    cdef bint read_line(self, uint64_t offset, void* line) noexcept nogil:
        self.control.tap(OP_READ_LINE, offset, 0)
        return self.inner.read_line(offset, line)

    cdef void write_line(self, uint64_t offset, const void* line) noexcept nogil:
        if self.control.tap(OP_WRITE_LINE, offset, 0) and self.mutate(OP_WRITE_LINE, offset) != MUTATE_DROP:
            self.inner.write_line(offset, line)

    cdef uint64_t fetch_add(self, uint64_t offset, uint64_t value) noexcept nogil:
        if self.control.tap(OP_ATOMIC, offset, value):
            return self.inner.fetch_add(offset, value)
        return self.inner.load(offset)

    cdef uint64_t fetch_or(self, uint64_t offset, uint64_t value) noexcept nogil:
        if self.control.tap(OP_ATOMIC, offset, value):
            return self.inner.fetch_or(offset, value)
        return self.inner.load(offset)

    cdef uint64_t fetch_and(self, uint64_t offset, uint64_t value) noexcept nogil:
        if self.control.tap(OP_ATOMIC, offset, value):
            return self.inner.fetch_and(offset, value)
        return self.inner.load(offset)

    cdef bint compare_and_swap(self, uint64_t offset, uint64_t expected, uint64_t desired) noexcept nogil:
        if self.control.tap(OP_ATOMIC, offset, desired):
            return self.inner.compare_and_swap(offset, expected, desired)
        return True                         # a host without power waits for nobody

    cdef void copy_in(self, uint64_t offset, const void* source, uint64_t count) noexcept nogil:
        cdef int what
        if not self.control.tap(OP_COPY_IN, offset, count):
            return
        what = self.mutate(OP_COPY_IN, offset)
        if what != MUTATE_DROP:
            self.inner.copy_in(offset + (self.distance if what == MUTATE_MOVE else 0), source, count)

    cdef void stream_start(self, cxl_stream* stream, uint64_t offset) noexcept nogil:
        self.inner.stream_start(stream, offset)

    cdef void stream_messages(self, cxl_stream* stream, const void* source, uint64_t count, uint64_t messages,
                              uint32_t check) noexcept nogil:
        cdef uint64_t i
        for i in range(messages):
            if self.control.tap(OP_COPY_IN, 0, count):
                self.inner.stream_messages(stream, <const uint8_t*>source + i * count, count, 1, check)

    cdef void stream_finish(self, cxl_stream* stream) noexcept nogil:
        if not self.control.dead:
            self.inner.stream_finish(stream)

    cdef void copy_out(self, void* target, uint64_t offset, uint64_t count) noexcept nogil:
        self.control.tap(OP_COPY_OUT, offset, count)
        self.inner.copy_out(target, offset, count)

    cdef void flush(self, uint64_t offset, uint64_t count) noexcept nogil:
        cdef int what
        if not self.control.tap(OP_FLUSH, offset, count):
            return
        what = self.mutate(OP_FLUSH, offset)
        if what == MUTATE_DROP:
            return
        if what == MUTATE_MOVE:
            offset += self.distance
        elif what == MUTATE_HALF:
            count = min(count, 64)
        self.inner.flush(offset, count)

    cdef void invalidate(self, uint64_t offset, uint64_t count) noexcept nogil:
        cdef int what
        self.control.tap(OP_INVALIDATE, offset, count)
        what = self.mutate(OP_INVALIDATE, offset)
        if what == MUTATE_DROP:
            return
        if what == MUTATE_MOVE:
            offset += self.distance
        elif what == MUTATE_HALF:
            count = min(count, 64)
        self.inner.invalidate(offset, count)

    cdef void probe(self) noexcept nogil:
        """What is flushed and not fenced may get there at any time, in any order: let it, and look."""
        cdef PendingList* pending
        cdef uint64_t i = 0
        if self.cache == NULL or not self.control.probe_period or cxl_random(
                &self.control.random) % self.control.probe_period:
            return
        pending = &self.cache.pending[self.agent]
        while i < pending.count:
            if pending.entries[i] & CXL_EXTENT:
                i += 1
            elif cxl_random(&self.control.random) & 1:
                settle(self.cache, pending.entries[i])
            i += 1
        self.control.probes += 1
        self.control.witness.check()

    cdef void fence(self) noexcept nogil:
        if self.control.tap(OP_FENCE, 0, 0):
            self.probe()
            if self.mutate(OP_FENCE, 0) != MUTATE_DROP:
                self.inner.fence()

    cdef void full_fence(self) noexcept nogil:
        if self.control.tap(OP_FULL_FENCE, 0, 0):
            self.probe()
            if self.mutate(OP_FULL_FENCE, 0) != MUTATE_DROP:
                self.inner.full_fence()

    cdef const uint8_t* payload(self, uint64_t offset, uint64_t count) noexcept nogil:
        return self.inner.payload(offset, count)

    cdef uint8_t* payload_writable(self, uint64_t offset, uint64_t count) noexcept nogil:
        return self.inner.payload_writable(offset, count)

    cdef void wait(self, uint64_t offset, uint32_t expected, int64_t timeout_ns) noexcept nogil:
        pass                                # nobody sleeps here: the schedule decides who goes on

    cdef void wake(self, uint64_t offset) noexcept nogil:
        pass

    cdef int touch(self, uint64_t offset, uint64_t count) noexcept nogil:
        return self.inner.touch(offset, count)

    cdef void* coherent_area(self, uint64_t offset) noexcept nogil:
        return self.inner.coherent_area(offset)
