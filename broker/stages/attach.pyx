"""Attached publishers: takes the descriptors of clients that write their payload into the segments themselves.

    client: lease ─► payload (non-temporal), fence ─► descriptor n, flush, fence
    broker: descriptor n ─► checked against the lease ─► ring slot, header ─► ... ─► completion n

A client is trusted with the bytes of its leases and with nothing else: offsets, lengths, counts and order are checked
before they are used. A descriptor that breaks the contract fences its session and touches nobody else.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from broker.crash cimport CRASH_RESERVED, CRASH_SLOT_CLAIMED, CRASH_SLOT_VALID, crash_point
from broker.doorbell cimport Doorbell
from broker.head cimport HeadView
from broker.layout cimport (
    ATTACH_CLOSING, ATTACH_FENCED, ATTACH_FREE, ATTACH_OPEN, ATTACH_RING, AttachClientLine, AttachLine, BATCH_FENCE,
    BATCH_VOID, BatchHeader, Descriptor, LEASE_RING, Layout, NO_LEASE, make_tag,
)
from broker.log cimport BrokerLog, RESERVED, RESERVE_TOPIC_CLOSED
from broker.planted cimport PLANT_LEASES_FORGOTTEN, planted
from broker.stages.ack cimport AckStage
from broker.stages.stage cimport Stage
from broker.wire cimport MESSAGE_HEADER_BYTES
from sim.cxl.clock cimport Clock
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count, cxl_fetch_add, cxl_leave_processor, cxl_load_acquire, cxl_store_release

cdef enum:
    STEP_DESCRIPTORS = 64
    LEASES_AHEAD = 2            # leases beyond the one in use that a busy client is given
    LEASE_BYTES_MAX = 1 << 20   # leases of a busy client grow up to this where segments are smaller,
    LEASE_PART = 256            # and to this part of the region
    CHECK_NS = 50000000
    STREAM_NS = 500000              # batches that come within that follow one another
    MOVE_NS = 20000000              # a thread changes its processor for a client at most so often


cdef class AttachStage(Stage):
    """One broker's attached publishers. Slots are opened and closed by the gRPC service, polled by the pipeline."""

    def __cinit__(self):
        self.slots = NULL

    def __init__(self, Memory memory, BrokerLog log, AckStage acks, Clock clock, int64_t lease_ns):
        self.memory = memory
        self.layout = log.layout
        self.head = HeadView(memory, log.layout)
        self.log = log
        self.acks = acks
        self.clock = clock
        self.broker = log.broker
        self.lease_ns = lease_ns
        self.lease_bytes_max = max(self.layout.g.segment_bytes, min(
            <uint64_t>LEASE_BYTES_MAX, self.layout.g.segment_count * self.layout.g.segment_bytes // LEASE_PART))
        self.count = self.layout.g.attach_per_broker
        self.first = self.broker * self.count
        self.slots = <AttachSlot*>calloc(max(self.count, 1), sizeof(AttachSlot))
        if self.slots == NULL:
            raise MemoryError
        for i in range(self.count):
            self.resume_slot(i)

    cdef resume_slot(self, uint64_t i):
        """A slot that an earlier process of this broker had given out is fenced; its leases end when its client does."""
        cdef AttachSlot* slot = &self.slots[i]
        cdef AttachLine line
        cdef uint64_t number
        cdef int64_t stream
        self.memory.read_line(self.layout.attach_line(self.first + i), &line)
        if line.state & 0xFF not in (ATTACH_OPEN, ATTACH_FENCED):
            return
        # A reader has neither stream nor leases. A publisher had a stream, so there is one for it.
        stream = self.acks.open_number(line.topic & 0xFFFF, line.topic >> 16, 0, 1) if line.client_id else 0
        if stream < 0:
            raise MemoryError
        slot.generation = line.state >> 8
        slot.topic = line.topic & 0xFFFF
        slot.topic_generation = line.topic >> 16
        slot.session_slot = line.session_slot
        slot.session_epoch = line.session_epoch
        slot.client_id = line.client_id
        slot.owner = line.owner
        slot.stream = stream
        slot.taken = line.taken
        slot.granted = line.granted
        slot.retired = min(self.memory.load(self.layout.attach_client(self.first + i) + 16), line.granted)
        slot.retired = max(slot.retired, line.granted - min(line.granted, <uint64_t>LEASE_RING))
        slot.heard_at = self.clock.now_ns()
        for number in range(slot.retired, slot.granted):
            slot.leases[number % LEASE_RING].offset = self.memory.load(
                self.layout.attach_lease(self.first + i, number))
            slot.leases[number % LEASE_RING].nbytes = self.memory.load(
                self.layout.attach_lease(self.first + i, number) + 8)
        slot.state = ATTACH_FENCED
        self.write_line(i)
        cxl_fetch_add(&self.log.eager, 1)
        self.limit = i + 1

    def keep_leases(self) -> None:
        """Clients may still write into what an earlier process of this broker leased them: not before they are gone.

        Called once, before the first topic is opened: what a topic had is given back when it turns out to be gone.
        """
        cdef uint64_t i, number, segment, first
        cdef AttachSlot* slot
        cdef HeldLease* lease
        if planted(PLANT_LEASES_FORGOTTEN):
            return
        for i in range(self.limit):
            slot = &self.slots[i]
            for number in range(slot.retired, slot.granted):
                lease = &slot.leases[number % LEASE_RING]
                first = self.log.segment_of(lease.offset)
                for segment in range(first, first + lease.nbytes // self.layout.g.segment_bytes):
                    if segment < self.layout.g.segment_count:
                        self.log.segments[segment].leased += 1

    def __dealloc__(self):
        free(self.slots)

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t i, state, limit = cxl_load_acquire(&self.limit)
        cdef int64_t work = 0, now
        for i in range(limit):
            state = cxl_load_acquire(&self.slots[i].state)
            if state == ATTACH_OPEN and self.slots[i].subscriber:
                work += self.follow(i)
            elif state == ATTACH_OPEN:
                work += self.take(i)
                if self.slots[i].state == ATTACH_OPEN:
                    work += self.grant(i)
            elif state == ATTACH_FENCED and self.slots[i].fence_due:
                work += self.fence_session(&self.slots[i])
        if limit == 0:
            return 0
        now = self.clock.now_ns()
        if now >= self.next_check:
            self.next_check = now + min(<int64_t>CHECK_NS, self.lease_ns // 4)
            for i in range(limit):
                if self.slots[i].state != ATTACH_FREE:
                    work += self.finish(i)
        return work

    cdef int64_t follow(self, uint64_t i) noexcept nogil:
        """Move a subscriber's cursor over what it released, and wake it when there is more."""
        cdef AttachSlot* slot = &self.slots[i]
        cdef uint64_t order, at = self.layout.attach_client(self.first + i)
        cdef uint64_t committed, released
        # What it released is read before what is committed: nobody releases what was not committed before.
        self.memory.invalidate(at, 64)
        released = self.memory.load(at + 40)
        if not self.head.begin():
            return 0
        order = self.head.layout.topic_order(slot.topic)
        self.memory.invalidate(order, 64)
        committed = self.memory.load(order)
        if not self.head.same():
            return 0
        if released < slot.released or released > committed:
            slot.state = ATTACH_FENCED          # a cursor never goes back and never passes the tail
            self.write_line(i)
            return 1
        if released != slot.released:
            slot.released = released
            at = self.layout.cursor(slot.subscriber - 1) + 16
            self.memory.store(at, released)
            self.memory.flush(at, 8)
            self.memory.fence()
        if committed == slot.committed:
            return 0
        slot.committed = committed
        self.memory.full_fence()
        self.acks.ring_client(self.first + i)
        return 1

    cdef int64_t take(self, uint64_t i) noexcept nogil:
        """Take the client's next descriptors as far as they are there and there is room."""
        cdef AttachSlot* slot = &self.slots[i]
        cdef Descriptor descriptor
        cdef BatchHeader header
        cdef uint64_t at, ring_slot = 0
        cdef int64_t done = 0
        cdef int status
        while done < STEP_DESCRIPTORS and self.acks.room(slot.stream):
            at = self.layout.attach_descriptor(self.first + i, slot.taken)
            self.memory.invalidate(at, 64)
            if self.memory.load(at) != make_tag(slot.generation, slot.taken):
                break
            # A private copy: what was checked cannot change any more.
            self.memory.read_line(at, &descriptor)
            if not self.accept(slot, &descriptor):
                self.fence_slot(i)
                return done + 1
            if descriptor.processor and descriptor.processor == self.memory.processor():
                self.make_way(descriptor.processor)
            crash_point(CRASH_RESERVED)
            status = self.log.reserve_leased(slot.topic, slot.topic_generation, descriptor.payload_offset,
                                             descriptor.payload_bytes, descriptor.message_count, &ring_slot)
            if status == RESERVE_TOPIC_CLOSED:
                self.fence_slot(i)
                return done + 1
            if status != RESERVED:
                break
            crash_point(CRASH_SLOT_CLAIMED)
            header.payload_offset = descriptor.payload_offset
            header.payload_bytes = descriptor.payload_bytes
            header.message_count = descriptor.message_count
            header.client_id = slot.client_id
            header.session_slot = slot.session_slot
            header.session_epoch = slot.session_epoch
            header.batch_sequence = descriptor.batch_sequence
            header.received_wall_ns = descriptor.published_wall_ns
            header.flags = header.local_order = 0
            self.log.complete(slot.topic, ring_slot, &header)
            crash_point(CRASH_SLOT_VALID)
            self.acks.expect(slot.stream, descriptor.batch_sequence, ring_slot, descriptor.message_count)
            slot.leases[descriptor.lease % LEASE_RING].used = (
                descriptor.payload_offset + descriptor.payload_bytes
                - slot.leases[descriptor.lease % LEASE_RING].offset + 63) & ~<uint64_t>63
            slot.taken += 1
            done += 1
        return done

    cdef void make_way(self, uint64_t processor) noexcept nogil:
        """A client runs on our processor. Where batch follows batch, kernels that let neither of us interrupt the other make
        each wait for the other's time slice."""
        cdef int64_t now = self.clock.now_ns()
        if now - self.met_at < STREAM_NS and now >= self.next_move:
            self.next_move = now + MOVE_NS
            cxl_leave_processor(processor)
        self.met_at = now

    cdef bint accept(self, AttachSlot* slot, Descriptor* descriptor) noexcept nogil:
        """Whether a descriptor lies within its lease, behind what was taken of it, and adds up."""
        cdef HeldLease* lease
        cdef uint64_t start
        if descriptor.lease < slot.retired or descriptor.lease >= slot.granted:
            return False
        lease = &slot.leases[descriptor.lease % LEASE_RING]
        if descriptor.payload_offset < lease.offset or descriptor.payload_offset % 64:
            return False
        start = descriptor.payload_offset - lease.offset
        return (start >= lease.used and start <= lease.nbytes and descriptor.payload_bytes <= lease.nbytes - start
                and 0 < descriptor.payload_bytes <= self.layout.g.batch_bytes_max
                and 0 < descriptor.message_count
                and <uint64_t>descriptor.message_count * MESSAGE_HEADER_BYTES <= descriptor.payload_bytes)

    cdef int64_t grant(self, uint64_t i) noexcept nogil:
        """Take back retired leases, and keep a busy client supplied."""
        cdef AttachSlot* slot = &self.slots[i]
        cdef uint64_t at = self.layout.attach_client(self.first + i), using, retired, wanted, ahead
        cdef uint64_t offset = 0, nbytes = 0
        cdef HeldLease* lease
        cdef int64_t done = 0
        self.memory.invalidate(at, 64)
        using = self.memory.load(at + 8)
        retired = self.memory.load(at + 16)
        if retired > slot.granted or using > slot.granted:
            self.fence_slot(i)
            return 1
        if retired > slot.retired:
            self.end_leases(slot, retired)
        if cxl_load_acquire(&self.log.topics[slot.topic].generation) != slot.topic_generation:
            return done                         # deleted, perhaps made again: the next look fences the slot
        wanted = self.memory.load(at + 24)
        if wanted == NO_LEASE:
            return done                         # idle: it asks when it needs one
        wanted = min(max(wanted, self.layout.g.segment_bytes), self.layout.g.batch_bytes_max)
        # One large lease at a time: two would be a good part of a small region. Who has filled none needs one.
        ahead = LEASES_AHEAD if wanted <= self.layout.g.segment_bytes and using else 1
        while slot.granted - slot.retired < LEASE_RING and slot.granted < using + ahead:
            if slot.granted > 1:
                slot.lease_bytes = min(2 * max(slot.lease_bytes, self.layout.g.segment_bytes), self.lease_bytes_max)
            if slot.lease_bytes <= wanted or self.log.lease(slot.topic, slot.lease_bytes, &offset, &nbytes) != RESERVED:
                slot.lease_bytes = 0            # begin anew with little when there is little
                if self.log.lease(slot.topic, wanted, &offset, &nbytes) != RESERVED:
                    break
            lease = &slot.leases[slot.granted % LEASE_RING]
            lease.offset = offset
            lease.nbytes = nbytes
            lease.used = 0
            at = self.layout.attach_lease(self.first + i, slot.granted)
            self.memory.store(at, offset)
            self.memory.store(at + 8, nbytes)
            self.memory.flush(at, 16)
            self.memory.fence()
            slot.granted += 1
            at = self.layout.attach_line(self.first + i)
            self.memory.store(at + 16, slot.granted)
            self.memory.flush(at, 64)
            self.memory.fence()
            done += 1
        if done:
            self.memory.full_fence()
            self.acks.ring_client(self.first + i)
        return done

    cdef void end_leases(self, AttachSlot* slot, uint64_t up_to) noexcept nogil:
        cdef HeldLease* lease
        while slot.retired < up_to:
            lease = &slot.leases[slot.retired % LEASE_RING]
            self.log.end_lease(slot.topic, lease.offset, lease.nbytes)
            slot.retired += 1

    cdef void fence_slot(self, uint64_t i) noexcept nogil:
        """Take nothing more from this client, and have its session fenced."""
        cdef AttachSlot* slot = &self.slots[i]
        slot.state = ATTACH_FENCED
        slot.fence_due = 1
        cxl_count(&self.log.counters.batches_refused, 1)
        self.fence_session(slot)
        self.write_line(i)
        self.acks.ring_client(self.first + i)

    cdef bint fence_session(self, AttachSlot* slot) noexcept nogil:
        """Tell the sequencer, by a void batch; False while the ring has no room for it."""
        cdef BatchHeader header
        cdef uint64_t ring_slot = 0
        cdef int status = self.log.reserve_leased(slot.topic, slot.topic_generation, 0, 0, 0, &ring_slot)
        if status == RESERVED:
            memset(&header, 0, sizeof(header))
            header.flags = BATCH_VOID | BATCH_FENCE
            header.session_slot = slot.session_slot
            header.session_epoch = slot.session_epoch
            header.client_id = slot.client_id
            self.log.complete(slot.topic, ring_slot, &header)
        elif status != RESERVE_TOPIC_CLOSED:
            return False
        slot.fence_due = 0
        return True

    cdef void write_line(self, uint64_t i) noexcept nogil:
        cdef AttachSlot* slot = &self.slots[i]
        cdef AttachLine line
        memset(&line, 0, sizeof(line))
        line.state = slot.generation << 8 | slot.state
        line.topic = slot.topic_generation << 16 | slot.topic
        line.granted = slot.granted
        line.session_slot = slot.session_slot
        line.session_epoch = slot.session_epoch
        line.client_id = slot.client_id
        line.taken = slot.taken
        line.owner = slot.owner
        self.memory.write_line(self.layout.attach_line(self.first + i), &line)
        self.memory.flush(self.layout.attach_line(self.first + i), 64)
        self.memory.full_fence()

    cdef int64_t finish(self, uint64_t i) noexcept nogil:
        """Slow checks: a silent client's lease ends; a slot that is being closed gives everything back."""
        cdef AttachSlot* slot = &self.slots[i]
        cdef uint64_t at = self.layout.attach_client(self.first + i), heartbeat
        cdef int64_t now = self.clock.now_ns()
        self.memory.invalidate(at, 64)
        heartbeat = self.memory.load(at)
        if heartbeat != slot.heartbeat:
            slot.heartbeat = heartbeat
            slot.heard_at = now
        elif slot.state == ATTACH_OPEN and now - slot.heard_at > self.lease_ns and (heartbeat == 0 or not slot.subscriber):
            if slot.subscriber:
                slot.state = ATTACH_FENCED      # nobody came; a reader that came may stop for as long as it lives
                self.write_line(i)
            else:
                self.fence_slot(i)
            return 1
        if slot.state == ATTACH_OPEN and self.log.topics[slot.topic].generation != slot.topic_generation:
            slot.state = ATTACH_FENCED          # the topic is being deleted; the leases end when the client says so
            self.write_line(i)
            self.acks.ring_client(self.first + i)
            return 1
        if slot.subscriber and self.evict(i):
            return 1
        if slot.closing == 0:
            return 0
        if slot.subscriber or slot.client_id == 0:
            slot.closing = 0
            slot.state = ATTACH_CLOSING
            self.write_line(i)
            cxl_fetch_add(&self.log.eager, <uint64_t>-1)
            cxl_store_release(&slot.state, ATTACH_FREE)
            return 1
        # What it submitted is taken first. The client is gone, or said that it writes no more.
        if slot.fence_due or (slot.state == ATTACH_OPEN and self.take(i)):
            return 1
        self.end_leases(slot, slot.granted)
        slot.state = ATTACH_CLOSING
        if self.acks.streams[slot.stream].waiting_tail != cxl_load_acquire(
                &self.acks.streams[slot.stream].waiting_head):
            return 0                            # acks are still to be written
        cxl_store_release(&self.acks.streams[slot.stream].active, 2)
        slot.closing = 0
        self.write_line(i)
        cxl_fetch_add(&self.log.eager, <uint64_t>-1)
        cxl_store_release(&slot.state, ATTACH_FREE)
        return 1

    cdef int64_t evict(self, uint64_t i) noexcept nogil:
        """Let go of a place that the reclaimer wants back, once its reader is shut out and views nothing.

        We fence the slot and look at what is viewed then; the reader says what it is about to view and looks at the slot
        then: what it views before it sees the fence is seen here and waited for.
        """
        cdef AttachSlot* slot = &self.slots[i]
        cdef uint64_t cursor = slot.subscriber - 1, at, released
        if not slot.evicting:
            if slot.state != ATTACH_OPEN or not self.head.begin():
                return 0
            at = self.head.layout.cursor_grant(cursor)
            self.memory.invalidate(at, 64)
            slot.evicting = self.memory.load(at + 16) == self.memory.load(self.layout.cursor(cursor)) >> 8
            if not slot.evicting or not self.head.same():
                slot.evicting = 0
                return 0
            slot.state = ATTACH_FENCED
            self.write_line(i)                  # with a full fence
            self.acks.ring_client(self.first + i)
        at = self.layout.attach_client(self.first + i)
        self.memory.invalidate(at, 64)
        released = self.memory.load(at + 40)
        if released != self.memory.load(at + 8) or not self.head.begin():
            return 0
        at = self.head.layout.topic_order(slot.topic)
        self.memory.invalidate(at, 64)
        released = self.memory.load(at)
        if not self.head.same() or self.log.topics[slot.topic].opened != slot.topic_generation:
            return 0
        at = self.layout.cursor(cursor) + 16
        if released > self.memory.load(at):
            self.memory.store(at, released)
            self.memory.flush(at, 8)
            self.memory.fence()
        return 0

    # ---- for the service ----------------------------------------------------------------------------------------------

    def open(self, uint64_t topic, uint64_t topic_generation, uint64_t session_slot, uint64_t session_epoch,
             uint64_t client_id, uint64_t level, uint64_t replication_factor, uint64_t pid, uint64_t presence,
             uint64_t owner=0):
        """Hand out a slot; (its number in the region, its generation). None when all are taken."""
        cdef int64_t i = self.claim_slot(topic, topic_generation, pid, presence, owner), stream
        cdef AttachSlot* slot
        if i < 0:
            return None
        slot = &self.slots[i]
        stream = self.acks.open_number(topic, topic_generation, level, replication_factor)
        if stream < 0:
            return None
        slot.session_slot = session_slot
        slot.session_epoch = session_epoch
        slot.client_id = client_id
        slot.level = level
        slot.stream = stream
        self.acks.streams[stream].slot_generation = slot.generation
        self.acks.streams[stream].slot_and_one = self.first + i + 1
        self.publish_slot(i)
        return self.first + i, slot.generation

    def open_subscriber(self, uint64_t topic, uint64_t topic_generation, uint64_t cursor, uint64_t index,
                        uint64_t pid, uint64_t presence, uint64_t owner=0):
        """Hand out a subscriber's slot, whose cursor stands at `index`; as `open`."""
        cdef int64_t i = self.claim_slot(topic, topic_generation, pid, presence, owner)
        if i < 0:
            return None
        self.slots[i].subscriber = cursor + 1
        self.slots[i].released = index
        self.memory.store(self.layout.attach_client(self.first + i) + 8, index)
        self.memory.store(self.layout.attach_client(self.first + i) + 40, index)
        self.memory.flush(self.layout.attach_client(self.first + i), 64)
        self.publish_slot(i)
        return self.first + i, self.slots[i].generation

    cdef int64_t claim_slot(self, uint64_t topic, uint64_t topic_generation, uint64_t pid, uint64_t presence,
                            uint64_t owner):
        """A free slot of ours, its client line wiped and named; -1 when all are taken."""
        cdef uint64_t i, at, offset
        cdef AttachSlot* slot
        for i in range(self.count):
            slot = &self.slots[i]
            if cxl_load_acquire(&slot.state) != ATTACH_FREE:
                continue
            memset(slot, 0, sizeof(AttachSlot))
            slot.generation = (self.memory.load(self.layout.attach_line(self.first + i)) >> 8) % 0xFFFF + 1
            slot.topic = topic
            slot.topic_generation = topic_generation
            slot.owner = owner
            slot.heard_at = self.clock.now_ns()
            at = self.layout.attach_client(self.first + i)      # not its counters: they add up over all clients
            for offset in range(0, 128, 8):
                self.memory.store(at + offset, 0)
            self.memory.store(at + 48, pid)
            self.memory.store(at + 56, presence)
            self.memory.flush(at, 128)
            return <int64_t>i
        return -1

    cdef void publish_slot(self, uint64_t i) noexcept nogil:
        """The slot's state is complete: from here on the pipeline polls it."""
        cdef AttachSlot* slot = &self.slots[i]
        slot.state = ATTACH_OPEN
        self.write_line(i)
        slot.state = ATTACH_FREE
        cxl_fetch_add(&self.log.eager, 1)
        cxl_store_release(&slot.state, ATTACH_OPEN)
        if i >= self.limit:
            cxl_store_release(&self.limit, i + 1)

    def close_slot(self, uint64_t number, uint64_t generation) -> bool:
        """The client is gone, or writes no more: what it submitted is taken, everything else comes back."""
        cdef uint64_t i = number - self.first
        if number < self.first or i >= self.count or self.slots[i].generation != generation:
            return False
        if cxl_load_acquire(&self.slots[i].state) == ATTACH_FREE:
            return False
        cxl_store_release(&self.slots[i].closing, 1)
        self.next_check = 0
        return True

    def owner_of(self, uint64_t number, uint64_t generation):
        """Whose slot it is, a number of a principal; None when no client has it. Survives this process."""
        cdef uint64_t i = number - self.first
        if number < self.first or i >= self.count or self.slots[i].generation != generation:
            return None
        return self.slots[i].owner if cxl_load_acquire(&self.slots[i].state) != ATTACH_FREE else None

    def is_taken(self, uint64_t number, uint64_t generation) -> bool:
        """Whether a slot is still in that client's use."""
        cdef AttachSlot* slot = &self.slots[number - self.first]
        return slot.generation == generation and cxl_load_acquire(&slot.state) != ATTACH_FREE

    def open_slots(self) -> list[dict]:
        """Slots in use: number, generation, pid, presence, whether its client is gone or reads, state, descriptors taken, leases held."""
        cdef uint64_t i, at
        out = []
        for i in range(self.limit):
            if cxl_load_acquire(&self.slots[i].state) == ATTACH_FREE:
                continue
            at = self.layout.attach_client(self.first + i)
            self.memory.invalidate(at, 64)
            # Fenced first, then still without a beat: its client never got our answer, and will see the fence if it does.
            unheard = self.slots[i].state == ATTACH_FENCED and self.memory.load(at) == 0
            out.append({"number": self.first + i, "generation": self.slots[i].generation,
                        "pid": self.memory.load(at + 48), "presence": self.memory.load(at + 56),
                        "left": unheard or self.memory.load(at + 32) != 0,
                        "state": self.slots[i].state, "reads": self.slots[i].client_id == 0,
                        "subscriber": bool(self.slots[i].subscriber),
                        "taken": self.slots[i].taken, "leases": self.slots[i].granted - self.slots[i].retired})
        return out
