"""What is in flight in the region: the native core's ledger, and the slots that brokers have handed out for it.

    Connect ─► attached: a slot ─► submitted there, acknowledged there ─► the broker dies: the rest goes elsewhere
                                                                      └─► the session ends: left, given back (`Leave`)
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from broker.errors import BrokerUnavailable, CxlmqError, DeliveryTimeout, SessionFenced, SessionUnknown, UnknownTopic
from broker.head import HeadView
from broker.layout import BrokerState, Layout, TopicState
from broker.proto import cxlmq_pb2 as pb
from broker.records import unpack
from client.attached import AttachedCore
from client.batch import Batch
from client.brokers import BrokerAddress, rendezvous
from client.publishing.commands import Connect, Leave
from client.publishing.flights import SILENT_SECONDS, Flights
from sim.cxl.memory import Memory

BEAT_SECONDS = 1.0
CHECK_SECONDS = 0.25
RETRY_SECONDS = 0.02
IDLE_LEASE_SECONDS = 1.0                # who has published nothing for so long gives its leases back


@dataclass(frozen=True)
class Slot:
    """Of ours at a broker."""

    broker: BrokerAddress
    number: int
    generation: int
    doorbell: int                       # its broker, as the region counts them


class AttachedFlights(Flights):
    """Of an `AttachedCore`, which is there from the first slot on. `lives(broker)`: whether a process is it."""

    def __init__(self, lives: Callable[[int], bool]) -> None:
        self.lives = lives
        self.core: AttachedCore | None = None
        self.memory: Memory | None = None           # the core's, and where things are in it
        self.layout: Layout | None = None
        self.slots: dict[int, Slot] = {}
        self.connecting: set[int] = set()           # brokers that were asked for a slot
        self.not_attached_error: CxlmqError | None = None
        self.moving: AbstractContextManager[object] = nullcontext()     # held while batches move between us and others
        self._next_beat = self._next_check = self._next_retry = 0.0
        self._packed_before = -1                    # messages, when it was looked for idleness last
        self._idle_since = 0.0

    # ---- slots ------------------------------------------------------------------------------------------------------

    def begin(self, opened: pb.Session) -> None:
        """A session is open: the core counts from 0."""
        if self.core is not None:
            self.core.begin_session(self.session.epoch)

    def use(self, core: AttachedCore, memory: Memory, layout: Layout) -> None:
        """This core is ours, in this region."""
        if self.core is None:
            core.begin_session(self.session.epoch)
        self.core, self.memory, self.layout = core, memory, layout

    def let_go(self) -> None:
        """Nothing of ours keeps the region mapped any longer."""
        self.core = self.memory = self.layout = None

    def connect(self, brokers: Sequence[BrokerAddress], now: float) -> None:
        """Ask for a slot at those brokers at which there is none."""
        session, alive = self.session, self.brokers_alive()
        for broker in brokers:
            if broker.id not in self.connecting and broker.id not in alive:
                self.connecting.add(broker.id)
                session.commands.append(Connect(broker, pb.PublishOpen(
                    topic=session.topic, client_id=session.client_id, session_slot=session.opened.session_slot,
                    session_epoch=session.epoch, ack=session.ack, seen=session.opened.topic), session.epoch))

    def attached(self, slot: Slot, epoch: int) -> bool:
        """A broker has given us a slot for the session of an epoch. False when nobody wants it any more: detach it."""
        self.connecting.discard(slot.broker.id)
        if self.core is None or not self.wants(epoch):
            return False
        self.core.add_channel(slot.number, slot.generation, slot.doorbell)
        self.slots[slot.number] = slot
        return True

    def wants(self, epoch: int) -> bool:
        """Whether slots for that epoch's session are of use."""
        return self.session.is_open and epoch == self.session.epoch

    def not_attached(self, broker: BrokerAddress, error: CxlmqError, epoch: int) -> None:
        """There is no slot: a session that has ended, or is of another run, is opened anew; what does not come back is
        final."""
        self.connecting.discard(broker.id)
        self.not_attached_error = error
        if not self.wants(epoch):
            return
        if isinstance(error, SessionFenced | SessionUnknown):
            self.session.reopen(error)
        elif not error.comes_back and self.core is not None:
            self.session.fail(error)        # before there is a core, it is being opened, and that fails

    def connected(self) -> int:
        """Slots at live brokers."""
        return len(self.brokers_alive())

    def brokers_alive(self) -> list[int]:
        """Brokers at which we have a slot, and which have not died since."""
        return self.core.brokers_alive() if self.core is not None else []

    def quiet(self, now: float) -> list[BrokerAddress]:
        """Brokers that have batches and have answered none for a while."""
        found = self.core.quiet_slots(SILENT_SECONDS) if self.core is not None else []
        return [self.slots[slot].broker for slot in found]

    def lose(self, broker: BrokerAddress, now: float) -> None:
        """A broker stands still: as if it had died."""
        if self.core is not None:
            self.core.drop_channel(broker.id)

    def abandon(self) -> None:
        """What is in flight is settled there, or taken from there."""

    def leave(self, slots: Iterable[int]) -> None:
        """Give up slots; their brokers are told in memory, and by a call so that they look at once."""
        held = [self.slots.pop(slot) for slot in slots]
        if held and self.core is not None and self.core.leave([(each.number, each.doorbell) for each in held]):
            self.session.commands.extend(map(Leave, held))

    # ---- time -------------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Acks that nobody waits for, heartbeats, dead brokers, a session that somebody ended."""
        core = self.core
        if core is None:
            return
        core.poll()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_SECONDS
            core.beat()
        if now >= self._next_check:
            self._next_check = now + CHECK_SECONDS
            self._check_brokers(core)
        if core.in_flight or core.spilling or self.session.pending or core.messages != self._packed_before:
            self._packed_before, self._idle_since = core.messages, now
        elif now - self._idle_since > IDLE_LEASE_SECONDS:
            core.give_leases_back()
        if core.fenced:
            self.session.reopen(SessionFenced(reason="the broker ended it", committed=core.oldest))

    def _check_brokers(self, core: AttachedCore) -> None:
        """Drop the channels of dead brokers; notice a deleted topic."""
        memory, layout = self.memory, self.layout
        assert memory is not None
        assert layout is not None
        for broker in core.brokers_alive():
            at = layout.offset_of("broker", broker)
            memory.invalidate_range(at, 64)
            line = unpack("BrokerLine", memory.read_line_bytes(at))
            if line["state"] != BrokerState.BROKER_READY or not self.lives(broker):
                core.drop_channel(broker)
        self.leave(core.let_go())
        core.check_slots()
        opened = self.session.opened
        try:
            state = HeadView(memory, layout).read("TopicLine", "topic", opened.topic_number)["state"]
        except BrokerUnavailable:
            return                          # a new head is taking over, and the topic is what it was
        if state != opened.topic_generation << 8 | TopicState.TOPIC_ACTIVE:
            self.session.reopen(UnknownTopic(topic=self.session.topic))     # which tells deleted from made again

    # ---- batches ----------------------------------------------------------------------------------------------------

    def pump(self, now: float) -> None:
        """Submit what spilled; when nothing is left, messages go straight into the segments again."""
        core, pending, gone = self.core, self.session.pending, list[Batch]()
        if core is None:
            return
        # From here to there, no thread sees a batch in neither. Once for all: threads that publish much hold it often.
        with self.moving:
            while pending:
                try:
                    batch = pending.popleft()
                except IndexError:
                    break                   # dropped by another thread
                if not core.submit_batch(batch):
                    pending.appendleft(batch)
                    break
                gone.append(batch)
            self.submitted(gone)
        core.poll()                         # what they settled

    def submitted(self, gone: list[Batch]) -> None:
        """The core has these batches now. Called when nothing moves."""

    def resend(self, now: float) -> None:
        """Submit again what was refused, and what went to a broker that died."""
        core = self.core
        if core is None or not core.retry_wanted or now < self._next_retry:
            return
        self._next_retry = now + RETRY_SECONDS
        addresses = {each.broker.id: each.broker for each in self.slots.values()}
        alive = [addresses[each] for each in core.brokers_alive()]
        for sequence in core.lost():
            for broker in rendezvous(alive, self.session.client_id, sequence):
                if core.resubmit(sequence, broker.id):
                    break
            else:
                return                      # no broker has room now

    def oldest(self) -> int:
        """Every lower sequence is settled."""
        return int(self.core.oldest) if self.core is not None else 0

    def is_saturated(self) -> bool:
        """Whether a batch that is sent now would have to wait anyhow."""
        core = self.core
        return bool(self.session.pending) or (core is not None and core.in_flight_bytes >= core.window_bytes // 2)

    def expire(self, now: float) -> bool:
        """Settle what nobody answered in time."""
        if self.core is None or not self.core.undecided:
            return False
        return self.core.expire(now, DeliveryTimeout(timeout_seconds=self.session.delivery_timeout)) > 0

    def why_not_sent(self) -> CxlmqError:
        """What stops all batches now, or else that no broker took this one."""
        return self.session.not_sent_in_time()

    def take(self) -> list[tuple[int, Batch]]:
        """The session has ended: what was in flight, as private batches; its slots go back."""
        core = self.core
        if core is None:
            return []
        with self.moving:                   # from there to here, no thread sees it in neither
            taken: list[tuple[int, Batch]] = core.take_unsettled()
            self.taken(taken)
        core.poll()                         # what was answered last is told
        self.leave(list(self.slots))
        return taken

    def taken(self, batches: list[tuple[int, Batch]]) -> None:
        """These are private batches again. Called when nothing moves."""

    def forget(self) -> None:
        """The core settles what it has."""


__all__ = ["AttachedFlights", "Slot"]
