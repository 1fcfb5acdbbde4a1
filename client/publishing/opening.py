"""The search for a broker that opens a session, under an epoch that is the client's newest."""

from collections import deque
from collections.abc import Sequence

from broker.errors import BrokerUnavailable, CxlmqError, SessionFenced
from client.brokers import BrokerAddress, rendezvous


class Opening:
    """One search, for the epoch after `epoch` (0: there was none).

    Every try has an epoch of its own: a session that was opened, but whose answer was lost, must not fence ours.
    `tried` has the epochs of such tries, also of earlier searches: who fences us under one of them is we ourselves.
    """

    def __init__(self, brokers: Sequence[BrokerAddress], client_id: int, epoch: int, tried: set[int]) -> None:
        self._before = self._epoch = epoch
        self._tried = tried
        self._candidates = deque(rendezvous(brokers, client_id, epoch))
        self.error: CxlmqError = BrokerUnavailable(address="the cluster")       # why the last one did not

    def next(self) -> tuple[BrokerAddress, int] | None:
        """Whom to ask now, and for which epoch; None when all were asked."""
        if not self._candidates:
            return None
        self._epoch += 1
        self._tried.add(self._epoch)
        return self._candidates[0], self._epoch

    def refused(self, error: CxlmqError) -> None:
        """The one that was asked did not open it. Raises what ends the search: a later publisher of this client id has
        taken over (`SessionFenced`), or what does not come back."""
        if isinstance(error, SessionFenced):
            self._tried.discard(self._epoch)
            newest = int(str(error.details.get("newest_epoch", 0)))
            if self._before and newest not in self._tried:
                raise error
            self._epoch = max(self._epoch, newest)      # we are the later one: fence it
        elif not error.comes_back:
            raise error
        else:
            self.error = error
            self._candidates.popleft()
