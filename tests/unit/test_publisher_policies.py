"""The gRPC publisher's engine without a cluster: policies, windows, retries, and sessions that end, step by step."""

import asyncio
import errno
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from broker.errors import (
    BrokerUnavailable,
    BufferFull,
    ClosedError,
    ClusterReplaced,
    CxlmqError,
    DeliveryTimeout,
    MessageLost,
    NotAllowed,
    PoolFull,
    ReplicaFailed,
    SessionFenced,
    TopicRecreated,
    UnknownTopic,
)
from broker.proto import cxlmq_pb2 as pb
from broker.sessions import LOST_POSITION, UNKNOWN_POSITION, UNPLACED_POSITION
from client.batch import Batch, Delivery
from client.brokers import BrokerAddress
from client.grpc_publisher import PublisherEngine
from client.publishing.commands import AskBrokers, Connect, LookUp, OpenSession
from client.publishing.stream_flights import SPAN_MAX, Way
from tests.manual_cluster import decode_messages

OPTIONS: dict[str, Any] = {
    "cluster": "nowhere", "bootstrap": None, "ack": 1, "client_id": 1, "batch_bytes": 96, "batch_bytes_min": 96,
    "batch_bytes_max": 96, "linger_ms": 60_000, "in_flight": 8, "buffer_bytes": 960, "when_full": "error",
    "delivery_timeout": 1000.0, "on_delivery": None, "on_event": None, "compression": None,
}


