"""The search for a broker that opens a session, under an epoch that is the client's newest.

Every try has an epoch of its own, over all searches: a session that was opened, but whose answer was lost, must not
fence ours. And who fences us under one of these epochs is we ourselves.
"""

from collections import deque
from collections.abc import Sequence

from broker.errors import BrokerUnavailable, CxlmqError, SessionFenced
from client.brokers import BrokerAddress, rendezvous


class Epochs:
    """Which epochs a client has asked for: the highest, and those that it may have got without hearing of it."""

    def __init__(self) -> None:
        self.newest = 0
        self.tried: set[int] = set()

    def next(self) -> int:
        """One that was never asked for."""
        self.newest += 1
        self.tried.add(self.newest)
        return self.newest


class Opening:
    """One search, for the session after that of `epoch` (0: there was none)."""

    def __init__(self, brokers: Sequence[BrokerAddress], client_id: int, epoch: int, epochs: Epochs) -> None:
        self._before, self._epochs = epoch, epochs
        self._candidates = deque(rendezvous(brokers, client_id, epoch))
        self.error: CxlmqError = BrokerUnavailable(address="the cluster")       # why the last one did not

    def next(self) -> tuple[BrokerAddress, int] | None:
        """Whom to ask now, and for which epoch; None when all were asked."""
        if not self._candidates:
            return None
        return self._candidates[0], self._epochs.next()

    def refused(self, error: CxlmqError) -> None:
        """The one that was asked did not open it. Raises what ends the search: a later publisher of this client id has
        taken over (`SessionFenced`), or what does not come back."""
        if isinstance(error, SessionFenced):
            self._epochs.tried.discard(self._epochs.newest)
            newest = int(str(error.details.get("newest_epoch", 0)))
            if self._before and newest not in self._epochs.tried:
                raise error
            self._epochs.newest = max(self._epochs.newest, newest)      # we are the later one: fence it
        elif not error.comes_back:
            raise error
        else:
            self.error = error
            self._candidates.popleft()
