"""The world: hosts with the product's own stages over one memory, their clients, one clock, one schedule, one seed.

    clients ══ connections ══ hosts: receiver, delegation, scanners, acks, release, reclaim, replication
                                │ doors (counted, priced, cut off)
                              memory ◄── the witness, past all caches

Stages step natively in drawn order; Python runs when a client, an event loop or a fault is due.
"""

import contextlib
import heapq
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

from broker.assembly import Assembly, Settings, TopicOf
from broker.config import TopicConfig
from broker.disk import watch
from broker.head import epoch_of
from broker.layout import BrokerState, Layout
from broker.payload_places import limits_of
from broker.replica_folder import ReplicaFolder
from broker.stages.stage import Stage
from broker.topics import TopicEntry
from sim.cluster.attached import READERS, AttachedPublisher, AttachedSubscriber
from sim.cluster.devices import costs_of
from sim.cluster.disks import Disks
from sim.cluster.door import HostControl, SimDoor
from sim.cluster.ending import check_disks, drain, judge
from sim.cluster.hardware import HARDWARE
from sim.cluster.history import Entry, History, Operation, Read, Violation
from sim.cluster.loop import SimLoop
from sim.cluster.publishers import ANSWER_STEPS, Connection, Publisher
from sim.cluster.recovering import cut_power
from sim.cluster.scenario import LEASE_TICKS, Fault, Scenario
from sim.cluster.schedule import Schedule, Stop
from sim.cluster.subscribers import Stream, Subscriber
from sim.cluster.succession import LOOK_STEPS, Headship
from sim.cluster.witness import Witness
from sim.cxl.clock import ManualClock
from sim.cxl.memory import Memory
from sim.cxl.region import SHARED_MEMORY_FOLDER

SECOND = 1_000_000_000
LEARN_STEPS = 50                            # how often a broker that was started again looks
FILE_BYTES = (8 << 10, 32 << 10, 64 << 20)  # of a file of replicas, until the next one is begun
GRACE_TICKS = 2_000                         # a broker that is silent for so long loses its replicas
RETRY_TICKS = 200                           # a disk that failed is tried again after so many
CALL_TICKS = 20_000                         # a call that takes longer has failed
EARLIER_BATCHES, EARLIER_TRIES = 10, 400
SERVE_STEPS, CLIENT_STEPS = 60, 120         # how often a host's event loop and a client come to run, at most
DISK_STEPS = 4_000                          # and how often it is looked whether disks have what they are said to have
# A name of two lines, so that one line of it alone is of no use.
TOPIC = "simulated-" + "-".join(f"{number:03}" for number in range(20))
WEIGHTS = (1, 1, 2, 4)
FOLDER_PREFIX = "cxlmq-sim-"                # then the process, so that what a killed one has left can be told
PROBE_PERIOD = 4                            # fences between two looks at memory in the middle of a step


class KeptFiles(ReplicaFolder):
    """Files stay when what they hold is reclaimed: at the end they show where each batch was."""

    def _trim(self, identity: str, reclaimed: int) -> None:
        pass


