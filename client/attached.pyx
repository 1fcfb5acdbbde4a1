"""The native half of an attached publisher: leases, packing straight into segments, descriptors, completions.

    open (a channel with room in its lease) ─► pack, around the cache ─► seal: fence, descriptor, ring ─► poll: settle

No system call is made while both sides are awake. What is in flight is kept by sequence in `sent`; its payload stays in
its lease until it is settled, so that it can be submitted again without a copy of ours. When no lease has room for long,
or the session is being opened anew, messages spill: they are packed in private memory, by the packer and the policies
that gRPC has, and submitted from there, until none is left.

Threads: as in the books, what changes is changed in one step, by functions in which no Python runs. Only a large copy
gives the GIL away: what it needs as it is, the open batch, has one owner at a time (`turn`).
"""

import time

cimport cython
from cpython.buffer cimport (
    PyBUF_ANY_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from broker.doorbell cimport Doorbell
from broker.layout cimport ATTACH_RING, LEASE_RING, Layout
from broker.wire cimport MESSAGE_HEADER_BYTES, PUBLISHED_NS_AT, REQUEST_HEADER_BYTES, message_check, message_stride
from client.attached_books cimport (
    CHANNELS_MAX, SENT_FREE, SENT_RETRY, SENT_RING, SENT_WAITING, AttachedBooks, Channel, Sent, drop, held,
)
from client.batch cimport OUTCOME_FAILED, Batch, Delivery, Outcome, Packer, PyObject
from client.pages cimport Pages
from client.turn cimport (
    PLACE_COPIED, PLACE_COPYING, PLACE_ENDING, PLACE_MADE, PLACE_NO_ROOM, SAFEGUARD_ENDING, SAFEGUARD_SPILL_ORDER,
    Turn, forget_turn, give_turn, left_out, pass_by, take_turn,
)
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_now_ns, cxl_stream, cxl_stream_new, cxl_wall_ns

from broker.errors import ClosedError, LoanHeld

cdef enum:
    NOGIL_BYTES = 32768             # copies from here on release the GIL
    ASK_ANOTHER = 128               # tries after which a large lease is asked of another broker

cdef enum Packed:
    PACKED = 1
    NO_ROOM = 2                     # now: wait
    NOT_HERE = 3                    # for now nothing is packed into leases


class Spill(Exception):
    """No lease has room now: the message goes to private memory."""


@cython.no_gc_clear                     # a cycle ends with the view; what that gives back, it gives to the core
cdef class Loan:
    """A writable view of a segment: fill it, then leave the `with` block; an exception gives it back.

    Once the block has ended nothing writes there any more: its view is released, and a message is published only when
    nobody holds another (`LoanHeld`). Of one that was not published, the bytes are kept out of use as long as somebody
    holds a view of them.
    """

    cdef AttachedCore core
    cdef uint64_t session           # in which it was lent
    cdef readonly bint ended
    cdef uint64_t channel
    cdef uint64_t lease
    cdef uint64_t offset
    cdef uint64_t nbytes
    cdef uint8_t* data
    cdef uint64_t exports
    cdef readonly object delivery
    cdef object view

    def __del__(self):
        self.core.give_back(self)       # nobody entered it

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        if self.ended:
            raise BufferError("the loan has ended: what was written is published or given back; take a new loan")
        PyBuffer_FillInfo(buffer, self, self.data, self.nbytes, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* buffer):
        self.exports -= 1
        if self.ended and self.exports == 0:
            self.core.unpin(self)

    def __enter__(self):
        if self.ended:
            raise ClosedError("the loan has ended: take a new one", what="the loan")
        if self.view is None:
            self.view = memoryview(self)
        return self.view

    def __exit__(self, kind, *_):
        view, self.view = self.view, None
        if self.ended:
            return False
        try:
            if view is not None:
                view.release()
        except BufferError:
            pass                        # somebody has a view of the view
        del view
        if kind is None:
            self.delivery = self.core.commit_loan(self)
        else:
            self.core.give_back(self)
        return False


cdef class AttachedCore(AttachedBooks):
    """Publishes through the slots of several brokers. See `client.attached_publisher` for who drives it."""

    cdef Packer overflow                # what spills
    cdef Turn turn                      # whose the open batch is
    cdef readonly bint spilling         # everything goes there until nothing of it is left
    cdef uint64_t open_loans
    cdef list left                      # slots that we gave up, kept by open loans
    cdef list old_channels
    cdef list old_places            # memory, layout, pages and bell of regions that were replaced
    cdef readonly uint64_t message_bytes_max
    cdef public uint64_t target
    cdef uint64_t target_min
    cdef uint64_t target_max
    cdef double timeout                 # seconds from packing to giving up
    cdef readonly uint64_t messages
    cdef readonly uint64_t nbytes
    cdef uint64_t refusals
    cdef bint shut                      # nothing may be packed any more
    cdef bint forked                    # in a child: all of this is its parent's
    cdef bint collected                 # the collector takes it, and what it reaches may be gone already
    # The batch that is being packed.
    cdef bint is_open
    cdef uint64_t at_channel
    cdef uint64_t at_offset
    cdef uint64_t capacity
    cdef uint64_t used
    cdef uint64_t count
    cdef readonly double opened
    cdef cxl_stream* stream
    cdef Outcome* current               # of its batch, NULL when no delivery holds it
    cdef Batch spare                    # for a next one

    def __cinit__(self):
        self.stream = cxl_stream_new()
        if self.stream == NULL:
            raise MemoryError

    def __init__(self, engine, Memory memory, Layout layout, Packer overflow, targets, uint64_t window_bytes,
                 uint64_t ring_limit, int level, double timeout):
        self.engine = engine
        self.overflow = overflow
        self.target, self.target_min, self.target_max = targets
        self.ring_limit = min(ring_limit, ATTACH_RING)
        self.timeout = timeout
        self.old_channels = []
        self.old_places = []
        self.left = []
        self.memory = memory
        self.bell = Doorbell(memory, 0)
        self.layout = layout
        self.window_bytes = window_bytes
        self.message_bytes_max = overflow.message_bytes_max
        self.level = level
        self.pages = Pages(memory, layout)

    def __del__(self):
        # The collector asks all before it clears any: here the memory is still ours, when a view ends it may not be.
        if self.shut and not self.collected and not self.forked:
            self.collected = True
            self.open_loans = 0
            if self.left:
                self.leave(self.left)

    def __dealloc__(self):
        for old in self.old_channels or ():
            free(<void*><uint64_t>old)
        free(self.stream)
        drop(self.current)

    def begin_session(self, uint64_t epoch) -> None:
        """Go on with a new session, without channels as yet. Nothing may be open or in flight."""
        cdef Channel* fresh = <Channel*>calloc(CHANNELS_MAX, sizeof(Channel))
        if fresh == NULL:
            raise MemoryError
        # Another thread may be waiting over the old ones, without the GIL: they go when we go.
        self.old_channels.append(<uint64_t>self.channels)
        take_turn(&self.turn)
        self.channels = fresh
        self.channel_count = 0
        self.next_sequence = self.oldest = 0
        self.fenced = self.ending = False
        self.turn_of = 0
        self.epoch = epoch
        self.session += 1
        give_turn(&self.turn)

    def move_to(self, Memory memory, Layout layout) -> None:
        """Go on in another region: the cluster's is a new one. Only at the beginning of a session."""
        take_turn(&self.turn)
        while self.asleep:                  # they look at the old one, for milliseconds
            give_turn(&self.turn)
            time.sleep(0.0005)
            take_turn(&self.turn)
        assert self.channel_count == 0 and self.in_flight == 0 and not self.is_open
        # Kept: loans may still be open there.
        self.old_places.append((self.memory, self.layout, self.pages, self.bell))
        self.left = []                      # nobody asks for slots of the old one any more
        self.memory, self.layout = memory, layout
        self.bell = Doorbell(memory, 0)
        self.pages = Pages(memory, layout)
        give_turn(&self.turn)

    def end_pages(self) -> None:
        """Stop touching pages ahead of use."""
        for _, _, pages, _ in self.old_places:
            (<Pages>pages).end()
        self.pages.end()

    cdef bint open_for(self, uint64_t nbytes) noexcept nogil:
        """Have an open batch with room for a message of `nbytes`; False when no lease has any now. In our turn."""
        cdef uint64_t stride = message_stride(nbytes), need
        cdef int64_t c
        cdef Channel* channel
        if self.is_open and self.used + stride <= self.capacity:
            return True
        self.seal()
        if self.shut or self.fenced or self.spilling or self.ending:
            return False
        need = (stride + 63) & ~<uint64_t>63
        c = self.pick(need)
        if c < 0:
            return False
        channel = &self.channels[c]
        self.at_channel = c
        self.at_offset = channel.lease_offset + channel.lease_used
        self.capacity = min(max(self.target, need), channel.lease_bytes - channel.lease_used)
        self.used = self.count = 0
        self.memory.stream_start(self.stream, self.at_offset)
        self.is_open = True
        self.opened = cxl_now_ns() * 1e-9
        return True

    cdef int wait_for_room(self, double* deadline) except -1:
        """Nothing had room: wait a little, until `deadline` (0: not set yet); then spill. Whoever packs looks again."""
        cdef double now
        self.engine.raise_if_closed()
        if self.fenced or self.spilling or self.ending:
            self.spill()
            raise Spill
        self.poll()
        now = cxl_now_ns() * 1e-9
        if deadline[0] == 0:
            deadline[0] = now + self.engine.patience()
            return 0                        # what was answered just now may have made room
        if now >= deadline[0]:
            self.turn_of += 1               # whom we asked has nothing: next time we ask another
            self.spill()
            raise Spill
        self.ring_all()
        pass_by(PLACE_NO_ROOM)
        self.wait_for_news(<int64_t>(min(0.002, deadline[0] - now) * 1e9), True)
        return 0

    cdef int pack(self, const uint8_t* source, uint64_t nbytes, uint64_t* rows, Delivery delivery) noexcept:
        """Pack as many of `rows` messages as one batch takes, and count them off; `delivery`, if any, is then that of the
        last. One step for all other threads, but for the copy, during which the batch is ours."""
        cdef uint64_t stride = message_stride(nbytes), fit
        cdef int done
        if not take_turn(&self.turn):
            return NOT_HERE                 # within a turn of this very thread
        if self.shut or not self.open_for(nbytes):
            done = NOT_HERE if self.shut or self.fenced or self.spilling or self.ending else NO_ROOM
            give_turn(&self.turn)
            return done
        fit = min(rows[0], (self.capacity - self.used) // stride)
        if fit * nbytes < NOGIL_BYTES:
            self.memory.stream_messages(self.stream, source, nbytes, fit, message_check(<uint32_t>nbytes))
        else:
            pass_by(PLACE_COPYING)
            with nogil:
                self.memory.stream_messages(self.stream, source, nbytes, fit, message_check(<uint32_t>nbytes))
            pass_by(PLACE_COPIED)
        rows[0] -= fit
        self.used += fit * stride
        self.count += fit
        self.messages += fit
        self.nbytes += fit * nbytes
        if delivery is not None:
            self.is_of_last(delivery)
        if self.used + MESSAGE_HEADER_BYTES >= self.capacity:
            self.seal_full()
        give_turn(&self.turn)
        return PACKED

    cdef Delivery new_delivery(self):
        """For the next message. To be made before it is packed: the collector may run with any new object, Python with
        the collector, and other threads with Python."""
        cdef Delivery delivery = Delivery.__new__(Delivery)
        cdef Batch spare = self.spare
        if spare is None:
            spare = Batch(self.engine, 0)
            spare.level = self.level
            pass_by(PLACE_MADE)
        else:
            self.spare = None               # ours alone
        delivery.batch = spare
        return delivery

    cdef void is_of_last(self, Delivery delivery) noexcept:
        """Make it the delivery of the message that was just packed."""
        if self.current == NULL:
            self.current = held(delivery.batch)
        else:
            self.spare = delivery.batch
            delivery.batch = <Batch>self.current.batch
        delivery.index = self.count - 1

    cdef uint64_t pack_all(self, const uint8_t* source, uint64_t nbytes, uint64_t rows, Delivery delivery) except? -1:
        """Pack rows, waiting for room; how many are left, and have to spill."""
        cdef uint64_t total = rows
        cdef double deadline = 0
        cdef int done
        if nbytes > self.message_bytes_max:
            self.engine.too_big(nbytes)
        while rows:
            done = self.pack(source + (total - rows) * nbytes, nbytes, &rows, delivery)
            if done == PACKED:
                deadline = 0
                continue
            try:
                if done == NOT_HERE:
                    self.engine.raise_if_closed()
                    raise Spill
                self.wait_for_room(&deadline)
            except Spill:
                break
        if self.first != NULL and self.level == 0:
            self.tell_outcomes()
        return rows

    cdef bint pack_object(self, object data, Delivery delivery) except -1:
        """Whether a message went into a lease: else it has to spill."""
        cdef Py_buffer view
        if PyBytes_CheckExact(data):
            return self.pack_all(<const uint8_t*>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), 1, delivery) == 0
        PyObject_GetBuffer(data, &view, PyBUF_ANY_CONTIGUOUS)
        try:
            return self.pack_all(<const uint8_t*>view.buf, view.len, 1, delivery) == 0
        finally:
            PyBuffer_Release(&view)

    def append(self, data) -> Delivery:
        """Pack one message: bytes, or anything with the buffer protocol."""
        cdef Delivery delivery
        if not self.spilling:
            delivery = self.new_delivery()
            if self.pack_object(data, delivery):
                return delivery
        return self.append_spilled(data)

    def append_many(self, messages) -> Delivery:
        """Pack an iterable of messages; the delivery of the last.

        Each at once, before the next is asked for: what makes them may use their memory again, wait, or fail.
        """
        cdef Delivery delivery = None
        cdef Batch spare
        cdef bint packed = False
        for data in messages:
            if packed and self.spare is not None:
                spare, self.spare = self.spare, None
                delivery.batch = spare      # nobody has seen this delivery yet: it is the next one's
            else:
                delivery = self.new_delivery()
            packed = not self.spilling and self.pack_object(data, delivery)
            if not packed:
                delivery = self.append_spilled(data)
        if delivery is None:
            raise ValueError("publish_many needs at least one message")
        return delivery

    cdef object append_spilled(self, data):
        """Pack into private memory. The client loop may meanwhile have found nothing there and ended the spilling: what
        comes next must stay behind this."""
        delivery = self.overflow.append(data)
        self.spill()
        return delivery

    def append_array(self, const uint8_t[:, ::1] rows) -> Delivery:
        """Pack a 2-D array, one row a message; the delivery of the last row."""
        cdef uint64_t left = rows.shape[0], total = left, nbytes = rows.shape[1]
        cdef const uint8_t* source = &rows[0, 0] if total and nbytes else NULL
        cdef Delivery delivery, last
        if total == 0:
            raise ValueError("publish_array needs at least one row")
        if not self.spilling:
            # All but the last row, which is the one that has a delivery.
            left = self.pack_all(source, nbytes, total - 1, None) + 1
            delivery = self.new_delivery()
            if left == 1 and self.pack_all(source + (total - 1) * nbytes, nbytes, 1, delivery) == 0:
                self.seal_if_full(nbytes)
                return delivery
        delivery = self.overflow.append_array(rows[total - left:])
        self.spill()                        # as `append_spilled`
        return delivery

    cdef void seal_full(self) noexcept nogil:
        """The open batch is full: it goes, and under load the next one may be larger."""
        if self.in_flight >= self.channel_count:
            self.target = min(2 * self.target, self.target_max)
        self.seal()

    cdef void seal_if_full(self, uint64_t nbytes) noexcept:
        """Submit the open batch when it has no room for another such message."""
        if take_turn(&self.turn):
            if self.is_open and self.used + message_stride(nbytes) > self.capacity:
                self.seal_full()
            give_turn(&self.turn)

    cdef void seal(self) noexcept nogil:
        """Submit the open batch. Empty ones are simply closed. In our turn."""
        cdef Outcome* holder = self.current
        if not self.is_open:
            return
        self.is_open = False
        self.current = NULL
        if self.count == 0:
            return
        self.memory.stream_finish(self.stream)
        self.channels[self.at_channel].lease_used += (self.used + 63) & ~<uint64_t>63
        self.submit_new(self.at_channel, self.at_offset, self.used, self.count, cxl_wall_ns(), holder, False,
                        self.opened + self.timeout)

    def flush_open(self) -> None:
        """Submit what is packed so far. When that is little, the next batch need not be as large."""
        if not take_turn(&self.turn):
            return
        if self.is_open and self.count and self.used < self.target // 2:
            self.target = max(self.target // 2, self.target_min)
        self.seal()
        give_turn(&self.turn)
        if self.level == 0:
            self.tell_outcomes()

    def shut_down(self, error) -> int:
        """Pack nothing more: our leases are about to end. What is packed or in flight fails with `error`; messages."""
        cdef uint64_t sequence, failed = 0
        cdef bint ours = take_turn(&self.turn)
        self.shut = True
        if self.is_open:
            failed += self.count
            if self.current != NULL:
                self.note(self.current, OUTCOME_FAILED, 0, self.channels[self.at_channel].broker, <PyObject*>error)
        self.is_open = False
        self.current = NULL
        if not self.ending:                 # else it is taken out already
            for sequence in range(self.oldest, self.next_sequence):
                failed += self.give_up(&self.sent[sequence % SENT_RING], <PyObject*>error)
        if ours:
            give_turn(&self.turn)
        self.tell_outcomes()
        return failed

    def after_fork(self) -> None:
        """In a child: leases, slots and turns are the parent's."""
        forget_turn(&self.turn)
        self.shut = self.forked = True
        self.telling = 0

    def see_to_pages(self) -> None:
        """Have pages mapped ahead when it looks as if much is published."""
        self.pages.see_to_others()

    def is_current(self, batch) -> bool:
        """Whether this batch is still being packed."""
        return self.current != NULL and self.current.batch == <PyObject*>batch

    @property
    def busy(self) -> bool:
        """Whether somebody has the open batch. Seen by another thread: a copy goes on without the GIL."""
        return self.turn.owner != 0

    @property
    def open_count(self) -> int:
        """Messages in the batch that is being packed."""
        return self.count if self.is_open else 0

    def wait(self, double seconds) -> None:
        """Wait until there is news, at most so long."""
        self.wait_for_news(<int64_t>(seconds * 1e9), False)

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
        cdef uint64_t c
        take_turn(&self.turn)
        for c in range(self.channel_count):
            if self.channels[c].broker == broker and self.channels[c].alive:
                self.drop_this(c)
        give_turn(&self.turn)
        self.tell_outcomes()

    cdef void drop_this(self, uint64_t c) noexcept nogil:
        cdef uint64_t sequence
        cdef Sent* sent
        self.channels[c].alive = False
        if self.is_open and self.at_channel == c:
            self.seal()
        for sequence in range(self.oldest, self.next_sequence):
            sent = &self.sent[sequence % SENT_RING]
            if sent.state == SENT_WAITING and sent.channel == c:
                sent.state = SENT_RETRY
                self.retry_wanted = True

    def submit_batch(self, Batch batch) -> bool:
        """Submit a private batch; False when there is no room for it now. The next `poll` tells what it settles."""
        cdef bint done
        assert batch.data != NULL, "a released batch is sent no more"
        take_turn(&self.turn)
        done = self.submit_private(batch)
        give_turn(&self.turn)
        if done:
            batch.release()
        return done

    cdef bint submit_private(self, Batch batch) noexcept:
        cdef int64_t c
        cdef uint64_t wall_ns
        self.seal()                         # its lease must not be shared, and what it has comes first
        if self.fenced or self.shut or self.ending:
            return False
        c = self.pick((batch.used + 63) & ~<uint64_t>63)
        if c < 0:
            self.refusals += 1
            if self.refusals % ASK_ANOTHER == 0:
                self.turn_of += 1
            self.ring_all()                 # whoever we ask for a lease may sleep
            return False
        memcpy(&wall_ns, batch.data - REQUEST_HEADER_BYTES + PUBLISHED_NS_AT, 8)
        self.submit_new(c, self.copy_to(c, batch.data, batch.used), batch.used, batch.count, wall_ns,
                        NULL if batch.settled else held(batch), batch.settled, batch.deadline)
        return True

    cpdef void spill(self):
        """Everything goes to private memory from now on."""
        if not self.spilling:
            self.spilling = True
            self.overflow.target = self.target

    def end_spilling(self) -> None:
        """Messages go straight into leases again, if nothing is left in private memory. Whoever is just putting something
        there says so afterwards (`append_spilled`)."""
        pass_by(PLACE_ENDING)
        if not self.spilling or self.fenced or self.shut or self.ending:
            return
        if self.overflow.is_empty() or left_out == SAFEGUARD_SPILL_ORDER:
            self.spilling = False
            self.target = min(self.overflow.target, self.target_max)

    def resubmit(self, uint64_t sequence, uint64_t broker) -> bool:
        """Submit a lost batch at this broker, with the sequence it has; False when there is no room."""
        cdef bint done
        take_turn(&self.turn)
        done = self.submit_again(sequence, broker)
        give_turn(&self.turn)
        return done

    cdef bint submit_again(self, uint64_t sequence, uint64_t broker) noexcept nogil:
        cdef Sent* sent = &self.sent[sequence % SENT_RING]
        cdef uint64_t c, to
        cdef Channel* channel
        cdef bint expired
        self.seal()                         # its lease must not be shared
        if sent.state != SENT_RETRY or sent.sequence != sequence or self.fenced or self.ending:
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
            expired = sent.expired
            self.submit(c, to, sent.nbytes, sent.messages, sequence, sent.wall_ns)
            sent.expired = expired
            self.retries += 1
            return True
        return False

    cdef void end_session(self) noexcept nogil:
        """Nothing is packed or settled from now on, until the next session begins: what comes spills."""
        self.seal()
        self.take_answers()
        if left_out != SAFEGUARD_ENDING:
            self.ending = self.spilling = True

    def take_unsettled(self) -> list:
        """End the session; everything in flight, oldest first, for a new one: (sequence, private batch) each.

        What was answered is told by the next `poll`.
        """
        cdef uint64_t sequence
        cdef list out = []
        take_turn(&self.turn)
        if not self.spilling:
            self.overflow.target = self.target
        self.end_session()
        give_turn(&self.turn)
        pass_by(PLACE_ENDING)
        for sequence in range(self.oldest, self.next_sequence):
            if self.sent[sequence % SENT_RING].state != SENT_FREE and not self.sent[sequence % SENT_RING].expired:
                out.append((sequence, self.taken_out(&self.sent[sequence % SENT_RING])))
                pass_by(PLACE_MADE)
            self.sent[sequence % SENT_RING].state = SENT_FREE
        self.oldest = self.next_sequence
        self.in_flight = self.in_flight_bytes = self.expired = 0
        self.retry_wanted = False
        return out

    cdef Batch taken_out(self, Sent* sent):
        """A batch in flight as a private one."""
        cdef Batch batch = self.holder_of(sent)
        drop(sent.holder)                   # `batch` holds it now
        sent.holder = NULL
        batch.adopt(self.memory.payload(sent.offset, sent.nbytes), sent.nbytes, sent.messages, sent.wall_ns)
        batch.level = self.level
        batch.deadline = sent.deadline
        return batch

    cdef Batch holder_of(self, Sent* sent):
        """The batch that deliveries hold, made when nobody holds one."""
        cdef Batch fresh
        if sent.holder == NULL:
            fresh = Batch(self.engine, 0)
            fresh.level = self.level
            if self.level == 0:
                fresh.settle(None, 0, None, False, None)
            if sent.holder != NULL or sent.state == SENT_FREE or sent.expired:
                return fresh                # another thread was faster
            sent.holder = held(fresh)
        return <Batch>sent.holder.batch

    def waited_for(self) -> list:
        """The batches in flight that somebody may wait for."""
        cdef uint64_t sequence
        cdef Sent* sent
        cdef Batch batch
        cdef list found = []
        for sequence in range(self.oldest, self.next_sequence):
            sent = &self.sent[sequence % SENT_RING]
            if self.level == 0 or self.ending or sent.state == SENT_FREE or sent.expired:
                continue
            batch = self.holder_of(sent)
            if sent.holder != NULL and sent.holder.batch == <PyObject*>batch:
                found.append(batch)
        return found

    def give_leases_back(self) -> None:
        """Called when nothing was published for a while: our leases go back, unless somebody is at work just now."""
        if not (self.turn.tickets != self.turn.serving or self.is_open or self.open_loans or self.in_flight
                or self.fenced or self.ending or self.forked):
            self.give_all_back()

    def loan(self, uint64_t nbytes) -> Loan:
        """A writable view of `nbytes` of a segment, published as one message when its block ends."""
        cdef Loan loan = Loan.__new__(Loan)
        cdef double until = time.monotonic() + self.timeout, deadline = 0
        loan.core = self
        loan.ended = True                   # nothing is lent yet
        if nbytes > self.message_bytes_max:
            self.engine.too_big(nbytes)
        while not self.lend(loan, nbytes):
            try:
                self.wait_for_room(&deadline)
            except Spill:
                deadline = 0
                if self.engine.is_on_loop() or time.monotonic() >= until:
                    raise self.engine.no_room() from None
                time.sleep(0.001)
        return loan

    cdef bint lend(self, Loan loan, uint64_t nbytes) noexcept:
        """Lend it room at the end of a lease; False when there is none now."""
        cdef Channel* channel
        if not take_turn(&self.turn):
            return False
        self.seal()
        if not self.open_for(nbytes):
            give_turn(&self.turn)
            return False
        self.is_open = False
        channel = &self.channels[self.at_channel]
        channel.loaned = True
        loan.session = self.session
        loan.channel = self.at_channel
        loan.lease = channel.using
        loan.offset = self.at_offset
        loan.nbytes = nbytes
        loan.data = self.memory.payload_writable(self.at_offset + MESSAGE_HEADER_BYTES, nbytes)
        loan.ended = False
        self.open_loans += 1
        give_turn(&self.turn)
        return True

    cpdef give_back(self, Loan loan):
        """The loan is not published: its bytes are free for the next batch, when nobody has a view of them."""
        if loan.ended or self.forked or self.collected:
            return
        loan.ended = True
        if loan.session == self.session:
            self.channels[loan.channel].loaned = False
            if loan.exports:
                self.pin(loan)
        if not loan.exports:
            self.loan_ends()

    cdef void pin(self, Loan loan) noexcept nogil:
        """Nothing else goes where it may still be written, and its lease is kept."""
        cdef Channel* channel = &self.channels[loan.channel]
        channel.lease_used += (message_stride(loan.nbytes) + 63) & ~<uint64_t>63
        channel.lease_waiting[loan.lease % LEASE_RING] += 1

    cdef int unpin(self, Loan loan) except -1:
        """The last view of a loan that was given back is gone."""
        cdef Channel* channel
        if self.forked or self.collected:
            return 0
        if loan.session == self.session:
            channel = &self.channels[loan.channel]
            channel.lease_waiting[loan.lease % LEASE_RING] -= 1
            if not channel.left:
                self.retire(channel)
                self.tell(channel)
        return self.loan_ends()

    cpdef object commit_loan(self, Loan loan):
        """Publish the loan's message, behind everything that was published before."""
        cdef Batch batch = Batch(self.engine, 0)
        cdef Delivery delivery = Delivery.__new__(Delivery)
        batch.level = self.level
        delivery.batch = batch
        take_turn(&self.turn)
        if loan.exports:
            give_turn(&self.turn)
            self.give_back(loan)
            raise LoanHeld(views=loan.exports)
        self.seal()
        if (self.shut or self.fenced or self.ending or self.spilling or loan.session != self.session
                or not self.channels[loan.channel].alive):
            give_turn(&self.turn)
            # Its lease is not ours any more, or others go first: the message goes the other way.
            try:
                self.engine.raise_if_closed()
                self.spill()
                return self.append_spilled(<uint8_t[:loan.nbytes]>loan.data if loan.nbytes else b"")
            finally:
                self.give_back(loan)
        self.publish_loan(loan, held(batch))
        loan.ended = True
        give_turn(&self.turn)
        self.loan_ends()
        if self.level == 0:
            self.tell_outcomes()
        return delivery

    cdef void publish_loan(self, Loan loan, Outcome* holder) noexcept nogil:
        cdef uint64_t used = message_stride(loan.nbytes)
        cdef Channel* channel = &self.channels[loan.channel]
        self.memory.store(loan.offset, <uint64_t>message_check(<uint32_t>loan.nbytes) << 32 | <uint32_t>loan.nbytes)
        if used > MESSAGE_HEADER_BYTES + loan.nbytes:
            memset(loan.data + loan.nbytes, 0, used - MESSAGE_HEADER_BYTES - loan.nbytes)
        # Written through the cache by the user: flushed here, fenced by submit.
        self.memory.flush(loan.offset, used)
        channel.loaned = False
        channel.lease_used += (used + 63) & ~<uint64_t>63
        self.messages += 1
        self.nbytes += loan.nbytes
        self.submit_new(loan.channel, loan.offset, used, 1, cxl_wall_ns(), holder, False, cxl_now_ns() * 1e-9 + self.timeout)
