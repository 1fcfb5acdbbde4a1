"""Who is head in a simulated cluster: the product's leadership, with what its threads and its membership are here.

A takeover is stepped by the schedule like every other stage, so that power may go in the middle of it. A head that was
replaced goes on for a while: what it stores lies in its own bank, and must not count.
"""

from typing import TYPE_CHECKING, Any

from broker.head import head_of
from broker.layout import ControlBits
from broker.leadership import Leadership
from broker.membership import RegionMembership
from broker.stages.stage import Stage
from broker.stages.takeover import Takeover
from sim.cxl.memory import Role

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

LOOK_STEPS = 300                            # how often a broker looks whether there is a head
SILENCE_TICKS = 1_500                       # a head that stands still for so long is replaced
PROFILE_TICKS = 10                          # where operations cost time: steps last that much longer, at most
ZOMBIE_STEPS = 1_000                        # the stages of a replaced head may go on for so many
EAGERNESS, HASTY, EARLY = 0.5, 0.1, 0.001       # per look: without a head, while one takes over, while one serves


class DrawnMembership(RegionMembership):
    """As where leases are kept elsewhere: whoever gets one tries, and it may end too early, also in a takeover."""

    def __init__(self, world: "World", *arguments: Any) -> None:
        super().__init__(*arguments)
        self._world = world

    def wanted(self) -> int | None:
        """See `Membership`."""
        control = self._memory.load_word(self._layout.offset_of("control"))
        chance = EAGERNESS
        if self._has_head(control):
            serving = control & ControlBits.CONTROL_SERVING
            chance = (EARLY if serving else HASTY) if "stall" in self._world.scenario.kinds else 0.0
            chance *= bool(self._world.publishers) and not self._world.draining and head_of(control) != self._broker
        if self._world.succession.random() >= chance:
            return None
        self._world.injected["head's lease ended early"] += self._has_head(control)
        return control


class Place:
    """A seat whose stage does not look whether its head was replaced: as a thread in the middle of a step."""

    def __init__(self, host: "Host", name: str) -> None:
        self._host, self._name = host, name
        self._unit = self._left = -1
        self._control = 0

    @property
    def free(self) -> bool:
        """Whether nothing runs here."""
        return self._unit < 0

    def take(self, stage: Stage, control: int) -> None:
        """Run a stage; `look` ends it some time after the control word has changed."""
        (self._unit,) = self._host.add({self._name: stage})
        self._host.units.append(self._unit)
        self._stage, self._control, self._left = stage, control, -1

    def look(self, control: int, step: int) -> None:
        """Let a stage of a head that was replaced go on for a while, and then end it."""
        if self._unit < 0 or control == self._control:
            return
        if self._left < 0:
            self._left = step
        elif step - self._left >= ZOMBIE_STEPS:
            self._stage.leave_now()
            self._host.units.remove(self._unit)
            self._unit = -1


class Headship:
    """One broker's part in who is head: its leadership, for one life of its host."""

    def __init__(self, host: "Host", founder: bool) -> None:
        self.host, self.world, broker = host, host.world, host.assembly
        world = self.world
        lease_ns = SILENCE_TICKS * world.scenario.tick_ns * (PROFILE_TICKS if world.scenario.profile else 1)
        inputs = (broker.door(Role.ROLE_BROKER), world.layout, world.clock, host.number, lease_ns,
                  lambda other: not world.hosts[other].is_there, founder)
        membership = DrawnMembership(world, *inputs) if world.drawn_heads and not founder else (
            RegionMembership(*inputs))
        self._places = [Place(host, name) for name in (
            *(f"scanner {number}" for number in range(world.scenario.scanners)), "reclaim")]
        self.takeover_unit = -1
        self._leadership = Leadership(broker, membership, self._is_gone, self._places, run=self._run,
                                      say=lambda text: world.note(f"host {host.number}", text))

    def _is_gone(self, owner: int) -> bool:
        other = (owner & 0xFF) - 1
        line = self.host.assembly.line.read(other)
        return line["incarnation"] != owner >> 8 or not self.world.hosts[other].is_there

    def _run(self, takeover: Takeover) -> None:
        """Have it stepped by the schedule; at the very beginning there is nothing that could go on meanwhile."""
        host = self.host
        if self.world.step == 0:
            while not takeover.done:
                takeover.step_once()
            return
        (self.takeover_unit,) = host.add({"takeover": takeover})
        host.units.append(self.takeover_unit)

    @property
    def serves(self) -> bool:
        """Whether this broker is head."""
        return self._leadership.serves

    def tick(self) -> None:
        """What a broker's membership thread does in a tick."""
        host = self.host
        before = list(host.units)
        control = host.memory.load_word(host.world.layout.offset_of("control"))
        for place in self._places:
            place.look(control, host.world.step)
        self._leadership.tick()
        if self.takeover_unit >= 0 and not self._leadership.tries:
            host.units.remove(self.takeover_unit)
            self.takeover_unit = -1
        if host.units != before:
            host.world.allow()
