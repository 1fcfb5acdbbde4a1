"""The world: hosts with the product's own stages over one memory, their clients, one clock, one schedule, one seed.

    clients ══ connections ══ hosts: receiver, delegation, scanners, acks, release, reclaim, replication
                                │ doors (counted, priced, cut off)
                              memory ◄── the witness, past all caches

Stages step natively in drawn order; Python runs when a client, an event loop or a fault is due.
"""

import heapq
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

from broker.config import TopicConfig
from broker.doorbell import Doorbell
from broker.errors import SessionFenced
from broker.head import epoch_of
from broker.layout import BrokerState, Layout, SessionState
from broker.log import BrokerLog
from broker.membership import store_heartbeat
from broker.notifier import Notifier
from broker.order_lock import LOCK_MODES
from broker.records import pack, unpack
from broker.replica_folder import ReplicaFolder
from broker.replica_watch import ReplicaWatch
from broker.segments import PoolLeader, make_pool
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
from sim.cluster.attached import AttachedPublisher, AttachedSubscriber, close_gone
from sim.cluster.clients import ANSWER_STEPS, Connection, Publisher, Subscriber
from sim.cluster.devices import costs_of
from sim.cluster.door import HostControl, SimDoor
from sim.cluster.ending import check_disks, drain, judge
from sim.cluster.hardware import HARDWARE
from sim.cluster.history import Entry, History, Operation, Read, Violation
from sim.cluster.loop import SimLoop
from sim.cluster.scenario import LEASE_TICKS, Fault, Scenario
from sim.cluster.schedule import Schedule, Stop
from sim.cluster.succession import LOOK_STEPS, Succession
from sim.cluster.witness import Witness
from sim.cxl.clock import ManualClock
from sim.cxl.memory import Memory, Role
from sim.cxl.region import SHARED_MEMORY_FOLDER

SECOND = 1_000_000_000
SESSIONS_WORD, CURSORS_WORD, WATCHERS_WORD = 5, 6, 4
LEARN_STEPS = 50                            # how often a broker that was started again looks
GRACE_TICKS = 2_000                         # a broker that is silent for so long loses its replicas
CALL_TICKS = 20_000                         # a call that takes longer has failed
EARLIER_BATCHES, EARLIER_TRIES = 10, 400
SERVE_STEPS, CLIENT_STEPS = 60, 120         # how often a host's event loop and a client come to run, at most
DISK_STEPS = 4_000                          # and how often it is looked whether disks have what they are said to have
# A name of two lines, so that one line of it alone is of no use.
TOPIC = "simulated-" + "-".join(f"{number:03}" for number in range(20))
HEAD_STAGES = ("scanner", "reclaim")
WEIGHTS = (1, 1, 2, 4)
FOLDER_PREFIX = "cxlmq-sim-"                # then the process, so that what a killed one has left can be told
PROBE_PERIOD = 4                            # fences between two looks at memory in the middle of a step


class KeptFiles(ReplicaFolder):
    """Files stay when what they hold is reclaimed: at the end they show where each batch was."""

    def _trim(self, identity: str, reclaimed: int) -> None:
        pass


