"""The client library: `Publisher`, `Subscriber`, `Admin`, and their async twins. Loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.admin import Admin as Admin
    from client.admin import AsyncAdmin as AsyncAdmin
    from client.batch import Delivery as Delivery
    from client.batch import Receipt as Receipt
    from client.publisher import AsyncPublisher as AsyncPublisher
    from client.publisher import Publisher as Publisher
    from client.received import Message as Message
    from client.received import ReceivedBatch as ReceivedBatch
    from client.subscriber import AsyncSubscriber as AsyncSubscriber
    from client.subscriber import Subscriber as Subscriber

_HOMES = {
    "Admin": "client.admin", "AsyncAdmin": "client.admin", "Delivery": "client.batch", "Receipt": "client.batch",
    "AsyncPublisher": "client.publisher", "Publisher": "client.publisher", "Message": "client.received",
    "ReceivedBatch": "client.received", "AsyncSubscriber": "client.subscriber", "Subscriber": "client.subscriber",
}
__all__ = ["Admin", "AsyncAdmin", "AsyncPublisher", "AsyncSubscriber", "Delivery", "Message", "Publisher", "Receipt",
           "ReceivedBatch", "Subscriber"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
