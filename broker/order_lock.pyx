"""The global order lock: a robust process-shared mutex, a named POSIX semaphore, or none (lock-free order).

Waits are timed when there is one; hold times are sampled, one in 64, so that timing does not become what is measured.
"""

from libc.stdint cimport int64_t, uint64_t

from libc.stdlib cimport calloc, free

from broker.layout cimport SequencerCounters
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_fetch_add, cxl_mutex_init, cxl_mutex_lock, cxl_mutex_try, cxl_mutex_unlock, cxl_now_ns

cdef extern from "<fcntl.h>" nogil:
    int O_RDWR

cdef extern from "<semaphore.h>" nogil:
    ctypedef struct sem_t:
        pass
    sem_t* sem_open(const char* name, int oflag)
    int sem_wait(sem_t* semaphore)
    int sem_trywait(sem_t* semaphore)
    int sem_post(sem_t* semaphore)
    int sem_close(sem_t* semaphore)
    sem_t* SEM_FAILED

LOCK_MODES = {"atomic": LOCK_ATOMIC, "mutex": LOCK_MUTEX, "semaphore": LOCK_SEMAPHORE}

cdef enum:
    HOLD_SAMPLE = 64


cdef class OrderLock:
    """Taken without the GIL by scanner threads; its counters lie in the region."""

    def __cinit__(self):
        self.semaphore = NULL

    def __dealloc__(self):
        free(self.own_counters)
        if self.semaphore != NULL:
            sem_close(<sem_t*>self.semaphore)

    @staticmethod
    cdef OrderLock make(int mode, void* mutex, SequencerCounters* counters, object semaphore_name, bint initialise):
        cdef OrderLock self = OrderLock()
        cdef sem_t* opened
        self.mode = mode
        self.counters = counters
        self.mutex = mutex
        if mode == LOCK_MUTEX and initialise and cxl_mutex_init(mutex):
            raise OSError("cannot create a robust process-shared mutex on this system")
        if mode == LOCK_SEMAPHORE:
            name = semaphore_name.encode()
            opened = sem_open(name, O_RDWR)
            if opened == SEM_FAILED:
                raise OSError(f"cannot open the named semaphore {semaphore_name}")
            self.semaphore = opened
        return self

    cdef void acquire(self) noexcept nogil:
        cdef int64_t since
        cdef bint contended
        if self.mode == LOCK_MUTEX:
            contended = cxl_mutex_try(self.mutex) != 0
        else:
            contended = sem_trywait(<sem_t*>self.semaphore) != 0
        if contended:
            since = cxl_now_ns()
            if self.mode == LOCK_MUTEX:
                cxl_mutex_lock(self.mutex)
            else:
                while sem_wait(<sem_t*>self.semaphore) != 0:
                    pass
            self.counters.lock_contended += 1
            self.counters.lock_wait_ns += cxl_now_ns() - since
        self.counters.lock_acquisitions += 1
        self.held_since = cxl_now_ns() if self.counters.lock_acquisitions % HOLD_SAMPLE == 0 else 0

    cdef void release(self) noexcept nogil:
        if self.held_since:
            self.counters.lock_hold_ns += cxl_now_ns() - self.held_since
            self.counters.lock_hold_samples += 1
        if self.mode == LOCK_MUTEX:
            cxl_mutex_unlock(self.mutex)
        else:
            sem_post(<sem_t*>self.semaphore)

    @staticmethod
    def at(Memory memory, uint64_t offset, str mode, str semaphore_name="", bint initialise=False) -> OrderLock:
        """The lock whose mutex lies at `offset`, with counters of its own; for tools and tests."""
        cdef SequencerCounters* counters = <SequencerCounters*>calloc(1, sizeof(SequencerCounters))
        if counters == NULL:
            raise MemoryError
        cdef OrderLock self = OrderLock.make(LOCK_MODES[mode], memory.coherent_area(offset), counters, semaphore_name,
                                             initialise)
        self.own_counters = counters
        self.memory = memory
        return self

    def __enter__(self):
        with nogil:
            self.acquire()
        return self

    def __exit__(self, *_):
        self.release()
