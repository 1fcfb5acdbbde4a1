"""Devices that a simulation or a plan may assume: published figures, and what was assumed where there are none."""

from dataclasses import dataclass

from broker.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """What is known of a device. `assumed` names what is not published and was put in here."""

    name: str
    load_ns: float                          # of a line that somebody else wrote last
    flush_ns: float                         # until a flushed line is there: flush and fence
    read_gbps: float
    write_gbps: float
    shared_gbps: float                      # all hosts together, reads and writes
    source: str
    assumed: tuple[str, ...] = ()


DEVICES = {each.name: each for each in (
    Device("local-ddr5", 125, 220, 239, 209, 239, "FUSEE-CXL-Migration, hw_bench (unreviewed)", ("shared_gbps",)),
    Device("cxl-direct", 300, 500, 35, 30, 35, "Melody (ASPLOS'25), the middle of 214-394 ns and 18-52 GB/s",
           ("flush_ns", "write_gbps", "shared_gbps")),
    Device("cxl-switch-xconn", 600, 1120, 24, 22, 24, "FUSEE-CXL-Migration, hw_bench (unreviewed)", ("shared_gbps",)),
    Device("cxl-switch-beluga", 750, 780, 22.5, 22.5, 46, "Beluga, arXiv 2511.20172 (secondary)", ("write_gbps",)),
    Device("embarcadero-module", 350, 500, 21, 21, 21,
           "Embarcadero, docs/handoff: 200-500 ns, 21 GB/s one way, 10 each way mixed", ("flush_ns",)),
)}


def find_device(name: str) -> Device:
    """A device by name. Raises `ConfigError`."""
    if name not in DEVICES:
        raise ConfigError(setting="profile", value=repr(name), allowed=f"one of {', '.join(DEVICES)}")
    return DEVICES[name]


def costs_of(name: str) -> tuple[tuple[int, ...], int]:
    """What a host's operations cost in simulated ns, by `sim.cluster.door.Operation`, and its copies in bytes/us."""
    if not name:
        return (), 10_000
    device = find_device(name)
    load, fence = int(device.load_ns), int(device.flush_ns)
    # A load costs what it does when it follows an invalidate; a flush is posted, the fence waits for it.
    return (1, 1, 1, 1, load, 0, 0, 20, load, fence, fence), int(1000 * min(device.read_gbps, device.write_gbps))
