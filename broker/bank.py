"""The bank that a broker writes while it is head, for those who write it beside the stages: topics and groups.

    lead ─► writing ... writing ─► resign: from then on, and in the middle of no write, the bank is for others

A call may wait for seconds between "are we head" and a store. So each store asks anew, and the bank cannot be given up
while one is made: a head that was replaced writes into nobody's bank but its own.
"""

import contextlib
import threading
from collections.abc import Iterator

from broker.errors import BrokerUnavailable
from broker.layout import ControlBits, Layout
from sim.cxl.memory import Memory


class Bank:
    """One way to the bank. Stores come from the event loop, `lead` and `resign` from where terms begin and end."""

    def __init__(self, memory: Memory, layout: Layout) -> None:
        self._memory, self._lock = memory, threading.Lock()
        self._layout: Layout | None = layout        # until `lead`: that of the first head
        self._at = layout.offset_of("control")

    def lead(self, layout: Layout) -> None:
        """This broker is head from now on, and writes the bank of `layout`."""
        with self._lock:
            self._layout = layout

    def resign(self) -> None:
        """This broker is head no longer. Waits for a store that is under way."""
        with self._lock:
            self._layout = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[Layout]:
        """The layout with our bank, which stays ours until the end of the block; nothing in it may wait.

        Raises `BrokerUnavailable` when we are not head: before, and then nothing is to be stored, or at the end, when
        another head began meanwhile that may not have seen what was. A compare-and-swap that changes nothing is a look
        that is not made before our stores are visible. The next head raises the epoch first and reads our bank then:
        either we see the one, or it sees the other.
        """
        with self._lock:
            control = self._memory.load_word(self._at)
            if self._layout is None or not control & ControlBits.CONTROL_SERVING or (
                    control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF != self._layout.numbers["bank"]):
                raise BrokerUnavailable("a new head has taken over: try again", address="head")
            yield self._layout
            self._require_same(control)

    def _require_same(self, control: int) -> None:
        if not self._memory.compare_and_swap_word(self._at, control, control):
            raise BrokerUnavailable("a new head is taking over: try again", address="head")
