"""A publisher's session, without I/O: events in, commands out. Its driver has the clock, the wire and the threads.

    CLOSED ─ open ─► OPENING ─ session_opened ─► OPEN ─ reopen ─► REOPENING ─ session_opened ─► OPEN
       ▲ ─ nobody ───┘                             └── what does not come back ──► FAILED     any ─ end ─► ENDED

    batch: pending (no sequence yet) ─► in flight (`Flights`) ─► settled
              ▲ not in the log ── of a session that ended ── in the log ─► awaited, for its level ─► settled

Every event may leave commands (`client.publishing.commands`), which the driver takes and does, in order. Events come
one at a time; only `pending` may be added to, and popped from, by other threads.
"""

import math
from collections import deque
from collections.abc import Sequence

from broker.errors import CxlmqError, DeliveryTimeout, MessageLost, SessionFenced
from broker.proto import cxlmq_pb2 as pb
from broker.sessions import LOST_POSITION, UNKNOWN_POSITION, UNPLACED_POSITION, UNSURE_POSITION
from client.batch import Batch
from client.brokers import BrokerAddress
from client.levels import Awaited, Outcome, recovered_meanwhile
from client.publishing.commands import (
    AskBrokers,
    AskWhetherThere,
    Command,
    Failed,
    LookUp,
    NotOpened,
    Opened,
    OpenSession,
    Settle,
    Tell,
)
from client.publishing.flights import Flights
from client.publishing.life import NEXT, State
from client.publishing.opening import Epochs, Opening

RECONNECT_SECONDS = 0.5                 # between two looks for brokers that are lacking
REOPEN_SECONDS = 0.1                    # between two searches for a broker that opens the session
LEARN_SECONDS = 0.1                     # between two looks at how far levels have come
ASK_AGAIN_SECONDS = 1.0                 # whether a broker is there that has answered that


