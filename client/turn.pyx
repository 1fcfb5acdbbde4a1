"""Waiting for one's turn, and the door for tests that decide who goes on: see turn.pxd."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from sim.cxl.primitives cimport cxl_futex_wait, cxl_futex_wake, cxl_load_acquire, cxl_now_ns, cxl_yield

cdef extern from "Python.h":
    ctypedef struct PyObject
    void Py_INCREF(PyObject* o)

cdef enum:
    YIELD_NS = 20000
    SLEEP_NS = 5000000                  # at most, then look again
    EVERYBODY = 1 << 30

cdef object watcher = None

watched = False
left_out = SAFEGUARD_NONE


def watch(found) -> None:
    """Call `found(place)` wherever a thread may lose the GIL; None ends it. For tests."""
    global watcher, watched
    watcher = found
    watched = found is not None


def leave_out(int safeguard) -> None:
    """Go without one safeguard, to see that it is needed; SAFEGUARD_NONE has all of them. For tests."""
    global left_out
    left_out = safeguard


def keep_for_ever(thing) -> None:
    """Never collect this, not even when the interpreter ends: what its end would do is another process's business."""
    Py_INCREF(<PyObject*>thing)


cdef void tell_watcher(int place) noexcept:
    watcher(place)


cdef bint wait_for_turn(Turn* turn) noexcept:
    cdef unsigned long me = PyThread_get_thread_ident()
    cdef uint64_t mine
    if turn.owner == me:
        return False
    mine = turn.tickets
    turn.tickets += 1
    if left_out == SAFEGUARD_TURN:
        return True
    # With the GIL: whoever gives the turn from now on sees us.
    turn.waiting += 1
    while watched and turn.serving != mine:
        tell_watcher(PLACE_WAITING)
    if turn.serving != mine:
        with nogil:
            sleep_until(turn, mine)
    turn.waiting -= 1
    turn.owner = me
    return True


cdef void sleep_until(Turn* turn, uint64_t mine) noexcept nogil:
    cdef int64_t until = cxl_now_ns() + YIELD_NS
    cdef uint64_t serving
    while True:
        serving = cxl_load_acquire(&turn.serving)
        if serving == mine:
            return
        if cxl_now_ns() < until:
            cxl_yield()
        else:
            cxl_futex_wait(&turn.serving, <uint32_t>serving, SLEEP_NS)


cdef void wake_waiting(Turn* turn) noexcept:
    cxl_futex_wake(&turn.serving, EVERYBODY)
