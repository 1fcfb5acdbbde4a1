from libc.stdint cimport uint64_t

from broker.doorbell cimport Doorbell
from broker.layout cimport CONTROL_BANK_SHIFT, CONTROL_BROKER, CONTROL_EPOCH_SHIFT, CONTROL_SERVING, CONTROL_SOURCE_SHIFT, Layout
from sim.cxl.memory cimport Memory

cdef class HeadView:
    cdef Memory memory
    cdef readonly Layout layout     # its own copy: what a head writes lies in the bank of the head that serves
    cdef readonly uint64_t control  # the word for which it was switched

    cdef bint begin(self) noexcept nogil
    cdef bint same(self) noexcept nogil

cdef class HeadDoorbell(Doorbell):
    cdef Layout layout

cdef inline uint64_t make_control(uint64_t epoch, uint64_t broker, uint64_t bank, uint64_t source_and_one,
                                  uint64_t serving) noexcept nogil:
    return epoch << CONTROL_EPOCH_SHIFT | serving | source_and_one << CONTROL_SOURCE_SHIFT | bank << CONTROL_BANK_SHIFT | broker
