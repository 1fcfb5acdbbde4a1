"""Memory of hosts whose caches are not coherent: what a device, a host's cache and a host's door to them are made of.

    door (Memory) ──► line cache of its host ──fill, write-back──► device: mapping, a version per line
       store: fill, then dirty            load: a hit may be stale
       flush: dirty ─► pending            fence: this thread's pending lines ─► device
       bulk copy: pending and uncached    invalidate: written back when dirty, then dropped

One 64-byte line is the unit: a fill or a write-back is never torn, a record of two lines may be. At any time, seeded, a
dirty line may be written back, a clean one dropped, an absent one filled.
Below `line_bytes` memory is modelled line by line. Above, where payload lies, bytes go straight to the device and only
their visibility is modelled: a version and a reader's known version per line, so that payload stays fast.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from sim.cxl.primitives cimport (
    cxl_compare_and_swap, cxl_load_relaxed, cxl_now_ns, cxl_pause, cxl_read_line, cxl_store_release, cxl_write_line,
    cxl_yield,
)

cdef extern from "noncoherent.h" nogil:
    int cxl_thread_number()
    uint64_t cxl_caller()
    uint64_t cxl_random(uint64_t* state)
    uint32_t cxl_version_load(uint32_t* p)
    void cxl_version_store(uint32_t* p, uint32_t v)
    int cxl_version_take(uint32_t* p, uint32_t old)
    uint64_t CXL_EXTENT         # marks an extent of payload among pending lines
    uint64_t CXL_TRACE_PRIME


cdef enum:
    SPIN = 64
    STEAL = 1 << 20             # so many yields mean that whoever held a line is dead
    ORDER_MASK = 0xFFFFFF
    STATE_MASK = 7
    LOCKED = 8
    ORDER_SHIFT = 8             # 24 bits: when it was last stored, in stores of its host
    VERSION_SHIFT = 32          # the device's version that was filled or written back last
    AGENT_LISTS = 256
    AGENT_MINE = -1             # an agent is a thread; a simulation in one thread says which instead
    RECENT_LINES = 1024
    SIDE_HEADER = 4096
    HOST_HEADER = 4096

cpdef enum LineState:
    LINE_ABSENT = 0
    LINE_CLEAN = 1
    LINE_DIRTY = 2
    LINE_PENDING = 3            # flushed, and not fenced yet
    LINE_STREAMED = 4           # written around the cache, and not fenced yet
    LINE_COHERENT = 7           # of the coherent area: never cached

cpdef enum Fault:
    FAULT_NONE = 0
    FAULT_ATOMIC = 1            # atomic access to a line outside the coherent area
    FAULT_LINK = 2
    FAULT_DEVICE = 3

cpdef enum Operation:
    OP_LOAD = 1
    OP_STORE = 2
    OP_READ_LINE = 3
    OP_WRITE_LINE = 4
    OP_ATOMIC = 5
    OP_COPY_IN = 6
    OP_COPY_OUT = 7
    OP_FLUSH = 8
    OP_INVALIDATE = 9
    OP_FENCE = 10
    OP_FULL_FENCE = 11
    OP_POINTER = 12

cdef enum:                      # why an access takes the slow way in
    CONTROL_TRACE = 1
    CONTROL_CRASHED = 2
    CONTROL_LINK_LOST = 4
    CONTROL_EVICT = 8

cdef struct PendingList:        # what one thread has flushed or streamed and not fenced
    uint64_t lock
    uint64_t count
    uint64_t capacity
    uint64_t* entries           # a line; or, with the top bit, the first line of an extent, then its count

cdef struct Access:             # who accesses, and from where in the code
    int agent
    int role
    uint64_t site
    uint64_t offset

cdef struct Timing:             # in the device's header, the same for all processes; all 0: this machine's own
    uint64_t lost               # the device answers nobody
    uint64_t on
    uint64_t load_ns
    uint64_t peer_load_ns       # of a line that changed since this host had it
    uint64_t flush_ns
    uint64_t fence_ns
    uint64_t read_fs            # femtoseconds a byte
    uint64_t write_fs
    uint64_t read_until         # when what is under way has been read, for all hosts together
    uint64_t reserved[7]
    uint64_t write_until

cdef struct Host:
    uint8_t* base               # the device's bytes
    uint64_t line_bytes
    uint64_t bytes
    uint32_t* versions          # one a line below line_bytes; odd while it is written
    uint8_t* payload_versions   # one a line above
    Timing* device
    uint8_t* lines              # the cache: as long as what it caches
    uint64_t* states            # one a line
    uint8_t* payload_known      # version and one of each payload line that is cached here, 0 none
    uint64_t* header            # word 0: stores so far
    uint64_t control
    uint64_t operations
    uint64_t crash_at
    uint64_t trace_hash
    uint64_t eviction_period    # accesses between two spontaneous events, on average; 0 never
    uint64_t random
    uint64_t fault
    uint64_t fault_offset
    uint64_t fault_role
    uint64_t stale_payload      # lines of payload that were read stale
    uint64_t recent_next
    bint device_atomics
    void* observer              # a LineObserver, or NULL
    int number                  # the observer's number of this host
    void* observed              # what the observer keeps of each line of this host
    uint64_t recent[RECENT_LINES]
    PendingList pending[AGENT_LISTS]


cdef class LineObserver:
    """Is told of everything that happens to lines, while the line is locked. Does nothing itself."""

    cdef void stored(self, Host* h, uint64_t line, Access* who) noexcept nogil
    cdef void loaded(self, Host* h, uint64_t line, Access* who) noexcept nogil
    cdef void filled(self, Host* h, uint64_t line) noexcept nogil
    cdef void written_back(self, Host* h, uint64_t line, uint32_t expected, uint32_t found) noexcept nogil
    cdef void flushed(self, Host* h, uint64_t line, uint64_t state, Access* who) noexcept nogil
    cdef void invalidated(self, Host* h, uint64_t line, uint64_t state, Access* who) noexcept nogil
    cdef void fenced(self, Host* h, uint64_t drained, Access* who) noexcept nogil
    cdef void atomic(self, Host* h, uint64_t offset, bint allowed, Access* who) noexcept nogil
    cdef void crashed(self, Host* h) noexcept nogil
    cdef void payload_written(self, Host* h, uint64_t offset, uint64_t count, Access* who) noexcept nogil
    cdef void payload_fenced(self, Host* h, uint64_t offset, uint64_t count) noexcept nogil
    cdef void payload_read(self, Host* h, uint64_t offset, uint64_t count, uint64_t stale, Access* who) noexcept nogil
    cdef void called_from_python(self)
    cdef void watch(self, Host* h, object cache, object store)


# ---- lines: every function has the line locked unless it says otherwise ---------------------------------------------


cdef inline uint64_t lock_line(uint64_t* word) noexcept nogil:
    """Lock a line of a host's cache; its state word without the lock bit."""
    cdef uint64_t state, tries = 0
    while True:
        state = cxl_load_relaxed(word) & ~<uint64_t>LOCKED
        if cxl_compare_and_swap(word, state, state | LOCKED):
            return state
        tries += 1
        if tries < SPIN:
            cxl_pause()
        else:
            cxl_yield()
            if tries > STEAL:           # of a cache that processes share: its holder was killed
                cxl_store_release(word, state)


