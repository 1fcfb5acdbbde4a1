"""A reading whose places are slots: batches are viewed in memory, or copied out of it, and views hold what they show.

    slot ─ take ─► buffer ─► given out ─► released
     │ cut off, or its topic closed           ▲
     └► retired, until nothing of it is viewed ┘

What is in memory is read without a broker; that what was taken is what it was, is asked afterwards: segments are given
back only after slot or topic are visibly closed.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from broker.errors import CxlmqError, DamagedData, PositionLost, RangeLost, UnknownTopic
from broker.reader import ReadError, ReadStatus
from client.attached_reader import AttachedReader
from client.buffer import BatchBuffer
from client.received import Message
from client.start import Start
from client.subscribing.commands import Place
from client.subscribing.reading import Reading, State
from client.subscribing.search import Search

T = TypeVar("T")


class Way(Protocol):
    """How one reads at a place."""

    @property
    def reader(self) -> AttachedReader: ...


class AttachedReading(Reading):
    """One reader's, over all its slots. A place's `way` has the `reader` of its slot."""

    def __init__(self, topic: str, start: Start, broker: int | None, turn: int) -> None:
        super().__init__(topic, start, broker, turn, BatchBuffer(self._refill))
        self.retired: list[AttachedReader] = []     # of places that we came back from; what is viewed there is held
        self.ended: Place | None = None             # whose topic, or slot, is closed: a broker says what became of it

    # ---- places -----------------------------------------------------------------------------------------------------

    @property
    def reader(self) -> AttachedReader | None:
        """Of the slot through which we read."""
        return None if self.place is None else cast(Way, self.place.way).reader

    def look(self, serves: Callable[[Place], bool]) -> None:
        """Whether the broker whose cursor protects us serves us still, and what of former places is viewed."""
        self.let_go()
        reader, place = self.reader, self.place
        if reader is not None and place is not None and not (reader.is_open() and serves(place)):
            self.lost(place)

    def come_back(self) -> Search | None:
        """As of any reading. What is in the buffer may be something else by now: then it is read again."""
        position = self.buffer.position()
        if self.state is State.RETURNING and position is not None and not self._is_intact():
            self.rewind(position)
        return super().come_back()

    def _is_intact(self) -> bool:
        return self.reader is None or self.reader.is_intact()

    def retire(self, place: Place) -> None:
        """We read elsewhere, and what is viewed there is viewed still."""
        self.retired.append(cast(Way, place.way).reader)
        self.let_go()

    def let_go(self, all_of_them: bool = False) -> None:
        """Give up the former places under which nothing is viewed any more; their brokers see it by themselves."""
        for reader in [each for each in self.retired if all_of_them or each.released == each.next_index]:
            reader.leave()
            self.retired.remove(reader)

    # ---- taking -----------------------------------------------------------------------------------------------------

    def take(self, take: Callable[[BatchBuffer], list[T]]) -> list[T]:
        """As of any reading. What is not what it was any more was not given out: it is read again, or its loss said."""
        handed = self.buffer.handed
        found = super().take(take)
        if found and not self._is_intact():
            self.buffer.handed = handed
            self.rewind(cast(Message, found[0]).position)
            self._end()
            return []
        return found

    def _end(self) -> None:
        place = self.place
        if place is not None and self.ended is not place:
            self.ended = place
            self.lost(place, UnknownTopic(topic=self.topic))

    def _refill(self, limit: int) -> None:
        """Put what is in memory into the buffer."""
        place, reader = self.place, self.reader
        while place is not None and reader is not None and self.failure is None and not self.buffer:
            try:
                batches = reader.take(limit)
            except ReadError as error:
                if error.status != ReadStatus.READ_CLOSED:
                    raise self._typed(reader, error) from None
                self._end()
                return
            if not batches:
                return
            self.received(place, batches)

    def _typed(self, reader: AttachedReader, error: ReadError) -> CxlmqError:
        if error.status == ReadStatus.READ_LOST:
            return PositionLost(position=self.next_position, first_available=reader.first_position())
        if error.status == ReadStatus.READ_GONE and error.end is not None:
            return RangeLost(topic=self.topic, first=error.first, end=error.end)
        return DamagedData(str(error), topic=self.topic, index=error.index)
