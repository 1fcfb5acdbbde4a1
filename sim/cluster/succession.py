"""Who is head in a simulated cluster: when the head is gone, or silent for too long, another host takes over.

The takeover is the product's stage, stepped by the schedule like every other, so that power may go in the middle of it.
A head that only stood still goes on without knowing: what it stores lies in its own bank, and must not count.
"""

from typing import TYPE_CHECKING

from broker.layout import ControlBits
from broker.stages.takeover import Takeover

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

LOOK_STEPS = 300                            # how often somebody looks whether the head is there
SILENCE_STEPS = 1_500                       # a head that stands still for so long is replaced
ZOMBIE_STEPS = 1_000                        # a replaced head that goes on notices after so many


class Succession:
    """Chooses the next head, and makes the chosen host head."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.random = world.scenario.random("succession")
        self.head = 0
        self.incarnation = 1                # of the head's broker
        self.banks = {0: 0}                 # host -> bank that it has written as head
        self.takeover: Takeover | None = None
        self.candidate = self.unit = -1
        self.candidate_incarnation = 0
        self.silent_since = -1

    @property
    def control(self) -> int:
        """The control word."""
        return int(self.world.hardware.truth.load_word(self.world.layout.offset_of("control")))

    @property
    def served(self) -> bool:
        """Whether a head serves that has power."""
        return bool(self.control & ControlBits.CONTROL_SERVING) and self._is_there

    @property
    def _is_there(self) -> bool:
        """Whether the head's process has power: not one that was started after it."""
        head = self.world.hosts[self.head]
        return head.powered and head.incarnation == self.incarnation

    def look(self) -> None:
        """Go on with a takeover, or begin one."""
        world = self.world
        if self.takeover is not None:
            self._go_on()
            return
        head = world.hosts[self.head]
        head.attend()
        if self._is_there and not head.stalled:
            self.silent_since = -1
            return
        if self.silent_since < 0:
            self.silent_since = world.step
        if self._is_there and world.step - self.silent_since < SILENCE_STEPS:
            return
        ready = [host for host in world.hosts if host.powered and not host.stalled
                 and (host.number != self.head or host.incarnation != self.incarnation)]
        if ready:
            self._begin(self.random.choice(ready))

    def _bank(self, host: "Host") -> int | None:
        """A bank that nobody reads, and nobody who has power may still write."""
        control = self.control
        used = {bank for number, bank in self.banks.items()
                if self.world.hosts[number].powered and number != host.number}
        if control & ControlBits.CONTROL_SERVING:
            used.add(control >> ControlBits.CONTROL_BANK_SHIFT & 0xFF)
        else:
            used.add((control >> ControlBits.CONTROL_SOURCE_SHIFT & 0xFF) - 1)
        return next((bank for bank in range(self.world.layout.numbers["bank_count"]) if bank not in used), None)

    def _begin(self, host: "Host") -> None:
        world, bank = self.world, self._bank(host)
        if bank is None:
            return
        host.resign()                       # whoever was head before has given that up first
        takeover = host.assembly.new_takeover()
        world.note(f"host {host.number}", f"takes over, bank {bank}")
        if takeover.begin(self.control, bank) and not host.control.dead:
            self.takeover, self.candidate = takeover, host.number
            self.candidate_incarnation = host.incarnation
            self.banks[host.number] = bank
            self.unit = world.schedule.add("takeover", takeover, host.control, 4)
            host.units.append(self.unit)
            world.allow()

    def _go_on(self) -> None:
        takeover, host = self.takeover, self.world.hosts[self.candidate]
        assert takeover is not None
        if not host.powered or host.incarnation != self.candidate_incarnation:
            self.takeover, self.head, self.silent_since = None, self.candidate, -1
            self.incarnation = self.candidate_incarnation
        elif takeover.done or takeover.lost:
            host.units.remove(self.unit)
            self.takeover, self.silent_since = None, -1
            if takeover.done:
                old, self.head = self.world.hosts[self.head], self.candidate
                self.incarnation = host.incarnation
                host.lead(takeover)
                self.world.note(f"host {host.number}", "is head")
                self.world.at(self.world.step + ZOMBIE_STEPS, old.resign)
            self.world.allow()