class Host:
    """One host: its power, its event loop, and its broker (`assembly`: another one after each restart)."""

    def __init__(self, world: "World", number: int) -> None:
        self.world, self.number = world, number
        self.incarnation = 0
        self.powered = self.stalled = self.booting = False
        self.gone = False                   # with its region, for good
        self.connections: list[Connection | Stream] = []
        self.units: list[int] = []
        self.waiting: set[int | None] = set()   # stages whose thread gets no processor

    def begin_again(self) -> None:
        """The broker that lost power is started anew: first it learns what the last one left."""
        if self.powered or self.booting or self.gone:
            return
        self.world.note(f"host {self.number}", "is started again")
        self.world.injected["broker started again"] += 1
        self.world.hardware.restart(self.number)
        if self.world.disks is not None:
            self.world.disks.switch_on(self.number)
        self.assembly.close()
        self.connections.clear()
        self.start()
        self.powered, self.booting = False, True
        self.learn()

    def learn(self) -> None:
        """One look at what is there; when all is known the stages run."""
        world = self.world
        if self.gone:
            return
        known = self.assembly.learn()
        if self.control.dead:
            self.booting = False            # its power went once more
            world.hardware.crash(self.number, "lost")
            self.loop.end()
        elif known:
            if world.arrive is not None:
                world.arrive(self)
            self.powered, self.booting = True, False
            self.assembly.line.say(BrokerState.BROKER_READY)
            world.note(f"host {self.number}", "goes on")
            world.witness.follow(self.number, self.log)
            world.allow()
        else:
            world.at(world.step + LEARN_STEPS, self.learn)

    def start(self) -> None:
        """Put the broker together."""
        world, number = self.world, self.number
        self.incarnation += 1
        self.powered, self.stalled = True, False
        self.waiting.clear()
        self.control = world.new_control(number)
        self.loop = SimLoop(world.clock)
        broker = self.assembly = Assembly(world.layout, number, self.door, world.clock, world.settings,
                                          disk=self._folder if world.disks is not None else None, lives=world.lives)
        self.log, self.acks, self.receiver, self.attach = broker.log, broker.acks, broker.receiver, broker.attach
        self.sessions, self.cursors, self.topics = broker.sessions, broker.cursors, broker.topics
        self.session_service = broker.session_service
        self.memory, self.delivery_door = broker.memory, broker.delivery_door
        self.units = self.add(broker.stages())
        broker.line.say(BrokerState.BROKER_STARTING)
        founds = self.incarnation == 1 and not world.losses
        self.headship = world.new_headship(self, number == 0 and founds)
        if founds:
            world.witness.follow(number, self.log)
            broker.line.say(BrokerState.BROKER_READY)
        else:
            broker.keep_leases()

    def add(self, stages: dict[str, Stage]) -> list[int]:
        """Let stages be drawn when the world allows it; their units."""
        return [self.world.schedule.add(name, stage, self.control, self.world.weights.choice(WEIGHTS))
                for name, stage in stages.items()]

    def _folder(self, topic_of: TopicOf) -> ReplicaFolder:
        world = self.world
        kind = ReplicaFolder if world.scenario.loses else KeptFiles
        return kind(world.replica_folder(self.number), self.number, world.settings.run_id, "simulated",
                    world.scenario.hosts, topic_of, catalogue=world.scenario.loses,
                    limits=limits_of(world.layout.numbers))

    @property
    def is_there(self) -> bool:
        """Whether a process of its broker runs."""
        return self.powered or self.booting

    def tick(self) -> None:
        """What the broker's membership thread does now and then, also before the stages run."""
        if self.is_there and not self.stalled and not self.control.dead:
            self.headship.tick()

    def runnable(self) -> list[int]:
        """The units that may step now."""
        if self.booting:
            return [self.headship.takeover_unit] if self.headship.takeover_unit >= 0 else []
        return [unit for unit in self.units if unit not in self.waiting] if self.powered and not self.stalled else []

    def door(self, role: int) -> Memory:
        """This host's door for a role, with the planted bug if there is one."""
        inner = self.world.hardware.door(self.number, int(role))
        if self.world.bare:
            return inner
        door = SimDoor(inner, self.control)
        self.world.plant(door, self.number, int(role))
        return door

    def sequencer_epoch(self) -> int:
        """The epoch that acks are sent under."""
        return epoch_of(self.memory.load_word(self.world.layout.offset_of("control")))

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a service's coroutine on this host's event loop; a task whose end the caller looks for."""
        return self.loop.call_here(coroutine, CALL_TICKS * self.world.scenario.tick_ns / 1e9)

    def serve(self) -> None:
        """One round of the broker's event loop."""
        if self.stalled or not self.powered:
            return
        if self.loop.busy:
            self.loop.round()
        for connection in list(self.connections):
            if self.powered and not self.control.dead:
                connection.serve()
        if self.world.scenario.attached:
            self.assembly.attached_clients.tend()

    def lose_power(self) -> None:
        """Everything private to the host is gone."""
        self.powered = False
        self.world.witness.follow(self.number, None)
        for connection in list(self.connections):
            connection.cut()
        self.loop.end()

    def end(self) -> None:
        """Close what the system gave."""
        if self.powered:
            self.loop.end()
        self.assembly.close()


