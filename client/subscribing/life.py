"""The states of a reader, and which may follow which."""

from enum import Enum


class State(Enum):
    """Of a reader's life."""

    NEW = "new"
    OPENING = "opening"
    READING = "reading"
    RETURNING = "returning"
    FAILED = "failed"
    CLOSED = "closed"


NEXT = {
    State.NEW: {State.OPENING, State.CLOSED},
    State.OPENING: {State.READING, State.NEW, State.CLOSED},
    State.READING: {State.READING, State.RETURNING, State.FAILED, State.CLOSED},
    State.RETURNING: {State.READING, State.FAILED, State.CLOSED},
    State.FAILED: {State.READING, State.FAILED, State.CLOSED},
    State.CLOSED: {State.CLOSED},
}
