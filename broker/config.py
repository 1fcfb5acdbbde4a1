"""Settings of a cluster and of a topic. The only module that reads the environment.

    defaults  <  TOML file  <  environment (CXLMQ_*)  <  keyword overrides

Every wrong value is a `ConfigError` that names the setting, the value and what is allowed. A `ClusterConfig` that
exists is valid: sizes are numbers, and what depends on the size of the region is chosen.
"""

import contextlib
import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from broker.errors import (
    BadGroupName,
    BadTopicName,
    BadTopicOptions,
    ClearTextRefused,
    ConfigError,
    PermissionDenied,
    RegionTooSmall,
)
from broker.layout import BANKS_MAX, TOPIC_COUNT_LIMIT, Layout, LayoutError
from broker.records import record_bytes
from sim.cxl.profiles import ProfileError, load_profile

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FOLDER_PREFIX = "cxlmq-"

POOLS = ("atomic", "partitioned", "leader")
SEQUENCER_LOCKS = ("mutex", "semaphore", "atomic")
THREAD_PLANS = ("fused", "staged")
WAITINGS = ("latency", "balanced", "saver")
MEMORIES = ("mapped", "noncoherent", "checked")
MEMBERSHIPS = ("region", "etcd")

_UNITS = {"": 1, "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB,
          "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SECONDS = {"": 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_CLUSTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,59}")
_TOPIC_NAME = re.compile(r"(?!\.|__)[A-Za-z0-9._-]{1,120}")


