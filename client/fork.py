"""A forked child of a process that uses the library: it has copies of our clients and connections, and no threads.

gRPC does not survive a fork, and what a copy writes goes where the parent writes: into the same leases, cursors and
sockets. So in the child nothing of ours works, old clients or new ones: all say `ForkedProcess` at once. What the child
has of the parent's is never collected, not even when it ends: how connections and views end is the parent's business.
"""

import os
import weakref
from typing import Any, Protocol

from broker.errors import ForkedProcess
from client.turn import keep_for_ever


class _Client(Protocol):
    def after_fork(self) -> None: ...


class ForkedEngine:
    """Stands for the engine of a client that belongs to the parent: whatever is asked of it is a `ForkedProcess`."""

    def __getattr__(self, name: str) -> Any:
        raise parents_client()


_clients: "weakref.WeakSet[_Client]" = weakref.WeakSet()
_kept: list[object] = []
_used_by = 0                            # the process whose threads and connections there are


def parents_client() -> ForkedProcess:
    """The error of a client that was opened before the fork."""
    return ForkedProcess(what="a client that its parent opened")


def note_use(*things: object) -> None:
    """From now on this process has threads and connections of ours; `things` are never collected in its children."""
    global _used_by
    _used_by = os.getpid()
    _kept.extend(things)


def is_child() -> bool:
    """Whether this is a forked child of a process that used the library: also one that C code forked."""
    return _used_by not in (0, os.getpid())


def refuse_in_child() -> None:
    """Before anything is opened. Raises `ForkedProcess`."""
    if is_child():
        raise ForkedProcess(what="a new client")


def end_in_child(client: _Client) -> None:
    """Have `client.after_fork` called in children of this process."""
    _clients.add(client)


def keep(engine: object) -> ForkedEngine:
    """What takes the place of the parent's engine in a child."""
    keep_for_ever(engine)
    return ForkedEngine()


def _in_child() -> None:
    for thing in _kept:
        keep_for_ever(thing)
    for client in list(_clients):
        client.after_fork()


os.register_at_fork(after_in_child=_in_child)
