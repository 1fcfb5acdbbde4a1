"""The witness: looks at memory itself after every step, past all caches, and knows what may be there.

What it sees is what survives a crash of every host. So what it checks must hold at every moment: a committed frontier
covers entries and payloads that are in memory, byte for byte; frontiers only grow; nothing is there twice.

Messages of a simulation say who sent them: client, number, and bytes that follow from the two.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from broker.layout cimport (
    CONTROL_BANK_SHIFT, CONTROL_SERVING, CURSOR_FREE, CURSOR_WANTED, CursorLine, LOST_BROKER, Layout, OrderEntry,
    TOPIC_ACTIVE, TopicLine, make_tag,
)
from broker.log cimport BrokerLog, TopicLog
from sim.cxl.memory cimport Memory

cdef uint64_t MIX = 0x9E3779B97F4A7C15ULL

cdef enum:
    BACK_COMMITTED = 0
    BACK_RECLAIMED = 1
    BACK_DELEGATED = 2
    BACK_SCANNED = 3
    BACK_EXPECTED = 4

cdef enum:
    NOWHERE = -1
    LOST = -2                       # a recovery has named it: it need not come any more

_FRONTIERS = ("committed", "reclaimed", "delegated", "scanned", "expected")
_INVARIANTS = {
    BREACH_ENTRY_MISSING: "T", BREACH_POSITION: "T", BREACH_PAYLOAD: "N", BREACH_TWICE: "U", BREACH_GAP: "P",
    BREACH_BACK: "M", BREACH_BOUNDS: "order of frontiers", BREACH_EPOCH: "Z", BREACH_CHANGED: "A1",
    BREACH_CURSOR: "C", BREACH_RING: "B", BREACH_HEADER_MISSING: "T",
}


# ---- messages that say who sent them -------------------------------------------------------------------------------


cdef inline uint64_t mixed(uint64_t client, uint64_t number) noexcept nogil:
    cdef uint64_t value = (client << 32 ^ number) + MIX
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9ULL
    value = (value ^ value >> 27) * 0x94D049BB133111EBULL
    return value ^ value >> 31


cdef inline uint32_t body_bytes(uint64_t client, uint64_t number) noexcept nogil:
    cdef uint64_t value = mixed(client, number)
    if value % 64 == 0:
        return 1000 + <uint32_t>(value >> 32) % 3000
    return 16 + <uint32_t>(value >> 32) % 200


cdef inline void write_body(uint8_t* at, uint64_t client, uint64_t number, uint32_t nbytes) noexcept nogil:
    cdef uint64_t value = mixed(client, number)
    cdef uint32_t i
    memcpy(at, &client, 8)
    memcpy(at + 8, &number, 8)
    for i in range(16, nbytes):
        at[i] = <uint8_t>(value >> (i % 8 * 8)) + <uint8_t>i


cdef inline bint body_matches(const uint8_t* at, uint64_t client, uint64_t number, uint32_t nbytes) noexcept nogil:
    cdef uint64_t value = mixed(client, number)
    cdef uint32_t i
    for i in range(16, nbytes):
        if at[i] != <uint8_t>(<uint8_t>(value >> (i % 8 * 8)) + <uint8_t>i):
            return False
    return True


cdef bint sender_of(const uint8_t* at, uint64_t nbytes, uint64_t count, uint64_t* client, uint64_t* first) noexcept nogil:
    """Whether a payload holds `count` messages one behind the other of one client; who, and from which number on."""
    cdef uint64_t place = 0, i, who, number
    cdef uint32_t size, check
    for i in range(count):
        if place + 24 > nbytes:
            return False
        memcpy(&size, at + place, 4)
        memcpy(&check, at + place + 4, 4)
        memcpy(&who, at + place + 8, 8)
        memcpy(&number, at + place + 16, 8)
        if i == 0:
            client[0] = who
            first[0] = number
        if (who != client[0] or number != first[0] + i or size != body_bytes(who, number)
                or check != ((<uint32_t>(size * <uint32_t>2654435761)) ^ <uint32_t>0x5C4D514C)
                or place + 8 + size > nbytes or not body_matches(at + place + 8, who, number, size)):
            return False
        place += 8 + (size + 7) // 8 * 8
    return place == nbytes


def build_payload(uint64_t client, uint64_t first, uint64_t count) -> bytes:
    """The framed payload of `count` messages of a client, numbered from `first` on."""
    cdef uint64_t total = 0, i, place = 0
    cdef uint32_t size, check
    cdef uint8_t* at
    for i in range(count):
        total += 8 + (body_bytes(client, first + i) + 7) // 8 * 8
    payload = PyBytes_FromStringAndSize(NULL, total)
    at = <uint8_t*>PyBytes_AS_STRING(payload)
    memset(at, 0, total)
    for i in range(count):
        size = body_bytes(client, first + i)
        check = (<uint32_t>(size * <uint32_t>2654435761)) ^ <uint32_t>0x5C4D514C
        memcpy(at + place, &size, 4)
        memcpy(at + place + 4, &check, 4)
        write_body(at + place + 8, client, first + i, size)
        place += 8 + (size + 7) // 8 * 8
    return payload


def payload_sender(bytes payload, uint64_t count) -> "tuple[int, int] | None":
    """(client, first number) of a payload that some client of a simulation sent; None when nobody did."""
    cdef uint64_t client = 0, first = 0
    if not sender_of(<const uint8_t*>PyBytes_AS_STRING(payload), len(payload), count, &client, &first):
        return None
    return client, first


# ---- the witness ---------------------------------------------------------------------------------------------------


cdef class Witness:
    """Checks one region. `truth` is a door past all caches; clients are numbered below `clients`, their messages below
    `numbers`. `check_now` and the schedule's checks return a `Breach`; `describe` says what it was."""

    def __cinit__(self):
        self.topics = NULL

    def __init__(self, Memory truth, Layout layout, uint64_t clients, uint64_t numbers):
        cdef uint64_t topics = layout.g.topic_count_max, brokers = layout.g.broker_count, i
        self.truth = truth
        self.layout = layout.with_bank(0)       # our own copy: it points into the bank of the head that serves
        self.topic_count = topics
        self.client_count = clients
        self.number_count = numbers
        self.logs = [None] * brokers
        self.log_pointers = <void**>calloc(brokers, sizeof(void*))
        self.topics = <TopicTruth*>calloc(topics, sizeof(TopicTruth))
        self.delegated = <uint64_t*>calloc(3 * topics * brokers, 8)
        self.scanned = self.delegated + topics * brokers
        self.by_broker = self.scanned + topics * brokers
        self.sessions = <uint64_t*>calloc(2 * layout.g.session_count_max, 8)
        self.cursors = <uint64_t*>calloc(2 * layout.g.cursor_count_max, 8)
        self.where = <int32_t**>calloc(clients, sizeof(void*))
        self.next_number = <uint64_t*>calloc(clients, 8)
        if (self.topics == NULL or self.delegated == NULL or self.where == NULL or self.next_number == NULL
                or self.sessions == NULL or self.cursors == NULL or self.log_pointers == NULL):
            raise MemoryError
        for i in range(clients):
            self.where[i] = <int32_t*>calloc(numbers, 4)
            if self.where[i] == NULL:
                raise MemoryError
            memset(self.where[i], 0xFF, numbers * 4)

    def __dealloc__(self):
        cdef uint64_t i
        if self.topics != NULL:
            for i in range(self.topic_count):
                free(self.topics[i].seen)
        if self.where != NULL:
            for i in range(self.client_count):
                free(self.where[i])
        free(self.topics)
        free(self.delegated)
        free(self.sessions)
        free(self.cursors)
        free(self.where)
        free(self.next_number)
        free(self.log_pointers)

    def follow(self, int host, log) -> None:
        """Look at the private frontiers of a host's log as well; None when the host has no power."""
        self.logs[host] = log
        self.log_pointers[host] = NULL
        if log is not None:
            assert isinstance(log, BrokerLog)
            self.log_pointers[host] = <void*>log

    def recovered(self, uint64_t topic, uint64_t position, uint64_t entries, dict numbers, lost, uint64_t hash) -> None:
        """A recovery filled the region, and nobody runs yet: `entries` from `position` on. `numbers` says what is due of
        each client, and `lost` the (client, number) that need not come any more. `hash` is of what was before."""
        cdef TopicTruth* known = &self.topics[topic]
        self.hash = hash
        self.reset(topic, self.truth.load(self.layout.topic(topic)) >> 8)
        known.position, known.restored = position, entries
        for client, number in numbers.items():
            self.next_number[client] = number
        for client, number in lost:
            self.where[client][number] = LOST

    def give_up(self, uint64_t client, uint64_t number) -> None:
        """A client was told that this message is lost."""
        if self.where[client][number] == NOWHERE:
            self.where[client][number] = LOST

    # ---- what must hold at every moment ----------------------------------------------------------------------------

    cdef int fail(self, int breach, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e) noexcept nogil:
        if self.breach == BREACH_NONE:
            self.breach = breach
            self.details[0] = a
            self.details[1] = b
            self.details[2] = c
            self.details[3] = d
            self.details[4] = e
        return breach

    cdef int grows(self, uint64_t* highest, uint64_t value, uint64_t what, uint64_t topic,
                   uint64_t broker) noexcept nogil:
        if value < highest[0]:
            return self.fail(BREACH_BACK, what, topic, broker, highest[0], value)
        highest[0] = value
        return BREACH_NONE

    cdef bint served(self) noexcept nogil:
        """Whether a head serves; then we look at what lies in its bank."""
        cdef uint64_t control = self.truth.load(self.layout.control())
        if control != self.control:
            self.control = control
            if control & CONTROL_SERVING:
                self.layout.use_bank(control >> CONTROL_BANK_SHIFT & 0xFF)
                # A new head looks at the rings anew.
                memset(self.scanned, 0, self.topic_count * self.layout.g.broker_count * 8)
        return (control & CONTROL_SERVING) != 0

    cdef int check(self) noexcept nogil:
        cdef uint64_t topic
        if self.blind or not self.served():
            return BREACH_NONE
        for topic in range(self.topic_count):
            if self.check_topic(topic):
                return self.breach
        return self.check_tables()

    cdef int reset(self, uint64_t topic, uint64_t generation) noexcept nogil:
        cdef TopicTruth* known = &self.topics[topic]
        cdef uint64_t brokers = self.layout.g.broker_count
        cdef TopicLine line
        self.truth.read_line(self.layout.topic(topic), &line)
        known.generation = generation
        known.order = line.order
        known.committed = known.position = known.reclaimed = known.epoch = known.restored = 0
        memset(&self.delegated[topic * brokers], 0, brokers * 8)
        memset(&self.scanned[topic * brokers], 0, brokers * 8)
        memset(&self.by_broker[topic * brokers], 0, brokers * 8)
        return BREACH_NONE

    cdef int check_topic(self, uint64_t topic) noexcept nogil:
        cdef TopicTruth* known = &self.topics[topic]
        cdef uint64_t state = self.truth.load(self.layout.topic(topic)), committed, reclaimed, index
        if state & 0xFF != TOPIC_ACTIVE:
            known.generation = 0
            return BREACH_NONE
        if state >> 8 != known.generation:
            self.reset(topic, state >> 8)
        committed = self.truth.load(self.layout.topic_order(topic))
        index = known.committed
        if self.grows(&known.committed, committed, BACK_COMMITTED, topic, 0):
            return self.breach
        reclaimed = self.truth.load(self.layout.topic_reclaim(topic))
        if self.grows(&known.reclaimed, reclaimed, BACK_RECLAIMED, topic, 0):
            return self.breach
        if reclaimed > committed or committed - reclaimed > self.layout.g.order_entry_count:
            return self.fail(BREACH_BOUNDS, 0, topic, 0, reclaimed, committed)
        while index < committed:
            if self.check_entry(topic, index):
                known.committed = index         # what lies behind was not seen
                return self.breach
            index += 1
        return self.check_brokers(topic)

    cdef int check_entry(self, uint64_t topic, uint64_t index) noexcept nogil:
        """An entry that the frontier has just passed."""
        cdef TopicTruth* known = &self.topics[topic]
        cdef OrderEntry entry
        cdef uint64_t client = 0, first = 0, i, due
        cdef int32_t* where
        self.truth.read_line(self.layout.order_entry(topic, index), &entry)
        if entry.commit != make_tag(known.generation, index):
            return self.fail(BREACH_ENTRY_MISSING, topic, index, entry.commit, 0, 0)
        if entry.position != known.position or entry.message_count == 0:
            return self.fail(BREACH_POSITION, topic, index, known.position, entry.position, 0)
        if index < known.restored and entry.broker == LOST_BROKER and entry.payload_bytes == 0:
            self.see(topic, index, &entry, 0, entry.position)
            return BREACH_NONE
        if index >= known.restored:         # terms of the region that is lost are over, in whatever order
            if entry.epoch < known.epoch:
                return self.fail(BREACH_EPOCH, topic, index, known.epoch, entry.epoch, 0)
            known.epoch = entry.epoch
        if (entry.payload_offset < self.layout.g.segments or entry.payload_offset % 64
                or entry.payload_bytes > self.layout.g.batch_bytes_max or entry.broker >= self.layout.g.broker_count
                or entry.payload_offset > self.layout.g.region_bytes - entry.payload_bytes
                or not sender_of(self.truth.payload(entry.payload_offset, entry.payload_bytes), entry.payload_bytes,
                                 entry.message_count, &client, &first)
                or client != entry.client_id or client >= self.client_count
                or first + entry.message_count > self.number_count):
            return self.fail(BREACH_PAYLOAD, topic, index, entry.client_id, entry.batch_sequence, entry.broker)
        where = self.where[client]
        for i in range(first, first + entry.message_count):
            if where[i] >= 0:
                return self.fail(BREACH_TWICE, topic, index, client, i, where[i])
            where[i] = <int32_t>index
        due = self.next_number[client]
        while due < first and where[due] == LOST:
            due += 1
        if known.order == 5 and (first < due if self.gives_up else first != due):
            return self.fail(BREACH_GAP, topic, index, client, self.next_number[client], first)
        self.next_number[client] = first + entry.message_count
        self.by_broker[topic * self.layout.g.broker_count + entry.broker] += entry.message_count
        self.see(topic, index, &entry, client, first)
        return BREACH_NONE

    cdef void see(self, uint64_t topic, uint64_t index, OrderEntry* entry, uint64_t client, uint64_t first) noexcept nogil:
        """Note an entry that is sound."""
        cdef TopicTruth* known = &self.topics[topic]
        cdef Seen* seen
        known.position += entry.message_count
        if index >= known.capacity:
            known.capacity = max(<uint64_t>256, 2 * known.capacity)
            known.seen = <Seen*>realloc(known.seen, known.capacity * sizeof(Seen))
        seen = &known.seen[index]
        seen.position = entry.position
        seen.payload_offset = entry.payload_offset
        seen.payload_bytes = entry.payload_bytes
        seen.count = entry.message_count
        seen.client = client
        seen.first = first
        seen.sequence = entry.batch_sequence
        seen.session_epoch = entry.session_epoch
        seen.broker = entry.broker
        seen.epoch = entry.epoch
        seen.step = self.step
        self.hash = (self.hash ^ (client << 40 ^ first << 8 ^ entry.broker)) * MIX
        self.hash ^= self.hash >> 31

    cdef int check_brokers(self, uint64_t topic) noexcept nogil:
        """reclaimed <= scanned <= delegated <= published, for every broker."""
        cdef uint64_t b, brokers = self.layout.g.broker_count, delegated, scanned, line
        cdef TopicLog* log
        for b in range(brokers):
            line = self.layout.offset_broker(topic, b)
            # Until its broker has opened the topic, the line speaks of an earlier one.
            delegated = self.truth.load(line) if self.truth.load(line + 48) == self.topics[topic].generation else 0
            scanned = self.truth.load(self.layout.offset_sequencer(topic, b))
            if delegated > self.delegated[topic * brokers + b] and self.check_headers(topic, b, delegated):
                return self.breach
            if self.grows(&self.delegated[topic * brokers + b], delegated, BACK_DELEGATED, topic, b):
                return self.breach
            if self.grows(&self.scanned[topic * brokers + b], scanned, BACK_SCANNED, topic, b):
                return self.breach
            if scanned > delegated:
                return self.fail(BREACH_BOUNDS, 1, topic, b, scanned, delegated)
            if self.log_pointers[b] == NULL:
                continue
            log = &(<BrokerLog>self.log_pointers[b]).topics[topic]
            if log.generation != self.topics[topic].generation:
                continue
            if delegated > log.head or log.delegated > log.head:
                return self.fail(BREACH_BOUNDS, 2, topic, b, delegated, log.head)
            if log.tail > log.delegated:
                return self.fail(BREACH_BOUNDS, 3, topic, b, log.tail, log.delegated)
            if log.head - log.tail > self.layout.g.ring_slot_count:
                return self.fail(BREACH_RING, topic, b, log.tail, log.head, 0)
        return BREACH_NONE

    cdef int check_headers(self, uint64_t topic, uint64_t broker, uint64_t delegated) noexcept nogil:
        """The batch headers that a delegated frontier has just passed are in memory."""
        cdef uint64_t slot = self.delegated[topic * self.layout.g.broker_count + broker], found
        if delegated - slot > self.layout.g.ring_slot_count:
            return self.fail(BREACH_RING, topic, broker, slot, delegated, 0)
        while slot < delegated:
            found = self.truth.load(self.layout.ring(topic, broker, slot))
            if found != make_tag(self.topics[topic].generation, slot):
                return self.fail(BREACH_HEADER_MISSING, topic, broker, slot, found, delegated)
            slot += 1
        return BREACH_NONE

    cdef int check_tables(self) noexcept nogil:
        """Sessions' high-water marks and readers' cursors."""
        cdef uint64_t i, at, state, expected, topic
        cdef CursorLine line
        for i in range(self.layout.g.session_count_max):
            at = self.layout.session_progress(i)
            state = self.truth.load(at) >> 8
            expected = self.truth.load(at + 8)
            if state != self.sessions[2 * i]:
                self.sessions[2 * i] = state
                self.sessions[2 * i + 1] = expected
            elif self.grows(&self.sessions[2 * i + 1], expected, BACK_EXPECTED, i, 0):
                return self.breach
        for i in range(self.layout.g.cursor_count_max):
            at = self.layout.cursor(i)
            state = self.truth.load(at)
            if state & 0xFF == CURSOR_FREE or state & 0xFF == CURSOR_WANTED:
                self.cursors[2 * i] = 0
                continue
            self.truth.read_line(at, &line)
            topic = line.topic & 0xFFFF
            if topic >= self.topic_count or self.topics[topic].generation != line.topic >> 16:
                continue
            if line.index > self.topics[topic].committed:
                return self.fail(BREACH_CURSOR, i, topic, line.index, self.topics[topic].committed, 0)
            if self.cursors[2 * i] == state and line.index < self.cursors[2 * i + 1]:
                return self.fail(BREACH_CURSOR, i, topic, line.index, self.cursors[2 * i + 1], 1)
            self.cursors[2 * i] = state
            self.cursors[2 * i + 1] = line.index
        return BREACH_NONE

    cdef int recheck(self) noexcept nogil:
        """Everything committed and not reclaimed is still what it was, byte for byte."""
        cdef uint64_t topic, index, client = 0, first = 0
        cdef TopicTruth* known
        cdef OrderEntry entry
        cdef Seen* seen
        for topic in range(0 if self.blind else self.topic_count):
            known = &self.topics[topic]
            if known.generation == 0:
                continue
            for index in range(known.reclaimed, known.committed):
                self.truth.read_line(self.layout.order_entry(topic, index), &entry)
                seen = &known.seen[index]
                if (entry.commit != make_tag(known.generation, index) or entry.position != seen.position
                        or entry.payload_offset != seen.payload_offset or entry.payload_bytes != seen.payload_bytes
                        or entry.message_count != seen.count or entry.client_id != seen.client
                        or (seen.client and (not sender_of(self.truth.payload(seen.payload_offset, seen.payload_bytes),
                                         seen.payload_bytes, seen.count, &client, &first)
                        or client != seen.client or first != seen.first))):
                    return self.fail(BREACH_CHANGED, topic, index, seen.client, seen.first, seen.broker)
        return BREACH_NONE

    # ---- for the world ---------------------------------------------------------------------------------------------

    def look_away(self) -> None:
        """Say no more from now on: what is broken stays broken, and the run goes on for others who look."""
        self.blind = True
        self.breach = BREACH_NONE

    def check_now(self, bint thorough=True) -> int:
        """Check everything now; a `Breach`."""
        if self.check() == BREACH_NONE and thorough:
            self.recheck()
        return self.breach

    def has_head(self) -> bool:
        """Whether a head serves, or did until it lost its power."""
        return self.served()

    def describe(self) -> "tuple[str, str]":
        """(invariant, what was seen) of the breach."""
        a, b, c, d, e = (int(self.details[i]) for i in range(5))
        bounds = ("reclaimed {3} > committed {4}, or more kept than the index has entries",
                  "broker {2}: scanned {3} > delegated {4}", "broker {2}: delegated {3} > published {4}",
                  "broker {2}: freed slots {3} > delegated {4}")
        text = {
            BREACH_ENTRY_MISSING: f"topic {a}: order entry {b} is committed and not in memory (its commit word is {c:#x})",
            BREACH_POSITION: f"topic {a}: order entry {b} is at position {d}, {c} was due",
            BREACH_PAYLOAD: f"topic {a}: the payload of order entry {b} (client {c}, batch {d}, by broker {e}) "
                            "is not what anybody sent",
            BREACH_TWICE: f"topic {a}: message {d} of client {c} is in the log at entries {e} and {b}",
            BREACH_GAP: f"topic {a}: order entry {b} holds message {e} of client {c}, {d} was due",
            BREACH_BACK: f"{_FRONTIERS[a] if a < 5 else a} of topic or session {b}, broker {c}, went back from {d} to {e}",
            BREACH_BOUNDS: f"topic {b}: " + (bounds[a] if a < 4 else "").format(a, b, c, d, e),
            BREACH_EPOCH: f"topic {a}: order entry {b} has epoch {d} behind one of epoch {c}",
            BREACH_CHANGED: f"topic {a}: order entry {b} (client {c}, message {d}, by broker {e}) or its payload "
                            "changed after it was committed",
            BREACH_CURSOR: f"cursor {a} of topic {b} is at {c}, " + (f"and was at {d}" if e else f"behind the tail {d}"),
            BREACH_HEADER_MISSING: f"topic {a}: broker {b} delegated up to slot {e}, and the header of slot {c} is not in "
                                   f"memory (its commit word is {d:#x})",
            BREACH_RING: f"topic {a}: broker {b} has slots {c} to {d} in use, more than its ring has",
        }[self.breach]
        return _INVARIANTS[self.breach], text

    def entry_of(self, uint64_t client, uint64_t number) -> int:
        """Order entry of a message, below 0 when it is not in the log."""
        return self.where[client][number] if client < self.client_count and number < self.number_count else -1

    def log_of(self, uint64_t topic) -> "list[dict[str, int]]":
        """Everything that the topic's frontier has passed, in order."""
        return [dict(self.topics[topic].seen[i]) for i in range(self.topics[topic].committed)]

    def entry(self, uint64_t topic, uint64_t index) -> "dict[str, int]":
        """One committed order entry, as it was when the frontier passed it. Raises `IndexError` for one that was not seen."""
        if index >= self.topics[topic].committed:
            raise IndexError(f"order entry {index} of topic {topic} was not seen")
        return dict(self.topics[topic].seen[index])

    def frontiers(self, uint64_t topic) -> "dict[str, int]":
        """Frontiers of a topic as they are in memory now, for traces."""
        cdef uint64_t b
        found = {"committed": self.topics[topic].committed, "reclaimed": self.topics[topic].reclaimed}
        for b in range(self.layout.g.broker_count):
            line = self.layout.offset_broker(topic, b)
            found[f"delegated.{b}"] = self.truth.load(line)
            found[f"scanned.{b}"] = self.truth.load(self.layout.offset_sequencer(topic, b))
            found[f"slots freed.{b}"] = self.truth.load(line + 56)
        return found

    def counts(self, uint64_t topic, uint64_t broker) -> "dict[str, int]":
        """What the records say of a broker's messages, and how many the log has: they agree when all is quiet."""
        return {"ordered": self.truth.load(self.layout.offset_sequencer(topic, broker) + 8),
                "in_log": self.by_broker[topic * self.layout.g.broker_count + broker],
                "written": self.truth.load(self.layout.offset_broker(topic, broker) + 8)}
