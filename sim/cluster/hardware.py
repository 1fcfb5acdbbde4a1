"""What the simulated hosts share: one region, and each host's way to it."""

from collections.abc import Callable
from random import Random
from typing import Any, Protocol

from broker.coherence import LineMap
from broker.layout import Layout
from sim.cxl.checker import Checker, ClassFlag
from sim.cxl.host import Device, HostCache
from sim.cxl.memory import MappedMemory, Memory, Role
from sim.cxl.noncoherent import NonCoherentMemory
from sim.cxl.region import private_mapping

# What becomes of the lines that a host had not fenced when its power went, in words -> the cache's policy.
POLICIES = {"lost": "never", "kept": "immediate", "random": "random", "inversion": "inversion"}
EVICTION_PERIODS = (0, 20, 100, 1000)        # accesses of a host between two spontaneous events, on average
# What a new region does not wipe: it is wiped later, or never read before it is written.
FOUND_AS_IT_WAS = ("batch-header rings", "results", "order indexes", "segments")
LINE_BYTES, ANY_ROLE = 64, 0xFFFF
COHERENT = ("coherent area", "statistics")  # sections; counters are an instrument and no part of the memory


class Hardware(Protocol):
    """Hosts over one region. `truth` sees what would survive if every host lost power now."""

    truth: Memory
    checker: Any                        # where memory is checked

    def door(self, host: int, role: int) -> Memory:
        """A host's door for one role, through its cache if it has one."""

    def crash(self, host: int, policy: str) -> None:
        """The host's power is gone: what becomes of the lines that it had not fenced is up to `policy`."""

    def restart(self, host: int) -> None:
        """The host has power again, and a cold cache."""


class MappedHardware:
    """Coherent hosts: every store is there at once, nothing is lost with a host."""

    def __init__(self, layout: Layout, hosts: int, random: Random, evict: bool) -> None:
        self.checker: Any = None
        self.mapping: Any = private_mapping(layout.numbers["region_bytes"])
        self.truth: Memory = MappedMemory(self.mapping, int(Role.ROLE_ADMIN))

    def door(self, host: int, role: int) -> Memory:
        """A door to the mapping."""
        return MappedMemory(self.mapping, role)

    def crash(self, host: int, policy: str) -> None:
        """Nothing is lost: there are no caches."""

    def restart(self, host: int) -> None:
        """Nothing to do: there are no caches."""


class NonCoherentHardware(MappedHardware):
    """Hosts with private write-back caches over one device. Memory that nobody has written is full of garbage."""

    def __init__(self, layout: Layout, hosts: int, random: Random, evict: bool, checked: bool = False) -> None:
        super().__init__(layout, hosts, random, evict)
        self._random = random
        self.device = Device(self.mapping, coherent=[(at, count) for name, at, count in layout.sections
                                                     if name in COHERENT])
        for name, at, count in layout.sections:
            if name in FOUND_AS_IT_WAS:
                self.device.fill_garbage(random.getrandbits(62), at,
                                         count or layout.numbers["region_bytes"] - at)
        period = random.choice(EVICTION_PERIODS) if evict else 0
        lines = LineMap(layout)
        self.checker = Checker(self.device, *_classes(layout), **lines.rules()) if checked else None
        self.caches = [HostCache(self.device, f"host {host}", random.getrandbits(62), period, observer=self.checker,
                                 number=host) for host in range(hosts)]

    def door(self, host: int, role: int) -> Memory:
        """A door through the host's cache. Each role has a thread of its own: a fence is for its own flushes."""
        door = NonCoherentMemory(self.caches[host], role)
        door.agent = role
        return door

    def crash(self, host: int, policy: str) -> None:
        """The cache is gone; by policy, some of what was not fenced was written back in the last moment."""
        self.caches[host].crash(POLICIES[policy], self._random.getrandbits(62))

    def restart(self, host: int) -> None:
        """The host's doors work again."""
        self.caches[host].restart()


def _classes(layout: Layout) -> tuple[bytearray, list[tuple[str, int, int]]]:
    """What the checker knows of every line. Payload is lines here, too: read because a header or an entry said so."""
    lines, table = LineMap(layout).classes()
    numbers = layout.numbers
    lines += bytes([len(table)]) * ((numbers["region_bytes"] - numbers["segments"]) // LINE_BYTES)
    return lines, [*table, ("payload", ANY_ROLE, int(ClassFlag.CLASS_REACHED))]


class CheckedHardware(NonCoherentHardware):
    """The same under the coherence checker: what it finds is there at the end."""

    def __init__(self, layout: Layout, hosts: int, random: Random, evict: bool) -> None:
        super().__init__(layout, hosts, random, evict, checked=True)


HARDWARE: dict[str, Callable[[Layout, int, Random, bool], MappedHardware]] = {
    "mapped": MappedHardware, "noncoherent": NonCoherentHardware, "checked": CheckedHardware,
}
