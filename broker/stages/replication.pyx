"""Replication: copies the ordered batches of other brokers from memory to this broker's disk.

A replica file is append-only: a superblock of 4,096 bytes, then records of a header (the order entry, checksums) and the
payload, padded to 8 bytes. The durable frontier moves only after fdatasync; a failed write or sync is final for that
topic's file: its frontier never moves again, and the error number is in the replica's line.
"""

import errno as errno_numbers
import os

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from broker.layout cimport BrokerCounters, Layout, OrderEntry, ReplicaLine, TOPIC_ACTIVE, TopicLine
from broker.doorbell cimport Doorbell
from broker.reader cimport OrderReader, READ_DAMAGED, READ_LOST, READ_OK
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_count, cxl_crc32c

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec* parts, int count)

cdef extern from "<unistd.h>" nogil:
    int fdatasync(int fd)

cdef enum:
    STEP_BYTES = 8388608
    STEP_ENTRIES = 1024
    RECORD_HEADER_BYTES = 80
    RECORD_MAGIC = 0x4C51584D
    EBADMSG = 74

REPLICA_SUPERBLOCK_BYTES = 4096
REPLICA_RECORD_HEADER_BYTES = RECORD_HEADER_BYTES
REPLICA_RECORD_MAGIC = RECORD_MAGIC

cdef packed struct RecordHeader:
    OrderEntry entry
    uint32_t magic
    uint32_t payload_crc
    uint32_t header_crc                 # over all before it
    uint32_t padding_bytes

cdef struct ReplicaTopic:
    uint64_t generation
    uint64_t replication_factor
    uint64_t index                      # next order entry to look at
    uint64_t position
    uint64_t nbytes
    int fd
    int failed


