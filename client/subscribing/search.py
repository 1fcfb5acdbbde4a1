"""One search for a place: which brokers are asked, in which order, and what of their answers ends it.

    Renew (of a group, coming back) ─► AskBrokers ─► AskPlace ─ refused, and another one may ─► AskPlace ...
                                                       └─ granted, or what no other broker changes ─► ended

It wants one thing at a time (`wants`), and has ended when it wants nothing: without `error`, we read there.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from broker.errors import AttachSlotsFull, BrokerUnavailable, CursorTableFull, CxlmqError
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress
from client.start import Start
from client.subscribing.commands import AskBrokers, AskPlace, Place, Renew

ELSEWHERE = (BrokerUnavailable, AttachSlotsFull, CursorTableFull)       # another broker may grant it


class Reader(Protocol):
    """Whose search it is."""

    def request(self, start: Start, seen: pb.TopicIdentity) -> pb.SubscribeRequest: ...

    def in_order(self, brokers: Sequence[BrokerAddress]) -> Sequence[BrokerAddress]: ...

    def search_ended(self, search: "Search", place: Place | None) -> bool: ...


class Search:
    """For the place of `start`, in the topic that was `seen` before."""

    def __init__(self, reader: Reader, start: Start, seen: pb.TopicIdentity, nobody: str, renew: bool = False) -> None:
        self.start, self.seen = start, seen
        self.error: CxlmqError | None = None
        self.wants: Renew | AskBrokers | AskPlace | None = Renew() if renew else AskBrokers()
        self._reader = reader
        self._last: CxlmqError = BrokerUnavailable(address=nobody)      # why the last one did not
        self._candidates = deque[BrokerAddress]()

    def renewed(self) -> None:
        """The group knows that we are there."""
        self.wants = AskBrokers()

    def brokers_known(self, brokers: Sequence[BrokerAddress]) -> None:
        """These live."""
        self._candidates.extend(self._reader.in_order(brokers))
        self._ask_next()

    def _ask_next(self) -> None:
        if self._candidates:
            self.wants = AskPlace(self._candidates.popleft(), self._reader.request(self.start, self.seen))
        else:
            self.end(self._last)

    def refused(self, error: CxlmqError) -> None:
        """What it wanted last was not granted, or nobody answered."""
        if isinstance(self.wants, AskPlace) and isinstance(error, ELSEWHERE):
            self._last = error
            self._ask_next()
        elif self.wants is not None:
            self.end(error)

    def granted(self, place: Place) -> bool:
        """A broker has granted the place. False when nobody wants it any more: leave it."""
        self.wants = None
        return self._reader.search_ended(self, place)

    def end(self, error: CxlmqError) -> None:
        """It has no place."""
        self.wants, self.error = None, error
        self._reader.search_ended(self, None)
