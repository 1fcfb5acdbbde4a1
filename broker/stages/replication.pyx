"""Replication: copies the ordered batches of other brokers from memory to this broker's disk.

    order index ──► gather ──► pwritev (batches of one source, one after the other) ──► fdatasync ──► frontier

One chain of files for each topic and source broker that rendezvous hashing gives this broker (broker/placement.pxd); their
bytes are in broker/replica_record.pxd. A frontier moves only after fdatasync. A write or sync that fails is final for
its file: the file is never written or synced again, its frontier stays, and the error number stands in the replica's
line until the same batches, written anew from memory into a new file, are on the disk.
"""

import errno as errno_numbers

from broker.errors import BrokerUnavailable

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from broker.disk cimport disk_sync, disk_write, iovec
from broker.head cimport HeadView
from broker.layout cimport BrokerCounters, Layout, OrderEntry, ReplicaLine, TOPIC_ACTIVE, TopicLine
from broker.doorbell cimport Doorbell
from broker.placement cimport live_brokers, replicas_of
from broker.reader cimport OrderReader, READ_CLOSED, READ_DAMAGED, READ_GONE, READ_LOST, READ_OK
from broker.replica_record cimport REPLICA_ALIGNMENT, REPLICA_MAGIC, REPLICA_SUPERBLOCK, ReplicaRecord
from broker.stages.stage cimport Stage
from sim.cxl.clock cimport Clock
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count, cxl_crc32c, cxl_popcount

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    STEP_BYTES = 8388608
    STEP_ENTRIES = 4096
    GATHER_RECORDS = 256                # three parts each: below IOV_MAX
    EAGAIN = 11                         # of a file that waits for a head; nobody is told
    EBADMSG = 74
    ENOSPC = 28

cdef uint64_t UNKNOWN = <uint64_t>-1
cdef int64_t NEVER = <int64_t>(<uint64_t>-1 >> 1)

cdef struct ReplicaFile:
    # Invariant: index <= next_index. What lies between is written, and not synced.
    uint64_t wanted                     # this broker is chosen for the source
    uint64_t generation                 # of the topic that it belongs to; 0 none
    uint64_t index                      # order entries below are durable here, or came by other brokers
    uint64_t position                   # messages below
    uint64_t nbytes                     # payload that was made durable
    uint64_t offset                     # where the next record goes
    uint64_t next_index
    uint64_t next_position
    uint64_t next_bytes
    uint64_t unsynced
    uint64_t synced                     # bytes of this file that were made durable
    int64_t retry_at
    int64_t retry_ns
    uint32_t tag
    int fd
    int failed

cdef struct ReplicaTopic:
    uint64_t generation
    uint64_t factor
    uint64_t noted                      # durable position that was written down last
    uint64_t first_position             # reclaimed and committed frontier, as the serving head said last
    uint64_t committed_position


