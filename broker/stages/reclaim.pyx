"""Reclaim: decides, at the head, which part of each topic's log may be forgotten.

The frontier moves only when room is needed (a broker lacks segments, an order index fills up) or a topic's retention
asks for it, and never past the slowest of: committed order, replicas, live readers, protected groups. Readers ask for
a grant before they read: one writer decides, so no reader can slip below a frontier that is just moving.

When room is needed and a topic keeps more than its retention because a reader stands still, the reader is passed over:
it finds that its place is gone. Who copies and then checks is passed over at once; who views memory itself is asked to
let go, by its grant, and holds until its broker has shut it out.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free

from broker.doorbell cimport Doorbell
from broker.layout cimport (
    BROKER_READY, BROKER_STARTING, CURSOR_FREE, CURSOR_LIVE, CURSOR_WANTED, CursorGrantLine, CursorLine,
    GROUP_PROTECTED, GroupLine, HOLDER_CURSOR, HOLDER_NONE, HOLDER_OTHERS, HOLDER_PROTECTED, HOLDER_REPLICA,
    HOLDER_RETENTION, HOLDER_UNCOMMITTED, Layout, OrderEntry, ReclaimAnswerLine, TopicLine, TopicReclaimLine,
)
from broker.placement cimport live_brokers, replicas_of
from broker.planted cimport PLANT_READER_IGNORED, PLANT_REPLICA_IGNORED, planted
from broker.segments cimport PoolLeader
from broker.stages.sequencer cimport OrderState, TopicOrder
from broker.stages.stage cimport LOOK_TOPICS, Stage
from libc.string cimport memset
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_load_acquire, cxl_load_relaxed, cxl_popcount, cxl_store_release

cdef enum:
    STEP_ENTRIES = 4096

cdef uint64_t KEEP_ALL = <uint64_t>-1


cdef class Reclaim(Stage):
    """The head's reclaim stage, for all topics; with the leader strategy it also answers the brokers' wishes."""

    def __init__(self, Memory memory, OrderState state, doorbells, PoolLeader leader=None):
        cdef uint64_t topics = state.layout.g.topic_count_max, brokers = state.layout.g.broker_count, b
        self.memory = memory
        self.state = state
        self.layout = state.layout
        self.leader = leader
        self.doorbell_objects = list(doorbells)
        self.cursors_seen = <uint64_t*>calloc(2 * brokers, 8)
        self.retention = <uint64_t*>calloc(5 * topics, 8)
        self.doorbells = <void**>calloc(brokers, sizeof(void*))
        self.activity_words = (topics + 7) // 8
        self.activity_seen = <uint64_t*>calloc(self.activity_words, 8)
        if (self.cursors_seen == NULL or self.retention == NULL or self.doorbells == NULL
                or self.activity_seen == NULL):
            raise MemoryError
        for b in range(self.activity_words):
            self.activity_seen[b] = ~state.activity[b]
        self.answered = self.cursors_seen + brokers
        self.replication = self.retention + topics
        self.generations = self.retention + 2 * topics
        self.reclaimed_bytes = self.retention + 3 * topics
        self.reclaimed_position = self.retention + 4 * topics
        for b in range(brokers):
            self.doorbells[b] = <void*>self.doorbell_objects[b]
            self.answered[b] = memory.load(self.layout.reclaim_answer(b))
            self.cursors_seen[b] = ~memory.load(self.layout.broker(b) + 48)     # look at every wish
        self.reclaims = memory.load(self.layout.reclaim_answer(0) + 32)

    def __dealloc__(self):
        free(self.cursors_seen)
        free(self.retention)
        free(self.doorbells)
        free(self.activity_seen)

    cdef void ring(self, uint64_t broker) noexcept nogil:
        (<Doorbell>self.doorbells[broker]).ring()

    cdef void leave(self) noexcept nogil:
        self.memory.full_fence()
        if self.leader is not None:
            self.leader.memory.full_fence()

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t b, line
        cdef int64_t work = 0, moved = 0
        for b in range(self.layout.g.broker_count):
            line = self.layout.broker(b)
            self.memory.invalidate(line, 64)
            if self.memory.load(line + 48) != self.cursors_seen[b]:
                self.cursors_seen[b] = self.memory.load(line + 48)
                work += self.grant_cursors(b)
        self.look_at_options()
        moved += self.keep_news()
        if self.leader is not None:
            work += self.leader.step()
        for b in range(self.layout.g.broker_count):
            line = self.layout.pool_wish(b)
            self.memory.invalidate(line, 64)
            if self.memory.load(line + 24) != self.answered[b]:
                moved += self.answer_pressure(b)
        if moved:
            self.tell_brokers()
        return work + moved

    cdef int64_t keep_news(self) noexcept nogil:
        """Look after the topics that committed since."""
        cdef uint64_t word, now, changed, i
        cdef int64_t moved = 0, done
        for word in range(self.activity_words):
            now = cxl_load_relaxed(&self.state.activity[word])
            changed = now ^ self.activity_seen[word]
            if not changed:
                continue
            self.activity_seen[word] = now
            for i in range(8):
                if not changed >> (8 * i) & 0xFF or word * 8 + i >= self.layout.g.topic_count_max:
                    continue
                if self.know(word * 8 + i):
                    done = self.keep_retention(word * 8 + i)
                    if done or self.is_beyond(word * 8 + i):
                        self.activity_seen[word] ^= <uint64_t>0xFF << (8 * i)   # not done with it: look again
                    moved += done
        return moved

    cdef void prepare_to_sleep(self) noexcept nogil:
        # A count of one byte may come round to the same value.
        cdef uint64_t i
        for i in range(min((self.layout.g.topic_count_max + 7) // 8, <uint64_t>LOOK_TOPICS // 8)):
            self.activity_seen[self.next_look] = ~self.state.activity[self.next_look]
            self.next_look = (self.next_look + 1) % self.activity_words

    cdef bint know(self, uint64_t topic) noexcept nogil:
        """Read a topic's options when it is new. False while it is being deleted."""
        cdef uint64_t generation = cxl_load_acquire(&self.state.topics[topic].generation)
        cdef TopicReclaimLine reclaimed
        if generation == 0:
            return False
        if self.generations[topic] != generation:
            self.read_options(topic)
            # Zero for a new topic; otherwise where the last head, or recovery, stood.
            self.memory.read_line(self.layout.topic_reclaim(topic), &reclaimed)
            self.reclaimed_bytes[topic] = reclaimed.reclaimed_bytes
            self.reclaimed_position[topic] = reclaimed.reclaimed_position
            self.generations[topic] = generation
        return True

    cdef void read_options(self, uint64_t topic) noexcept nogil:
        cdef TopicLine line
        self.memory.invalidate(self.layout.topic(topic), 64)
        self.memory.read_line(self.layout.topic(topic), &line)
        self.retention[topic] = line.retention_bytes
        self.replication[topic] = line.replication_factor

    cdef void look_at_options(self) noexcept nogil:
        """Options of topics can be altered while they are in use."""
        cdef uint64_t topic, version
        self.memory.invalidate(self.layout.directory(), 64)
        version = self.memory.load(self.layout.directory())
        if version == self.options_seen:
            return
        self.options_seen = version             # read first: what is altered meanwhile is read again
        for topic in range(self.layout.g.topic_count_max):
            if self.generations[topic]:
                self.read_options(topic)
        for topic in range(self.activity_words):
            self.activity_seen[topic] = ~self.state.activity[topic]     # and each topic is looked at by them

    cdef int64_t grant_cursors(self, uint64_t broker) noexcept nogil:
        cdef uint64_t first = broker * self.layout.g.cursors_per_broker, c, topic
        cdef CursorLine line
        cdef CursorGrantLine grant
        cdef int64_t work = 0
        memset(&grant, 0, sizeof(grant))
        for c in range(first, first + self.layout.g.cursors_per_broker):
            self.memory.invalidate(self.layout.cursor(c), 64)
            self.memory.read_line(self.layout.cursor(c), &line)
            if line.state & 0xFF != CURSOR_WANTED:
                continue
            if self.memory.load(self.layout.cursor_grant(c)) == line.state >> 8:
                continue
            topic = line.topic & 0xFFFF
            if topic >= self.layout.g.topic_count_max:
                continue                        # damaged: its reader is told after a while that nobody answers
            grant.index = max(line.index, self.state.topics[topic].reclaimed_index)
            grant.granted = line.state >> 8
            self.memory.write_line(self.layout.cursor_grant(c), &grant)
            self.memory.flush(self.layout.cursor_grant(c), 64)
            work += 1
        self.memory.fence()
        self.ring(broker)
        return work

    cdef uint64_t limit(self, uint64_t topic) noexcept nogil:
        """The first order entry that somebody still needs; sets who that is. Readers below `evict_below` are passed over,
        unless somebody else holds what they hold as well."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef uint64_t lowest = cxl_load_acquire(&order.committed_index), c, at, index, kind, evict_below = 0
        cdef uint64_t wanted = order.generation << 16 | topic
        cdef CursorLine line
        self.holder = <uint64_t>HOLDER_UNCOMMITTED << 32 | topic
        self.holder_topic = topic
        if self.retention[topic] == KEEP_ALL:
            self.holder = <uint64_t>HOLDER_RETENTION << 32 | topic
            return order.reclaimed_index
        if self.evict_below:
            evict_below = self.limit_of_others(topic, self.evict_below)
        for c in range(self.layout.g.cursor_count_max):
            at = self.layout.cursor(c)
            self.memory.invalidate(at, 64)
            if self.memory.load(at) & 0xFF == CURSOR_FREE:
                continue
            self.memory.read_line(at, &line)
            kind = line.state & 0xFF
            if kind == CURSOR_FREE or line.topic != wanted or planted(PLANT_READER_IGNORED):
                continue
            index = line.index
            if kind == CURSOR_WANTED:
                if self.memory.load(self.layout.cursor_grant(c)) != line.state >> 8:
                    continue                # not granted yet: it will be granted above the frontier
                index = max(index, self.memory.load(self.layout.cursor_grant(c) + 8))
            if index < lowest and not (index < evict_below and self.passes_over(c, &line)):
                lowest = index
                self.holder = <uint64_t>HOLDER_CURSOR << 32 | c
        # After the cursors: a place that goes over from a cursor to a group is in one of them.
        return self.limit_of_others(topic, lowest)

    cdef uint64_t limit_of_others(self, uint64_t topic, uint64_t lowest) noexcept nogil:
        """The same for protected groups and replicas; `lowest` when they need nothing below it."""
        cdef uint64_t wanted = self.state.topics[topic].generation << 16 | topic, c, b, r, at, index, live, chosen
        cdef GroupLine group
        for c in range(self.layout.g.group_count_max):
            at = self.layout.group(c)
            self.memory.invalidate(at, 64)
            if self.memory.load(at) & 0xFF != GROUP_PROTECTED:
                continue
            self.memory.read_line(at, &group)
            if group.topic == wanted and group.index < lowest:
                lowest = group.index
                self.holder = <uint64_t>HOLDER_PROTECTED << 32 | c
        if self.replication[topic] > 1 and not planted(PLANT_REPLICA_IGNORED):
            live = live_brokers(self.memory, self.layout)
            for b in range(self.layout.g.broker_count):
                chosen = replicas_of(topic, wanted >> 16, b, live, self.layout.g.broker_count,
                                     self.replication[topic])
                if cxl_popcount(chosen) < <int64_t>self.replication[topic] - 1:
                    # Too few brokers live. What has not reached as many disks as it wants is kept until one is back: a
                    # replica that begins behind it would seem to have it.
                    chosen = replicas_of(topic, wanted >> 16, b, <uint64_t>-1, self.layout.g.broker_count,
                                         self.replication[topic])
                for r in range(self.layout.g.broker_count):
                    if not chosen >> r & 1:
                        continue
                    at = self.layout.replica(topic, b, r)
                    self.memory.invalidate(at, 64)
                    index = self.memory.load(at) if self.memory.load(at + 24) == wanted >> 16 else 0
                    if index < lowest:
                        lowest = index
                        self.holder = <uint64_t>HOLDER_REPLICA << 32 | r
        return lowest

    cdef bint passes_over(self, uint64_t cursor, CursorLine* line) noexcept nogil:
        """Whether this reader's place may go at once. Of one that views memory it is asked for, and may go later."""
        cdef uint64_t grant = self.layout.cursor_grant(cursor), request = line.state >> 8
        if line.state & 0xFF != CURSOR_LIVE:
            return False
        if line.copies:
            return True
        if self.memory.load(grant + 16) != request:
            self.memory.store(grant + 16, request)
            self.memory.flush(grant, 64)
            self.memory.fence()
        return False

    cdef int64_t reclaim_bytes(self, uint64_t topic, uint64_t nbytes, uint64_t entries) noexcept nogil:
        """Move the frontier over at least so many bytes and entries, as far as it is allowed; entries moved."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef uint64_t index = order.reclaimed_index, end = self.limit(topic), freed = 0, at, payload = 0
        cdef uint64_t first = index
        cdef OrderEntry entry
        cdef TopicReclaimLine line
        if self.evict_below:
            end = min(end, self.evict_below)
        while index < end and (freed < nbytes or index - first < entries) and index - first < STEP_ENTRIES:
            self.memory.read_line(self.layout.order_entry(topic, index), &entry)
            index += 1
            if entry.payload_bytes <= self.layout.g.batch_bytes_max:        # else it is damaged
                freed += (entry.payload_bytes + 63) // 64 * 64
                payload += entry.payload_bytes
        if index == first:
            return 0
        self.reclaimed_position[topic] = self.first_kept(topic, index, entry.position + entry.message_count)
        # Counted as the committed bytes are, without the gaps between payloads: their difference is what is kept.
        self.reclaimed_bytes[topic] += payload
        memset(&line, 0, sizeof(line))
        line.reclaimed_index = index
        line.reclaimed_position = self.reclaimed_position[topic]
        line.reclaimed_bytes = self.reclaimed_bytes[topic]
        line.holder = self.holder
        line.holder_index = end
        at = self.layout.topic_reclaim(topic)
        self.memory.write_line(at, &line)
        self.memory.flush(at, 64)
        self.memory.fence()
        # Readers are told before anything is reused: the sequencer and the brokers act only on what is fenced. And a new
        # head that raises the epoch from here on finds this frontier: none of the entries that it copies is written over.
        self.memory.full_fence()
        if self.memory.load(self.layout.control()) != self.state.control:
            return 0
        cxl_store_release(&order.reclaimed_index, index)
        return <int64_t>(index - first)

    cdef uint64_t first_kept(self, uint64_t topic, uint64_t index, uint64_t position) noexcept nogil:
        """The position of the first entry that is kept: `position`, if that agrees with the entry. One of them may be
        damaged, and rather too much is said to be there than too little."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef uint64_t lowest = self.reclaimed_position[topic] + 1, found = order.committed_position
        cdef OrderEntry entry
        if index < cxl_load_acquire(&order.committed_index):
            self.memory.read_line(self.layout.order_entry(topic, index), &entry)
            if lowest <= entry.position < found:
                found = entry.position
        return position if lowest <= position < found else found

    cdef uint64_t kept_bytes(self, uint64_t topic) noexcept nogil:
        """Bytes that are committed and not reclaimed. Where entries were damaged, more may count as reclaimed."""
        cdef uint64_t committed = self.state.topics[topic].committed_bytes
        return committed - min(committed, self.reclaimed_bytes[topic])

    cdef bint is_beyond(self, uint64_t topic) noexcept nogil:
        """Whether the topic keeps more than it wants, because somebody holds it: it is looked at again."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef uint64_t retention = self.retention[topic]
        cdef uint64_t used = cxl_load_acquire(&order.committed_index) - order.reclaimed_index
        return (used > self.layout.g.order_entry_count - self.margin()
                or (retention and retention != KEEP_ALL and self.kept_bytes(topic) > retention + retention // 16))

    cdef uint64_t margin(self) noexcept nogil:
        """Entries of an order index that are to be free: scanners stop while there is not one place for each of them."""
        cdef uint64_t entries = self.layout.g.order_entry_count
        return min(max(entries // 8, <uint64_t>self.state.scanners + 1), entries - 1)

    cdef int64_t keep_retention(self, uint64_t topic) noexcept nogil:
        """Retention by bytes, and room in the order index."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef uint64_t entries = self.layout.g.order_entry_count, margin = self.margin(), wanted
        cdef uint64_t used = cxl_load_acquire(&order.committed_index) - order.reclaimed_index
        cdef uint64_t kept = self.kept_bytes(topic), retention = self.retention[topic]
        cdef int64_t moved
        if used > entries - margin:
            wanted = used - (entries - min(2 * margin, entries))
            moved = self.reclaim_bytes(topic, 0, wanted)
            return moved if moved else self.evict_beyond_retention(topic, 0, wanted)
        if retention and retention != KEEP_ALL and kept > retention + retention // 16:
            return self.reclaim_bytes(topic, kept - retention, 0)
        return 0

    cdef int64_t evict_beyond_retention(self, uint64_t topic, uint64_t nbytes, uint64_t entries) noexcept nogil:
        """Room is needed: readers hold no more than the retention, if the topic has one."""
        cdef TopicOrder* order = &self.state.topics[topic]
        cdef uint64_t retention = self.retention[topic], kept = self.kept_bytes(topic), index = order.reclaimed_index
        cdef uint64_t end = min(cxl_load_acquire(&order.committed_index), index + STEP_ENTRIES)
        cdef OrderEntry entry
        cdef int64_t moved
        if retention == 0 or retention == KEEP_ALL:
            return 0
        while index < end:
            self.memory.read_line(self.layout.order_entry(topic, index), &entry)
            if entry.payload_bytes <= self.layout.g.batch_bytes_max:        # else it is damaged
                if kept < retention + entry.payload_bytes:
                    break
                kept -= entry.payload_bytes
            index += 1
        if index == order.reclaimed_index:
            return 0
        self.evict_below = index
        moved = self.reclaim_bytes(topic, nbytes, entries)
        self.evict_below = 0
        return moved

    cdef uint64_t capacity(self) noexcept nogil:
        return self.layout.g.segment_count * self.layout.g.segment_bytes

    cdef int64_t answer_pressure(self, uint64_t broker) noexcept nogil:
        """A broker lacks segments for a topic: forget what is beyond retentions, else the oldest part of the topic that
        keeps most."""
        cdef uint64_t line = self.layout.pool_wish(broker), request = self.memory.load(line + 24)
        cdef uint64_t wanted = self.memory.load(line + 32) * self.layout.g.broker_count
        cdef uint64_t named = self.memory.load(line + 40), presser = named & 0xFFFF
        cdef ReclaimAnswerLine answer
        cdef int64_t moved = 0
        # A broker cannot know whether its leader has no room, or had no time: then it has its segments by now.
        cdef bint lacks = self.leader is None or self.leader.owes(broker)
        wanted = max(wanted, 2 * self.layout.g.segment_bytes * self.layout.g.broker_count)
        if presser >= self.layout.g.topic_count_max or not self.know(presser) or (
                self.generations[presser] != (named >> 16 & 0xFFFF)):
            presser = self.layout.g.topic_count_max     # deleted meanwhile
        self.holder = self.holder_topic = 0
        if lacks:
            moved = self.take_from_retained(wanted)
        if lacks and not moved:
            moved = self.take_from_largest(presser, wanted, (named >> 32) * self.layout.g.segment_bytes)
        memset(&answer, 0, sizeof(answer))
        answer.answered = request
        answer.holder = self.holder
        answer.holder_topic = self.holder_topic
        answer.reclaims = self.reclaims
        self.answered[broker] = request
        self.memory.write_line(self.layout.reclaim_answer(broker), &answer)
        self.memory.flush(self.layout.reclaim_answer(broker), 64)
        self.memory.fence()
        self.ring(broker)
        return moved

    cdef int64_t take_from_retained(self, uint64_t wanted) noexcept nogil:
        """Topics that keep more than their retention, because a reader stands still."""
        cdef uint64_t topic, retention
        cdef int64_t moved = 0
        for topic in range(self.layout.g.topic_count_max):
            if not cxl_load_relaxed(&self.state.topics[topic].generation) or not self.know(topic):
                continue
            retention = self.retention[topic]
            if retention and retention != KEEP_ALL and self.kept_bytes(topic) > retention:
                moved += self.evict_beyond_retention(topic, max(wanted, self.kept_bytes(topic) // 16), 0)
        return moved

    cdef int64_t take_from_largest(self, uint64_t presser, uint64_t wanted, uint64_t held) noexcept nogil:
        """The topic that keeps most, if that is the one which lacks room, or keeps more than its fair share, or more than
        that one has: what it keeps, or holds at the broker that asks (`held`), committed or not. One that cannot move is
        passed over for the next; of others no more is taken than what they keep beyond it."""
        cdef uint64_t topic, kept, most = 0, chosen = 0, count = 1, own = 0, fair, holder = 0, holder_topic = 0
        cdef uint64_t stuck = 0, topics = self.layout.g.topic_count_max
        cdef int64_t moved = 0
        for topic in range(topics):
            if cxl_load_relaxed(&self.state.topics[topic].generation) and self.know(topic):
                count += topic != presser and self.kept_bytes(topic) > 0
        fair = self.capacity() // count
        if presser < topics:
            own = max(self.kept_bytes(presser), held)
        for topic in range(topics):
            if not cxl_load_relaxed(&self.state.topics[topic].generation) or not self.know(topic):
                continue
            kept = self.kept_bytes(topic)
            if kept == 0 or (kept <= most and kept <= stuck and topic != presser):
                continue
            if topic != presser and presser < topics and kept <= fair and (own >= fair or kept <= own):
                continue
            if self.limit(topic) > self.state.topics[topic].reclaimed_index:
                if kept > most:
                    most = kept
                    chosen = topic + 1
            elif kept > stuck or topic == presser:
                stuck = <uint64_t>-1 if topic == presser else kept      # whoever lacks room is told of its own first
                holder = self.holder
                holder_topic = topic
        if chosen:
            topic = chosen - 1
            wanted = max(wanted, most // 16)
            if topic != presser and presser < topics:
                wanted = min(wanted, most - min(min(own, fair), most - 1))
            moved = self.reclaim_bytes(topic, wanted, 0)
            if holder == 0:
                holder = self.holder
                holder_topic = topic
        elif holder == 0 and presser < topics:
            holder = <uint64_t>HOLDER_OTHERS << 32 | presser
            holder_topic = presser
        self.holder = holder
        self.holder_topic = holder_topic
        return moved

    cdef void tell_brokers(self) noexcept nogil:
        cdef uint64_t b, line
        self.reclaims += 1
        for b in range(self.layout.g.broker_count):
            line = self.layout.reclaim_answer(b)
            self.memory.store(line + 32, self.reclaims)
            self.memory.flush(line, 64)
        self.memory.fence()
        for b in range(self.layout.g.broker_count):
            self.ring(b)
