"""What every stage is: a step that does a bounded amount and never waits."""

from libc.stdint cimport int64_t


cdef class Stage:
    """A stage of the pipeline. It owns no thread and no clock; a loop outside decides how to wait.

    `step` does a bounded amount of work and returns how much. `prepare_to_sleep` is called before the loop sleeps:
    the next step must look everywhere, not only where a hint says that there is news.

    A step cannot raise: it runs without the GIL. What its Python part raised is kept in `failure`, never printed and lost,
    and whoever runs the stage raises it.
    """

    cdef int64_t step(self) noexcept nogil:
        return 0

    cdef void prepare_to_sleep(self) noexcept nogil:
        pass

    cdef void leave(self) noexcept nogil:
        """It steps no more, and what it wrote is for others now: what it flushed is in memory when this returns."""

    def step_once(self) -> int:
        """Do one step; the amount of work done."""
        cdef int64_t work
        with nogil:
            work = self.step()
        if self.failure is not None:
            raise self.failure
        return work

    def leave_now(self) -> None:
        """End it, as a seat does when its head was replaced."""
        self.leave()

    def look_everywhere(self) -> None:
        """Make the next step ignore its hints."""
        self.prepare_to_sleep()
