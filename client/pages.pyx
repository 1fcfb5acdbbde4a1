"""Which segments' pages this process has mapped: in one call each when one is needed, all of them ahead when many are.

A process that touches a page of tmpfs for the first time takes a fault, and a segment's faults take several times as long
as filling it. One call for the whole segment takes a quarter of that; for a publisher of much, a thread does it ahead.
"""

import threading
import time

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from broker.layout cimport Layout
from broker.segments cimport SegmentPool
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_load_acquire, cxl_store_release

cdef enum:
    AHEAD_FROM = 8                  # segments that were mapped when they were needed
    TOGETHER = 16                   # segments for which the GIL is released once

AGAIN_SECONDS = 0.02                # brokers make cold segments warm in the background


cdef class Pages:
    """Of one client's mapping of a region."""

    def __init__(self, Memory memory, Layout layout):
        self.memory = memory
        self.layout = layout
        self.present = <uint8_t*>calloc(layout.g.segment_count, 1)
        if self.present == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.present)

    cdef void need(self, uint64_t offset, uint64_t nbytes) noexcept nogil:
        """Whole segments from `offset` on are about to be filled."""
        cdef uint64_t size = self.layout.g.segment_bytes, segment = (offset - self.layout.g.segments) // size
        cdef uint64_t end = segment + nbytes // size
        if end > self.layout.g.segment_count:
            return
        while segment < end:
            if not self.present[segment]:
                self.memory.touch(self.layout.segment(segment), size)
                self.present[segment] = 1
                self.mapped_late += 1
            segment += 1

    cdef int see_to_others(self) except -1:
        """Have everything mapped ahead when it looks as if much is published here."""
        if self.mapped_late >= AHEAD_FROM and self.thread is None:
            self.thread = threading.Thread(target=self.map_ahead, name="cxlmq-map-ahead", daemon=True)
            self.thread.start()
        return 0

    def map_ahead(self) -> None:
        """Map what is warm, and go on as brokers warm the rest, until nothing is left."""
        cdef SegmentPool pool = SegmentPool(self.memory, self.layout, 0)
        cdef uint64_t segment, count = self.layout.g.segment_count, done, left = 1
        while left and not self.ending:
            segment = left = 0
            while segment < count and not self.ending:
                with nogil:
                    done = 0
                    while segment < count and done < TOGETHER and not cxl_load_acquire(&self.ending):
                        if not self.present[segment] and pool.is_warm(segment):
                            self.memory.touch(self.layout.segment(segment), self.layout.g.segment_bytes)
                            self.present[segment] = 1
                            done += 1
                        left += not self.present[segment]
                        segment += 1
            if left and not self.ending:
                time.sleep(AGAIN_SECONDS)

    def end(self) -> None:
        """Before the mapping is let go."""
        cxl_store_release(&self.ending, 1)
        if self.thread is not None:
            self.thread.join()
