"""cxlmq: a message broker whose brokers share CXL memory. The client library under its product's name."""

from client import (
    Admin,
    AsyncAdmin,
    AsyncPublisher,
    AsyncSubscriber,
    Delivery,
    Message,
    Publisher,
    Receipt,
    ReceivedBatch,
    Subscriber,
)
from client import errors as errors

__all__ = ["Admin", "AsyncAdmin", "AsyncPublisher", "AsyncSubscriber", "Delivery", "Message", "Publisher", "Receipt",
           "ReceivedBatch", "Subscriber", "errors"]
