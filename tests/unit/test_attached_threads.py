"""An attached publisher that threads share, over the real stages: sealing, spilling, sessions that are opened anew and
closing lose, mix, double and overtake nothing, wherever one thread loses the GIL to another."""

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from broker.errors import BufferFull, ClosedError, PoolFull, SessionFenced
from broker.proto import cxlmq_pb2 as pb
from broker.sessions import UNKNOWN_POSITION
from broker.stages.attach import AttachStage
from client.attached import AttachedCore
from client.attached_publisher import AttachedEngine
from client.batch import Delivery, Packer
from client.brokers import BrokerAddress
from client.publishing.attached_flights import Slot
from client.publishing.commands import AskBrokers, AskWhetherThere, Connect, Leave, LookUp, OpenSession
from client.turn import Safeguard, leave_out
from sim.cxl.memory import Role
from tests.logical_threads import Baton, SharedLock
from tests.manual_cluster import LEASE_NS, MIB, ManualCluster, Session, decode_messages
from tests.unit.test_packer_threads import message, publish_some

KIB = 1 << 10
MESSAGE_MAX = 64 * KIB
CLIENT = 9
SEEDS = range(12)
BROKERS = [BrokerAddress(broker, f"broker {broker}") for broker in range(2)]
SHAPE = {"attach_slot_count": 12, "session_count_max": 128, "region_bytes": 24 * MIB, "segment_bytes": 128 * KIB,
         "message_bytes_max": MESSAGE_MAX, "batch_bytes_max": 128 * KIB, "ring_slot_count": 256,
         "order_entry_count": 4096}


@pytest.fixture(autouse=True)
def all_safeguards() -> Iterator[None]:
    """Whatever a test leaves out is there again."""
    yield
    leave_out(Safeguard.SAFEGUARD_NONE)


class Engine(AttachedEngine):
    """The real engine; its loop is a logical thread of the test, and gRPC is a call."""

    def __init__(self, baton: Baton, ack: int = 1, target: int = 16 * KIB) -> None:
        super().__init__("topic", cluster="nowhere", bootstrap=None, ack=ack, client_id=CLIENT, batch_bytes=target,
                         batch_bytes_min=target, batch_bytes_max=target, linger_ms=1.0, in_flight=8, buffer_bytes=8 * MIB,
                         when_full="block", delivery_timeout=1e6, on_delivery=None, on_event=None, compression=None)
        self.baton = baton
        self.sealing, self.account = SharedLock(baton), SharedLock(baton)  # type: ignore[assignment]
        self.cluster = ManualCluster(brokers=2, **SHAPE)
        self.stages = [AttachStage(self.cluster.door(broker.number, Role.ROLE_RECEIVER), broker.log, broker.acks,
                                   self.cluster.clock, LEASE_NS) for broker in self.cluster.brokers]
        self.cluster.stages[0:0] = self.stages
        self.topic_entry = self.cluster.create()
        self.manual: Session | None = None
        self.flights.moving = self.sealing
        self.flights.lives = lambda broker: True
        self.now = lambda: self.cluster.clock.now() / 1e9
        self.session.open(BROKERS, len(BROKERS), ack)
        self._perform()

    # ---- what the loop and gRPC do elsewhere ------------------------------------------------------------------------

    def _schedule_pump(self) -> None:
        pass

    def make_room(self, nbytes: int) -> None:
        self.raise_if_closed()
        self.baton.point()

    def is_on_loop(self) -> bool:
        return True                         # nobody waits: spill at once

    def _set_limits(self) -> None:
        target, region = self.batch_bytes[0], self.cluster.door(0, Role.ROLE_CLIENT)
        self.packer = Packer(self, self.send_full, target, MESSAGE_MAX)
        core = AttachedCore(self, region, self.cluster.layout, self.packer, (target, target, target), 4 * MIB, 1 << 32,
                            self.ack, 1e6)
        self.flights.use(core, region, self.cluster.layout)

    def _do(self, command: Any) -> None:
        self.baton.point()
        match command:
            case AskBrokers():
                self.session.brokers_known(BROKERS, len(BROKERS), self.now())
            case OpenSession(broker, request):
                assert self.session.session_opened(self.opened(request), broker, self.now())
            case Connect(broker, opened):
                self.attach(broker, opened.session_epoch)
            case Leave(slot):
                self.stages[slot.doorbell].close_slot(slot.number, slot.generation)
            case AskWhetherThere(broker):
                self.session.broker_there(broker, self.now())
            case LookUp():
                self.session.topic_known(pb.Topic(end_position=1 << 60))
            case _:
                super()._do(command)
        self.session.invariants()

    def opened(self, request: Any) -> pb.Session:
        """What a broker answers: how far the session before came."""
        old, before = self.manual, request.resume_epoch
        self.manual = self.cluster.open_session(self.topic_entry, CLIENT, request.session_epoch)
        self.cluster.close_streams(self.manual)
        self.cluster.settle()
        found = {each["batch_sequence"]: each["position"] for each in self.cluster.entries(self.topic_entry)
                 if each["client_id"] == CLIENT and each["session_epoch"] == before}
        end = max(found, default=-1) + 1
        if old is not None:
            self.cluster.close_session(old)
        return pb.Session(session_slot=self.manual.slot, session_epoch=request.session_epoch, order=5, high_water=end,
                          topic_number=self.topic_entry.number, topic_generation=self.topic_entry.generation,
                          positions=[found.get(each, UNKNOWN_POSITION) for each in range(request.resume_from, end)])

    def attach(self, broker: BrokerAddress, epoch: int) -> None:
        """A slot at a broker."""
        assert self.manual is not None
        topic = self.topic_entry
        found = self.stages[broker.id].open(topic.number, topic.generation, self.manual.slot, epoch, CLIENT, self.ack, 1, 1, 1)
        assert found is not None
        assert self.flights.attached(Slot(broker, *found, broker.id), epoch)
        self.cluster.settle()               # leases come

    def reopen(self) -> None:
        """As when a broker fenced it."""
        self.end_session(SessionFenced(reason="a test", committed=0))

    def turn(self) -> None:
        """What the loop does when it comes to run."""
        assert self.core is not None
        self.baton.point()
        if self.core.open_count and self.baton.random.random() < 0.3:
            self.core.flush_open()
        self._step()
        self._pump()

    def pause(self) -> None:
        """Now and then a thread publishes nothing for so long that what spilled is sent."""
        if self.baton.random.random() < 0.5:
            for _ in range(200):
                self.baton.point()
                if not self.core.spilling:
                    return

    def brokers(self) -> None:
        """What the brokers do."""
        self.baton.point()
        self.cluster.clock.advance(1_000_000)
        for _ in range(4):
            self.cluster.step()

    def messages(self) -> list[bytes]:
        """The log."""
        memory = self.cluster.memory
        return [each for entry in self.cluster.entries(self.topic_entry) for each in
                decode_messages(bytes(memory.read_bytes(entry["payload_offset"], entry["payload_bytes"])))]


