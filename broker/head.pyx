"""Who is head, and how others read what it wrote.

    control word:  epoch | serving? | source bank | bank | broker        changed by compare-and-swap alone

    reader:   c = control, which serves ─► reads in that bank ─► control still c?  ─► only then it counts
    new head: control := epoch + 1 (nobody serves) ─► reads the old bank ─► fills its own ─► control := serving

Why no store of a replaced head counts: it can only reach its own bank. Whoever reads there looks at the control word
afterwards, and the word has changed. Why nothing that counted is lost: a reader that found the word unchanged read
before the new head raised the epoch, and the new head reads the old bank after that.
"""

from libc.stdint cimport uint64_t

from broker.doorbell cimport Doorbell
from broker.errors import BrokerUnavailable
from broker.layout cimport CONTROL_BANK_SHIFT, CONTROL_BROKER, CONTROL_EPOCH_SHIFT, CONTROL_SERVING, Layout
from broker.planted cimport PLANT_ZOMBIE_FOLLOWED, planted
from sim.cxl.memory cimport Memory

from broker.records import record_bytes, unpack

TRIES = 1000


def epoch_of(uint64_t control) -> int:
    """The epoch in a control word."""
    return control >> CONTROL_EPOCH_SHIFT


def head_of(uint64_t control) -> int:
    """The broker in a control word."""
    return control & CONTROL_BROKER


def is_serving(uint64_t control) -> bool:
    """Whether the head of a control word has recovered and serves."""
    return (control & CONTROL_SERVING) != 0


def control_word(Memory memory, Layout layout) -> int:
    """The control word as it is now."""
    memory.invalidate(layout.control(), 64)
    return memory.load(layout.control())


def say_restored(Memory memory, Layout layout, uint64_t epoch) -> None:
    """Bank 0 was filled by a recovery as if a head of this epoch had: the first head takes over from there."""
    memory.store(layout.head_line(), epoch)
    memory.flush(layout.head_line(), 64)
    memory.fence()
    memory.compare_and_swap(layout.control(), 0, make_control(epoch, 0, 0, 1, 0))


cdef class HeadView:
    """Reads what the serving head wrote. Not thread-safe: each user has one of its own.

    Between `begin` (True: a head serves) and `same` (True: what was read meanwhile counts), `layout` points into that
    head's bank.
    """

    def __init__(self, Memory memory, Layout layout):
        self.memory = memory
        self.layout = layout.with_bank(layout.g.bank)
        self.control = 0

    cdef bint begin(self) noexcept nogil:
        cdef uint64_t control = self.memory.load(self.layout.control()), bank
        if control != self.control:
            if self.control & CONTROL_SERVING and planted(PLANT_ZOMBIE_FOLLOWED):
                return True
            bank = control >> CONTROL_BANK_SHIFT & 0xFF
            if bank >= self.layout.g.bank_count:
                return False
            self.control = control
            self.layout.use_bank(bank)
        return (control & CONTROL_SERVING) != 0

    cdef bint same(self) noexcept nogil:
        return self.memory.load(self.layout.control()) == self.control or planted(PLANT_ZOMBIE_FOLLOWED)

    def serving(self) -> bool:
        """Switch to the head that serves; False while there is none."""
        return self.begin()

    def unchanged(self) -> bool:
        """Whether what was read since `serving` counts."""
        return self.same()

    def read_bytes(self, uint64_t count, str place, *index) -> bytes:
        """Bytes that the head wrote. Raises `BrokerUnavailable` while none serves."""
        for _ in range(TRIES):
            if not self.begin():
                break
            at = self.layout.offset_of(place, *index)
            self.memory.invalidate_range(at, count)
            found = self.memory.read_line_bytes(at) if count == 64 else self.memory.read_bytes(at, count)
            if self.same():
                return found
        raise BrokerUnavailable("a new head is taking over: try again", address="head")

    def read(self, str record, str place, *index) -> dict:
        """A record that the head wrote. Raises `BrokerUnavailable` while none serves."""
        return unpack(record, self.read_bytes(record_bytes(record), place, *index))


cdef class HeadDoorbell(Doorbell):
    """The doorbell of whoever is head now."""

    def __init__(self, Memory memory, Layout layout):
        Doorbell.__init__(self, memory, layout.doorbell(0, 0))
        self.layout = layout

    cdef void ring_fenced(self) noexcept nogil:
        cdef uint64_t broker = self.memory.load(self.layout.control()) & CONTROL_BROKER
        cdef uint64_t at = self.layout.doorbell(broker if broker < self.layout.g.broker_count else 0, 0)
        if self.memory.load(at + 8):
            self.memory.fetch_add(at, 1)
            self.memory.wake(at)
