"""The schedule: one thread, one seed, and who steps next is drawn. Steps run without Python between them."""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, realloc

from broker.stages.stage cimport Stage
from sim.cluster.door cimport HostControl
from sim.cluster.witness cimport Witness
from sim.cxl.clock cimport ManualClock

cdef enum:
    UNITS_MAX = 1024
    WEIGHT_MAX = 16
    LOOK_AGAIN = 64             # one step in so many ignores its hints, as a loop does before it sleeps
    CHECK_IDLE = 16             # one idle step in so many is followed by a check
    RECHECK = 1024              # steps between checks of everything that is kept


cdef class Schedule:
    """Stages of all hosts, stepped in an order that follows from `seed`.

    Every step moves `clock` by what the host's operations cost, shared among the hosts, and by at least `tick_ns`.
    The witness looks at memory after every step that did something.
    """

    def __cinit__(self):
        self.units = NULL
        self.chances = NULL

    def __init__(self, uint64_t seed, ManualClock clock, Witness witness, int64_t tick_ns):
        self.random = seed * 2 + 1
        self.clock = clock
        self.witness = witness
        self.tick_ns = tick_ns
        self.stage_objects, self.controls, self.names = [], [], []
        self.units = <Unit*>calloc(UNITS_MAX, sizeof(Unit))
        self.chances = <int*>calloc(UNITS_MAX * WEIGHT_MAX, sizeof(int))
        if self.units == NULL or self.chances == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.units)
        free(self.chances)

    def add(self, str name, Stage stage, HostControl control, int weight) -> int:
        """A stage that may step; its unit number. It is drawn `weight` times as often as one of weight 1."""
        cdef Unit* unit
        if self.count == UNITS_MAX or not 0 < weight <= WEIGHT_MAX:
            raise ValueError(f"at most {UNITS_MAX} stages of weight 1 to {WEIGHT_MAX}")
        unit = &self.units[self.count]
        unit.stage = <void*>stage
        unit.control = <void*>control
        unit.host = control.host
        unit.weight = weight
        self.stage_objects.append(stage)
        self.controls.append(control)
        self.names.append(name)
        self.count += 1
        return self.count - 1

    def allow(self, units) -> None:
        """Only these units are drawn from now on."""
        cdef int number, i, at = 0
        for number in units:
            for i in range(self.units[number].weight):
                self.chances[at] = number
                at += 1
        self.chance_count = at

    def look_at(self, Witness witness) -> None:
        """From now on this one looks at memory: there is another region."""
        self.witness = witness

    cdef uint64_t next(self) noexcept nogil:
        # xorshift64*, from Marsaglia and Vigna
        self.random ^= self.random >> 12
        self.random ^= self.random << 25
        self.random ^= self.random >> 27
        return self.random * 0x2545F4914F6CDD1DULL >> 16

    cdef int go(self, uint64_t until, uint64_t idle_limit) noexcept nogil:
        cdef Unit* unit
        cdef int64_t work
        cdef uint64_t drawn
        while self.steps < until:
            self.steps += 1
            if self.chance_count == 0:
                self.clock.time_ns += self.tick_ns
                continue
            drawn = self.next()
            self.last = self.chances[drawn % self.chance_count]
            unit = &self.units[self.last]
            if (drawn >> 32) % LOOK_AGAIN == 0:
                (<Stage>unit.stage).prepare_to_sleep()
            work = (<Stage>unit.stage).step()
            self.witness.step = self.steps
            self.clock.time_ns += self.tick_ns + (<HostControl>unit.control).cost_ns
            (<HostControl>unit.control).cost_ns = 0
            self.hash = (self.hash ^ (<uint64_t>self.last << 32) ^ <uint64_t>work) * 0x9E3779B97F4A7C15ULL
            self.hash ^= self.hash >> 32
            if work:
                self.worked += 1
                self.idle = 0
            else:
                self.idle += 1
            if (<HostControl>unit.control).dead:
                return STOP_POWER
            if self.witness.breach:
                return STOP_BREACH              # seen in the middle of the step
            if work or self.steps % CHECK_IDLE == 0:
                if self.witness.check():
                    return STOP_BREACH
            if self.steps % RECHECK == 0 and self.witness.recheck():
                return STOP_BREACH
            if idle_limit and self.idle >= idle_limit:
                return STOP_IDLE
        return STOP_DONE

    def run(self, uint64_t until, uint64_t idle_limit=0) -> int:
        """Step until step number `until`; why it stopped (`Stop`). With `idle_limit`, also after so many idle steps."""
        cdef int why
        with nogil:
            why = self.go(until, idle_limit)
        return why

    def stages(self) -> list:
        """All stages, by unit number."""
        return list(self.stage_objects)

    def host_of(self, int unit) -> int:
        """The host whose stage this is."""
        return self.units[unit].host

    def mix(self, uint64_t value) -> None:
        """Make something that happened outside of steps part of the hash."""
        self.hash = (self.hash ^ value) * 0x9E3779B97F4A7C15ULL
        self.hash ^= self.hash >> 32