def check(engine: Engine, threads: int, noted: list[tuple[bytes, Delivery | None]]) -> None:
    """Everything that was published is in the log once, in each thread's order, and every delivery says where."""
    log = engine.messages()
    assert sorted(log) == sorted(each for each, _ in noted)
    for thread in range(threads):
        numbers = [struct.unpack_from("<QQ", each)[1] for each in log if each.startswith(struct.pack("<Q", thread))]
        assert numbers == sorted(numbers), f"the order of thread {thread}"
    for each, delivery in noted:
        if delivery is None:
            continue
        assert delivery.done(), "a delivery never settled"
        position = delivery.receipt().position
        assert position is None or log[position] == each, "a receipt names another's message"


def run(seed: int, reopenings: int, ack: int = 1, threads: int = 3, count: int = 15, lines: float = 0.05,
        spills: float = 0.0) -> None:
    """Let threads publish while spilling begins and ends, and the session is opened anew now and then."""
    baton = Baton(seed, lines)
    engine = Engine(baton, ack)
    noted: list[tuple[bytes, Delivery | None]] = []
    working = [True] * threads

    def work(thread: int) -> None:
        try:
            publish_some(engine.core, thread, count, random.Random(seed * 100 + thread),
                         lambda each, delivery: noted.append((each, delivery)), engine.pause)
        finally:
            working[thread] = False

    def loop() -> None:
        left = reopenings
        while any(working):
            engine.turn()
            if baton.random.random() < spills:
                engine.core.spill()
            if left and baton.random.random() < 0.2:
                left -= 1
                engine.reopen()
        for _ in range(left):
            engine.reopen()

    def brokers() -> None:
        while any(working):
            engine.brokers()

    baton.run(*(lambda thread=thread: work(thread) for thread in range(threads)), loop, brokers)
    done = engine.flushed()
    for _ in range(2000):
        engine.turn()
        engine.brokers()
        if done():
            break
    assert done(), "it is never flushed"
    assert engine.held == 0 and not engine.unsettled and not engine.pending
    check(engine, threads, noted)
    engine.cluster.check_invariants()