def resolved(path: str | os.PathLike[str], setting: str = "path") -> str:
    """A path as the user means it, from here: "~" and "~name" are homes, and what is relative begins here.

    Raises `ConfigError` for a home that nobody has.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError(setting=setting, value=repr(path), allowed="the path of a folder or file")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise ConfigError(setting=setting, value=repr(path),
                          allowed="a path; there is no user of that name (write ./~ for a file that is called so)")
    return os.path.abspath(expanded)


def parse_bytes(value: object, setting: str = "size") -> int:
    """Bytes from 65536, "64KiB", "64K" (both 1024), "64KB" (1000). Raises `ConfigError`."""
    allowed = "a whole number of bytes, or one with KiB, MiB, GiB, KB, MB or GB"
    number = _quantity(value, _UNITS, setting, allowed)
    if number != int(number):
        raise ConfigError(setting=setting, value=repr(value), allowed=allowed)
    return int(number)


def parse_duration(value: object, setting: str = "duration") -> float:
    """Seconds from 1.5, "200ms", "30s", "5us", "2m", "1h". Raises `ConfigError`."""
    return float(_quantity(value, _SECONDS, setting, "a number of seconds, or one with ns, us, ms, s, m, h or d"))


def _quantity(value: object, units: Mapping[str, float], setting: str, allowed: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return value
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        digits, unit = match[1], match[2].lower()
        if unit in units:
            return (float(digits) if "." in digits else int(digits)) * units[unit]
    raise ConfigError(setting=setting, value=repr(value), allowed=allowed)


# ---- sizes that follow from the size of the region ------------------------------------------------------------------

_SIZED = ("topic_count_max", "ring_slot_count", "order_entry_count", "segment_bytes", "session_count_max",
          "cursor_count_max", "group_count_max")
# Smallest region that a row serves, then the settings of _SIZED in order.
_TIERS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (512 * MIB, (64, 1024, 16384, MIB, 1024, 256, 64)),
    (256 * MIB, (32, 512, 8192, 512 * KIB, 512, 128, 64)),
    (64 * MIB, (16, 256, 4096, 256 * KIB, 128, 64, 32)),
    (16 * MIB, (8, 128, 1024, 64 * KIB, 64, 64, 16)),
    (0, (4, 64, 256, 16 * KIB, 64, 64, 8)),
)
_MESSAGE_BYTES_MAX = 16 * MIB
_BATCH_BYTES_MAX = 4 * MIB


# Of the region: the most that rings and indexes of all topics take when their sizes are chosen, and the most that
# topics take which hold one message at each broker.
_TABLES_PART, _FIRST_SEGMENTS_PART = 4, 2
_LEADER_RUN = 64                        # segments that a leader gives out at once: what a batch may take


def chosen_settings(region_bytes: int, topics: int = 0, brokers: int = 4, pool: str = "atomic") -> dict[str, int]:
    """What is chosen for a region of that size where a setting is 0. Many topics have small rings, indexes and
    segments each."""
    numbers = dict(zip(_SIZED, next(row for smallest, row in _TIERS if region_bytes >= smallest), strict=True))
    topics = numbers["topic_count_max"] = topics or numbers["topic_count_max"]
    ring, order, segment = numbers["ring_slot_count"], numbers["order_entry_count"], numbers["segment_bytes"]
    while topics * topic_bytes(brokers, ring, order) > region_bytes // _TABLES_PART and max(ring, order) > 16:
        # An index is of more use than a ring of the same size: readers find their batches there.
        if ring > 16 and (order <= 16 or 2 * ring_bytes(brokers, ring) >= order_bytes(brokers, order)):
            ring //= 2
        else:
            order //= 2
    while topics * brokers * segment > region_bytes // _FIRST_SEGMENTS_PART and segment > 4 * KIB:
        segment //= 2
    numbers.update(ring_slot_count=ring, order_entry_count=order, segment_bytes=segment)
    largest = region_bytes // 16 if pool != "leader" else min(region_bytes // 16, (_LEADER_RUN - 1) * segment)
    return {
        **numbers,
        "message_bytes_max": min(_MESSAGE_BYTES_MAX, largest),
        "batch_bytes_max": max(4 * KIB, min(_BATCH_BYTES_MAX, largest)),
    }


def _banks(brokers: int) -> int:
    return max(2, min(BANKS_MAX, brokers))


def ring_bytes(brokers: int, ring_slot_count: int) -> int:
    """What the batch-header rings of one topic take, with their results in every bank."""
    return brokers * ring_slot_count * (record_bytes("BatchHeader") + _banks(brokers) * record_bytes("BatchResult"))


def order_bytes(brokers: int, order_entry_count: int) -> int:
    """What the order index of one topic takes, in every bank."""
    return _banks(brokers) * order_entry_count * record_bytes("OrderEntry")


def topic_bytes(brokers: int, ring_slot_count: int, order_entry_count: int) -> int:
    """What a place for a topic takes of the region, whether a topic has it or not."""
    lines = brokers * (1 + brokers) + _banks(brokers) * (5 + brokers)
    return 64 * lines + ring_bytes(brokers, ring_slot_count) + order_bytes(brokers, order_entry_count)


# ---- what is allowed ------------------------------------------------------------------------------------------------

_CHOICES = {"pool": POOLS, "sequencer_lock": SEQUENCER_LOCKS, "thread_plan": THREAD_PLANS, "waiting": WAITINGS,
            "memory": MEMORIES, "membership": MEMBERSHIPS}
_BYTES = ("region_bytes", "message_bytes_max", "batch_bytes_max", "segment_bytes", "replica_file_bytes",
          "coherent_bytes")
_PATHS = ("data_directory", "runtime_directory", "security")
_DURATIONS = ("session_lease_seconds", "head_lease_seconds", "group_lease_seconds", "replica_grace_seconds")
BROKERS_MAX = 64
_RANGES: dict[str, tuple[int, int]] = {
    "brokers": (1, BROKERS_MAX), "region_bytes": (MIB, 1 << 46), "message_bytes_max": (1, GIB),
    "batch_bytes_max": (4 * KIB, GIB), "topic_count_max": (1, TOPIC_COUNT_LIMIT), "ring_slot_count": (16, 32768),
    "order_entry_count": (16, 32768), "segment_bytes": (4 * KIB, GIB), "session_count_max": (1, 1 << 20),
    "cursor_count_max": (1, 1 << 20), "group_count_max": (1, 65536), "attach_slot_count": (0, 4096),
    "heartbeat_ms": (1, 60_000), "listen_port": (0, 65535), "replica_file_bytes": (64 * KIB, 1 << 40),
    "eviction_period": (0, 1 << 40), "coherent_bytes": (0, 1 << 40), "memory_seed": (0, 1 << 50),
    "counters_start": (0, 1 << 62),
}
_POWERS_OF_TWO = ("ring_slot_count", "order_entry_count", "segment_bytes")


class ClusterConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All settings of a cluster. Settings that are 0 or None are chosen from `region_bytes` (see `_TIERS`)."""

    name: str = "default"                   # names the region, the folder and the semaphore
    brokers: int = 4
    region_bytes: int = GIB
    message_bytes_max: int = 0              # 16 MiB, or a sixteenth of a small region
    batch_bytes_max: int = 0                # 4 MiB, or a sixteenth of a small region
    topic_count_max: int = 0                # with many, rings, indexes and segments are chosen smaller
    ring_slot_count: int = 0                # batch headers per topic and broker
    order_entry_count: int = 0              # batches per topic that readers can still find
    segment_bytes: int = 0
    session_count_max: int = 0
    cursor_count_max: int = 0
    group_count_max: int = 0                # consumer groups of all topics
    attach_slot_count: int = 64             # clients attached to the memory at once; at least 4 a broker, or 0: none
    pool: str = "atomic"
    sequencer_lock: str = "atomic"
    scanners: int = 1                       # threads of the sequencer
    thread_plan: str = "fused"
    waiting: str = "balanced"
    memory: str = "mapped"
    profile: str = ""                       # a device's latencies and bandwidths; empty: this machine's own
    hosts: str = ""                         # the host of each broker, as "0,0,1,1"; empty: every broker has its own
    eviction_period: int = 1000             # accesses between two spontaneous events of a host's cache; 0: none
    memory_seed: int = 1                    # of garbage and spontaneous events
    coherent_bytes: int = 65536             # what the hardware keeps coherent, for the pool "atomic"
    session_lease_seconds: float = 30.0     # how long a gap in a session may last
    group_lease_seconds: float = 10.0       # how long a silent member keeps its consumer group
    heartbeat_ms: int = 100
    head_lease_seconds: float = 1.0         # a head that is silent for so long is replaced; at once when it is dead
    replica_grace_seconds: float = 5.0      # others keep the replicas of a broker that is away for so long
    membership: str = "region"              # who says which brokers live, and elects the head: region or etcd
    etcd_endpoints: str = ""                # HOST:PORT,... for membership "etcd"
    restart: bool = True                    # the supervisor starts brokers that ended anew
    crash_points: str = ""                  # for tests: BROKER:POINT:VISIT[:stop],... (broker/crash.pyx)
    counters_start: int = 0                 # for tests: where positions, indexes and ring slots of new topics begin
    data_directory: str | None = None       # replicas; None: in the cluster's folder, and gone with it
    replica_file_bytes: int = 64 * MIB      # a replica's file is followed by the next one at this size
    listen_host: str = "127.0.0.1"
    listen_port: int = 0                    # broker b listens on listen_port + b; 0: any free port
    runtime_directory: str = ""             # the cluster's folder with its sockets lies below
    security: str | None = None             # folder or file that names certificates and principals; None: off
    insecure_clear_text: bool = False       # listen beyond this machine without security

    def __post_init__(self) -> None:
        for setting in _BYTES:
            if getattr(self, setting) is not None:
                setattr(self, setting, parse_bytes(getattr(self, setting), setting))
        for setting in _DURATIONS:
            setattr(self, setting, parse_duration(getattr(self, setting), setting))
        self._choose()
        self._check()

    def _choose(self) -> None:
        """Fill in what depends on the size of the region."""
        _check_range("region_bytes", self.region_bytes)
        for setting in ("brokers", "topic_count_max"):
            if getattr(self, setting) not in (0, None):
                _check_range(setting, getattr(self, setting))
        chosen = chosen_settings(self.region_bytes, self.topic_count_max, max(self.brokers, 1), self.pool)
        for setting, value in chosen.items():
            if getattr(self, setting) in (0, None):
                setattr(self, setting, value)
        if not self.runtime_directory:
            self.runtime_directory = str(runtime_root())
        for setting in _PATHS:              # once, where the user is: brokers and supervisors run in another folder
            if getattr(self, setting):
                setattr(self, setting, resolved(getattr(self, setting), setting))
        if isinstance(self.listen_host, str):
            self.listen_host = _plain_host(self.listen_host)

    def _check(self) -> None:
        """Raise `ConfigError` for the first setting that is wrong."""
        for setting, choices in _CHOICES.items():
            if getattr(self, setting) not in choices:
                _refuse(setting, getattr(self, setting), ", ".join(choices))
        for setting in _RANGES:
            _check_range(setting, getattr(self, setting))
        for setting in _POWERS_OF_TWO:
            if getattr(self, setting).bit_count() != 1:
                _refuse(setting, getattr(self, setting), "a power of two")
        if not isinstance(self.scanners, int) or not 1 <= self.scanners <= self.brokers:
            _refuse("scanners", self.scanners, f"a whole number from 1 to brokers ({self.brokers})")
        if 0 < self.order_entry_count < 2 * self.scanners:
            _refuse("order_entry_count", self.order_entry_count, f"at least two for each of {self.scanners} scanners")
        check_cluster_name(self.name)
        for setting in _DURATIONS:
            if getattr(self, setting) <= 0:
                _refuse(setting, getattr(self, setting), "more than 0")
        self.host_numbers()
        self._check_profile()
        if self.membership == "etcd":
            parse_endpoints(self.etcd_endpoints)
        if not isinstance(self.listen_host, str) or not self.listen_host or " " in self.listen_host:
            _refuse("listen_host", self.listen_host, "a host name or an address")
        if ":" in self.listen_host and not _is_address(self.listen_host):
            _refuse("listen_host", self.listen_host, "a host name or an address, without a port: that is listen_port")
        if not (self.security or self.insecure_clear_text or _is_loopback(self.listen_host)):
            raise ClearTextRefused(setting="listen_host", host=self.listen_host)
        if self.listen_port and self.listen_port + self.brokers - 1 > 65535:
            _refuse("listen_port", self.listen_port, f"0, or a port with {self.brokers - 1} more above it up to 65535")
        if len(os.fsencode(self.folder)) > 90:
            _refuse("runtime_directory", self.runtime_directory,
                    "a short path: unix sockets below it may have 107 bytes, the cluster's folder 90")

    def _check_profile(self) -> None:
        if self.profile:
            try:
                load_profile(self.profile)
            except ProfileError as error:
                raise ConfigError(str(error), setting="profile", value=repr(self.profile)) from error
            if self.memory == "mapped":
                _refuse("profile", self.profile, "none with memory 'mapped': the machine's own caches cannot be slowed "
                                                 "down; use 'noncoherent' or 'checked'")

    def host_numbers(self) -> list[int]:
        """The host of each broker. Raises `ConfigError`."""
        if not self.hosts:
            return list(range(self.brokers))
        try:
            hosts = [int(each) for each in self.hosts.split(",")]
        except ValueError:
            hosts = []
        if len(hosts) != self.brokers or not all(0 <= host < self.brokers for host in hosts):
            _refuse("hosts", self.hosts, f"one number below {self.brokers} for each of the {self.brokers} brokers, "
                                         "with commas between them")
        return hosts

    @property
    def folder(self) -> Path:
        """The cluster's own folder: sockets, logs, and replicas when no data_directory is set."""
        return Path(self.runtime_directory) / f"{FOLDER_PREFIX}{self.name}"

    def replica_folder(self, broker: int) -> Path:
        """Where a broker keeps what outlives the region: replicas, and the files of consumer groups."""
        return (Path(self.data_directory) if self.data_directory else self.folder / "replicas") / f"broker-{broker}"

    def to_json(self) -> str:
        """The configuration on one line, for a broker's argument or pipe."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "ClusterConfig":
        """The inverse of `to_json`. Raises `ConfigError`."""
        try:
            values = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"the configuration is no JSON: {error}", setting="configuration") from error
        if not isinstance(values, dict):
            raise ConfigError(setting="configuration", value=repr(values), allowed="a JSON object")
        return load_config(environment={}, **values)


def parse_endpoints(endpoints: str) -> list[tuple[str, str, int]]:
    """(scheme, host, port) of "host:port,https://host:port". Raises `ConfigError`."""
    found = []
    for each in filter(None, (part.strip() for part in endpoints.split(","))):
        try:
            parts = urlsplit(each if "://" in each else f"http://{each}")
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
                raise ValueError
            found.append((parts.scheme, parts.hostname, parts.port or 2379))
        except ValueError:
            raise ConfigError(setting="etcd_endpoints", value=repr(each),
                              allowed="HOST:PORT or https://HOST:PORT, with commas between several") from None
    if not found:
        raise ConfigError(setting="etcd_endpoints", value=repr(endpoints),
                          allowed="the address of at least one etcd server for membership 'etcd'")
    return found


def _plain_host(host: str) -> str:
    """A host as people mean it: an IPv6 address without its brackets, a name in small letters (RFC 4343)."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return host.lower()


