"""Attached clients of the simulated cluster: the library's own cores, each on a host of its own with its own cache.

A publisher opens its session as over connections; then slots, leases, descriptors and completions go through memory
alone. Its power may go at any operation, it may stand still for longer than its lease, and it may never hear of a slot
that it got. A subscriber holds views for a while, and nothing that they show may be reclaimed meanwhile.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from broker.errors import BrokerUnavailable, CxlmqError
from broker.proto import cxlmq_pb2 as pb
from client.attached import AttachedCore
from client.attached_reader import AttachedReader
from client.batch import Batch, Delivery, Packer
from client.brokers import BrokerAddress
from client.publishing.attached_flights import AttachedFlights, Slot
from client.publishing.commands import Leave
from client.subscribing.attached_reading import AttachedReading
from client.subscribing.commands import Place
from client.subscribing.search import Search
from sim.cluster.door import HostControl, SimDoor
from sim.cluster.history import Operation, Violation
from sim.cluster.publishers import NEVER, Publisher
from sim.cluster.subscribers import Subscriber
from sim.cxl.memory import Role

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

WINDOW_BYTES = 64 << 10
DYING_OPERATIONS, DYING_FENCES = 60, 8      # a client that is killed gets so far, at most
READERS = 1_000                             # the presence of each: publishers have their own numbers


def client_door(world: "World", number: int) -> tuple[HostControl, SimDoor]:
    """The power switch and the door of a client's host."""
    control = world.new_control(number)
    door = SimDoor(world.hardware.door(number, int(Role.ROLE_CLIENT)), control)
    world.plant(door, number, int(Role.ROLE_CLIENT))
    return control, door


class SimFlights(AttachedFlights):
    """What is in flight, and which operation each sequence is."""

    def __init__(self, publisher: "AttachedPublisher") -> None:
        hosts = publisher.world.hosts
        super().__init__(lambda broker: hosts[broker].powered)
        self.publisher = publisher

    def submitted(self, gone: list[Batch]) -> None:
        """The core has these batches now: the last that it numbered."""
        if gone and self.core is not None:
            self.publisher.sent(self.core.next_sequence - len(gone), gone)

    def taken(self, batches: list[tuple[int, Batch]]) -> None:
        """These are private batches again."""
        self.publisher.took_back(batches)

    def quiet(self, now: float) -> list[BrokerAddress]:
        """The core asks the processor's clock, which is not the simulation's: here it is a host that stands still."""
        return [slot.broker for slot in self.slots.values() if self.publisher.world.hosts[slot.broker.id].stalled]


class AttachedPublisher(Publisher):
    """A client that attaches. It is its core's engine, too."""

    def __init__(self, world: "World", client: int, topic: Any, batches: int, window: int, level: int) -> None:
        self.number = world.scenario.hosts + client - 1
        self.control, self.door = client_door(world, self.number)
        super().__init__(world, client, topic, batches, window, level)
        # Not the packer of batches: the core's gets the size of leases when a session ends, which those may pass.
        numbers = world.layout.numbers
        overflow = Packer(self, self._batch_is_full, numbers["batch_bytes_max"], numbers["message_bytes_max"])
        target = numbers["segment_bytes"]
        self.core = AttachedCore(self, self.door, world.layout, overflow, (target, target, target), WINDOW_BYTES,
                                 window, level, NEVER)
        self.flights.use(self.core, self.door, world.layout)
        self.sequences: dict[int, Batch] = {}           # of what the core has
        self.outcomes: list[tuple[Batch, Delivery]] = []
        self.paused_until = 0

    def _new_flights(self) -> SimFlights:
        self.flights = SimFlights(self)
        return self.flights

    # ---- life ------------------------------------------------------------------------------------------------------

    def die(self) -> None:
        """Soon, in the middle of something."""
        if self.random.random() < 0.5:      # before a fence: that is when most is under way
            self.control.crash_fences = self.random.randint(1, DYING_FENCES)
        else:
            self.control.crash_at = self.control.operations + self.random.randint(1, DYING_OPERATIONS)

    def pause(self, steps: int) -> None:
        """Stand still."""
        self.paused_until = self.world.step + steps

    def end(self) -> None:
        """What is in flight holds its deliveries, and they us: no collector sees that."""
        self.core.take_unsettled()

    def act(self) -> None:
        """What the client does when it comes to run."""
        if self.world.step >= self.paused_until:
            super().act()
            self._take_outcomes()
            self.world.clock.advance(self.control.cost_ns)
            self.control.cost_ns = 0
        if self.control.dead and not self.dead:
            policy = self.random.choice(self.world.scenario.policies)
            self.world.note(self.name, f"dies; unfenced lines: {policy}")
            self.world.hardware.crash(self.number, policy)
            self.dead = True

    def _do(self, command: Any) -> None:
        if not isinstance(command, Leave):  # the broker sees in memory that we left
            super()._do(command)

    # ---- slots -----------------------------------------------------------------------------------------------------

    def _connect(self, broker: BrokerAddress, opened: pb.PublishOpen, way: Any) -> None:
        self._later(lambda: self._attach(broker, opened))

    def _attach(self, broker: BrokerAddress, opened: pb.PublishOpen) -> None:
        """What a broker answers to AttachPublisher."""
        host, error = self.world.hosts[broker.id], CxlmqError()
        if not host.powered or host.stalled:
            error = BrokerUnavailable(address=broker.target)
        else:
            try:
                found = host.session_service.attach(pb.AttachPublisherRequest(
                    open=opened, pid=self.client, presence=self.client))
            except CxlmqError as refused:
                error = refused
            else:
                # Its power went meanwhile, or the answer was lost: the broker notices.
                if not host.control.dead and not self.world.strikes("answer lost", self.random, 0.05):
                    slot = Slot(broker, found.slot, found.generation, broker.id)
                    if not self.flights.attached(slot, opened.session_epoch):
                        self.core.leave([(slot.number, slot.doorbell)])
                    return
                error = BrokerUnavailable(address=broker.target)
        self.flights.not_attached(broker, error, opened.session_epoch)

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _build(self, operation: Operation) -> Batch:
        batch = super()._build(operation)
        if self.level:
            Delivery(batch, 0).add_done_callback(lambda each: self.outcomes.append((batch, each)))
        return batch

    def sent(self, first: int, batches: list[Batch]) -> None:
        """The core has numbered these."""
        self.sequences.update(enumerate(batches, first))

    def took_back(self, batches: list[tuple[int, Batch]]) -> None:
        """The core has let go of these. Of what is settled when it is sent it makes new ones."""
        for sequence, batch in batches:
            before = self.sequences[sequence]
            self.operations[batch] = self.operations.pop(before)
        left = {sequence for sequence, _ in batches}
        self._settle_sent(lambda sequence: sequence in left)
        self.sequences.clear()

    def _settle_sent(self, has: Callable[[int], bool]) -> None:
        """Level 0: a broker has the batches that are not in flight any more. Nobody tells of these."""
        for sequence in [each for each in self.sequences if self.level == 0 and not has(each)]:
            self._outcome(self.sequences.pop(sequence), None, None)

    def _take_outcomes(self) -> None:
        """What the core has settled."""
        outcomes, self.outcomes = self.outcomes, []
        for batch, delivery in outcomes:
            error = delivery.exception()
            receipt = delivery.receipt() if error is None else None
            if receipt is not None:
                self.world.history.marks.append((f"epoch at client {self.client}", receipt.epoch))
            self._outcome(batch, receipt.position if receipt is not None else None, error)
        self._settle_sent(lambda sequence: self.core.oldest <= sequence < self.core.next_sequence)


