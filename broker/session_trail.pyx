"""Which batches of each publisher were in the log, so that it is known when the log itself is reclaimed.

A session has at most `TRAIL_WINDOW` batches under way: of each client the latest session is kept, with its highest batch
and a bit for each of the window below it. What lies further back is in the log for certain: the sequencer took the highest
one only because of that.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from broker.replica_record cimport REPLICA_ALIGNMENT, REPLICA_MAGIC, REPLICA_SUPERBLOCK, ReplicaRecord
from sim.cxl.primitives cimport cxl_crc32c

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void* data, size_t nbytes, int64_t offset)

cdef enum:
    WINDOW = 256
    CHUNK_BYTES = 1048576

TRAIL_WINDOW = WINDOW

cdef struct Seen:
    uint64_t client_id
    uint64_t epoch
    uint64_t highest
    uint64_t position                   # behind its last message
    uint64_t bits[4]                    # bit n % 256: batch n of the last 256 up to the highest
    uint64_t used


cdef class SessionTrail:
    """The latest session of each client, as far as records of batches told of it."""

    cdef Seen* seen
    cdef uint64_t room
    cdef uint64_t count

    def __cinit__(self):
        self.room = 64
        self.count = 0
        self.seen = <Seen*>calloc(self.room, sizeof(Seen))
        if self.seen == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.seen)

    def __len__(self) -> int:
        return self.count

    cdef Seen* find(self, uint64_t client) noexcept nogil:
        """The place of a client; NULL when there is no memory for it."""
        cdef uint64_t at = (client ^ client >> 29) * <uint64_t>0x9E3779B97F4A7C15 >> 20, i
        cdef Seen* old = self.seen
        cdef uint64_t old_room = self.room
        while self.seen[at % self.room].used:
            if self.seen[at % self.room].client_id == client:
                return &self.seen[at % self.room]
            at += 1
        if 2 * self.count >= self.room:
            self.seen = <Seen*>calloc(2 * old_room, sizeof(Seen))
            if self.seen == NULL:
                self.seen = old
                return NULL
            self.room = 2 * old_room
            self.count = 0
            for i in range(old_room):
                if old[i].used:
                    self.find(old[i].client_id)[0] = old[i]
            free(old)
            return self.find(client)
        self.count += 1
        self.seen[at % self.room].used = 1
        self.seen[at % self.room].client_id = client
        return &self.seen[at % self.room]

    cdef bint take(self, uint64_t client, uint64_t epoch, uint64_t sequence, uint64_t end) noexcept nogil:
        cdef Seen* seen = self.find(client)
        cdef uint64_t each
        if seen == NULL:
            return False
        if seen.used == 1 or epoch > seen.epoch:            # its first batch
            memset(seen.bits, 0, sizeof(seen.bits))
            seen.used = 2
            seen.epoch = epoch
            seen.highest = sequence
            seen.position = end
        elif epoch < seen.epoch:
            return True
        seen.position = max(seen.position, end)
        if sequence > seen.highest:
            if sequence - seen.highest >= WINDOW:
                memset(seen.bits, 0, sizeof(seen.bits))
            else:
                for each in range(seen.highest + 1, sequence + 1):
                    seen.bits[each % WINDOW // 64] &= ~(<uint64_t>1 << (each % 64))
            seen.highest = sequence
        if seen.highest - sequence < WINDOW:
            seen.bits[sequence % WINDOW // 64] |= <uint64_t>1 << (sequence % 64)
        return True

    def note(self, uint64_t client, uint64_t epoch, uint64_t sequence, uint64_t end) -> None:
        """A batch is, or was, in the log; `end` is the position behind it."""
        if not self.take(client, epoch, sequence, end):
            raise MemoryError

    def scan(self, int descriptor, uint32_t tag, uint64_t size, uint64_t below):
        """Note the batches of a replica file that end at or before position `below`, from its record headers.

        Returns (position behind the last batch, whether the records go to the end of the file without a break).
        """
        cdef uint64_t end = 0, at = REPLICA_SUPERBLOCK, base = 0, held = 0, payload
        cdef ReplicaRecord* record
        cdef ssize_t got
        cdef bint whole = True, failed = False
        cdef uint8_t* chunk = <uint8_t*>malloc(CHUNK_BYTES)
        if chunk == NULL:
            raise MemoryError
        with nogil:
            while at + sizeof(ReplicaRecord) <= size:
                if at + sizeof(ReplicaRecord) > base + held or at < base:
                    got = pread(descriptor, chunk, CHUNK_BYTES, at)
                    if got < <ssize_t>sizeof(ReplicaRecord):
                        whole = False
                        break
                    base, held = at, got
                record = <ReplicaRecord*>(chunk + (at - base))
                if (record.magic != REPLICA_MAGIC or record.file_tag != tag
                        or record.header_crc != cxl_crc32c(0, record, sizeof(ReplicaRecord) - 4)
                        or at + sizeof(ReplicaRecord) + record.entry.payload_bytes > size):
                    whole = False
                    break
                if record.entry.message_count:
                    end = max(end, record.entry.position + record.entry.message_count)
                    if record.entry.position + record.entry.message_count <= below and not self.take(
                            record.entry.client_id, record.entry.session_epoch, record.entry.batch_sequence,
                            record.entry.position + record.entry.message_count):
                        failed = True
                        break
                payload = record.entry.payload_bytes
                at += sizeof(ReplicaRecord) + (payload + REPLICA_ALIGNMENT - 1) // REPLICA_ALIGNMENT * REPLICA_ALIGNMENT
        free(chunk)
        if failed:
            raise MemoryError
        return end, whole

    def clients(self) -> list:
        """(client, epoch, highest batch, position behind its last message, window as a number) of each client."""
        found = []
        for i in range(self.room):
            if self.seen[i].used == 2:
                bits = sum(<object>self.seen[i].bits[k] << 64 * k for k in range(4))
                found.append((self.seen[i].client_id, self.seen[i].epoch, self.seen[i].highest, self.seen[i].position,
                              bits))
        return found

    def add(self, client: int, epoch: int, highest: int, position: int, bits: int) -> None:
        """Take in what `clients` of another trail said."""
        for sequence in range(max(0, highest - WINDOW + 1), highest + 1):
            if bits >> sequence % WINDOW & 1:
                self.note(client, epoch, sequence, position)
