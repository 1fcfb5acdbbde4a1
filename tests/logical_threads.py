"""Threads of which one runs at a time; a seed decides at every point where Python may lose the GIL which one goes on.

Points are the places that the native code names (`client.turn.watch`) and lines of the library's Python. A failure is
found again with its seed. Locks of the product are replaced by `SharedLock`, whose waiters pass the baton on.
"""

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from client.turn import Place, watch

CLIENT = str(Path(__file__).parents[1] / "client")
STUCK_SECONDS = 120.0
POINTS_MAX = 400_000


class Stuck(AssertionError):
    """Nobody got on."""


class Baton:
    """Who runs."""

    def __init__(self, seed: int, lines: float = 0.05) -> None:
        self.random = random.Random(seed)
        self.lines = lines                  # of the library's Python lines, the share at which others may go on
        self.share = self.random.choice((0.05, 0.3, 0.8))      # of points at which another one goes on
        self.doors: dict[int, threading.Semaphore] = {}         # of the works that go on, by their number
        self.me = threading.local()         # its `number`: what a seed decides must not hang on the system's numbers
        self.failures: list[BaseException] = []
        self.points = 0
        self.over = threading.Event()

    def run(self, *works: Callable[[], Any]) -> None:
        """Run each as a logical thread until all have ended; raise what the first one raised."""
        ready = threading.Barrier(len(works) + 1)
        threads = [threading.Thread(target=self._body, args=(number, work, ready), daemon=True)
                   for number, work in enumerate(works)]
        for thread in threads:
            thread.start()
        watch(self.point)
        try:
            ready.wait(STUCK_SECONDS)
            self.random.choice(sorted(self.doors.items()))[1].release()
            if not self.over.wait(STUCK_SECONDS):
                raise Stuck(f"after {self.points} points") from next(iter(self.failures), None)
        finally:
            watch(None)
        if self.points <= POINTS_MAX:       # nobody is left behind, waiting for a turn that never comes
            for thread in threads:
                thread.join(STUCK_SECONDS)
        if self.failures:
            raise self.failures[0]

    def _body(self, number: int, work: Callable[[], Any], ready: threading.Barrier) -> None:
        me = self.me.number = number
        self.doors[me] = threading.Semaphore(0)
        ready.wait(STUCK_SECONDS)
        self.doors[me].acquire()
        sys.settrace(self._trace)
        try:
            work()
        except BaseException as error:
            self.failures.append(error)
        finally:
            sys.settrace(None)
            del self.doors[me]
            if self.doors:
                self._others()[0].release()
            else:
                self.over.set()

    def _others(self) -> list[threading.Semaphore]:
        others = [door for number, door in sorted(self.doors.items()) if number != self.me.number]
        self.random.shuffle(others)
        return others

    def point(self, place: int = 0) -> None:
        """The GIL may be lost here."""
        me = self.doors.get(getattr(self.me, "number", -1))
        if me is None or self.over.is_set():
            return                          # one that takes no part
        self.points += 1
        if self.points > POINTS_MAX:
            self.failures.append(Stuck(f"after {self.points} points"))
            self.over.set()
        others = self._others()
        # Who waits for a turn lets others go on, so that somebody gives it.
        if others and (place == Place.PLACE_WAITING or self.random.random() < self.share):
            others[0].release()
            me.acquire()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(CLIENT):
            return None
        if event == "line" and self.random.random() < self.lines:
            self.point()
        return self._trace


class SharedLock:
    """A lock, reentrant, between logical threads."""

    def __init__(self, baton: Baton) -> None:
        self.baton = baton
        self.owner = self.depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        while self.owner not in (0, me):
            self.baton.point(Place.PLACE_WAITING)
        self.owner = me
        self.depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.owner = 0