def host_and_port(host: str, port: int | str) -> str:
    """An address as gRPC and people write it: an IPv6 address has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def _is_loopback(host: str) -> bool:
    if host.rstrip(".") == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback     # a name may mean anything


def _refuse(setting: str, value: object, allowed: str) -> None:
    raise ConfigError(setting=setting, value=repr(value), allowed=allowed)


def _check_range(setting: str, value: object) -> None:
    low, high = _RANGES[setting]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(setting, value, f"a whole number from {low} to {high}")


# ---- loading --------------------------------------------------------------------------------------------------------

# Environment variable -> setting. Few on purpose: what belongs to a machine or a shell, not to a cluster's design.
ENVIRONMENT = {
    "CXLMQ_NAME": "name", "CXLMQ_BROKERS": "brokers", "CXLMQ_REGION_BYTES": "region_bytes",
    "CXLMQ_WAITING": "waiting", "CXLMQ_SEQUENCER_LOCK": "sequencer_lock", "CXLMQ_DATA_DIRECTORY": "data_directory",
    "CXLMQ_RUNTIME_DIRECTORY": "runtime_directory", "CXLMQ_LISTEN_HOST": "listen_host",
    "CXLMQ_LISTEN_PORT": "listen_port", "CXLMQ_SECURITY": "security",
}
CONFIG_FILE_VARIABLE = "CXLMQ_CONFIG"
_PREFIX = "CXLMQ_"
# What the scripts read or set themselves (scripts/bootstrap.sh).
_OF_SCRIPTS = ("CXLMQ_BOOTSTRAP_PYTHON", "CXLMQ_EXTRAS", "CXLMQ_PYTHON", "CXLMQ_ROOT")
_SETTINGS = {field.name: field.type for field in msgspec.structs.fields(ClusterConfig)}


def load_config(path: str | Path | None = None, *, environment: Mapping[str, str] | None = None,
                **overrides: Any) -> ClusterConfig:
    """Build a configuration; later sources win, and an override of None counts as not given.

    `path` is a TOML file, its settings at the top or in `[cluster]`; without it CXLMQ_CONFIG may name one.
    Raises `ConfigError`.
    """
    environment = os.environ if environment is None else environment
    _check_variables(environment)
    path = path or environment.get(CONFIG_FILE_VARIABLE) or None
    values: dict[str, Any] = dict(_read_toml(Path(resolved(path, "config")))) if path else {}
    values.update({setting: environment[variable] for variable, setting in ENVIRONMENT.items()
                   if environment.get(variable)})
    values.update({setting: value for setting, value in overrides.items() if value is not None})
    for setting, value in values.items():
        if setting not in _SETTINGS:
            _refuse(setting, value, f"one of the settings {', '.join(_SETTINGS)}")
    return ClusterConfig(**{setting: _typed(setting, value) for setting, value in values.items()})


def _check_variables(environment: Mapping[str, str]) -> None:
    """Refuse a variable of ours that nobody reads: it is a typing error, and would change nothing in silence."""
    known = (*ENVIRONMENT, CONFIG_FILE_VARIABLE)
    for variable in sorted(environment):
        if variable.startswith(_PREFIX) and environment[variable] and variable not in (*known, *_OF_SCRIPTS):
            near = get_close_matches(variable, known, 1)
            raise ConfigError(
                f"the environment variable {variable} is none of ours{f' (is {near[0]} meant?)' if near else ''}: "
                f"unset it, or use one of {', '.join(known)}; other settings are options, or in a file that "
                f"{CONFIG_FILE_VARIABLE} names", setting=variable, value=repr(environment[variable]),
                allowed=", ".join(known))


def default_name() -> str:
    """The cluster that is meant when none is named: CXLMQ_NAME, that of the configuration file, or "default"."""
    return load_config().name


def check_cluster_name(name: object) -> None:
    """Raise `ConfigError` unless a cluster may be called so."""
    if not isinstance(name, str) or not _CLUSTER_NAME.fullmatch(name):
        _refuse("name", name, "1 to 60 letters, digits, '.', '_' and '-', not starting with '.' or '-'")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}", setting="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} is no TOML: {error}", setting="config") from error
    if isinstance(content.get("security"), dict):      # the table itself: the brokers read it from this file
        content["security"] = str(path)
    inner = content.pop("cluster", {})
    if not isinstance(inner, dict):
        raise ConfigError(setting="cluster", value=repr(inner), allowed="a table of settings")
    return {**content, **inner}


def _typed(setting: str, value: Any) -> Any:
    """Numbers that come as text (environment, command line) become numbers; sizes and times are parsed later."""
    if _SETTINGS[setting] is int and setting not in _BYTES and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            _refuse(setting, value, "a whole number")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if _SETTINGS[setting] is bool:
        if str(value).lower() not in ("true", "false"):
            _refuse(setting, value, "true or false")
        return str(value).lower() == "true"
    if _SETTINGS[setting] is not int and setting not in _DURATIONS and not isinstance(value, str):
        _refuse(setting, value, "text")
    return value


def runtime_root(environment: Mapping[str, str] | None = None) -> Path:
    """Where clusters of this user keep their folders, unless they say otherwise."""
    environment = os.environ if environment is None else environment
    if environment.get("CXLMQ_RUNTIME_DIRECTORY"):
        return Path(resolved(environment["CXLMQ_RUNTIME_DIRECTORY"], "runtime_directory"))
    session = environment.get("XDG_RUNTIME_DIR")
    if session and len(session) <= 24 and os.path.isdir(session) and os.access(session, os.W_OK):
        return Path(os.path.abspath(session)) / "cxlmq"
    return Path(f"/tmp/cxlmq-{os.getuid()}")


def make_folder(config: ClusterConfig) -> Path:
    """Create the cluster's folder, private to the user. Raises `PermissionDenied` when somebody else could write it."""
    folder = config.folder
    for each in (folder.parent, folder):
        try:
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionDenied(
                f"cannot create the folder {each} ({error.strerror}): set runtime_directory", what=str(each)) from None
    check_folder(folder)
    if folder.stat().st_mode & 0o077:       # it is ours: nobody else needs to look in
        folder.chmod(0o700)
    return folder


