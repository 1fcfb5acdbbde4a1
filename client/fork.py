"""After a fork the child has copies of our clients and none of the threads that keep them: there they are closed.

The parent's go on. A copy that went on writing would write where the parent does: into the same leases and cursors.
"""

import os
import weakref
from typing import Any, Protocol

from broker.errors import ClosedError


class _Client(Protocol):
    def after_fork(self) -> None: ...


class ForkedEngine:
    """Stands for the engine of a client that belongs to the parent: whatever is asked of it is a `ClosedError`."""

    def __getattr__(self, name: str) -> Any:
        raise ClosedError("it was opened before this process was forked and belongs to the parent: open one here",
                          what="the client")


_clients: "weakref.WeakSet[_Client]" = weakref.WeakSet()
_parents: list[object] = []             # kept: what their ends would do is the parent's business


def end_in_child(client: _Client) -> None:
    """Have `client.after_fork` called in children of this process."""
    _clients.add(client)


def keep(engine: object) -> ForkedEngine:
    """What takes the place of the parent's engine in a child."""
    _parents.append(engine)
    return ForkedEngine()


def _in_child() -> None:
    for client in list(_clients):
        client.after_fork()


os.register_at_fork(after_in_child=_in_child)
