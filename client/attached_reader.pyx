"""The native half of an attached subscriber: follows the order index, and hands out views of the segments themselves.

A view keeps its order entry, and with it its segment, from being reclaimed until it is released: the released index that
we publish is the first entry that some view still needs.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from broker.layout cimport ATTACH_OPEN, Layout, OrderEntry
from broker.reader cimport OrderReader, READ_CLOSED, READ_NOTHING, READ_OK
from client.received cimport ReceivedBatch
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_now_ns, cxl_yield

cdef enum:
    LIVE_RING = 32768               # order entries that may be viewed at once: as many as an index can have
    YIELD_NS = 2000000
    TAKE_MAX = 64                   # entries that are taken at once


@cython.no_gc_clear                     # released by way of `reader`, whatever the collector took first
cdef class SegmentView:
    """A batch's payload in its segment, read-only. Released when nobody holds it any more."""

    cdef AttachedReader reader
    cdef uint64_t index
    cdef const uint8_t* data
    cdef uint64_t nbytes

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void*>self.data, self.nbytes, 1, flags)

    def __dealloc__(self):
        if self.reader is not None:
            self.reader.release_index(self.index)


@cython.no_gc_clear                     # a view that goes later still publishes through `own`
cdef class AttachedReader:
    """Reads one topic through a read-only mapping. `own` maps this client's slot pages, the only ones it may write.

    `own_offset` is where the slot's client page lies in `own`.
    """

    cdef OrderReader reader
    cdef OrderReader watcher                # of the one thread that waits while another one may take
    cdef Memory memory
    cdef Memory own
    cdef uint64_t own_offset
    cdef Layout layout
    cdef uint64_t slot
    cdef uint64_t generation
    cdef object topic
    cdef bint views
    cdef bint left                          # the slot is not ours any more
    cdef readonly bint cut_off              # our place was let go: nothing more is read here
    cdef bint leaving                       # it is to be given up as soon as nothing is viewed
    cdef uint8_t live[32768]
    cdef readonly uint64_t released         # entries below are viewed by nobody
    cdef readonly uint64_t next_index

    def __init__(self, Memory memory, Layout layout, Memory own, uint64_t own_offset, uint64_t slot,
                 uint64_t generation, uint64_t topic_number, uint64_t topic_generation, uint64_t index, topic,
                 bint views):
        self.memory = memory
        self.layout = layout
        self.own = own
        self.own_offset = own_offset
        # The broker wiped our lines: what this host still knows of them is of an earlier use.
        own.invalidate(own_offset, 128)
        own.count_at(own_offset + 128)
        self.slot = slot
        self.generation = generation
        self.topic = topic
        self.views = views
        self.reader = OrderReader(memory, layout, topic_number, topic_generation, index)
        self.watcher = OrderReader(memory, layout, topic_number, topic_generation, index)
        self.released = self.next_index = index

    cdef void release_index(self, uint64_t index) noexcept:
        self.live[index % LIVE_RING] = 0
        self.publish_released()

    cdef void publish_released(self) noexcept:
        cdef uint64_t before = self.released
        while self.released < self.next_index and not self.live[self.released % LIVE_RING]:
            self.released += 1
        if self.released != before and not self.left:
            self.own.store(self.own_offset + 40, self.released)
            self.own.flush(self.own_offset + 40, 8)
            self.own.fence()
        if self.leaving and self.released == self.next_index:
            self.leave_now()

    cdef void leave_now(self) noexcept:
        if not self.left:
            self.left = True
            self.own.store(self.own_offset + 32, 1)
            self.own.flush(self.own_offset + 32, 8)
            self.own.full_fence()

    cdef bint claims(self, uint64_t first, uint64_t end) noexcept:
        """Say that entries up to `end` are viewed; False when our place was let go before anybody could see that.

        The broker fences the slot and looks at what we say; we say it and look at the slot: one of us sees the other.
        """
        cdef uint64_t index
        self.own.store(self.own_offset + 8, end)
        self.own.flush(self.own_offset + 8, 8)
        self.own.full_fence()
        self.memory.invalidate(self.layout.attach_line(self.slot), 64)
        if self.left or self.memory.load(self.layout.attach_line(self.slot)) == (self.generation << 8 | ATTACH_OPEN):
            return True
        for index in range(first, end):
            self.live[index % LIVE_RING] = 0
        self.publish_released()             # what was not viewed before counts as passed: nothing is to be waited for
        return False

    def take(self, uint64_t limit) -> list:
        """Up to `limit` batches that are there, as views, or copied if we give out bytes. Raises ReadError. Nothing when
        our place was let go: `is_open` says so."""
        cdef OrderEntry[TAKE_MAX] entries
        cdef SegmentView view
        cdef ReceivedBatch batch
        cdef list out = []
        cdef uint64_t first = self.next_index, count = 0, i
        cdef int status = READ_OK
        if self.cut_off:
            return out
        while count < min(limit, <uint64_t>TAKE_MAX) and first + count - self.released < LIVE_RING:
            status = self.reader.peek(first + count, &entries[count])
            if status != READ_OK:
                break
            self.live[(first + count) % LIVE_RING] = 1
            count += 1
        if count == 0:
            if status == READ_OK or status == READ_NOTHING:
                return out
            raise self.reader.error(status, first)
        self.next_index = first + count
        if not self.claims(first, first + count):
            self.cut_off = True
            return out
        for i in range(count):
            self.memory.invalidate(entries[i].payload_offset, entries[i].payload_bytes)
            batch = ReceivedBatch.__new__(ReceivedBatch)
            batch.position = entries[i].position
            batch.count = entries[i].message_count
            batch.broker = entries[i].broker
            batch.timestamp_ns = entries[i].wall_ns
            batch.topic = self.topic
            batch.is_view = self.views
            batch.nbytes = entries[i].payload_bytes
            batch.base = batch.data = self.memory.payload(entries[i].payload_offset, entries[i].payload_bytes)
            if self.views:
                view = SegmentView.__new__(SegmentView)
                view.index = first + i
                view.data = batch.data
                view.nbytes = batch.nbytes
                view.reader = self
                batch.owner = view
            else:                               # a reader that stands still holds nothing
                batch.owner = PyBytes_FromStringAndSize(<const char*>batch.data, batch.nbytes)
                batch.base = batch.data = <const uint8_t*>PyBytes_AS_STRING(batch.owner)
                self.live[(first + i) % LIVE_RING] = 0
            out.append(batch)
        if not self.views:
            self.publish_released()
        return out

    def first_position(self) -> int:
        """The first position that is kept."""
        return self.reader.frontiers()["reclaimed_position"]

    def is_open(self) -> bool:
        """Whether the broker still serves this slot."""
        self.memory.invalidate(self.layout.attach_line(self.slot), 64)
        return self.memory.load(self.layout.attach_line(self.slot)) == (self.generation << 8 | ATTACH_OPEN)

    def is_intact(self) -> bool:
        """Whether what we view is what it was: the broker protects our place, and the topic is there.

        Segments are given back after either ends: asked after a copy was made, it says what was copied.
        """
        cdef OrderEntry entry
        return self.is_open() and self.reader.peek(self.next_index, &entry) != READ_CLOSED

    def wait(self, double seconds) -> bool:
        """Wait for the next entry: yield for a while, then sleep on our doorbell. False when there is none yet.

        One thread at a time: another one may take meanwhile."""
        cdef int64_t start = cxl_now_ns(), limit = <int64_t>(seconds * 1e9), window = min(limit, YIELD_NS)
        cdef OrderEntry entry
        cdef uint64_t bell = self.own_offset + 64
        cdef uint32_t seen
        cdef bint there = False
        with nogil:
            while not there and cxl_now_ns() - start < window:
                there = self.watcher.peek(self.next_index, &entry) != READ_NOTHING
                if not there:
                    cxl_yield()
            if not there and limit > window:
                seen = <uint32_t>self.own.load(bell)
                self.own.fetch_add(bell + 8, 1)
                self.own.full_fence()
                there = self.watcher.peek(self.next_index, &entry) != READ_NOTHING
                if not there:
                    self.own.wait(bell, seen, min(limit - window, 20000000))
                self.own.fetch_add(bell + 8, <uint64_t>-1)
                there = self.watcher.peek(self.next_index, &entry) != READ_NOTHING
        return there

    def beat(self) -> None:
        """Say that we came."""
        self.own.store(self.own_offset, cxl_now_ns())
        self.own.flush(self.own_offset, 8)
        self.own.full_fence()

    def leave(self) -> None:
        """Give up the slot. Views that are still held are protected no longer, and no longer told of."""
        self.leave_now()

    def leave_when_free(self) -> None:
        """Give up the slot, once nothing of it is viewed any more."""
        self.leaving = True
        if self.released == self.next_index:
            self.leave()

    def after_fork(self) -> None:
        """In a child: views that end here say nothing, for the slot is the parent's."""
        self.left = True

    def error(self, int status):
        """The ReadError for a status."""
        return self.reader.error(status)