class Host:
    """One host: its power, its event loop, and the stages of its broker."""

    def __init__(self, world: "World", number: int) -> None:
        self.world, self.number = world, number
        self.incarnation = 0
        self.powered = self.stalled = self.booting = False
        self.connections: list[Connection] = []
        self.units: list[int] = []
        self.waiting: set[int | None] = set()   # stages whose thread gets no processor
        self.attached: dict[int, int] = {}      # slots of attached publishers -> their sessions' slots
        self.attached_cursors: dict[int, int] = {}              # slots of attached readers -> their cursors
        self.ending_cursors: list[tuple[int, int, int]] = []    # slot, its generation, cursor
        self.replica_watch: ReplicaWatch | None = None          # while it is head
        self.inherited = set[tuple[int, int]]()                 # slots of readers of the last incarnation

    def begin_again(self) -> None:
        """The broker that lost power is started anew: first it learns what the last one left."""
        if self.powered or self.booting:
            return
        self.world.note(f"host {self.number}", "is started again")
        self.world.injected["broker started again"] += 1
        self.world.hardware.restart(self.number)
        if self.world.folder is not None:
            self.replication.close()
        self.world.succession.banks.pop(self.number, None)
        self.connections.clear()
        self.attached.clear()
        self.attached_cursors.clear()
        self.ending_cursors.clear()
        self.replica_watch = None
        self.start()
        self.powered, self.booting = False, True
        self._learn()

    def _learn(self) -> None:
        """One look at what is there (`BrokerNode.resume`); when all is known the stages run."""
        world = self.world
        self.directory.step_once()
        if not self.control.dead and self.directory.complete and self.log.sweep() >= 0 and not self.control.dead:
            self.powered, self.booting = True, False
            world.note(f"host {self.number}", "goes on")
            world.witness.follow(self.number, self.log)
            world.allow()
        elif self.control.dead:
            self.booting = False            # its power went once more
            world.hardware.crash(self.number, "lost")
            self.loop.end()
            self.notifier.close()
        else:
            world.at(world.step + LEARN_STEPS, self._learn)

    def start(self) -> None:
        """Put the broker together, as `broker.node` does."""
        world, layout, number = self.world, self.world.layout, self.number
        self.incarnation += 1
        self.powered, self.stalled = True, False
        self.waiting.clear()
        self.control = world.new_control(number)
        self.loop = SimLoop(world.clock)
        self.notifier = Notifier()
        self.bells = [self._bell(host, 0) for host in range(world.scenario.hosts)]
        disk_bells = [self._bell(host, 1) for host in range(world.scenario.hosts)]
        self.receiver_door = self.door(Role.ROLE_RECEIVER)
        self.delivery_door = self.door(Role.ROLE_DELIVERY)
        self.memory = self.door(Role.ROLE_BROKER)
        self.log = BrokerLog(self.receiver_door, layout, make_pool(self.receiver_door, layout, number), number)
        self.acks = AckStage(self.door(Role.ROLE_ACK), self.log, self.notifier)
        self.receiver = Receiver(self.receiver_door, self.log, self.acks, self.bells[number], self.bells[0])
        self.sessions = SessionTable(self.memory, layout, number, lambda: self.bump(SESSIONS_WORD), self.loop.time)
        self.cursors = CursorTable(self.delivery_door, layout, number, lambda: self.bump(CURSORS_WORD),
                                   bool)
        self.disk_bells, self.head_units = disk_bells, list[int]()
        stages = dict(self._stages())
        self.units = [world.schedule.add(f"{name}", stage, self.control, world.weights.choice(WEIGHTS))
                      for name, stage in stages.items()]
        self.head_units = [unit for unit, name in zip(self.units, stages, strict=True) if name.startswith(HEAD_STAGES)]
        if self.incarnation == 1:
            world.witness.follow(number, self.log)
        elif world.scenario.attached:
            self.attach.keep_leases()
            self.inherited = {(slot["number"], slot["generation"]) for slot in self.attach.open_slots()
                              if slot["reads"]}
        line = unpack("BrokerLine", self.memory.read_line_bytes(layout.offset_of("broker", number)))
        line["state"] = BrokerState.BROKER_READY
        self.memory.write_line_bytes(layout.offset_of("broker", number), pack("BrokerLine", **line))
        self._flush("broker")

    def _stages(self) -> Iterator[tuple[str, Stage]]:
        world, scenario = self.world, self.world.scenario
        self.topics = TopicTable(self.door(Role.ROLE_ADMIN), world.layout, lambda: None)
        order: OrderState | None = None
        scanners: list[Scanner] = []
        if self.number == 0 and self.incarnation == 1:
            order = OrderState(self.door(Role.ROLE_SEQUENCER), world.layout, self.number, LOCK_MODES[scenario.lock],
                               scenario.scanners)
            scanners = self._scanners(order)
            yield from self._head_stages(order, scanners)
            self._watch_replicas(order)
        self.directory = Directory(self.memory, self.log, order, scanners)
        yield "directory", self.directory
        yield "delegation", Delegation(self.door(Role.ROLE_DELEGATION), self.log, self.bells[0])
        yield "acks", self.acks
        if scenario.attached:
            self.attach = AttachStage(self.receiver_door, self.log, self.acks, world.clock,
                                      LEASE_TICKS * scenario.tick_ns)
            yield "attach", self.attach
        yield "watch", Watch(self.delivery_door, world.layout, self.notifier)
        yield "release", Release(self.door(Role.ROLE_RECLAIM), self.log)
        if world.folder is not None:
            files = KeptFiles(world.replica_folder(self.number), self.number, 1, "simulated", world.scenario.hosts,
                              self.topics.entry_of)
            self.replication = Replication(self.door(Role.ROLE_REPLICATION), world.layout, self.number, files,
                                           world.clock, self.bells)
            yield "replication", self.replication

    def _scanners(self, order: OrderState) -> list[Scanner]:
        world, scenario = self.world, self.world.scenario
        return [Scanner(order, self.door(Role.ROLE_SEQUENCER), world.clock, number,
                        [b for b in range(scenario.hosts) if b % scenario.scanners == number], self.bells,
                        self.disk_bells) for number in range(scenario.scanners)]

    def _head_stages(self, order: OrderState, scanners: list[Scanner]) -> Iterator[tuple[str, Stage]]:
        leader = PoolLeader(self.door(Role.ROLE_SEQUENCER), order.layout, self.number) if (
            self.world.scenario.pool == "leader") else None
        yield from ((f"scanner {scanner.number}", scanner) for scanner in scanners)
        yield "reclaim", Reclaim(self.door(Role.ROLE_RECLAIM), order, self.bells, leader)

    def lead(self, takeover: Takeover) -> None:
        """Be head from now on, with what a takeover rebuilt."""
        scanners = self._scanners(takeover.order)
        for scanner in scanners:
            takeover.prepare(scanner)
        self.head_units = [self.world.schedule.add(name, stage, self.control, self.world.weights.choice(WEIGHTS))
                           for name, stage in self._head_stages(takeover.order, scanners)]
        self.units += self.head_units
        self.directory.lead(takeover.order, scanners)
        self.topics.lead(takeover.order.layout)
        self._watch_replicas(takeover.order)

    def _watch_replicas(self, order: OrderState) -> None:
        self.replica_watch = ReplicaWatch(self.door(Role.ROLE_SEQUENCER), order.layout, self.world.clock,
                                          GRACE_TICKS * self.world.scenario.tick_ns)

    def attend(self) -> None:
        """What a head does in each tick of its term (`broker.leadership`)."""
        if self.powered and not self.stalled and self.replica_watch is not None:
            self.replica_watch.look()

    def resign(self) -> None:
        """Notice that somebody else is head."""
        if self.powered and self.world.succession.head != self.number:
            self.units = [unit for unit in self.units if unit not in self.head_units]
            self.head_units = []
            self.directory.lead(None, [])
            self.replica_watch = None
            self.world.allow()

    def _bell(self, host: int, which: int) -> Doorbell:
        return Doorbell(self.door(Role.ROLE_BROKER), self.world.layout.offset_of("doorbell", host, which))

    def door(self, role: int) -> Memory:
        """This host's door for a role, with the planted bug if there is one."""
        inner = self.world.hardware.door(self.number, int(role))
        if self.world.bare:
            return inner
        door = SimDoor(inner, self.control)
        self.world.plant(door, self.number, int(role))
        return door

    def _flush(self, place: str) -> None:
        self.memory.flush_range(self.world.layout.offset_of(place, self.number), 64)
        self.memory.store_fence()

    def bump(self, word: int) -> None:
        """Change a version word of this broker's line, as `BrokerNode.bump` does."""
        at = self.world.layout.offset_of("broker", self.number) + 8 * word
        self.memory.store_word(at, self.memory.load_word(at) + 1)
        self._flush("broker")

    def sequencer_epoch(self) -> int:
        """The epoch that acks are sent under."""
        return epoch_of(self.memory.load_word(self.world.layout.offset_of("control")))

    def session_error(self, client: int, slot: int, epoch: int) -> SessionFenced | None:
        """Why this session is not open, as a broker says it before it opens a stream or hands out a slot. Raises
        `BrokerUnavailable` while a new head takes over."""
        line, progress = self.sessions.line(slot), self.sessions.progress(slot)
        if (line["client_id"], line["session_epoch"]) == (client, epoch) and (
                progress["state"] & 0xFF == SessionState.SESSION_OPEN):
            return None
        return SessionFenced(reason="it ended", committed=progress["expected"])

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a service's coroutine on this host's event loop; a task whose end the caller looks for."""
        return self.loop.call_here(coroutine, CALL_TICKS * self.world.scenario.tick_ns / 1e9)

    def serve(self) -> None:
        """One round of the broker's event loop."""
        if self.stalled or not self.powered:
            return
        store_heartbeat(self.memory, self.world.layout, self.number, self.world.clock)
        if self.loop.busy:
            self.loop.round()
        for connection in list(self.connections):
            if self.powered and not self.control.dead:
                connection.serve()
        if self.world.scenario.attached:
            close_gone(self)

    def lose_power(self) -> None:
        """Everything private to the host is gone."""
        self.powered = False
        self.world.witness.follow(self.number, None)
        for connection in list(self.connections):
            connection.cut()
        self.loop.end()
        self.notifier.close()

    def end(self) -> None:
        """Close what the system gave."""
        if self.powered:
            self.loop.end()
            self.notifier.close()
        if self.world.folder is not None:
            self.replication.close()


