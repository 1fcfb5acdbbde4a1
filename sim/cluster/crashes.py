"""Two crashes in one run, at every two points that differ: the head's, and then of whoever takes over or comes back.

    run ──record──► operations of the head ──it falls at each──► run ──record──► operations of the takeover, or of the
    head that was started again ──that falls at each──► run, drained and judged like every other

Each power cut is tried with "flush on failure" that succeeds (all that was stored gets to memory) and that fails
(nothing that was not fenced does). Cuts that leave the same memory are tried once: where nothing unfenced survives,
only fences and what goes around caches differ; where all survives, only stores do. A cut that leaves memory as an
earlier one of its kind did, when clients knew as much, is left out as well: who comes next finds the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from random import Random
from zlib import crc32

from broker.layout import RECORDS, Layout
from sim.cluster.door import HostControl, Operation
from sim.cluster.history import Violation
from sim.cluster.mutants import BY_NAME, planter, switch_on
from sim.cluster.scenario import Fault, Scenario
from sim.cluster.succession import Succession
from sim.cluster.world import Host, World

HOSTS, STEPS = 3, 4_000
FIRST_STEP = 700                            # from then on the first host may fall; all is under way
FIRST_OPERATIONS = 1_500                    # at one of so many
TRAIL, AFTERWARDS = 1 << 14, 100            # operations that are recorded at most, and of them after its end
AGAIN = 1_500                               # steps until a broker is started again
AT_ONCE = 10
NEVER = 1 << 40                             # a step that does not come
POLICIES = ("kept", "lost")                 # flush on failure succeeds, fails
PLACES = ("takeover", "restart")            # where the second crash strikes
STORES = {Operation.OP_STORE, Operation.OP_WRITE_LINE, Operation.OP_ATOMIC, Operation.OP_COPY_IN}
FENCES = {Operation.OP_FENCE, Operation.OP_FULL_FENCE, Operation.OP_ATOMIC}


Seen = set[tuple[str | int, ...]]


@dataclass(frozen=True)
class Cut:
    """Power goes at this operation, counted from where a trail begins; what becomes of unfenced lines."""

    operation: int
    policy: str


@dataclass(frozen=True)
class Plan:
    """Who falls when. `place` says whether a takeover falls next, or the restart of who fell first."""

    first: Cut | None
    place: str = "takeover"
    second: Cut | None = None

    def __str__(self) -> str:
        if self.first is None:
            return "nobody falls"
        second = f", then the {self.place} at its operation {self.second.operation} ({self.second.policy})" if (
            self.second) else f", then a {self.place}"
        return f"the head at operation {self.first.operation} ({self.first.policy}){second}"


NOBODY = Plan(None)


@dataclass(frozen=True)
class Outcome:
    """What became of a plan."""

    plan: Plan
    cuts: int                               # that struck
    steps: int
    trace_hash: str
    trail: list[tuple[int, int]] = field(repr=False)        # the operations among which the next cut is chosen
    known: bool = False                     # memory was left as an earlier plan had left it: not run to its end
    broken: Violation | None = None


class Enough(Exception):
    """From here on it is a run that was there before."""


class FallingSuccession(Succession):
    """A takeover is told when its host's power goes."""

    world: "CrashWorld"

    def _bank(self, host: Host) -> int | None:
        """Not the bank of a takeover that fell, as long as there is another one: what it holds stays to be seen."""
        control = self.control
        lowest = super()._bank(host)
        used = {lowest, control >> 8 & 0xFF, (control >> 16 & 0xFF) - 1, *self.banks.values()}
        return next((bank for bank in range(self.world.layout.numbers["bank_count"]) if bank not in used), lowest)

    def _begin(self, host: Host) -> None:
        self.world.second_begins("takeover", host.control)
        super()._begin(host)

    def _go_on(self) -> None:
        super()._go_on()
        if self.takeover is None:
            self.world.second_ends("takeover")