@pytest.mark.parametrize("ack", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_share_an_attached_publisher_lose_mix_and_overtake_nothing(seed: int, ack: int) -> None:
    run(seed, 0, ack)


@pytest.mark.parametrize("ack", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_nor_do_they_while_the_session_is_opened_anew(seed: int, ack: int) -> None:
    run(seed, 3, ack)


@pytest.mark.parametrize("seed", SEEDS)
def test_nor_do_they_while_spilling_begins_and_ends(seed: int) -> None:
    run(seed, 0, count=40, spills=0.5)


@pytest.mark.parametrize(("safeguard", "spills"), [
    (Safeguard.SAFEGUARD_TURN, 0.0), (Safeguard.SAFEGUARD_ENDING, 0.0), (Safeguard.SAFEGUARD_SPILL_ORDER, 0.7)])
def test_each_safeguard_is_missed(safeguard: Safeguard, spills: float) -> None:
    leave_out(safeguard)
    failed = 0
    for seed in range(100):
        try:
            run(seed, 3, count=40, lines=0.2, spills=spills)
        except Exception:
            failed += 1
            break
    assert failed, "no seed needs it"


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_was_taken_settles_when_the_publisher_closes_meanwhile(seed: int) -> None:
    baton = Baton(seed)
    engine = Engine(baton)
    noted: list[tuple[bytes, Delivery | None]] = []
    refused: list[Exception] = []
    working = [True, True]

    def work(thread: int) -> None:
        publisher = engine.core
        try:
            publish_some(publisher, thread, 60, random.Random(seed * 100 + thread),
                         lambda each, delivery: noted.append((each, delivery)))
        except ClosedError as error:
            refused.append(error)
        finally:
            working[thread] = False

    def loop() -> None:
        for _ in range(baton.random.randrange(20)):
            engine.turn()
        engine.closed = True
        baton.point()
        engine._shut_down()
        baton.point()
        engine._give_up()

    def brokers() -> None:
        while any(working):
            engine.brokers()

    baton.run(lambda: work(0), lambda: work(1), loop, brokers)
    assert refused or len(noted) == 120
    for each, delivery in noted:
        assert delivery is None or delivery.done(), each
        assert delivery is None or delivery.exception() is None or isinstance(delivery.exception(), ClosedError)


@pytest.mark.parametrize("seed", SEEDS)
def test_flush_waits_for_what_was_published_before_it_and_for_nothing_else(seed: int) -> None:
    baton = Baton(seed)
    engine = Engine(baton)
    working = [True, True]
    flushed: list[bool] = []

    def work() -> None:
        publisher = engine.core
        assert publisher is not None
        for number in range(8):
            mine = [publisher.append(message(0, 10 * number + k, 3000)) for k in range(2)]
            done = engine.flushed()
            while not done():
                baton.point()
            flushed.append(all(each.done() for each in mine))
        working[0] = False

    def others() -> None:
        number = 0
        while working[0]:
            engine.core.append(message(1, number, 40_000 if number % 5 == 0 else 100))
            number += 1
        working[1] = False

    def loop() -> None:
        left = 2
        while any(working):
            engine.turn()
            if left and baton.random.random() < 0.05:
                left -= 1
                engine.reopen()

    def brokers() -> None:
        while any(working):
            engine.brokers()

    baton.run(work, others, loop, brokers)
    assert flushed == [True] * 8


# ---- loans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_loans_of_several_threads_are_published_in_each_threads_order(seed: int) -> None:
    baton = Baton(seed)
    engine = Engine(baton)
    noted: list[tuple[bytes, Delivery | None]] = []
    working = [True, True]

    def work(thread: int) -> None:
        dice = random.Random(seed * 100 + thread)
        publisher = engine.core
        assert publisher is not None
        for number in range(12):
            each = message(thread, number, dice.choice((16, 3000, 40_000)))
            if dice.random() < 0.5:
                while True:
                    try:
                        loan = publisher.loan(len(each))
                        break
                    except (BufferFull, PoolFull):      # no lease has room, and here nobody waits
                        baton.point()
                with loan as view:
                    baton.point()
                    view[:] = each
                    baton.point()
                noted.append((each, loan.delivery))
            else:
                noted.append((each, publisher.append(each)))
        working[thread] = False

    def loop() -> None:
        left = 2
        while any(working):
            engine.turn()
            if left and baton.random.random() < 0.1:
                left -= 1
                engine.reopen()

    def brokers() -> None:
        while any(working):
            engine.brokers()

    baton.run(lambda: work(0), lambda: work(1), loop, brokers)
    done = engine.flushed()
    for _ in range(2000):
        engine.turn()
        engine.brokers()
        if done():
            break
    check(engine, 2, noted)


