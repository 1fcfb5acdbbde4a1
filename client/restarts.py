"""When a broker that ended is started anew, and when no more. Judgements only: no clock, no process.

    ended ──► progress? a new row ──► else the row grows ──► the pause doubles ──► by a signal, too often: given up

A broker makes progress when it lives for `STEADY_SECONDS`. One that ends soon, in the same way, again and again, would
do so for ever. Signals that others send (SIGKILL ...) say little about it: there it is enough to have been ready.
"""

import contextlib
import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENDINGS_FILE = "endings.json"           # in the cluster's folder: what `cluster status` shows
STEADY_SECONDS = 30.0
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.5, 1.0     # a port that was taken may be free soon
LONG_ROW, LONG_PAUSE_SECONDS_MAX = 20, 5.0      # ... or it is not: no log is to be filled with that
FAULT_PAUSE_SECONDS_MAX = 5.0
FAULTS_MAX = 5                          # equal deaths in a row by a signal of its own doing
KILLS_MAX = 20                          # ... by one that came from outside, before it was ready
NOTES_MAX = 3                           # of equal endings; then each time that their number has doubled
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
                 signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE}


def how(code: int) -> str:
    """How a process ended, for people."""
    if code >= 0:
        return f"with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"by signal {signal.Signals(-code).name}"
    return f"by signal {-code}"             # of real time: they have no names


@dataclass
class Life:
    """The lives of one broker, the present one and what is to be known of those before."""

    started: float
    is_ready: bool = False
    code: int | None = None                 # of the last end; None: it has never ended
    row: int = 0                            # equal ends in a row, without progress between them
    endings: int = 0
    given_up: bool = False
    due: float | None = None                # when it is started anew; None: it runs, or is given up

    @property
    def worth_a_note(self) -> bool:
        """Whether people should be told of this end: not of each, when one is like the other."""
        return self.given_up or self.row <= NOTES_MAX or self.row.bit_count() == 1

    def text(self) -> str:
        """The last end and what follows, for people."""
        assert self.code is not None
        times = f", {self.row} times in a row" if self.row > 1 else ""
        if self.given_up:
            return (f"ended {how(self.code)}{times}, and is not started any more: see its log; "
                    "what it held stays in memory")
        return f"ended {how(self.code)}{times} and is started anew"


class Endings:
    """What a supervisor knows of its brokers' lives."""

    def __init__(self) -> None:
        self._lives: dict[int, Life] = {}

    def of(self, broker: int) -> Life:
        """One broker's."""
        return self._lives[broker]

    def started(self, broker: int, now: float) -> None:
        """A broker's process was started."""
        life = self._lives.setdefault(broker, Life(now))
        life.started, life.is_ready, life.due = now, False, None

    def ready(self, broker: int) -> None:
        """It answers."""
        self._lives[broker].is_ready = True

    def ended(self, broker: int, code: int, now: float) -> bool:
        """Its process is found ended. Whether that is news."""
        life = self._lives[broker]
        if life.due is not None or life.given_up:
            return False
        outside = -code in _FROM_OUTSIDE
        steady = now - life.started >= STEADY_SECONDS or (outside and life.is_ready)
        life.row = 1 if steady or code != life.code else life.row + 1
        life.code, life.endings = code, life.endings + 1
        most = FAULT_PAUSE_SECONDS_MAX if code < 0 and not outside else (
            PAUSE_SECONDS_MAX if life.row <= LONG_ROW else LONG_PAUSE_SECONDS_MAX)
        life.given_up = code < 0 and life.row >= (KILLS_MAX if outside else FAULTS_MAX)
        if not life.given_up:
            pause = min(most, PAUSE_SECONDS * 2 ** min(life.row - 1, 10))
            life.due = max(now, life.started + PAUSE_SECONDS) if life.row == 1 else now + pause - PAUSE_SECONDS
        return True

    def postpone(self, broker: int, now: float) -> None:
        """It could not be started now: later."""
        self._lives[broker].due = now + PAUSE_SECONDS_MAX

    def save(self, folder: Path) -> None:
        """Write down what `cluster status` shows. A folder that has gone has nobody who looks."""
        with contextlib.suppress(OSError):
            fresh = folder / f".{ENDINGS_FILE}"
            fresh.write_text(json.dumps({
                broker: {**asdict(life), "how": how(life.code)} for broker, life in self._lives.items()
                if life.code is not None}))
            os.replace(fresh, folder / ENDINGS_FILE)


def endings_in(folder: Path) -> dict[int, dict[str, Any]]:
    """What a supervisor wrote down, by broker."""
    try:
        return {int(broker): dict(values) for broker, values in json.loads((folder / ENDINGS_FILE).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