cdef inline uint32_t take_version(uint32_t* version) noexcept nogil:
    """Lock a line of the device; the version that it had."""
    cdef uint32_t now
    cdef uint64_t tries = 0
    while True:
        now = cxl_version_load(version) & ~<uint32_t>1
        if cxl_version_take(version, now):
            return now
        tries += 1
        if tries < SPIN:
            cxl_pause()
        else:
            cxl_yield()
            if tries > STEAL:
                cxl_version_store(version, now)


cdef inline uint64_t word_of(uint64_t state, uint64_t order, uint32_t version) noexcept nogil:
    return state | (order & ORDER_MASK) << ORDER_SHIFT | <uint64_t>version << VERSION_SHIFT


cdef inline uint64_t next_order(Host* h) noexcept nogil:
    h.header[0] += 1                    # near enough when threads meet here: it tells old stores from new ones
    return h.header[0]


cdef inline bint unreachable(Host* h, uint64_t offset) noexcept nogil:
    """Whether the device cannot be reached; the host's fault says why."""
    if h.control & CONTROL_LINK_LOST:
        if not h.fault:
            h.fault_offset = offset
            h.fault = FAULT_LINK
        return True
    if cxl_load_relaxed(&h.device.lost):
        if not h.fault:
            h.fault_offset = offset
            h.fault = FAULT_DEVICE
        return True
    return False


