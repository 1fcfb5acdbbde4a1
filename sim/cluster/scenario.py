"""What a run is made of: everything that follows from its seed, and the faults that strike it."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

FAULT_KINDS = ("crash", "evict", "stall", "torn", "net", "loss", "disk")
KIB, MIB = 1 << 10, 1 << 20
STEPS = 20_000
STAGES = 8                                  # of a host that may stall alone; the head has more
SLOTS = 4                                   # of attached clients at each host, at least
LEASE_TICKS = 3_000                         # a session's gap may last so many ticks of the clock


@dataclass(frozen=True)
class Fault:
    """One fault of a run: what happens, at which step, to which host or client, and how long."""

    step: int
    kind: str                               # crash, client, stall, pause, cut, loss, disk
    where: int
    argument: int = 0                       # crash: operations, below 0 fences, until then; stall: steps; cut: host;
    #                                         disk: calls that fail; loss: 1 files are damaged as well
    policy: str = "lost"                    # crash: what becomes of lines that were not fenced; disk: what fails
    again: int = 0                          # crash: steps until the broker is started again; 0 never
    stage: int = -1                         # stall: only this stage of the host, a thread that gets no processor

    def __str__(self) -> str:
        what = {"crash": f"host {self.where} loses power {abs(self.argument)} "
                         f"{'fences' if self.argument < 0 else 'operations'} later; "
                         f"unfenced lines: {self.policy}"
                         f"{f'; started again {self.again} steps later' if self.again else ''}",
                "client": f"client {self.where + 1} dies",
                "pause": f"client {self.where + 1} stands still for {self.argument} steps",
                "stall": f"{'' if self.stage < 0 else f'stage {self.stage} of '}host {self.where} stands still for "
                         f"{self.argument} steps",
                "loss": f"all hosts lose power, and the region is lost{'; files are damaged' if self.argument else ''}",
                "disk": f"host {self.where}: the next {self.argument} calls of its disk meet: {self.policy}",
                "cut": f"client {self.where + 1} loses its connection to host {self.argument}"}[self.kind]
        return f"step {self.step}: {what}"


@dataclass(frozen=True)
class Scenario:
    """A run. `draw` makes one from a seed; shrinking makes smaller ones of it."""

    seed: int
    hosts: int
    steps: int
    kinds: frozenset[str]
    faults: tuple[Fault, ...]
    profile: str = ""
    memory: str = "noncoherent"
    mutant: str = ""
    order: int = 5
    ack: int = 1
    replication_factor: int = 1
    publishers: int = 3
    subscribers: int = 2
    batches: int = 60                       # of each publisher
    window: int = 8
    scanners: int = 1
    lock: str = "atomic"
    pool: str = "atomic"
    ring_slots: int = 16
    entries: int = 64
    segment_bytes: int = 4 * KIB
    region_bytes: int = MIB
    tick_ns: int = 10_000
    earlier_life: bool = False              # the topic's place had another topic before
    attached: int = 0                       # publishers that write into the memory themselves, the first ones
    attached_readers: int = 0
    delivery_steps: int = 0                 # after so many steps publishers give a batch up; 0 never
    schedule: int = 0                       # another draw of who steps when, for shrinking

    def region(self) -> dict[str, Any]:
        """The numbers of the region's layout."""
        return {"broker_count": self.hosts, "topic_count_max": 2, "ring_slot_count": self.ring_slots,
                "order_entry_count": self.entries, "session_count_max": 8 * self.hosts,
                "cursor_count_max": max(4, 3 * self.subscribers) * self.hosts,     # also while old ones are held
                "attach_slot_count": self.slots * self.hosts if self.attached else 0,
                "segment_bytes": self.segment_bytes,
                "message_bytes_max": 8 * KIB, "batch_bytes_max": 16 * KIB, "region_bytes": self.region_bytes,
                "pool_strategy": self.pool}

    @property
    def slots(self) -> int:
        """Of attached clients at each host: whoever waits for one gets one, also while an old one is being given up."""
        return max(SLOTS, 2 * self.attached + self.attached_readers)

    @property
    def policies(self) -> tuple[str, ...]:
        """What may become of lines that were not fenced when the power goes."""
        return ("random", "inversion", "kept", "lost") if "torn" in self.kinds else ("kept", "lost")

    @property
    def loses(self) -> bool:
        """Whether the region is lost, and recovered from the disks."""
        return self.replication_factor > 1 and any(fault.kind == "loss" for fault in self.faults)

    def smaller(self, **changes: Any) -> "Scenario":
        """The same run with something changed."""
        return replace(self, **changes)

    def random(self, purpose: str) -> Random:
        """A stream of draws of its own for each purpose, so that one can be cut without moving the others."""
        return Random(f"{self.seed}:{purpose}")


