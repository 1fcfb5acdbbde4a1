"""A door that a simulated host goes through: counted, priced, cut off at any operation, and mutated on request."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from sim.cluster.witness cimport Witness
from sim.cxl.cachelines cimport Host
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_stream

cpdef enum Operation:
    OP_LOAD = 0
    OP_STORE = 1
    OP_READ_LINE = 2
    OP_WRITE_LINE = 3
    OP_ATOMIC = 4
    OP_COPY_IN = 5
    OP_COPY_OUT = 6
    OP_FLUSH = 7
    OP_INVALIDATE = 8
    OP_FENCE = 9
    OP_FULL_FENCE = 10
    OP_COUNT = 11

cpdef enum Mutation:
    MUTATE_NOTHING = 0
    MUTATE_DROP = 1             # the operation is left out
    MUTATE_MOVE = 2             # it goes to a line `distance` bytes away
    MUTATE_SOMETIMES = 3        # it is done every 8th time only
    MUTATE_FENCE_AFTER = 4      # the fence that follows this operation is left out
    MUTATE_HALF = 5             # only the first line of several

cdef struct Target:
    # Offsets with start <= offset < end and first <= (offset - start) % stride < last.
    uint64_t start
    uint64_t end
    uint64_t stride
    uint64_t first
    uint64_t last

cdef class HostControl:
    cdef readonly int host
    cdef public uint64_t operations     # of this host so far
    cdef public uint64_t crash_at       # the operation at which its power goes; 0 never
    cdef public uint64_t crash_fences   # its power goes before it has done so many more fences; 0 never
    cdef public uint64_t call_at        # the operation before which `call` is called, in the middle of a step; 0 never
    cdef public object call
    cdef public object raised           # what that raised
    cdef public bint dead               # nothing that it does has an effect any more
    cdef public int64_t cost_ns         # what its operations cost under the profile, since it was taken
    cdef public uint64_t hash           # of its operations, in order
    cdef uint64_t cost[11]
    cdef uint64_t bytes_per_us
    cdef Witness witness
    cdef uint64_t random
    cdef uint64_t probe_period          # every so many fences on average, what is pending gets there in any order
    cdef readonly uint64_t probes
    cdef uint64_t* trail                # operations as they came, while they are recorded: offset * 16 + operation
    cdef uint64_t trail_count
    cdef uint64_t trail_capacity

    cdef void call_now(self) noexcept nogil
    cdef bint tap(self, int operation, uint64_t offset, uint64_t value) noexcept nogil

cdef class SimDoor(Memory):
    cdef Memory inner
    cdef readonly HostControl control
    cdef int mutation
    cdef int mutated_operation
    cdef int64_t distance
    cdef Target target
    cdef uint64_t matches               # how often the mutated operation came
    cdef bint fence_due                 # the next fence is the one to leave out

    cdef Host* cache
    cdef int agent

    cdef void probe(self) noexcept nogil
    cdef int mutate(self, int operation, uint64_t offset) noexcept nogil