def check_folder(folder: Path) -> None:
    """Check a cluster's folder before anything is read from it, or put there.

    Raises `PermissionDenied` unless it and the one above are this user's and nobody else may change what they hold:
    whoever could would hand us his sockets, and get our token. `FileNotFoundError` when there is none.
    """
    for each in (folder.parent, folder):
        status = each.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise PermissionDenied(f"{each} is no folder of its own (a link, or a file): remove it, or set "
                                   "runtime_directory", what=str(each))
        if status.st_uid != os.geteuid():
            raise PermissionDenied(f"the folder {each} belongs to another user: set runtime_directory", what=str(each))
        sticky = each == folder.parent and status.st_mode & stat.S_ISVTX       # nobody renames what is another's there
        if status.st_mode & 0o022 and not sticky:
            raise PermissionDenied(f"other users may write into the folder {each}: `chmod go-w {each}`, or set "
                                   "runtime_directory", what=str(each))


def check_socket(address: str) -> None:
    """Check the socket behind "unix:/path" before a client talks to it; one that is not there is not looked at.

    Raises `PermissionDenied` unless it is this user's, in a folder where nobody else can put one in its place.
    """
    path = Path(address.removeprefix("unix:"))
    try:
        status, folder = path.lstat(), path.parent.stat()
    except OSError:
        return
    for each, found, owners in ((path, status, (os.geteuid(),)), (path.parent, folder, (os.geteuid(), 0))):
        if found.st_uid not in owners:
            raise PermissionDenied(f"{each} belongs to another user (number {found.st_uid}): nothing is sent there; "
                                   "talk to the cluster as the user who runs it, or over TCP", what=str(each))
    if not stat.S_ISSOCK(status.st_mode):
        raise PermissionDenied(f"{path} is no socket: nothing is sent there", what=str(path))
    if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
        raise PermissionDenied(f"other users may put a socket of theirs into {path.parent}: nothing is sent there; "
                               f"`chmod go-w {path.parent}`", what=str(path))


