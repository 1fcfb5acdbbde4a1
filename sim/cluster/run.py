"""Running seeds: one here, or a range over several cores."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from time import perf_counter
from typing import Any

from broker.coherence import explain, report_text
from sim.cluster.crashes import enumerate_crashes
from sim.cluster.history import Violation
from sim.cluster.mutants import BY_NAME, Mutant, planter, switch_on
from sim.cluster.scenario import FAULT_KINDS, Scenario, draw
from sim.cluster.world import SECOND, World

COHERENCE = "coherence"                     # the "invariant" that the checker judges
GO_ON_STEPS = 500                           # after a breach, under the checker


@dataclass(frozen=True)
class Verdict:
    """What became of a run."""

    seed: int
    verdict: str                            # ok, violation, error
    steps: int
    trace_hash: str
    batches: int                            # in the log
    invariant: str = ""
    text: str = ""
    seconds: float = 0.0
    simulated_seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)    # that met somebody, by kind
    ran: dict[str, list[int]] = field(default_factory=dict, repr=False)     # promising lines, when they were counted

    @property
    def failed(self) -> bool:
        """Whether something does not hold."""
        return self.verdict != "ok"

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {name: value for name, value in asdict(self).items() if name != "ran"}


def run_world(scenario: Scenario, tracing: bool = False) -> tuple[Verdict, World]:
    """Run a scenario; its verdict, and the world as it was at the end (closed)."""
    begun = perf_counter()
    mutant = BY_NAME[scenario.mutant] if scenario.mutant else None
    switch_on(mutant)
    world = World(scenario, planter(mutant) if mutant is not None else None, tracing=tracing,
                  unsynced=mutant.unsynced if mutant is not None else "")
    verdict, invariant, text = "ok", "", ""
    try:
        world.run()
        if (found := coherence_report(world))["reports"]:
            raise Violation(COHERENCE, report_text(found))
    except Violation as violation:
        verdict, invariant, text = "violation", violation.invariant, violation.text
        if world.hardware.checker is not None and invariant != COHERENCE:
            _go_on(world)
            text += "\n" + report_text(coherence_report(world))
    except Exception as error:
        verdict, invariant = "error", type(error).__name__
        text = f"{error}\n{traceback.format_exc(limit=-6)}"
    finally:
        world.close()
        switch_on(None)
    batches = len(world.witness.log_of(0))
    return Verdict(scenario.seed, verdict, world.step, f"{world.trace_hash:016x}", batches, invariant, text,
                   perf_counter() - begun, (world.clock.now() - SECOND) / SECOND, dict(+world.injected)), world


def _go_on(world: World) -> None:
    """An invariant is broken already: let those come by who read what is wrong, so that the checker names them, too."""
    world.witness.look_away()
    with suppress(Exception):               # whatever follows from what is broken: the verdict is there
        world.advance(world.step + GO_ON_STEPS)


def run_scenario(scenario: Scenario) -> Verdict:
    """Run a scenario."""
    return run_world(scenario)[0]


Runner = Callable[[Scenario], Verdict]


def _run_seed(job: tuple[int, dict[str, Any], Runner]) -> Verdict:
    seed, options, runner = job
    return runner(draw(seed, **options))


def run_seeds(seeds: range, processes: int, runner: Runner = run_scenario, **options: Any) -> Iterator[Verdict]:
    """Run a range of seeds over several processes; verdicts as they come, in the order of the seeds."""
    jobs = [(seed, options, runner) for seed in seeds]
    if processes == 1:
        yield from map(_run_seed, jobs)
        return
    context = get_context("forkserver")                     # whoever calls may have threads
    context.set_forkserver_preload([__name__])
    with context.Pool(processes) as pool:
        yield from pool.imap(_run_seed, jobs, chunksize=4)


def coherence_report(world: World) -> dict[str, Any]:
    """What the coherence checker found, explained; nothing when memory is not checked."""
    checker = world.hardware.checker
    if checker is None:
        return {"reports": []}
    checker.find_stranded(0)
    return explain(checker.reports(), [], world.layout)


def run_checked(scenario: Scenario) -> list[dict[str, Any]]:
    """Run a scenario under the coherence checker; what that found, whatever else was broken."""
    return list(coherence_report(run_world(scenario.smaller(memory="checked"))[1])["reports"])


HUNT_SEEDS, HUNT_STEPS = 200, 6_000
HUNT_PAIRS = 200


def hunt(mutant: Mutant, seeds: int = HUNT_SEEDS, steps: int = HUNT_STEPS) -> Verdict | None:
    """Run seeds, or pairs of crashes where it takes two, until one catches the mutant; its verdict, or None."""
    if mutant.twice:
        return _hunt_pairs(mutant)
    kinds = frozenset(FAULT_KINDS) if mutant.needs is None else mutant.needs
    for seed in range(seeds):
        scenario = draw(seed, steps=steps, kinds=kinds, mutant=mutant.name)
        if mutant.on_disk and not scenario.loses:
            continue
        verdict = run_scenario(scenario.smaller(**dict(mutant.shape)))
        if verdict.failed:
            return verdict
    return None


def _hunt_pairs(mutant: Mutant) -> Verdict | None:
    for number, found in enumerate(enumerate_crashes(HUNT_PAIRS, mutant=mutant.name)):
        if found.broken is not None:
            return Verdict(number, "violation", found.steps, found.trace_hash, 0, found.broken.invariant,
                           f"{found.broken.text}; {found.plan}")
    return None
