"""The states of a publisher's session, and which may follow which."""

from enum import Enum


class State(Enum):
    """Of a session's life."""

    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    REOPENING = "reopening"
    FAILED = "failed"
    ENDED = "ended"


NEXT = {
    State.CLOSED: {State.OPENING, State.ENDED},
    State.OPENING: {State.OPEN, State.CLOSED, State.ENDED},
    State.OPEN: {State.REOPENING, State.FAILED, State.ENDED},
    State.REOPENING: {State.OPEN, State.FAILED, State.ENDED},
    State.FAILED: {State.ENDED},
    State.ENDED: {State.ENDED},
}