cdef inline void delay(int64_t since, uint64_t nanoseconds) noexcept nogil:
    """Spin until so long after `since`."""
    while cxl_now_ns() - since < <int64_t>nanoseconds:
        cxl_pause()


cdef inline void transfer(uint64_t* until, uint64_t nbytes, uint64_t femtoseconds) noexcept nogil:
    """Take the device's time for so many bytes, behind all that other hosts have under way."""
    cdef uint64_t now = cxl_now_ns(), before, after
    while True:
        before = cxl_load_relaxed(until)
        after = max(before, now) + nbytes * femtoseconds // 1000000
        if cxl_compare_and_swap(until, before, after):
            break
    delay(now, after - now)


cdef inline uint64_t fill(Host* h, uint64_t line) noexcept nogil:
    """Fetch an absent line from the device, whole; its new state word."""
    cdef int64_t since = cxl_now_ns() if h.device.on else 0
    cdef uint32_t known = h.states[line] >> VERSION_SHIFT
    cdef uint32_t* version = &h.versions[line]
    cdef uint32_t seen
    cdef uint64_t tries = 0
    if unreachable(h, line * 64):
        memset(h.lines + line * 64, 0xFF, 64)       # what a processor reads where nothing answers
        return word_of(LINE_CLEAN, 0, 0)
    while True:
        seen = cxl_version_load(version)
        if not seen & 1 and cxl_read_line(h.lines + line * 64, h.base + line * 64) and cxl_version_load(version) == seen:
            break
        tries += 1
        if tries > SPIN:
            cxl_yield()
        if tries > STEAL:
            cxl_version_store(version, seen & ~<uint32_t>1)
    if h.device.on:
        delay(since, h.device.load_ns if seen == known else h.device.peer_load_ns)
    h.recent[h.recent_next % RECENT_LINES] = line + 1
    h.recent_next += 1
    if h.observer != NULL:
        (<LineObserver>h.observer).filled(h, line)
    return word_of(LINE_CLEAN, 0, seen)


cdef inline uint64_t write_back(Host* h, uint64_t line, uint64_t state) noexcept nogil:
    """Write a line to the device, whole; its state word as a clean line."""
    cdef uint32_t found
    if unreachable(h, line * 64):
        return word_of(LINE_CLEAN, 0, 0)
    found = take_version(&h.versions[line])
    cxl_write_line(h.base + line * 64, h.lines + line * 64)
    if h.observer != NULL:
        (<LineObserver>h.observer).written_back(h, line, state >> VERSION_SHIFT, found)
    cxl_version_store(&h.versions[line], found + 2)
    return word_of(LINE_CLEAN, 0, found + 2)


cdef inline uint64_t present(Host* h, uint64_t line, uint64_t state) noexcept nogil:
    """Make a line ready to be stored to: filled, and what was flushed earlier written back first."""
    cdef uint64_t kind = state & STATE_MASK
    if kind == LINE_ABSENT:
        return fill(h, line)
    if kind == LINE_PENDING or kind == LINE_STREAMED:
        return write_back(h, line, state)
    return state


cdef inline void unlock_dirty(Host* h, uint64_t line, uint64_t state) noexcept nogil:
    cxl_store_release(&h.states[line], word_of(LINE_DIRTY, next_order(h), state >> VERSION_SHIFT))


cdef inline void ensure(Host* h, uint64_t line) noexcept nogil:
    """Fill a line unless it is there. Not locked before nor after."""
    cdef uint64_t state = lock_line(&h.states[line])
    if state & STATE_MASK == LINE_ABSENT:
        state = fill(h, line)
    cxl_store_release(&h.states[line], state)