class Attaching:
    """A call for a reader's slot at one host, and then the slot."""

    def __init__(self, subscriber: "AttachedSubscriber", host: "Host", request: pb.SubscribeRequest) -> None:
        self.host, self.broken = host, False
        self.told = host.call(host.assembly.reading_service.attach(pb.AttachSubscriberRequest(
            subscribe=request, pid=subscriber.presence, presence=subscriber.presence)))
        self.read: AttachedReader | None = None
        self.incarnation = host.incarnation

    @property
    def reader(self) -> AttachedReader:
        """That reads there."""
        assert self.read is not None
        return self.read

    def cut(self) -> None:
        """Let go of it. Of a slot whose answer was lost the broker notices."""
        self.broken = True
        if self.read is not None:
            self.read.leave()
        elif not self.told.done() and self.host.powered and self.host.incarnation == self.incarnation:
            self.told.cancel()


class AttachedSubscriber(Subscriber):
    """A reader that attaches: its views keep what they show from being reclaimed."""

    reading: AttachedReading

    def __init__(self, world: "World", number: int, topic: Any) -> None:
        super().__init__(world, number, topic)
        self.control, self.door = client_door(world, world.scenario.hosts + world.scenario.attached + number)
        self.presence = READERS
        self.copies = self.random.random() < 0.3
        self.views: deque[tuple[int, Any]] = deque()            # order index, batch

    def _new_reading(self, turn: int) -> AttachedReading:
        return AttachedReading(self.topic.name, "beginning", None, turn)

    def end(self) -> None:
        """The run is over: views that the collector takes later say nothing."""
        for reader in (self.reading.reader, *self.reading.retired):
            if reader is not None:
                reader.after_fork()

    def act(self) -> None:
        """What the client does when it comes to run."""
        super().act()
        self.world.clock.advance(self.control.cost_ns)
        self.control.cost_ns = 0

    # ---- slots ------------------------------------------------------------------------------------------------------

    def _ask_host(self, host: "Host", request: pb.SubscribeRequest) -> Any:
        return Attaching(self, host, request)

    def _arrived(self, search: Search, way: Any, told: pb.Attachment) -> None:
        layout = self.world.layout
        way.read = AttachedReader(
            self.door, layout, self.door, layout.offset_of("attach_client", told.slot), told.slot, told.generation,
            told.topic_number, told.topic_generation, told.index, self.topic.name, not self.copies)
        way.read.beat()
        super()._arrived(search, way, told)

    def _retire(self, place: Place) -> None:
        self.reading.retire(place)

    def _leave(self, place: Place) -> None:
        """Give up the place, and what is viewed under it."""
        self.views.clear()
        self.reading.let_go(all_of_them=True)
        place.way.cut()

    def _hear(self) -> None:
        """See whether somebody serves us; what is in memory is taken without anybody."""
        self._event(lambda: self.reading.look(lambda place: bool(place.way.host.powered)))

    # ---- views ------------------------------------------------------------------------------------------------------

    def _take_something(self) -> None:
        """View what is there; let go of some of what was viewed before."""
        kept_from = self.world.witness.frontiers(self.topic.number)["reclaimed"]
        if self.views and kept_from > self.views[0][0]:
            raise Violation("C", f"{self.name} views order entry {self.views[0][0]}, and all below {kept_from} is "
                                 "reclaimed")
        for _ in range(len(self.views) if self.world.draining else self.random.randint(0, len(self.views))):
            self.views.popleft()
        super()._take_something()

    def _gave(self, found: list[Any]) -> None:
        """It holds what it was given for a while."""
        if not self.copies and self.reads:
            self.views.append((self._index_of(found[0].position), found))
