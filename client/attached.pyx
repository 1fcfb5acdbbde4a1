"""The native half of an attached publisher: leases, packing straight into segments, descriptors, completions.

    begin (a channel with room in its lease) ─► pack, around the cache ─► seal: fence, descriptor, ring ─► poll: settle

No system call is made while both sides are awake. What is in flight is kept by sequence in `sent`; its payload stays in
its lease until it is settled, so that it can be submitted again without a copy of ours. When no lease has room for long,
or the session is being opened anew, messages spill: they are packed in private memory, by the packer and the policies
that gRPC has, and submitted from there, until none is left. Calls hold the GIL; where the GIL is released (large copies,
waiting) `busy` keeps other threads out.
"""

import threading
import time
from array import array
from collections import deque

from cpython.buffer cimport (
    PyBUF_ANY_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from broker.doorbell cimport Doorbell
from broker.layout cimport (
    ATTACH_OPEN, ATTACH_RING, CONTROL_BROKER, CONTROL_EPOCH_SHIFT, Descriptor, LEASE_RING, Layout, RESULT_COMMITTED,
    RESULT_DAMAGED, RESULT_DUPLICATE, RESULT_FENCED, RESULT_UNDURABLE, make_tag,
)
from broker.wire cimport MESSAGE_HEADER_BYTES, PUBLISHED_NS_AT, REQUEST_HEADER_BYTES, message_check, message_stride
from client.batch cimport Batch, Delivery, Packer
from client.pages cimport Pages
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_now_ns, cxl_stream, cxl_stream_new, cxl_wall_ns, cxl_yield

from broker.errors import CxlmqError, replica_failed

cdef enum:
    SENT_RING = 1024
    CHANNELS_MAX = 64               # one a broker
    SEQUENCES_IN_FLIGHT = 200       # below the sequencer's window of 256
    NOGIL_BYTES = 32768             # copies from here on release the GIL
    LATENCY_RING = 65536
    ASK_ANOTHER = 128               # tries after which a large lease is asked of another broker
    # How long news is looked for: without giving the core away, then yielding, then asleep.
    SPIN_NS = 6000
    YIELD_NS = 200000

cdef uint64_t STATUS_MASK = <uint64_t>0xFF << 40

cdef enum SentState:
    SENT_FREE = 0
    SENT_WAITING = 1
    SENT_RETRY = 2                  # refused: to be submitted again

cdef struct Channel:
    # Invariant: retired <= using <= granted; completed <= submitted <= completed + ATTACH_RING.
    uint64_t slot
    uint64_t generation
    uint64_t broker
    bint alive
    bint left                       # its slot is somebody else's by now
    bint loaned                     # a loan is open in its lease: nothing else goes there
    bint has_lease
    uint64_t submitted
    uint64_t completed
    uint64_t granted
    uint64_t using
    uint64_t retired
    uint64_t wanted
    uint64_t lease_offset
    uint64_t lease_bytes
    uint64_t lease_used
    int64_t heard_ns                # of its last answer, or since when it has something to answer
    uint64_t lease_waiting[16]      # batches of each lease that are not settled
    uint64_t sequences[64]          # by submission number

cdef struct Sent:
    uint64_t sequence
    uint64_t state
    uint64_t channel
    uint64_t lease
    uint64_t offset
    uint64_t nbytes
    uint64_t messages
    uint64_t wall_ns
    int64_t sent_ns
    double deadline                 # monotonic seconds
    bint expired                    # its delivery time-out is over: told, and not to be published again


class Spill(Exception):
    """No lease has room now: the message goes to private memory."""


cdef class Loan:
    """A writable view of a segment: fill it, then leave the `with` block; an exception gives it back."""

    cdef AttachedCore core
    cdef uint64_t session           # in which it was lent
    cdef bint ended
    cdef uint64_t channel
    cdef uint64_t offset
    cdef uint64_t nbytes
    cdef uint8_t* data
    cdef uint64_t exports
    cdef readonly object delivery
    cdef object view

    def __del__(self):
        self.core.give_back(self)       # nobody entered it

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.nbytes, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* buffer):
        self.exports -= 1

    def __enter__(self):
        self.view = memoryview(self)
        return self.view

    def __exit__(self, kind, *_):
        view, self.view = self.view, None
        try:
            view.release()
        except BufferError:
            pass
        if kind is None and self.exports:
            self.core.give_back(self)
            raise BufferError("release every view of a loan before its block ends; the message was not published")
        if kind is None:
            self.delivery = self.core.commit_loan(self)
        else:
            self.core.give_back(self)
        return False


