"""The line of a broker in the broker table: it says who the broker is, what it does, and what others should look at."""

from typing import Any

from broker.layout import BrokerState, Layout
from broker.records import pack, unpack
from sim.cxl.clock import Clock
from sim.cxl.memory import Memory

# Words of BrokerLine that a broker changes to be noticed.
WATCHERS_WORD, SESSIONS_WORD, CURSORS_WORD = 4, 5, 6


class OwnLine:
    """One broker's way to its line. `incarnation` is the number of its process, of all that this region has seen."""

    def __init__(self, memory: Memory, layout: Layout, broker: int, clock: Clock) -> None:
        self._memory, self._layout, self._broker, self._clock = memory, layout, broker, clock
        self._at = layout.offset_of("broker", broker)
        # Whoever sees our lock must not take "ready", which a process before us has left there, for ours.
        self._store(0, BrokerState.BROKER_STARTING)
        self.incarnation = memory.fetch_add_word(layout.offset_of("control") + 8, 1) + 1
        self._watchers = 0

    def _store(self, word: int, value: int) -> None:
        at = self._at + 8 * word
        self._memory.store_word(at, value)
        self._memory.flush_range(at, 8)
        self._memory.store_fence()

    def say(self, state: int, pid: int = 0, start_time: int = 0, tcp: str = "", unix: str = "") -> None:
        """Announce this broker, and where it listens."""
        if tcp:
            address = self._layout.offset_of("broker_address", self._broker)
            self._memory.write_bytes(address, pack("BrokerAddress", tcp_address=tcp, unix_address=unix))
            self._memory.store_fence()
        line = unpack("BrokerLine", self._memory.read_line_bytes(self._at))
        line.update(state=state, pid=pid, start_time=start_time, heartbeat_ns=self._clock.now(),
                    incarnation=self.incarnation)
        self._memory.write_line_bytes(self._at, pack("BrokerLine", **line))
        self._memory.flush_range(self._at, 64)
        self._memory.store_fence()

    def bump(self, word: int) -> None:
        """Change a version word; who looks at it has to be woken afterwards."""
        self._store(word, self._memory.load_word(self._at + 8 * word) + 1)

    def watch_commits(self, change: int) -> None:
        """Count the subscribers here: the sequencer wakes a broker that has any."""
        self._watchers += change
        self._store(WATCHERS_WORD, self._watchers)

    def read(self, broker: int) -> dict[str, Any]:
        """Any broker's line, with its addresses."""
        at = self._layout.offset_of("broker", broker)
        self._memory.invalidate_range(at, 64)
        line = unpack("BrokerLine", self._memory.read_line_bytes(at))
        address = self._layout.offset_of("broker_address", broker)
        if line["state"] != BrokerState.BROKER_READY:       # it may be writing its addresses just now
            return {**line, "tcp_address": "", "unix_address": ""}
        self._memory.invalidate_range(address, 256)
        return {**line, **unpack("BrokerAddress", self._memory.read_bytes(address, 256))}
