"""The books of an attached publisher: channels and their leases, what is in flight, what was answered and is to be told.

    submit: descriptor, ring ─► (a broker answers in memory) ─► take_answers: settled, noted ─► tell_outcomes: callbacks

Everything here that changes is changed by `nogil` functions that are called with the GIL. In them no Python can run, not
even the collector: each is one step for all other threads, and the compiler sees to it. What became of a batch is noted
by these functions and told outside of them, where callbacks may do what they like.
"""

import time
from array import array

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from broker.doorbell cimport Doorbell
from broker.layout cimport (
    ATTACH_OPEN, ATTACH_RING, CONTROL_BROKER, CONTROL_EPOCH_SHIFT, Descriptor, LEASE_RING, Layout, NO_LEASE,
    RESULT_COMMITTED, RESULT_DAMAGED, RESULT_DUPLICATE, RESULT_FENCED, RESULT_UNDURABLE, make_tag, result_tag,
)
from client.batch cimport (
    OUTCOME_COMMITTED, OUTCOME_DUPLICATE, OUTCOME_FAILED, OUTCOME_SENT, OUTCOME_UNDURABLE, Batch, Outcome, PyObject, tell,
)
from client.pages cimport Pages
from client.turn cimport PLACE_TELLING, PyThread_get_thread_ident, pass_by
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_now_ns, cxl_yield

from broker.errors import CxlmqError, replica_failed

cdef enum:
    SEQUENCES_IN_FLIGHT = 200       # below the sequencer's window of 256
    LATENCY_RING = 65536
    # How long news is looked for: without giving the core away, then yielding, then asleep.
    SPIN_NS = 6000
    YIELD_NS = 200000

cdef uint64_t STATUS_MASK = <uint64_t>0xFF << 40


