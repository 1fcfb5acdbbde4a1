"""Attached clients of one broker: which session or cursor each of their slots holds, and what becomes of it in the end.

    attach ─► slot ─► left, never came, or dead: `tend` ─► slot and session free ─► the stage is off it ─► cursor free
"""

from collections.abc import Callable

from broker.sessions import CursorTable, SessionTable
from broker.stages.attach import AttachStage


class AttachedClients:
    """What the service loop of a broker knows of the slots that it handed out. Steps; waits for nobody.

    `lives(presence)`: whether a client's process is there. `watching` counts subscribers; `wake` is called when the
    stage has something to do.
    """

    def __init__(self, attach: AttachStage, sessions: SessionTable, cursors: CursorTable, lives: Callable[[int], bool],
                 watching: Callable[[int], None], wake: Callable[[], None]) -> None:
        self._attach, self._session_table, self._cursor_table = attach, sessions, cursors
        self._lives, self._watching, self._wake = lives, watching, wake
        self._sessions: dict[int, int] = {}                     # slots of publishers -> their sessions' slots
        self._cursors: dict[int, int] = {}                      # slots of readers -> their cursors
        self._ending: dict[tuple[int, int], int] = {}           # slot and generation -> a cursor that is to be closed
        self._inherited: set[tuple[int, int]] = set()           # readers' slots that an earlier process handed out

    def inherit(self) -> None:
        """Take over what an earlier process of this broker handed out."""
        self._inherited = {(slot["number"], slot["generation"]) for slot in self._attach.open_slots() if slot["reads"]}

    def add_publisher(self, slot: int, session: int) -> None:
        """A slot was handed out under a session."""
        self._session_table.attach(session)
        self._sessions[slot] = session
        self._wake()

    def add_reader(self, slot: int, cursor: int) -> None:
        """A slot was handed out to the reader that has this cursor."""
        self._cursors[slot] = cursor
        self._watching(+1)

    def close(self, slot: int, generation: int) -> None:
        """Its client is done, or dead: slot and session are free again, a cursor as soon as it is not `is_ending`."""
        if not self._attach.close_slot(slot, generation):
            return
        self._wake()
        if slot in self._sessions:
            self._session_table.detach(self._sessions.pop(slot))
        if slot in self._cursors:
            self._ending[slot, generation] = self._cursors.pop(slot)

    def is_ending(self, slot: int, generation: int) -> bool:
        """Whether the cursor of a closed slot is still held."""
        return (slot, generation) in self._ending

    def tend(self) -> None:
        """Close what clients hold that left, never came, or are dead; also what they had of an earlier process."""
        slots = self._attach.open_slots()
        self._cursor_table.free_left({slot["presence"] for slot in slots if not slot["left"]
                                      and (slot["number"], slot["generation"]) in self._inherited})
        for slot in slots:
            if slot["left"] or not self._lives(slot["presence"]):
                self.close(slot["number"], slot["generation"])
        self.end_cursors()

    def end_cursors(self) -> None:
        """The stage moves a cursor as long as the slot is open: only then may somebody else have it."""
        for slot, generation in list(self._ending):
            if not self._attach.is_taken(slot, generation):
                self._cursor_table.close(self._ending.pop((slot, generation)))
                self._watching(-1)
