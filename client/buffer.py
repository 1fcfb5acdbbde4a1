"""What a subscriber has received and not yet given out: batches, the first of them perhaps in part.

    given out                       │ not given out
    ... ─ batches[0] ───────────────┼──────────────── ─ batches[1] ─ ...
          position        +first    │  ahead: taken apart, for readers that come message by message

Whoever takes, in whatever way, takes what comes next, and nothing is kept for one reader that another one asks for:
so any mix of calls, of threads and of iterators gives every message once, in its order. The caller holds a lock.
"""

from collections import deque
from collections.abc import Callable, Sequence

from broker.errors import CxlmqError
from client.received import Message, ReceivedBatch

AHEAD = 1024
REFILL_BATCHES = 64


class BatchBuffer:
    """Batches in their order, and how much of the first was given out."""

    def __init__(self, refill: Callable[[int], None] = lambda _: None) -> None:
        self._refill = refill               # adds up to so many batches, when there are none; or raises why not
        self.batches: deque[ReceivedBatch] = deque()
        self.first = 0                      # messages of batches[0] that were given out
        self.nbytes = 0
        self.turn = 0                       # how often reading went elsewhere: what was claimed before is of no use
        self.handed: int | None = None      # everything below it was given out
        self._ahead: deque[Message] = deque()   # of batches[0], from `first` on

    def __bool__(self) -> bool:
        return bool(self.batches)

    def add(self, batch: ReceivedBatch) -> None:
        """What comes behind all that is there."""
        self.batches.append(batch)
        self.nbytes += batch.nbytes

    def position(self) -> int | None:
        """Of the message that is given out next; None when nothing is there."""
        return int(self.batches[0].position) + self.first if self.batches else None

    def clear(self) -> None:
        """Forget what was not given out."""
        self.batches.clear()
        self._ahead.clear()
        self.first = self.nbytes = 0

    def take_messages(self, limit: int) -> list[Message]:
        """Up to `limit` messages. What is damaged is raised when what comes before it is given out."""
        out: list[Message] = []
        while len(out) < limit:
            try:
                taken = self._part(limit - len(out))
            except CxlmqError:
                if out:
                    break
                raise
            if not taken:
                break
            out += taken
            self._gave(len(taken))
        return out

    def _part(self, limit: int) -> list[Message]:
        """Messages of the first batch."""
        if self._ahead:
            return [self._ahead.popleft() for _ in range(min(limit, len(self._ahead)))]
        if not self.batches:
            self._refill(1)
        return self.batches[0].to_messages(self.first, limit) if self.batches else []

    def take_message(self) -> list[Message]:
        """The next message, if there is one; for who comes message by message."""
        if not self._ahead:
            if not self.batches:
                self._refill(1)
                if not self.batches:
                    return []
            batch = self.batches[0]
            try:
                self._ahead.extend(batch.to_messages(self.first, AHEAD))
            except CxlmqError:              # something in there is damaged: the next one may be sound
                self._ahead.extend(batch.to_messages(self.first, 1))
        message = self._ahead.popleft()
        self._gave(1)
        return [message]

    def next_ahead(self) -> Message | None:
        """The next message, when it is taken apart already and another one of its batch is behind it."""
        if len(self._ahead) < 2:
            return None
        message = self._ahead.popleft()
        self.first += 1
        self.handed = message.position + 1
        return message

    def _gave(self, count: int) -> None:
        batch = self.batches[0]
        self.first += count
        self.handed = batch.position + self.first
        if self.first >= batch.count:
            self._drop_first()

    def take_batches(self) -> list[ReceivedBatch]:
        """All batches; one that was begun comes without what was taken of it."""
        out = self.claim()
        if out:
            self.handed = out[-1].position + out[-1].count
        return out

    def claim(self) -> list[ReceivedBatch]:
        """As `take_batches`, and they do not count as given out: `gave` says that they are, `put_back` not; both with
        the `turn` of now."""
        out: list[ReceivedBatch] = []
        if not self.batches:
            self._refill(REFILL_BATCHES)
        if self.first:
            self.batches[0].drop_before(self.batches[0].position + self.first)
            self.first = 0
            self._ahead.clear()
        while self.batches:
            out.append(self.batches[0])
            self._drop_first()
        return out

    def gave(self, position: int, turn: int) -> None:
        """What was claimed in this turn, below a position, was given out."""
        if turn == self.turn:
            self.handed = max(self.handed or 0, position)

    def put_back(self, batches: Sequence[ReceivedBatch], turn: int) -> None:
        """These, claimed in this turn, come next again. Nothing of `batches[0]` may have been given out meanwhile, but
        before them."""
        if turn != self.turn:
            return
        if self.first:                      # somebody took of what comes behind them
            self.batches[0].drop_before(self.batches[0].position + self.first)
            self.first = 0
        self._ahead.clear()
        self.batches.extendleft(batch for batch in reversed(batches) if batch.count)
        self.nbytes += sum(batch.nbytes for batch in batches)

    def moved(self, position: int | None) -> None:
        """Reading goes on elsewhere. What lies between was not given out, nor is what comes again."""
        self.clear()
        self.turn += 1
        if self.handed is not None and position is not None:
            self.handed = min(self.handed, position)

    def _drop_first(self) -> None:
        batch = self.batches.popleft()
        self.first = 0
        self._ahead.clear()
        self.nbytes = self.nbytes - batch.nbytes if self.batches else 0
