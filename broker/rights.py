"""Who may call which method: one table, from which all handlers are made. A method that is not in it cannot be served.

    request ──► who calls (token) ──► the method's row ──► TOPIC: a right to the topic that the request names
                                                            OWN: what the request names must be the caller's own
                                                            SEEN: the answer shows what the caller may see
                                                            EVERYBODY: whoever has a token
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any, TypeVar

from broker.security import CALLER, RIGHTS, Principal

T = TypeVar("T")
PUBLISH, SUBSCRIBE, ADMIN = (("publish",), ("subscribe",), ("admin",))


class Rule(Enum):
    """What decides."""

    TOPIC = "one of the rights to the topic that the request names"
    OWN = "the method: it knows whose the slot or session is that the request names"
    SEEN = "nobody is refused; topics without one of the rights are left out of the answer"
    EVERYBODY = "nobody with a token is refused"


@dataclass(frozen=True)
class Access:
    """One row: what decides, by which rights, and where the request names the topic ("open.topic")."""

    rule: Rule
    rights: tuple[str, ...] = ()
    topic: str = ""

    def topic_of(self, request: Any) -> str:
        """The topic that a request is about; empty when it names none."""
        return str(attrgetter(self.topic)(request)) if self.topic else ""

    def check(self, caller: Principal, request: Any) -> None:
        """Raise `NotAllowed` when the row alone refuses the call."""
        named = self.topic_of(request)
        if self.rule is Rule.TOPIC or (self.rule is Rule.SEEN and named):
            caller.require(self.rights, named)

    def seen(self, caller: Principal, topics: Iterable[T]) -> list[T]:
        """Of these topics (what has a `name`), those that the caller may see."""
        return [each for each in topics if any(caller.may(right, each.name) for right in self.rights)]  # type: ignore[attr-defined]


def may_see(topic: str) -> bool:
    """Whether who calls now may know of a topic, and of who reads it: with any right to it."""
    caller = CALLER.get()
    return any(caller.may(right, topic) for right in RIGHTS)


def _topic(rights: tuple[str, ...], topic: str = "topic") -> Access:
    return Access(Rule.TOPIC, rights, topic)


METHODS: dict[str, Access] = {
    "PubSub/Publish": _topic(PUBLISH),                  # of `open`, the first message of the stream
    "PubSub/Subscribe": _topic(SUBSCRIBE),
    "Admin/CreateTopic": _topic(ADMIN, "name"),
    "Admin/AlterTopic": _topic(ADMIN, "name"),
    "Admin/DeleteTopic": _topic(ADMIN, "name"),
    "Admin/ListTopics": Access(Rule.SEEN, RIGHTS),
    "Admin/DescribeTopic": _topic(RIGHTS, "name"),
    "Admin/OpenSession": _topic(PUBLISH),
    "Admin/CloseSession": Access(Rule.OWN, PUBLISH),
    "Admin/AttachPublisher": _topic(PUBLISH, "open.topic"),
    "Admin/AttachSubscriber": _topic(SUBSCRIBE, "subscribe.topic"),
    "Admin/Detach": Access(Rule.OWN),
    "Groups/Join": _topic(SUBSCRIBE),
    "Groups/Commit": _topic(SUBSCRIBE),
    "Groups/Leave": _topic(SUBSCRIBE),
    "Groups/List": Access(Rule.SEEN, RIGHTS, "topic"),
    "Groups/Reset": _topic(ADMIN),
    "Groups/Delete": _topic(ADMIN),
    "Cluster/Describe": Access(Rule.EVERYBODY),
}
