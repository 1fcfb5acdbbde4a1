"""What a reader promises, without I/O: events in, commands out. Its driver has the clock, the wire, memory and threads.

    NEW ─ open ─► OPENING ─ granted ─► READING ─ lost ─► RETURNING ─ granted ─► READING
     ▲ ─ refused ─┘                       │ fail             └── what does not come back ──► FAILED
                                          ▼                       seek, granted: from each of the three to READING
                                       FAILED                     any ─ close ─► CLOSED

A new place is reached first, beside the old one (`Search`); then, in one event, it takes its place. A search that is
refused or given up leaves everything as it was.

    log: ... given out │ buffer (received, not given out) │ next_position: what comes by the place
             handed ◄──┘

Events come one at a time: the driver holds a lock. Each may leave commands (`client.subscribing.commands`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from broker.errors import (
    AttachSlotsFull,
    ClosedError,
    ClusterReplaced,
    CxlmqError,
    PositionLost,
    RangeLost,
    RegionError,
    TopicRecreated,
    UnknownTopic,
)
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress
from client.buffer import BatchBuffer
from client.received import ReceivedBatch
from client.start import Start, fill_start
from client.subscribing.commands import Command, Follow, GoOn, HandOver, Leave, Place, Wake
from client.subscribing.life import NEXT, State
from client.subscribing.search import Search

T = TypeVar("T")
WAKE = Wake()


class Reading:
    """One reader's, over all its places. `turn` says with which broker it begins, when none is chosen."""

    def __init__(self, topic: str, start: Start, broker: int | None, turn: int, buffer: BatchBuffer) -> None:
        self.topic, self.broker, self.turn = topic, broker, turn
        self.start: Start = start
        self.buffer = buffer
        self.introduce: Callable[[pb.SubscribeRequest], None] | None = None     # says who the group's member is
        self.hands_over = False                     # another transport reads where we may not
        self.state = State.NEW
        self.place: Place | None = None
        self.seen = pb.TopicIdentity()              # of the topic that we read
        self.next_position: int | None = None       # of what comes behind the buffer
        self.failure: CxlmqError | None = None      # for when the buffer is empty
        self.told: CxlmqError | None = None         # what the user was told last
        self.first_position = self.end_position = 0
        self.commands: deque[Command] = deque()
        self._step: Search | None = None            # that opens or seeks
        self._return: Search | None = None          # that comes back to where we were

    def _wake(self) -> None:
        if not self.commands or self.commands[-1] is not WAKE:      # one who polls performs nothing
            self.commands.append(WAKE)

    # ---- life -------------------------------------------------------------------------------------------------------

    def _go(self, state: State) -> None:
        assert state in NEXT[self.state], f"{self.state} to {state}"
        self.state = state

    @property
    def is_open(self) -> bool:
        """Whether there is, or was, a place, and it is not closed."""
        return self.state in (State.READING, State.RETURNING, State.FAILED)

    def require_open(self) -> None:
        """Raise `ClosedError` unless it is open."""
        if self.state is State.CLOSED:
            raise ClosedError(what="the subscriber")
        if not self.is_open:
            raise ClosedError("the subscriber is not open: use `with`, or open()", what="the subscriber")

    def fail(self, error: CxlmqError) -> None:
        """Nothing more comes; whoever asks is told why, when all that came is given out."""
        if self.is_open:
            self._go(State.FAILED)
            self.failure, self._return = error, None
            self._wake()

    def close(self) -> None:
        """Nothing is given out any more. Whoever drives it lets go of the place."""
        self._go(State.CLOSED)
        self._step = self._return = None
        self.buffer.clear()
        self._wake()

    def go_on_from(self, other: "Reading") -> None:
        """Read, when it is opened, what comes next in another one, as if nothing had happened."""
        self.start, self.seen, self.told = other.position(), other.seen, other.told
        self.buffer.handed, self.buffer.turn = other.buffer.handed, other.buffer.turn - 1      # opening is a move

    # ---- searching --------------------------------------------------------------------------------------------------

    def open(self) -> Search:
        """Search for the first place."""
        self._go(State.OPENING)
        self._step = self._search(self.start, self.seen)
        return self._step

    def seek(self, start: Start) -> Search:
        """Search for another place; what is buffered is forgotten when it is granted. Raises `ClosedError`."""
        self.require_open()
        # Whoever was told that another topic has the name, and seeks, means that one.
        accepted = isinstance(self.told, TopicRecreated | ClusterReplaced) and self.introduce is None
        self._step = self._search(start, pb.TopicIdentity() if accepted else self.seen)
        return self._step

    def come_back(self) -> Search | None:
        """Search, once, for the place where we were; None when we need none, or are on the way."""
        if self.state is not State.RETURNING or self._return is not None:
            return None
        start = self.start if self.next_position is None else self.next_position
        self._return = self._search(start, self.seen, renew=self.introduce is not None)
        return self._return

    def give_up(self, search: Search) -> None:
        """Whoever waited for it waits no more: all is as it was."""
        search.wants = None
        if search is self._return:
            self._return = None
        elif search is self._step:
            self._step = None
            if self.state is State.OPENING:
                self._go(State.NEW)

    def _search(self, start: Start, seen: pb.TopicIdentity, renew: bool = False) -> Search:
        return Search(self, start, seen, "the cluster" if self.broker is None else f"broker {self.broker}", renew)

    def request(self, start: Start, seen: pb.TopicIdentity) -> pb.SubscribeRequest:
        """What a broker is asked for."""
        request = pb.SubscribeRequest(topic=self.topic, seen=seen)
        fill_start(request, start)
        if self.introduce is not None:
            self.introduce(request)
        return request

    def in_order(self, brokers: Sequence[BrokerAddress]) -> Sequence[BrokerAddress]:
        """Whom to ask. A chosen one has to be there at first; when it is lost, others serve too."""
        turn = self.turn % max(1, len(brokers))
        chosen = [each for each in brokers if each.id == self.broker]
        if self.broker is not None and self.state is State.OPENING:
            return chosen
        return chosen + [each for each in (*brokers[turn:], *brokers[:turn]) if each.id != self.broker]

    def search_ended(self, search: Search, place: Place | None) -> bool:
        """It has a place, or (None) has not; whether somebody wanted it."""
        if search is self._step:
            self._step = None
            if place is not None:
                self._move(search.start, place)
            elif self.state is State.OPENING:
                self._go(State.NEW)
            elif isinstance(search.error, TopicRecreated | ClusterReplaced):
                self.told = search.error
        elif search is self._return:
            if place is not None:
                return self._came_back(place)
            assert search.error is not None
            self._not_back(search, search.error)
        else:
            search.error = ClosedError(what="the subscriber")
            return False
        return True

    def _move(self, start: Start, place: Place) -> None:
        """Read elsewhere from now on."""
        former, self._return = self.place, None     # whoever is on the way back comes too late
        self._go(State.READING)
        self.start, self.place, self.seen = start, place, place.seen
        # A position that is still to come stays where it is.
        self.next_position = None if isinstance(start, int) else place.position
        self.first_position, self.end_position = place.first_position, place.end_position
        self.failure = self.told = None
        self.buffer.moved(start if isinstance(start, int) else place.position)
        self.commands.append(Follow(place))
        if former is not None:
            self.commands.append(Leave(former))
        self._wake()

    def _came_back(self, place: Place) -> bool:
        self._return = None
        former = self.place
        assert former is not None
        if (lost := self.lost_range(place)) is not None:
            self.fail(lost)
            return False
        self._go(State.READING)
        self.place, self.seen = place, place.seen
        self.commands.append(GoOn(former, place))
        return True

    def lost_range(self, place: Place) -> RangeLost | None:
        """What of that we had came to is not in the log that we come back to: others take those positions.

        In the memory that we knew nothing is lost: we may have read on since that end was looked at.
        """
        reached = self.next_position
        if reached is None or place.seen.run_id == self.seen.run_id or place.end_position >= reached:
            return None
        end = place.end_position
        return RangeLost(
            f"messages {end} up to {reached} of topic {self.topic}, which this reader had come to, were lost with the "
            f"memory, and new ones take their positions: go on with seek({end})", topic=self.topic, first=end,
            end=reached)

    def _not_back(self, search: Search, error: CxlmqError) -> None:
        # As at opening: what stands against attaching, and not against reading.
        attaching = isinstance(error, AttachSlotsFull) or (isinstance(error, RegionError) and not error.comes_back)
        if attaching and self.hands_over:
            self.commands.append(HandOver(search, error))
        else:
            self.not_handed_over(search, error)

    def not_handed_over(self, search: Search, error: CxlmqError) -> None:
        """Nobody else reads for us: an outage, or the end."""
        if search is self._return:
            self._return = None
            if not error.comes_back:
                self.fail(error)

    # ---- what comes -------------------------------------------------------------------------------------------------

    def received(self, place: Place, batches: Sequence[ReceivedBatch]) -> None:
        """These came by a place, behind what came before. Of a place that was left nobody wants anything."""
        if place is not self.place or self.failure is not None:
            return
        for batch in batches:
            wanted = self._wanted()
            if batch.position > wanted:             # positions have no holes: somebody passes over what we want
                self.fail(PositionLost(position=wanted, first_available=batch.position))
                return
            end = batch.position + batch.count
            batch.drop_before(wanted)
            # A start that is still to come stays where it is.
            self.next_position = max(wanted, end)
            if batch.count:
                self.buffer.add(batch)
        self._wake()

    def _wanted(self) -> int:
        """The first position that did not come yet."""
        if self.next_position is not None:
            return self.next_position
        assert isinstance(self.start, int)
        return self.start

    def lost(self, place: Place, error: CxlmqError | None = None) -> None:
        """The broker of a place serves it no more. What is final is told; else we come back."""
        if place is not self.place or self.state is not State.READING:
            return
        # A topic that has gone may have been made again: whoever is asked for a place says so.
        if error is None or error.comes_back or isinstance(error, UnknownTopic):
            self._go(State.RETURNING)
        else:
            self.fail(error)

    def rewind(self, position: int) -> None:
        """What was received from `position` on may be something else by now: it is read again."""
        handed = self.buffer.handed
        self.buffer.clear()
        self.buffer.handed = handed
        self.next_position = position
        self._return = None                         # who is on the way back asked for what came behind that

    # ---- taking -----------------------------------------------------------------------------------------------------

    def position(self) -> int:
        """Of the message that is given out next."""
        position = self.buffer.position()
        if position is None:
            position = self.next_position
        if position is None:
            position = self.start if isinstance(self.start, int) else self.first_position
        return position

    def take(self, take: Callable[[BatchBuffer], list[T]]) -> list[T]:
        """What `take` gets out of the buffer; when that is nothing and nothing comes, raises why."""
        self.require_open()
        found = take(self.buffer)
        if not found:
            self.require_open()
            if self.failure is not None:
                self.told = self.failure
                raise self.failure
        return found

    # ---- what always holds ------------------------------------------------------------------------------------------

    def invariants(self) -> None:
        """Assert what always holds of one who reads alone. After any event, by tests and the simulation."""
        batches = self.buffer.batches
        for one, other in pairwise(batches):
            assert one.position + one.count == other.position, "there is a hole in what was received"
        if batches:
            assert batches[-1].position + batches[-1].count == self.next_position, "what comes next is not the next"
        handed = self.buffer.handed
        assert handed is None or not self.is_open or handed <= self.position(), "what was given out is given out again"
        assert self.is_open <= (self.place is not None)
        assert (self.failure is not None) == (self.state is State.FAILED) or self.state is State.CLOSED
        assert self.place is None or self.place.seen == self.seen, "it reads in another topic, or run"
        assert self._return is None or self.state is State.RETURNING
        assert (self.state is State.OPENING) <= (self._step is not None)


__all__ = ["Reading", "State"]