def layout_of(config: ClusterConfig) -> Layout:
    """The layout of a cluster's region. Raises `RegionTooSmall`, which names the smallest that works."""
    # Each broker has its own share of the slots: one that has none could serve no attached client.
    attach_slots = max(config.attach_slot_count, 4 * config.brokers) if config.attach_slot_count else 0

    def compute(region_bytes: int) -> Layout:
        return Layout.compute(
            broker_count=config.brokers, region_bytes=region_bytes, topic_count_max=config.topic_count_max,
            ring_slot_count=config.ring_slot_count, order_entry_count=config.order_entry_count,
            session_count_max=config.session_count_max, cursor_count_max=config.cursor_count_max,
            attach_slot_count=attach_slots, group_count_max=config.group_count_max,
            segment_bytes=config.segment_bytes,
            message_bytes_max=config.message_bytes_max, batch_bytes_max=config.batch_bytes_max,
            pool_strategy=config.pool)

    try:
        layout = compute(config.region_bytes)
        # The size is rounded down to whole segments. Whoever attaches computes the layout from that size and must
        # find the same one, so it is settled here.
        while (settled := compute(layout.numbers["region_bytes"])).hash() != layout.hash():
            layout = settled
    except LayoutError as error:
        raise RegionTooSmall(str(error), region=config.name) from error
    return layout


