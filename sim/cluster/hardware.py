"""What the simulated hosts share: one region, and each host's way to it."""

from random import Random
from typing import Any, Protocol

from sim.cxl.memory import MappedMemory, Memory, Role
from sim.cxl.region import private_mapping


class Hardware(Protocol):
    """Hosts over one region. `truth` sees what would survive if every host lost power now."""

    truth: Memory

    def door(self, host: int, role: int, statistics_offset: int) -> Memory:
        """A host's door for one role, through its cache if it has one."""

    def crash(self, host: int, policy: str) -> None:
        """The host's power is gone: what becomes of the lines that it had not fenced is up to `policy`."""

    def close(self) -> None:
        """Give the memory back."""


class MappedHardware:
    """Coherent hosts: every store is there at once, nothing is lost with a host."""

    def __init__(self, region_bytes: int, hosts: int, random: Random, evict: bool) -> None:
        self.mapping: Any = private_mapping(region_bytes)
        self.truth: Memory = MappedMemory(self.mapping, int(Role.ROLE_ADMIN))

    def door(self, host: int, role: int, statistics_offset: int) -> Memory:
        """A door to the mapping."""
        return MappedMemory(self.mapping, role, True, statistics_offset)

    def crash(self, host: int, policy: str) -> None:
        """Nothing is lost: there are no caches."""

    def close(self) -> None:
        """Nothing to do: the mapping goes with its last door."""


HARDWARE: dict[str, type[MappedHardware]] = {"mapped": MappedHardware}