cdef class AttachedCore:
    """Publishes through the slots of several brokers. See `client.attached_publisher` for who drives it."""

    cdef readonly Memory memory
    cdef Layout layout
    cdef object engine
    cdef Packer overflow                # what spills
    cdef readonly bint spilling         # everything goes there until nothing of it is left
    cdef uint64_t claims                # threads that wait for `busy` to end: they come first
    cdef uint64_t session               # counts those that were begun
    cdef uint64_t open_loans
    cdef list left                      # slots that we gave up, kept by open loans
    cdef list bells
    cdef bint woken                 # whether the last submit had to wake somebody up
    cdef Channel* channels
    cdef list old_channels
    cdef readonly uint64_t channel_count
    cdef Sent* sent
    cdef list holders               # beside `sent`: the batch that deliveries hold, None when nobody does
    cdef readonly uint64_t next_sequence
    cdef readonly uint64_t oldest       # every lower sequence is settled
    cdef readonly uint64_t in_flight
    cdef readonly uint64_t in_flight_bytes
    cdef uint64_t expired               # of those in flight, the ones that were given up
    cdef readonly uint64_t window_bytes
    cdef readonly uint64_t message_bytes_max
    cdef public uint64_t target
    cdef uint64_t target_min
    cdef uint64_t target_max
    cdef uint64_t ring_limit            # descriptors of a channel that may be unanswered
    cdef double timeout                 # seconds from packing to giving up
    cdef readonly uint64_t messages
    cdef readonly uint64_t nbytes
    cdef readonly uint64_t batches
    cdef readonly uint64_t acked
    cdef readonly uint64_t duplicates
    cdef readonly uint64_t retries
    cdef readonly uint64_t failed
    cdef uint64_t turn
    cdef uint64_t refusals
    cdef readonly bint fenced
    cdef bint shut                      # nothing may be packed any more
    cdef readonly bint retry_wanted
    cdef readonly bint busy             # a copy goes on without the GIL
    cdef public int level
    cdef public uint64_t epoch
    # The batch that is being packed.
    cdef bint is_open
    cdef uint64_t at_channel
    cdef uint64_t at_offset
    cdef uint64_t capacity
    cdef uint64_t used
    cdef uint64_t count
    cdef readonly double opened
    cdef cxl_stream* stream
    cdef Batch batch
    cdef Batch spare                    # for a next one
    cdef object outcomes                # settled batches whose waiters are not told yet
    cdef uint64_t telling               # the thread that tells them, 0 none
    cdef readonly Pages pages
    cdef int64_t* latencies
    cdef uint64_t latency_count

    def __cinit__(self):
        self.stream = cxl_stream_new()
        self.sent = <Sent*>calloc(SENT_RING, sizeof(Sent))
        self.latencies = <int64_t*>calloc(LATENCY_RING, 8)
        if self.stream == NULL or self.sent == NULL or self.latencies == NULL:
            raise MemoryError

    def __init__(self, engine, Memory memory, Layout layout, Packer overflow, targets, uint64_t window_bytes,
                 uint64_t ring_limit, int level, double timeout):
        self.engine = engine
        self.overflow = overflow
        self.target, self.target_min, self.target_max = targets
        self.ring_limit = min(ring_limit, ATTACH_RING)
        self.timeout = timeout
        self.outcomes = deque()
        self.old_channels = []
        self.holders = [None] * SENT_RING
        self.left = []
        self.bells = []
        self.memory = memory
        self.layout = layout
        self.window_bytes = window_bytes
        self.message_bytes_max = overflow.message_bytes_max
        self.level = level
        self.pages = Pages(memory, layout)

    def __dealloc__(self):
        for old in self.old_channels or ():
            free(<void*><uint64_t>old)
        free(self.channels)
        free(self.stream)
        free(self.sent)
        free(self.latencies)

    def begin_session(self, uint64_t epoch) -> None:
        """Go on with a new session, without channels as yet. Nothing may be open or in flight."""
        cdef Channel* fresh = <Channel*>calloc(CHANNELS_MAX, sizeof(Channel))
        if fresh == NULL:
            raise MemoryError
        # Another thread may be waiting over the old ones, without the GIL: they go when we go.
        self.old_channels.append(<uint64_t>self.channels)
        self.channels = fresh
        self.channel_count = 0
        self.bells = []
        self.next_sequence = self.oldest = 0
        self.fenced = False
        self.turn = 0
        self.epoch = epoch
        self.session += 1

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
        self.bells[c:c + 1] = [Doorbell(self.memory, self.layout.doorbell(broker, 0))]
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

    # ---- leases and channels ------------------------------------------------------------------------------------------

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
        self.memory.store(at + 24, channel.wanted)
        self.memory.store(at + 16, channel.retired)
        self.memory.store(at + 8, channel.using)
        self.memory.flush(at, 64)
        # Fenced here: whoever told may now wait for what the broker answers to it.
        self.memory.fence()

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
            c = (self.turn + i) % self.channel_count
            channel = &self.channels[c]
            if self.takes(channel, need, not asked):
                self.turn = (c + 1) % self.channel_count
                return <int64_t>c
            asked = asked or channel.alive
        return -1

    cdef int begin(self, uint64_t nbytes) except -1:
        """Open a batch that has room for a message of `nbytes`. Raises `Spill` when no lease has any for too long."""
        cdef uint64_t need = (message_stride(nbytes) + 63) & ~<uint64_t>63
        cdef int64_t c = -1
        cdef Channel* channel
        if nbytes > self.message_bytes_max:
            self.engine.too_big(nbytes)
        self.seal()
        if not (self.shut or self.fenced or self.spilling):
            c = self.pick(need)
        if c < 0:
            c = self.wait_for_channel(need)
            if self.is_open:
                return 0                    # another thread has begun a batch while we waited
        self.pages.see_to_others()
        channel = &self.channels[c]
        self.at_channel = c
        self.at_offset = channel.lease_offset + channel.lease_used
        self.capacity = min(max(self.target, need), channel.lease_bytes - channel.lease_used)
        self.used = self.count = 0
        self.memory.stream_start(self.stream, self.at_offset)
        self.is_open = True
        self.opened = time.monotonic()
        self.batch = None
        return 0

    cdef int64_t wait_for_channel(self, uint64_t need) except -1:
        """Wait a little until some channel has room; then spill."""
        cdef int64_t c
        cdef double deadline = 0, now
        while True:
            self.engine.raise_if_closed()
            if self.is_open:
                return 0
            if self.fenced or self.spilling:
                c = -1
                deadline = 1
            else:
                self.poll()
                c = self.pick(need)
            if c >= 0:
                return c
            now = time.monotonic()
            if deadline == 0:
                deadline = now + self.engine.patience()
            if now >= deadline:
                self.turn += 1              # whom we asked has nothing: next time we ask another
                self.spill()
                raise Spill
            self.ring_all()
            self.wait_for_news(<int64_t>(min(0.002, deadline - now) * 1e9), True)

    cdef void ring_all(self):
        self.memory.full_fence()
        for bell in self.bells:
            (<Doorbell>bell).ring_fenced()

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
                if self.memory.load(at) & ~STATUS_MASK == make_tag(channel.generation, channel.completed):
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
        return 0

    # ---- packing --------------------------------------------------------------------------------------------------------

    cdef int wait_idle(self) except -1:
        """Wait until no copy goes on without the GIL; whoever would begin one lets us come first."""
        self.claims += 1
        try:
            while self.busy:
                time.sleep(0)
        finally:
            self.claims -= 1
        return 0

    cdef int take_turn(self) except -1:
        """Before packing: neither into somebody's copy nor before somebody who waits."""
        while self.busy or self.claims:
            time.sleep(0)
        return 0

    cdef int pack(self, const void* source, uint64_t nbytes) except -1:
        cdef uint64_t stride = message_stride(nbytes)
        while not self.is_open or self.used + stride > self.capacity:
            self.begin(nbytes)
        if nbytes >= NOGIL_BYTES:
            self.busy = True
            with nogil:
                self.memory.stream_messages(self.stream, source, nbytes, 1, message_check(<uint32_t>nbytes))
            self.busy = False
        else:
            self.memory.stream_messages(self.stream, source, nbytes, 1, message_check(<uint32_t>nbytes))
        self.used += stride
        self.count += 1
        self.messages += 1
        self.nbytes += nbytes
        return 0

    cdef Delivery new_delivery(self):
        """For the next message. To be made before it is packed: the collector may run with any new object, Python with
        the collector, and other threads with Python."""
        cdef Delivery delivery = Delivery.__new__(Delivery)
        cdef Batch spare = self.spare
        if spare is None:
            spare = Batch(self.engine, 0)
            spare.level = self.level
        else:
            self.spare = None               # ours alone
        delivery.batch = spare
        return delivery

    cdef void is_of_last(self, Delivery delivery):
        """Make it the delivery of the message that was just packed."""
        if self.batch is None:
            self.batch = delivery.batch
        else:
            self.spare = delivery.batch
            delivery.batch = self.batch
        delivery.index = self.count - 1

    cdef int pack_object(self, object data) except -1:
        cdef Py_buffer view
        if self.busy or self.claims:
            self.take_turn()
        if PyBytes_CheckExact(data):
            return self.pack(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        PyObject_GetBuffer(data, &view, PyBUF_ANY_CONTIGUOUS)
        try:
            return self.pack(view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def append(self, data) -> Delivery:
        """Pack one message: bytes, or anything with the buffer protocol."""
        cdef Delivery delivery
        if self.spilling:
            return self.append_spilled(data)
        delivery = self.new_delivery()
        try:
            self.pack_object(data)
        except Spill:
            return self.append_spilled(data)
        self.is_of_last(delivery)
        if self.used + MESSAGE_HEADER_BYTES >= self.capacity:
            self.seal_full()
        return delivery

    def append_many(self, messages) -> Delivery:
        """Pack an iterable of messages; the delivery of the last."""
        cdef object last = None
        cdef bint there = False
        # One behind: the iterable may run Python, and others may then seal the batch that the last message is in.
        for data in messages:
            if there:
                self.append_one(last)
            last = data
            there = True
        if not there:
            raise ValueError("publish_many needs at least one message")
        return self.append(last)

    cdef int append_one(self, object data) except -1:
        if not self.spilling:
            try:
                return self.pack_object(data)
            except Spill:
                pass
        self.append_spilled(data)
        return 0

    cdef object append_spilled(self, data):
        """Pack into private memory. The client loop may meanwhile have found nothing there and ended the spilling: what
        comes next must stay behind this."""
        delivery = self.overflow.append(data)
        self.spill()
        return delivery

    def append_array(self, const uint8_t[:, ::1] rows) -> Delivery:
        """Pack a 2-D array, one row a message; the delivery of the last row."""
        cdef uint64_t i = 0, fit, total = rows.shape[0], nbytes = rows.shape[1], stride = message_stride(nbytes)
        cdef const uint8_t* source = &rows[0, 0] if total and nbytes else NULL
        cdef uint32_t check = message_check(<uint32_t>nbytes)
        cdef Delivery delivery = self.new_delivery()
        if total == 0:
            raise ValueError("publish_array needs at least one row")
        while i < total:
            if self.busy or self.claims:
                self.take_turn()
            try:
                if self.spilling:
                    raise Spill
                while not self.is_open or self.used + stride > self.capacity:
                    self.begin(nbytes)
            except Spill:
                delivery = self.overflow.append_array(rows[i:])
                self.spill()                # as `append_spilled`
                return delivery
            fit = min(total - i, (self.capacity - self.used) // stride)
            self.busy = True
            with nogil:
                self.memory.stream_messages(self.stream, source + i * nbytes, nbytes, fit, check)
            self.busy = False
            self.used += fit * stride
            self.count += fit
            self.messages += fit
            self.nbytes += fit * nbytes
            i += fit
        self.is_of_last(delivery)
        if self.used + stride > self.capacity:
            self.seal_full()
        return delivery

    # ---- submitting -----------------------------------------------------------------------------------------------------

    cdef int seal_full(self) except -1:
        """The open batch is full: it goes, and under load the next one may be larger."""
        if self.in_flight >= self.channel_count:
            self.target = min(2 * self.target, self.target_max)
        return self.seal()

    cdef int seal(self) except -1:
        """Submit the open batch. Empty ones are simply closed."""
        cdef Batch batch = self.batch
        if not self.is_open:
            return 0
        self.is_open = False
        self.batch = None
        if self.count == 0:
            return 0
        self.memory.stream_finish(self.stream)
        self.channels[self.at_channel].lease_used += (self.used + 63) & ~<uint64_t>63
        self.submit_new(self.at_channel, self.at_offset, self.used, self.count, cxl_wall_ns(), batch,
                        self.opened + self.timeout)
        return 0

    cdef int submit_new(self, uint64_t c, uint64_t offset, uint64_t nbytes, uint64_t messages, uint64_t wall_ns,
                        Batch batch, double deadline) except -1:
        """Submit a batch with the session's next sequence."""
        self.sent[self.next_sequence % SENT_RING].deadline = deadline
        self.batches += 1
        if self.level == 0 and (batch is None or not batch.settled):
            self.acked += messages          # nobody asked for more than that it is sent
        self.submit(c, offset, nbytes, messages, self.next_sequence, wall_ns, batch)
        self.next_sequence += 1
        if self.level == 0:
            self.tell_outcomes()
        return 0

    cdef void submit(self, uint64_t c, uint64_t offset, uint64_t nbytes, uint64_t messages, uint64_t sequence,
                     uint64_t wall_ns, Batch batch):
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
        if batch is not None and self.level == 0:
            self.outcomes.append((batch, None, False, None))
        elif batch is not None:
            batch.sequence = sequence
            self.holders[sequence % SENT_RING] = batch
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
        self.woken = (<Doorbell>self.bells[c]).is_armed()
        (<Doorbell>self.bells[c]).ring_fenced()

    cdef uint64_t copy_to(self, uint64_t c, const void* payload, uint64_t nbytes) noexcept:
        """Copy a packed payload into a channel's lease, which has room; where it lies."""
        cdef Channel* channel = &self.channels[c]
        cdef uint64_t to = channel.lease_offset + channel.lease_used
        self.memory.copy_in(to, payload, nbytes)
        channel.lease_used += (nbytes + 63) & ~<uint64_t>63
        return to

    # ---- settling -------------------------------------------------------------------------------------------------------

    cpdef uint64_t poll(self) except? 0xFFFFFFFFFFFFFFFF:
        """Settle what was answered; how many batches that were."""
        cdef uint64_t c, at, state, status, done = 0, was_retired, was_completed
        cdef Channel* channel
        cdef Sent* sent
        for c in range(self.channel_count):
            channel = &self.channels[c]
            if channel.left:
                continue
            was_retired = channel.retired
            was_completed = channel.completed
            while channel.completed < channel.submitted:
                at = self.layout.attach_completion(channel.slot, channel.completed)
                self.memory.invalidate(at, 16)
                state = self.memory.load(at)
                if state & ~STATUS_MASK != make_tag(channel.generation, channel.completed):
                    break
                status = state >> 40 & 0xFF
                sent = &self.sent[channel.sequences[channel.completed % ATTACH_RING] % SENT_RING]
                channel.completed += 1
                if sent.state != SENT_WAITING or sent.channel != c:
                    continue                # it was submitted again elsewhere
                if status == RESULT_COMMITTED or status == RESULT_DUPLICATE:
                    self.settle(sent, self.memory.load(at + 8), status == RESULT_DUPLICATE, None)
                    done += 1
                elif status == RESULT_UNDURABLE:
                    self.settle(sent, 0, False, replica_failed(self.memory.load(at + 8)))
                    done += 1
                elif status == RESULT_FENCED:
                    self.fenced = True
                elif status == RESULT_DAMAGED:
                    # Its sequence will never come: the session has to end.
                    self.give_up(sent, CxlmqError("the batch was damaged in memory and not ordered: publish again"))
                    self.fenced = True
                else:
                    sent.state = SENT_RETRY
                    self.retry_wanted = True
            if channel.completed != was_completed:
                channel.heard_ns = cxl_now_ns()
            if channel.retired != was_retired:
                self.tell(channel)
        while self.oldest < self.next_sequence and self.sent[self.oldest % SENT_RING].state == SENT_FREE:
            self.oldest += 1
        self.tell_outcomes()
        return done

    cdef void settle(self, Sent* sent, uint64_t position, bint duplicate, object error):
        cdef Channel* channel = &self.channels[sent.channel]
        cdef Batch batch
        channel.lease_waiting[sent.lease % LEASE_RING] -= 1
        self.retire(channel)
        self.in_flight -= 1
        self.in_flight_bytes -= sent.nbytes
        if sent.expired:
            self.expired -= 1
        elif error is not None:
            self.failed += sent.messages
        elif self.level != 0:
            self.acked += sent.messages
        self.duplicates += duplicate
        sent.state = SENT_FREE
        self.latencies[self.latency_count % LATENCY_RING] = cxl_now_ns() - sent.sent_ns
        self.latency_count += 1
        batch = self.take_holder(sent)
        if batch is not None:
            batch.broker = self.channels[sent.channel].broker
            self.outcomes.append((batch, None if duplicate or error is not None else position, duplicate, error))

    cdef Batch take_holder(self, Sent* sent):
        """The batch whose deliveries somebody holds; from now on nobody does."""
        cdef Batch batch = <Batch>self.holders[sent.sequence % SENT_RING]
        self.holders[sent.sequence % SENT_RING] = None
        return batch

    cdef int tell_outcomes(self) except -1:
        """Wake whoever waits. Callbacks may publish and so come back here: only the outermost call tells."""
        cdef Batch batch
        cdef uint64_t epoch
        if self.telling or not self.outcomes:
            return 0
        epoch = self.memory.load(self.layout.control()) >> CONTROL_EPOCH_SHIFT     # the head's, as over gRPC
        self.telling = threading.get_ident()
        try:
            while self.outcomes:
                batch, position, duplicate, error = self.outcomes.popleft()
                batch.settle(position, epoch, batch.broker, duplicate, error)
        finally:
            self.telling = 0
        return 0

    def tells_now(self) -> bool:
        """Whether this thread is in the middle of telling outcomes: it must not wait for others."""
        return bool(self.telling == <uint64_t>threading.get_ident())

    # ---- for the engine ---------------------------------------------------------------------------------------------------

    def flush_open(self) -> None:
        """Submit what is packed so far. When that is little, the next batch need not be as large."""
        if self.busy:
            self.wait_idle()
        if self.is_open and self.count and self.used < self.target // 2:
            self.target = max(self.target // 2, self.target_min)
        self.seal()

    def shut_down(self, error) -> int:
        """Pack nothing more: our leases are about to end. What is packed or in flight fails with `error`; messages."""
        cdef uint64_t sequence, failed = 0
        cdef Batch batch
        if self.busy:
            self.wait_idle()
        batch = self.batch
        self.shut = True
        if self.is_open:
            failed += self.count
            if batch is not None:
                batch.settle(None, None, None, False, error)
        self.is_open = False
        self.batch = None
        for sequence in range(self.oldest, self.next_sequence):
            failed += self.give_up(&self.sent[sequence % SENT_RING], error)
        return failed

    cdef uint64_t give_up(self, Sent* sent, object error):
        """Tell `error` to whoever waits for a batch in flight; how many messages that are."""
        cdef Batch batch
        if sent.state == SENT_FREE or sent.expired:
            return 0
        sent.expired = True
        self.expired += 1
        batch = self.take_holder(sent)
        if batch is not None:
            batch.settle(None, None, None, False, error)
        return sent.messages if self.level != 0 else 0

    def is_current(self, batch) -> bool:
        """Whether this batch is still being packed."""
        return self.is_open and self.batch is batch

    @property
    def open_count(self) -> int:
        """Messages in the batch that is being packed."""
        return self.count if self.is_open else 0

    def wait(self, double seconds) -> None:
        """Wait until there is news, at most so long."""
        if self.busy:
            self.wait_idle()
        self.wait_for_news(<int64_t>(seconds * 1e9), False)

    def beat(self) -> None:
        """Say that we are alive: a silent client's leases end."""
        cdef uint64_t c, at
        for c in range(self.channel_count):
            if self.channels[c].left:
                continue
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

    def leave(self, slots) -> bool:
        """Say of (slot, broker) pairs that we write there no more; False while an open loan still may."""
        cdef uint64_t at
        if self.open_loans:
            self.left += slots
            return False
        self.memory.count_at(0)             # another client counts there soon
        for slot, broker in slots:
            at = self.layout.attach_client(slot)
            self.memory.store(at + 32, 1)
            self.memory.flush(at, 64)
            self.memory.full_fence()
            Doorbell(self.memory, self.layout.doorbell(broker, 0)).ring_now()
        self.count_somewhere()
        return True

    cdef int loan_ends(self) except -1:
        self.open_loans -= 1
        if self.open_loans == 0 and self.left:
            left, self.left = self.left, []
            self.leave(left)
        return 0

    def drop_channel(self, uint64_t broker) -> None:
        """A broker died: its unsettled batches are to go elsewhere."""
        cdef uint64_t c, sequence
        cdef Sent* sent
        for c in range(self.channel_count):
            if self.channels[c].broker != broker or not self.channels[c].alive:
                continue
            self.channels[c].alive = False
            if self.busy:
                self.wait_idle()
            if self.is_open and self.at_channel == c:
                self.seal()
            for sequence in range(self.oldest, self.next_sequence):
                sent = &self.sent[sequence % SENT_RING]
                if sent.state == SENT_WAITING and sent.channel == c:
                    sent.state = SENT_RETRY
                    self.retry_wanted = True

    def is_supplied(self) -> bool:
        """Whether every live broker has given us a lease."""
        cdef uint64_t c
        for c in range(self.channel_count):
            if self.channels[c].alive and self.memory.load(self.layout.attach_line(self.channels[c].slot) + 16) == 0:
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

    def submit_batch(self, Batch batch) -> bool:
        """Submit a private batch; False when there is no room for it now."""
        cdef int64_t c
        cdef uint64_t wall_ns
        if self.busy:
            self.wait_idle()
        self.seal()                         # its lease must not be shared
        if self.fenced or self.shut:
            return False
        c = self.pick((batch.used + 63) & ~<uint64_t>63)
        if c < 0:
            self.refusals += 1
            if self.refusals % ASK_ANOTHER == 0:
                self.turn += 1
            return False
        memcpy(&wall_ns, batch.data - REQUEST_HEADER_BYTES + PUBLISHED_NS_AT, 8)
        self.submit_new(c, self.copy_to(c, batch.data, batch.used), batch.used, batch.count, wall_ns, batch,
                        batch.deadline)
        batch.release()
        return True

    cpdef void spill(self):
        """Everything goes to private memory from now on."""
        if not self.spilling:
            self.spilling = True
            self.overflow.target = self.target

    def end_spilling(self) -> None:
        """Nothing is left in private memory: messages go straight into leases again."""
        if self.spilling and not self.fenced and not self.shut:
            self.spilling = False
            self.target = min(self.overflow.target, self.target_max)

    def lost(self) -> list[int]:
        """Sequences that were refused, or went to a broker that died."""
        cdef uint64_t sequence
        cdef list found = [sequence for sequence in range(self.oldest, self.next_sequence)
                           if self.sent[sequence % SENT_RING].state == SENT_RETRY]
        self.retry_wanted = bool(found)
        return found

    def resubmit(self, uint64_t sequence, uint64_t broker) -> bool:
        """Submit a lost batch at this broker, with the sequence it has; False when there is no room."""
        cdef Sent* sent = &self.sent[sequence % SENT_RING]
        cdef uint64_t c, to
        cdef Channel* channel
        if self.busy:
            self.wait_idle()
        self.seal()                         # its lease must not be shared
        if sent.state != SENT_RETRY or self.fenced:
            return True
        for c in range(self.channel_count):
            channel = &self.channels[c]
            if (channel.broker != broker or not channel.alive or channel.loaned
                    or channel.submitted - channel.completed >= ATTACH_RING
                    or not self.has_lease_for(channel, (sent.nbytes + 63) & ~<uint64_t>63, True)):
                continue
            to = self.copy_to(c, self.memory.payload(sent.offset, sent.nbytes), sent.nbytes)
            self.channels[sent.channel].lease_waiting[sent.lease % LEASE_RING] -= 1
            self.in_flight -= 1
            self.in_flight_bytes -= sent.nbytes
            self.expired -= sent.expired
            expired = sent.expired
            self.submit(c, to, sent.nbytes, sent.messages, sequence, sent.wall_ns, None)
            sent.expired = expired
            self.expired += expired
            self.retries += 1
            return True
        return False

    def take_unsettled(self) -> list:
        """Everything in flight, oldest first, for a new session: (sequence, private batch) each."""
        cdef uint64_t sequence
        cdef Sent* sent
        cdef Batch batch
        cdef list out = []
        if self.busy:
            self.wait_idle()
        self.seal()
        self.poll()
        for sequence in range(self.oldest, self.next_sequence):
            sent = &self.sent[sequence % SENT_RING]
            if sent.state != SENT_FREE and not sent.expired:
                batch = self.take_holder(sent)
                if batch is None:
                    batch = Batch(self.engine, 0)
                    if self.level == 0:
                        batch.settle(None, 0, None, False, None)
                batch.adopt(self.memory.payload(sent.offset, sent.nbytes), sent.nbytes, sent.messages, sent.wall_ns)
                batch.level = self.level
                batch.deadline = sent.deadline
                out.append((sequence, batch))
            sent.state = SENT_FREE
        self.oldest = self.next_sequence
        self.in_flight = self.in_flight_bytes = self.expired = 0
        return out

    def expire(self, double now, error) -> int:
        """Tell `error` to whoever waits for batches whose time is over; how many batches that are."""
        cdef uint64_t sequence, messages = 0
        cdef int batches = 0
        cdef Sent* sent
        for sequence in range(self.oldest, self.next_sequence):
            sent = &self.sent[sequence % SENT_RING]
            if sent.state != SENT_FREE and not sent.expired and sent.deadline <= now:
                messages += self.give_up(sent, error)
                batches += 1
        self.failed += messages
        return batches

    @property
    def undecided(self) -> int:
        """Batches that somebody may still wait for."""
        return self.in_flight - self.expired

    def take_latencies(self):
        """Submit-to-settled times in ns since the last call, at most the last 65,536."""
        cdef uint64_t i, count = min(self.latency_count, LATENCY_RING)
        out = array("q", bytes(8 * count))
        for i in range(count):
            out[i] = self.latencies[(self.latency_count - count + i) % LATENCY_RING]
        self.latency_count = 0
        return out

    # ---- loans ------------------------------------------------------------------------------------------------------------

    def loan(self, uint64_t nbytes) -> Loan:
        """A writable view of `nbytes` of a segment, published as one message when its block ends."""
        cdef Loan loan
        cdef double deadline = time.monotonic() + self.timeout
        while True:
            if self.busy or self.claims:
                self.take_turn()
            self.seal()
            try:
                while not self.is_open or self.count or self.capacity < message_stride(nbytes):
                    self.begin(nbytes)
                break
            except Spill:
                if self.engine.is_on_loop() or time.monotonic() >= deadline:
                    raise self.engine.no_room() from None
                time.sleep(0.001)
        self.is_open = False
        loan = Loan.__new__(Loan)
        loan.core = self
        loan.session = self.session
        loan.channel = self.at_channel
        loan.offset = self.at_offset
        loan.nbytes = nbytes
        loan.data = self.memory.payload_writable(self.at_offset + MESSAGE_HEADER_BYTES, nbytes)
        self.channels[loan.channel].loaned = True
        self.open_loans += 1
        return loan

    cpdef give_back(self, Loan loan):
        """The loan is not published: its bytes are free for the next batch."""
        if loan.ended:
            return
        loan.ended = True
        if loan.session == self.session:
            self.channels[loan.channel].loaned = False
        self.loan_ends()

    cpdef object commit_loan(self, Loan loan):
        """Publish the loan's message."""
        cdef uint64_t used = message_stride(loan.nbytes)
        cdef uint32_t header[2]
        cdef Batch batch
        cdef Delivery delivery
        if self.busy or self.claims:
            self.take_turn()
        if self.shut or self.fenced or loan.session != self.session or not self.channels[loan.channel].alive:
            # Its lease is not ours any more: the message goes the other way, before everything that comes later.
            self.spill()
            try:
                return self.append_spilled(<uint8_t[:loan.nbytes]>loan.data if loan.nbytes else b"")
            finally:
                self.give_back(loan)
        batch = Batch(self.engine, 0)
        header[0] = <uint32_t>loan.nbytes
        header[1] = message_check(<uint32_t>loan.nbytes)
        batch.level = self.level
        self.memory.store(loan.offset, header[0] | <uint64_t>header[1] << 32)
        if used > MESSAGE_HEADER_BYTES + loan.nbytes:
            memset(loan.data + loan.nbytes, 0, used - MESSAGE_HEADER_BYTES - loan.nbytes)
        # Written through the cache by the user: flushed here, fenced by submit.
        self.memory.flush(loan.offset, used)
        self.give_back(loan)
        self.channels[loan.channel].lease_used += (used + 63) & ~<uint64_t>63
        self.messages += 1
        self.nbytes += loan.nbytes
        self.submit_new(loan.channel, loan.offset, used, 1, cxl_wall_ns(), batch, time.monotonic() + self.timeout)
        delivery = Delivery.__new__(Delivery)
        delivery.batch = batch
        delivery.index = 0
        return delivery