class Session:
    """One publisher's, over all its epochs."""

    def __init__(self, topic: str, client_id: int, delivery_timeout: float, flights: Flights) -> None:
        self.topic, self.client_id, self.delivery_timeout = topic, client_id, delivery_timeout
        self.ack = 0
        self.flights = flights
        flights.session = self
        self.state = State.CLOSED
        self.opened = pb.Session()                  # by the broker at `opened_at`
        self.opened_at: BrokerAddress | None = None
        self.epoch = 0
        self.brokers: Sequence[BrokerAddress] = ()
        self.broker_count = 0                       # those that are not live now as well
        self.silent: set[int] = set()               # brokers that stand still: nothing is sent to them
        self.pending: deque[Batch] = deque()
        self.awaited = Awaited(topic)
        self.commands: deque[Command] = deque()
        self.failure: CxlmqError | None = None
        self.reopened = self.retries = 0            # counts
        self._epochs = Epochs()
        self._opening: Opening | None = None
        self._resume_from = 0
        self._earlier: list[pb.EarlierBatches] = []     # that are asked for with it
        self._reason: CxlmqError | None = None      # why it is being opened anew
        self._asking_brokers = self._looking_up = False
        self._asked: dict[int, float] = {}          # brokers -> until when nobody asks again whether they are there
        self._next_brokers = self._next_open = self._next_look = 0.0

    # ---- life -------------------------------------------------------------------------------------------------------

    def _go(self, state: State) -> None:
        assert state in NEXT[self.state], f"{self.state} to {state}"
        self.state = state

    @property
    def is_open(self) -> bool:
        """Whether batches can be sent."""
        return self.state is State.OPEN

    def open(self, brokers: Sequence[BrokerAddress], broker_count: int, ack: int) -> None:
        """Search for a broker that opens the first session: `Opened` or `NotOpened`."""
        self._go(State.OPENING)
        self.ack, self.broker_count = ack, broker_count
        self._search(brokers)

    def reopen(self, reason: CxlmqError) -> None:
        """This session has ended, or has to: open the next epoch, keep what is in the log, send the rest again."""
        if not self.is_open:
            return
        self._go(State.REOPENING)
        self._reason, self._opening = reason, None
        self.flights.abandon()
        self._resume_from = self.flights.oldest()
        self._ask_brokers()

    def fail(self, error: CxlmqError) -> None:
        """Nothing more can be published."""
        if self.state in (State.OPEN, State.REOPENING):
            self._go(State.FAILED)
            self.failure, self._opening = error, None
            self.flights.abandon()
            self.commands.append(Failed(error))

    def end(self) -> None:
        """It is closed. Whoever drives it settles what is left."""
        self._go(State.ENDED)
        self._opening = None
        self.forget()

    def forget(self) -> None:
        """Somebody else settles what is left. Any thread."""
        self.pending.clear()
        self.awaited.clear()
        self.flights.forget()

    # ---- opening ----------------------------------------------------------------------------------------------------

    def _search(self, brokers: Sequence[BrokerAddress]) -> None:
        self.brokers, self._earlier = brokers, self.awaited.earlier()
        self._opening = Opening(self._awake(brokers), self.client_id, self.epoch, self._epochs)
        self._ask_next()

    def _awake(self, brokers: Sequence[BrokerAddress]) -> Sequence[BrokerAddress]:
        """Those that do not stand still, if there are any."""
        return [each for each in brokers if each.id not in self.silent] or brokers

    def _ask_next(self) -> None:
        assert self._opening is not None
        found = self._opening.next()
        if found is None:
            self._not_opened(self._opening.error)
            return
        broker, epoch = found
        self.commands.append(OpenSession(broker, pb.OpenSessionRequest(
            topic=self.topic, client_id=self.client_id, ack=self.ack, session_epoch=epoch, resume_epoch=self.epoch,
            resume_from=self._resume_from, seen=self.opened.topic, earlier=self._earlier)))

    def session_refused(self, error: CxlmqError) -> None:
        """The broker that was asked last did not open it, or did not answer."""
        if self._opening is None:
            return
        try:
            self._opening.refused(error)
        except CxlmqError as final:
            self._not_opened(final)
        else:
            self._ask_next()

    def _not_opened(self, error: CxlmqError) -> None:
        self._opening = None
        if self.state is State.OPENING:
            self._go(State.CLOSED)
            self.commands.append(NotOpened(error))
        elif not error.comes_back:
            self.fail(error)

    def session_opened(self, opened: pb.Session, broker: BrokerAddress, now: float) -> bool:
        """A broker has opened it. False when nobody wants it any more: close it there."""
        if self._opening is None:
            return False
        again, self._opening, ended = self.state is State.REOPENING, None, self.epoch
        self._epochs.tried.clear()
        self.opened, self.opened_at, self.epoch = opened, broker, opened.session_epoch
        if again:
            self.reopened += 1
            self._tell_outcomes(self.awaited.looked_up(self._earlier, opened))
            self._resume(ended)
        self._go(State.OPEN)
        self.flights.begin(opened)
        self.commands.append(Opened(again))
        self.flights.connect(self._awake(self.brokers), now)
        self.flights.pump(now)
        self._next_look = 0.0               # what is awaited has most often reached its level
        if self._reason is not None:
            self.commands.append(Tell(self._reason))
            self._reason = None
        return True

    def _resume(self, ended: int) -> None:
        """Keep for their level what the ended session has in the log; the rest goes before everything that waits."""
        high_water, positions = self.opened.high_water, list(self.opened.positions)
        left = []
        for sequence, batch in self.flights.take():
            at = sequence - self._resume_from
            position = positions[at] if 0 <= at < len(positions) else UNKNOWN_POSITION
            if position == LOST_POSITION:
                self.settle(batch, None, MessageLost(topic=self.topic))
            elif position == UNSURE_POSITION:
                self.settle(batch, None, recovered_meanwhile())
            elif sequence < high_water or position != UNKNOWN_POSITION:
                self._await_level(batch, None if position >= UNPLACED_POSITION else position, ended, sequence)
            else:
                left.append(batch)
        self.pending.extendleft(reversed(left))

    def _await_level(self, batch: Batch, position: int | None, epoch: int, sequence: int) -> None:
        """A batch is in the log: at level 0 that is all there is to know."""
        if batch.level == 0:
            self.settle(batch, None, None, duplicate=True)
            return
        batch.release()
        self.awaited.add(batch, position, self.opened, epoch, sequence)

    # ---- brokers ----------------------------------------------------------------------------------------------------

    def _ask_brokers(self) -> None:
        if not self._asking_brokers:
            self._asking_brokers = True
            self.commands.append(AskBrokers())

    def brokers_known(self, brokers: Sequence[BrokerAddress], broker_count: int, now: float) -> None:
        """These live, of `broker_count`."""
        self._asking_brokers = False
        self.broker_count = broker_count
        if self.state is State.REOPENING and self._opening is None:
            self._next_open = now + REOPEN_SECONDS
            self._search(brokers)
        elif self.is_open:
            self.brokers = brokers
            self.flights.connect([each for each in brokers if each.id not in self.silent], now)
            self.flights.pump(now)

    def brokers_unknown(self, error: CxlmqError, now: float) -> None:
        """Nobody could say."""
        self._asking_brokers = False
        if self.state is State.REOPENING and self._opening is None:
            self._next_open = now + REOPEN_SECONDS
            self._not_opened(error)

    def broker_silent(self, broker: BrokerAddress, now: float) -> None:
        """It does not answer at all. As long as that is so, it is left alone: at order 5 what all brokers have would
        wait for what it has."""
        if broker.id not in self.silent:
            self.silent.add(broker.id)
            if self.is_open:
                self.flights.lose(broker, now)

    def broker_there(self, broker: BrokerAddress, now: float) -> None:
        """It answers, or is gone: it is like the others again."""
        self.silent.discard(broker.id)
        self._asked[broker.id] = now + ASK_AGAIN_SECONDS

    # ---- time -------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Time has passed: what has come, deadlines, retries, lost brokers that came back."""
        self.flights.look(now)
        self.expire(now)
        if self.state is State.REOPENING and self._opening is None and now >= self._next_open:
            self._ask_brokers()
        if self.awaited and not self._looking_up and now >= self._next_look:
            self._next_look, self._looking_up = now + LEARN_SECONDS, True
            self.commands.append(LookUp())
        if not self.is_open:
            return
        for broker in self.flights.quiet(now):
            if self._asked.get(broker.id, now) <= now:
                self._asked[broker.id] = math.inf
                self.commands.append(AskWhetherThere(broker))
        self.flights.resend(now)
        if now >= self._next_brokers and self.flights.lacks_brokers(self.broker_count):
            self._next_brokers = now + RECONNECT_SECONDS
            self._ask_brokers()
        self.pump(now)

    def pump(self, now: float) -> None:
        """Send what is pending, as far as there is room."""
        if self.is_open:
            self.flights.pump(now)

    def expire(self, now: float) -> None:
        """Settle what nobody took or answered in time."""
        while (batch := self._overdue(now)) is not None:
            self.settle(batch, None, self.flights.why_not_sent())
        self._tell_outcomes(self.awaited.overdue(now, self.delivery_timeout))
        if self.flights.expire(now):
            # A sequence that was given up may never arrive: the session has to end, or everything behind it would
            # wait for ever.
            self.reopen(SessionFenced(reason="a batch was given up", committed=self.flights.oldest()))

    def _overdue(self, now: float) -> Batch | None:
        """Take the oldest batch that is not sent, when its time is over."""
        try:
            return self.pending.popleft() if self.pending[0].deadline <= now else None
        except IndexError:
            return None

    # ---- outcomes ---------------------------------------------------------------------------------------------------

    def settle(self, batch: Batch, position: int | None, error: CxlmqError | None, *, epoch: int = 0,
               duplicate: bool = False) -> None:
        """What became of a batch is known."""
        self.commands.append(Settle(batch, position, error, epoch, duplicate))

    def topic_known(self, topic: pb.Topic) -> None:
        """How far the topic's levels have come: what is awaited and has reached its level, or cannot, settles."""
        self._looking_up = False
        if topic.run_id != self.opened.topic.run_id:    # recovered: the next session says what it still has
            self.reopen(SessionFenced(reason="the cluster was recovered", committed=self.flights.oldest()))
        else:
            self._tell_outcomes(self.awaited.decided(topic))

    def topic_unknown(self) -> None:
        """Nobody could say; what ends the publisher is found on other ways."""
        self._looking_up = False

    def _tell_outcomes(self, outcomes: list[Outcome]) -> None:
        for each in outcomes:
            self.settle(each.batch, each.position, each.error, duplicate=each.error is None)

    def not_sent_in_time(self) -> CxlmqError:
        """The error of a batch that no broker took."""
        return DeliveryTimeout(f"not sent within {self.delivery_timeout} s: no broker took it; it is not in the log",
                               timeout_seconds=self.delivery_timeout)

    # ---- what always holds ------------------------------------------------------------------------------------------

    def invariants(self) -> None:
        """Assert that every batch is in one place, and what the flights promise. After any event, by tests and the
        simulation."""
        flying = self.flights.invariants()
        places = [*map(id, self.pending), *map(id, flying), *map(id, self.awaited.batches())]
        settling = [id(each.batch) for each in self.commands if isinstance(each, Settle)]
        assert len(places) == len(set(places)), "a batch is in two places"
        assert len(settling) == len(set(settling)), "a batch settles twice"
        assert not set(settling) & set(places), "what settles is still somewhere"
        assert (self._opening is not None) <= (self.state in (State.OPENING, State.REOPENING))


__all__ = ["Session", "State"]