def draw(seed: int, hosts: int = 4, steps: int = STEPS, kinds: frozenset[str] = frozenset(FAULT_KINDS),
         profile: str = "", memory: str = "noncoherent", mutant: str = "") -> Scenario:
    """The run that belongs to a seed."""
    random = Random(f"{seed}:scenario")
    order = random.choice((5, 5, 5, 2, 1))
    durable = hosts > 1 and random.random() < 0.25
    pool = random.choice(("atomic", "partitioned", "leader"))
    base = Scenario(
        seed=seed, hosts=hosts, steps=steps, kinds=kinds, faults=(), profile=profile, memory=memory, mutant=mutant,
        order=order, ack=random.choice((1, 1, 2)) if durable else random.choice((1, 1, 1, 0)),
        replication_factor=random.choice((2, min(3, hosts))) if durable else 1,
        publishers=random.randint(1, 4), subscribers=random.randint(1, 3), batches=random.choice((20, 60, 150)),
        window=random.choice((2, 8, 24)), scanners=random.randint(1, hosts), lock=random.choice(("atomic", "mutex")),
        pool=pool, ring_slots=random.choice((16, 16, 64)), entries=random.choice((32, 64, 256)),
        segment_bytes=random.choice((4 * KIB, 16 * KIB)),
        region_bytes=random.choice((MIB, MIB, 2 * MIB)) * -(-hosts // 8),       # more than eight need more
        tick_ns=random.choice((1_000, 10_000, 30_000)), earlier_life=random.random() < 0.3)
    if random.random() < 0.4:               # slots and leases take their share of the region
        base = base.smaller(attached=random.randint(1, min(base.publishers, SLOTS - 1)),
                            attached_readers=random.randint(0, base.subscribers),
                            region_bytes=base.region_bytes + 2 * MIB)
    if kinds:
        base = base.smaller(delivery_steps=base.random("delivery").choice((0, 0, 500, 2_000, 8_000)))
    losses = _draw_losses(base)
    if any(fault.kind == "loss" for fault in losses):
        base = base.smaller(attached=0, attached_readers=0)
    return base.smaller(faults=tuple(sorted((*draw_faults(base), *losses), key=lambda fault: (
        fault.step, fault.kind, fault.where))))


def _draw_losses(scenario: Scenario) -> tuple[Fault, ...]:
    """Faults of disks, of runs that have some. Draws of their own: without these kinds all else stays as it is."""
    random, found = scenario.random("losses"), list[Fault]()
    count, damage = random.choice((0, 1, 1, 2, 3)), "disk" in scenario.kinds and random.random() < 0.5
    for _ in range(count if "loss" in scenario.kinds and scenario.replication_factor > 1 else 0):
        found.append(Fault(random.randrange(scenario.steps // 10, scenario.steps), "loss", 0,
                           int(damage and random.random() < 0.7)))
    for _ in range(random.choice((0, 0, 1, 2)) if "disk" in scenario.kinds and scenario.replication_factor > 1 else 0):
        found.append(Fault(random.randrange(scenario.steps), "disk", random.randrange(scenario.hosts),
                           random.choice((1, 1, 3, 8)), random.choice(("write", "sync", "full"))))
    return tuple(found)


def draw_faults(scenario: Scenario) -> tuple[Fault, ...]:
    """The faults of a run, by their kinds. They leave the first and the last fifth of it alone."""
    random, found = scenario.random("faults"), []
    first, last = scenario.steps // 10, max(scenario.steps * 3 // 5, scenario.steps // 10 + 1)

    def moment() -> int:
        return random.randrange(first, last)

    if "crash" in scenario.kinds:
        for _ in range(random.choice((0, 1, 1, 2))):
            # Half of them before a fence: that is when most is under way.
            after = random.randint(1, 300) if random.random() < 0.5 else -random.randint(1, 40)
            found.append(Fault(moment(), "crash", random.randrange(scenario.hosts), after,
                               random.choice(scenario.policies)))
        if random.random() < 0.4:
            found.append(Fault(moment(), "client", random.randrange(scenario.publishers)))
    if "stall" in scenario.kinds:
        for _ in range(random.choice((0, 1, 3))):
            stage = random.randrange(STAGES) if random.random() < 0.6 else -1
            found.append(Fault(moment(), "stall", random.randrange(scenario.hosts), random.randint(100, 4000),
                               stage=stage))
    if "stall" in scenario.kinds and scenario.attached:
        for _ in range(random.choice((0, 1, 2))):
            found.append(Fault(moment(), "pause", random.randrange(scenario.attached), random.randint(100, 9000)))
    if "net" in scenario.kinds:
        for _ in range(random.choice((0, 1, 3, 6))):
            found.append(Fault(moment(), "cut", random.randrange(scenario.publishers),
                               random.randrange(scenario.hosts)))
    found = [_again(scenario, fault) for fault in found]
    return tuple(sorted(found, key=lambda fault: (fault.step, fault.kind, fault.where)))


def _again(scenario: Scenario, fault: Fault) -> Fault:
    """Whether a broker that lost power is started again, and when: before or after others take its place."""
    random = scenario.random(f"again {fault.step}")
    if fault.kind != "crash" or random.random() < 0.4:
        return fault
    return replace(fault, again=random.choice((10, 300, 1_500, 4_000)))
