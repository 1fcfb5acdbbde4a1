from libc.stdint cimport int64_t, uint64_t

from sim.cluster.door cimport HostControl
from sim.cluster.witness cimport Witness
from sim.cxl.clock cimport ManualClock

cpdef enum Stop:
    STOP_DONE = 0           # as many steps as were asked for
    STOP_POWER = 1          # a host's power went in the last step
    STOP_BREACH = 2         # the witness saw an invariant broken
    STOP_IDLE = 3           # a whole round did nothing

cdef struct Unit:
    void* stage
    void* control
    int host
    int weight

cdef struct Step:
    uint64_t number
    int64_t work
    uint64_t unit

cdef class Schedule:
    cdef ManualClock clock
    cdef Witness witness
    cdef list stage_objects
    cdef list controls
    cdef readonly list names
    cdef Unit* units
    cdef readonly int count
    cdef int* chances               # unit numbers, each as often as its weight
    cdef int chance_count
    cdef uint64_t random
    cdef readonly uint64_t steps
    cdef readonly uint64_t worked
    cdef readonly uint64_t hash
    cdef readonly int last          # unit that stepped last
    cdef public int64_t tick_ns     # how much time a step takes at least
    cdef uint64_t idle

    cdef uint64_t next(self) noexcept nogil
    cdef int go(self, uint64_t until, uint64_t idle_limit) noexcept nogil
