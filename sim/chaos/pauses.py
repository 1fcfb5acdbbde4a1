"""When the whole machine stands still (a virtual one is paused, a laptop sleeps), no broker is to blame for silence.

A process of its own, at the highest priority that it may have, sleeps for a tenth of a second again and again. It does
nothing else: when it wakes up a second late, so did everybody.
"""

import contextlib
import os
import subprocess
import sys
import threading

PROGRAM = """
import time
last = time.monotonic_ns()
print(flush=True)
while True:
    time.sleep(0.1)
    now = time.monotonic_ns()
    if now - last > 1_000_000_000:
        print(last, now, flush=True)
    last = now
"""


class Watchman:
    """Appends (from, until), monotonic ns, to a list."""

    def __init__(self, pauses: list[tuple[int, int]]) -> None:
        self._pauses = pauses

    def __enter__(self) -> "Watchman":
        self._process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()         # it watches
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, -10)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            begin, end = line.split()
            self._pauses.append((int(begin), int(end)))

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
