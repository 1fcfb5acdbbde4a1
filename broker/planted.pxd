"""Planted bugs: switches in the stages that make one mistake each, to show that simulation and tests see it.

Off (0) they cost one load and one branch that is always predicted. Only the simulation and tests turn one on, by
`broker.planted.plant`; nothing in a broker process does.
"""

cpdef enum Planted:
    PLANT_NOTHING = 0
    PLANT_TAIL_UNFLUSHED = 1            # delegation: what does not fill a group waits for more
    PLANT_ORDERED_OVERWRITTEN = 2       # sequencer: a broker's ordered count is set, not advanced
    PLANT_LEVEL_IGNORED = 3             # acks: level 2 looks at what level 1 looks at
    PLANT_SKIPPED_NUMBERED = 4          # sequencer: a duplicate takes an order number
    PLANT_RING_OVERRUN = 5              # log: the ring goes round over slots that are in use
    PLANT_VOID_BLOCKS = 6               # sequencer: an empty slot is taken for one that is still to come
    PLANT_RESULT_NOT_AWAITED = 7        # release: a slot is reused before its result was taken
    PLANT_HELD_FREED = 8                # release: a slot is reused when it was scanned, held or not
    PLANT_READER_IGNORED = 9            # reclaim: readers do not hold the frontier back
    PLANT_REPLICA_IGNORED = 10          # reclaim: replicas do not hold the frontier back
    PLANT_SEGMENT_EARLY = 11            # release: segments come back before their messages are reclaimed
    PLANT_GAP_SKIPPED = 12              # sequencer: a missing batch is not waited for
    PLANT_DUPLICATE_TWICE = 13          # sequencer: a batch that is in the log already is ordered again
    PLANT_ACK_EARLY = 14                # acks: a result is taken for the frontier
    PLANT_DONE_BEFORE_FENCE = 15        # sequencer: the frontier moves over entries that are not fenced
    PLANT_INDEX_OVERRUN = 16            # sequencer: order entries that are not reclaimed are overwritten
    PLANT_OLD_HEAD_ACKS = 17            # acks: what a replaced head says is taken for an answer
    PLANT_ZOMBIE_FOLLOWED = 18          # head view: whoever was head first is followed for ever
    PLANT_ENDS_UNKNOWN = 19             # log: a broker that is started again takes unknown ends of segments for zero
    PLANT_LEASES_FORGOTTEN = 20         # attach: a broker that is started again forgets what living clients may write into
    PLANT_HALF_BANK = 21                # takeover: what a takeover that fell has filled is taken for what a head left

cdef int planted_bug

cdef inline bint planted(int which) noexcept nogil:
    return planted_bug == which
