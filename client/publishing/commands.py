"""What a publisher's session wants done. Its driver does so, in order, and comes back with the event named here."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from broker.errors import CxlmqError
from broker.proto import cxlmq_pb2 as pb
from client.batch import Batch
from client.brokers import BrokerAddress


@dataclass(frozen=True, slots=True)
class AskBrokers:
    """Find out which brokers live: `brokers_known` or `brokers_unknown`."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Ask a broker for a session: `session_opened` or `session_refused`, within a time of the driver's."""

    broker: BrokerAddress
    request: pb.OpenSessionRequest


@dataclass(frozen=True, slots=True)
class Opened:
    """The session is open, for the first time or `again`; its limits are known."""

    again: bool


@dataclass(frozen=True, slots=True)
class NotOpened:
    """The first session could not be opened; it may be tried again."""

    error: CxlmqError


@dataclass(frozen=True, slots=True)
class Connect:
    """Find a way to a broker. Over streams: `results` and `way_lost`, with this `way`; attached: `attached` or
    `not_attached`, with the epoch that is `way`."""

    broker: BrokerAddress
    opened: pb.PublishOpen
    way: Hashable


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Let go of a way, without waiting: nothing that comes by it is wanted any more."""

    way: Hashable


@dataclass(frozen=True, slots=True)
class Leave:
    """A slot was given up in memory: let its broker look at once."""

    slot: Any                           # client.publishing.attached_flights.Slot


@dataclass(frozen=True, slots=True)
class Send:
    """Put a batch on its way, behind what was sent there before."""

    way: Hashable
    batch: Batch


@dataclass(frozen=True, slots=True)
class AskWhetherThere:
    """Ask a broker that answers no batch whether it is there: `broker_silent` or `broker_there`."""

    broker: BrokerAddress


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask how far the topic's levels have come: `topic_known` or `topic_unknown`."""


@dataclass(frozen=True, slots=True)
class Settle:
    """Tell whoever published a batch what became of it. `error` None: its level is reached."""

    batch: Batch
    position: int | None
    error: CxlmqError | None
    epoch: int = 0
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the user what happened: the session was opened anew, and why."""

    event: CxlmqError


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing more can be published: everything that is left settles with this error."""

    error: CxlmqError


Command = (AskBrokers | OpenSession | Opened | NotOpened | Connect | Disconnect | Leave | Send | AskWhetherThere
           | LookUp | Settle | Tell | Failed)
