"""Attached clients of the simulated cluster: the library's own cores, each on a host of its own with its own cache.

A publisher opens its session as over connections; then slots, leases, descriptors and completions go through memory
alone. Its power may go at any operation, it may stand still for longer than its lease, and it may never hear of a slot
that it got. A subscriber holds views for a while, and nothing that they show may be reclaimed meanwhile.
"""

import struct
from collections import deque
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from broker.errors import AttachSlotsFull, BrokerUnavailable, CxlmqError
from broker.proto import cxlmq_pb2 as pb
from broker.reader import ReadError
from client.attached import AttachedCore
from client.attached_reader import AttachedReader
from client.batch import Batch, Delivery, Packer
from client.connection import BrokerAddress
from client.transport import rendezvous
from sim.cluster.clients import Flight, Publisher, Subscriber
from sim.cluster.door import HostControl, SimDoor
from sim.cluster.history import Operation, Violation
from sim.cluster.witness import build_payload
from sim.cxl.memory import Role

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

WINDOW_BYTES = 64 << 10
NEVER = 1e18                                # seconds: nothing expires here, the run ends before
DYING_OPERATIONS, DYING_FENCES = 60, 8      # a client that is killed gets so far, at most
READERS = 1_000                             # the presence of each: publishers have their own numbers
LOOK_EVERY = 8                              # turns between two heartbeats


def client_door(world: "World", number: int) -> tuple[HostControl, SimDoor]:
    """The power switch and the door of a client's host."""
    control = world.new_control(number)
    door = SimDoor(world.hardware.door(number, int(Role.ROLE_CLIENT)), control)
    world.plant(door, number, int(Role.ROLE_CLIENT))
    return control, door


