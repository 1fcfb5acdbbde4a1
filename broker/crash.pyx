"""Places where a test kills this process: at the boundaries of the stages, between two stores that belong together.

Compiled in and free when off: one load and one branch. `arm` is called when a broker starts, from its configuration.
"""

from libc.stdint cimport uint64_t

from broker.errors import ConfigError
from sim.cxl.primitives cimport cxl_fetch_add

cdef extern from "<signal.h>" nogil:
    int kill(int pid, int number)
    int SIGKILL

cdef extern from "<unistd.h>" nogil:
    int getpid()

cdef uint64_t visits_left = 0

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
    kill(getpid(), SIGKILL)


def parse_crash_points(setting: str) -> dict[int, tuple[str, int]]:
    """Broker -> (point, visit) from "BROKER:POINT:VISIT,...". Raises `ConfigError`."""
    found = {}
    for each in filter(None, setting.split(",")):
        broker, _, rest = each.partition(":")
        point, _, visit = rest.partition(":")
        if not broker.isdigit() or point not in CRASH_POINTS or not (visit or "1").isdigit() or visit == "0":
            raise ConfigError(setting="crash_points", value=repr(each),
                              allowed="BROKER:POINT:VISIT with a point of " + ", ".join(CRASH_POINTS))
        found[int(broker)] = point, int(visit or "1")
    return found


def arm(point: str, visit: int = 1) -> None:
    """Kill this process when it reaches `point` for the `visit`-th time. An empty point disarms."""
    global armed_point, visits_left
    visits_left = visit
    armed_point = CRASH_POINTS[point] if point else 0
