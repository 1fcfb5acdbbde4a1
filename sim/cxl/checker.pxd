"""The coherence checker: happens-before over lines across hosts, as race detectors do it over words.

    store ──► the line remembers who, where in the code, and what its agent knew (a clock of every agent)
    load  ──► the reader's agent learns what the agent knew whose store it sees
    report ─► the reader knows of a store (learnt through other lines) that its copy does not have

    cover ─► a frontier is stored over lines that are not in memory yet, whether a reader has come by or not

An agent is a thread of a host. A line that is `reached` is read because another line said so: there an old copy is a
mistake. A line that is polled may be old at any time: there only a store that nobody flushes is one, and a reader who looks
again and again without an invalidate.
What processes share lies in a buffer beside the device; what is kept of each host's copies beside its cache.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from sim.cxl.cachelines cimport Access, Host, LineObserver

cdef enum:
    AGENTS = 64                 # the last is for all that come too late: nothing is known of them
    LOCAL_AGENTS = 256
    HOSTS = 128
    SITES = 4096
    SITE_BYTES = 200
    REPORTS = 256
    CLASSES = 256
    COVERS = 8
    COVER_INDEXES = 3           # bank, topic, broker
    GRANULE = 4096

cpdef enum Kind:
    KIND_UNFLUSHED = 1          # read of what its writer published and did not flush
    KIND_UNFENCED = 2           # the same, flushed and not fenced
    KIND_NO_INVALIDATE = 3
    KIND_WRONG_ROLE = 4
    KIND_LOST_UPDATE = 5
    KIND_OWN_DIRTY = 6          # invalidate of a line that the same thread has dirtied
    KIND_WRONG_FLUSH = 7        # unflushed or stranded, and its writer flushed a line that needed none
    KIND_STRANDED = 8
    KIND_TORN = 9
    KIND_ATOMIC = 10
    KIND_BYPASS = 11
    KIND_PUBLISHED = 12         # a frontier was stored before what it covers was flushed and fenced

cpdef enum ClassFlag:
    CLASS_REACHED = 1
    CLASS_CONTINUES = 2         # not the first line of its record
    CLASS_IGNORED = 4

cdef struct Store:              # one store to a line
    uint32_t clock              # of its agent; 0: none
    uint16_t agent
    uint8_t role
    uint8_t host
    uint32_t site
    uint32_t interval           # fences of its agent so far
    uint64_t offset
    uint32_t known[AGENTS]      # what its agent knew of every agent

cdef struct Line:               # shared
    uint64_t lock
    uint64_t stored_ns
    uint64_t sum                # of the line as it was written back last
    uint32_t sum_version        # the device's version then; 0: never
    uint16_t state              # of `newest`: 0 on the device, else a LineState
    uint16_t polls              # loads by other hosts meanwhile
    uint16_t poll_host
    uint8_t poll_role
    uint8_t reserved[5]
    uint32_t poll_site
    Store memory                # what the device has
    Store newest                # what some host has, maybe only there

cdef struct Copy:               # of one host
    uint32_t stale_hits
    uint32_t reserved
    Store store

cdef struct Granule:            # of payload, shared
    uint64_t offset
    uint32_t clock
    uint32_t site
    uint16_t agent
    uint8_t role
    uint8_t host
    uint32_t pending

cdef struct Side:
    uint64_t host
    uint64_t agent
    uint64_t role
    uint64_t site

cdef struct Report:
    uint64_t kind
    uint64_t count
    uint64_t offset
    Side writer
    Side reader
    uint64_t other_offset       # flushed instead, or the record's other line
    uint64_t other_site
    uint64_t wall_ns

cdef struct Cover:              # frontiers (word 0 of their lines), each over a ring of lines
    uint64_t first
    uint64_t covered            # the first line of the first ring
    uint64_t index_count
    uint64_t strides[COVER_INDEXES]             # of frontiers, the widest first
    uint64_t covered_strides[COVER_INDEXES]     # and of their rings
    uint64_t ring_stride
    uint64_t ring_count

cdef struct Place:              # what a place in the code did in vain
    uint64_t flushes
    uint64_t fences

cdef struct Shared:
    uint64_t lock
    uint64_t agents
    uint64_t hosts
    uint64_t sites
    uint64_t reports
    uint64_t reports_lost
    uint64_t wasted_offset[AGENTS]      # the last flush of an agent that did nothing
    uint64_t wasted_site[AGENTS]
    uint64_t wasted_clock[AGENTS]
    uint64_t agent_clock[AGENTS]        # where an agent's number goes on when a new process takes it
    Place places[SITES]
    char site_text[SITES][SITE_BYTES]
    Report report[REPORTS]


cdef class Checker(LineObserver):
    cdef object device
    cdef object shared_owner
    cdef object class_owner
    cdef list stores
    cdef uint64_t* watched[HOSTS]   # the states of their lines, which may outlive the host
    cdef uint64_t watched_count
    cdef dict python_sites
    cdef Shared* shared
    cdef Line* lines
    cdef Granule* granules
    cdef const uint8_t* classes         # one a line
    cdef uint64_t line_count
    cdef uint64_t line_bytes
    cdef uint64_t roles[CLASSES]
    cdef uint8_t flags[CLASSES]
    cdef uint8_t cover_of[CLASSES]      # number and one
    cdef Cover covers[COVERS]
    cdef uint64_t head_word             # its low byte says which broker is head; 0: there is none
    cdef int head_role                  # the role that only a head has
    cdef uint8_t broker_hosts[HOSTS]
    cdef uint8_t* agents                # HOSTS * LOCAL_AGENTS: number and one
    cdef uint32_t* known                # AGENTS * AGENTS
    cdef uint32_t intervals[AGENTS]
    cdef uint64_t last_line[AGENTS]
    cdef uint64_t addresses[SITES]      # a table from return addresses to sites
    cdef uint32_t address_sites[SITES]
    cdef uint64_t table_lock
    cdef public uint64_t stranded_ns

    cdef int agent_of(self, Host* h, Access* who) noexcept nogil
    cdef uint32_t site_of(self, uint64_t address) noexcept nogil
    cdef uint32_t new_site(self, const char* text) noexcept nogil
    cdef void fill_store(self, Store* store, Host* h, int agent, Access* who) noexcept nogil
    cdef void learn(self, int agent, Store* store) noexcept nogil
    cdef void check_load(self, Host* h, uint64_t line, int agent, Access* who) noexcept nogil
    cdef bint replaced(self, Host* h, Access* who) noexcept nogil
    cdef void check_covered(self, Cover* cover, Host* h, uint64_t offset, int agent, Access* who) noexcept nogil
    cdef void check_torn(self, Host* h, uint64_t line, int agent, Access* who) noexcept nogil
    cdef void report_store(self, int kind, uint64_t offset, Store* writer, Host* h, int agent,
                           Access* who, uint64_t other, uint64_t other_site) noexcept nogil
    cdef void report(self, int kind, uint64_t offset, Side* writer, Side* reader, uint64_t other,
                     uint64_t other_site) noexcept nogil
    cdef bint wasted_since(self, Store* writer, uint64_t* other, uint64_t* site) noexcept nogil
