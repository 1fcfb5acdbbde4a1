"""A seat: a place in a thread plan for a stage that a broker runs only while it is head."""

from libc.stdint cimport int64_t, uint64_t

from broker.layout cimport Layout
from broker.stages.stage cimport Stage
from sim.cxl.memory cimport Memory
from sim.cxl.primitives cimport cxl_load_acquire, cxl_store_release


cdef class Seat(Stage):
    """Runs one stage as long as the control word is the one it was taken for. Before each step it looks: a head that was
    replaced stops here, at the latest after the step that it was in."""

    cdef Memory memory
    cdef Layout layout
    cdef object stage_object
    cdef void* stage
    cdef uint64_t control           # 0: nobody sits here. Set by `take`, cleared by the thread that steps.

    def __init__(self, Memory memory, Layout layout):
        self.memory = memory
        self.layout = layout

    cdef int64_t step(self) noexcept nogil:
        cdef uint64_t control = cxl_load_acquire(&self.control)
        if control == 0:
            return 0
        if self.memory.load(self.layout.control()) != control:
            # Its bank is for others as soon as we are free.
            (<Stage>self.stage).leave()
            cxl_store_release(&self.control, 0)
            return 0
        return (<Stage>self.stage).step()       # native to the end: none that sits here has a Python part

    cdef void prepare_to_sleep(self) noexcept nogil:
        if cxl_load_acquire(&self.control):
            (<Stage>self.stage).prepare_to_sleep()

    def take(self, Stage stage, uint64_t control) -> None:
        """Run a stage under this control word. The seat must be free."""
        assert self.free
        self.stage_object = stage
        self.stage = <void*>stage
        cxl_store_release(&self.control, control)

    @property
    def free(self) -> bool:
        """Whether nothing runs here."""
        return cxl_load_acquire(&self.control) == 0
