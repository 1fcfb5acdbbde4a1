"""The faults of a chaos run: what is done to which process, when. A seed decides all of it.

    kill         -9 of a broker, the head, a publisher, a reader
    stop         SIGSTOP of one of them, for shorter or longer than any lease, then SIGCONT
    disk         full, failing or slow, for a while, where the faulty disk is preloaded
    garbage      random bytes to a random gRPC method
    kill all     -9 of all brokers at once: the region outlives them
    other        another cluster is started beside this one, leftovers are collected, and it is stopped
    damage       one bit of the region, in an order entry of a topic that is there for this
"""

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Protocol

DISK_RULES = ("write enospc -1 .replica", "write eio -1 .replica", "sync eio -1 .replica", "sync eio 1 .replica",
              "sync delay=200 -1 .replica", "write short 1 .replica")
# What is done how often; kills of clients are cheap and many.
WEIGHTS = {
    "kill publisher": 30, "kill reader": 25, "kill broker": 17, "kill head": 10, "stop broker": 4, "stop head": 3,
    "stop publisher": 3, "stop reader": 3, "disk": 3, "garbage": 5, "damage": 3, "kill all": 2, "other": 2,
}
TRIES = 100             # to bring a kind once that finds nobody at first
STOP_SECONDS = (0.05, 4.0)
DISK_SECONDS = (0.2, 4.0)


class Target(Protocol):
    """What faults are done to."""

    def brokers(self) -> dict[int, int]: ...
    def head(self) -> int | None: ...
    def publishers(self) -> list[int]: ...
    def readers(self) -> list[int]: ...
    def fail_disks(self, *rules: str) -> bool: ...
    def send_garbage(self, chance: random.Random) -> None: ...
    def damage(self, chance: random.Random) -> str: ...
    def start_other(self) -> bool: ...


@dataclass
class Fault:
    """One fault that was done."""

    what: str
    whom: str
    at_ns: int
    until_ns: int = 0


@dataclass
class Injector:
    """Does faults to a target, one after the other, and keeps a list of them."""

    target: Target
    seed: int
    weights: dict[str, int] = field(default_factory=lambda: dict(WEIGHTS))
    done: list[Fault] = field(default_factory=list)
    _stopped: dict[int, float] = field(default_factory=dict)        # pid: when it goes on
    _heal_at: float | None = None                                   # when disks are well again

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._first = sorted(self.weights)              # each kind once, then by chance
        self._chance.shuffle(self._first)
        self._tries = TRIES

    def next_pause(self, mean_seconds: float) -> float:
        """Seconds until the next fault."""
        return min(self._chance.expovariate(1 / mean_seconds), 5 * mean_seconds)

    def inject(self) -> Fault | None:
        """Do one fault; None when there is nobody to do it to just now."""
        first = self._first.pop() if self._first else None
        what = first or self._chance.choices(list(self.weights), list(self.weights.values()))[0]
        done = self._do(what)
        if done is None and first is not None and self._tries:
            self._tries -= 1
            self._first.insert(0, first)
        if done is not None:
            self.done.append(done)
        return done

    def _do(self, what: str) -> Fault | None:
        now = time.monotonic_ns()
        if what == "garbage":
            self.target.send_garbage(self._chance)
            return Fault(what, "a broker", now)
        if what == "damage":
            where = self.target.damage(self._chance)
            return Fault(what, where, now) if where else None
        if what == "other":
            return Fault(what, "another cluster", now) if self.target.start_other() else None
        if what == "kill all":
            killed = [number for number, pid in self.target.brokers().items() if _send(pid, signal.SIGKILL)]
            return Fault(what, f"brokers {killed}", now) if killed else None
        if what == "disk":
            rule, seconds = self._chance.choice(DISK_RULES), self._chance.uniform(*DISK_SECONDS)
            if not self.target.fail_disks(rule):
                return None
            self._heal_at = time.monotonic() + seconds
            return Fault(what, rule, now, now + int(seconds * 1e9))
        verb, kind = what.split()
        found = self._find(kind)
        if found is None:
            return None
        pid, name = found
        if verb == "kill":
            return Fault(what, name, now) if _send(pid, signal.SIGKILL) else None
        seconds = self._chance.uniform(*STOP_SECONDS)
        if not _send(pid, signal.SIGSTOP):
            return None
        self._stopped[pid] = time.monotonic() + seconds
        return Fault(what, name, now, now + int(seconds * 1e9))

    def _find(self, kind: str) -> tuple[int, str] | None:
        brokers, head = self.target.brokers(), self.target.head()
        if kind == "head":
            return (brokers[head], f"broker {head}") if head in brokers else None
        if kind == "broker":
            others = [number for number in brokers if number != head]
            number = self._chance.choice(others) if others else None
            return None if number is None else (brokers[number], f"broker {number}")
        pids = self.target.publishers() if kind == "publisher" else self.target.readers()
        pids = [pid for pid in pids if pid not in self._stopped]
        return (self._chance.choice(pids), f"{kind}") if pids else None

    def let_go(self, all_of_them: bool = False) -> None:
        """Continue whoever was stopped for long enough; disks that failed for long enough are well."""
        if self._heal_at is not None and (all_of_them or time.monotonic() >= self._heal_at):
            self.target.fail_disks()
            self._heal_at = None
        for pid, until in list(self._stopped.items()):
            if all_of_them or time.monotonic() >= until:
                _send(pid, signal.SIGCONT)
                del self._stopped[pid]

    @property
    def owes(self) -> bool:
        """Whether some kind has not come yet: on a slow machine a short run goes on until each has."""
        return bool(self._first) and self._tries > 0

    def kills(self) -> int:
        """Processes that were killed."""
        return sum(fault.what.startswith("kill") for fault in self.done)


def _send(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


