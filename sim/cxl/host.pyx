"""The shared device and a host's cache: how they are set up, how they fail, what a simulation sees of them."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from sim.cxl.cachelines cimport (
    AGENT_LISTS, CONTROL_CRASHED, CONTROL_EVICT, CONTROL_LINK_LOST, CONTROL_TRACE, FAULT_ATOMIC, FAULT_LINK, FAULT_NONE,
    HOST_HEADER, Host, LINE_COHERENT, LINE_DIRTY, LINE_STREAMED, LineObserver, ORDER_MASK, ORDER_SHIFT,
    SIDE_HEADER, STATE_MASK, Timing, cxl_random, delay, spontaneous, write_back,
)
from sim.cxl.primitives cimport cxl_now_ns, cxl_store_release

from sim.cxl.cachelines import LineState as LineStates
from sim.cxl.memory import MemoryFault
from sim.cxl.region import private_mapping

CRASH_POLICIES = ("never", "immediate", "random", "inversion", "exhaustive")


# ---- device ------------------------------------------------------------------------------------------------------------


cdef uint8_t* buffer_of(object buffer, uint64_t nbytes, str what) except NULL:
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    address, size = <uint8_t*>view.buf, view.len
    PyBuffer_Release(&view)
    if <uint64_t>size < nbytes:
        raise ValueError(f"{what} has {size} bytes, needed are {nbytes}")
    return address


@cython.no_gc_clear                     # views that the collector takes later still publish through it
cdef class Device:
    """The memory that hosts share, and what the model keeps beside it.

    `line_bytes` (default: all) is where lines end and payload begins. `coherent` are (offset, bytes) of the coherent
    area, where atomics work and nothing is cached; `coherent_bytes_max` is the hardware's budget for it. With
    `device_atomics` they work everywhere. `side` is a buffer of `side_bytes` zero bytes that processes share;
    default: this process's own. `prepare_side` once for all.
    """

    def __init__(self, mapping, line_bytes=None, coherent=(), *, coherent_bytes_max=None, bint device_atomics=False,
                 side=None):
        cdef Py_buffer view
        try:
            PyObject_GetBuffer(mapping, &view, PyBUF_WRITABLE)
            self.writable = True
        except BufferError:
            PyObject_GetBuffer(mapping, &view, PyBUF_SIMPLE)
            self.writable = False
        self.base = <uint8_t*>view.buf
        self.bytes = view.len
        PyBuffer_Release(&view)
        self.owner = memoryview(mapping)
        self.line_bytes = self.bytes // 64 * 64 if line_bytes is None else line_bytes
        if self.line_bytes % 64 or self.line_bytes > self.bytes:
            raise ValueError(f"line_bytes must be whole lines of the {self.bytes} bytes, not {self.line_bytes}")
        self.coherent = [(int(at), int(count)) for at, count in coherent]
        total = sum(count for _, count in self.coherent)
        if coherent_bytes_max is not None and total > coherent_bytes_max:
            raise ValueError(f"the coherent area takes {total} bytes, the hardware has {coherent_bytes_max}")
        self.device_atomics = device_atomics
        nbytes = self.side_bytes(self.bytes, self.line_bytes)
        self.side_owner = side
        if side is None:
            self.side_owner = private_mapping(nbytes)
        self.side = buffer_of(self.side_owner, nbytes, "the side file of this memory")
        self.versions = <uint32_t*>(self.side + SIDE_HEADER)
        self.payload_versions = self.side + SIDE_HEADER + self.line_bytes // 64 * 4

    @staticmethod
    def side_bytes(nbytes, line_bytes) -> int:
        """How much the model keeps beside a device of `nbytes`, in bytes."""
        return SIDE_HEADER + line_bytes // 64 * 4 + (nbytes - line_bytes + 63) // 64

    def use_profile(self, profile) -> None:
        """Let every access take the time that a `Profile` says, for all processes. Before anybody uses the device."""
        cdef Timing* timing = <Timing*>self.side
        waits = Device.waits(profile)
        timing.load_ns, timing.peer_load_ns = waits["load_ns"], waits["peer_load_ns"]
        timing.flush_ns, timing.fence_ns = waits["flush_ns"], waits["fence_ns"]
        timing.read_fs, timing.write_fs = int(1e6 / profile.read_gb_s), int(1e6 / profile.write_gb_s)
        cxl_store_release(&timing.on, 1)

    def timing(self) -> dict[str, int]:
        """What accesses take now; all 0 where it is this machine's own time."""
        cdef Timing* timing = <Timing*>self.side
        return {"load_ns": timing.load_ns, "peer_load_ns": timing.peer_load_ns, "flush_ns": timing.flush_ns,
                "fence_ns": timing.fence_ns, "read_fs_per_byte": timing.read_fs, "write_fs_per_byte": timing.write_fs}

    @staticmethod
    def waits(profile) -> dict[str, int]:
        """For how many ns to wait so that accesses take what a `Profile` says: less by what waiting for nothing takes."""
        least = round(Device.delay_accuracy(0))
        return {name: max(0, round(getattr(profile, name)) - least)
                for name in ("load_ns", "peer_load_ns", "flush_ns", "fence_ns")}

    @staticmethod
    def delay_accuracy(uint64_t nanoseconds, int rounds=200) -> float:
        """How long a wait of so many ns really takes on this machine: the median of some rounds, in ns."""
        cdef int64_t since
        cdef int i
        found = []
        for i in range(rounds):
            since = cxl_now_ns()
            delay(since, nanoseconds)
            found.append(cxl_now_ns() - since)
        return float(sorted(found)[rounds // 2])

    def lose(self) -> None:
        """The device is gone: from now on no host reaches it."""
        cxl_store_release(self.side, 1)

    def come_back(self) -> None:
        """The device answers again, with what it held."""
        cxl_store_release(self.side, 0)

    def fill_garbage(self, uint64_t seed, uint64_t offset=0, count=None) -> None:
        """Hand the memory out as hardware does: full of whatever there was. Before anybody uses it."""
        cdef uint64_t state = seed, at, end = self.bytes if count is None else offset + count
        cdef uint64_t* words = <uint64_t*>self.base
        with nogil:
            for at in range(offset // 8, end // 8):
                words[at] = cxl_random(&state)


# ---- a host ----------------------------------------------------------------------------------------------------------------


@cython.no_gc_clear                     # views that the collector takes later still publish through it
cdef class HostCache:
    """The cache of one host; its doors are `NonCoherentMemory(host, role)`.

    `store` is a buffer of `store_bytes` zero bytes when several processes are one host. `eviction_period` is how many
    accesses lie between two spontaneous events on average, 0 for none. Everything random follows from `seed`.
    """

    def __cinit__(self):
        memset(&self.h, 0, sizeof(Host))

    def __init__(self, Device device, str name="host", uint64_t seed=0, uint64_t eviction_period=0, store=None,
                 LineObserver observer=None, int number=0, observer_store=None):
        cdef Host* h = &self.h
        self.device = device
        self.name = name
        self.owner = private_mapping(self.store_bytes(device)) if store is None else store
        h.header = <uint64_t*>buffer_of(self.owner, self.store_bytes(device), f"the cache of {name}")
        h.base = device.base
        h.bytes = device.bytes
        h.line_bytes = device.line_bytes
        h.versions = device.versions
        h.payload_versions = device.payload_versions
        h.device = <Timing*>device.side
        h.states = <uint64_t*>(<uint8_t*>h.header + HOST_HEADER)
        h.lines = <uint8_t*>h.states + h.line_bytes // 8
        h.payload_known = h.lines + h.line_bytes
        h.device_atomics = device.device_atomics
        h.number = number
        self.observer = observer
        if observer is not None:
            h.observer = <void*>observer
            observer.watch(h, self.owner, observer_store)
        self.reset(seed, eviction_period)
        self._mark_coherent()

    def __dealloc__(self):
        cdef int i
        for i in range(AGENT_LISTS):
            free(self.h.pending[i].entries)

    @staticmethod
    def store_bytes(Device device) -> int:
        """Bytes that a cache over `device` takes; pages of them that are never touched cost nothing."""
        return HOST_HEADER + device.line_bytes // 8 + device.line_bytes + (device.bytes - device.line_bytes + 63) // 64

    def _mark_coherent(self):
        cdef uint64_t line, first, last
        for offset, count in self.device.coherent:
            first, last = offset // 64, min(offset + count + 63, self.h.line_bytes) // 64
            for line in range(first, last):
                self.h.states[line] = LINE_COHERENT

    def reset(self, uint64_t seed=0, uint64_t eviction_period=0) -> None:
        """Begin a run: the counters, the trace and the random numbers start anew; the cache stays as it is."""
        self.h.random = seed * 2 + 1
        self.h.eviction_period = eviction_period
        self.h.control = CONTROL_EVICT if eviction_period else 0
        self.h.operations = self.h.crash_at = self.h.fault = 0
        self.h.trace_hash = 0xcbf29ce484222325

    # ---- what happens by itself ------------------------------------------------------------------------------------

    cdef void event(self) noexcept nogil:
        spontaneous(&self.h)

    def step_evictions(self, uint64_t count) -> None:
        """Let so many spontaneous events happen: write-backs, drops, prefetches of neighbours."""
        cdef uint64_t i
        for i in range(count):
            spontaneous(&self.h)

    # ---- what the simulation sees ------------------------------------------------------------------------------------

    @property
    def operations(self) -> int:
        """Accesses so far, counted while `trace` is on or a crash is set."""
        return self.h.operations

    @property
    def trace_hash(self) -> int:
        """Hash over every access so far (operation, offset, value), while `trace` is on."""
        return self.h.trace_hash

    def trace(self, bint on=True) -> None:
        """Count and hash every access."""
        self.h.control = self.h.control | CONTROL_TRACE if on else self.h.control & ~<uint64_t>CONTROL_TRACE

    def crash_after(self, uint64_t operations) -> None:
        """Crash at the access after so many more: from then on nothing that this host does has an effect."""
        self.h.crash_at = self.h.operations + operations + 1
        self.h.control |= CONTROL_TRACE

    @property
    def crashed(self) -> bool:
        """Whether this host has crashed and was not restarted."""
        return bool(self.h.control & CONTROL_CRASHED)

    @property
    def stale_payload(self) -> int:
        """Lines of payload that were read from a stale cached copy so far."""
        return self.h.stale_payload

    def state_of(self, uint64_t offset) -> int:
        """What the cache has of the line at `offset`."""
        return LineStates(self.h.states[offset // 64] & STATE_MASK)

    def dirty_lines(self) -> list[int]:
        """Offsets of lines that are not on the device yet, dirty or pending, the one stored last at the end."""
        cdef uint64_t line, state, now = self.h.header[0]
        found = []
        for line in range(self.h.line_bytes // 64):
            state = self.h.states[line]
            if LINE_DIRTY <= <int>(state & STATE_MASK) <= LINE_STREAMED:
                found.append(((now - (state >> ORDER_SHIFT)) & ORDER_MASK, line * 64))
        return [offset for _, offset in sorted(found, reverse=True)]

    # ---- failures ----------------------------------------------------------------------------------------------------

    def crash(self, str policy="never", uint64_t seed=0, uint64_t choice=0, int lines_max=8) -> dict[str, list[int]]:
        """The host dies, and its cache with it; {"survived": offsets, "lost": offsets} of what was not fenced.

        "never": no unfenced line survives. "immediate": all do, as with flush on failure. "random": each by the seed.
        "inversion": the line stored last (the commit line) survives, its data does not. "exhaustive": bit i of
        `choice` says whether the i-th last line survives, for the last `lines_max`; older ones are lost.
        """
        cdef uint64_t state = seed * 2 + 1
        if policy not in CRASH_POLICIES:
            raise ValueError(f"crash policy must be one of {', '.join(CRASH_POLICIES)}, not {policy!r}")
        lines = self.dirty_lines()
        survived = []
        for age, offset in enumerate(reversed(lines)):
            if (policy == "immediate" or policy == "random" and cxl_random(&state) & 1
                    or policy == "inversion" and age == 0
                    or policy == "exhaustive" and age < lines_max and choice >> age & 1):
                survived.append(offset)
        self.h.control &= ~<uint64_t>CONTROL_LINK_LOST
        for offset in survived:
            write_back(&self.h, offset // 64, self.h.states[offset // 64])
        self._forget()
        if self.h.observer != NULL:
            (<LineObserver>self.h.observer).crashed(&self.h)
        self.h.control |= CONTROL_CRASHED
        kept = set(survived)
        return {"survived": survived, "lost": [offset for offset in lines if offset not in kept]}

    def _forget(self):
        cdef int i
        memset(self.h.states, 0, self.h.line_bytes // 8)
        memset(self.h.payload_known, 0, (self.h.bytes - self.h.line_bytes + 63) // 64)
        for i in range(AGENT_LISTS):
            self.h.pending[i].count = 0
        self._mark_coherent()

    def restart(self) -> None:
        """The host comes up again with a cold cache. Its doors work again."""
        self._forget()
        self.h.control &= ~<uint64_t>(CONTROL_CRASHED | CONTROL_LINK_LOST)
        self.h.fault = self.h.crash_at = 0

    def lose_link(self) -> None:
        """The host no longer reaches the device: what it loads is all ones, and `raise_fault` raises."""
        self.h.control |= CONTROL_LINK_LOST

    def raise_fault(self) -> None:
        """Raise `MemoryFault` if this host has one."""
        cdef Host* h = &self.h
        if h.fault == FAULT_NONE:
            return
        if h.fault == FAULT_ATOMIC:
            raise MemoryFault(
                f"{self.name}: atomic access by role {h.fault_role} to the line at offset {h.fault_offset // 64 * 64}, which is not "
                "in the coherent area; use a pool that needs no atomics, or device atomics", "atomic", h.fault_offset,
                h.fault_role)
        what, kind = ("its link to the memory", "link") if h.fault == FAULT_LINK else ("the memory device", "device")
        raise MemoryFault(f"{self.name} lost {what}; what it reads since then means nothing: stop it", kind,
                          h.fault_offset, h.fault_role)
