"""Waiting for an engine's news, in any thread but its own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.engine import Engine


class Waiter:
    """Holds the engine's condition and counts itself, so that the loop notifies only when somebody waits."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def __enter__(self) -> None:
        self._engine.changed.acquire()
        self._engine.waiters += 1

    def __exit__(self, *_: object) -> None:
        self._engine.waiters -= 1
        self._engine.changed.release()
