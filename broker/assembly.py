"""How a broker is put together: the stages that it runs, what they share, and what a head runs in addition.

                    doors, clock, disk, settings
                                 ▼
    Assembly    line, log, pool ─ receiver ─ sessions, cursors, topics, groups ─ session and reading
                                                                               services, attached clients
                directory ─ attach ─ delegation ─ acks ─ watch ─ release ─ replication
                                 │ lead (after a takeover), resign
    HeadStages  scanners ─ reclaim, pool leader, replica watch

It starts no thread and waits for nobody: the broker process steps it in threads (`THREAD_PLANS`), the simulation by a
drawn schedule, tests by hand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker.attached_clients import AttachedClients
from broker.bank import Bank
from broker.doorbell import Doorbell
from broker.groups import GroupTable
from broker.head import HeadDoorbell, HeadView
from broker.layout import Layout
from broker.log import BrokerLog
from broker.notifier import Notifier
from broker.order_lock import LOCK_MODES
from broker.own_line import CURSORS_WORD, SESSIONS_WORD, OwnLine
from broker.reading_service import ReadingService
from broker.replica_folder import ReplicaFolder
from broker.replica_watch import ReplicaWatch
from broker.segments import PoolLeader, make_pool
from broker.session_service import SessionService
from broker.sessions import CursorTable, SessionTable
from broker.stages.ack import AckStage
from broker.stages.attach import AttachStage
from broker.stages.delegation import Delegation
from broker.stages.directory import Directory
from broker.stages.receiver import Receiver
from broker.stages.reclaim import Reclaim
from broker.stages.release import Release
from broker.stages.replication import Replication
from broker.stages.sequencer import OrderState, Scanner
from broker.stages.stage import Stage
from broker.stages.takeover import Takeover
from broker.stages.watch import Watch
from broker.topics import TopicEntry, TopicTable
from sim.cxl.clock import Clock
from sim.cxl.memory import Memory, Role

PIPELINE_BELL, REPLICATION_BELL = 0, 1
# What one thread runs, in order; a stage that is named in no thread has one of its own. The stages of the broker's own
# log stay together: what one of them does to a topic the others must not meet half done.
THREAD_PLANS = {
    "fused": (("directory", "attach", "delegation", "scanner 0", "acks", "watch", "release", "reclaim"),),
    "staged": (("directory", "attach", "delegation", "release"), ("acks",), ("watch",)),
}

Door = Callable[[int], Memory]                              # a role's door to the memory
TopicOf = Callable[[int, int], TopicEntry]                  # by number and generation; raises LookupError


@dataclass(frozen=True)
class Settings:
    """What of a cluster's settings its brokers' stages need."""

    session_lease_ns: int
    replica_grace_ns: int
    group_lease_ns: int = 10_000_000_000
    scanners: int = 1
    lock: str = "atomic"
    semaphore: str | None = None                            # its name, where the lock is one
    replica_file_bytes: int = 64 << 20
    replica_retry_ns: int = 500_000_000                     # a disk that failed is tried again first after so long
    counters_start: int = 0                                 # where slots, positions and indexes begin; 0 but in tests
    pid: int = 0
    cluster: str = ""
    run_id: int = 1


@dataclass(frozen=True)
class HeadStages:
    """What a broker runs while it is head, and who looks after replicas meanwhile."""

    order: OrderState
    scanners: list[Scanner]
    reclaim: Reclaim
    pool_leader: PoolLeader | None
    replica_watch: ReplicaWatch

    def stages(self) -> dict[str, Stage]:
        """By name: scanners first, then reclaim."""
        return {**{f"scanner {scanner.number}": scanner for scanner in self.scanners}, "reclaim": self.reclaim}


def nothing() -> None:
    """For who need not be told."""


class Assembly:
    """The stages of one broker. `door(role)` opens a door to the memory; `disk` makes the folder of its replicas.

    `lives(presence)` says whether the process of an attached client is there. `announced` is called when a table was
    changed and its readers' bells are rung: for whoever steps stages by hand.
    """

    def __init__(self, layout: Layout, broker: int, door: Door, clock: Clock, settings: Settings, *,
                 disk: Callable[[TopicOf], ReplicaFolder] | None = None,
                 lives: Callable[[int], bool] = bool, announced: Callable[[], None] = nothing) -> None:
        self.layout, self.broker, self.clock, self.settings = layout, broker, clock, settings
        self.door, self._announced = door, announced
        self.memory = door(Role.ROLE_BROKER)
        # First of all: whoever sees a new incarnation knows by it that the process before is gone.
        self.line = OwnLine(self.memory, layout, broker, clock)
        self.leading: HeadStages | None = None
        self._open_bells()
        self._build_log()
        self._build_tables(lives)
        self._build_stages(disk)
        self.attached_clients = AttachedClients(self.attach, self.sessions, self.cursors, lives, self.watch_commits,
                                                self.doorbells[broker].ring_now)
        self.session_service = SessionService(self)
        self.reading_service = ReadingService(self)

    @property
    def incarnation(self) -> int:
        """The number of this process of the broker."""
        return self.line.incarnation

    def _open_bells(self) -> None:
        def bells(which: int) -> list[Doorbell]:
            return [Doorbell(self.door(Role.ROLE_BROKER), self.layout.offset_of("doorbell", broker, which))
                    for broker in range(self.layout.numbers["broker_count"])]

        self.notifier = Notifier()
        self.doorbells, self.replication_bells = bells(PIPELINE_BELL), bells(REPLICATION_BELL)
        self.head_bell = HeadDoorbell(self.door(Role.ROLE_BROKER), self.layout)

    def _build_log(self) -> None:
        """What takes batches in, and answers for them."""
        self.receiver_door = self.door(Role.ROLE_RECEIVER)
        self.delivery_door = self.door(Role.ROLE_DELIVERY)
        self.log = BrokerLog(self.receiver_door, self.layout,
                             make_pool(self.receiver_door, self.layout, self.broker), self.broker)
        self.log.first_slot = self.settings.counters_start
        self.acks = AckStage(self.door(Role.ROLE_ACK), self.log, self.notifier)
        self.receiver = Receiver(self.receiver_door, self.log, self.acks, self.doorbells[self.broker], self.head_bell)

    def _build_tables(self, lives: Callable[[int], bool]) -> None:
        """What calls of clients change, and look at."""
        layout, settings, admin = self.layout, self.settings, self.door(Role.ROLE_ADMIN)
        self.head = HeadView(self.door(Role.ROLE_BROKER), layout)
        self.bank = Bank(admin, layout)                     # for topics and groups, while we are head
        self.bank.resign()
        self.topics = TopicTable(self.door(Role.ROLE_ADMIN), layout, self._announce_topics, self.bank,
                                 settings.counters_start)
        self.sessions = SessionTable(self.memory, layout, self.broker, lambda: self.bump(SESSIONS_WORD),
                                     lambda: self.clock.now() / 1e9)
        self.cursors = CursorTable(self.delivery_door, layout, self.broker, lambda: self.bump(CURSORS_WORD), lives)
        self.groups = GroupTable(self.memory, layout, self.clock.now, self.clock.wall, self.cursors, settings.pid,
                                 self.bank)

    def _build_stages(self, disk: Callable[[TopicOf], ReplicaFolder] | None) -> None:
        self.directory = Directory(self.door(Role.ROLE_BROKER), self.log)
        self.attach = AttachStage(self.receiver_door, self.log, self.acks, self.clock, self.settings.session_lease_ns)
        self.delegation = Delegation(self.door(Role.ROLE_DELEGATION), self.log, self.head_bell)
        self.watch = Watch(self.door(Role.ROLE_DELIVERY), self.layout, self.notifier)
        self.release = Release(self.door(Role.ROLE_RECLAIM), self.log)
        self.replication: Replication | None = None
        if disk is not None:
            self.replica_folder = disk(self.topics.entry_of)
            self.replication = Replication(self.door(Role.ROLE_REPLICATION), self.layout, self.broker,
                                           self.replica_folder, self.clock, self.doorbells,
                                           self.settings.replica_file_bytes, self.settings.replica_retry_ns)

    def stages(self) -> dict[str, Stage]:
        """What it runs whether it is head or not, by name."""
        found: dict[str, Stage] = {"directory": self.directory}
        if self.layout.numbers["attach_slot_count"]:
            found["attach"] = self.attach
        found |= {"delegation": self.delegation, "acks": self.acks, "watch": self.watch, "release": self.release}
        return found if self.replication is None else {**found, "replication": self.replication}

    def threads(self, plan: str, head: Mapping[str, Stage]) -> list[list[Stage]]:
        """Which stages one thread runs, by `THREAD_PLANS`; `head` are a head's, or the seats for them. Replication is
        not among them: it sleeps at a bell of its own."""
        found = {**self.stages(), **head}
        found.pop("replication", None)
        together = [[found.pop(name) for name in names if name in found] for names in THREAD_PLANS[plan]]
        return [*together, *([stage] for stage in found.values())]

    # ---- beginning --------------------------------------------------------------------------------------------------

    def keep_leases(self) -> None:
        """Before anything else runs: what attached clients lease of an earlier process of this broker stays theirs."""
        self.attach.keep_leases()
        self.attached_clients.inherit()

    def learn(self) -> bool:
        """One look at the topics, and at what an earlier process of this broker left; whether all of it is known.

        False while a head falls or none serves. Until it is True no stage may run.
        """
        self.directory.step_once()
        if not self.directory.complete or self.log.sweep() < 0:
            return False
        self.sessions.begin()
        return True

    # ---- being head -------------------------------------------------------------------------------------------------

    def found(self) -> HeadStages:
        """Be the first head of a new region, without a takeover: there is nothing to be taken over."""
        order = OrderState(self.door(Role.ROLE_SEQUENCER), self.layout, self.broker, LOCK_MODES[self.settings.lock],
                           self.settings.scanners, semaphore_name=self.settings.semaphore)
        return self._sit_down(order, self._scanners(order))

    def new_takeover(self) -> Takeover:
        """An attempt to become head; `lead` with it when it is done."""
        return Takeover(self.door(Role.ROLE_ADMIN), self.layout, self.clock, self.broker,
                        LOCK_MODES[self.settings.lock], self.settings.scanners, semaphore_name=self.settings.semaphore,
                        order_memory=self.door(Role.ROLE_SEQUENCER))

    def lead(self, takeover: Takeover) -> HeadStages:
        """Be head from now on, with what a takeover rebuilt."""
        scanners = self._scanners(takeover.order)
        for scanner in scanners:
            takeover.prepare(scanner)
        return self._sit_down(takeover.order, scanners)

    def _scanners(self, order: OrderState) -> list[Scanner]:
        count, brokers = self.settings.scanners, range(self.layout.numbers["broker_count"])
        return [Scanner(order, self.door(Role.ROLE_SEQUENCER), self.clock, number,
                        [broker for broker in brokers if broker % count == number], self.doorbells,
                        self.replication_bells) for number in range(count)]

    def _sit_down(self, order: OrderState, scanners: list[Scanner]) -> HeadStages:
        leader = PoolLeader(self.door(Role.ROLE_SEQUENCER), order.layout, self.broker) if (
            self.layout.pool_strategy == "leader") else None
        self.leading = HeadStages(
            order, scanners, Reclaim(self.door(Role.ROLE_RECLAIM), order, self.doorbells, leader), leader,
            ReplicaWatch(self.door(Role.ROLE_SEQUENCER), order.layout, self.clock, self.settings.replica_grace_ns))
        self.directory.lead(order, scanners)
        self.topics.lead(order.layout)
        self.groups.begin_term(self.settings.group_lease_ns)
        self.ring_all()
        return self.leading

    def resign(self) -> None:
        """Somebody else is head, and nothing of our term runs any more."""
        self.bank.resign()
        self.directory.lead(None, [])
        self.leading = None

    def attend(self) -> list[tuple[int, bool]]:
        """While we are head, see which brokers keep replicas: those that are away, or back (True), from now on."""
        changed = self.leading.replica_watch.look() if self.leading is not None else []
        if changed:
            self.ring_all()
        return changed

    # ---- being noticed ----------------------------------------------------------------------------------------------

    def ring_all(self) -> None:
        """Wake every broker's threads."""
        for bell in (*self.doorbells, *self.replication_bells):
            bell.ring_now()

    def _announce_topics(self) -> None:
        self.ring_all()
        self._announced()

    def bump(self, word: int) -> None:
        """Change a version word of this broker's line and wake the head."""
        self.line.bump(word)
        self.head_bell.ring_now()
        self._announced()

    def watch_commits(self, change: int) -> None:
        """Count the subscribers here: the sequencer wakes a broker that has any."""
        self.line.watch_commits(change)

    def close(self) -> None:
        """Give back what is not memory."""
        self.notifier.close()
        if self.replication is not None:
            self.replication.close()