class World:
    """One run of one scenario. `run` raises `Violation`; `steps` and `trace_hash` say what happened."""

    def __init__(self, scenario: Scenario, plant: Callable[[SimDoor, Layout, int, int], None] | None = None,
                 tracing: bool = False, bare: bool = False) -> None:
        self.scenario, self._plant = scenario, plant
        self.bare = bare                    # doors that nothing stands before, for measuring
        self.tracing = tracing
        self.events: list[tuple[int, str, str]] = []        # step, column, text
        self._frontiers: dict[str, int] = {}
        self.layout = Layout.compute(**scenario.region())
        hosts = scenario.hosts + scenario.attached + scenario.attached_readers
        self.hardware = HARDWARE[scenario.memory](self.layout, hosts, scenario.random("hardware"),
                                                  "evict" in scenario.kinds)
        self.costs = costs_of(scenario.profile)
        self.clock = ManualClock(SECOND)
        self.network = scenario.random("network")
        self.weights = scenario.random(f"weights {scenario.schedule}")
        self.turns = scenario.random("turns")
        self.history = History(order=scenario.order)
        numbers = 3 * max(scenario.batches, EARLIER_BATCHES) + 3
        self.witness = Witness(self.hardware.truth, self.layout, scenario.publishers + 2, numbers)
        self.schedule = Schedule(scenario.random(f"schedule {scenario.schedule}").getrandbits(62), self.clock,
                                 self.witness, scenario.tick_ns)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=SHARED_MEMORY_FOLDER)) if (
            scenario.replication_factor > 1) else None
        self.unreliable = "net" in scenario.kinds
        self.probe_period = PROBE_PERIOD if "evict" in scenario.kinds else 0
        self.injected = Counter[str]()      # faults by kind: those that met somebody
        self.draining = False
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._queued = 0
        self.publishers: list[Publisher] = []
        self.subscribers: list[Subscriber] = []
        self.succession = Succession(self)
        self.hosts = [Host(self, number) for number in range(scenario.hosts)]
        for host in self.hosts:
            host.start()
        self.allow()

    # ---- for hosts and clients --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps of stages so far: the time that events are dated by."""
        return int(self.schedule.steps)

    def new_control(self, number: int) -> HostControl:
        """The power switch of a host, of a broker or of a client."""
        return HostControl(number, *self.costs, self.witness, self.turns.getrandbits(62), self.probe_period)

    def plant(self, door: SimDoor, host: int, role: int) -> None:
        """Put the planted bug into a door, if there is one and it belongs there."""
        if self._plant is not None:
            self._plant(door, self.layout, host, role)

    def note(self, column: str, text: str) -> None:
        """Something that happened outside of steps: part of the trace and of its hash."""
        self.schedule.mix(crc32(f"{column}:{text}".encode()))
        if self.tracing:
            self.events.append((self.step, column, text))

    def delay(self) -> int:
        """How many steps a message is under way."""
        random = self.network.random()
        late = self.unreliable and random < 0.03
        self.injected["message late"] += late
        return int(5 + random * 60) + (int(random * 1e6) % 1500 if late else 0)

    def strikes(self, what: str, random: Random, probability: float) -> bool:
        """Whether the network does this now."""
        struck = self.unreliable and random.random() < probability
        self.injected[what] += struck
        return struck

    def settled(self, operation: Operation) -> None:
        """An operation was acknowledged: it is in the log, at that place, or will be seen there at once."""
        self.note(f"client {operation.client}", f"ack of message {operation.first} at {operation.position}")
        index = self.witness.entry_of(operation.client, operation.first)
        if operation.level == 0:
            operation.outcome = "unknown"
        elif index < 0 and self.witness.check_now(False) == 0 and self.witness.entry_of(
                operation.client, operation.first) < 0:
            raise Violation("A1", f"message {operation.first} of client {operation.client} was acknowledged and is "
                                  "not in the committed order")

    def check_read(self, reader: str, read: Read) -> None:
        """What a reader got is what the log has there."""
        self.note(reader, f"read entry {read.index}")
        if self.witness.check_now(False):
            raise Violation(*self.witness.describe())
        entry = self.witness.entry(0, read.index)
        if read.sender != (entry["client"], entry["first"]) or (read.position, read.count) != (
                entry["position"], entry["count"]):
            raise Violation("T" if read.sender else "N",
                            f"{reader} read at order entry {read.index} position {read.position} {read.sender}, the "
                            f"log has {entry['position']} {(entry['client'], entry['first'])}")

    def at(self, step: int, action: Callable[[], None]) -> None:
        """Do something when the schedule gets there."""
        self._queued += 1
        heapq.heappush(self._queue, (step, self._queued, action))

    def _often(self, actor: Callable[[], None], steps: int) -> None:
        """Let an actor come to run again and again, at drawn moments."""
        def act() -> None:
            actor()
            self.at(self.step + self.turns.randint(1, steps), act)

        self.at(self.step + self.turns.randint(1, steps), act)

    # ---- running ----------------------------------------------------------------------------------------------------

    def allow(self) -> None:
        """Let the stages step whose host has power and goes on."""
        self.schedule.allow([unit for host in self.hosts if host.powered and not host.stalled for unit in host.units
                             if unit not in host.waiting])

    def advance(self, until: int) -> None:
        """Run stages, clients and faults up to a step."""
        while self.step < until:
            limit = min(until, self._queue[0][0] if self._queue else until)
            stop = self._trace_steps(limit) if self.tracing else self.schedule.run(limit)
            if stop == Stop.STOP_BREACH:
                raise Violation(*self.witness.describe())
            self._raise_failure()
            self._notice_power()
            while self._queue and self._queue[0][0] <= self.step:
                heapq.heappop(self._queue)[2]()
                self._notice_power()

    def _raise_failure(self) -> None:
        for stage in self.schedule.stages():
            if stage.failure is not None:
                raise Violation("E", f"{type(stage).__name__} raised {stage.failure!r}") from stage.failure

    def _trace_steps(self, limit: int) -> int:
        """Step one by one, and note what each changed in memory."""
        stop = int(Stop.STOP_DONE)
        while self.step < limit and stop == Stop.STOP_DONE:
            worked, before = self.schedule.worked, self._frontiers
            stop = self.schedule.run(self.step + 1)
            if self.schedule.worked != worked or stop != Stop.STOP_DONE:
                self._frontiers = self.witness.frontiers(0)
                changed = [f"{name} {before.get(name, 0)}→{value}" for name, value in self._frontiers.items()
                           if before.get(name, 0) != value]
                unit = self.schedule.last
                if changed or stop != Stop.STOP_DONE:
                    self.events.append((self.step, f"host {self.schedule.host_of(unit)}",
                                        f"{self.schedule.names[unit]}: {', '.join(changed) or 'the last step'}"))
        return stop

    def _notice_power(self) -> None:
        for host in self.hosts:
            if host.powered and host.control.dead:
                crashes = [fault for fault in self.scenario.faults
                           if fault.kind == "crash" and fault.where == host.number]
                policy = next((fault.policy for fault in crashes), "lost")
                self.note(f"host {host.number}", f"power lost; unfenced lines: {policy}")
                self.injected["power lost" if policy in ("lost", "kept") else "power lost with lines torn"] += 1
                self.hardware.crash(host.number, policy)
                host.lose_power()
                if again := next((fault.again for fault in crashes if fault.again), 0):
                    self.at(self.step + again, host.begin_again)
                self.allow()
                if self.witness.check_now():
                    raise Violation(*self.witness.describe())

    def strike(self, fault: Fault) -> None:
        """Let a fault happen."""
        whom = f"host {fault.where}" if fault.kind in ("crash", "stall") else f"client {fault.where + 1}"
        self.note(whom, str(fault))
        if fault.kind == "crash" and self.hosts[fault.where].powered:
            control = self.hosts[fault.where].control
            if fault.argument > 0:
                control.crash_at = control.operations + fault.argument
            else:
                control.crash_fences = -fault.argument
        elif fault.kind == "stall" and self.hosts[fault.where].powered:
            self._stall(self.hosts[fault.where], fault.argument, fault.stage)
        elif fault.kind == "client":
            self.injected["client died"] += 1
            self.publishers[fault.where].die()
        elif fault.kind == "pause" and isinstance(client := self.publishers[fault.where], AttachedPublisher):
            self.injected["client stood still"] += 1
            client.pause(fault.argument)
        elif fault.kind == "cut":
            connection = self.publishers[fault.where].connections.pop(fault.argument, None)
            if connection is not None:
                self.injected["connection cut"] += 1
                connection.cut()

    def _stall(self, host: Host, steps: int, stage: int) -> None:
        self.injected["host stood still" if stage < 0 else "stage stood still"] += 1
        incarnation, unit = host.incarnation, host.units[stage % len(host.units)] if stage >= 0 else None
        if unit is None:
            host.stalled = True
        else:
            host.waiting.add(unit)
        self.allow()

        def resume() -> None:
            if host.powered and host.incarnation == incarnation:
                host.waiting.discard(unit)
                host.stalled = host.stalled and unit is not None
                self.note(f"host {host.number}", "goes on")
                self.allow()

        self.at(self.step + steps, resume)

    def finish_at_head(self, what: str, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a call of the head's service to its end."""
        head = self.hosts[0]
        task = head.call(coroutine)
        for _ in range(400):
            head.loop.round()
            if task.done():
                return task.result()
            self.advance(self.step + 25)
        raise Violation("B", f"{what} did not end")

    def create_topic(self, name: str) -> TopicEntry:
        """Create a topic, and wait until every broker serves it."""
        scenario, head = self.scenario, self.hosts[0]
        config, _ = TopicConfig(name=name, order=scenario.order, ack=max(scenario.ack, 0),
                                replication_factor=scenario.replication_factor).validate(scenario.hosts)
        live = [host.number for host in self.hosts]
        entry: TopicEntry = self.finish_at_head("creating a topic", head.topics.create(
            config, LEASE_TICKS * scenario.tick_ns, lambda: live))
        return entry

    def live_before(self) -> None:
        """Another topic has the place first: some traffic, and it is deleted."""
        topic, live = self.create_topic("earlier"), [host.number for host in self.hosts]
        client = Publisher(self, self.scenario.publishers + 1, topic, EARLIER_BATCHES, 4, 1)
        for _ in range(EARLIER_TRIES):
            client.act()
            self.advance(self.step + 50)
            if client.finished:
                break
        client.die()
        self.advance(self.step + 200)
        self.history.operations.clear()
        self.finish_at_head("deleting a topic", self.hosts[0].topics.delete("earlier", lambda: live))

    def run(self) -> None:
        """The whole run: traffic, faults, draining, and what must hold at the end. Raises `Violation`."""
        scenario = self.scenario
        for host in self.hosts:
            self._often(host.serve, SERVE_STEPS)
        self._often(self.succession.look, LOOK_STEPS)
        if scenario.earlier_life:
            self.live_before()
        self.topic = self.create_topic(TOPIC)
        # Numbered from 1, as the product's are: a slot without a client is a reader's.
        self.publishers += [(AttachedPublisher if client <= scenario.attached else Publisher)(
            self, client, self.topic, scenario.batches, scenario.window, scenario.ack)
            for client in range(1, scenario.publishers + 1)]
        self.subscribers = [(AttachedSubscriber if number < scenario.attached_readers else Subscriber)(
            self, number, self.topic) for number in range(scenario.subscribers)]
        for act in (*(each.act for each in self.publishers), *(each.act for each in self.subscribers)):
            self._often(act, CLIENT_STEPS)
        if self.folder is not None and scenario.ack == 2:
            self._often(lambda: check_disks(self), DISK_STEPS)
        for fault in scenario.faults:
            self.at(self.step + fault.step, lambda fault=fault: self.strike(fault))     # type: ignore[misc]
        self.advance(self.step + scenario.steps)
        drain(self)
        judge(self)

    def log(self) -> list[Entry]:
        """What the frontier has passed."""
        return [Entry(each["position"], each["client"], each["first"], each["count"], each["broker"], each["epoch"])
                for each in self.witness.log_of(self.topic.number)]

    def reads_of(self, index: int, batches: Any, sender: Callable[[bytes, int], tuple[int, int] | None]) -> list[Read]:
        """A frame's batches, from order entry `index` on."""
        return [Read(index + i, batch.position, batch.message_count, sender(batch.payload, batch.message_count))
                for i, batch in enumerate(batches)]

    def replica_folder(self, host: int) -> Path:
        """Where a host keeps its replica files."""
        assert self.folder is not None
        return self.folder / f"host-{host}"

    @property
    def reliable(self) -> bool:
        """Whether every message of this run arrives, and every host goes on sooner or later."""
        return not self.scenario.kinds & {"net", "crash"}

    @property
    def patience(self) -> int:
        """After how many steps without an answer a client tries elsewhere."""
        return ANSWER_STEPS * (4 if self.reliable else 1)

    @property
    def recovers(self) -> bool:
        """Whether everything has to come to its end: all hosts are there, or others have taken over."""
        return all(host.powered for host in self.hosts) and self.succession.served

    @property
    def trace_hash(self) -> int:
        """The same for the same seed: of every step, every memory operation, every event and the order itself."""
        value = self.schedule.hash ^ self.witness.hash
        clients = (*self.publishers, *self.subscribers)
        attached = [each for each in clients if isinstance(each, AttachedPublisher | AttachedSubscriber)]
        for control in [each.control for each in (*self.hosts, *attached)]:
            value = (value * 31 + control.hash + control.operations) & (1 << 64) - 1
        return int(value)

    def close(self) -> None:
        """Give everything back."""
        everybody: list[Publisher | Subscriber | Host] = [*self.publishers, *self.subscribers, *self.hosts]
        for each in everybody:
            each.end()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove the disks of simulations whose process was killed."""
    for folder in Path(SHARED_MEMORY_FOLDER).glob(f"{FOLDER_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)
