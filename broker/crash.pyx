"""Places where a test kills or stops this process: at the boundaries of the stages, between two stores that belong together.

Compiled in and free when off: one load and one branch. `arm` is called when a broker starts, from its configuration.
"""

from libc.stdint cimport uint64_t

from broker.errors import ConfigError
from sim.cxl.primitives cimport cxl_fetch_add

cdef extern from "<signal.h>" nogil:
    int kill(int pid, int number)
    int SIGKILL, SIGSTOP

cdef extern from "<unistd.h>" nogil:
    int getpid()

cdef uint64_t visits_left = 0
cdef int armed_signal = SIGKILL

CRASH_POINTS = {
    "reserved": CRASH_RESERVED, "mid-payload": CRASH_MID_PAYLOAD, "slot-claimed": CRASH_SLOT_CLAIMED,
    "slot-valid": CRASH_SLOT_VALID, "before-ack": CRASH_BEFORE_ACK, "before-number": CRASH_BEFORE_NUMBER,
    "number-taken": CRASH_NUMBER_TAKEN, "mid-entry": CRASH_MID_ENTRY, "entry-written": CRASH_ENTRY_WRITTEN,
    "progress-written": CRASH_PROGRESS_WRITTEN, "committed": CRASH_COMMITTED, "epoch-raised": CRASH_EPOCH_RAISED,
    "half-recovered": CRASH_HALF_RECOVERED, "recovered": CRASH_RECOVERED,
}


cdef void crash_now(uint64_t point) noexcept nogil:
    global armed_point
    if cxl_fetch_add(&visits_left, <uint64_t>-1) != 1:
        return
    kill(getpid(), armed_signal)


def parse_crash_points(setting: str) -> dict[int, tuple[str, int, bool]]:
    """Broker -> (point, visit, only stop) from "BROKER:POINT:VISIT[:stop],...". Raises `ConfigError`."""
    found = {}
    for each in filter(None, setting.split(",")):
        broker, point, visit, what, *more = [*each.split(":"), "", "", ""][:max(4, each.count(":") + 1)]
        if (not broker.isdigit() or point not in CRASH_POINTS or not (visit or "1").isdigit() or visit == "0"
                or what not in ("", "stop") or more):
            raise ConfigError(setting="crash_points", value=repr(each),
                              allowed="BROKER:POINT:VISIT or BROKER:POINT:VISIT:stop with a point of " +
                                      ", ".join(CRASH_POINTS))
        found[int(broker)] = point, int(visit or "1"), what == "stop"
    return found


def arm(point: str, visit: int = 1, stop: bool = False) -> None:
    """Kill this process when it reaches `point` for the `visit`-th time, or stop it. An empty point disarms."""
    global armed_point, visits_left, armed_signal
    visits_left, armed_signal = visit, SIGSTOP if stop else SIGKILL
    armed_point = CRASH_POINTS[point] if point else 0
