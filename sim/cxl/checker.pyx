"""The coherence checker. How it reasons is in checker.pxd; what its reports say to people, in broker/coherence.py."""

cimport cython
import sys

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strcmp, strstr

from sim.cxl.cachelines cimport (
    Access, Host, LINE_ABSENT, LINE_CLEAN, LINE_COHERENT, LINE_DIRTY, LINE_PENDING, LINE_STREAMED, LineObserver,
    SIDE_HEADER, STATE_MASK, VERSION_SHIFT, cxl_version_load,
)
from sim.cxl.primitives cimport (
    cxl_compare_and_swap, cxl_fetch_add, cxl_load_acquire, cxl_load_relaxed, cxl_now_ns, cxl_pause, cxl_store_release,
    cxl_wall_ns, cxl_yield,
)

from sim.cxl.region import private_mapping

cdef extern from "<dlfcn.h>" nogil:
    ctypedef struct Dl_info:
        const char* dli_fname
        void* dli_fbase
    int dladdr(const void* address, Dl_info* info)

cdef extern from "noncoherent.h" nogil:
    uint64_t CXL_HASH_PRIME, CXL_TRACE_PRIME

cdef extern from *:
    """
    static __thread uint64_t python_site;       /* the Python function that this thread is in a call of */
    static inline void set_python_site(uint64_t site) { python_site = site; }
    """
    uint64_t python_site
    void set_python_site(uint64_t site) nogil

cdef enum:
    STALE_POLLS = 32            # hits of one stale copy, without an invalidate, that are no accident: its words, four times
    POLLS_MAX = 60000
    LOCK_TRIES = 1 << 22
    PYTHON = 0xFFFFFFFF         # an address of the Python face of Memory: the caller's frame is the place


cdef inline void lock(uint64_t* word) noexcept nogil:
    cdef uint64_t tries = 0
    while not cxl_compare_and_swap(word, 0, 1):
        tries += 1
        if tries % 64:
            cxl_pause()
        else:
            cxl_yield()
        if tries > LOCK_TRIES:          # whoever had it was killed
            return


cdef inline void unlock(uint64_t* word) noexcept nogil:
    cxl_store_release(word, 0)


AGENTS_MAX = AGENTS - 2             # threads of all processes that one run can tell apart


cdef uint64_t sum_of(const uint8_t* line) noexcept nogil:
    cdef const uint64_t* words = <const uint64_t*>line
    cdef uint64_t total = CXL_TRACE_PRIME
    cdef int i
    for i in range(8):
        total = (total ^ words[i]) * CXL_TRACE_PRIME
    return total


