"""Reads one topic in the total order: the order index and nothing else says what is there."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint64_t

from broker.errors import BrokerUnavailable
from broker.head cimport HeadView
from broker.layout cimport LOST_BROKER, TOPIC_ACTIVE, Layout, OrderEntry, make_tag
from broker.wire cimport BATCH_HEADER_BYTES, MESSAGE_HEADER_BYTES, write_batch_header
from sim.cxl.memory cimport Memory

cdef enum:
    FRAME_ENTRIES = 256


class ReadError(Exception):
    """`status` is a ReadStatus below zero, `index` the order entry; `first` to `end` are the positions that are gone."""

    def __init__(self, status, index, message, first=None, end=None):
        super().__init__(message)
        self.status = status
        self.index = index
        self.first = first
        self.end = end


cdef class OrderReader:
    """A place in one topic's order index. Positions count messages, indexes count batches."""

    def __init__(self, Memory memory, Layout layout, uint64_t topic, uint64_t generation, uint64_t index=0):
        self.memory = memory
        self.head = HeadView(memory, layout)
        self.layout = self.head.layout
        self.topic = topic
        self.generation = generation
        self.index = index
        self.next_position = <uint64_t>ANY_POSITION

    cdef uint64_t committed_index(self) noexcept nogil:
        self.memory.invalidate(self.layout.topic_order(self.topic), 64)
        return self.memory.load(self.layout.topic_order(self.topic))

    cdef uint64_t committed_position(self) noexcept nogil:
        self.memory.invalidate(self.layout.topic_order(self.topic), 64)
        return self.memory.load(self.layout.topic_order(self.topic) + 8)

    cdef uint64_t reclaimed_index(self) noexcept nogil:
        self.memory.invalidate(self.layout.topic_reclaim(self.topic), 64)
        return self.memory.load(self.layout.topic_reclaim(self.topic))

    cdef int peek(self, uint64_t index, OrderEntry* entry) noexcept nogil:
        """Read entry `index` if it is committed; a ReadStatus. Nothing is there while no head serves."""
        cdef int status
        while self.head.begin():
            status = self.look(index, entry)
            if self.head.same():
                return status
        return READ_NOTHING

    cdef int look(self, uint64_t index, OrderEntry* entry) noexcept nogil:
        """As the head of now says. What is read is checked before it is followed."""
        cdef uint64_t at = self.layout.order_entry(self.topic, index)
        self.memory.invalidate(self.layout.topic(self.topic), 64)
        if self.memory.load(self.layout.topic(self.topic)) != (self.generation << 8 | TOPIC_ACTIVE):
            return READ_CLOSED
        if index >= self.committed_index():
            return READ_NOTHING
        if index < self.reclaimed_index():
            return READ_LOST
        self.memory.invalidate(at, 64)
        if not self.memory.read_line(at, entry) or entry.commit != make_tag(self.generation, index):
            return READ_LOST if index < self.reclaimed_index() else READ_DAMAGED
        if entry.broker == LOST_BROKER and entry.payload_bytes == 0 and entry.message_count:
            return READ_GONE
        if (entry.payload_offset < self.layout.g.segments or entry.payload_bytes > self.layout.g.batch_bytes_max
                or entry.payload_offset > self.layout.g.region_bytes - entry.payload_bytes
                or entry.payload_offset % 64 or entry.broker >= self.layout.g.broker_count or entry.message_count == 0
                or entry.message_count > entry.payload_bytes // MESSAGE_HEADER_BYTES):
            return READ_DAMAGED
        return READ_OK

    def move_to(self, uint64_t index) -> None:
        """Go to order entry `index`."""
        self.index = index
        self.next_position = <uint64_t>ANY_POSITION

    def frontiers(self) -> dict:
        """committed_index, committed_position, reclaimed_index, reclaimed_position of the topic, now.

        Raises `BrokerUnavailable` while no head serves, as everything does that searches.
        """
        while self.head.begin():
            found = self.frontiers_now()
            if self.head.same():
                return found
        raise self.error(READ_NOTHING)

    cdef bint positions(self, uint64_t* first, uint64_t* committed) noexcept nogil:
        """The reclaimed and the committed position, as the head that serves says; False while none does."""
        cdef uint64_t kept, end
        while self.head.begin():
            self.reclaimed_index()              # which invalidates the line
            kept = self.memory.load(self.layout.topic_reclaim(self.topic) + 8)
            end = self.committed_position()
            if self.head.same():
                first[0] = kept
                committed[0] = end
                return True
        return False

    cdef dict frontiers_now(self):
        return {"committed_index": self.committed_index(), "committed_position": self.committed_position(),
                "reclaimed_index": self.reclaimed_index(),
                "reclaimed_position": self.memory.load(self.layout.topic_reclaim(self.topic) + 8)}

    def has_news(self) -> bool:
        """Whether there is a committed entry at our place, or the topic is gone."""
        cdef OrderEntry entry
        return self.peek(self.index, &entry) != READ_NOTHING

    def find(self, uint64_t position) -> int:
        """Index of the entry that holds `position`: the first kept when it is gone, the end when it is to come.

        Raises ReadError when an entry on the way is damaged, or the topic is gone.
        """
        frontiers = self.frontiers()
        cdef uint64_t low = frontiers["reclaimed_index"], high = frontiers["committed_index"], middle
        cdef OrderEntry entry
        cdef int status
        while low < high:
            middle = (low + high) // 2
            status = self.peek(middle, &entry)
            if status == READ_LOST:
                low = max(middle + 1, <uint64_t>self.frontiers()["reclaimed_index"])    # reclaimed while we looked
            elif status != READ_OK and status != READ_GONE:
                raise self.error(status, middle)
            elif entry.position + entry.message_count <= position:
                low = middle + 1
            else:
                high = middle
        return low

    def position_of(self, uint64_t index) -> int:
        """Position of the first message of entry `index`, which is committed or the next one to be."""
        cdef OrderEntry entry
        cdef uint64_t end = self.committed_position()       # first: it must not be later than the look at the entry
        cdef int status = self.peek(index, &entry)
        if status == READ_NOTHING:
            return end
        if status != READ_OK and status != READ_GONE:
            raise self.error(status, index)
        return entry.position

    def find_time(self, uint64_t wall_ns, uint64_t at=0, uint64_t entries_max=<uint64_t>-1) -> int:
        """Index of the first kept entry, from `at` on, published at or after a time.

        Times are the publishers' and come in any order, so all are looked at, up to `entries_max`: the index behind
        them when it is none of them. Called again from there until the answer stays, it is the entry, or the end.
        """
        frontiers = self.frontiers()
        cdef uint64_t end = frontiers["committed_index"]
        cdef OrderEntry entry
        cdef int status
        at = max(at, <uint64_t>frontiers["reclaimed_index"])
        if at < end and end - at > entries_max:
            end = at + entries_max
        while at < end:
            status = self.peek(at, &entry)
            if status == READ_NOTHING:
                raise self.error(status)
            if status == READ_OK and entry.wall_ns >= wall_ns:
                return at
            at += 1
        return at

    def find_batches(self, uint64_t client, uint64_t session_epoch, uint64_t first, uint64_t end, uint64_t at,
                     uint64_t entries_max, dict found) -> int:
        """Look for a client's batches from `first` to `end` in up to `entries_max` kept entries below index `at`, the last
        first; put sequence: position into `found`. The index to go on below; 0 when there is no more to look at."""
        cdef OrderEntry entry
        cdef dict frontiers = self.frontiers()
        cdef uint64_t low = frontiers["reclaimed_index"]
        cdef int status
        at = min(at, <uint64_t>frontiers["committed_index"])
        while at > low and entries_max:
            at -= 1
            entries_max -= 1
            status = self.peek(at, &entry)
            if status == READ_NOTHING:
                raise self.error(status)        # it may be there: nobody serves now
            if (status == READ_OK and entry.client_id == client and entry.session_epoch == session_epoch
                    and first <= entry.batch_sequence < end):
                found[entry.batch_sequence] = entry.position
                if <uint64_t>len(found) == end - first:
                    return 0
        return at if at > low else 0

    def read_frame(self, uint64_t bytes_max):
        """The next batches as an encoded SubscribeResponse of about `bytes_max`, at least one; b"" when none is there.

        Moves our place behind them. Raises ReadError when the data was reclaimed, is damaged, or the topic is gone.
        """
        cdef OrderEntry entries[FRAME_ENTRIES]
        cdef uint64_t count = 0, total = 0, i, position = self.next_position
        cdef int status = READ_OK
        cdef uint8_t* at
        with nogil:
            while count < FRAME_ENTRIES:
                status = self.peek(self.index + count, &entries[count])
                if status == READ_OK and position != <uint64_t>ANY_POSITION and entries[count].position != position:
                    status = READ_DAMAGED       # positions have neither holes nor overlaps
                if status != READ_OK:
                    break
                if count and total + BATCH_HEADER_BYTES + entries[count].payload_bytes > bytes_max:
                    break
                total += BATCH_HEADER_BYTES + entries[count].payload_bytes
                position = entries[count].position + entries[count].message_count
                count += 1
        if count == 0:
            if status == READ_NOTHING:
                return b""
            raise self.error(status)
        frame = PyBytes_FromStringAndSize(NULL, total)
        at = <uint8_t*>PyBytes_AS_STRING(frame)
        with nogil:
            for i in range(count):
                write_batch_header(at, entries[i].position, entries[i].message_count, entries[i].broker,
                                   entries[i].wall_ns, entries[i].payload_bytes)
                # A payload written around the cache may have a stale cached copy here.
                self.memory.invalidate(entries[i].payload_offset, entries[i].payload_bytes)
                self.memory.copy_out(at + BATCH_HEADER_BYTES, entries[i].payload_offset, entries[i].payload_bytes)
                at += BATCH_HEADER_BYTES + entries[i].payload_bytes
        # Segments are given back after a reclaim or a deletion is visible: what we copied before is what it was.
        if not self.head.begin():
            return b""
        status = READ_LOST if self.index < self.reclaimed_index() else READ_OK
        self.memory.invalidate(self.layout.topic(self.topic), 64)
        if self.memory.load(self.layout.topic(self.topic)) != (self.generation << 8 | TOPIC_ACTIVE):
            status = READ_CLOSED
        if not self.head.same():
            return b""                      # another head says what is reclaimed: read again
        if status != READ_OK:
            raise self.error(status)
        self.index += count
        self.next_position = position
        return frame

    def error(self, int status, index=None):
        """The ReadError for a status at our place, or at order entry `index`."""
        cdef OrderEntry entry
        index = self.index if index is None else index
        if status == READ_GONE and self.peek(index, &entry) == READ_GONE:
            gone = entry.position, entry.position + entry.message_count
            return ReadError(status, index, f"messages {gone[0]} to {gone[1] - 1} were lost: at recovery no replica had "
                                            f"them; go on at position {gone[1]}", *gone)
        if status == READ_NOTHING:
            return BrokerUnavailable("a new head is taking over: try again", address="head")
        first = self.memory.load(self.layout.topic_reclaim(self.topic) + 8)
        text = {READ_LOST: f"this data was reclaimed; the first position kept is {first}",
                READ_CLOSED: "the topic was deleted", READ_GONE: "these messages were lost and then reclaimed",
                READ_DAMAGED: f"order entry {index} of topic {self.topic} is damaged; "
                              "run 'cxlmq region inspect' for what is intact"}[status]
        return ReadError(status, index, text)
