"""Whose turn it is: one owner at a time of what must stay as it is while the GIL is lost.

Taken and given with the GIL held, which guards its words: alone, a thread pays for two stores. Whoever waits does so
without the GIL, in the order of coming. While it is held, nothing may run Python; what may lose the GIL is a copy.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil

cdef struct Turn:
    uint64_t tickets                    # taken until now
    uint64_t serving                    # the ticket whose turn it is; equal to `tickets`: nobody's
    uint64_t waiting                    # threads that do
    unsigned long owner                 # thread, 0 none

# Where a thread may lose the GIL: a watching test lets another one go on there.
cpdef enum Place:
    PLACE_MADE = 1                      # an object was made: the collector may have run, and Python with it
    PLACE_COPYING = 2                   # a copy goes on without the GIL
    PLACE_COPIED = 3
    PLACE_WAITING = 4                   # somebody else's turn
    PLACE_NO_ROOM = 5                   # waiting for room
    PLACE_TELLING = 6                   # callbacks run
    PLACE_ENDING = 7                    # a session, or spilling, is being ended

# What a test takes out, to see that it is missed.
cpdef enum Safeguard:
    SAFEGUARD_NONE = 0
    SAFEGUARD_TURN = 1                  # owners wait for each other
    SAFEGUARD_ENDING = 2                # nothing is packed into a session that is being ended
    SAFEGUARD_SPILL_ORDER = 3           # spilling ends only when nothing is in private memory
    SAFEGUARD_CALLBACK_ONCE = 4         # a callback is added and a batch settled in one step each
    SAFEGUARD_LOOK_AGAIN = 5            # a batch is let go only when it is empty still

cdef bint watched
cdef int left_out

cdef void tell_watcher(int place) noexcept
cdef bint wait_for_turn(Turn* turn) noexcept
cdef void wake_waiting(Turn* turn) noexcept

cdef inline void pass_by(int place) noexcept:
    # One load and one branch that is never taken, unless a test watches.
    if watched:
        tell_watcher(place)

cdef inline bint take_turn(Turn* turn) noexcept:
    """Wait for our turn. False when this thread has it already: it was called from within."""
    if turn.tickets == turn.serving:
        turn.tickets += 1
        turn.owner = PyThread_get_thread_ident()
        return True
    return wait_for_turn(turn)

cdef inline void give_turn(Turn* turn) noexcept:
    turn.owner = 0
    turn.serving += 1
    if turn.waiting:
        wake_waiting(turn)

cdef inline void forget_turn(Turn* turn) noexcept:
    """In a forked child: who had it or waited for it is not here."""
    turn.tickets = turn.serving = turn.waiting = 0
    turn.owner = 0