@cython.no_gc_clear                     # views that the collector takes later still publish through it
cdef class Checker(LineObserver):
    """Observes every host of one device.

    `classes` has a byte a line: the number of its entry in `class_table`, (name, mask of roles that may store,
    ClassFlags). `covers` lists frontiers: (name of their class, first one, strides, first line that they pass, strides, ring
    stride, ring count). `head` is (offset of the word whose low byte names the head, role that only a head has).
    `shared` is a buffer of `shared_bytes` zero bytes when several processes are checked together.
    """

    def __cinit__(self):
        self.agents = <uint8_t*>calloc(HOSTS * LOCAL_AGENTS, 1)
        self.known = <uint32_t*>calloc(AGENTS * AGENTS, 4)
        if self.agents == NULL or self.known == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.agents)
        free(self.known)

    def __init__(self, device, classes=None, class_table=(("line", ~0 & 0xFFFF, CLASS_REACHED),), shared=None, covers=(),
                 head=(0, 0)):
        cdef Py_buffer view
        cdef uint64_t number
        self.device = device
        self.line_bytes = device.line_bytes
        self.line_count = device.line_bytes // 64
        self.shared_owner = private_mapping(self.shared_bytes(device)) if shared is None else shared
        PyObject_GetBuffer(self.shared_owner, &view, PyBUF_WRITABLE)
        self.shared = <Shared*>view.buf
        PyBuffer_Release(&view)
        self.lines = <Line*>(<uint8_t*>self.shared + (sizeof(Shared) + 4095) // 4096 * 4096)
        self.granules = <Granule*>(self.lines + self.line_count)
        self.class_owner = bytes(self.line_count) if classes is None else classes
        PyObject_GetBuffer(self.class_owner, &view, PyBUF_SIMPLE)
        self.classes = <const uint8_t*>view.buf
        PyBuffer_Release(&view)
        for number, (_, roles, flags) in enumerate(class_table):
            self.roles[number] = roles
            self.flags[number] = flags
        self.head_word, self.head_role, self.broker_hosts = head[0], head[1], list(range(HOSTS))
        for number, each in enumerate(covers):
            self.add_cover(number, *each, [name for name, _, _ in class_table])
        self.stores, self.python_sites = [], {}
        self.stranded_ns = 2_000_000_000
        if self.shared.sites == 0:
            self.new_site(b"an unknown place")
        if self.shared.agents == 0:
            self.shared.agents = 1          # agent 0 is nobody

    def tell_hosts(self, hosts) -> None:
        """The host of each broker; without it, each is a host of its own."""
        for broker, host in enumerate(hosts):
            self.broker_hosts[broker] = host

    def add_cover(self, uint64_t number, frontier, first, strides, covered, others, ring_stride, ring_count, names):
        cdef Cover* cover = &self.covers[number]
        self.cover_of[names.index(frontier)] = number + 1
        cover.first, cover.covered, cover.ring_stride, cover.ring_count = first, covered, ring_stride, ring_count
        for stride, other in sorted(zip(strides, others, strict=True), reverse=True):
            cover.strides[cover.index_count], cover.covered_strides[cover.index_count] = stride, other
            cover.index_count += 1

    @staticmethod
    def shared_bytes(device) -> int:
        """Bytes that processes share; pages that are never touched cost nothing."""
        return ((sizeof(Shared) + 4095) // 4096 * 4096 + device.line_bytes // 64 * sizeof(Line)
                + (device.bytes - device.line_bytes + GRANULE - 1) // GRANULE * sizeof(Granule))

    @staticmethod
    def store_bytes(device) -> int:
        """Bytes that are kept of one host's copies."""
        return device.line_bytes // 64 * sizeof(Copy)

    def new_host(self) -> int:
        """A number for a host that is no broker."""
        return HOSTS // 2 + cxl_fetch_add(&self.shared.hosts, 1) % (HOSTS // 2)

    cdef void watch(self, Host* h, object cache, object store):
        cdef Py_buffer view
        store = private_mapping(self.store_bytes(self.device)) if store is None else store
        PyObject_GetBuffer(store, &view, PyBUF_WRITABLE)
        h.observed = view.buf
        self.watched[self.watched_count % HOSTS] = h.states
        self.watched_count += 1
        PyBuffer_Release(&view)
        self.stores += [cache, store]

    # ---- who and where -------------------------------------------------------------------------------------------------

    cdef int agent_of(self, Host* h, Access* who) noexcept nogil:
        cdef uint8_t* place = &self.agents[h.number % HOSTS * LOCAL_AGENTS + who.agent % LOCAL_AGENTS]
        cdef uint64_t number
        if place[0] == 0:
            number = cxl_fetch_add(&self.shared.agents, 1)
            place[0] = <uint8_t>min(number, <uint64_t>AGENTS - 1)
        return place[0]

    cdef uint32_t new_site(self, const char* text) noexcept nogil:
        cdef uint64_t i
        lock(&self.shared.lock)
        for i in range(self.shared.sites):
            if strcmp(self.shared.site_text[i], text) == 0:
                unlock(&self.shared.lock)
                return i
        i = self.shared.sites
        if i < SITES:
            snprintf(self.shared.site_text[i], SITE_BYTES, "%s", text)
            cxl_store_release(&self.shared.sites, i + 1)
        unlock(&self.shared.lock)
        return i if i < SITES else 0

    cdef uint32_t site_of(self, uint64_t address) noexcept nogil:
        """Number of a place in the code, the same in every process."""
        cdef uint64_t slot = (address * CXL_HASH_PRIME) >> 52, tries
        cdef Dl_info info
        cdef char text[SITE_BYTES]
        cdef uint32_t site = 0
        for tries in range(SITES):
            if self.addresses[slot] == address:
                site = self.address_sites[slot]
                return <uint32_t>python_site if site == PYTHON else site
            if self.addresses[slot] == 0:
                break
            slot = (slot + 1) % SITES
        if dladdr(<const void*>address, &info) and info.dli_fname != NULL:
            if strstr(info.dli_fname, "sim/cxl/memory.") != NULL:
                site = PYTHON
            else:
                snprintf(text, SITE_BYTES, "%s+0x%lx", info.dli_fname, <unsigned long>(address - <uint64_t>info.dli_fbase))
                site = self.new_site(text)
        lock(&self.table_lock)
        if self.addresses[slot] == 0:
            self.address_sites[slot] = site
            cxl_store_release(&self.addresses[slot], address)
        unlock(&self.table_lock)
        return <uint32_t>python_site if site == PYTHON else site

    cdef void called_from_python(self):
        frame = sys._getframe(0)
        key = (frame.f_code, frame.f_lineno)
        site = self.python_sites.get(key)
        if site is None:
            text = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
            site = self.python_sites[key] = self.new_site(text[-SITE_BYTES + 1:].encode(errors="replace"))
        set_python_site(site)

    # ---- clocks --------------------------------------------------------------------------------------------------------

    cdef void fill_store(self, Store* store, Host* h, int agent, Access* who) noexcept nogil:
        cdef uint32_t* mine = self.known + agent * AGENTS
        mine[agent] += 1
        store.clock = mine[agent]
        store.agent = agent
        store.role = who.role
        store.host = h.number
        store.site = self.site_of(who.site)
        store.interval = self.intervals[agent]
        store.offset = who.offset
        memcpy(store.known, mine, AGENTS * 4)

    cdef void learn(self, int agent, Store* store) noexcept nogil:
        """The agent sees this store: it knows what the store's agent knew."""
        cdef uint32_t* mine = self.known + agent * AGENTS
        cdef int i
        if store.clock == 0 or mine[store.agent] >= store.clock or store.agent == AGENTS - 1 or agent == AGENTS - 1:
            return
        for i in range(AGENTS - 1):
            if i != agent and store.known[i] > mine[i]:
                mine[i] = store.known[i]

    # ---- what happens ----------------------------------------------------------------------------------------------------

    cdef void stored(self, Host* h, uint64_t line, Access* who) noexcept nogil:
        cdef int agent = self.agent_of(h, who)
        cdef Line* record = &self.lines[line]
        cdef Copy* copy = <Copy*>h.observed + line
        cdef uint8_t kind = self.classes[line]
        if self.flags[kind] & CLASS_IGNORED:
            return
        if not self.roles[kind] >> who.role & 1:
            self.report_store(KIND_WRONG_ROLE, line * 64, &copy.store, h, agent, who, 0, 0)
        self.learn(agent, &copy.store)          # its own host's earlier store to the line
        self.fill_store(&copy.store, h, agent, who)
        lock(&record.lock)
        if record.state and record.newest.host != h.number:
            self.report_store(KIND_LOST_UPDATE, line * 64, &record.newest, h, agent, who, 0, 0)
        if not record.state:
            record.stored_ns = cxl_now_ns()
            record.polls = 0
        record.state = LINE_DIRTY
        memcpy(&record.newest, &copy.store, sizeof(Store))
        unlock(&record.lock)
        if self.cover_of[kind] and who.offset % 64 == 0:
            self.check_covered(&self.covers[self.cover_of[kind] - 1], h, line * 64, agent, who)

    cdef void check_covered(self, Cover* cover, Host* h, uint64_t offset, int agent, Access* who) noexcept nogil:
        """A frontier was stored: it may get to memory at any moment, so what it passes must be there by now."""
        cdef uint64_t now = cxl_load_relaxed(h.lines + offset), at = cxl_load_relaxed(h.base + offset)
        cdef uint64_t ring = cover.covered, rest = offset - cover.first, i, other = 0, site = 0
        cdef Line* record
        cdef Store seen
        cdef int kind
        for i in range(cover.index_count):
            ring += rest // cover.strides[i] * cover.covered_strides[i]
            rest %= cover.strides[i]
        for at in range(max(at, now - min(now, cover.ring_count)), now):
            i = ring // 64 + at % cover.ring_count * cover.ring_stride // 64
            record = &self.lines[i]
            if record.state == 0:
                continue
            lock(&record.lock)
            kind = KIND_PUBLISHED if record.state and record.newest.host == h.number else 0
            if kind and record.state == LINE_DIRTY and self.wasted_since(&record.newest, &other, &site):
                kind = KIND_WRONG_FLUSH
            memcpy(&seen, &record.newest, sizeof(Store))
            unlock(&record.lock)
            if kind:
                self.report_store(kind, i * 64, &seen, h, agent, who, other if kind == KIND_WRONG_FLUSH else offset, site)

    cdef void loaded(self, Host* h, uint64_t line, Access* who) noexcept nogil:
        cdef int agent
        cdef Copy* copy = <Copy*>h.observed + line
        if self.flags[self.classes[line]] & CLASS_IGNORED:
            return
        agent = self.agent_of(h, who)
        # What this very line says is not yet known when it is judged: only what others said makes it a mistake.
        self.check_load(h, line, agent, who)
        self.learn(agent, &copy.store)
        self.last_line[agent] = line

    cdef void check_load(self, Host* h, uint64_t line, int agent, Access* who) noexcept nogil:
        cdef Line* record = &self.lines[line]
        cdef Copy* copy = <Copy*>h.observed + line
        cdef uint32_t* mine = self.known + agent * AGENTS
        cdef bint reached = (self.flags[self.classes[line]] & CLASS_REACHED) != 0
        cdef uint64_t other = 0, site = 0
        cdef int kind = 0
        cdef Store seen
        if record.memory.clock == 0 and record.newest.clock == 0:
            return
        lock(&record.lock)
        if record.state and record.newest.host != h.number:
            if record.polls < POLLS_MAX:
                record.polls += 1
            record.poll_host, record.poll_role, record.poll_site = h.number, who.role, self.site_of(who.site)
            if reached and record.newest.agent != AGENTS - 1 and mine[record.newest.agent] >= record.newest.clock:
                kind = KIND_UNFLUSHED if record.state == LINE_DIRTY else KIND_UNFENCED
                memcpy(&seen, &record.newest, sizeof(Store))
        elif not record.state and record.memory.clock and record.memory.host != h.number and (
                copy.store.agent != record.memory.agent or copy.store.clock != record.memory.clock):
            copy.stale_hits += 1
            if reached and record.memory.agent != AGENTS - 1 and mine[record.memory.agent] >= record.memory.clock \
                    or copy.stale_hits == STALE_POLLS:
                kind = KIND_NO_INVALIDATE
                memcpy(&seen, &record.memory, sizeof(Store))
        unlock(&record.lock)
        if kind and self.replaced(h, who):
            return
        if kind == KIND_UNFLUSHED and self.wasted_since(&seen, &other, &site):
            kind = KIND_WRONG_FLUSH
        if kind == KIND_UNFLUSHED or kind == KIND_UNFENCED:
            if self.flags[self.classes[line]] & CLASS_CONTINUES and self.last_line[agent] == line - 1:
                kind = KIND_TORN
                other = line * 64 - 64
        if kind:
            self.report_store(kind, line * 64, &seen, h, agent, who, other, site)
        elif self.flags[self.classes[line]] & CLASS_CONTINUES and self.last_line[agent] == line - 1:
            self.check_torn(h, line, agent, who)

    cdef bint replaced(self, Host* h, Access* who) noexcept nogil:
        """Whether a head that was replaced accesses: what it held is others' by now, and nobody looks at what it stores."""
        return (self.head_word != 0 and who.role == self.head_role
                and self.broker_hosts[cxl_load_acquire(h.base + self.head_word) % HOSTS] != h.number)

    cdef void check_torn(self, Host* h, uint64_t line, int agent, Access* who) noexcept nogil:
        """Two lines of one record that were stored between the same fences, of which the reader has one old."""
        cdef Line* second = &self.lines[line]
        cdef Line* first = &self.lines[line - 1]
        cdef Copy* copy = <Copy*>h.observed + line
        cdef Copy* before = copy - 1
        cdef bint new_first, new_second
        if (first.newest.clock == 0 or first.newest.agent != second.newest.agent or first.newest.host == h.number
                or first.newest.interval != second.newest.interval):
            return
        new_first = before.store.agent == first.newest.agent and before.store.clock == first.newest.clock
        new_second = copy.store.agent == second.newest.agent and copy.store.clock == second.newest.clock
        if new_first != new_second:
            self.report_store(KIND_TORN, line * 64, &second.newest, h, agent, who, line * 64 - 64, 0)

    cdef void filled(self, Host* h, uint64_t line) noexcept nogil:
        cdef Line* record = &self.lines[line]
        cdef Copy* copy = <Copy*>h.observed + line
        cdef uint32_t version
        cdef uint64_t total
        cdef Side nobody, reader
        copy.stale_hits = 0
        if record.memory.clock == 0:
            memset(&copy.store, 0, 24)
            return
        lock(&record.lock)
        memcpy(&copy.store, &record.memory, sizeof(Store))
        version = record.sum_version
        if cxl_version_load(&h.versions[line]) == version:
            total = sum_of(h.base + line * 64)
            if cxl_version_load(&h.versions[line]) == version and total != record.sum:
                memset(&nobody, 0, sizeof(Side))
                reader.host, reader.agent, reader.role, reader.site = h.number, 0, 0, 0
                nobody.host = nobody.site = 0
                record.sum = total
                unlock(&record.lock)
                self.report(KIND_BYPASS, line * 64, &nobody, &reader, 0, 0)
                return
        unlock(&record.lock)

    cdef void written_back(self, Host* h, uint64_t line, uint32_t expected, uint32_t found) noexcept nogil:
        cdef Line* record = &self.lines[line]
        cdef Copy* copy = <Copy*>h.observed + line
        cdef Side writer, reader
        cdef bint lost
        lock(&record.lock)
        lost = expected != found and record.memory.host != h.number and record.memory.clock != 0
        if lost:
            writer.host, writer.agent = record.memory.host, record.memory.agent
            writer.role, writer.site = record.memory.role, record.memory.site
        memcpy(&record.memory, &copy.store, sizeof(Store))
        if record.newest.agent == copy.store.agent and record.newest.clock == copy.store.clock:
            record.state = 0
            record.polls = 0
        record.sum = sum_of(h.lines + line * 64)
        record.sum_version = found + 2
        unlock(&record.lock)
        if lost:
            reader.host, reader.agent = copy.store.host, copy.store.agent
            reader.role, reader.site = copy.store.role, copy.store.site
            self.report(KIND_LOST_UPDATE, line * 64, &writer, &reader, 0, 0)

    cdef void flushed(self, Host* h, uint64_t line, uint64_t state, Access* who) noexcept nogil:
        cdef Line* record = &self.lines[line]
        cdef int agent
        cdef uint32_t site
        if state == LINE_DIRTY or state == LINE_STREAMED:
            lock(&record.lock)
            if record.newest.host == h.number and record.state:
                record.state = LINE_PENDING
            unlock(&record.lock)
            return
        agent = self.agent_of(h, who)
        site = self.site_of(who.site)
        cxl_fetch_add(&self.shared.places[site].flushes, 1)
        self.shared.wasted_offset[agent] = line * 64
        self.shared.wasted_site[agent] = site
        self.shared.wasted_clock[agent] = self.known[agent * AGENTS + agent]

    cdef bint wasted_since(self, Store* writer, uint64_t* other, uint64_t* site) noexcept nogil:
        """Whether the writer has flushed a line that needed it not after it stored this one: maybe the wrong one."""
        if writer.agent == AGENTS - 1 or self.shared.wasted_clock[writer.agent] < writer.clock:
            return False
        other[0] = self.shared.wasted_offset[writer.agent]
        site[0] = self.shared.wasted_site[writer.agent]
        return other[0] // 64 != writer.offset // 64

    cdef void invalidated(self, Host* h, uint64_t line, uint64_t state, Access* who) noexcept nogil:
        cdef Copy* copy = <Copy*>h.observed + line
        cdef int agent
        if state != LINE_DIRTY:
            return
        agent = self.agent_of(h, who)
        if copy.store.agent == agent and copy.store.host == h.number:
            self.report_store(KIND_OWN_DIRTY, line * 64, &copy.store, h, agent, who, 0, 0)

    cdef void fenced(self, Host* h, uint64_t drained, Access* who) noexcept nogil:
        cdef int agent = self.agent_of(h, who)
        self.intervals[agent] += 1
        if drained == 0:
            cxl_fetch_add(&self.shared.places[self.site_of(who.site)].fences, 1)

    cdef void atomic(self, Host* h, uint64_t offset, bint allowed, Access* who) noexcept nogil:
        cdef Side nobody
        if not allowed:
            memset(&nobody, 0, sizeof(Side))
            self.report_store(KIND_ATOMIC, offset, NULL, h, self.agent_of(h, who), who, 0, 0)

    cdef void crashed(self, Host* h) noexcept nogil:
        """What the host had not fenced is gone, or got there in the last moment: what is there is what counts."""
        cdef uint64_t line
        cdef Line* record
        for line in range(self.line_count):
            record = &self.lines[line]
            lock(&record.lock)
            if record.state and record.newest.host == h.number:
                record.state = record.polls = 0
                memcpy(&record.newest, &record.memory, sizeof(Store))
            unlock(&record.lock)
        memset(h.observed, 0, self.line_count * sizeof(Copy))

    # ---- payload ---------------------------------------------------------------------------------------------------------

    cdef void payload_written(self, Host* h, uint64_t offset, uint64_t count, Access* who) noexcept nogil:
        cdef int agent = self.agent_of(h, who)
        cdef uint64_t i, first = (offset - self.line_bytes) // GRANULE
        cdef Granule* granule
        self.known[agent * AGENTS + agent] += 1
        for i in range(first, (offset - self.line_bytes + count + GRANULE - 1) // GRANULE):
            granule = &self.granules[i]
            granule.offset = offset
            granule.clock = self.known[agent * AGENTS + agent]
            granule.agent = agent
            granule.role = who.role
            granule.host = h.number
            granule.site = self.site_of(who.site)
            granule.pending = 1

    cdef void payload_fenced(self, Host* h, uint64_t offset, uint64_t count) noexcept nogil:
        cdef uint64_t i
        for i in range((offset - self.line_bytes) // GRANULE, (offset - self.line_bytes + count + GRANULE - 1) // GRANULE):
            if self.granules[i].host == h.number:
                self.granules[i].pending = 0

    cdef void payload_read(self, Host* h, uint64_t offset, uint64_t count, uint64_t stale, Access* who) noexcept nogil:
        cdef int agent = self.agent_of(h, who)
        cdef uint64_t i
        cdef Granule* granule
        cdef Store writer
        for i in range((offset - self.line_bytes) // GRANULE, (offset - self.line_bytes + count + GRANULE - 1) // GRANULE):
            granule = &self.granules[i]
            if (granule.clock == 0 or granule.host == h.number or granule.agent == AGENTS - 1
                    or self.known[agent * AGENTS + granule.agent] < granule.clock or not (granule.pending or stale)):
                continue
            memset(&writer, 0, sizeof(Store))
            writer.agent, writer.clock, writer.host = granule.agent, granule.clock, granule.host
            writer.role, writer.site = granule.role, granule.site
            self.report_store(KIND_UNFENCED if granule.pending else KIND_NO_INVALIDATE, offset, &writer, h, agent, who,
                              0, 0)
            return

    # ---- reports ---------------------------------------------------------------------------------------------------------

    cdef void report_store(self, int kind, uint64_t offset, Store* writer, Host* h, int agent, Access* who,
                           uint64_t other, uint64_t other_site) noexcept nogil:
        cdef Side first, second
        memset(&first, 0, sizeof(Side))
        if writer != NULL:
            first.host, first.agent, first.role, first.site = writer.host, writer.agent, writer.role, writer.site
        second.host, second.agent, second.role, second.site = h.number, agent, who.role, self.site_of(who.site)
        # The exact word is known of the access that made us look.
        self.report(kind, who.offset if who.offset // 64 == offset // 64 else offset, &first, &second, other,
                    other_site)

    cdef void report(self, int kind, uint64_t offset, Side* writer, Side* reader, uint64_t other,
                     uint64_t other_site) noexcept nogil:
        cdef uint64_t i
        cdef Report* found
        lock(&self.shared.lock)
        for i in range(self.shared.reports):
            found = &self.shared.report[i]
            if (found.kind == <uint64_t>kind and found.reader.site == reader.site and found.writer.site == writer.site
                    and found.reader.role == reader.role):
                found.count += 1
                unlock(&self.shared.lock)
                return
        if self.shared.reports < REPORTS:
            found = &self.shared.report[self.shared.reports]
            found.kind, found.count, found.offset = kind, 1, offset
            found.writer, found.reader = writer[0], reader[0]
            found.other_offset, found.other_site, found.wall_ns = other, other_site, cxl_wall_ns()
            self.shared.reports += 1
        else:
            self.shared.reports_lost += 1
        unlock(&self.shared.lock)

    def find_stranded(self, older_ns=None) -> int:
        """Report lines that a host of this process has stored, a peer polls, and nobody has flushed and fenced for so long;
        how many there are."""
        cdef uint64_t line, other, site, found = 0
        cdef Line* record
        cdef Side writer, reader
        cdef int64_t limit = cxl_now_ns() - <int64_t>(self.stranded_ns if older_ns is None else older_ns)
        cdef int kind
        cdef uint64_t number
        for number in range(min(self.watched_count, HOSTS) * self.line_count):
            line = number % self.line_count
            if not LINE_DIRTY <= <int>(self.watched[number // self.line_count][line] & STATE_MASK) <= LINE_STREAMED:
                continue
            record = &self.lines[line]
            if record.state == 0 or record.polls == 0 or <int64_t>record.stored_ns > limit:
                continue
            other = site = 0
            kind = KIND_WRONG_FLUSH if self.wasted_since(&record.newest, &other, &site) else KIND_STRANDED
            writer.host, writer.agent = record.newest.host, record.newest.agent
            writer.role, writer.site = record.newest.role, record.newest.site
            reader.host, reader.agent, reader.role, reader.site = record.poll_host, 0, record.poll_role, record.poll_site
            self.report(kind, record.newest.offset, &writer, &reader, other, site)
            found += 1
        return found

    def reports(self) -> list[dict]:
        """What was found: kind, offset, count, writer and reader (host, role, site), the other line, for all processes."""
        cdef uint64_t i
        cdef Report* each
        out = []
        for i in range(cxl_load_acquire(&self.shared.reports)):
            each = &self.shared.report[i]
            out.append({
                "kind": each.kind, "count": each.count, "offset": each.offset,
                "writer": {"host": each.writer.host, "role": each.writer.role, "site": self.site_text(each.writer.site)},
                "reader": {"host": each.reader.host, "role": each.reader.role, "site": self.site_text(each.reader.site)},
                "other_offset": each.other_offset, "other_site": self.site_text(each.other_site),
                "wall_ns": each.wall_ns})
        return out

    def unwatched(self) -> int:
        """Threads of all processes that came when AGENTS_MAX were there: what they do is not checked."""
        return max(0, <int>cxl_load_acquire(&self.shared.agents) - AGENTS + 1)

    def wasted(self) -> list[dict]:
        """Flushes and fences that did nothing, by place."""
        cdef uint64_t i
        return [{"site": self.site_text(i), "flushes": self.shared.places[i].flushes,
                 "fences": self.shared.places[i].fences} for i in range(self.shared.sites)
                if self.shared.places[i].flushes or self.shared.places[i].fences]

    def site_text(self, uint64_t site) -> str:
        """A place as it was noted: file:line in name, or module+0xoffset."""
        return (<bytes>self.shared.site_text[site]).decode(errors="replace") if 0 < site < self.shared.sites else ""