class Transport:
    """A stream to a broker that takes batches and answers when the test says so."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.sent: list[Batch] = []

    def send(self, batch: Batch) -> None:
        self.sent.append(batch)

    def abandon(self) -> None:
        assert not self.way.alive


class Engine(PublisherEngine):
    """The engine with brokers of the test's, its callbacks called by the test; every event leaves its session sound."""

    def __init__(self, brokers: int = 2, window: int = 4, **options: Any) -> None:
        super().__init__("t", **{**OPTIONS, "in_flight": window, **options})
        self.brokers = [BrokerAddress(broker, f"broker {broker}") for broker in range(brokers)]
        self.fakes: list[Transport] = []
        self.answer = pb.Session()
        self.on_loop(self.open_session)

    def open_session(self) -> None:
        """Every broker is there."""
        self.answer = pb.Session(topic=pb.TopicIdentity(run_id=1), session_slot=1, session_epoch=1, order=5,
                                 message_bytes_max=1000, batch_bytes_max=1 << 20, window=256)
        self.session.open(self.brokers, len(self.brokers), self.ack or 0)
        self._perform()

    def reopen(self, **answer: Any) -> None:
        """Open the next session, which says this of the one before. On the loop."""
        self.answer.session_epoch += 1
        self.answer.MergeFrom(pb.Session(**answer))
        self.session.reopen(SessionFenced(reason="a test", committed=0))
        self._perform()
        self.fakes.clear()
        self.session.brokers_known(self.brokers, len(self.brokers), self.now())
        self._perform()

    def _do(self, command: Any) -> None:
        match command:
            case Connect(_, _, way):
                self.fakes.append(Transport(way))
                self.transports[way] = self.fakes[-1]  # type: ignore[assignment]
            case OpenSession(broker, _):
                assert self.session.session_opened(self.answer, broker, self.now())
            case AskBrokers():
                pass                        # the test says when
            case LookUp():
                pass                        # as above
            case _:
                super()._do(command)
        self.session.invariants()

    def _schedule_pump(self) -> None:
        pass                                # the test pumps

    @property
    def reasons(self) -> list[CxlmqError]:
        """Why the session is being opened anew, if it is."""
        return [self.session._reason] if self.reopening and self.session._reason is not None else []

    def learn(self, **frontiers: int) -> None:
        """Let the session know how far the levels are, in run 1 unless it is said otherwise."""
        topic = pb.Topic(**{"run_id": 1, "failed_position": (1 << 64) - 1, **frontiers})
        self.event(self.session.topic_known, topic)

    def publish(self, count: int = 1) -> list[Delivery]:
        """Messages that fill a batch each."""
        assert self.packer is not None
        return [self.packer.append(bytes(88)) for _ in range(count)]

    def on_loop(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call where the engine's callbacks run."""
        async def run() -> Any:
            return call(*arguments)

        return self.client_loop.run(run())

    def event(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Something comes to the session."""
        def happen() -> None:
            call(*arguments)
            self._perform()
            self.session.invariants()

        self.on_loop(happen)


def answer(engine: Engine, fake: Transport, status: int, *sequences: int) -> None:
    """One response."""
    response = pb.PublishResponse(batch_sequences=sequences, positions=[10 * each for each in sequences],
                                  statuses=[status] * len(sequences), epoch=1)
    engine.event(engine.flights.results, fake.way, response, engine.now())


def refuse(engine: Engine, fake: Transport, *sequences: int) -> None:
    """One response that says that there is no room."""
    response = pb.PublishResponse(refusals=[
        pb.Refusal(batch_sequence=each, code="pool-full", details='{"holder": "a test"}') for each in sequences])
    engine.event(engine.flights.results, fake.way, response, engine.now())


def lose(engine: Engine, fake: Transport, error: CxlmqError) -> None:
    """Its stream ends."""
    engine.event(engine.flights.way_lost, fake.way, error, engine.now())


def expire(engine: Engine) -> None:
    """Everything is overdue."""
    for batch in engine.unsettled.values():
        batch.deadline = 0.0
    engine.event(engine.session.expire, engine.now())


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_batches_go_to_the_brokers_in_turn_with_sequences_from_0(engine: Engine) -> None:
    engine.publish(5)
    engine.on_loop(engine._pump)
    assert [[each.sequence for each in fake.sent] for fake in engine.fakes] == [[0, 2, 4], [1, 3]]


def packed_in(batches: Iterable[Batch]) -> list[bytes]:
    """The messages of sealed batches."""
    return [each for batch in batches for each in decode_messages(batch.frame[-batch.nbytes:])]


def test_a_finalizer_that_publishes_while_a_batch_is_sealed_overtakes_nothing(engine: Engine,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    keep, messages = engine.keep, [bytes([number]) * 88 for number in range(4)]

    def publish_too(batch: Batch) -> None:
        monkeypatch.setattr(engine, "keep", keep)
        for each in messages[1:3]:
            engine.packer.append(each)
        keep(batch)

    monkeypatch.setattr(engine, "keep", publish_too)
    engine.packer.append(messages[0])
    engine.packer.append(messages[3])
    assert packed_in(engine.pending) == messages


@pytest.mark.parametrize("moment", ["before it is kept", "after it is kept", "after it is pending"])
def test_an_interrupted_publisher_loses_and_doubles_nothing(engine: Engine, moment: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    keep, seal, messages = engine.keep, engine._seal, [bytes([number]) * 88 for number in range(3)]

    def interrupted(batch: Batch) -> None:
        monkeypatch.undo()
        if moment == "after it is kept":
            keep(batch)
        if moment == "after it is pending":
            seal(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_seal" if moment == "after it is pending" else "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.packer.append(messages[0])
    done = engine.flushed()                 # what was interrupted goes on
    engine.packer.append(messages[1])
    engine.packer.append(messages[2])
    assert packed_in(engine.pending) == messages
    assert len(engine.unsettled) == 3 and engine.held == sum(each.nbytes for each in engine.pending)
    assert not done()


def test_no_more_than_the_window_is_in_flight(engine: Engine) -> None:
    engine.publish(10)
    engine.on_loop(engine._pump)
    assert (len(engine.flights.flights), len(engine.pending)) == (8, 2)
    answer(engine, engine.fakes[0], pb.COMMITTED, 0, 2)
    assert (len(engine.flights.flights), len(engine.pending)) == (8, 0)
    assert engine.flights.nbytes == 768


def test_a_broker_that_is_slow_stops_the_others_within_the_span() -> None:
    engine = Engine(window=1000, buffer_bytes=1 << 20)
    engine.publish(300)
    engine.on_loop(engine._pump)
    assert len(engine.flights.flights) == SPAN_MAX
    # All but the oldest are answered: sequences may not run away from it, the sequencer's window has an end.
    for fake in engine.fakes:
        answer(engine, fake, pb.COMMITTED, *(each for each in list(fake.way.waiting) if each))
    assert (len(engine.flights.flights), engine.flights.next_sequence) == (1, SPAN_MAX)


def test_error_refuses_when_the_buffer_is_full(engine: Engine) -> None:
    deliveries = engine.publish(10)
    with pytest.raises(BufferFull):
        engine.publish()
    assert engine.buffered == 960
    engine.on_loop(engine._pump)
    answer(engine, engine.fakes[0], pb.COMMITTED, 0)
    assert deliveries[0].result().position == 0
    engine.publish()


def test_drop_newest_counts_what_it_did_not_take() -> None:
    engine = Engine(when_full="drop_newest")
    deliveries = engine.publish(13)
    assert [each.done() for each in deliveries] == [False] * 10 + [True] * 3
    assert {type(each.exception()) for each in deliveries[10:]} == {BufferFull}
    assert engine.counts["dropped_newest"] == 3
    assert engine.packer is not None
    assert engine.packer.messages == 10


def test_drop_oldest_drops_what_is_not_on_its_way() -> None:
    engine = Engine(when_full="drop_oldest", window=2)
    deliveries = engine.publish(10)
    engine.on_loop(engine._pump)
    deliveries += engine.publish(3)
    assert [each.done() for each in deliveries] == [False] * 4 + [True] * 3 + [False] * 6
    assert engine.counts["dropped_oldest"] == 3
    deliveries += engine.publish(7)
    # Now everything that could be dropped is: what is in flight stays, the newest has to go.
    more = engine.publish(1)
    assert engine.counts["dropped_oldest"] + engine.counts["dropped_newest"] == 11
    assert not any(each.done() for each in deliveries[:4])
    assert engine.buffered <= 960
    assert len(more) == 1


def test_block_waits_until_there_is_room() -> None:
    engine = Engine(when_full="block")
    engine.publish(10)
    engine.on_loop(engine._pump)

    async def later() -> None:
        await asyncio.sleep(0.05)
        response = pb.PublishResponse(batch_sequences=[0], positions=[0], statuses=[pb.COMMITTED])
        engine.flights.results(engine.fakes[0].way, response, engine.now())
        engine._perform()

    engine.client_loop.submit(later())
    engine.publish()
    assert engine.counts["acked"] == 1


def test_block_gives_up_after_the_delivery_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.engine.BLOCK_GRACE_SECONDS", 0.0)
    engine = Engine(when_full="block", delivery_timeout=0.05)
    engine.publish(10)
    with pytest.raises(BufferFull):
        engine.publish()


def test_a_broken_streams_batches_go_elsewhere_with_their_sequences(engine: Engine) -> None:
    engine.publish(4)
    engine.on_loop(engine._pump)
    lost, other = engine.fakes
    lose(engine, lost, BrokerUnavailable(address="x"))
    assert [each.sequence for each in other.sent] == [1, 3, 0, 2]
    answer(engine, other, pb.COMMITTED, 0, 1, 2, 3)
    assert (engine.counts["acked"], engine.session.retries, engine.flights.nbytes) == (4, 2, 0)


def test_a_fenced_batch_ends_the_session_also_when_it_is_settled_already(engine: Engine) -> None:
    answer(engine, engine.fakes[0], pb.FENCED, 5)
    assert [type(each) for each in engine.reasons] == [SessionFenced]


def test_a_duplicates_receipt_has_no_position(engine: Engine) -> None:
    delivery = engine.publish()[0]
    engine.on_loop(engine._pump)
    answer(engine, engine.fakes[0], pb.DUPLICATE, 0)
    assert (delivery.result().position, delivery.result().duplicate) == (None, True)


def test_a_refusal_of_the_oldest_takes_back_what_waits_behind_it(engine: Engine) -> None:
    engine.publish(8)
    engine.on_loop(engine._pump)
    refuse(engine, engine.fakes[1], 1)
    assert engine.reasons == [], "only the oldest holds the others back"
    refuse(engine, engine.fakes[0], 0)
    assert [type(each) for each in engine.reasons] == [PoolFull]
    assert engine.flights.span == 4


def test_the_span_grows_again(engine: Engine) -> None:
    engine.flights.span = 2
    engine.publish(8)
    engine.on_loop(engine._pump)
    assert len(engine.flights.flights) == 2
    answer(engine, engine.fakes[0], pb.COMMITTED, 0)
    answer(engine, engine.fakes[1], pb.COMMITTED, 1)
    assert engine.flights.span > 2
    assert engine.flights._obstacle is None


def test_a_refusal_that_stands_is_what_a_delivery_settles_with() -> None:
    engine = Engine(delivery_timeout=60.0)
    refused, unknown = engine.publish(2)
    engine.on_loop(engine._pump)
    unsent = engine.publish(1)[0]
    refuse(engine, engine.fakes[0], 0)      # the oldest: the session is opened anew, and finds nobody
    expire(engine)
    assert isinstance(refused.exception(), PoolFull)
    assert isinstance(unknown.exception(), DeliveryTimeout)
    assert isinstance(unknown.exception().__cause__, PoolFull)
    assert isinstance(unsent.exception(), PoolFull)


def test_a_refusal_says_nothing_of_a_broker_that_was_lost_with_the_batch(engine: Engine) -> None:
    # It may be in the log: whoever is told that there was no room would publish it again.
    (delivery,) = engine.publish()
    engine.on_loop(engine._pump)
    lost, other = engine.fakes
    lose(engine, lost, BrokerUnavailable(address="x"))
    assert [each.sequence for each in other.sent] == [0]
    refuse(engine, other, 0)
    expire(engine)
    assert isinstance(delivery.exception(), DeliveryTimeout)
    assert isinstance(delivery.exception().__cause__, PoolFull)


def test_what_is_in_the_log_is_settled_and_the_rest_sent_again_from_0(engine: Engine) -> None:
    deliveries = engine.publish(6)
    engine.on_loop(engine._pump)
    engine.on_loop(lambda: engine.reopen(high_water=2, positions=[70, 80, (1 << 64) - 1, 90]))
    assert not any(each.done() for each in deliveries)      # in the log, and nobody said yet that it is committed
    engine.learn(end_position=91)
    # Below the high-water mark, and beyond a gap where the order allows that: in the log. The others are not.
    assert [each.done() for each in deliveries] == [True, True, False, True, False, False]
    assert [each.result().position for each in (deliveries[0], deliveries[1], deliveries[3])] == [70, 80, 90]
    sent = sorted(((each.sequence, each) for fake in engine.fakes for each in fake.sent), key=lambda pair: pair[0])
    assert [sequence for sequence, _ in sent] == [0, 1, 2]
    assert [each for _, each in sent] == [deliveries[2].batch, deliveries[4].batch, deliveries[5].batch]


@pytest.mark.parametrize("level", [1, 2])
def test_what_a_recovery_lost_settles_as_lost_and_is_not_sent_again(level: int) -> None:
    engine = Engine(ack=level)
    deliveries = engine.publish(4)
    engine.on_loop(engine._pump)
    engine.on_loop(lambda: engine.reopen(high_water=3, positions=[LOST_POSITION, 80, LOST_POSITION]))
    assert [each.done() for each in deliveries] == [True, False, True, False]
    for each in (deliveries[0], deliveries[2]):
        assert isinstance(each.exception(), MessageLost)
        with pytest.raises(MessageLost, match="not there any more"):
            each.result()
    assert [each.batch for each in engine.flights.flights.values()] == [deliveries[3].batch]
    assert (engine.counts["failed"], engine.counts["acked"]) == (2, 0)
    engine.learn(end_position=81, durable_position=81)
    assert deliveries[1].receipt().position == 80


def resumed(level: int, **options: Any) -> tuple[Engine, list[Delivery]]:
    """An engine whose session was opened anew: batches 0 and 1 lie at 70 and 71, batch 2 somewhere below 90."""
    engine = Engine(ack=level, **options)
    deliveries = engine.publish(3)
    engine.on_loop(engine._pump)
    engine.on_loop(lambda: engine.reopen(high_water=3, resumed_position=90, positions=[70, 71]))
    return engine, deliveries


@pytest.mark.parametrize(("level", "frontier", "other"), [(1, "end_position", "durable_position"),
                                                          (2, "durable_position", "end_position")])
def test_a_session_that_was_opened_anew_settles_at_the_level_that_was_asked_for(
        level: int, frontier: str, other: str) -> None:
    engine, deliveries = resumed(level)
    for reached, settled in ((70, []), (71, [0]), (72, [0, 1]), (89, [0, 1]), (90, [0, 1, 2])):
        engine.learn(**{frontier: reached, other: 1000 if level == 2 else 0})
        assert [number for number, each in enumerate(deliveries) if each.done()] == settled
    assert [each.receipt().position for each in deliveries] == [70, 71, None]
    assert {(each.receipt().level, each.receipt().duplicate) for each in deliveries} == {(level, True)}
    assert (engine.buffered, bool(engine.session.awaited), engine.counts["acked"]) == (0, False, 3)


def test_what_a_failed_disk_lacks_is_refused_after_reopening_as_before() -> None:
    engine, deliveries = resumed(2)
    engine.learn(end_position=100, durable_position=71, failed_position=71, failed_replica=3 << 32 | errno.ENOSPC)
    assert deliveries[0].receipt().level == 2
    for each in deliveries[1:]:
        error = each.exception()
        assert isinstance(error, ReplicaFailed)
        assert error.replica == 3


def test_a_level_that_is_not_reached_in_time_is_a_time_out() -> None:
    engine, deliveries = resumed(2)
    engine.learn(end_position=100, durable_position=71)
    expire(engine)
    assert deliveries[0].receipt().position == 70
    assert [type(each.exception()) for each in deliveries[1:]] == [DeliveryTimeout] * 2
    assert "in the log" in str(deliveries[1].exception())
    engine.learn(end_position=100, durable_position=100)    # too late: the first outcome counts
    assert [type(each.exception()) for each in deliveries[1:]] == [DeliveryTimeout] * 2


def test_the_frontier_of_another_run_says_nothing_about_what_the_first_had() -> None:
    engine, deliveries = resumed(2)
    engine.learn(run_id=2, end_position=1000, durable_position=1000)
    assert not any(each.done() for each in deliveries)
    assert [type(each) for each in engine.reasons] == [SessionFenced], "the next session says what is there"


def looked_up(engine: Engine, positions: list[int], first_position: int = 0, run_id: int = 2) -> None:
    """The session is opened anew, in another run, which says where the batches of the first session are."""
    asked = engine.session.awaited.earlier()
    assert [(each.session_epoch, each.first, each.end) for each in asked] == [(1, 0, 3)]
    engine.answer = pb.Session(topic=pb.TopicIdentity(run_id=run_id), session_epoch=2, order=5, message_bytes_max=1000,
                               batch_bytes_max=1 << 20, window=256)
    engine.on_loop(lambda: engine.reopen(earlier_positions=positions, first_position=first_position))


@pytest.mark.parametrize("level", [1, 2])
def test_what_a_recovered_log_has_is_settled_when_its_level_is_reached_there(level: int) -> None:
    engine, deliveries = resumed(level)
    looked_up(engine, [70, 71, 80])
    assert not any(each.done() for each in deliveries)
    frontier = "durable_position" if level == 2 else "end_position"
    for reached, settled in ((70, []), (71, [0]), (72, [0, 1]), (80, [0, 1]), (81, [0, 1, 2])):
        engine.learn(run_id=2, **{frontier: reached})
        assert [number for number, each in enumerate(deliveries) if each.done()] == settled
    assert [each.receipt().position for each in deliveries] == [70, 71, 80]


def test_what_a_recovered_log_has_not_is_lost_or_nobody_knows() -> None:
    engine, deliveries = resumed(2)
    # The first was reclaimed, perhaps; the second would be at 71; where the third was, nobody knew.
    looked_up(engine, [UNKNOWN_POSITION, UNKNOWN_POSITION, UNKNOWN_POSITION], first_position=71)
    assert [each.done() for each in deliveries] == [False, True, False]
    assert isinstance(deliveries[1].exception(), MessageLost)
    engine.learn(run_id=2, end_position=1000, durable_position=1000)
    assert [type(each.exception()) for each in (deliveries[0], deliveries[2])] == [DeliveryTimeout] * 2


def test_what_a_recovery_says_is_lost_of_an_earlier_session_is_lost() -> None:
    engine, deliveries = resumed(2)
    looked_up(engine, [LOST_POSITION, 71, UNPLACED_POSITION])
    assert [each.done() for each in deliveries] == [True, False, False]
    assert isinstance(deliveries[0].exception(), MessageLost)
    engine.learn(run_id=2, end_position=90, durable_position=90)
    assert [each.receipt().position for each in deliveries[1:]] == [71, None]


def test_in_the_same_run_nothing_is_lost_because_it_is_not_found() -> None:
    engine, deliveries = resumed(2)
    looked_up(engine, [UNKNOWN_POSITION] * 3, run_id=1)
    engine.learn(end_position=90, durable_position=90)
    assert [each.receipt().position for each in deliveries] == [70, 71, None]


def test_closing_settles_what_is_awaited() -> None:
    engine, deliveries = resumed(2)
    engine.closed = True
    engine.on_loop(engine._give_up)
    assert {type(each.exception()) for each in deliveries} == {ClosedError}
    assert not engine.session.awaited


@pytest.mark.parametrize("error", [each(topic="t") for each in (UnknownTopic, TopicRecreated, ClusterReplaced, NotAllowed)],
                         ids=lambda each: each.code)
def test_what_does_not_come_back_ends_the_publisher(engine: Engine, error: CxlmqError) -> None:
    (delivery,) = engine.publish()
    engine.on_loop(engine._pump)
    lose(engine, engine.fakes[0], error)
    assert delivery.exception() is error
    with pytest.raises(type(error)):
        engine.publish(10)


def test_level_0_is_settled_at_send_and_kept_until_a_broker_has_it() -> None:
    engine = Engine(ack=0)
    delivery = engine.publish()[0]
    engine.on_loop(engine._pump)
    engine.on_loop(engine.settled_at_send, engine.fakes[0].sent[0])
    assert delivery.result().position is None
    assert engine.buffered == 96
    lose(engine, engine.fakes[0], BrokerUnavailable(address="x"))
    assert [each.frame is not None for each in engine.fakes[1].sent] == [True]
    answer(engine, engine.fakes[1], pb.COMMITTED, 0)
    assert (engine.buffered, engine.counts["acked"], len(engine.unsettled)) == (0, 1, 0)


def test_giving_up_settles_everything_once(engine: Engine) -> None:
    deliveries = engine.publish(9)
    assert engine.packer is not None
    deliveries.append(engine.packer.append(b"not sealed yet"))
    engine.on_loop(engine._pump)
    engine.closed = True
    engine.on_loop(engine._give_up)
    engine.on_loop(engine._give_up)
    assert {type(each.exception()) for each in deliveries} == {ClosedError}
    assert (engine.buffered, engine.counts["failed"]) == (0, 10)
    with pytest.raises(ClosedError):
        engine.publish(2)


def test_the_counts_add_up_whatever_happens(engine: Engine) -> None:
    engine.when_full = "drop_oldest"
    engine.publish(30)
    engine.on_loop(engine._pump)
    answer(engine, engine.fakes[0], pb.COMMITTED, 0, 2)
    engine.on_loop(engine._give_up)
    counts = engine.counts
    assert engine.packer is not None
    assert engine.packer.messages == counts["acked"] + counts["failed"] + counts["dropped_oldest"] == 30
