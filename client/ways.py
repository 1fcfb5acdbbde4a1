"""How a publisher's batches travel: what the engines of the transports have in common for the one above them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from broker.errors import CxlmqError
from client.batch import Batch
from client.connection import BrokerAddress


class Ways(ABC):
    """The ways to the brokers, and what is in flight on them. All of it runs on the client loop, none of it waits but
    where it is a coroutine."""

    @abstractmethod
    def _opened(self) -> None:
        """The session is open, its limits are known."""

    @abstractmethod
    async def _connect(self, brokers: Sequence[BrokerAddress]) -> None:
        """Find a way to those brokers to which there is none."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """End all ways, after what is under way was finished."""

    @abstractmethod
    def _abandon(self) -> None:
        """The session has ended: let go of its ways without waiting."""

    @abstractmethod
    def _connected(self) -> int:
        """To how many live brokers there is a way."""

    @abstractmethod
    def _quiet_brokers(self) -> list[BrokerAddress]:
        """Live brokers that have batches of ours and have answered none for `SILENT_SECONDS`."""

    @abstractmethod
    def _lose(self, broker: BrokerAddress) -> None:
        """A broker stands still: what it has not answered goes to others, as if it had died."""

    @abstractmethod
    def _pump(self) -> None:
        """Stamp pending batches and send them, as far as there is room. On the loop."""

    @abstractmethod
    def _resend_due(self) -> None:
        """Send again what was refused or lost."""

    @abstractmethod
    def _expire_in_flight(self, now: float) -> bool:
        """Settle what nobody answered in time; whether there was any."""

    @abstractmethod
    def _oldest(self) -> int:
        """Every lower sequence is settled."""

    @abstractmethod
    def _take_in_flight(self) -> list[tuple[int, Batch]]:
        """The session has ended: what was in flight, by sequence, as private batches. A new session counts from 0."""

    @abstractmethod
    def _is_saturated(self) -> bool:
        """Whether a batch that is sent now would have to wait anyhow."""

    @abstractmethod
    def _why_not_sent(self) -> CxlmqError:
        """What stops all batches now, or else that no broker took this one. Either way it is not in the log."""

    @abstractmethod
    def _pause(self) -> float:
        """Seconds until the next tick."""