class CrashWorld(World):
    """A world in which power goes by plan. `trail` are the operations among which the next cut may be chosen."""

    def __init__(self, scenario: Scenario, plan: Plan, seen: Seen, mutant: str = "") -> None:
        self.plan, self.seen, self.cuts, self.trail_end = plan, seen, 0, 0
        self.recording: HostControl | None = None
        super().__init__(scenario, planter(BY_NAME[mutant]) if mutant else None)
        self.succession = FallingSuccession(self)
        self._timely = list(_timely(self.layout))
        self.policies = [cut.policy for cut in (plan.first, plan.second) if cut is not None]
        self._crash = self.hardware.crash
        self.hardware.crash = self._cut     # type: ignore[method-assign]
        self.at(FIRST_STEP, self._first)

    def _first(self) -> None:
        control = self.hosts[0].control
        if self.plan.first is None:
            control.record(FIRST_OPERATIONS)
            self.recording = control
        else:
            control.crash_at = control.operations + self.plan.first.operation

    def second_begins(self, place: str, control: HostControl) -> None:
        """Who may fall next begins now."""
        if place != self.plan.place or self.cuts != 1:
            return
        if self.plan.second is not None:
            control.crash_at = control.operations + self.plan.second.operation
        elif self.recording is None:
            control.record(TRAIL)
            self.recording = control

    def second_ends(self, place: str) -> None:
        """What could be cut short is done: only what comes right after it is recorded still."""
        if self.recording is not None and place == self.plan.place and self.trail_end == 0:
            self.trail_end = len(self.recording.recorded()) + AFTERWARDS

    def allow(self) -> None:
        """Who came back knows the past now, perhaps."""
        super().allow()
        if self.cuts and self.hosts[0].powered and self.hosts[0].incarnation > 1:
            self.second_ends("restart")

    def trail(self) -> list[tuple[int, int]]:
        """The operations among which the next cut is chosen."""
        found = self.recording.recorded() if self.recording is not None else []
        return found[:self.trail_end or None]

    def new_control(self, number: int) -> HostControl:
        """The restart of who fell first begins with its new power switch."""
        control = super().new_control(number)
        if number == 0:
            self.second_begins("restart", control)
        return control

    def _cut(self, host: int, policy: str) -> None:
        self.cuts += 1
        self._crash(host, self.policies[self.cuts - 1] if self.cuts <= len(self.policies) else policy)
        if self.plan.place == "restart" and self.cuts == 2:
            self.at(self.step + AGAIN, self.hosts[host].begin_again)
        if self.cuts == len(self.policies):
            left: tuple[str | int, ...] = (self.plan.place, self._memory_left(), *self._told())
            if left in self.seen:
                raise Enough
            self.seen.add(left)

    def _told(self) -> tuple[int, ...]:
        """What clients know by now: how much was acknowledged, how much was read."""
        return (sum(each.outcome == "ok" for each in self.history.operations),
                *(len(reads) for reads in self.history.reads.values()))

    def _memory_left(self) -> int:
        """What those who come next find, as a number, without what only says when."""
        found = bytearray(self.hardware.mapping[:self.layout.numbers["segments"]])
        for at, nbytes in self._timely:
            found[at:at + nbytes] = bytes(nbytes)
        return crc32(found) << 32 | crc32(found[::-1])


def _timely(layout: Layout) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of heartbeats, times, bells and counters."""
    numbers = layout.numbers
    for host in range(numbers["broker_count"]):
        yield layout.offset_of("broker", host) + _place("BrokerLine", "heartbeat_ns"), 8
        yield from ((layout.offset_of("doorbell", host, which), 64) for which in range(2))
    for segment in range(numbers["segment_count"]):
        yield layout.offset_of("segment_line", segment) + _place("SegmentLine", "opened_ns"), 8
    for bank, topic in product(range(numbers["bank_count"]), range(numbers["topic_count_max"])):
        yield (bank * numbers["bank_stride"] + layout.offset_of("topic", topic)
               + _place("TopicLine", "created_wall_ns")), 8
    yield next((at, count) for name, at, count in layout.sections if name == "statistics")


def _place(record: str, field_name: str) -> int:
    return next(at for name, _, _, at in RECORDS[record] if name == field_name)


def scenario_of(plan: Plan) -> Scenario:
    """A small run without any other fault. Brokers that fell are started again."""
    first = AT_ONCE if plan.place == "restart" else AGAIN
    faults = tuple(Fault(NEVER, "crash", host, 1, "lost", first if host == 0 else AGAIN) for host in range(HOSTS))
    return Scenario(seed=1, hosts=HOSTS, steps=STEPS, kinds=frozenset({"crash"}), faults=faults, publishers=2,
                    subscribers=1, batches=30, window=4, ring_slots=16, entries=64)


def run_plan(plan: Plan, seen: Seen, mutant: str = "") -> Outcome:
    """Run a plan. `seen` is what earlier plans have left in memory."""
    switch_on(BY_NAME[mutant] if mutant else None)
    world = CrashWorld(scenario_of(plan), plan, seen, mutant)
    broken, known = None, False
    try:
        world.run()
    except Violation as violation:
        broken = violation
    except Enough:
        known = True
    finally:
        world.close()
        switch_on(None)
    return Outcome(plan, world.cuts, world.step, f"{world.trace_hash:016x}", world.trail(), known, broken)


def points(trail: list[tuple[int, int]], policy: str, coherent: range) -> list[int]:
    """The operations of a trail at which a cut leaves other memory than at the one before."""
    return [number for number, (operation, offset) in enumerate(trail, 1)
            if operation in (STORES if policy == "kept" else FENCES) or (operation in STORES and offset in coherent)]


def enumerate_crashes(pairs_max: int = 0, seed: int = 0, mutant: str = "") -> Iterator[Outcome]:
    """Run all pairs of cuts, or about `pairs_max` that are drawn (0: all); before them nobody falls, or one alone."""
    random, layout = Random(seed), Layout.compute(**scenario_of(NOBODY).region())
    first_coherent, count = next((at, count) for name, at, count in layout.sections if name == "coherent area")
    share = max(1, round((pairs_max / len(PLACES)) ** 0.5 / len(POLICIES)))

    def cuts(trail: list[tuple[int, int]]) -> Iterator[Cut]:
        for policy in POLICIES:
            found = points(trail, policy, range(first_coherent, first_coherent + count))
            if pairs_max:
                found = sorted(random.sample(found, min(share, len(found))))
            yield from (Cut(point, policy) for point in found)

    nobody = run_plan(NOBODY, set(), mutant)
    yield nobody
    first_seen: Seen = set()
    for first in cuts(nobody.trail):
        for place in PLACES:
            alone = run_plan(Plan(first, place), first_seen, mutant)
            yield alone
            second_seen: Seen = set()
            for second in cuts(alone.trail):
                yield run_plan(Plan(first, place, second), second_seen, mutant)
