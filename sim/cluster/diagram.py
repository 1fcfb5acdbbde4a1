"""A run as a picture for people: hosts and clients as columns, time downwards."""

import textwrap
from collections.abc import Sequence

from sim.cluster.run import Verdict, run_world
from sim.cluster.scenario import Scenario

ROWS, WIDTH = 40, 30
Event = tuple[int, str, str]                # step, column, text


def diagram(events: Sequence[Event], hosts: int, rows: int = ROWS, width: int = WIDTH) -> str:
    """The last `rows` events, each in the column of the host that did it; clients share one column."""
    names = [*(f"host {host}" for host in range(hosts)), "clients"]
    shown = events[-rows:]
    lines = ["    step  " + " ".join(name.ljust(width) for name in names).rstrip(),
             "  ──────  " + " ".join("─" * width for _ in names)]
    if len(events) > rows:
        lines.append(f"          ({len(events) - rows:,} earlier events are left out)")
    for step, column, text in shown:
        at = names.index(column) if column in names else len(names) - 1
        said = text if column in names else f"{column}: {text}"
        for number, part in enumerate(textwrap.wrap(said, width) or [""]):
            cells = [part.ljust(width) if i == at else ("│" if i < hosts else " ").ljust(width)
                     for i in range(len(names))]
            lines.append(f"{step if number == 0 else '':>8}  " + " ".join(cells).rstrip())
    return "\n".join(lines)


def explain(scenario: Scenario, rows: int = ROWS) -> tuple[str, Verdict]:
    """Run a scenario once more, noting every step that did something; its diagram and verdict."""
    verdict, world = run_world(scenario, tracing=True)
    return diagram(world.events, scenario.hosts, rows), verdict


def describe(scenario: Scenario) -> str:
    """What a run is made of, in a few lines."""
    faults = "\n".join(f"  {fault}" for fault in scenario.faults) or "  none"
    return (f"hosts: {scenario.hosts}; scanners: {scenario.scanners}; pool: {scenario.pool}\n"
            f"publishers: {scenario.publishers}, each of {scenario.batches} batches, window {scenario.window}; "
            f"readers: {scenario.subscribers}\norder {scenario.order}, ack {scenario.ack}, replication factor "
            f"{scenario.replication_factor}\nfaults ({', '.join(sorted(scenario.kinds)) or 'none'}):\n{faults}")