cdef inline void drop(Host* h, uint64_t line) noexcept nogil:
    """Write a line back if it must be, and forget it. Not locked before nor after."""
    cdef uint64_t state = lock_line(&h.states[line]), kind = state & STATE_MASK
    if kind == LINE_DIRTY or kind == LINE_PENDING:
        write_back(h, line, state)
    if kind != LINE_STREAMED and kind != LINE_COHERENT:
        state = word_of(LINE_ABSENT, 0, cxl_version_load(&h.versions[line]) if kind != LINE_CLEAN
                        else state >> VERSION_SHIFT)
    cxl_store_release(&h.states[line], state)


cdef inline void settle(Host* h, uint64_t line) noexcept nogil:
    """What a fence, or time, does to a pending line. Not locked before nor after."""
    cdef uint64_t state = lock_line(&h.states[line]), kind = state & STATE_MASK
    if kind == LINE_PENDING:
        state = write_back(h, line, state)
    elif kind == LINE_STREAMED:
        write_back(h, line, state)
        state = 0
    cxl_store_release(&h.states[line], state)


cdef inline void publish_payload(Host* h, uint64_t line, uint64_t count) noexcept nogil:
    """Payload is in the device: cached copies of it are stale from now on. Lines count from line_bytes."""
    cdef uint8_t* version = h.payload_versions + line
    cdef uint64_t i
    if h.observer != NULL:
        (<LineObserver>h.observer).payload_fenced(h, h.line_bytes + line * 64, count * 64)
    for i in range(count):
        version[i] = 0 if version[i] == 254 else version[i] + 1


# ---- what a thread has flushed and not fenced ------------------------------------------------------------------------


cdef inline void add_pending(PendingList* mine, uint64_t first, uint64_t second, int count) noexcept nogil:
    cdef uint64_t* grown
    while not cxl_compare_and_swap(&mine.lock, 0, 1):
        cxl_pause()
    if mine.count + 2 > mine.capacity:
        grown = <uint64_t*>realloc(mine.entries, max(64, 2 * mine.capacity) * 8)
        if grown == NULL:
            cxl_store_release(&mine.lock, 0)
            return                      # never fenced: as if the fence were missing, which somebody will see
        mine.entries = grown
        mine.capacity = max(64, 2 * mine.capacity)
    mine.entries[mine.count] = first
    mine.entries[mine.count + 1] = second
    mine.count += count
    cxl_store_release(&mine.lock, 0)


cdef inline uint64_t drain(Host* h, PendingList* mine) noexcept nogil:
    """What a fence does; how many entries there were."""
    cdef uint64_t i = 0, done = 0
    cdef int64_t since = cxl_now_ns() if h.device.on else 0
    while not cxl_compare_and_swap(&mine.lock, 0, 1):
        cxl_pause()
    while i < mine.count:
        if mine.entries[i] & CXL_EXTENT:
            publish_payload(h, mine.entries[i] & ~CXL_EXTENT, mine.entries[i + 1])
            i += 1
        else:
            settle(h, mine.entries[i])
        i += 1
        done += 1
    mine.count = 0
    cxl_store_release(&mine.lock, 0)
    if h.device.on and done:
        delay(since, h.device.fence_ns)
    return done


cdef inline void spontaneous(Host* h) noexcept nogil:
    """One thing that caches do by themselves, to a line that was in use lately or to its neighbour."""
    cdef uint64_t number = cxl_random(&h.random), line, state, kind
    if h.recent_next == 0:
        return
    line = h.recent[number % min(h.recent_next, <uint64_t>RECENT_LINES)]
    line -= 1
    if number >> 32 & 3 == 0:
        line ^= 1                       # the neighbour
    if line * 64 >= h.line_bytes or unreachable(h, line * 64):
        return
    state = lock_line(&h.states[line])
    kind = state & STATE_MASK
    if kind == LINE_ABSENT:
        state = fill(h, line)
    elif kind == LINE_CLEAN:
        state = 0
    elif kind == LINE_DIRTY or kind == LINE_PENDING:
        state = write_back(h, line, state)
    elif kind == LINE_STREAMED:
        write_back(h, line, state)
        state = 0
    cxl_store_release(&h.states[line], state)
