"""What makes a broker head, and what it runs then: membership decides when, a takeover how, seats where.

    every heartbeat:  beat ─► replaced? give up the bank ─► wanted? ─► claim a bank ─► Takeover ─► sit down

One thread, `tick` after `tick`. The stages run in the pipelines of the broker, in seats that are empty otherwise.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from broker.layout import ControlBits, Layout
from broker.membership import Membership, claim_bank, release_bank
from broker.stages.seat import Seat
from broker.stages.sequencer import OrderState
from broker.stages.stage import Stage
from broker.stages.takeover import Takeover
from sim.cxl.memory import Memory

_log = logging.getLogger("cxlmq")


@dataclass
class Term:
    """The time for which this broker is head."""

    control: int
    order: OrderState
    stages: list[Stage] = field(default_factory=list)

    @property
    def bank(self) -> int:
        """The bank that this head writes."""
        return self.control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF


class Leadership:
    """Looks after one broker's headship.

    `new_takeover` makes a fresh `Takeover`; `sit_down` is called with one that is done and returns the stages for
    `seats`, in order; `stand_up` when the term is over and none of them runs any more. `attend` is called in each tick
    of a term: the bank is ours until the term is ended here.
    """

    def __init__(self, memory: Memory, layout: Layout, membership: Membership, owner: int,
                 is_gone: Callable[[int], bool], seats: Sequence[Seat], new_takeover: Callable[[], Takeover],
                 sit_down: Callable[[Takeover], list[Stage]], stand_up: Callable[[], None],
                 attend: Callable[[], None] = lambda: None) -> None:
        self._memory, self._layout, self._membership = memory, layout, membership
        self._owner, self._is_gone, self._seats = owner, is_gone, seats
        self._new_takeover, self._sit_down, self._stand_up = new_takeover, sit_down, stand_up
        self._attend = attend
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.term: Term | None = None

    @property
    def serves(self) -> bool:
        """Whether this broker is head now."""
        term = self.term
        return term is not None and term.control == self._control()

    def _control(self) -> int:
        return self._memory.load_word(self._layout.offset_of("control"))

    def tick(self) -> None:
        """One look; what is found is done at once."""
        self._membership.beat()
        if self.term is not None and not self.serves:
            self._end_term(self.term)
        if self.term is None:
            control = self._membership.wanted()
            if control is not None:
                self._take_over(control)
        elif self.serves:
            self._attend()

    def _end_term(self, term: Term) -> None:
        """We were replaced: the seats empty themselves; then the bank is for others."""
        if all(seat.free for seat in self._seats):
            _log.warning("replaced as head; epoch %d is over", term.order.epoch)
            self.term = None
            self._stand_up()
            release_bank(self._memory, self._layout, term.bank, self._owner)

    def _take_over(self, control: int) -> None:
        bank = claim_bank(self._memory, self._layout, control, self._owner, self._is_gone)
        if bank is None:
            return                          # all are held by heads that stopped and may wake up: look again
        began = time.monotonic()
        takeover = self._new_takeover()
        if takeover.begin(control, bank):
            while not takeover.done and not takeover.lost:
                takeover.step_once()
        if takeover.lost:
            release_bank(self._memory, self._layout, bank, self._owner)
            return
        self.term = Term(takeover.order.control, takeover.order)
        self.term.stages = self._sit_down(takeover)
        for seat, stage in zip(self._seats, self.term.stages, strict=True):
            seat.take(stage, self.term.control)
        _log.warning("head from epoch %d on, after %.0f ms; %d entries of the last one were adopted",
                     takeover.order.epoch, 1000 * (time.monotonic() - began), takeover.adopted)

    # ---- its thread -------------------------------------------------------------------------------------------------

    def start(self, interval_seconds: float) -> None:
        """Tick in a thread of its own."""
        def run() -> None:
            while True:
                try:
                    self.tick()
                except Exception:
                    _log.exception("membership")
                if self._stopping.wait(interval_seconds):
                    return

        self._thread = threading.Thread(target=run, name="membership", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tick no more. If this broker is head it stays so until another one takes over."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._membership.close()