cdef class AttachedBooks:
    """Of one publisher, over its sessions."""

    def __cinit__(self):
        self.sent = <Sent*>calloc(SENT_RING, sizeof(Sent))
        self.latencies = <int64_t*>calloc(LATENCY_RING, 8)
        if self.sent == NULL or self.latencies == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef uint64_t i
        cdef Outcome* outcome
        if self.sent != NULL:
            for i in range(SENT_RING):
                drop(self.sent[i].holder)
        while self.first != NULL:
            outcome = self.first
            self.first = outcome.next
            drop(outcome)
        free(self.channels)
        free(self.sent)
        free(self.latencies)

    def add_channel(self, uint64_t slot, uint64_t generation, uint64_t broker) -> None:
        """A slot at one more broker, or at one that came back."""
        cdef uint64_t c = 0
        cdef Channel* channel
        while c < self.channel_count and not self.channels[c].left:
            c += 1
        if c == CHANNELS_MAX:
            raise CxlmqError(f"a publisher has at most {CHANNELS_MAX} slots in a session")
        channel = &self.channels[c]
        memset(channel, 0, sizeof(Channel))
        channel.slot = slot
        channel.generation = generation
        channel.broker = broker
        channel.alive = True
        # Its broker wiped our lines there: what we still know of them is of an earlier use.
        self.memory.invalidate(self.layout.attach_client(slot), 128)
        self.channel_count = max(self.channel_count, c + 1)
        self.count_somewhere()
        self.beat()

    cdef void count_somewhere(self):
        """Count what we flush and fence in the first slot that is ours."""
        cdef uint64_t c
        for c in range(self.channel_count):
            if not self.channels[c].left:
                self.memory.count_at(self.layout.attach_statistics(self.channels[c].slot))
                return

    def quiet_slots(self, double seconds) -> list[int]:
        """Slots at live brokers that have batches and have answered none for so long."""
        cdef uint64_t c
        cdef int64_t since = cxl_now_ns() - <int64_t>(seconds * 1e9)
        return [self.channels[c].slot for c in range(self.channel_count)
                if self.channels[c].alive and self.channels[c].submitted != self.channels[c].completed
                and self.channels[c].heard_ns < since]

    def let_go(self) -> list[int]:
        """Slots at dead brokers out of whose leases nothing has to be submitted any more: we are done with them."""
        cdef uint64_t c, lease, waiting
        cdef Channel* channel
        found = []
        for c in range(self.channel_count):
            channel = &self.channels[c]
            waiting = 0
            for lease in range(LEASE_RING):
                waiting += channel.lease_waiting[lease]
            if not (channel.alive or channel.left or channel.loaned or waiting):
                channel.left = True
                found.append(channel.slot)
        return found

    cdef bint has_lease_for(self, Channel* channel, uint64_t need, bint ask) noexcept nogil:
        """Whether the channel's lease has room; moves on to the next lease when it has not.

        With `ask`, its broker is asked for a lease beyond a segment: one is, and not all of them.
        """
        if need > self.layout.g.segment_bytes and not ask and not (
                channel.has_lease and channel.lease_bytes - channel.lease_used >= need):
            return False
        cdef uint64_t at
        while True:
            if channel.has_lease:
                if channel.lease_bytes - channel.lease_used >= need:
                    return True
                channel.has_lease = False
                channel.using += 1
                self.retire(channel)
                self.tell(channel)
            at = self.layout.attach_line(channel.slot)
            if channel.granted <= channel.using:
                self.memory.invalidate(at, 64)
                if self.memory.load(at) != (channel.generation << 8 | ATTACH_OPEN):
                    self.fenced = True
                    return False
                channel.granted = self.memory.load(at + 16)
                if channel.granted <= channel.using:
                    if channel.idle:
                        channel.idle = False
                        self.tell(channel)
                    if ask and need > self.layout.g.segment_bytes and channel.wanted != need:
                        channel.wanted = need
                        self.tell(channel)
                    return False
            at = self.layout.attach_lease(channel.slot, channel.using)
            self.memory.invalidate(at, 16)
            channel.lease_offset = self.memory.load(at)
            channel.lease_bytes = self.memory.load(at + 8)
            channel.lease_used = 0
            channel.has_lease = True
            if channel.wanted and channel.lease_bytes >= channel.wanted:
                channel.wanted = 0
                self.tell(channel)
            self.pages.need(channel.lease_offset, channel.lease_bytes)

    cdef void retire(self, Channel* channel) noexcept nogil:
        """Give up leases, oldest first, whose batches are all settled."""
        while channel.retired < channel.using and channel.lease_waiting[channel.retired % LEASE_RING] == 0:
            channel.retired += 1

    cdef void tell(self, Channel* channel) noexcept nogil:
        """Write our line: which lease we fill, which we are done with, what we want."""
        cdef uint64_t at = self.layout.attach_client(channel.slot)
        self.memory.store(at + 24, <uint64_t>NO_LEASE if channel.idle else channel.wanted)
        self.memory.store(at + 16, channel.retired)
        self.memory.store(at + 8, channel.using)
        self.memory.flush(at, 64)
        # Fenced here: whoever told may now wait for what the broker answers to it.
        self.memory.fence()

    cdef void give_all_back(self) noexcept nogil:
        """Give every lease back; nothing is open, lent or in flight. The next message asks for one."""
        cdef uint64_t c
        cdef Channel* channel
        for c in range(self.channel_count):
            channel = &self.channels[c]
            if not channel.alive or channel.left:
                continue
            self.memory.invalidate(self.layout.attach_line(channel.slot), 64)
            channel.granted = self.memory.load(self.layout.attach_line(channel.slot) + 16)
            if channel.idle and channel.granted == channel.using:
                continue
            channel.idle = True
            channel.has_lease = False
            channel.wanted = 0
            channel.using = channel.granted
            self.retire(channel)
            self.tell(channel)

    def is_idle(self) -> bool:
        """Whether we hold no leases because we gave them back, and have asked for none since."""
        cdef uint64_t c
        for c in range(self.channel_count):
            if self.channels[c].alive and not self.channels[c].idle:
                return False
        return True

    cdef bint takes(self, Channel* channel, uint64_t need, bint ask) noexcept nogil:
        return (channel.alive and not channel.loaned and channel.submitted - channel.completed < self.ring_limit
                and self.has_lease_for(channel, need, ask))

    cdef int64_t pick(self, uint64_t need) noexcept nogil:
        """The channel that takes a batch of `need` bytes; -1 when none does now. All in turn, but one that is alone goes
        to the head: there it is received, ordered and acknowledged by one process, and no other has to wake up."""
        cdef uint64_t i, c, head
        cdef bint asked = False
        cdef Channel* channel
        if self.next_sequence - self.oldest >= SEQUENCES_IN_FLIGHT:
            return -1
        if self.in_flight >= 2 and self.in_flight_bytes + need > self.window_bytes:
            return -1
        if self.in_flight == 0:
            head = self.memory.load(self.layout.control()) & CONTROL_BROKER
            for c in range(self.channel_count):
                if self.channels[c].broker == head and self.takes(&self.channels[c], need, False):
                    return <int64_t>c
        for i in range(self.channel_count):
            c = (self.turn_of + i) % self.channel_count
            channel = &self.channels[c]
            if self.takes(channel, need, not asked):
                self.turn_of = (c + 1) % self.channel_count
                return <int64_t>c
            asked = asked or channel.alive
        return -1

    cdef void ring(self, Channel* channel) noexcept nogil:
        """Wake its broker. After a full fence."""
        self.bell.offset = self.layout.doorbell(channel.broker, 0)
        self.woken = self.bell.is_armed()
        self.bell.ring_fenced()

    cdef void ring_all(self) noexcept nogil:
        cdef uint64_t c
        self.memory.full_fence()
        for c in range(self.channel_count):
            if not self.channels[c].left:
                self.ring(&self.channels[c])

    cdef bint news(self, bint leases) noexcept nogil:
        """Whether some channel has a completion, or was fenced, or (with `leases`) has been granted what it waits for."""
        cdef uint64_t c, at
        cdef Channel* channel
        for c in range(self.channel_count):
            channel = &self.channels[c]
            if channel.left:
                continue
            if channel.completed < channel.submitted:
                at = self.layout.attach_completion(channel.slot, channel.completed)
                self.memory.invalidate(at, 16)
                if self.memory.load(at) & ~STATUS_MASK == result_tag(channel.generation, channel.completed):
                    return True
            at = self.layout.attach_line(channel.slot)
            self.memory.invalidate(at, 64)
            if leases and not channel.has_lease and self.memory.load(at + 16) > channel.using:
                return True
            if channel.alive and self.memory.load(at) != (channel.generation << 8 | ATTACH_OPEN):
                return True
        return False

    cdef int wait_for_news(self, int64_t nanoseconds, bint leases) except -1:
        """Look and yield for a while, then sleep on the doorbell of the channel whose batch is the oldest. At once if the only
        one woke its broker up: that may need this core."""
        cdef int64_t start = cxl_now_ns(), spin = start + SPIN_NS
        cdef int64_t until = start if self.woken and self.in_flight == 1 else start + min(nanoseconds, YIELD_NS)
        cdef uint64_t bell, channel
        cdef uint32_t seen
        cdef bint found = False
        cdef Sent* sent = &self.sent[self.oldest % SENT_RING]
        channel = sent.channel if sent.state != SENT_FREE and sent.sequence == self.oldest else 0
        if self.channel_count == 0:
            time.sleep(0.001)
            return 0
        bell = self.layout.attach_doorbell(self.channels[channel % self.channel_count].slot)
        self.asleep += 1
        with nogil:
            while not found and cxl_now_ns() < until:
                found = self.news(leases)
                if not found and cxl_now_ns() >= spin:
                    cxl_yield()
            if not found and nanoseconds > cxl_now_ns() - start:
                seen = <uint32_t>self.memory.load(bell)
                self.memory.fetch_add(bell + 8, 1)
                self.memory.full_fence()
                if not self.news(leases):
                    self.memory.wait(bell, seen, min(nanoseconds, 5000000))
                self.memory.fetch_add(bell + 8, <uint64_t>-1)
        self.asleep -= 1
        return 0

    cdef void submit_new(self, uint64_t c, uint64_t offset, uint64_t nbytes, uint64_t messages, uint64_t wall_ns,
                         Outcome* holder, bint counted, double deadline) noexcept nogil:
        """Submit a batch with the session's next sequence. What nobody waits for beyond that (level 0) is settled with it."""
        cdef Sent* sent = &self.sent[self.next_sequence % SENT_RING]
        sent.deadline = deadline
        self.batches += 1
        if self.level == 0:
            if not counted:
                self.acked += messages
            if holder != NULL:
                self.note(holder, OUTCOME_SENT, 0, self.channels[c].broker, NULL)
            holder = NULL
        self.submit(c, offset, nbytes, messages, self.next_sequence, wall_ns)
        sent.holder = holder
        self.next_sequence += 1

    cdef void submit(self, uint64_t c, uint64_t offset, uint64_t nbytes, uint64_t messages, uint64_t sequence,
                     uint64_t wall_ns) noexcept nogil:
        """Fence the payload, write the descriptor, ring. The channel has room for it."""
        cdef Channel* channel = &self.channels[c]
        cdef Sent* sent = &self.sent[sequence % SENT_RING]
        cdef Descriptor descriptor
        cdef uint64_t at = self.layout.attach_descriptor(channel.slot, channel.submitted)
        sent.sequence = sequence
        sent.expired = False
        sent.state = SENT_WAITING
        sent.channel = c
        sent.lease = channel.using
        sent.offset = offset
        sent.nbytes = nbytes
        sent.messages = messages
        sent.wall_ns = wall_ns
        descriptor.commit = make_tag(channel.generation, channel.submitted)
        descriptor.payload_offset = offset
        descriptor.payload_bytes = nbytes
        descriptor.message_count = messages
        descriptor.lease = channel.using
        descriptor.batch_sequence = sequence
        descriptor.published_wall_ns = wall_ns
        descriptor.processor = self.memory.processor()
        descriptor.reserved = 0
        sent.sent_ns = cxl_now_ns()
        if channel.submitted == channel.completed:
            channel.heard_ns = sent.sent_ns
        channel.sequences[channel.submitted % ATTACH_RING] = sequence
        channel.lease_waiting[channel.using % LEASE_RING] += 1
        channel.submitted += 1
        self.in_flight += 1
        self.in_flight_bytes += nbytes
        # The payload first: a broker that sees the descriptor may hand the payload to anyone.
        self.memory.fence()
        self.memory.write_line(at, &descriptor)
        self.memory.flush(at, 64)
        self.memory.full_fence()
        self.ring(channel)

    cdef uint64_t copy_to(self, uint64_t c, const void* payload, uint64_t nbytes) noexcept nogil:
        """Copy a packed payload into a channel's lease, which has room; where it lies."""
        cdef Channel* channel = &self.channels[c]
        cdef uint64_t to = channel.lease_offset + channel.lease_used
        self.memory.copy_in(to, payload, nbytes)
        channel.lease_used += (nbytes + 63) & ~<uint64_t>63
        return to

    cpdef uint64_t poll(self) except? 0xFFFFFFFFFFFFFFFF:
        """Settle what was answered; how many batches that were."""
        cdef uint64_t done = self.take_answers()
        if self.first != NULL:
            self.tell_outcomes()
        return done

    cdef uint64_t take_answers(self) noexcept nogil:
        cdef uint64_t c, done = 0, was_retired, was_completed
        cdef Channel* channel
        if self.ending:
            return 0
        for c in range(self.channel_count):
            channel = &self.channels[c]
            if channel.left:
                continue
            was_retired = channel.retired
            was_completed = channel.completed
            while channel.completed < channel.submitted and self.take_answer(c, &done):
                pass
            if channel.completed != was_completed:
                channel.heard_ns = cxl_now_ns()
            if channel.retired != was_retired:
                self.tell(channel)
        while self.oldest < self.next_sequence and self.sent[self.oldest % SENT_RING].state == SENT_FREE:
            self.oldest += 1
        return done

    cdef bint take_answer(self, uint64_t c, uint64_t* done) noexcept nogil:
        """Take the next completion of a channel; False when it is not there yet."""
        cdef Channel* channel = &self.channels[c]
        cdef uint64_t at = self.layout.attach_completion(channel.slot, channel.completed), state, status
        cdef Sent* sent
        self.memory.invalidate(at, 16)
        state = self.memory.load(at)
        if state & ~STATUS_MASK != result_tag(channel.generation, channel.completed):
            return False
        status = state >> 40 & 0xFF
        sent = &self.sent[channel.sequences[channel.completed % ATTACH_RING] % SENT_RING]
        channel.completed += 1
        if sent.state != SENT_WAITING or sent.channel != c:
            return True                     # it was submitted again elsewhere
        if status == RESULT_COMMITTED or status == RESULT_DUPLICATE:
            self.settle(sent, OUTCOME_COMMITTED if status == RESULT_COMMITTED else OUTCOME_DUPLICATE, self.memory.load(at + 8))
            done[0] += 1
        elif status == RESULT_UNDURABLE:
            self.settle(sent, OUTCOME_UNDURABLE, self.memory.load(at + 8))
            done[0] += 1
        elif status == RESULT_FENCED:
            self.fenced = True
        elif status == RESULT_DAMAGED:
            # Its sequence will never come: the session has to end.
            self.give_up(sent, NULL)
            self.fenced = True
        else:
            sent.state = SENT_RETRY
            self.retry_wanted = True
        return True

    cdef void settle(self, Sent* sent, int kind, uint64_t position) noexcept nogil:
        cdef Channel* channel = &self.channels[sent.channel]
        channel.lease_waiting[sent.lease % LEASE_RING] -= 1
        self.retire(channel)
        self.in_flight -= 1
        self.in_flight_bytes -= sent.nbytes
        if sent.expired:
            self.expired -= 1
        elif kind == OUTCOME_UNDURABLE:
            self.failed += sent.messages
        elif self.level != 0:
            self.acked += sent.messages
        self.duplicates += kind == OUTCOME_DUPLICATE
        sent.state = SENT_FREE
        self.latencies[self.latency_count % LATENCY_RING] = cxl_now_ns() - sent.sent_ns
        self.latency_count += 1
        self.note_of(sent, kind, position, NULL)

    cdef void note_of(self, Sent* sent, int kind, uint64_t position, PyObject* error) noexcept nogil:
        """Note what became of a batch in flight; from now on nobody waits for it."""
        cdef Outcome* holder = sent.holder
        sent.holder = NULL
        if holder != NULL:
            self.note(holder, kind, position, self.channels[sent.channel].broker, error)

    cdef void note(self, Outcome* outcome, int kind, uint64_t position, uint64_t broker, PyObject* error) noexcept nogil:
        """Note an outcome, to be told where Python may run."""
        outcome.kind = kind
        outcome.position = position
        outcome.broker = broker
        outcome.error = error
        outcome.next = NULL
        if error != NULL:
            Py_INCREF(error)
        if self.first == NULL:
            self.first = outcome
        else:
            self.last.next = outcome
        self.last = outcome

    cdef int tell_outcomes(self) except -1:
        """Wake whoever waits, in order. Callbacks may publish and so come back here: only the outermost call tells."""
        cdef uint64_t epoch
        if self.telling or self.first == NULL:
            return 0
        epoch = self.memory.load(self.layout.control()) >> CONTROL_EPOCH_SHIFT     # the head's, as over gRPC
        self.telling = PyThread_get_thread_ident()
        try:
            while self.first != NULL:
                self.tell_first(epoch)
        finally:
            self.telling = 0
        return 0

    cdef int tell_first(self, uint64_t epoch) except -1:
        cdef Outcome* outcome = self.first
        cdef Batch batch = <Batch>outcome.batch
        cdef object position = None, error = None, broker = None
        cdef list callbacks
        self.first = outcome.next
        Py_XDECREF(outcome.batch)           # `batch` holds it now
        outcome.batch = NULL
        if outcome.kind == OUTCOME_COMMITTED:
            position = outcome.position
        elif outcome.kind == OUTCOME_UNDURABLE:
            error = replica_failed(outcome.position)
        elif outcome.kind == OUTCOME_FAILED:
            error = CxlmqError("the batch was damaged in memory and not ordered: publish again") \
                if outcome.error == NULL else <object>outcome.error
            Py_XDECREF(outcome.error)
            outcome.error = NULL
        if outcome.kind != OUTCOME_SENT and outcome.kind != OUTCOME_FAILED:
            broker = outcome.broker
        callbacks = batch.decide(position, epoch, broker, outcome.kind == OUTCOME_DUPLICATE, error)
        if callbacks is not None:
            pass_by(PLACE_TELLING)
            tell(callbacks)
        return 0

    def tells_now(self) -> bool:
        """Whether this thread is in the middle of telling outcomes: it must not wait for others."""
        return bool(self.telling == PyThread_get_thread_ident())

    cdef uint64_t give_up(self, Sent* sent, PyObject* error) noexcept nogil:
        """Note `error` (NULL: it is damaged) for whoever waits for a batch in flight; how many messages that are."""
        if sent.state == SENT_FREE or sent.expired:
            return 0
        sent.expired = True
        self.expired += 1
        self.note_of(sent, OUTCOME_FAILED, 0, error)
        return sent.messages if self.level != 0 else 0

    def expire(self, double now, error) -> int:
        """Tell `error` to whoever waits for batches whose time is over; how many batches that are."""
        cdef uint64_t sequence, messages = 0
        cdef int batches = 0
        cdef Sent* sent
        for sequence in range(self.oldest, self.next_sequence):
            sent = &self.sent[sequence % SENT_RING]
            if sent.state != SENT_FREE and not sent.expired and sent.deadline <= now:
                messages += self.give_up(sent, <PyObject*>error)
                batches += 1
        self.failed += messages
        self.tell_outcomes()
        return batches

    @property
    def undecided(self) -> int:
        """Batches that somebody may still wait for."""
        return self.in_flight - self.expired

    def beat(self) -> None:
        """Say that we are alive: a silent client's leases end."""
        cdef uint64_t c, at
        for c in range(self.channel_count):
            if not self.channels[c].left:
                at = self.layout.attach_client(self.channels[c].slot)
                self.memory.store(at, cxl_now_ns())
                self.memory.flush(at, 64)
        # Before we read whether a slot is open: a broker gives back what nobody was ever heard of.
        self.memory.full_fence()

    def check_slots(self) -> None:
        """Notice a fence: what was submitted behind it gets no answer."""
        cdef uint64_t c, at
        for c in range(self.channel_count):
            at = self.layout.attach_line(self.channels[c].slot)
            self.memory.invalidate(at, 64)
            if self.channels[c].alive and self.memory.load(at) != (self.channels[c].generation << 8 | ATTACH_OPEN):
                self.fenced = True

    def is_supplied(self) -> bool:
        """Whether every live broker has given us a lease."""
        cdef uint64_t c, at
        for c in range(self.channel_count):
            at = self.layout.attach_line(self.channels[c].slot)
            self.memory.invalidate(at, 64)
            if self.channels[c].alive and self.memory.load(at + 16) == 0:
                return False
        return True

    def brokers_alive(self) -> list[int]:
        """Brokers whose channel is in use."""
        return [self.channels[c].broker for c in range(self.channel_count) if self.channels[c].alive]

    def lacks_leases(self) -> bool:
        """Whether no live broker gives us room."""
        cdef uint64_t c
        for c in range(self.channel_count):
            if self.channels[c].alive and (self.channels[c].has_lease or self.channels[c].granted > self.channels[c].using):
                return False
        return True

    def lost(self) -> list[int]:
        """Sequences that were refused, or went to a broker that died."""
        found = [each for each in range(self.oldest, self.next_sequence) if self.sent[each % SENT_RING].state == SENT_RETRY]
        self.retry_wanted = bool(found)
        return found

    def take_latencies(self):
        """Submit-to-settled times in ns since the last call, at most the last 65,536."""
        cdef uint64_t i, count = min(self.latency_count, LATENCY_RING)
        out = array("q", bytes(8 * count))
        for i in range(count):
            out[i] = self.latencies[(self.latency_count - count + i) % LATENCY_RING]
        self.latency_count = 0
        return out


cdef Outcome* held(Batch batch) noexcept:
    """A batch's outcome, which holds the batch from now on."""
    batch.outcome.batch = <PyObject*>batch
    Py_INCREF(<PyObject*>batch)
    return &batch.outcome


cdef void drop(Outcome* outcome) noexcept:
    """Nobody will be told."""
    cdef PyObject* batch
    if outcome != NULL and outcome.batch != NULL:
        batch = outcome.batch
        outcome.batch = NULL
        Py_XDECREF(outcome.error)
        outcome.error = NULL
        Py_XDECREF(batch)
