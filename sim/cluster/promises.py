"""Which files promise something, and how much of them runs under seeds: `cxlmq sim --coverage`.

    seed ──run──► lines of these files that ran ──union over all seeds──► share by file, and the lines that never ran

Only lines inside of functions count: what runs when a file is imported proves nothing. Python files alone: what is
native is stepped by the simulation in any run, and building it with line tracing would make it another program.
"""

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from broker.errors import ConfigError
from sim.cluster.run import Verdict, run_scenario
from sim.cluster.scenario import Scenario

ROOT = Path(__file__).resolve().parents[2]
Lines = dict[str, list[int]]                # path from the root -> numbers of lines


@dataclass(frozen=True)
class Promise:
    """A file that promises something: of what subject, and what goes wrong when it errs."""

    subject: str
    file: str
    why: str


PROMISES: tuple[Promise, ...] = (
    Promise("client protocol", "client/publishing/session.py", "what becomes of each batch, over all sessions: once"),
    Promise("client protocol", "client/publishing/opening.py", "which session goes on, and which tries were ours"),
    Promise("client protocol", "client/publishing/stream_flights.py", "which way a batch goes, and goes again"),
    Promise("client protocol", "client/publishing/attached_flights.py", "the same through slots, leases and rings"),
    Promise("client protocol", "client/levels.py", "a receipt's level is true after a session was opened anew"),
    Promise("client protocol", "client/subscribing/reading.py", "nothing skipped, nothing of another topic, or told"),
    Promise("client protocol", "client/subscribing/search.py", "which broker is asked for a place, and what ends that"),
    Promise("client protocol", "client/subscribing/attached_reading.py", "the same over views, which somebody holds"),
    Promise("client protocol", "client/buffer.py", "what was received and not given out, in order"),
    Promise("client protocol", "client/group.py", "one member reads at a time, and commits never go back"),
    Promise("tables", "broker/sessions.py", "slots of sessions and cursors: one owner, fenced when it is gone"),
    Promise("tables", "broker/session_service.py", "what a new session is told of the one before"),
    Promise("tables", "broker/reading_service.py", "where a reader begins, and that nothing behind is given away"),
    Promise("tables", "broker/attached_clients.py", "what attached clients hold, and lose when they are gone"),
    Promise("tables", "broker/topics.py", "a topic's place, generation and deletion"),
    Promise("tables", "broker/groups.py", "a group's place is monotone, its holder alone"),
    Promise("tables", "broker/bank.py", "nobody writes a bank that was given up"),
    Promise("disk", "broker/durable_files.py", "a small file is whole, old or new"),
    Promise("disk", "broker/group_files.py", "commits of groups that outlive memory"),
    Promise("disk", "broker/replica_folder.py", "a replica file goes when nobody needs it, and no sooner"),
    Promise("disk", "broker/replica_files.py", "what a disk has, told from what is damaged"),
    Promise("disk", "broker/data_directory.py", "nobody begins over an earlier cluster's data"),
    Promise("disk", "broker/recovery.py", "what comes back when memory is gone"),
    Promise("disk", "broker/recovery_check.py", "a recovery that cannot hold everything is refused"),
    Promise("disk", "broker/payload_places.py", "where what comes back goes"),
    Promise("disk", "broker/restore.py", "a new region says what the disks said"),
    Promise("disk", "broker/removals.py", "what was deleted while a broker was away stays deleted"),
    Promise("head", "broker/leadership.py", "one head at a time, and what it gives up"),
    Promise("head", "broker/head_calls.py", "a call for the head is made once, over a change of heads"),
    Promise("head", "broker/membership.py", "who lives, and who should be head"),
    Promise("head", "broker/replica_watch.py", "who keeps copies, and who takes the place of the dead"),
    Promise("supervisor", "client/claim.py", "who has a name, and what of the dead may be removed"),
    Promise("supervisor", "client/restarts.py", "who is started again, and when no more"),
)


# ---- running -------------------------------------------------------------------------------------------------------


def _new_measure(files: Iterable[str], root: Path) -> Any:
    """A measurement of these files alone, which no configuration of the user's changes. Raises `ConfigError`."""
    try:
        from coverage import Coverage
    except ImportError:
        raise ConfigError(setting="coverage", value="on",
                          allowed="only with the library coverage: pip install 'cxlmq[dev]'") from None
    measure = Coverage(data_file=None, config_file=False, include=[str(root / file) for file in files])
    measure.set_option("run:disable_warnings", ["no-data-collected", "module-not-measured", "trace-changed"])
    return measure


def check_available() -> None:
    """Say before anything runs that lines cannot be counted here. Raises `ConfigError`."""
    _new_measure((), ROOT)


def lines_run(call: Callable[[], Any], files: Iterable[str], root: Path = ROOT) -> tuple[Any, Lines]:
    """What a call returns, and the lines of these files that ran in it."""
    chosen = tuple(files)
    measure = _new_measure(chosen, root)
    measure.start()
    try:
        answer = call()
    finally:
        measure.stop()
    data = measure.get_data()
    return answer, {file: sorted(data.lines(str(root / file)) or ()) for file in chosen}


def measured(scenario: Scenario) -> Verdict:
    """Run a scenario; its verdict, with the promising lines that ran."""
    verdict, ran = lines_run(lambda: run_scenario(scenario), [each.file for each in PROMISES])
    return replace(verdict, ran=ran)


# ---- the report ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """How much of a file ran."""

    promise: Promise
    lines: int
    missing: list[int]

    @property
    def ran(self) -> int:
        """Lines that ran."""
        return self.lines - len(self.missing)

    def to_json(self) -> dict[str, Any]:
        """For `--json`: what did not run as [first, last] of each range."""
        return {"subject": self.promise.subject, "file": self.promise.file, "why": self.promise.why,
                "lines": self.lines, "ran": self.ran, "missing": ranges(self.missing)}


def _lines_in_functions(source: str) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.update(range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1))
    return found


def shares(ran: Iterable[Lines], promises: Iterable[Promise] | None = None, root: Path = ROOT) -> list[Share]:
    """Of each promising file, how many lines there are in functions and which of them no run came to."""
    chosen = tuple(PROMISES if promises is None else promises)
    measure = _new_measure((each.file for each in chosen), root)
    for each in ran:
        measure.get_data().add_lines({str(root / file): lines for file, lines in each.items() if lines})
    found = []
    for promise in chosen:
        path = root / promise.file
        _, statements, _, missing, _ = measure.analysis2(str(path))
        inside = _lines_in_functions(path.read_text())
        found.append(Share(promise, len(inside & set(statements)), sorted(inside & set(missing))))
    return found


def ranges(lines: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as (first, last) of each unbroken row."""
    found: list[tuple[int, int]] = []
    for number in lines:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def ranges_text(lines: Iterable[int]) -> str:
    """The same for people: 3, 7-9."""
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges(lines))
