"""What a reader wants done. Its driver does so, in order.

`Renew`, `AskBrokers` and `AskPlace` are of a `Search`, one after the other, and are answered there with the event named
here; whoever waits for the search does them. The others are of the reading, and have no answer, but `HandOver`.
"""

from dataclasses import dataclass
from typing import Any

from broker.errors import CxlmqError
from broker.proto import cxlmq_pb2 as pb
from client.brokers import BrokerAddress


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """What a broker has granted: where reading begins there, and what of the topic there was."""

    position: int
    first_position: int
    end_position: int
    seen: pb.TopicIdentity
    way: Any                            # how its driver reads there


@dataclass(frozen=True, slots=True)
class Renew:
    """Say that the group's member is there, or join again in a recovered cluster: `renewed` or `refused`."""


@dataclass(frozen=True, slots=True)
class AskBrokers:
    """Find out which brokers live: `brokers_known` or `refused`."""


@dataclass(frozen=True, slots=True)
class AskPlace:
    """Ask a broker for a place: `granted` or `refused`, within a time of the driver's."""

    broker: BrokerAddress
    request: pb.SubscribeRequest


@dataclass(frozen=True, slots=True)
class Follow:
    """Read there from now on, and nowhere else: `received`, `lost`, `fail`, with this place."""

    place: Place


@dataclass(frozen=True, slots=True)
class GoOn:
    """The same place at another broker: read there. What is viewed under the former one may be viewed still."""

    former: Place
    place: Place


@dataclass(frozen=True, slots=True)
class Leave:
    """Let go of a place."""

    place: Place


@dataclass(frozen=True, slots=True)
class HandOver:
    """We may not read in this way any more; another one may: `not_handed_over`, with this search, if not."""

    search: Any                         # client.subscribing.search.Search
    error: CxlmqError


@dataclass(frozen=True, slots=True)
class Wake:
    """Whoever waits has something to take, or is told why nothing comes."""


Command = Follow | GoOn | Leave | HandOver | Wake
