"""Computes where each record lies, and derives dtypes, the layout hash and the printed map from layout.pxd."""

import hashlib
import re

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from sim.cxl.memory cimport LINE_BYTES, ROLE_COUNT, AccessStatistics
from sim.cxl.primitives cimport cxl_mutex_bytes

LAYOUT_MAGIC = 0x514D4C5843  # "CXLMQ"
LAYOUT_VERSION = 3
BANKS_MAX = 3                   # one serves, one is being filled, one may belong to a head that stopped and may wake up
POOL_STRATEGIES = ("atomic", "partitioned", "leader")
SEGMENT_ALIGNMENT = 2 << 20
LOST_BROKER_NUMBER = LOST_BROKER
TOPIC_COUNT_LIMIT = TOPICS_MAX
DIRECTORY_CHANGES = TOPIC_CHANGES


class LayoutError(ValueError):
    """The wanted numbers make no region that works; the message says which would."""


_FIELD = re.compile(r"\^?(?:\((\d+)\))?([A-Za-z]):(\w+):")
_FIELD_BYTES = {"B": 1, "c": 1, "s": 1, "H": 2, "I": 4, "Q": 8}


def _fields(view) -> list:
    """(name, type letter, count, offset) of each field, read from the buffer format that the compiler gave a struct."""
    fields, offset = [], 0
    for count, letter, name in _FIELD.findall(memoryview(view).format):
        fields.append((name, letter, int(count or 1), offset))
        offset += int(count or 1) * _FIELD_BYTES[letter]
    assert offset == memoryview(view).itemsize
    return fields


def _records() -> dict:
    cdef Superblock a
    cdef ControlLine b
    cdef DirectoryLine c
    cdef BrokerLine d
    cdef BrokerAddress e
    cdef PoolWishLine f
    cdef PoolGrantLine h
    cdef TopicLine i
    cdef TopicName j
    cdef TopicOrderLine k
    cdef TopicReclaimLine l
    cdef OffsetBrokerLine m
    cdef OffsetSequencerLine n
    cdef ReplicaLine o
    cdef BatchHeader p
    cdef BatchResult q
    cdef OrderEntry r
    cdef SessionLine s
    cdef SessionProgressLine t
    cdef CursorLine u
    cdef CursorGrantLine v
    cdef SegmentLine w
    cdef DoorbellLine x
    cdef CursorName ee
    cdef ReclaimAnswerLine ff
    cdef AttachLine gg
    cdef Lease hh
    cdef AttachClientLine ii
    cdef Descriptor jj
    cdef BrokerCounters y
    cdef SequencerCounters z
    cdef AccessStatistics aa
    cdef ActivityLine bb
    cdef PoolRing cc
    cdef LockLine dd
    cdef GroupLine mm
    cdef GroupName nn
    cdef GroupHolder oo
    cdef BankLine kk
    cdef HeadLine ll
    cdef SessionWindowLine pp
    views = {
        "Superblock": <Superblock[:1]>&a, "ControlLine": <ControlLine[:1]>&b, "DirectoryLine": <DirectoryLine[:1]>&c,
        "ActivityLine": <ActivityLine[:1]>&bb, "BrokerLine": <BrokerLine[:1]>&d, "BrokerAddress": <BrokerAddress[:1]>&e,
        "PoolWishLine": <PoolWishLine[:1]>&f, "PoolGrantLine": <PoolGrantLine[:1]>&h, "PoolRing": <PoolRing[:1]>&cc,
        "TopicLine": <TopicLine[:1]>&i, "TopicName": <TopicName[:1]>&j, "TopicOrderLine": <TopicOrderLine[:1]>&k,
        "TopicReclaimLine": <TopicReclaimLine[:1]>&l, "OffsetBrokerLine": <OffsetBrokerLine[:1]>&m,
        "OffsetSequencerLine": <OffsetSequencerLine[:1]>&n, "ReplicaLine": <ReplicaLine[:1]>&o,
        "BatchHeader": <BatchHeader[:1]>&p, "BatchResult": <BatchResult[:1]>&q, "OrderEntry": <OrderEntry[:1]>&r,
        "SessionLine": <SessionLine[:1]>&s, "SessionProgressLine": <SessionProgressLine[:1]>&t,
        "CursorName": <CursorName[:1]>&ee, "ReclaimAnswerLine": <ReclaimAnswerLine[:1]>&ff,
        "AttachLine": <AttachLine[:1]>&gg, "Lease": <Lease[:1]>&hh, "AttachClientLine": <AttachClientLine[:1]>&ii,
        "Descriptor": <Descriptor[:1]>&jj,
        "CursorLine": <CursorLine[:1]>&u, "CursorGrantLine": <CursorGrantLine[:1]>&v,
        "SegmentLine": <SegmentLine[:1]>&w, "DoorbellLine": <DoorbellLine[:1]>&x, "LockLine": <LockLine[:1]>&dd,
        "BrokerCounters": <BrokerCounters[:1]>&y, "SequencerCounters": <SequencerCounters[:1]>&z,
        "AccessStatistics": <AccessStatistics[:1]>&aa, "BankLine": <BankLine[:1]>&kk, "HeadLine": <HeadLine[:1]>&ll,
        "SessionWindowLine": <SessionWindowLine[:1]>&pp,
        "GroupLine": <GroupLine[:1]>&mm, "GroupName": <GroupName[:1]>&nn, "GroupHolder": <GroupHolder[:1]>&oo,
    }
    return {name: _fields(view) for name, view in views.items()}