class World:
    """One run of one scenario. `run` raises `Violation`; `steps` and `trace_hash` say what happened."""

    def __init__(self, scenario: Scenario, plant: Callable[[SimDoor, Layout, int, int], None] | None = None,
                 tracing: bool = False, bare: bool = False, unsynced: str = "") -> None:
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
        self.witness.gives_up = scenario.delivery_steps > 0
        self.schedule = Schedule(scenario.random(f"schedule {scenario.schedule}").getrandbits(62), self.clock,
                                 self.witness, scenario.tick_ns)
        self.losses = 0                     # of the region, so far
        self.lost_at = 0                    # the step of the last one
        self.arrive: Callable[[Host], None] | None = None           # the first host that goes on after one calls it
        self.first_position = self.restored_end = 0                 # of the log that the region began with
        self.restored: set[tuple[int, tuple[int, int]]] = set()     # position and sender, by the last recovery
        self.damaged = False                # whether files were, or disks failed or were away
        self.restored_entries = 0           # in the order index, with those that say what is lost
        self.named: set[tuple[int, int]] = set()                    # (client, number): named as lost, by any
        self.disks = self._new_disks(unsynced) if scenario.replication_factor > 1 else None
        self.unreliable = "net" in scenario.kinds
        self.probe_period = PROBE_PERIOD if "evict" in scenario.kinds else 0
        self.injected = Counter[str]()      # faults by kind: those that met somebody
        self.draining = False
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._queued = 0
        self.publishers: list[Publisher] = []
        self.subscribers: list[Subscriber] = []
        self.settings = Settings(
            session_lease_ns=LEASE_TICKS * scenario.tick_ns, replica_grace_ns=GRACE_TICKS * scenario.tick_ns,
            replica_retry_ns=RETRY_TICKS * scenario.tick_ns,
            scanners=scenario.scanners, lock=scenario.lock, replica_file_bytes=scenario.random("files").choice(
                FILE_BYTES) if scenario.loses else FILE_BYTES[-1])
        self.succession = scenario.random("succession")
        self.drawn_heads = self.succession.random() < 0.5
        self.hosts = self.new_hosts()
        for host in self.hosts:
            host.start()
        self.hosts[0].tick()
        self.allow()

    def _new_disks(self, unsynced: str) -> Disks:
        """Disks, which see from now on what is written."""
        root = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=SHARED_MEMORY_FOLDER))
        disks = Disks(root, lambda host: self.hosts[host].control.dead, self._cut_off, unsynced)
        watch(disks)
        return disks

    def new_hosts(self) -> list[Host]:
        """All hosts, which are not started yet."""
        return [Host(self, number) for number in range(self.scenario.hosts)]

    def _cut_off(self, host: int) -> None:
        self.hosts[host].control.crash_at = self.hosts[host].control.operations + 1

    # ---- for hosts and clients --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps of stages so far: the time that events are dated by."""
        return int(self.schedule.steps)

    def new_headship(self, host: Host, founder: bool) -> Headship:
        """A broker's part in who is head."""
        return Headship(host, founder)

    def new_control(self, number: int) -> HostControl:
        """The power switch of a host, of a broker or of a client."""
        return HostControl(number, *self.costs, self.witness, self.turns.getrandbits(62), self.probe_period)

    def lives(self, presence: int) -> bool:
        """Whether an attached client is there: publishers are known by their numbers, and readers do not die."""
        return presence >= READERS or (presence > 0 and self.publishers[presence - 1].state != "dead")

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
        elif self._is_before(operation):
            return
        elif index < 0 and self.witness.check_now(False) == 0 and self.witness.entry_of(
                operation.client, operation.first) < 0:
            raise Violation("A1", f"message {operation.first} of client {operation.client} was acknowledged and is "
                                  "not in the committed order")

    def _is_before(self, operation: Operation) -> bool:
        """Whether it is in a part of the log that was reclaimed before the region was lost."""
        return any((entry.client, entry.first) == (operation.client, operation.first) for entry in self.history.before)

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
        self.schedule.allow([unit for host in self.hosts for unit in host.runnable()])

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
        whom = f"client {fault.where + 1}" if fault.kind in ("client", "pause", "cut") else f"host {fault.where}"
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
        elif fault.kind == "loss" and self.disks is not None:
            self.injected["region lost"] += 1
            cut_power(self, fault)
        elif fault.kind == "disk" and self.disks is not None:
            self.injected[f"disk: {fault.policy}"] += 1
            self.disks.fail(fault.where, fault.policy, fault.argument)
        elif fault.kind == "cut":
            self.injected["connection cut"] += self.publishers[fault.where].cut(fault.argument)

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
            config, LEASE_TICKS * scenario.tick_ns, lambda: live, self._written))
        return entry

    @contextlib.asynccontextmanager
    async def _written(self, entry: TopicEntry) -> AsyncIterator[None]:
        """As `AdminService` has it: the head's disk knows of a topic before it is made."""
        if self.disks is not None:
            self.hosts[0].assembly.replica_folder.announce(entry)
        yield

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
        if self.disks is not None:
            self.hosts[0].assembly.replica_folder.say_deleted(topic.name, topic.created_ns)

    def run(self) -> None:
        """The whole run: traffic, faults, draining, and what must hold at the end. Raises `Violation`."""
        scenario = self.scenario
        for number in range(scenario.hosts):        # by number: when the region is lost there are other hosts
            self._often(lambda number=number: self.hosts[number].serve(), SERVE_STEPS)    # type: ignore[misc]
            self._often(lambda number=number: self.hosts[number].tick(), LOOK_STEPS)      # type: ignore[misc]
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
        if self.disks is not None and scenario.ack == 2:
            self._often(lambda: check_disks(self), DISK_STEPS)
        for fault in scenario.faults:
            self.at(self.step + fault.step, lambda fault=fault: self.strike(fault))     # type: ignore[misc]
        self.advance(self.step + scenario.steps)
        drain(self)
        judge(self)

    def log(self) -> list[Entry]:
        """What the frontier has passed."""
        # The terms of a region that is lost say nothing of those that come later.
        return [Entry(each["position"], each["client"], each["first"], each["count"], each["broker"],
                      each["epoch"] if index >= self.restored_entries else 0)
                for index, each in enumerate(self.witness.log_of(self.topic.number))]

    def reads_of(self, index: int, batches: Any, sender: Callable[[bytes, int], tuple[int, int] | None]) -> list[Read]:
        """A frame's batches, from order entry `index` on."""
        return [Read(index + i, batch.position, batch.message_count, sender(batch.payload, batch.message_count))
                for i, batch in enumerate(batches)]

    def replica_folder(self, host: int) -> Path:
        """Where a host keeps its replica files."""
        assert self.disks is not None
        return self.disks.folder / f"broker-{host}"

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
        return all(host.powered for host in self.hosts) and any(host.headship.serves for host in self.hosts)

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
        watch(None)
        if self.disks is not None:
            shutil.rmtree(self.disks.folder.parent, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove the disks of simulations whose process was killed."""
    for folder in Path(SHARED_MEMORY_FOLDER).glob(f"{FOLDER_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)
