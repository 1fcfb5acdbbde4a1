"""What makes a broker head, and what it runs then: membership decides when, a takeover how, seats where.

    every heartbeat:  beat ─► replaced? give up the bank ─► wanted? ─► claim a bank ─► Takeover ─► sit down

`tick` after `tick`: in a thread of its own in a broker process, as the schedule says in the simulation. The stages
run in the pipelines of the broker, in seats that are empty otherwise.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from broker.assembly import Assembly
from broker.layout import ControlBits
from broker.membership import Membership, claim_bank, release_bank
from broker.stages.sequencer import OrderState
from broker.stages.stage import Stage
from broker.stages.takeover import Takeover
from sim.cxl.memory import Role

_log = logging.getLogger("cxlmq")


@dataclass
class Term:
    """The time for which this broker is head."""

    control: int
    order: OrderState

    @property
    def bank(self) -> int:
        """The bank that this head writes."""
        return self.control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF


@dataclass
class Attempt:
    """A takeover that is under way, and the bank that it fills."""

    takeover: Takeover
    bank: int
    began_ns: int


class Place(Protocol):
    """Where a stage of a head runs: a `Seat` of a thread plan, or what stands for one."""

    @property
    def free(self) -> bool:
        """Whether nothing runs there."""

    def take(self, stage: Stage, control: int) -> None:
        """Run a stage for as long as the control word is this one."""


def run_to_its_end(takeover: Takeover) -> None:
    """Step a takeover until it is done or lost."""
    while not takeover.done and not takeover.lost:
        takeover.step_once()


class Leadership:
    """Looks after one broker's headship. `seats` are for what `Assembly.lead` returns, in that order.

    `run` is given a takeover that has begun: it steps it to its end, or returns at once and has it stepped. `say` is
    told what happens. While a term lasts here, its bank is ours; it ends when the seats are free.
    """

    def __init__(self, broker: Assembly, membership: Membership, is_gone: Callable[[int], bool],
                 seats: Sequence[Place], new_takeover: Callable[[], Takeover] | None = None,
                 run: Callable[[Takeover], None] = run_to_its_end, say: Callable[[str], None] = _log.warning) -> None:
        self._broker, self._membership, self._is_gone, self._seats = broker, membership, is_gone, seats
        self._new_takeover, self._run, self._say = new_takeover or broker.new_takeover, run, say
        self._memory, self._layout = broker.door(Role.ROLE_SEQUENCER), broker.layout
        self._owner = broker.incarnation << 8 | broker.broker + 1
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._attempt: Attempt | None = None
        self.term: Term | None = None

    @property
    def serves(self) -> bool:
        """Whether this broker is head now."""
        term = self.term
        return term is not None and term.control == self._control()

    @property
    def tries(self) -> bool:
        """Whether a takeover of this broker is under way."""
        return self._attempt is not None

    def _control(self) -> int:
        return self._memory.load_word(self._layout.offset_of("control"))

    def tick(self) -> None:
        """One look; what is found is done at once."""
        self._membership.beat()
        if self._attempt is not None:
            self._go_on(self._attempt)
        elif self.term is not None and not self.serves:
            self._end_term(self.term)
        if self.term is None and self._attempt is None:
            control = self._membership.wanted()
            if control is not None:
                self._take_over(control)
        elif self.serves:
            for other, back in self._broker.attend():
                self._say(f"broker {other} " + ("is back and keeps its replicas again" if back else
                                                "is away: others keep the replicas that it had"))

    def _end_term(self, term: Term) -> None:
        """We were replaced: the seats empty themselves; then the bank is for others."""
        if all(seat.free for seat in self._seats):
            self._say(f"replaced as head; epoch {term.order.epoch} is over")
            self.term = None
            self._broker.resign()
            release_bank(self._memory, self._layout, term.bank, self._owner)

    def _take_over(self, control: int) -> None:
        bank = claim_bank(self._memory, self._layout, control, self._owner, self._is_gone)
        if bank is None:
            return                          # all are held by heads that stopped and may wake up: look again
        self._attempt = Attempt(self._new_takeover(), bank, self._broker.clock.now())
        if self._attempt.takeover.begin(control, bank):
            self._run(self._attempt.takeover)
        self._go_on(self._attempt)

    def _go_on(self, attempt: Attempt) -> None:
        takeover = attempt.takeover
        if takeover.lost:
            self._attempt = None
            release_bank(self._memory, self._layout, attempt.bank, self._owner)
        elif takeover.done:
            self._attempt = None
            self.term = Term(takeover.order.control, takeover.order)
            for seat, stage in zip(self._seats, self._broker.lead(takeover).stages().values(), strict=True):
                seat.take(stage, self.term.control)
            milliseconds = (self._broker.clock.now() - attempt.began_ns) / 1e6
            self._say(f"head from epoch {takeover.order.epoch} on, after {milliseconds:.0f} ms; {takeover.adopted} "
                      "entries of the last one were adopted")

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
