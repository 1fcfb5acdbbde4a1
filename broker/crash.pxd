from libc.stdint cimport uint64_t

cdef enum:
    CRASH_RESERVED = 1          # a broker has reserved a slot and room, and copied nothing
    CRASH_MID_PAYLOAD = 2       # half of the payload is copied
    CRASH_SLOT_CLAIMED = 3      # the payload is there, its header is not
    CRASH_SLOT_VALID = 4        # the header is complete, delegation has not seen it
    CRASH_BEFORE_ACK = 5        # the batch is committed, its ack is not on the way
    CRASH_BEFORE_NUMBER = 6     # the sequencer has classified a batch and taken no number
    CRASH_NUMBER_TAKEN = 7
    CRASH_MID_ENTRY = 8         # half of an order entry is written
    CRASH_ENTRY_WRITTEN = 9     # entries and results are fenced, sessions and frontier are not
    CRASH_PROGRESS_WRITTEN = 10 # sessions are written, the frontier is not
    CRASH_COMMITTED = 11        # the frontier has moved, nobody was woken
    CRASH_EPOCH_RAISED = 12     # a new head has raised the epoch and read nothing
    CRASH_HALF_RECOVERED = 13   # some topics are in its bank
    CRASH_RECOVERED = 14        # all is in its bank, it does not serve yet
    CRASH_POINT_COUNT = 15

cdef uint64_t armed_point       # 0 none

cdef void crash_now(uint64_t point) noexcept nogil

cdef inline bint crash_point_armed(uint64_t point) noexcept nogil:
    return armed_point == point

cdef inline void crash_point(uint64_t point) noexcept nogil:
    # One load and one branch that is never taken, unless a test armed it.
    if armed_point == point:
        crash_now(point)
