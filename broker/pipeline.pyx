"""The loop that runs stages, and how it waits. Stages own no thread; a thread here is a list of stages and one waiter.

    latency    yields for ever: the shortest waits, whole cores busy
    balanced   yields for a bounded time after the last work (short while only gRPC clients are there), then sleeps
    saver      sleeps at once
"""

import threading

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from broker.doorbell cimport Doorbell
from broker.layout cimport BrokerCounters
from broker.log cimport BrokerLog
from broker.stages.stage cimport Stage
from sim.cxl.primitives cimport cxl_count, cxl_load_acquire, cxl_now_ns, cxl_store_release, cxl_yield

WAITING = {"latency": -1, "balanced": 400_000, "saver": 0}

cdef enum:
    YIELD_SHORT = 8
    LOOK_AGAIN = 1024           # idle loops after which a loop that never sleeps looks everywhere
    SLEEP_NS = 500000000        # a sleeper looks by itself this often, whatever the doorbells say


cdef class Pipeline:
    """One thread's stages.

    `yield_ns` is how long the loop yields after its last work before it sleeps; -1 never sleeps, 0 sleeps at once.
    """

    cdef list stage_objects
    cdef void** stages
    cdef int stage_count
    cdef Doorbell doorbell
    cdef BrokerLog log
    cdef BrokerCounters* counters
    cdef int64_t yield_ns
    cdef uint64_t stopping
    cdef readonly str name
    cdef object thread

    def __init__(self, name, stages, Doorbell doorbell, BrokerLog log, int64_t yield_ns):
        self.name = name
        self.stage_objects = list(stages)
        self.stage_count = len(self.stage_objects)
        self.stages = <void**>calloc(self.stage_count, sizeof(void*))
        if self.stages == NULL:
            raise MemoryError
        for i, stage in enumerate(self.stage_objects):
            if not isinstance(stage, Stage):
                raise TypeError(f"{stage!r} is not a stage")
            self.stages[i] = <void*>stage
        self.doorbell = doorbell
        self.log = log
        self.counters = log.counters
        self.yield_ns = yield_ns

    def __dealloc__(self):
        free(self.stages)

    cdef int64_t step(self) noexcept nogil:
        cdef int i
        cdef int64_t work = 0
        for i in range(self.stage_count):
            work += (<Stage>self.stages[i]).step()
        return work

    cdef void sleep(self) noexcept nogil:
        """Arm, look everywhere once more, and only then sleep."""
        cdef uint32_t seen = self.doorbell.arm()
        cdef int i
        for i in range(self.stage_count):
            (<Stage>self.stages[i]).prepare_to_sleep()
        if self.step() == 0 and not cxl_load_acquire(&self.stopping):
            cxl_count(&self.counters.sleeps, 1)
            self.doorbell.sleep(seen, SLEEP_NS)
            cxl_count(&self.counters.wakeups, 1)
        self.doorbell.disarm()

    cdef void loop(self) noexcept nogil:
        cdef int64_t idle_since = 0, window = self.yield_ns, now
        cdef uint64_t idle_loops = 0
        cdef int i
        while not cxl_load_acquire(&self.stopping):
            cxl_count(&self.counters.loops, 1)
            if self.step():
                idle_since = 0
                continue
            cxl_count(&self.counters.idle_loops, 1)
            if self.yield_ns < 0:
                idle_loops += 1
                if idle_loops % LOOK_AGAIN == 0:
                    for i in range(self.stage_count):
                        (<Stage>self.stages[i]).prepare_to_sleep()
                cxl_yield()
                continue
            if idle_since == 0:
                idle_since = cxl_now_ns()
            now = cxl_now_ns()
            if now - idle_since < window:
                cxl_yield()
            else:
                # Stays idle until there is work: a wake-up without any goes straight back to sleep.
                self.sleep()
            # Yielding pays where microseconds matter, for attached clients; gRPC needs the processor more.
            window = self.yield_ns if cxl_load_acquire(&self.log.eager) else self.yield_ns // YIELD_SHORT

    def raise_failure(self) -> None:
        """Raise what the Python part of a stage has raised, if one has."""
        for stage in self.stage_objects:
            if stage.failure is not None:
                raise stage.failure

    def run(self) -> None:
        """Run until `stop`; without the GIL."""
        with nogil:
            self.loop()

    def start(self) -> None:
        """Run in a thread of its own."""
        self.thread = threading.Thread(target=self.run, name=self.name, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ask the loop to end and wait until it has."""
        cxl_store_release(&self.stopping, 1)
        if self.thread is not None:
            while self.thread.is_alive():
                self.doorbell.ring_now()
                self.thread.join(0.05)
            self.thread = None
