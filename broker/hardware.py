"""What kind of memory a region is, and which host this process is.

    mapped        this machine's own, coherent memory
    noncoherent   a device; every host has a private cache, which the files beside the region may share
    checked       the same, with every access checked

The layout says where lines end and payload begins, and which lines are coherent.
"""

import os
from pathlib import Path
from typing import Any

from broker.coherence import LineMap, explain, save
from broker.config import MEMORIES, ClusterConfig
from broker.errors import ConfigError
from broker.layout import Layout
from sim.cxl import region as files
from sim.cxl.checker import Checker
from sim.cxl.host import Device, HostCache
from sim.cxl.memory import MappedMemory, Memory
from sim.cxl.noncoherent import NonCoherentMemory
from sim.cxl.profiles import load_profile

MAPPED = MEMORIES.index("mapped")
HOSTS_MAX = 64
GARBAGE_BYTES_MAX = 256 << 20       # where tables take more, the banks of heads to come stay as the system gives them
CLIENT_HOST = HOSTS_MAX


def side_name_of(name: str) -> str:
    """The file beside a cluster's region in which the model of its memory keeps what hosts share."""
    return f"{files.SIDE_PREFIX}{name}"


def host_name_of(name: str, host: int) -> str:
    """The file of the cache of one host."""
    return f"{files.HOST_PREFIX}{host}-{name}"


def check_hardware(config: ClusterConfig, layout: Layout) -> None:
    """Raise `ConfigError` when the pool needs more coherent memory than the hardware has."""
    needed = sum(nbytes for _, nbytes in layout.coherent_area()[0])
    if config.memory != "mapped" and needed > config.coherent_bytes:
        raise ConfigError(setting="coherent_bytes", value=config.coherent_bytes,
                          allowed=f"at least {needed} with the pool {config.pool!r}; partitioned and leader need less")


def check_name_of(name: str, host: int | None = None) -> str:
    """The file of the checker of a region, or of what it keeps of one host's copies."""
    return f"{files.CHECK_PREFIX}{'' if host is None else f'{host}-'}{name}"


def remove_hardware(name: str) -> None:
    """Remove the files beside a region."""
    files.remove_region_file(side_name_of(name))
    files.remove_region_file(check_name_of(name))
    for host in range(HOSTS_MAX):
        files.remove_region_file(host_name_of(name, host))
        files.remove_region_file(check_name_of(name, host))


def report_path(name: str, folder_root: Path) -> Path:
    """Where the checker's report of a cluster is kept when the cluster is gone."""
    return folder_root / f"{files.REGION_PREFIX}{name}.coherence.json"


class Hardware:
    """The memory of one region, as one process sees it."""

    def __init__(self, name: str, mapping: Any, layout: Layout, superblock: dict[str, Any], writable: bool) -> None:
        self.kind = MEMORIES[superblock["memory"] & 0xFF]
        self._name, self._mapping, self._layout, self._superblock = name, mapping, layout, superblock
        # Who may only read is no host: it sees what is on the device.
        self._simulated = self.kind != "mapped" and writable
        self._device: Device | None = None
        self._host: HostCache | None = None
        self._checker: Checker | None = None
        self._place: tuple[int, bool] = CLIENT_HOST, False
        self._hosts: list[int] = []         # of the brokers, once this process is one

    def be_broker(self, broker: int, hosts: list[int]) -> None:
        """This process is a broker: its host's cache is its own, or shared with the brokers of the same host."""
        self._place, self._hosts = (hosts[broker], hosts.count(hosts[broker]) > 1), hosts
        self._host = None

    @property
    def device(self) -> Device:
        """The device, with the file beside the region."""
        if self._device is None:
            line_bytes = self._layout.numbers["segments"]
            side = files.shared_file(side_name_of(self._name), Device.side_bytes(len(self._mapping), line_bytes))
            needed, instruments = self._layout.coherent_area()
            self._device = Device(self._mapping, line_bytes, needed + instruments, side=side)
        return self._device

    @property
    def checker(self) -> Checker | None:
        """The checker, when the memory is checked."""
        if self._checker is None and self._simulated and self.kind == "checked":
            shared = files.shared_file(check_name_of(self._name), Checker.shared_bytes(self.device))
            lines = LineMap(self._layout)
            self._checker = Checker(self.device, *lines.classes(), shared=shared, **lines.rules())
        return self._checker

    @property
    def host(self) -> HostCache:
        """The cache of this process's host."""
        if self._host is None:
            number, shared = self._place
            label = f"host {number}" if number < HOSTS_MAX else f"the host of process {os.getpid()}"
            store = observed = None
            if shared:
                store = files.shared_file(host_name_of(self._name, number), HostCache.store_bytes(self.device))
            seed = (self._superblock["memory_seed"] << 8) + number
            if self.checker is not None:
                self.checker.tell_hosts(self._hosts)
                if number >= HOSTS_MAX:
                    number = self.checker.new_host()
                if shared:
                    observed = files.shared_file(check_name_of(self._name, number), Checker.store_bytes(self.device))
            self._host = HostCache(self.device, label, seed, self._superblock["memory"] >> 8, store,
                                   observer=self.checker, number=number, observer_store=observed)
        return self._host

    def save_report(self, folder_root: Path) -> None:
        """Keep what the checker found, explained, where the cluster's end does not remove it."""
        if self.checker is not None:
            timing = self.device.timing()
            prices = (timing["flush_ns"], timing["fence_ns"]) if timing["load_ns"] else None
            save(explain(self.checker.reports(), self.checker.wasted(), self._layout, prices, self.checker.unwatched()),
                 report_path(self._name, folder_root))

    def door(self, role: int, statistics_offset: int = 0) -> Memory:
        """A door for a role of this process."""
        if not self._simulated:
            return MappedMemory(self._mapping, role, True, statistics_offset)
        return NonCoherentMemory(self.host, role, statistics_offset)

    def use_profile(self, text: str) -> None:
        """Let accesses take the time of a device, for every process. By the creator, before anybody else comes."""
        if text and self._simulated:
            self.device.use_profile(load_profile(text))

    def fill_garbage(self) -> None:
        """Hand the memory out as hardware does: full of whatever there was. All but the superblock, before its use."""
        if not self._simulated:
            return
        numbers, seed = self._layout.numbers, self._superblock["memory_seed"]
        banks = next(start for name, start, _ in self._layout.sections if name == "further banks")
        end = numbers["segments"] if numbers["segments"] <= GARBAGE_BYTES_MAX else banks
        self.device.fill_garbage(seed, numbers["brokers"], end - numbers["brokers"])
        for segment in range(numbers["segment_count"]):
            self.device.fill_garbage(seed + segment, self._layout.offset_of("segment", segment), 4096)
