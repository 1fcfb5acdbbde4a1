"""What a device's profile (sim/cxl/profiles.py) means for simulated time and for plans."""

from broker.errors import ConfigError
from sim.cxl.profiles import Profile, ProfileError, load_profile, profile_names

HOSTS_SATURATED = 64                        # published saturated figures are of about so many writers


def find_device(name: str) -> Profile:
    """A profile by name or path. Raises `ConfigError`."""
    try:
        return load_profile(name)
    except ProfileError as error:
        raise ConfigError(setting="profile", value=repr(name), allowed=f"a known one ({error})") from error


def device_names() -> list[str]:
    """Profiles that there are."""
    return profile_names()


def write_rate(device: Profile, hosts: int) -> float:
    """GB/s that so many hosts write together: towards the saturated figure, where one is published."""
    saturated = device.extra.get("write_gb_s_saturated", device.write_gb_s)
    share = min(1.0, (hosts - 1) / (HOSTS_SATURATED - 1))
    return device.write_gb_s + share * (saturated - device.write_gb_s)


def costs_of(name: str) -> tuple[tuple[int, ...], int]:
    """What a host's operations cost in simulated ns, by `sim.cluster.door.Operation`, and its copies in bytes/us."""
    if not name:
        return (), 10_000
    device = find_device(name)
    load, flush, fence = int(device.load_ns), int(device.flush_ns), int(device.fence_ns)
    # A load costs what it does when it follows an invalidate; a flush is posted, the fence waits for it.
    return (1, 1, 1, 1, load, 0, 0, flush, load, fence, fence), int(1000 * min(device.read_gb_s, device.write_gb_s))