# ---- topics ---------------------------------------------------------------------------------------------------------

ORDERS, ACKS = (0, 1, 2, 4, 5), (0, 1, 2)
ALIAS_NOTE = "order 4 is an alias of order 5: the topic has order 5"


class TopicConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a topic promises. `validate` before use."""

    name: str
    order: int = 5                  # 0 none, 1 per broker, 2 global, 5 global and per session (4 is an alias of 5)
    ack: int = 1                    # 0 none, 1 ordered in memory, 2 durable on replication_factor - 1 disks as well
    replication_factor: int = 1     # copies, the one in memory included
    retention_bytes: int = 0        # 0: while the region has room; N: drop beyond N bytes; -1: never drop

    def validate(self, broker_count: int | None) -> tuple["TopicConfig", list[str]]:
        """The topic as it will be, and notes for the user. Raises `BadTopicName` or `BadTopicOptions`.

        Without `broker_count` nobody knows yet how many brokers there are: the cluster itself checks that.
        """
        check_topic_name(self.name)
        if not _is_whole(self.order) or self.order not in ORDERS:
            self._refuse("order", self.order, "0, 1, 2, 5, or 4 as an alias of 5")
        if not _is_whole(self.ack) or self.ack not in ACKS:
            self._refuse("ack", self.ack, "0, 1 or 2")
        if not _is_whole(self.replication_factor) or not 1 <= self.replication_factor <= (broker_count or BROKERS_MAX):
            self._refuse("replication_factor", self.replication_factor, _up_to_brokers(1, broker_count))
        if self.ack == 2 and self.replication_factor < 2:
            self._refuse("replication_factor", self.replication_factor,
                         "none for ack 2 with one broker: use ack 1" if broker_count == 1
                         else f"{_up_to_brokers(2, broker_count)} for ack 2, or use ack 1")
        if not _is_whole(self.retention_bytes) or not -1 <= self.retention_bytes < 1 << 62:
            self._refuse("retention_bytes", self.retention_bytes,
                         "0 (while there is room), a number of bytes, or -1 (never drop)")
        if self.order == 4:
            return msgspec.structs.replace(self, order=5), [ALIAS_NOTE]
        return self, []

    def _refuse(self, option: str, value: object, allowed: str) -> None:
        raise BadTopicOptions(topic=self.name, option=option, value=value, allowed=allowed)


def check_ack(topic: str, ack: object, replication_factor: int) -> None:
    """Raise `BadTopicOptions` unless a topic that is there can give this ack level."""
    allowed = ACKS if replication_factor > 1 else ACKS[:-1]
    if not _is_whole(ack) or ack not in allowed:
        raise BadTopicOptions(topic=topic, option="ack", value=ack, allowed="0, 1 or 2" if replication_factor > 1 else (
            "0 or 1: the topic has no replica (replication factor 1), and ack 2 means that one has the message"))


def _up_to_brokers(low: int, broker_count: int | None) -> str:
    if broker_count == low:
        return f"{low}, with {low} broker{'s' if low > 1 else ''}"
    most = f"({broker_count})" if broker_count else f"(at most {BROKERS_MAX})"
    return f"{low} to the number of brokers {most}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_topic_name(name: str) -> None:
    """Raise `BadTopicName` unless a topic may be called so."""
    if not isinstance(name, str) or not _TOPIC_NAME.fullmatch(name):
        raise BadTopicName(topic=name)


def check_group_name(name: str) -> None:
    """Raise `BadGroupName` unless a consumer group may be called so."""
    if not isinstance(name, str) or not _TOPIC_NAME.fullmatch(name) or len(name) > 63:
        raise BadGroupName(group=name)
