"""An event loop of one simulated host: its time is the simulation's, and it runs when it is told to."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from sim.cxl.clock import ManualClock

T = TypeVar("T")


class _NoDescriptors:
    """Stands where a loop asks for sockets that are ready: here there are none."""

    def select(self, _: float | None) -> list[Any]:
        return []


class SimLoop(asyncio.BaseEventLoop):
    """Runs the coroutines that a broker's event loop runs, one round at a time. Never waits."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock_of_host = clock
        self._selector = _NoDescriptors()
        self._open = 0

    def time(self) -> float:
        """Seconds of simulated time."""
        return float(self._clock_of_host.now()) / 1e9

    def _process_events(self, _: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def call_here(self, coroutine: Coroutine[Any, Any, T], timeout: float) -> "asyncio.Task[T]":
        """Start a coroutine that fails with TimeoutError after `timeout` simulated seconds."""
        self._open += 1
        task = self.create_task(asyncio.wait_for(coroutine, timeout))
        task.add_done_callback(lambda ended: self._ended(ended, coroutine))
        return task

    def _ended(self, task: "asyncio.Task[Any]", coroutine: Coroutine[Any, Any, Any]) -> None:
        self._open -= 1
        coroutine.close()                   # it was never begun when the task was cancelled at once
        if not task.cancelled():
            task.exception()                # whoever asks looks at it; nobody may be left to ask

    @property
    def busy(self) -> bool:
        """Whether a coroutine is under way."""
        return self._open > 0

    def round(self) -> None:
        """Run what is due now."""
        self.stop()
        self.run_forever()

    def end(self) -> None:
        """Cancel what is under way, and close."""
        for task in asyncio.all_tasks(self):
            task.cancel()
        for _ in range(8):
            if not self.busy:
                break
            self.round()
        self.close()
