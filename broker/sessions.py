"""Sessions and cursors of one broker: slots of its own part of two tables, opened here, answered by the head."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import numpy

from broker.errors import BrokerUnavailable, CursorTableFull, SessionFenced, SessionTableFull
from broker.head import HeadView
from broker.layout import CursorState, Layout, SessionState, record_dtypes
from broker.reader import OrderReader
from broker.records import pack, record_bytes, unpack
from broker.stages.sequencer import SESSION_WINDOW
from sim.cxl.memory import Memory

UNKNOWN_POSITION = (1 << 64) - 1        # not in the log
UNPLACED_POSITION = (1 << 64) - 2       # in the log, and nobody knows where any more
LOST_POSITION = (1 << 64) - 3           # was in the log, and a recovery did not find it
UNSURE_POSITION = (1 << 64) - 4         # was in the log: a recovery did not find it, or it was reclaimed since then
EARLIER_MAX = 4                         # sessions whose batches a publisher may ask for when it opens another one
ANSWER_SECONDS = 10.0
STEP_SECONDS = 0.0005
ENTRIES_AT_ONCE = 2048                  # a tenth of a millisecond


async def _until(answered: Callable[[], bool], what: str) -> None:
    deadline = 0.0
    while not _unless_recovering(answered):
        now = asyncio.get_running_loop().time()
        deadline = deadline or now + ANSWER_SECONDS
        if now > deadline:
            raise BrokerUnavailable(f"the head broker did not answer {what} within {ANSWER_SECONDS:.0f} s",
                                    address="head")
        await asyncio.sleep(STEP_SECONDS)


def _unless_recovering(answered: Callable[[], bool]) -> bool:
    try:
        return answered()
    except BrokerUnavailable:
        return False                        # the next head answers


class SessionTable:
    """This broker's part of the session table. `announce` tells the sequencer that a line changed.

    A slot is reused when its session was closed, or longest idle without a stream when none is closed; that one is
    closed first, so that what it still held gets its results.
    """

    def __init__(self, memory: Memory, layout: Layout, broker: int, announce: Callable[[], None],
                 now: Callable[[], float] = time.monotonic) -> None:
        self._memory, self._layout, self._announce, self._broker = memory, layout, announce, broker
        self._now = now
        share = layout.numbers["sessions_per_broker"]
        self._head = HeadView(memory, layout)
        self._first, self._count = broker * share, share
        self._lines: dict[int, dict[str, int]] = {}
        self._idle_since: dict[int, float] = {}
        self._claimed: set[int] = set()             # slots that are being opened: each for one caller
        self._streams: dict[int, int] = {}          # open streams of a session at this broker
        for slot in range(self._first, self._first + self._count):
            if (line := self.line(slot))["state"] & 0xFF == SessionState.SESSION_OPEN:
                self._lines[slot] = line            # restored: its publisher may come back
        self.begin()

    def begin(self) -> None:
        """From now on publishers may come back: what was restored is idle since now."""
        self._idle_since |= {slot: self._now() for slot in self._lines if slot not in self._streams}

    async def open(self, client_id: int, epoch: int, topic: int, ack: int) -> dict[str, int]:
        """Open a session and wait for the sequencer; its slot and progress line.

        `topic` is generation << 16 | number. Raises `SessionTableFull`, `SessionFenced` (an epoch that is too old).
        """
        slot = await self._claim_slot()
        try:
            return await self._open_at(slot, client_id, epoch, topic, ack)
        finally:
            self._claimed.discard(slot)

    async def _open_at(self, slot: int, client_id: int, epoch: int, topic: int, ack: int) -> dict[str, int]:
        old = self._read("SessionLine", self._layout.offset_of("session", slot))
        generation = (old["state"] >> 8) + 1
        line = {"state": generation << 8 | SessionState.SESSION_OPEN, "client_id": client_id, "session_epoch": epoch,
                "topic": topic, "ack": ack, "opened_ns": int(self._now() * 1e9)}
        self._lines[slot] = line
        self._idle_since[slot] = self._now()
        self._write(slot, line)
        try:
            await _until(lambda: self.progress(slot)["state"] >> 8 == generation, "a new session")
            progress = self.progress(slot)
            if progress["state"] & 0xFF != SessionState.SESSION_OPEN:
                await self.close(slot)
                raise SessionFenced(reason="another publisher with this client id is open",
                                    committed=progress["expected"], newest_epoch=self._newest_epoch(client_id, topic))
        except BaseException:               # also when its publisher goes away while it waits
            self.give_up(slot)
            raise
        return {**progress, "slot": slot}

    async def _claim_slot(self) -> int:
        """A slot that is free, or has been freed, and that no other opening gets meanwhile."""
        for slot in range(self._first, self._first + self._count):
            if slot not in self._lines and slot not in self._claimed:
                self._claimed.add(slot)
                return slot
        idle = {slot: since for slot, since in self._idle_since.items() if slot not in self._claimed}
        ended = [slot for slot in idle if self.progress(slot)["state"] & 0xFF != SessionState.SESSION_OPEN]
        oldest = min(ended or idle, key=lambda slot: idle[slot], default=None)
        if oldest is None or (not ended and self._now() - idle[oldest] < ANSWER_SECONDS):
            raise SessionTableFull(broker=self._broker, session_count=self._count)
        self._claimed.add(oldest)
        try:
            await self.close(oldest)
        except BaseException:
            self._claimed.discard(oldest)
            raise
        return oldest

    def _every(self, record: str, place: str) -> Any:
        """That record of all sessions of all brokers, as a numpy table."""
        first, count = self._layout.offset_of(place, 0), self._layout.numbers["session_count_max"]
        stride = self._layout.offset_of(place, 1) - first
        nbytes = (count - 1) * stride + record_bytes(record)
        self._memory.invalidate_range(first, nbytes)
        return numpy.ndarray((count,), record_dtypes()[record], self._memory.read_bytes(first, nbytes),
                             strides=(stride,))

    def _newest_epoch(self, client_id: int, topic: int) -> int:
        """Highest epoch that any broker has opened for this client and not closed."""
        lines = self._every("SessionLine", "session")
        open_now = lines["state"] & 0xFF == SessionState.SESSION_OPEN
        mine = lines["session_epoch"][open_now & (lines["client_id"] == client_id) & (lines["topic"] == topic)]
        return int(mine.max(initial=0))

    def _slot_of(self, client_id: int, topic: int, epoch: int) -> int | None:
        """The slot of an earlier session; None when it has another session by now."""
        lines = self._every("SessionLine", "session")
        found = numpy.flatnonzero((lines["client_id"] == client_id) & (lines["session_epoch"] == epoch)
                                  & (lines["topic"] == topic))
        return int(found[0]) if len(found) else None

    def committed(self, client_id: int, topic: int, epoch: int) -> int | None:
        """Where an earlier session of a client ended; None when its slot has another session by now."""
        slot = self._slot_of(client_id, topic, epoch)
        return None if slot is None else int(self.progress(slot)["expected"])

    def resumed_position(self, client_id: int, topic: int, epoch: int) -> int | None:
        """What is in the log of an earlier session lies below this position; None when its slot has another by now."""
        slot = self._slot_of(client_id, topic, epoch)
        return None if slot is None else int(self.progress(slot)["committed_position"])

    def only_if_found(self, client_id: int, topic: int, epoch: int) -> range:
        """Batches of an earlier session that were in the log before a recovery, and are only if they are found there.

        To be asked before the next session is opened: then the slot of the earlier one may be used again.
        """
        slot = self._slot_of(client_id, topic, epoch)
        line = {"found_from": 0, "found_end": 0} if slot is None else self.line(slot)
        return range(line["found_from"], line["found_end"])

    async def positions(self, reader: OrderReader, client_id: int, topic: int, epoch: int,
                        sequences: range, only_if_found: range | None = None) -> list[int]:
        """Where batches of an earlier session are in the log: `UNKNOWN_POSITION` for those that are not,
        `UNPLACED_POSITION` for those whose entry is reclaimed already (at order levels below 5), and `LOST_POSITION`
        for those `only_if_found` that were not: `UNSURE_POSITION` where a part of the log that may have had them was
        reclaimed since the recovery.

        One pass over the kept entries, a piece at a time: others have their turn between two.
        """
        window, slot = set[int](), self._slot_of(client_id, topic, epoch)
        if only_if_found is None:
            only_if_found = self.only_if_found(client_id, topic, epoch)
        if slot is not None:
            line = self._head.read("SessionWindowLine", "session_window", slot)
            first = line["base"] if line["generation"] == self.line(slot)["state"] >> 8 else sequences.stop
            window = {sequence for sequence in range(first, min(first + SESSION_WINDOW, sequences.stop))
                      if line["in_log"][sequence % SESSION_WINDOW // 64] >> sequence % 64 & 1}
        found: dict[int, int] = {}
        at = reader.frontiers()["committed_index"] if sequences else 0
        while at:
            at = reader.find_batches(client_id, epoch, sequences.start, sequences.stop, at, ENTRIES_AT_ONCE, found)
            if at:
                await asyncio.sleep(0)

        # Where `only_if_found` says something, at order 5, batches lie in the order of their sequences: what lies
        # before the first that is found may be reclaimed by now, and all of them where none is.
        whole = not only_if_found or not sequences or not reader.frontiers()["reclaimed_index"]
        kept_from = sequences.start if whole else min(found, default=sequences.stop)

        def otherwise(sequence: int) -> int:
            if sequence in window:
                return UNPLACED_POSITION
            if sequence not in only_if_found:
                return UNKNOWN_POSITION
            return LOST_POSITION if sequence >= kept_from else UNSURE_POSITION

        return [found.get(sequence, otherwise(sequence)) for sequence in sequences]

    def _write(self, slot: int, line: dict[str, int]) -> None:
        at = self._layout.offset_of("session", slot)
        self._memory.write_line_bytes(at, pack("SessionLine", **line))
        self._memory.flush_range(at, 64)
        self._memory.store_fence()
        self._announce()

    def _read(self, record: str, at: int) -> dict[str, int]:
        self._memory.invalidate_range(at, 64)
        return unpack(record, self._memory.read_line_bytes(at))

    def line(self, slot: int) -> dict[str, int]:
        """Any broker's session line."""
        return self._read("SessionLine", self._layout.offset_of("session", slot))

    def progress(self, slot: int) -> dict[str, int]:
        """What the sequencer says of a session. Raises `BrokerUnavailable` while no head serves."""
        return self._head.read("SessionProgressLine", "session_progress", slot)

    def is_mine(self, slot: int) -> bool:
        """Whether this broker opened the slot."""
        return self._first <= slot < self._first + self._count

    def attach(self, slot: int) -> None:
        """A stream of the session opened here: the slot is in use."""
        self._streams[slot] = self._streams.get(slot, 0) + 1
        self._idle_since.pop(slot, None)

    def detach(self, slot: int) -> None:
        """The stream ended."""
        self._streams[slot] -= 1
        if not self._streams[slot]:
            del self._streams[slot]
            if slot in self._lines:
                self._idle_since[slot] = self._now()

    async def end_idle(self, seconds: float) -> None:
        """End the sessions that had no stream for so long: their publishers are gone without a word."""
        now = self._now()
        for slot in [slot for slot, since in self._idle_since.items() if now - since > seconds]:
            if slot in self._idle_since:        # still, after the others were closed
                await self.close(slot)

    async def close(self, slot: int) -> None:
        """End a session opened here: what it still held is dropped, its slot is free again."""
        line = self._lines.get(slot)
        if line is None:
            return
        generation = line["state"] >> 8
        self._end(slot, line)
        await _until(lambda: self.progress(slot)["state"] != generation << 8 | SessionState.SESSION_OPEN,
                     "a closing session")
        if self._lines.get(slot) is line:   # somebody else who waited may have opened another one there
            self._lines.pop(slot)
            self._idle_since.pop(slot, None)

    def give_up(self, slot: int) -> None:
        """End a session whose publisher never heard of it, without waiting: its slot is the next to be used again."""
        line = self._lines.get(slot)
        if line is not None and slot not in self._streams:
            self._end(slot, line)
            self._idle_since[slot] = -math.inf

    def _end(self, slot: int, line: dict[str, int]) -> None:
        line["state"] = line["state"] >> 8 << 8 | SessionState.SESSION_CLOSING
        self._write(slot, line)