cdef class Replication(Stage):
    """The replica role of one broker, for all topics with a replication factor above 1. Runs in a thread of its own:
    it waits for the disk.

    `folder` receives one file per topic generation; `superblock` makes its first 4,096 bytes from the topic's number.
    `doorbells` has one a broker, rung when something has become durable here.
    """

    cdef Memory memory
    cdef Layout layout
    cdef int broker
    cdef object folder
    cdef object superblock
    cdef uint64_t version_seen
    cdef ReplicaTopic* topics
    cdef uint64_t topic_count
    cdef BrokerCounters* counters
    cdef list readers
    cdef void** reader_pointers         # into `readers`, reached without the GIL
    cdef list doorbell_objects
    cdef void** doorbells               # one a broker: acks of level 2 wait for our frontier
    cdef uint64_t doorbell_count

    def __cinit__(self):
        self.topics = NULL

    def __init__(self, Memory memory, Layout layout, int broker, folder, superblock, doorbells=()):
        self.memory = memory
        self.layout = layout
        self.broker = broker
        self.folder = folder
        self.superblock = superblock
        self.topic_count = layout.g.topic_count_max
        self.topics = <ReplicaTopic*>calloc(self.topic_count, sizeof(ReplicaTopic))
        self.counters = <BrokerCounters*>memory.coherent_area(layout.broker_counters(broker))
        self.readers = [None] * self.topic_count
        self.reader_pointers = <void**>calloc(self.topic_count, sizeof(void*))
        self.doorbell_objects = list(doorbells)
        self.doorbells = <void**>calloc(len(self.doorbell_objects) + 1, sizeof(void*))
        if self.topics == NULL or self.reader_pointers == NULL or self.doorbells == NULL:
            raise MemoryError
        self.doorbell_count = len(self.doorbell_objects)
        for i, bell in enumerate(self.doorbell_objects):
            assert isinstance(bell, Doorbell)
            self.doorbells[i] = <void*>bell

    def __dealloc__(self):
        if self.topics != NULL:
            free(self.topics)
            free(self.reader_pointers)
            free(self.doorbells)

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t version, t
        cdef int64_t work = 0
        self.memory.invalidate(self.layout.directory(), 64)
        version = self.memory.load(self.layout.directory())
        if version != self.version_seen:
            self.version_seen = version
            with gil:
                self.look()
        for t in range(self.topic_count):
            if self.topics[t].generation and not self.topics[t].failed:
                work += self.replicate(t)
        return work

    def wanted_topics(self) -> int:
        """How many topics this broker may hold replicas of."""
        return sum(1 for t in range(self.topic_count) if self.topics[t].generation)

    def look(self) -> None:
        """Open files for new replicated topics, close those of deleted ones."""
        cdef uint64_t t, generation
        cdef TopicLine line
        cdef ReplicaTopic* topic
        for t in range(self.topic_count):
            topic = &self.topics[t]
            self.memory.invalidate(self.layout.topic(t), 64)
            self.memory.read_line(self.layout.topic(t), &line)
            generation = line.state >> 8 if line.state & 0xFF == TOPIC_ACTIVE else 0
            if topic.generation and topic.generation != generation:
                if topic.fd >= 0:
                    os.close(topic.fd)
                memset(topic, 0, sizeof(ReplicaTopic))
            if generation and not topic.generation and line.replication_factor > 1:
                self.open_topic(t, generation, line.replication_factor)

    def open_topic(self, uint64_t t, uint64_t generation, uint64_t replication_factor) -> None:
        """Create the replica file of a topic; a failure is reported in the replica's line."""
        cdef ReplicaTopic* topic = &self.topics[t]
        memset(topic, 0, sizeof(ReplicaTopic))
        topic.fd = -1                       # and never somebody else's descriptor
        topic.generation = generation
        topic.replication_factor = replication_factor
        reader = OrderReader(self.memory, self.layout, t, generation)
        self.readers[t] = reader
        self.reader_pointers[t] = <void*>reader
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            name, first = self.superblock(t, generation)
            topic.fd = os.open(os.path.join(self.folder, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_EXCL,
                               0o600)
            if os.write(topic.fd, first.ljust(REPLICA_SUPERBLOCK_BYTES, b"\0")) < REPLICA_SUPERBLOCK_BYTES:
                raise OSError(errno_numbers.ENOSPC, "the replica's superblock was not written")
            os.fdatasync(topic.fd)
            folder_fd = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder_fd)
            finally:
                os.close(folder_fd)
        except Exception as error:
            self.fail(t, getattr(error, "errno", None) or errno_numbers.EIO)
        self.publish(t)

    cdef void fail(self, uint64_t t, int number) noexcept nogil:
        self.topics[t].failed = number
        cxl_count(&self.counters.replication_errors, 1)
        self.publish(t)

    cdef void publish(self, uint64_t t) noexcept nogil:
        """Write our durable frontier for every broker that we are a replica of."""
        cdef ReplicaTopic* topic = &self.topics[t]
        cdef ReplicaLine line
        cdef uint64_t k, source, at, count = self.layout.g.broker_count
        memset(&line, 0, sizeof(line))
        line.replicated_index = topic.index
        line.replicated_position = topic.position
        line.replicated_bytes = topic.nbytes
        line.generation = topic.generation
        line.failed = topic.failed
        for k in range(1, topic.replication_factor):
            source = (self.broker + count - k) % count
            at = self.layout.replica(t, source, self.broker)
            self.memory.write_line(at, &line)
            self.memory.flush(at, 64)
        self.memory.fence()
        for k in range(self.doorbell_count):
            (<Doorbell>self.doorbells[k]).ring()

    cdef bint is_mine(self, ReplicaTopic* topic, uint64_t source) noexcept nogil:
        cdef uint64_t count = self.layout.g.broker_count
        cdef uint64_t k = (self.broker + count - source) % count
        return 1 <= k < topic.replication_factor

    cdef int64_t replicate(self, uint64_t t) noexcept nogil:
        """Append what is committed and not yet durable here, sync once, and move the frontier."""
        cdef ReplicaTopic* topic = &self.topics[t]
        cdef OrderEntry entry
        cdef uint64_t written = 0, index = topic.index, position = topic.position
        cdef int64_t done = 0
        cdef int status = READ_OK
        while done < STEP_ENTRIES and written < STEP_BYTES:
            status = (<OrderReader>self.reader_pointers[t]).peek(index, &entry)
            if status != READ_OK:
                break
            if self.is_mine(topic, entry.broker):
                if not self.append(t, &entry):
                    return done + 1
                written += entry.payload_bytes + RECORD_HEADER_BYTES
            index += 1
            position = entry.position + entry.message_count
            done += 1
        if done == 0 and (status == READ_DAMAGED or status == READ_LOST):
            self.fail(t, EBADMSG)               # a replica with a hole would be found too late
        if done == 0:
            return 0
        if written and fdatasync(topic.fd) != 0:
            # What the kernel could not write is lost to us, whatever a second try would say.
            self.fail(t, errno)
            return done
        if written:
            cxl_count(&self.counters.replication_syncs, 1)
            cxl_count(&self.counters.replicated_bytes, written)
        topic.index = index
        topic.position = position
        topic.nbytes += written
        self.publish(t)
        return done

    cdef bint append(self, uint64_t t, OrderEntry* entry) noexcept nogil:
        cdef RecordHeader header
        cdef iovec parts[3]
        cdef uint64_t zero = 0, total, sent = 0
        cdef ssize_t result
        cdef const uint8_t* payload
        self.memory.invalidate(entry.payload_offset, entry.payload_bytes)
        payload = self.memory.payload(entry.payload_offset, entry.payload_bytes)
        header.entry = entry[0]
        header.magic = RECORD_MAGIC
        header.padding_bytes = (8 - entry.payload_bytes % 8) % 8
        header.payload_crc = cxl_crc32c(0, payload, entry.payload_bytes)
        header.header_crc = cxl_crc32c(0, &header, 72)
        parts[0].iov_base = &header
        parts[0].iov_len = sizeof(header)
        parts[1].iov_base = <void*>payload
        parts[1].iov_len = entry.payload_bytes
        parts[2].iov_base = &zero
        parts[2].iov_len = header.padding_bytes
        total = sizeof(header) + entry.payload_bytes + header.padding_bytes
        result = writev(self.topics[t].fd, parts, 3)
        if result < 0 or <uint64_t>result != total:
            # A short write leaves a torn record at the end; recovery cuts it off. Nothing after it would be found.
            self.fail(t, errno if result < 0 else 28)
            return False
        return True

    def close(self) -> None:
        """Close all files."""
        cdef uint64_t t
        for t in range(self.topic_count):
            if self.topics[t].generation and self.topics[t].fd >= 0:
                os.close(self.topics[t].fd)
            self.topics[t].generation = 0