RECORDS = _records()


def record_dtypes() -> dict:
    """Map of record name to numpy dtype (fields, offsets and sizes as compiled)."""
    import numpy

    kinds = {"B": "u1", "c": "S", "s": "S", "H": "<u2", "I": "<u4", "Q": "<u8"}
    return {record: numpy.dtype([
        (name, f"S{count}") if letter in "cs" else (name, kinds[letter]) if count == 1 else (name, kinds[letter], count)
        for name, letter, count, _ in fields]) for record, fields in RECORDS.items()}


cdef uint64_t _round_up(uint64_t value, uint64_t to) noexcept nogil:
    return (value + to - 1) // to * to


cdef class Layout:
    """Where everything lies, computed from a few numbers.

    Offsets are bytes from the start of the region. `compute` raises `LayoutError` when the region is too small and
    names the smallest that works.
    """

    @staticmethod
    def compute(*, broker_count, region_bytes, topic_count_max, ring_slot_count, order_entry_count, session_count_max,
                cursor_count_max, attach_slot_count, segment_bytes, message_bytes_max, batch_bytes_max,
                pool_strategy="atomic", group_count_max=16):
        """Lay out a region of `region_bytes`; every number is checked before anything is computed."""
        def require(condition, message):
            if not condition:
                raise LayoutError(message)

        require(1 <= broker_count <= 64, f"broker_count must be 1 to 64, not {broker_count}")
        require(1 <= topic_count_max <= TOPICS_MAX, f"topic_count_max must be 1 to {TOPICS_MAX}, not {topic_count_max}")
        for name, value in (("ring_slot_count", ring_slot_count), ("order_entry_count", order_entry_count)):
            require(16 <= value <= 32768 and value & (value - 1) == 0,
                    f"{name} must be a power of two from 16 to 32768, not {value}")
        require(session_count_max >= broker_count, f"session_count_max must be at least one a broker ({broker_count})")
        require(cursor_count_max >= broker_count, f"cursor_count_max must be at least one a broker ({broker_count})")
        require(1 <= group_count_max <= 65536, f"group_count_max must be 1 to 65536, not {group_count_max}")
        require(segment_bytes >= 4096 and segment_bytes & (segment_bytes - 1) == 0,
                f"segment_bytes must be a power of two of at least 4096, not {segment_bytes}")
        require(pool_strategy in POOL_STRATEGIES, f"pool strategy must be one of {', '.join(POOL_STRATEGIES)}")
        require(batch_bytes_max >= 4096, f"batch_bytes_max must be at least 4096, not {batch_bytes_max}")

        cdef Layout self = Layout()
        cdef Geometry* g = &self.g
        g.broker_count = broker_count
        g.topic_count_max = topic_count_max
        g.ring_slot_count = ring_slot_count
        g.order_entry_count = order_entry_count
        g.sessions_per_broker = session_count_max // broker_count
        g.session_count_max = g.sessions_per_broker * g.broker_count
        g.cursors_per_broker = cursor_count_max // broker_count
        g.cursor_count_max = g.cursors_per_broker * g.broker_count
        g.group_count_max = group_count_max
        g.attach_per_broker = attach_slot_count // broker_count
        g.attach_slot_count = g.attach_per_broker * g.broker_count
        g.segment_bytes = segment_bytes
        g.region_bytes = region_bytes
        g.message_bytes_max = message_bytes_max
        g.batch_bytes_max = max(batch_bytes_max, message_bytes_max + 64)
        g.pool_strategy = POOL_STRATEGIES.index(pool_strategy)
        # Room for the largest batch, and for one open segment a broker beside it.
        longest_run = int(g.batch_bytes_max + segment_bytes - 1) // segment_bytes
        require(pool_strategy != "leader" or longest_run <= POOL_RING,
                f"with the leader's pool a batch may take {POOL_RING} segments: make segment_bytes at least "
                f"{1 << ((int(g.batch_bytes_max) - 1) // POOL_RING).bit_length()}, not {segment_bytes}")
        smallest_count = longest_run + 2 * broker_count
        if pool_strategy == "partitioned":      # every part must have that room
            smallest_count = (longest_run + 2) * broker_count
        self._place(max(smallest_count, region_bytes // segment_bytes))
        fixed = g.segments
        g.segment_count = (region_bytes - fixed) // segment_bytes if region_bytes > fixed else 0
        if pool_strategy == "partitioned":      # equal parts: with a few left over, the last broker would have least
            g.segment_count -= g.segment_count % g.broker_count
        if g.segment_count < smallest_count:
            smallest = _round_up(fixed + smallest_count * segment_bytes, 1 << 20)
            raise LayoutError(
                f"a region of {region_bytes} bytes is too small: with {broker_count} brokers, {topic_count_max} topics "
                f"and messages of up to {message_bytes_max} bytes it needs at least {smallest} bytes "
                f"({smallest >> 20} MiB)")
        g.region_bytes = g.segments + g.segment_count * segment_bytes
        return self

    def _place(self, uint64_t segment_count):
        cdef Geometry* g = &self.g
        cdef uint64_t at = sizeof(Superblock)
        cdef uint64_t activity = _round_up(g.topic_count_max, 64)
        self.sections = [("superblock", 0, at)]

        def section(name, nbytes):
            nonlocal at
            start = at
            at = _round_up(at + nbytes, LINE_BYTES)
            self.sections.append((name, start, at - start))
            return start

        # The lines of a broker are its own; what the head answers it lies in the bank.
        g.broker_stride = (2 * LINE_BYTES + sizeof(BrokerAddress) + sizeof(PoolRing) + activity)
        g.brokers = section("brokers", g.broker_count * g.broker_stride)
        g.offset_stride = (1 + g.broker_count) * LINE_BYTES
        g.offsets = section("offsets", g.topic_count_max * g.broker_count * g.offset_stride)
        slots = g.topic_count_max * g.broker_count * g.ring_slot_count
        g.rings = section("batch-header rings", slots * sizeof(BatchHeader))
        g.sessions = section("sessions", g.session_count_max * LINE_BYTES)
        g.cursors = section("cursors", g.cursor_count_max * 2 * LINE_BYTES)
        # A page that the broker writes, one with the client's line and doorbell, one with its descriptors.
        g.attach_stride = 3 * ATTACH_PAGE
        at = _round_up(at, ATTACH_PAGE)
        g.attach = section("attached-client slots", g.attach_slot_count * g.attach_stride)
        g.segment_table = section("segment table", segment_count * LINE_BYTES)
        bitmap = _round_up(self._bitmap_words(segment_count) * 8, LINE_BYTES)
        g.segment_count = segment_count
        g.bank_count = max(2, min(BANKS_MAX, g.broker_count))
        g.coherent = section("coherent area", (1 + 2 * g.bank_count + 2 * g.broker_count) * LINE_BYTES + 2 * bitmap
                             + segment_count * 8)
        counters = sizeof(BrokerCounters) + ROLE_COUNT * LINE_BYTES
        g.statistics = section("statistics", g.broker_count * counters + sizeof(SequencerCounters))
        at = _round_up(at, ATTACH_PAGE)
        g.bank = 0
        first = at

        g.head = section("head", LINE_BYTES)
        section("directory", LINE_BYTES + activity)
        g.topic_stride = 3 * LINE_BYTES + sizeof(TopicName) + g.broker_count * LINE_BYTES
        g.topics = section("topics", g.topic_count_max * g.topic_stride)
        g.answers = section("answers", g.broker_count * (2 * LINE_BYTES + sizeof(PoolRing)))
        g.progress = section("progress of sessions", g.session_count_max * LINE_BYTES)
        g.windows = section("windows of sessions", g.session_count_max * LINE_BYTES)
        g.grants = section("grants", g.cursor_count_max * LINE_BYTES)
        g.groups = section("groups", g.group_count_max * 3 * LINE_BYTES)
        if self.pool_strategy == "leader":
            g.grantees = section("grantees", _round_up(segment_count * 8, LINE_BYTES))
        g.results = section("results", slots * sizeof(BatchResult))
        g.order = section("order indexes", g.topic_count_max * g.order_entry_count * sizeof(OrderEntry))
        at = _round_up(at, ATTACH_PAGE)
        g.bank_stride = at - first
        section("further banks", (g.bank_count - 1) * g.bank_stride)
        g.segments = _round_up(at, min(SEGMENT_ALIGNMENT, g.segment_bytes))
        self.sections.append(("segments", g.segments, 0))
        self._bitmap_bytes = bitmap

    def _bitmap_words(self, segment_count):
        # A partitioned bitmap gives each broker whole lines of its own: 8 words each.
        share = -(-segment_count // self.g.broker_count)
        return self.g.broker_count * _round_up(-(-share // 64), 8)

    @property
    def numbers(self) -> dict:
        """Every number of the geometry by name."""
        return dict(self.g)

    @property
    def pool_strategy(self) -> str:
        """Name of the segment pool's strategy."""
        return POOL_STRATEGIES[self.g.pool_strategy]

    def coherent_area(self) -> tuple[list, list]:
        """(offset, bytes) of what the hardware must keep coherent, and of instruments that no hardware needs to have.

        Atomics work there and nowhere else. Doorbells, locks of one process and counters are instruments.
        """
        g = self.g
        # Behind the bitmaps lie the owners' words: who allocates takes a segment there first.
        bitmaps = [(self.bitmap(), 2 * self._bitmap_bytes + g.segment_count * 8)]
        control = (g.coherent, (1 + g.bank_count) * LINE_BYTES)
        needed = [control, *bitmaps] if self.pool_strategy == "atomic" else [control]
        instruments = [(control[0] + control[1], self.bitmap() - control[0] - control[1]),
                       *((start, nbytes) for name, start, nbytes in self.sections if name == "statistics")]
        instruments += [(self.attach_doorbell(a), LINE_BYTES) for a in range(g.attach_slot_count)]
        return needed, instruments

    def hash(self) -> int:
        """64 bits that change when any record, section or number changes."""
        parts = [LAYOUT_VERSION, sorted(self.numbers.items()), sorted(RECORDS.items())]
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1

    cdef void use_bank(self, uint64_t bank) noexcept nogil:
        """Let the places of what a head writes lie in that bank."""
        cdef uint64_t shift = (bank - self.g.bank) * self.g.bank_stride
        self.g.bank = bank
        self.g.head += shift
        self.g.topics += shift
        self.g.answers += shift
        self.g.progress += shift
        self.g.windows += shift
        self.g.grants += shift
        self.g.groups += shift
        if self.g.grantees:
            self.g.grantees += shift
        self.g.results += shift
        self.g.order += shift

    def with_bank(self, bank: int) -> Layout:
        """The same layout, with what a head writes in that bank."""
        cdef Layout other = Layout()
        if not 0 <= bank < self.g.bank_count:
            raise LayoutError(f"bank {bank} of {self.g.bank_count}")
        other.g = self.g
        other.sections = self.sections
        other._bitmap_bytes = self._bitmap_bytes
        other.use_bank(bank)
        return other

    cdef uint64_t head_line(self) noexcept nogil: return self.g.head
    cdef uint64_t directory(self) noexcept nogil: return self.g.head + 64
    cdef uint64_t sequencer_activity(self) noexcept nogil: return self.g.head + 128
    cdef uint64_t broker(self, uint64_t b) noexcept nogil: return self.g.brokers + b * self.g.broker_stride
    cdef uint64_t pool_wish(self, uint64_t b) noexcept nogil: return self.broker(b) + 64
    cdef uint64_t broker_address(self, uint64_t b) noexcept nogil: return self.broker(b) + 128
    cdef uint64_t pool_returns(self, uint64_t b) noexcept nogil: return self.broker_address(b) + sizeof(BrokerAddress)

    cdef uint64_t pool_grant(self, uint64_t b) noexcept nogil:
        return self.g.answers + b * (128 + sizeof(PoolRing))

    cdef uint64_t reclaim_answer(self, uint64_t b) noexcept nogil: return self.pool_grant(b) + 64
    cdef uint64_t pool_grants(self, uint64_t b) noexcept nogil: return self.pool_grant(b) + 128
    cdef uint64_t broker_activity(self, uint64_t b) noexcept nogil: return self.pool_returns(b) + sizeof(PoolRing)
    cdef uint64_t topic(self, uint64_t t) noexcept nogil: return self.g.topics + t * self.g.topic_stride
    cdef uint64_t topic_order(self, uint64_t t) noexcept nogil: return self.topic(t) + 64 + sizeof(TopicName)
    cdef uint64_t topic_reclaim(self, uint64_t t) noexcept nogil: return self.topic(t) + 128 + sizeof(TopicName)

    cdef uint64_t offset_sequencer(self, uint64_t t, uint64_t b) noexcept nogil:
        return self.topic(t) + 192 + sizeof(TopicName) + b * 64

    cdef uint64_t offset_broker(self, uint64_t t, uint64_t b) noexcept nogil:
        return self.g.offsets + (t * self.g.broker_count + b) * self.g.offset_stride

    cdef uint64_t replica(self, uint64_t t, uint64_t b, uint64_t r) noexcept nogil:
        return self.offset_broker(t, b) + 64 + r * 64

    cdef uint64_t ring(self, uint64_t t, uint64_t b, uint64_t slot) noexcept nogil:
        return self.g.rings + ((t * self.g.broker_count + b) * self.g.ring_slot_count
                               + (slot & (self.g.ring_slot_count - 1))) * sizeof(BatchHeader)

    cdef uint64_t result(self, uint64_t t, uint64_t b, uint64_t slot) noexcept nogil:
        return self.g.results + ((t * self.g.broker_count + b) * self.g.ring_slot_count
                                 + (slot & (self.g.ring_slot_count - 1))) * sizeof(BatchResult)

    cdef uint64_t order_entry(self, uint64_t t, uint64_t index) noexcept nogil:
        return self.g.order + (t * self.g.order_entry_count
                               + (index & (self.g.order_entry_count - 1))) * sizeof(OrderEntry)

    cdef uint64_t session(self, uint64_t s) noexcept nogil: return self.g.sessions + s * 64
    cdef uint64_t session_progress(self, uint64_t s) noexcept nogil: return self.g.progress + s * 64
    cdef uint64_t session_window(self, uint64_t s) noexcept nogil: return self.g.windows + s * 64
    cdef uint64_t cursor(self, uint64_t c) noexcept nogil: return self.g.cursors + c * 128
    cdef uint64_t cursor_name(self, uint64_t c) noexcept nogil: return self.g.cursors + c * 128 + 64
    cdef uint64_t cursor_grant(self, uint64_t c) noexcept nogil: return self.g.grants + c * 64
    cdef uint64_t group(self, uint64_t number) noexcept nogil: return self.g.groups + number * 192
    cdef uint64_t attach_line(self, uint64_t a) noexcept nogil: return self.g.attach + a * self.g.attach_stride

    cdef uint64_t attach_lease(self, uint64_t a, uint64_t number) noexcept nogil:
        return self.attach_line(a) + 64 + (number % LEASE_RING) * sizeof(Lease)

    cdef uint64_t attach_completion(self, uint64_t a, uint64_t number) noexcept nogil:
        return self.attach_line(a) + 1024 + (number % ATTACH_RING) * sizeof(BatchResult)

    cdef uint64_t attach_client(self, uint64_t a) noexcept nogil: return self.attach_line(a) + ATTACH_PAGE
    cdef uint64_t attach_statistics(self, uint64_t a) noexcept nogil: return self.attach_client(a) + 128
    cdef uint64_t attach_doorbell(self, uint64_t a) noexcept nogil: return self.attach_line(a) + ATTACH_PAGE + 64

    cdef uint64_t attach_descriptor(self, uint64_t a, uint64_t number) noexcept nogil:
        return self.attach_line(a) + 2 * ATTACH_PAGE + (number % ATTACH_RING) * sizeof(Descriptor)

    cdef uint64_t segment_line(self, uint64_t s) noexcept nogil: return self.g.segment_table + s * 64
    cdef uint64_t segment(self, uint64_t s) noexcept nogil: return self.g.segments + s * self.g.segment_bytes
    cdef uint64_t control(self) noexcept nogil: return self.g.coherent
    cdef uint64_t bank_owner(self, uint64_t bank) noexcept nogil: return self.g.coherent + (1 + bank) * 64

    cdef uint64_t order_lock(self) noexcept nogil:
        return self.g.coherent + (1 + self.g.bank_count + self.g.bank) * 64

    cdef uint64_t doorbell(self, uint64_t b, uint64_t which) noexcept nogil:
        return self.g.coherent + (1 + 2 * self.g.bank_count + 2 * b + which) * 64

    cdef uint64_t bitmap(self) noexcept nogil:
        return self.g.coherent + (1 + 2 * self.g.bank_count + 2 * self.g.broker_count) * 64

    cdef uint64_t warm_bitmap(self) noexcept nogil: return self.bitmap() + self._bitmap_bytes
    cdef uint64_t segment_owner(self, uint64_t s) noexcept nogil:
        return self.warm_bitmap() + self._bitmap_bytes + s * 8

    cdef uint64_t grantee(self, uint64_t s) noexcept nogil: return self.g.grantees + s * 8

    cdef uint64_t bitmap_words(self) noexcept nogil: return self._bitmap_bytes // 8

    cdef uint64_t broker_counters(self, uint64_t b) noexcept nogil:
        return self.g.statistics + b * (sizeof(BrokerCounters) + ROLE_COUNT * 64)

    cdef uint64_t role_statistics(self, uint64_t b, uint64_t role) noexcept nogil:
        return self.broker_counters(b) + sizeof(BrokerCounters) + role * 64

    cdef uint64_t sequencer_counters(self) noexcept nogil: return self.broker_counters(self.g.broker_count)

    def offset_of(self, record: str, *index: int) -> int:
        """Region offset of a record, for tools and tests: `offset_of("ring", topic, broker, slot)`."""
        if not self._places:
            self._places = self._make_places()
        return self._places[record](*index)

    def _make_places(self) -> dict:
        return {
            "superblock": lambda: 0, "control": lambda: self.control(), "directory": self._directory,
            "head": lambda: self.g.head, "bank_owner": lambda bank: self.bank_owner(bank),
            "broker": lambda b: self.broker(b), "broker_address": lambda b: self.broker_address(b),
            "broker_activity": lambda b: self.broker_activity(b), "pool_wish": lambda b: self.pool_wish(b),
            "pool_grant": lambda b: self.pool_grant(b), "pool_grants": lambda b: self.pool_grants(b),
            "pool_returns": lambda b: self.pool_returns(b), "topic": lambda t: self.topic(t),
            "topic_name": lambda t: self.topic(t) + 64, "topic_order": lambda t: self.topic_order(t),
            "topic_reclaim": lambda t: self.topic_reclaim(t), "offset_broker": lambda t, b: self.offset_broker(t, b),
            "offset_sequencer": lambda t, b: self.offset_sequencer(t, b),
            "replica": lambda t, b, r: self.replica(t, b, r), "ring": lambda t, b, s: self.ring(t, b, s),
            "result": lambda t, b, s: self.result(t, b, s), "order_entry": lambda t, i: self.order_entry(t, i),
            "session": lambda s: self.session(s), "session_progress": lambda s: self.session_progress(s),
            "session_window": lambda s: self.session_window(s),
            "cursor": lambda c: self.cursor(c), "cursor_grant": lambda c: self.cursor_grant(c),
            "cursor_name": lambda c: self.cursor_name(c), "reclaim_answer": lambda b: self.reclaim_answer(b),
            "group": lambda n: self.group(n), "group_name": lambda n: self.group(n) + 64,
            "group_holder": lambda n: self.group(n) + 128,
            "attach_line": lambda a: self.attach_line(a), "attach_client": lambda a: self.attach_client(a),
            "attach_lease": lambda a, n: self.attach_lease(a, n), "attach_doorbell": lambda a: self.attach_doorbell(a),
            "attach_statistics": lambda a: self.attach_statistics(a),
            "attach_completion": lambda a, n: self.attach_completion(a, n),
            "attach_descriptor": lambda a, n: self.attach_descriptor(a, n),
            "segment_line": lambda s: self.segment_line(s), "segment": lambda s: self.segment(s),
            "bitmap": lambda: self.bitmap(), "segment_owner": lambda s: self.segment_owner(s), "grantee": lambda s: self.grantee(s), "warm_bitmap": lambda: self.warm_bitmap(),
            "doorbell": lambda b, w: self.doorbell(b, w), "order_lock": lambda: self.order_lock(),
            "role_statistics": lambda b, r: self.role_statistics(b, r),
            "broker_counters": lambda b: self.broker_counters(b),
            "sequencer_counters": lambda: self.sequencer_counters(),
        }

    def _directory(self):
        return self.directory()


def _assert_sizes() -> None:
    for size, lines in ((sizeof(Superblock), 8), (sizeof(ControlLine), 1), (sizeof(DirectoryLine), 1),
                        (sizeof(BankLine), 1), (sizeof(HeadLine), 1),
                        (sizeof(ActivityLine), 1), (sizeof(BrokerLine), 1), (sizeof(BrokerAddress), 4),
                        (sizeof(PoolWishLine), 1), (sizeof(PoolGrantLine), 1), (sizeof(PoolRing), 8),
                        (sizeof(TopicLine), 1), (sizeof(TopicName), 2), (sizeof(TopicOrderLine), 1),
                        (sizeof(TopicReclaimLine), 1), (sizeof(OffsetBrokerLine), 1), (sizeof(OffsetSequencerLine), 1),
                        (sizeof(ReplicaLine), 1), (sizeof(BatchHeader), 1), (sizeof(OrderEntry), 1),
                        (sizeof(SessionLine), 1), (sizeof(SessionProgressLine), 1), (sizeof(SessionWindowLine), 1), (sizeof(CursorLine), 1),
                        (sizeof(CursorGrantLine), 1), (sizeof(CursorName), 1),
                        (sizeof(ReclaimAnswerLine), 1), (sizeof(AttachLine), 1),
                        (sizeof(AttachClientLine), 1), (sizeof(Descriptor), 1), (sizeof(SegmentLine), 1), (sizeof(DoorbellLine), 1),
                        (sizeof(LockLine), 1), (sizeof(BrokerCounters), 3), (sizeof(SequencerCounters), 3),
                        (sizeof(AccessStatistics), 1), (sizeof(GroupLine), 1), (sizeof(GroupName), 1),
                        (sizeof(GroupHolder), 1)):
        assert size == lines * LINE_BYTES, f"a record of {lines} lines has {size} bytes"
    assert sizeof(BatchResult) == 16 and sizeof(Lease) == 16
    assert 64 + LEASE_RING * sizeof(Lease) <= 1024 and 1024 + ATTACH_RING * sizeof(BatchResult) <= ATTACH_PAGE
    assert cxl_mutex_bytes() <= LINE_BYTES


_assert_sizes()