class CursorTable:
    """This broker's part of the cursor table: it keeps what its readers still need from being reclaimed."""

    def __init__(self, memory: Memory, layout: Layout, broker: int, announce: Callable[[], None],
                 lives: Callable[[int], bool]) -> None:
        """`lives(presence)`: whether the process of an attached client is there (`Region.client_lives`)."""
        self._memory, self._layout, self._announce, self._broker = memory, layout, announce, broker
        self._lives = lives
        share = layout.numbers["cursors_per_broker"]
        self._head = HeadView(memory, layout)
        self._free = set(range(broker * share, (broker + 1) * share))
        self._count = share
        self._request = 0
        self._left: dict[int, int] = {}     # presences of readers that an earlier process of ours attached
        for cursor in self._free.copy():
            self._take_over(cursor)

    def _take_over(self, cursor: int) -> None:
        """What an earlier process of this broker opened is free, but for views that a living process has."""
        line = unpack("CursorLine", self._memory.read_line_bytes(self._layout.offset_of("cursor", cursor)))
        if line["state"] & 0xFF == CursorState.CURSOR_FREE:
            return
        if self._lives(line["presence"]):
            self._left[cursor] = line["presence"]
            self._free.discard(cursor)
        else:
            self.close(cursor)

    def free_left(self, attached: set[int]) -> None:
        """Let go of the places of readers that gave up the slot which they had of our predecessor, or are dead.

        `attached` are the presences of processes that still have such a slot.
        """
        for cursor, presence in list(self._left.items()):
            if presence not in attached or not self._lives(presence):
                del self._left[cursor]
                self.close(cursor)

    async def open(self, topic: int, index: int, pid: int, name: str = "", presence: int = 0,
                   copies: bool = False) -> tuple[int, int]:
        """Protect the log from `index` on; (cursor, first index that is kept). Raises `CursorTableFull`.

        `name` is the group that reads, for people. A reader that `copies` looks, after each copy, whether what it
        copied was still kept: where room is needed, it may be passed over.
        """
        if not self._free:
            raise CursorTableFull(broker=self._broker, cursor_count=self._count)
        cursor = min(self._free)
        self._free.discard(cursor)
        self._memory.write_bytes(self._layout.offset_of("cursor_name", cursor), pack("CursorName", text=name))
        self._memory.store_fence()
        self._request += 1
        at = self._layout.offset_of("cursor", cursor)
        request = (self._memory.load_word(at) >> 8) + 1
        line = {"state": request << 8 | CursorState.CURSOR_WANTED, "topic": topic, "index": index, "pid": pid,
                "presence": presence, "copies": int(copies)}
        self._write(at, line)
        self._announce()
        try:
            await _until(lambda: self._granted(cursor) == request, "a reader's place")
            granted = self._head.read("CursorGrantLine", "cursor_grant", cursor)["index"]
        except BaseException:               # also when the reader goes away while it waits, or the head just then
            self.close(cursor)
            raise
        line.update(index=granted, state=request << 8 | CursorState.CURSOR_LIVE)
        self._write(at, line)
        return cursor, granted

    def _granted(self, cursor: int) -> int:
        return int(self._head.read("CursorGrantLine", "cursor_grant", cursor)["granted"])

    def _write(self, at: int, line: dict[str, int]) -> None:
        self._memory.write_line_bytes(at, pack("CursorLine", **line))
        self._memory.flush_range(at, 64)
        self._memory.store_fence()

    def move(self, cursor: int, index: int) -> None:
        """Everything below `index` is read."""
        at = self._layout.offset_of("cursor", cursor) + 16
        self._memory.store_word(at, index)
        self._memory.flush_range(at, 8)
        self._memory.store_fence()

    def close(self, cursor: int) -> None:
        """Let go of a reader's place."""
        at = self._layout.offset_of("cursor", cursor)
        state = self._memory.load_word(at)
        self._memory.store_word(at, state >> 8 << 8 | CursorState.CURSOR_FREE)
        self._memory.flush_range(at, 64)
        self._memory.store_fence()
        self._free.add(cursor)
