"""The segment pool: one interface, three strategies for three kinds of hardware.

    atomic       all brokers fetch-or one bitmap: coherent memory, a coherent area, or device atomics
    partitioned  each broker owns whole lines of the bitmap and uses plain stores: no atomics anywhere
    leader       the head gives them out; brokers ask and give back through single-writer lines: no atomics either

Segment s belongs to part s // share of the bitmap; a broker looks in its own part first, so brokers work on different
words. Single segments come from the low end of a part and runs from its high end: what is small and stays does not lie
between what is large. Warm segments (touched before) are preferred to cold ones.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free

from broker.head cimport HeadView
from broker.layout cimport Layout, POOL_RING
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count_trailing_zeros, cxl_fetch_and, cxl_fetch_or, cxl_load_relaxed, cxl_popcount


cdef enum:
    RESERVE_SHARE = 16              # of the segments that should be free
    LEADER_SHARE = 8                # of those that a leader keeps for topics that have less than their share
    ANSWER_TRIES = 8                # failed allocations after which a leader that can has answered
    GRANTEE_SHIFT = 56              # of a segment's word: broker + 1 above, how many it had been granted before below

GRANTEE_BITS = GRANTEE_SHIFT
cdef uint64_t GRANT_NUMBER = (<uint64_t>1 << GRANTEE_SHIFT) - 1
cdef uint64_t WARMING = GRANT_NUMBER    # nobody's: a leader that ends meanwhile leaves it free


cdef class SegmentPool:
    """Allocates runs of segments for one broker. Not thread-safe: the log's lock is held around it."""

    def __init__(self, Memory memory, Layout layout, int broker):
        self.memory = memory
        self.layout = layout
        self.broker = broker
        self.share = (layout.g.segment_count + layout.g.broker_count - 1) // layout.g.broker_count
        self.share_words = layout.bitmap_words() // layout.g.broker_count
        self.hint = self.cold_from = 0
        self.entitled = True

    cdef uint64_t word_of(self, uint64_t segment) noexcept nogil:
        return (segment // self.share * self.share_words + segment % self.share // 64) * 8

    cdef uint64_t bit_of(self, uint64_t segment) noexcept nogil:
        return <uint64_t>1 << (segment % self.share % 64)

    cdef bint valid(self, uint64_t segment) noexcept nogil:
        return segment < self.layout.g.segment_count

    cdef uint64_t taken_word(self, uint64_t offset) noexcept nogil:
        return self.memory.load(self.layout.bitmap() + offset)

    cdef uint64_t warm_word(self, uint64_t offset) noexcept nogil:
        return self.memory.load(self.layout.warm_bitmap() + offset)

    cdef bint is_warm(self, uint64_t segment) noexcept nogil:
        return (self.warm_word(self.word_of(segment)) & self.bit_of(segment)) != 0

    cdef void mark_warm(self, uint64_t segment) noexcept nogil:
        if not self.is_warm(segment):
            self.memory.fetch_or(self.layout.warm_bitmap() + self.word_of(segment), self.bit_of(segment))

    cdef bint take_bit(self, uint64_t segment) noexcept nogil:
        # The owner is known before the bit is set, and until it is cleared: whoever restarts a broker that was killed
        # anywhere here finds what it had.
        if not self.memory.compare_and_swap(self.layout.segment_owner(segment), 0, self.broker + 1):
            return False
        self.memory.fetch_or(self.layout.bitmap() + self.word_of(segment), self.bit_of(segment))
        return True

    cdef void give_bit(self, uint64_t segment) noexcept nogil:
        self.memory.fetch_and(self.layout.bitmap() + self.word_of(segment), ~self.bit_of(segment))
        self.memory.compare_and_swap(self.layout.segment_owner(segment), self.broker + 1, 0)

    cdef bint owns(self, uint64_t segment) noexcept nogil:
        """Whether a process of this broker took the segment."""
        return self.memory.load(self.layout.segment_owner(segment)) == <uint64_t>self.broker + 1

    cdef uint64_t search_shares(self) noexcept nogil:
        # How many parts of the bitmap this strategy may take from.
        return self.layout.g.broker_count

    cdef void opened(self, uint64_t segment) noexcept nogil:
        self.allocated += 1
        if not self.is_warm(segment):
            self.cold += 1
            self.mark_warm(segment)

    cdef int64_t allocate_one(self, uint64_t part, bint warm) noexcept nogil:
        cdef uint64_t words = self.share_words, w = self.hint if part == <uint64_t>self.broker else 0
        cdef uint64_t free_bits, base, bit, segment
        for w in range(w, words):
            base = (part * words + w) * 8
            free_bits = ~self.taken_word(base)
            if free_bits == 0 and part == <uint64_t>self.broker and w == self.hint and w + 1 < words:
                self.hint += 1
            if warm:
                free_bits &= self.warm_word(base)
            while free_bits:
                bit = cxl_count_trailing_zeros(free_bits)
                free_bits &= free_bits - 1
                segment = part * self.share + w * 64 + bit
                if w * 64 + bit >= self.share or not self.valid(segment):
                    break
                if self.take_bit(segment):
                    return <int64_t>segment
        return -1

    cdef int64_t allocate_run(self, uint64_t run) noexcept nogil:
        """First segment of a free run, downwards from the end of our own part. It may lie in several parts if we may take
        from all."""
        cdef uint64_t at, step, count = self.layout.g.segment_count, length = 0, i
        cdef uint64_t last = min((<uint64_t>self.broker + 1) * self.share, count) - 1
        cdef uint64_t end = count + run
        if self.search_shares() == 1:
            end = last + 1 - min(self.broker * self.share, last + 1)
        for step in range(end):
            at = (last + count - step % count) % count
            if at == count - 1:
                length = 0                      # a run does not go round
            if self.taken_word(self.word_of(at)) & self.bit_of(at):
                length = 0
                continue
            length += 1
            if length == run:
                if self.claim(at, run):
                    for i in range(run):
                        self.allocated -= 1     # claim counted them, allocate will
                    return <int64_t>at
                length = 0
        return -1

    cdef bint claim(self, uint64_t segment, uint64_t run) noexcept nogil:
        """Take exactly this run, or nothing."""
        cdef uint64_t i, k
        if not self.valid(segment + run - 1):
            return False
        if self.search_shares() == 1 and (segment // self.share != <uint64_t>self.broker
                                          or (segment + run - 1) // self.share != <uint64_t>self.broker):
            return False
        for i in range(run):
            if not self.take_bit(segment + i):
                for k in range(i):
                    self.give_bit(segment + k)
                return False
        for i in range(run):
            self.opened(segment + i)
        return True

    cdef int64_t allocate(self, uint64_t run) noexcept nogil:
        """First segment of a free run, or -1."""
        cdef uint64_t i, count = self.search_shares(), brokers = self.layout.g.broker_count
        cdef int64_t found = -1
        cdef int warm, again
        if run > 1:
            found = self.allocate_run(run)
            if found >= 0:
                self.allocated += run
            return found
        for again in range(2):
            for warm in range(1, -1, -1):
                for i in range(count):
                    found = self.allocate_one((self.broker + i) % brokers, warm == 1)
                    if found >= 0:
                        self.opened(found)
                        return found
            if self.hint == 0:
                break
            self.hint = 0                       # others may have given something back below it
        return -1

    cdef bint is_low(self, uint64_t deficit) noexcept nogil:
        """Whether so little is free that room should be made before somebody has to wait for it. `deficit` is what
        topics of this broker have less than their share."""
        cdef uint64_t segments, free_segments = count_free(self, &segments)
        return free_segments < segments // RESERVE_SHARE + deficit * self.search_shares()

    cdef bint has_left(self, uint64_t run, uint64_t deficit) noexcept nogil:
        """Whether, behind a run, that much is left for each broker that takes from where we do."""
        cdef uint64_t segments
        return deficit == 0 or count_free(self, &segments) >= run + deficit * self.search_shares()

    cdef void release(self, uint64_t segment) noexcept nogil:
        self.released += 1
        self.give_bit(segment)
        if segment // self.share == <uint64_t>self.broker:
            self.hint = min(self.hint, segment % self.share // 64)

    cdef void poll(self) noexcept nogil:
        """Take in grants; nothing to do where the bitmap is reached directly."""
        pass

    cdef bint is_asking(self) noexcept nogil:
        """Whether somebody was asked for segments just now and has not had the time to answer."""
        return False

    def allocate_segments(self, uint64_t run=1) -> int:
        """First segment of a run, or -1 when no run of that length is free."""
        return self.allocate(run)

    def claim_segments(self, uint64_t segment, uint64_t run=1) -> bool:
        """Take exactly these segments, or none of them."""
        return self.claim(segment, run)

    def release_segment(self, uint64_t segment) -> None:
        """Give one segment back."""
        self.release(segment)

    def poll_grants(self) -> None:
        """Take in what the leader granted."""
        self.poll()

    cdef int64_t take_cold(self) noexcept nogil:
        """Take one free segment that nobody has touched yet, so that its pages can be made present; -1 when none."""
        cdef uint64_t segment, first = self.broker * self.share
        # What was taken when we came past is touched by whoever has it.
        for segment in range(first + self.cold_from, first + self.share):
            self.cold_from = segment - first + 1
            if self.valid(segment) and not self.is_warm(segment) and self.take_bit(segment):
                return <int64_t>segment
        return -1

    cdef void give_warm(self, uint64_t segment, bint warm) noexcept nogil:
        if warm:
            self.mark_warm(segment)
        self.give_bit(segment)

    def free_count(self) -> int:
        """Free segments as this broker sees them, in the parts it may take from."""
        cdef uint64_t segments          # not asked for
        return count_free(self, &segments)


cdef uint64_t count_free(SegmentPool pool, uint64_t* segments) noexcept nogil:
    """Free segments in the parts that a pool may take from; sets how many there are in them."""
    cdef uint64_t w, used = 0, first = 0, words = pool.share_words, parts = pool.search_shares()
    segments[0] = pool.layout.g.segment_count
    if parts == 1:
        first = pool.broker * words
        segments[0] = min(pool.share, segments[0] - min(segments[0], pool.broker * pool.share))
    for w in range(first, first + parts * words):
        used += cxl_popcount(pool.memory.load(pool.layout.bitmap() + w * 8))
    return segments[0] - used


cdef class AtomicPool(SegmentPool):
    """All brokers share one bitmap by fetch-or."""


cdef class PartitionedPool(SegmentPool):
    """Each broker owns a part of the bitmap, whole lines of it: plain stores, flushed, no atomics."""

    cdef bint owns(self, uint64_t segment) noexcept nogil:
        return segment // self.share == <uint64_t>self.broker and (
            self.memory.load(self.layout.bitmap() + self.word_of(segment)) & self.bit_of(segment)) != 0

    cdef uint64_t search_shares(self) noexcept nogil:
        return 1

    cdef bint take_bit(self, uint64_t segment) noexcept nogil:
        cdef uint64_t offset = self.layout.bitmap() + self.word_of(segment), bit = self.bit_of(segment)
        cdef uint64_t word = self.memory.load(offset)
        if word & bit:
            return False
        self.memory.store(offset, word | bit)
        self.memory.flush(offset, 8)
        return True

    cdef void give_bit(self, uint64_t segment) noexcept nogil:
        cdef uint64_t offset = self.layout.bitmap() + self.word_of(segment)
        self.memory.store(offset, self.memory.load(offset) & ~self.bit_of(segment))
        self.memory.flush(offset, 8)

    cdef void mark_warm(self, uint64_t segment) noexcept nogil:
        cdef uint64_t offset = self.layout.warm_bitmap() + self.word_of(segment)
        self.memory.store(offset, self.memory.load(offset) | self.bit_of(segment))


cdef class LeaderPool(SegmentPool):
    """Asks the head for runs and keeps what it was granted in a private bitmap."""

    def __init__(self, Memory memory, Layout layout, int broker):
        SegmentPool.__init__(self, memory, layout, broker)
        self.mine = <uint64_t*>calloc(layout.bitmap_words(), 8)
        if self.mine == NULL:
            raise MemoryError
        self.head = HeadView(memory, layout)
        self.returned = memory.load(layout.pool_wish(broker) + 16)

    def __dealloc__(self):
        free(self.mine)

    cdef bint knows_head(self) noexcept nogil:
        """Whether a head serves. The first one says how far an earlier process of this broker has counted."""
        cdef uint64_t grant, wanted, collected
        if not self.head.begin():
            return False
        if not self.known:
            grant = self.head.layout.pool_grant(self.broker)
            self.memory.invalidate(grant, 64)
            wanted = self.memory.load(grant)
            collected = self.memory.load(grant + 8)
            if not self.head.same():
                return False
            self.wanted, self.collected = wanted, collected
            self.known = True
        return True

    # What was granted says nothing about the rest: the leader looks.
    cdef bint is_low(self, uint64_t deficit) noexcept nogil: return False
    cdef bint has_left(self, uint64_t run, uint64_t deficit) noexcept nogil: return True

    cdef bint take_bit(self, uint64_t segment) noexcept nogil:
        cdef uint64_t word = self.word_of(segment) // 8, bit = self.bit_of(segment)
        if not self.mine[word] & bit:
            return False
        self.mine[word] &= ~bit
        return True

    cdef void give_bit(self, uint64_t segment) noexcept nogil:
        self.mine[self.word_of(segment) // 8] |= self.bit_of(segment)

    cdef bint claim(self, uint64_t segment, uint64_t run) noexcept nogil:
        cdef uint64_t i, k
        if not self.valid(segment + run - 1):
            return False
        for i in range(run):
            if not self.take_bit(segment + i):
                for k in range(i):
                    self.give_bit(segment + k)
                return False
        for i in range(run):
            self.opened(segment + i)
        return True

    cdef void mark_warm(self, uint64_t segment) noexcept nogil:
        pass                                # the leader has marked it: the bitmaps are the leader's alone

    cdef int64_t allocate(self, uint64_t run) noexcept nogil:
        cdef uint64_t words = self.layout.bitmap_words(), w, bit, segment, at, length = 0
        cdef uint64_t wish = self.layout.pool_wish(self.broker), answered
        # How many wishes were granted is read before the grants are: what we then still wish for is not on its way.
        if not self.knows_head():
            return -1
        self.memory.invalidate(self.head.layout.pool_grant(self.broker), 64)
        answered = self.memory.load(self.head.layout.pool_grant(self.broker))
        self.poll()
        if run == 1:
            for w in range(words):
                if self.mine[w]:
                    bit = cxl_count_trailing_zeros(self.mine[w])
                    segment = w // self.share_words * self.share + w % self.share_words * 64 + bit
                    self.take_bit(segment)
                    self.opened(segment)
                    return <int64_t>segment
        else:
            for at in range(self.layout.g.segment_count):
                length = length + 1 if self.mine[self.word_of(at) // 8] & self.bit_of(at) else 0
                if length == run and self.claim(at + 1 - run, run):
                    return <int64_t>(at + 1 - run)
        self.asked += 1
        # One wish at a time. That of an earlier process may have been granted to us.
        if self.wanted <= answered and self.head.same():
            self.wanted = answered + 1
            self.asked = 0
            self.memory.store(wish + 8, run)    # the run before the count that makes it visible
            self.memory.store(wish + 48, self.entitled)
            self.memory.store(wish, self.wanted)
            self.memory.flush(wish, 64)
            self.memory.fence()
        elif self.entitled and (not self.memory.load(wish + 48) or self.memory.load(wish + 8) < run):
            # A topic that has its share waits there: whoever has less does not wait behind it.
            self.memory.store(wish + 8, max(run, self.memory.load(wish + 8)))
            self.memory.store(wish + 48, 1)
            self.memory.flush(wish, 64)
            self.memory.fence()
        return -1

    cdef bint is_asking(self) noexcept nogil:
        return self.asked <= ANSWER_TRIES

    cdef bint owns(self, uint64_t segment) noexcept nogil:
        """Whether an earlier process of this broker was granted the segment, and did not give it back."""
        cdef uint64_t grantee, taken, i, at
        if not self.knows_head():
            return False
        # On its way back is between what was taken back, read first, and what we have given.
        at = self.head.layout.pool_grant(self.broker)
        self.memory.invalidate(at, 64)
        taken = self.memory.load(at + 16)
        at = self.head.layout.grantee(segment)
        self.memory.invalidate(at, 8)
        grantee = self.memory.load(at)
        if not self.head.same() or self.returned - taken > POOL_RING:
            return False
        for i in range(taken, self.returned):
            if self.memory.load(self.layout.pool_returns(self.broker) + i % POOL_RING * 8) == segment:
                return False
        return grantee >> GRANTEE_SHIFT == <uint64_t>self.broker + 1 and grantee & GRANT_NUMBER < self.collected

    cdef void release(self, uint64_t segment) noexcept nogil:
        cdef uint64_t wish = self.layout.pool_wish(self.broker), slot, grant
        cdef bint serving = self.knows_head()
        self.released += 1
        grant = self.head.layout.pool_grant(self.broker)
        self.memory.invalidate(grant, 64)
        if not serving or self.returned - self.memory.load(grant + 16) >= POOL_RING or not self.head.same():
            self.give_bit(segment)          # the way back is full: keep it for our own use
            return
        slot = self.layout.pool_returns(self.broker) + self.returned % POOL_RING * 8
        self.memory.store(slot, segment)
        self.memory.flush(slot, 8)
        self.memory.fence()
        self.returned += 1
        self.memory.store(wish + 16, self.returned)
        self.memory.flush(wish, 64)
        self.memory.fence()

    cdef void poll(self) noexcept nogil:
        cdef uint64_t grant, ring, granted, segment
        if not self.knows_head():
            return
        grant = self.head.layout.pool_grant(self.broker)
        ring = self.head.layout.pool_grants(self.broker)
        self.memory.invalidate(grant, 64)
        granted = self.memory.load(grant + 8)
        if granted - self.collected > POOL_RING:
            return                              # no ring holds that: a damaged count is not followed
        while self.collected < granted:
            self.memory.invalidate(ring + self.collected % POOL_RING * 8, 8)
            segment = self.memory.load(ring + self.collected % POOL_RING * 8)
            if not self.head.same():
                return
            if self.valid(segment):
                self.give_bit(segment)
            self.collected += 1

    def free_count(self) -> int:
        return sum(cxl_popcount(self.mine[w]) for w in range(self.layout.bitmap_words()))

    cdef int64_t take_cold(self) noexcept nogil:
        return -1


cdef class LeaderBitmap(SegmentPool):
    """All segments, as their leader has them: one process, plain stores, no atomics in memory.

    Who was granted a segment, and as the how manieth, lies in the leader's own bank, and is there before the grant is: so
    the next leader knows what was granted, what was about to be, and what a broker that is started again has. The bitmaps
    are for those who inspect the region.
    """

    def __init__(self, Memory memory, Layout layout, int broker):
        SegmentPool.__init__(self, memory, layout, broker)
        self.taken = <uint64_t*>calloc(2 * layout.bitmap_words(), 8)
        if self.taken == NULL:
            raise MemoryError
        self.warm = self.taken + layout.bitmap_words()
        cdef uint64_t segment, at, grantee, owner
        memory.invalidate(layout.warm_bitmap(), layout.bitmap_words() * 8)
        for segment in range(layout.g.segment_count):
            if memory.load(layout.warm_bitmap() + self.word_of(segment)) & self.bit_of(segment):
                self.warm[self.word_of(segment) // 8] |= self.bit_of(segment)
            at = layout.grantee(segment)
            grantee = memory.load(at)
            owner = grantee >> GRANTEE_SHIFT
            if grantee == 0:
                continue
            if owner == 0 or owner > layout.g.broker_count or (
                    grantee & GRANT_NUMBER >= memory.load(layout.pool_grant(owner - 1) + 8)):
                memory.store(at, 0)             # the last leader ended before it had granted it
                memory.flush(at, 8)
                continue
            self.taken[self.word_of(segment) // 8] |= self.bit_of(segment)
        for at in range(layout.bitmap_words()):
            memory.store(layout.bitmap() + at * 8, self.taken[at])
        memory.flush(layout.bitmap(), layout.bitmap_words() * 8)
        memory.fence()

    def __dealloc__(self):
        free(self.taken)

    cdef uint64_t taken_word(self, uint64_t offset) noexcept nogil:
        return cxl_load_relaxed(&self.taken[offset // 8])

    cdef uint64_t warm_word(self, uint64_t offset) noexcept nogil:
        return cxl_load_relaxed(&self.warm[offset // 8])

    cdef void mark_warm(self, uint64_t segment) noexcept nogil:
        cdef uint64_t word = self.word_of(segment)
        if not self.is_warm(segment):
            cxl_fetch_or(&self.warm[word // 8], self.bit_of(segment))
            self.memory.store(self.layout.warm_bitmap() + word, self.warm_word(word))
            self.memory.flush(self.layout.warm_bitmap() + word, 8)

    cdef bint take_bit(self, uint64_t segment) noexcept nogil:
        return self.take_for(segment, self.grantee)

    cdef bint take_for(self, uint64_t segment, uint64_t grantee) noexcept nogil:
        # The warming thread takes segments, too.
        if cxl_fetch_or(&self.taken[self.word_of(segment) // 8], self.bit_of(segment)) & self.bit_of(segment):
            return False
        self.note(segment, grantee)
        return True

    cdef void give_bit(self, uint64_t segment) noexcept nogil:
        self.note(segment, 0)
        cxl_fetch_and(&self.taken[self.word_of(segment) // 8], ~self.bit_of(segment))

    cdef void note(self, uint64_t segment, uint64_t grantee) noexcept nogil:
        cdef uint64_t word = self.word_of(segment), at = self.layout.grantee(segment)
        cdef uint64_t bits = self.taken_word(word)
        self.memory.store(at, grantee)
        self.memory.flush(at, 8)
        self.memory.store(self.layout.bitmap() + word, bits if grantee else bits & ~self.bit_of(segment))
        self.memory.flush(self.layout.bitmap() + word, 8)


cdef class PoolLeader:
    """The head's side of the leader strategy: answers wishes, takes returns."""

    def __init__(self, Memory memory, Layout layout, int broker):
        cdef uint64_t b, brokers = layout.g.broker_count
        self.memory = memory
        self.layout = layout
        self.pool = LeaderBitmap(memory, layout, broker)
        self.granted_runs = <uint64_t*>calloc(3 * brokers, 8)
        if self.granted_runs == NULL:
            raise MemoryError
        self.granted_segments = self.granted_runs + brokers
        self.taken = self.granted_segments + brokers
        for b in range(brokers):
            self.granted_runs[b] = memory.load(layout.pool_grant(b))
            self.granted_segments[b] = memory.load(layout.pool_grant(b) + 8)
            self.taken[b] = memory.load(layout.pool_grant(b) + 16)

    def __dealloc__(self):
        free(self.granted_runs)

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t b, wish, grant, run, i, slot, segments
        cdef int64_t first, work = 0
        for b in range(self.layout.g.broker_count):
            wish = self.layout.pool_wish(b)
            grant = self.layout.pool_grant(b)
            work += self.take_returns(b)
            if self.memory.load(wish) > self.granted_runs[b]:
                run = self.memory.load(wish + 8)
                if not self.memory.load(wish + 48) and count_free(self.pool, &segments) < (
                        run + self.layout.g.segment_count // LEADER_SHARE):
                    continue                    # the rest is for topics that have less than their share
                self.pool.grantee = (b + 1) << GRANTEE_SHIFT | self.granted_segments[b]
                first = self.pool.allocate(run) if 0 < run <= POOL_RING else -1
                if first < 0:
                    continue
                for i in range(run):
                    slot = self.layout.pool_grants(b) + (self.granted_segments[b] + i) % POOL_RING * 8
                    self.memory.store(slot, first + i)
                    self.memory.flush(slot, 8)
                self.memory.fence()
                self.granted_segments[b] += run
                self.granted_runs[b] += 1
                self.memory.store(grant + 8, self.granted_segments[b])
                self.memory.store(grant, self.granted_runs[b])
                self.memory.flush(grant, 64)
                self.memory.fence()
                work += 1
        return work

    cdef bint owes(self, uint64_t b) noexcept nogil:
        """Whether a broker waits for what the last step could not grant it."""
        return self.memory.load(self.layout.pool_wish(b)) > self.granted_runs[b]

    cdef int64_t take_returns(self, uint64_t b) noexcept nogil:
        cdef uint64_t wish = self.layout.pool_wish(b), grant = self.layout.pool_grant(b), returned, slot, segment
        cdef int64_t work = 0
        self.memory.invalidate(wish, 64)
        returned = self.memory.load(wish + 16)
        if returned - self.taken[b] > POOL_RING:
            returned = self.taken[b]            # no ring holds that: a damaged count is not followed
        while self.taken[b] < returned:
            slot = self.layout.pool_returns(b) + self.taken[b] % POOL_RING * 8
            self.memory.invalidate(slot, 8)
            segment = self.memory.load(slot)
            # What the last leader took back, and had no time to count, is nobody's any more.
            if self.pool.valid(segment) and self.memory.load(self.layout.grantee(segment)) >> GRANTEE_SHIFT == b + 1:
                self.pool.release(segment)
            self.taken[b] += 1
            work += 1
        if work:
            self.memory.fence()                 # it is free before it counts as taken back
            self.memory.store(grant + 16, self.taken[b])
            self.memory.flush(grant, 64)
            self.memory.fence()
        return work

    cdef int64_t warm_one(self, uint64_t from_segment) noexcept nogil:
        cdef uint64_t segment, size = self.layout.g.segment_bytes
        cdef int result
        for segment in range(from_segment, self.layout.g.segment_count):
            if not self.pool.is_warm(segment) and self.pool.take_for(segment, WARMING):
                result = self.memory.touch(self.layout.segment(segment), size)
                self.pool.give_warm(segment, result == 0)
                return <int64_t>segment + 1 if result == 0 else -1
        return -1

    def warm_segment(self) -> bool:
        """Touch one cold free segment ahead of use, without the GIL; False when none is left or tmpfs is full.

        The leader warms for all: nobody else may take a segment without asking.
        """
        cdef int64_t following
        with nogil:
            following = self.warm_one(self.warmed_to)
        if following > 0:
            self.warmed_to = following
        return following > 0
    def step_once(self) -> int:
        """Answer what is asked now; the amount of work done."""
        return self.step()


def make_pool(Memory memory, Layout layout, int broker) -> SegmentPool:
    """The pool that the layout's strategy asks for."""
    kinds = {"atomic": AtomicPool, "partitioned": PartitionedPool, "leader": LeaderPool}
    return kinds[layout.pool_strategy](memory, layout, broker)
