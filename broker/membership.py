"""Who is alive, and who should be head. Safety does not depend on it: the control word does that (broker/head.pyx).

A membership says when this broker should try to become head; two that try at once are decided by the compare-and-swap
on the control word. So a lease that ends too early costs a takeover and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from broker.head import epoch_of, head_of
from broker.layout import BrokerState, ControlBits, Layout
from sim.cxl.clock import Clock
from sim.cxl.memory import Memory

STATE, HEARTBEAT, INCARNATION = 0, 24, 56    # places in BrokerLine
SILENT_SHARE = 8                    # of the lease: so long no heartbeat, and its process is looked for


class Membership(Protocol):
    """What a broker asks, every heartbeat."""

    def beat(self) -> None:
        """Say that this broker is alive."""

    def wanted(self) -> int | None:
        """The control word that this broker should take over from now; None: there is a head, or another one's turn."""

    def close(self) -> None:
        """This broker leaves."""


def store_heartbeat(memory: Memory, layout: Layout, broker: int, clock: Clock) -> None:
    """Change a broker's heartbeat in the region."""
    at = layout.offset_of("broker", broker) + HEARTBEAT
    memory.store_word(at, clock.now())
    memory.flush_range(at, 8)
    memory.store_fence()


@dataclass
class _Seen:
    """What was seen of a broker's heartbeat, and since when by our own clock."""

    value: int
    since_ns: int


class RegionMembership:
    """Heartbeats in the region: each broker's line has one, and each broker judges the others by its own clock.

    `is_dead(broker)` is proof: the process that the broker's line names is gone. Without proof a broker counts as
    absent when its heartbeat has not changed for `lease_ns`; no clocks are compared, so one that jumps does no harm.
    """

    def __init__(self, memory: Memory, layout: Layout, clock: Clock, broker: int, lease_ns: int,
                 is_dead: Callable[[int], bool], founder: bool = False) -> None:
        self._memory, self._layout, self._clock, self._broker = memory, layout, clock, broker
        self._lease_ns, self._is_dead, self._founder = lease_ns, is_dead, founder
        self._lines = [layout.offset_of("broker", each) for each in range(layout.numbers["broker_count"])]
        self._seen: dict[int, _Seen] = {}
        self._absent: tuple[int, int] | None = None     # control word without a head, and since when

    def beat(self) -> None:
        """Change our heartbeat, and look at those of the others."""
        store_heartbeat(self._memory, self._layout, self._broker, self._clock)
        now = self._clock.now()
        for broker in range(len(self._lines)):
            value, seen = self._word(broker, HEARTBEAT), self._seen.get(broker)
            if seen is None or seen.value != value:
                self._seen[broker] = _Seen(value, now)

    def _word(self, broker: int, place: int) -> int:
        self._memory.invalidate_range(self._lines[broker], 64)
        return self._memory.load_word(self._lines[broker] + place)

    def present(self, broker: int) -> bool:
        """Whether a broker runs, as far as its heartbeat and its process tell."""
        if broker == self._broker:
            return True
        if self._word(broker, STATE) not in (BrokerState.BROKER_STARTING, BrokerState.BROKER_READY):
            return False
        seen = self._seen.get(broker)
        silent_ns = self._lease_ns if seen is None else self._clock.now() - seen.since_ns
        # Whoever beats is alive. To ask for its process costs more than all the rest of a look.
        if silent_ns >= self._lease_ns // SILENT_SHARE and self._is_dead(broker):
            return False
        return seen is None or silent_ns < self._lease_ns

    def wanted(self) -> int | None:
        """See `Membership`. The lowest present broker goes first, the others a lease later each."""
        control = self._memory.load_word(self._layout.offset_of("control"))
        if self._has_head(control):
            self._absent = None
            return None
        now = self._clock.now()
        if self._absent is None or self._absent[0] != control:
            self._absent = control, now
        head = head_of(control) if control else -1
        before = sum(1 for broker in range(self._broker) if broker != head and self.present(broker))
        return control if now - self._absent[1] >= before * self._lease_ns else None

    def _has_head(self, control: int) -> bool:
        if control == 0 or epoch_of(control) == 0:
            return not self._founder        # who made the region begins
        head, bank = head_of(control), control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF
        owner = self._memory.load_word(self._layout.offset_of("bank_owner", bank))
        if head == self._broker or self._word(head, INCARNATION) != owner >> 8:
            return False                    # an earlier process of that broker
        return self.present(head)

    def close(self) -> None:
        """Nothing to do: the line says that the broker has stopped."""


def claim_bank(memory: Memory, layout: Layout, control: int, owner: int, is_gone: Callable[[int], bool]) -> int | None:
    """A bank that nobody else writes, claimed for `owner` (incarnation << 8 | broker + 1); None while there is none.

    A bank is free when its last owner gave it up, or is gone for good: one that is only stopped may still store there.
    """
    kept = control >> ControlBits.CONTROL_SOURCE_SHIFT & 0xFF
    if control & ControlBits.CONTROL_SERVING:
        kept = (control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF) + 1
    for bank in range(layout.numbers["bank_count"]):
        at = layout.offset_of("bank_owner", bank)
        found = memory.load_word(at)
        if bank + 1 == kept or not (found in (0, owner) or is_gone(found)):
            continue
        if memory.compare_and_swap_word(at, found, owner):
            return bank
    return None


def release_bank(memory: Memory, layout: Layout, bank: int, owner: int) -> None:
    """Give up a bank that nothing of ours writes any more."""
    memory.compare_and_swap_word(layout.offset_of("bank_owner", bank), owner, 0)