class AttachedPublisher(Publisher):
    """A client that attaches. It is its core's engine, too."""

    def __init__(self, world: "World", client: int, topic: Any, batches: int, window: int, level: int) -> None:
        super().__init__(world, client, topic, batches, window, level)
        self.number = world.scenario.hosts + client - 1
        self.control, door = client_door(world, self.number)
        # Not the core's: that one gets the size that leases have when a session ends, which batches here may pass.
        self.packer, overflow = (Packer(self, self._batch_is_full, world.layout.numbers["batch_bytes_max"],
                                        world.layout.numbers["message_bytes_max"]) for _ in range(2))
        target = world.layout.numbers["segment_bytes"]
        self.core = AttachedCore(self, door, world.layout, overflow, (target, target, target), WINDOW_BYTES, window,
                                 level, NEVER)
        self.core.begin_session(0)
        self.slots: dict[int, int] = {}     # slots that we have -> their hosts
        self.built: dict[int, Batch] = {}                       # by first message: what goes into a lease again
        self.outcomes: list[tuple[Operation, Delivery]] = []
        self.turns = self.paused_until = 0

    # ---- what the core asks its engine for -------------------------------------------------------------------------

    def make_room(self, nbytes: int) -> None:
        """There is room."""

    def _batch_is_full(self) -> None:
        raise AssertionError("a batch of three messages is never full")

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
            self.world.clock.advance(self.control.cost_ns)
            self.control.cost_ns = 0
        if self.control.dead and self.state != "dead":
            policy = self.random.choice(self.world.scenario.policies)
            self.world.note(self.name, f"dies; unfenced lines: {policy}")
            self.world.hardware.crash(self.number, policy)
            self.state = "dead"

    # ---- the session -----------------------------------------------------------------------------------------------

    def _drop_connections(self) -> None:
        """Leases of a session that has ended are given back when what was in flight was taken out of them."""

    def _resume(self, high_water: int, positions: list[int]) -> None:
        unsettled = dict(self.core.take_unsettled())
        for sequence, batch in unsettled.items():
            self.built[self.flights[sequence].operation.first] = batch
        self.core.poll()
        self._take_outcomes(unsettled)
        super()._resume(high_water, positions)
        self._leave(list(self.slots))

    def _opened(self, session: pb.Session) -> None:
        super()._opened(session)
        self.core.begin_session(self.epoch)

    def _attach(self) -> None:
        """Get a slot at every broker at which there is none, also at one that was started again."""
        for host in self.world.hosts:
            if not host.powered or host.stalled or host.number in self.core.brokers_alive() or (
                    self.random.random() < 0.5):
                continue
            found = attach_publisher(host, self)
            if isinstance(found, CxlmqError):
                self._reopen("its session had ended")
                return
            if found is None or self.world.strikes("answer lost", self.random, 0.05):
                continue                    # no slot is free, or the answer was lost: the broker notices
            self.slots[found[0]] = host.number
            self.core.add_channel(*found, host.number)

    def _leave(self, slots: list[int]) -> None:
        self.core.leave([(slot, self.slots.pop(slot)) for slot in slots])

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Take what was answered; drop brokers that died; say that we are there."""
        self.turns += 1
        if self.turns % LOOK_EVERY == 0:    # until then it writes to a broker that is no more, or is another one by now
            for number in self.core.brokers_alive():
                if not self.world.hosts[number].powered:
                    self.core.drop_channel(number)
            self._leave(self.core.let_go())
            self.core.beat()
            self.core.check_slots()
        self.core.poll()
        self._take_outcomes(range(self.core.oldest, self.core.next_sequence))
        if self.core.fenced:
            self._reopen("a broker fenced it")
        else:
            self._attach()

    def _take_outcomes(self, undecided: Container[int]) -> None:
        outcomes, self.outcomes = self.outcomes, []
        for operation, delivery in outcomes:
            if isinstance(error := delivery.exception(), Exception):
                raise Violation("A2", f"message {operation.first} of client {self.client}: {error}, and no fault was "
                                      "such")
            receipt = delivery.receipt()
            self.world.history.marks.append((f"epoch at client {self.client}", receipt.epoch))
            self._forget(operation)
            self._settle(operation, receipt.position)
        for sequence, flight in list(self.flights.items()) if self.level == 0 else ():      # nobody tells of these
            if sequence not in undecided:
                self._forget(flight.operation)
                self._settle(flight.operation, None)

    def _forget(self, operation: Operation) -> None:
        self.flights = {sequence: flight for sequence, flight in self.flights.items()
                        if flight.operation is not operation}

    def _build(self, operation: Operation) -> Batch:
        """Pack an operation's messages as the library does."""
        payload, at = build_payload(self.client, operation.first, operation.count), 0
        for _ in range(operation.count):
            (nbytes,) = struct.unpack_from("<I", payload, at)
            self.packer.append(payload[at + 8:at + 8 + nbytes])
            at += 8 + -(-nbytes // 8) * 8
        batch: Batch = self.packer.take()
        batch.seal(self.world.clock.wall())
        if self.level:
            Delivery(batch, 0).add_done_callback(lambda each: self.outcomes.append((operation, each)))
        return batch

    def _submit(self) -> None:
        for _ in range(4):
            if not self._may_submit() or not self.core.brokers_alive():
                return
            operation = self._next_operation()
            batch = self.built.pop(operation.first, None) or self._build(operation)
            batch.level, batch.deadline = self.level, NEVER
            sequence = self.core.next_sequence
            if not self.core.submit_batch(batch):
                self.built[operation.first] = batch
                self.pending.appendleft(operation)
                return
            self.flights[sequence] = Flight(operation, b"", 0, self.world.step)

    def _resend(self) -> None:
        """Submit again what was refused, and what went to a broker that died."""
        live = [BrokerAddress(host, "") for host in self.core.brokers_alive()]
        for sequence in self.core.lost() if live else ():
            for broker in rendezvous(live, self.client, sequence):
                if self.core.resubmit(sequence, broker.id):
                    break


class AttachedSubscriber(Subscriber):
    """A reader that attaches: its views keep what they show from being reclaimed."""

    def __init__(self, world: "World", number: int, topic: Any) -> None:
        super().__init__(world, number, topic)
        self.control, self.door = client_door(world, world.scenario.hosts + world.scenario.attached + number)
        self.attached: AttachedReader | None = None
        self.presence = READERS
        self.views: deque[tuple[int, Any]] = deque()            # order index, batch

    def end(self) -> None:
        """The run is over: views that the collector takes later say nothing."""
        if self.attached is not None:
            self.attached.after_fork()

    def act(self) -> None:
        """Find a broker, or read there."""
        super().act()
        self.world.clock.advance(self.control.cost_ns)
        self.control.cost_ns = 0

    def _wait(self) -> None:
        super()._wait()
        host = self.host
        if self.request is not None or host is None or self.reader is None:
            return
        # The place is granted: the service hands out a slot for it, or gives it back.
        topic, layout = self.topic, self.world.layout
        found = host.attach.open_subscriber(topic.number, topic.generation, self.cursor, self.index, self.presence,
                                            self.presence)
        lost = host.control.dead or self.world.strikes("answer lost", self.random, 0.05)
        if found is None:
            host.cursors.close(self.cursor)
        else:
            host.assembly.attached_clients.add_reader(found[0], self.cursor)
        if found is None or lost:           # of a slot whose answer was lost the broker notices
            self.host = self.reader = None
            return
        self.attached = AttachedReader(
            self.door, layout, self.door, layout.offset_of("attach_client", found[0]), *found, topic.number,
            topic.generation, self.index, topic.name, True)
        self.attached.beat()

    def leave(self) -> None:
        """Give up the place at this broker, and what is viewed under it."""
        if self.attached is None:
            super().leave()
            return
        self.views.clear()
        self.attached.leave()
        self.host = self.reader = self.attached = None
        self.cursor = -1

    def read(self) -> int:
        """View what is there; let go of some of what was viewed before."""
        reader, host = self.attached, self.host
        assert reader is not None and host is not None
        kept_from = self.world.witness.frontiers(self.topic.number)["reclaimed"]
        if self.views and kept_from > self.views[0][0] and host.powered:
            raise Violation("C", f"{self.name} views order entry {self.views[0][0]}, and all below {kept_from} is "
                                 "reclaimed")
        for _ in range(self.random.randint(0, len(self.views))):
            self.views.popleft()
        try:
            batches = reader.take(self.random.choice((1, 4, 30)))
        except ReadError as error:
            self._refused(host, error)
            return 0
        for batch in batches:
            self.views.append((self.index, batch))
            self._take(batch.position, batch.count, bytes(batch.payload))
        if not reader.is_open():
            self.leave()
        return len(batches)


def attach_publisher(host: "Host", client: AttachedPublisher) -> tuple[int, int] | CxlmqError | None:
    """Ask a broker for a slot: (slot, generation), why its session is not open, or None for not now."""
    request = pb.AttachPublisherRequest(open=client.opened(), pid=client.client, presence=client.client)
    try:
        found = host.session_service.attach(request)
    except (BrokerUnavailable, AttachSlotsFull):
        return None                         # a new head is taking over, or others have all slots
    except CxlmqError as error:
        return error
    return None if host.control.dead else (found.slot, found.generation)    # without power nobody answers