cdef class Replication(Stage):
    """The replica role of one broker, for all topics with a replication factor above 1. Runs in a thread of its own:
    it waits for the disk.

    `folder` makes and removes the files (`broker.replica_files.ReplicaFolder`); one is closed at `file_bytes`.
    A failed replica tries a new file after `retry_ns`, then after twice that, up to sixteen times that.
    `doorbells` has one a broker, rung when something has become durable here.
    """

    cdef Memory memory
    cdef Layout layout
    cdef HeadView head
    cdef uint64_t control_seen
    cdef Clock clock
    cdef int broker
    cdef object folder
    cdef uint64_t file_bytes
    cdef int64_t retry_ns
    cdef uint64_t version_seen
    cdef uint64_t live_seen
    cdef uint64_t count
    cdef uint64_t topic_count
    cdef ReplicaTopic* topics
    cdef ReplicaFile* files             # topic * brokers + source
    cdef uint64_t* active               # those that are wanted
    cdef uint64_t active_count
    cdef BrokerCounters* counters
    cdef list readers
    cdef void** reader_pointers         # into `readers`, reached without the GIL
    cdef list doorbell_objects
    cdef void** doorbells               # one a broker: acks of level 2 wait for our frontier
    cdef uint64_t doorbell_count
    cdef ReplicaRecord* records
    cdef iovec* parts

    def __cinit__(self):
        self.topics = NULL
        self.files = NULL
        self.active = NULL
        self.reader_pointers = NULL
        self.doorbells = NULL
        self.records = NULL
        self.parts = NULL

    def __init__(self, Memory memory, Layout layout, int broker, folder, Clock clock, doorbells=(),
                 uint64_t file_bytes=64 << 20, int64_t retry_ns=500000000):
        self.memory = memory
        self.head = HeadView(memory, layout)
        self.layout = self.head.layout
        self.clock = clock
        self.broker = broker
        self.folder = folder
        self.file_bytes = file_bytes
        self.retry_ns = retry_ns
        self.count = layout.g.broker_count
        self.topic_count = layout.g.topic_count_max
        self.topics = <ReplicaTopic*>calloc(self.topic_count, sizeof(ReplicaTopic))
        self.files = <ReplicaFile*>calloc(self.topic_count * self.count, sizeof(ReplicaFile))
        self.active = <uint64_t*>calloc(self.topic_count * self.count, 8)
        self.counters = <BrokerCounters*>memory.coherent_area(layout.broker_counters(broker))
        self.readers = [None] * self.topic_count
        self.reader_pointers = <void**>calloc(self.topic_count, sizeof(void*))
        self.doorbell_objects = list(doorbells)
        self.doorbell_count = len(self.doorbell_objects)
        self.doorbells = <void**>calloc(self.doorbell_count + 1, sizeof(void*))
        self.records = <ReplicaRecord*>calloc(GATHER_RECORDS, sizeof(ReplicaRecord))
        self.parts = <iovec*>calloc(3 * GATHER_RECORDS, sizeof(iovec))
        if (self.topics == NULL or self.files == NULL or self.active == NULL or self.reader_pointers == NULL
                or self.doorbells == NULL or self.records == NULL or self.parts == NULL):
            raise MemoryError
        for i, bell in enumerate(self.doorbell_objects):
            assert isinstance(bell, Doorbell)
            self.doorbells[i] = <void*>bell

    def __dealloc__(self):
        free(self.topics)
        free(self.files)
        free(self.active)
        free(self.reader_pointers)
        free(self.doorbells)
        free(self.records)
        free(self.parts)

    # ---- one step ------------------------------------------------------------------------------------------------

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t version, live, i
        cdef int64_t work = 0
        cdef ReplicaFile* file
        if not self.head.begin():
            return 0
        self.memory.invalidate(self.layout.directory(), 64)
        version = self.memory.load(self.layout.directory())
        live = live_brokers(self.memory, self.layout)
        if not self.head.same():
            return 1
        if version != self.version_seen or live != self.live_seen or self.head.control != self.control_seen:
            self.version_seen = version
            self.control_seen = self.head.control
            self.live_seen = live
            self.look_again()
        for i in range(self.active_count):
            file = &self.files[self.active[i]]
            if not file.failed:
                work += self.append(self.active[i])
            elif self.clock.now_ns() >= file.retry_at:
                self.begin_again(self.active[i])
        # All are written before the first is waited for: the disk works on several at once.
        for i in range(self.active_count):
            file = &self.files[self.active[i]]
            if not file.failed and file.next_index != file.index:
                self.sync(self.active[i])
        if work:
            self.ring()
        else:
            self.note_durable()
        return work

    cdef void ring(self) noexcept nogil:
        cdef uint64_t k
        for k in range(self.doorbell_count):
            (<Doorbell>self.doorbells[k]).ring()

    cdef int64_t append(self, uint64_t f) noexcept nogil:
        """Write what is committed and not yet here behind the last record."""
        cdef ReplicaFile* file = &self.files[f]
        cdef uint64_t started = file.next_index, wrote = 0
        cdef int64_t gathered
        while wrote < STEP_BYTES and file.next_index - started < STEP_ENTRIES and not file.failed:
            if file.offset >= self.file_bytes and not self.rotate(f):
                break
            gathered = self.gather(f)
            if gathered <= 0:
                break
            wrote += gathered
        return <int64_t>(file.next_index - started)

    cdef int64_t gather(self, uint64_t f) noexcept nogil:
        """Write a group of records by one call; bytes of them and entries passed over, 0 when there is nothing."""
        cdef ReplicaFile* file = &self.files[f]
        cdef uint64_t t = f // self.count, source = f % self.count, count = 0, total = 0, passed = 0
        cdef uint64_t index = file.next_index, position = file.next_position, payload = 0
        cdef uint64_t durable = self.durable_position(t)
        cdef OrderEntry entry
        cdef int status = READ_OK
        if not self.know_frontiers(t):
            return 0
        while count < GATHER_RECORDS and total < STEP_BYTES and passed < STEP_ENTRIES:
            status = (<OrderReader>self.reader_pointers[t]).peek(index, &entry)
            if status != READ_OK and status != READ_GONE:
                break
            if entry.position != position:
                status = READ_DAMAGED           # positions have neither holes nor overlaps
                break
            if status == READ_OK and entry.broker == source:
                total += self.put_record(f, count, index, durable, &entry)
                payload += entry.payload_bytes
                count += 1
            index += 1
            passed += 1
            position = entry.position + entry.message_count
        if passed == 0 and file.next_index == file.index:       # else what is before it is made durable first
            if status == READ_DAMAGED:
                self.fail(f, EBADMSG)           # a replica with a hole would be found too late
            elif status == READ_LOST:
                self.join_again(f)
            return 0
        if passed == 0:
            return 0
        if count:
            if not self.write(f, count, total):
                return 0
            self.topics[t].noted = max(self.topics[t].noted, durable)
        file.next_index = index
        file.next_position = position
        file.next_bytes += payload
        return <int64_t>(total + passed)

    cdef bint know_frontiers(self, uint64_t t) noexcept nogil:
        """Read what the head that serves says of a topic; False when none does. What a replaced head says would make recovery
        forget what its successor has kept."""
        return (<OrderReader>self.reader_pointers[t]).positions(&self.topics[t].first_position,
                                                                &self.topics[t].committed_position)

    cdef uint64_t put_record(self, uint64_t f, uint64_t number, uint64_t index, uint64_t durable,
                             OrderEntry* entry) noexcept nogil:
        """Make record `number` of the group; its bytes in the file. The payload is not copied."""
        cdef ReplicaRecord* record = &self.records[number]
        cdef iovec* parts = &self.parts[3 * number]
        cdef const uint8_t* payload = NULL
        memset(record, 0, sizeof(ReplicaRecord))
        record.entry = entry[0]
        record.index = index
        record.durable_position = durable
        record.committed_position = self.topics[f // self.count].committed_position
        record.first_position = self.topics[f // self.count].first_position
        record.magic = REPLICA_MAGIC
        record.file_tag = self.files[f].tag
        if entry.payload_bytes:
            self.memory.invalidate(entry.payload_offset, entry.payload_bytes)
            payload = self.memory.payload(entry.payload_offset, entry.payload_bytes)
            record.payload_crc = cxl_crc32c(0, payload, entry.payload_bytes)
        record.header_crc = cxl_crc32c(0, record, sizeof(ReplicaRecord) - 4)
        parts[0].iov_base = record
        parts[0].iov_len = sizeof(ReplicaRecord)
        parts[1].iov_base = <void*>payload
        parts[1].iov_len = entry.payload_bytes
        parts[2].iov_base = <void*>ZEROES
        parts[2].iov_len = (REPLICA_ALIGNMENT - entry.payload_bytes % REPLICA_ALIGNMENT) % REPLICA_ALIGNMENT
        return parts[0].iov_len + parts[1].iov_len + parts[2].iov_len

    cdef void join_again(self, uint64_t f) noexcept nogil:
        """What comes next was reclaimed before it held the reclaimer back: others had our place for a while. What they kept
        is on their disks, and in no memory: go on with the oldest batch that is."""
        cdef ReplicaFile* file = &self.files[f]
        with gil:
            try:
                self.close_chain(f)
                self.open_chain(f)
            except BrokerUnavailable:
                self.control_seen = 0           # not open: the next look opens it
            except BaseException as error:
                self.failure = error

    cdef bint write(self, uint64_t f, uint64_t records, uint64_t total) noexcept nogil:
        cdef ReplicaFile* file = &self.files[f]
        cdef int64_t result = disk_write(file.fd, self.parts, <int>(3 * records), file.offset)
        if result < 0 or <uint64_t>result != total:
            # A short write leaves a torn record at the end. Nothing is written behind it: nobody would find that.
            self.fail(f, <int>-result if result < 0 else ENOSPC)
            return False
        file.offset += total
        file.unsynced += total
        return True

    cdef void sync(self, uint64_t f) noexcept nogil:
        """Make durable what was written, then move the frontier."""
        cdef ReplicaFile* file = &self.files[f]
        cdef int number
        if file.unsynced:
            number = disk_sync(file.fd)
            if number:
                # What the kernel could not write is lost to us, whatever a second try would say.
                self.fail(f, number)
                return
            cxl_count(&self.counters.replication_syncs, 1)
            cxl_count(&self.counters.replicated_bytes, file.unsynced)
            file.synced += file.unsynced
            file.unsynced = 0
            file.retry_ns = 0
        file.index = file.next_index
        file.position = file.next_position
        file.nbytes += file.next_bytes
        file.next_bytes = 0
        self.publish(f)

    cdef void publish(self, uint64_t f) noexcept nogil:
        """Write our durable frontier for one source."""
        cdef ReplicaFile* file = &self.files[f]
        cdef uint64_t at = self.layout.replica(f // self.count, f % self.count, self.broker)
        cdef ReplicaLine line
        memset(&line, 0, sizeof(line))
        line.replicated_index = file.index
        line.replicated_position = file.position
        line.replicated_bytes = file.nbytes
        line.generation = file.generation
        line.failed = file.failed
        self.memory.invalidate(at, 64)
        if self.memory.load(at + 24) != file.generation:
            # Of an earlier topic. Whoever sees the new generation must not see the old position, and no hardware promises
            # that of two words of a line which are stored together.
            self.memory.store(at + 24, 0)
            self.memory.flush(at, 64)
            self.memory.fence()
            self.memory.store(at, 0)
            self.memory.store(at + 8, 0)
            self.memory.flush(at, 64)
            self.memory.fence()
        self.memory.write_line(at, &line)
        self.memory.flush(at, 64)
        self.memory.fence()

    # ---- how far the whole topic is durable --------------------------------------------------------------------

    cdef uint64_t durable_position(self, uint64_t t) noexcept nogil:
        """Messages below it are on every disk that the topic wants: what level 2 has promised at most."""
        cdef ReplicaTopic* topic = &self.topics[t]
        cdef uint64_t source, chosen, r, at, lowest = UNKNOWN
        for source in range(self.count):
            chosen = replicas_of(t, topic.generation, source, self.live_seen, self.count, topic.factor)
            if cxl_popcount(chosen) < <int64_t>topic.factor - 1:
                return 0
            for r in range(self.count):
                if chosen >> r & 1:
                    at = self.layout.replica(t, source, r)
                    self.memory.invalidate(at, 64)
                    if self.memory.load(at + 24) != topic.generation:
                        return 0
                    lowest = min(lowest, self.memory.load(at + 8))
        return lowest

    cdef void note_durable(self) noexcept nogil:
        """Write down how far the topics are durable, so that recovery knows damage from a tail that nobody had yet.

        It needs no sync of its own: with the next one it is on the disk, and without one it outlives the process.
        """
        cdef uint64_t i, t, durable
        cdef ReplicaFile* file
        cdef OrderEntry entry
        for i in range(self.active_count):
            file = &self.files[self.active[i]]
            t = self.active[i] // self.count
            if file.failed:
                continue
            durable = self.durable_position(t)
            if durable <= self.topics[t].noted or not self.know_frontiers(t):
                continue
            memset(&entry, 0, sizeof(entry))
            entry.position = file.position
            entry.broker = self.active[i] % self.count
            if self.write(self.active[i], 1, self.put_record(self.active[i], 0, file.index, durable, &entry)):
                self.topics[t].noted = durable

    # ---- files: seldom, with the GIL -----------------------------------------------------------------------------

    def wanted_topics(self) -> int:
        """How many topics this broker may hold replicas of."""
        return sum(1 for t in range(self.topic_count) if self.topics[t].generation)

    cdef void look_again(self) noexcept nogil:
        """Look at the topics. Where a head falls meanwhile nothing is left half open, and the next step looks again."""
        with gil:
            try:
                self.look()
            except BrokerUnavailable:
                self.control_seen = 0
            except BaseException as error:
                self.control_seen = 0
                self.failure = error

    cdef void begin_again(self, uint64_t f) noexcept nogil:
        with gil:
            try:
                self.begin_file(f)
            except BaseException as error:
                self.failure = error

    def look(self) -> None:
        """Open files for new replicated topics and new choices, close those of deleted ones.

        Raises `BrokerUnavailable` when the head fell: what was opened so far is whole, the rest is for the next look.
        """
        cdef uint64_t t, source, chosen, generation
        cdef TopicLine line
        self.active_count = 0
        for t in range(self.topic_count):
            self.memory.invalidate(self.layout.topic(t), 64)
            self.memory.read_line(self.layout.topic(t), &line)
            if not self.head.same():
                self.control_seen = 0       # look again, at what the next head says
                return
            generation = line.state >> 8 if line.state & 0xFF == TOPIC_ACTIVE else 0
            if self.topics[t].generation and self.topics[t].generation != generation:
                self.close_topic(t)
            if not generation:
                continue
            if not self.topics[t].generation:
                self.open_topic(t, generation, line.replication_factor)
            if self.topics[t].factor < 2:
                continue                    # nobody keeps copies of it
            for source in range(self.count):
                chosen = replicas_of(t, generation, source, self.live_seen, self.count, self.topics[t].factor)
                if chosen >> self.broker & 1:
                    if not self.files[t * self.count + source].wanted:
                        self.open_chain(t * self.count + source)
                    elif self.files[t * self.count + source].failed == EBADMSG:
                        self.files[t * self.count + source].retry_at = 0        # perhaps another head has it whole
                    self.active[self.active_count] = t * self.count + source
                    self.active_count += 1
                else:
                    self.close_chain(t * self.count + source)

    def open_topic(self, uint64_t t, uint64_t generation, uint64_t factor) -> None:
        """Begin to follow a topic."""
        try:
            self.folder.topic_appeared(t, generation)
        except OSError:
            cxl_count(&self.counters.replication_errors, 1)     # its files say the same, once there are any
        reader = OrderReader(self.memory, self.layout, t, generation)
        self.readers[t] = reader
        self.reader_pointers[t] = <void*>reader
        self.topics[t].factor = factor
        self.topics[t].noted = 0
        self.topics[t].generation = generation

    def close_topic(self, uint64_t t) -> None:
        """The topic was deleted, and its files with it."""
        generation = self.topics[t].generation
        for source in range(self.count):
            self.close_chain(t * self.count + source)
        memset(&self.topics[t], 0, sizeof(ReplicaTopic))
        try:
            self.folder.topic_deleted(t, generation)
        except OSError:
            cxl_count(&self.counters.replication_errors, 1)

    def open_chain(self, uint64_t f) -> None:
        """Become a replica. Raises `BrokerUnavailable`, and then is none, when the head fell."""
        cdef ReplicaFile* file = &self.files[f]
        index, position = self.start_of(f)
        memset(file, 0, sizeof(ReplicaFile))
        file.fd = -1                            # and never somebody else's descriptor
        file.wanted = 1
        file.generation = self.topics[f // self.count].generation
        file.index = index
        file.position = position
        self.begin_file(f)

    def close_chain(self, uint64_t f) -> None:
        """Be a replica no more; what is durable here stays, and so does the line that says so."""
        cdef ReplicaFile* file = &self.files[f]
        if file.wanted and file.fd >= 0:
            close(file.fd)
        memset(file, 0, sizeof(ReplicaFile))
        file.fd = -1

    cdef tuple start_of(self, uint64_t f):
        """Order index and position at which a chain has to begin: where our own disk ends, or with the oldest batch in memory.

        What other disks have does not count: a broker that took our place, or whose place we take, may be away for good.
        Raises `BrokerUnavailable` while no head serves.
        """
        cdef uint64_t t = f // self.count, at = self.layout.replica(t, f % self.count, self.broker), own = 0
        cdef OrderReader reader = self.readers[t]
        cdef OrderEntry entry
        cdef int status
        self.memory.invalidate(at, 64)
        if self.memory.load(at + 24) == self.topics[t].generation:
            own = self.memory.load(at)
        while True:
            found = reader.frontiers()
            oldest = found["reclaimed_index"], found["reclaimed_position"]
            if not oldest[0] < own <= found["committed_index"]:
                return oldest
            status = reader.peek(own - 1, &entry)
            if status == READ_OK or status == READ_GONE:
                return own, entry.position + entry.message_count
            if status == READ_DAMAGED and own < found["committed_index"]:
                status = reader.peek(own, &entry)
                if status == READ_OK or status == READ_GONE:
                    return own, entry.position
            if status == READ_DAMAGED or status == READ_CLOSED:
                return oldest
            # The frontier moved, or the head fell, between the two looks.

    cdef bint rotate(self, uint64_t f) noexcept nogil:
        """Close a file that is full and begin the next."""
        cdef ReplicaFile* file = &self.files[f]
        if file.next_index != file.index:
            self.sync(f)                        # what a file holds is durable before the next one begins
        if file.failed:
            return False
        close(file.fd)
        file.fd = -1
        self.begin_again(f)
        return not file.failed

    def begin_file(self, uint64_t f) -> None:
        """Begin a new file at the frontier: what was written behind it, into a file that failed, is written anew."""
        cdef ReplicaFile* file = &self.files[f]
        cdef uint64_t t = f // self.count
        file.next_index = file.index
        file.next_position = file.position
        file.next_bytes = file.unsynced = 0
        try:
            if file.failed and file.tag and not file.synced:
                self.folder.discard(file.tag)   # nobody was told of anything in it
            file.tag = 0
            file.synced = 0
            if not self.know_frontiers(t):
                raise BrokerUnavailable("no head says what is kept", address="head")
            file.fd, file.tag = self.folder.create(t, file.generation, f % self.count, file.position,
                                                   self.topics[t].first_position)
            file.offset = REPLICA_SUPERBLOCK
            file.failed = 0
        except BrokerUnavailable:
            file.failed = EAGAIN                # nobody says what the topic is: again, as soon as there is a head
            file.retry_at = 0
            return
        except Exception as error:
            self.fail(f, getattr(error, "errno", None) or errno_numbers.EIO)
            return
        self.publish(f)

    cdef void fail(self, uint64_t f, int number) noexcept nogil:
        cdef ReplicaFile* file = &self.files[f]
        if file.fd >= 0:
            close(file.fd)
        file.fd = -1
        file.failed = number
        file.retry_ns = min(16 * self.retry_ns, 2 * file.retry_ns) if file.retry_ns else self.retry_ns
        file.retry_at = self.clock.now_ns() + file.retry_ns
        if number == EBADMSG:
            file.retry_at = NEVER               # what is damaged in memory does not get better
        cxl_count(&self.counters.replication_errors, 1)
        self.publish(f)
        self.ring()                             # acks of level 2 are refused now

    def close(self) -> None:
        """Close all files."""
        cdef uint64_t f
        for f in range(self.topic_count * self.count):
            self.close_chain(f)
        self.active_count = 0


cdef uint8_t[64] ZEROES
memset(ZEROES, 0, 64)
