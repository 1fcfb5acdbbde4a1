"""Makes a failing run small: fewer faults, fewer clients, fewer steps, as long as it still fails in the same way."""

from collections.abc import Callable, Iterator

from sim.cluster.run import Verdict, run_scenario
from sim.cluster.scenario import Scenario

RUNS_MAX = 250
SCHEDULES = 20                              # other draws of who steps when that are tried at the end

_SMALLER: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("earlier_life", (False,)), ("attached_readers", (0,)), ("attached", (0, 1)), ("replication_factor", (1,)),
    ("ack", (1,)), ("delivery_steps", (0,)), ("publishers", (1, 2)), ("subscribers", (1,)), ("hosts", (1, 2, 3)),
    ("scanners", (1,)), ("batches", (2, 5, 10, 20)), ("window", (1, 2, 8)), ("lock", ("atomic",)),
    ("pool", ("atomic",)), ("order", (5,)),
)


def _without_a_fault(scenario: Scenario) -> Iterator[Scenario]:
    if len(scenario.faults) > 1:
        yield scenario.smaller(faults=())
    for i in range(len(scenario.faults)):
        yield scenario.smaller(faults=scenario.faults[:i] + scenario.faults[i + 1:])


def _without_a_kind(scenario: Scenario) -> Iterator[Scenario]:
    for kind in sorted(scenario.kinds):
        yield scenario.smaller(kinds=scenario.kinds - {kind})


def _with_less(scenario: Scenario) -> Iterator[Scenario]:
    for name, values in _SMALLER:
        for value in values:
            now = getattr(scenario, name)
            larger = name != "order" and isinstance(now, int) and isinstance(value, int) and value > now
            changed = scenario.smaller(**{name: value})
            if now != value and not larger and _is_sound(changed):
                yield changed


def _is_sound(scenario: Scenario) -> bool:
    """Whether a changed run can be made: its faults strike who is there."""
    who = {"crash": scenario.hosts, "stall": scenario.hosts, "client": scenario.publishers, "cut": scenario.publishers,
           "pause": scenario.attached, "disk": scenario.hosts, "loss": 1}
    return (scenario.scanners <= scenario.hosts and scenario.replication_factor <= scenario.hosts
            and scenario.attached <= scenario.publishers and scenario.attached_readers <= scenario.subscribers
            and (scenario.attached > 0 or scenario.attached_readers == 0)
            and (scenario.ack < 2 or scenario.replication_factor > 1)
            and all(fault.where < who[fault.kind] for fault in scenario.faults))


def shrink(scenario: Scenario, verdict: Verdict, progress: Callable[[int, Scenario], None] = lambda runs, found: None
           ) -> tuple[Scenario, Verdict]:
    """The smallest run found that breaks the same invariant; and its verdict."""
    runs = 0

    def fails(candidate: Scenario) -> Verdict | None:
        nonlocal runs
        runs += 1
        found = run_scenario(candidate)
        return found if (found.verdict, found.invariant) == (verdict.verdict, verdict.invariant) else None

    improved = True
    while improved and runs < RUNS_MAX:
        improved = False
        for ways in (_without_a_fault, _without_a_kind, _with_less):
            for candidate in ways(scenario):
                if runs >= RUNS_MAX:
                    break
                if found := fails(candidate):
                    scenario, verdict, improved = candidate, found, True
                    progress(runs, scenario)
                    break
    for number in range(1, SCHEDULES):
        candidate = scenario.smaller(schedule=number)
        found = fails(candidate)
        if found is not None and found.steps < verdict.steps:
            scenario, verdict = candidate, found
            progress(runs, scenario)
    return scenario, verdict
