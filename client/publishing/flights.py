"""What of a session is in flight: what streams and attached slots have in common for the session above them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker.errors import CxlmqError
from broker.proto import cxlmq_pb2 as pb
from client.batch import Batch
from client.brokers import BrokerAddress

if TYPE_CHECKING:
    from client.publishing.session import Session

SILENT_SECONDS = 0.5                    # a broker that has batches and answers none is asked whether it is there


class Flights(ABC):
    """The ways to the brokers, and the batches on them, each with the session's sequence. `now` is in seconds, of any
    clock that does not jump."""

    session: "Session"

    def look(self, now: float) -> None:
        """See what has come."""
        _ = now                             # a transport that is told of everything has nothing to look at

    @abstractmethod
    def begin(self, opened: pb.Session) -> None:
        """A session is open, its limits are known; its batches count from 0."""

    @abstractmethod
    def connect(self, brokers: Sequence[BrokerAddress], now: float) -> None:
        """Ask for a way to those brokers to which there is none."""

    @abstractmethod
    def connected(self) -> int:
        """To how many live brokers there is a way."""

    def lacks_brokers(self, count: int) -> bool:
        """Whether it is worth while to look for brokers, of which there are `count`."""
        return self.connected() < count

    @abstractmethod
    def quiet(self, now: float) -> list[BrokerAddress]:
        """Live brokers that have batches of ours and have answered none for `SILENT_SECONDS`."""

    @abstractmethod
    def lose(self, broker: BrokerAddress, now: float) -> None:
        """A broker stands still: what it has not answered goes to others, as if it had died."""

    @abstractmethod
    def abandon(self) -> None:
        """The session has ended: let go of its ways."""

    @abstractmethod
    def pump(self, now: float) -> None:
        """Stamp pending batches and send them, as far as there is room."""

    @abstractmethod
    def resend(self, now: float) -> None:
        """Send again what was refused or lost, and is due."""

    @abstractmethod
    def expire(self, now: float) -> bool:
        """Settle what nobody answered in time; whether there was any."""

    @abstractmethod
    def oldest(self) -> int:
        """Every lower sequence is settled."""

    @abstractmethod
    def take(self) -> list[tuple[int, Batch]]:
        """The session has ended: what was in flight, by sequence, as private batches."""

    @abstractmethod
    def forget(self) -> None:
        """Somebody else settles what is in flight."""

    @abstractmethod
    def is_saturated(self) -> bool:
        """Whether a batch that is sent now would have to wait anyhow."""

    @abstractmethod
    def why_not_sent(self) -> CxlmqError:
        """What stops all batches now, or else that no broker took this one. Either way it is not in the log."""

    def invariants(self) -> list[Batch]:
        """Assert what always holds; the batches that are in flight here."""
        return []
