"""What a throughput run is to do: parsed from text and checked completely before anything starts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from broker.config import (
    ACKS,
    MEMORIES,
    ORDERS,
    SEQUENCER_LOCKS,
    THREAD_PLANS,
    WAITINGS,
    ClusterConfig,
    TopicConfig,
    layout_of,
    load_config,
    parse_bytes,
)
from broker.errors import BadTopicOptions, ConfigError

TRANSPORTS = ("grpc", "attached", "both")
NETWORKS = ("unix", "tcp")
TOPIC = "bench"
ADAPTIVE = "adaptive"
# Part of the segments, and of the order index, that one round may fill: readers must find all of it afterwards.
ROUND_SHARE = 0.4
FRAME_BYTES = 8
BATCH_BYTES = 1 << 20
ADAPTIVE_BATCH_BYTES_MIN = 64 << 10
USUAL_BATCH_BYTES_MAX = 4 << 20
PUBLISHERS_MAX, TRIALS_MAX = 64, 1000

# Field -> the name it has for the scripts, so that an error names what the user wrote.
VARIABLES = {
    "transport": "TRANSPORT", "brokers": "NUM_BROKERS", "publishers": "NUM_PUBLISHERS", "message_bytes": "MESSAGE_SIZE",
    "total_bytes": "TOTAL_MESSAGE_SIZE", "batch_bytes": "BATCH_SIZE", "order": "ORDER", "ack": "ACK",
    "replication_factor": "REPLICATION_FACTOR", "trials": "NUM_TRIALS", "sequencer_lock": "SEQUENCER_LOCK",
    "waiting": "WAIT", "region_bytes": "REGION_SIZE", "scanners": "SCANNERS", "thread_plan": "THREAD_PLAN",
    "network": "NETWORK", "memory": "MEMORY", "profile": "PROFILE",
}


TOPICS_MAX = 8                          # there is one; the rest of the region is for its batches


@dataclass(frozen=True)
class Workload:
    """One configuration to measure. `Workload.parse` gives only ones that can be run."""

    transport: str = "both"
    brokers: int = 4
    publishers: int = 1
    message_bytes: int = 1024
    total_bytes: int = 2 << 30
    batch_bytes: int | None = BATCH_BYTES   # None: adaptive, the publisher chooses
    order: int = 5
    ack: int = 1
    replication_factor: int = 1
    trials: int = 1
    sequencer_lock: str = "atomic"
    waiting: str = "balanced"
    region_bytes: int = 1 << 30
    scanners: int = 1
    thread_plan: str = "fused"
    network: str = "unix"
    memory: str = "mapped"
    profile: str = ""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Workload":
        """From numbers or text; None counts as not given. Raises `ConfigError`, which names what is wrong."""
        given = {name: value for name, value in values.items() if value is not None}
        unknown = given.keys() - VARIABLES.keys()
        if unknown:
            raise ConfigError(setting=min(unknown), value="given", allowed=f"one of {', '.join(VARIABLES)}")
        workload = cls(**{name: _PARSERS[name](name, value) for name, value in given.items()})
        if "batch_bytes" not in given:      # a small region takes no batches as large as the usual ones
            largest = workload.cluster_config("check").batch_bytes_max
            workload = dataclasses.replace(workload, batch_bytes=min(BATCH_BYTES, largest))
        return workload.checked()

    def checked(self) -> "Workload":
        """The workload as it will be run. Raises `ConfigError` when the product would refuse part of it."""
        config = self.cluster_config("check")
        layout_of(config)                   # RegionTooSmall names the smallest
        try:
            topic, _ = self.topic_config().validate(self.brokers)
        except BadTopicOptions as error:
            option = str(error.details.get("option"))
            _refuse(option, error.details.get("value"), str(error.details.get("allowed")))
        if self.message_bytes > config.message_bytes_max:
            _refuse("message_bytes", self.message_bytes, f"1 to {config.message_bytes_max} with this region")
        if self.batch_bytes is not None and self.batch_bytes > config.batch_bytes_max:
            _refuse("batch_bytes", self.batch_bytes, f"1 to {config.batch_bytes_max} with this region, or {ADAPTIVE}")
        if self.total_bytes < self.message_bytes * self.publishers:
            _refuse("total_bytes", self.total_bytes,
                    f"at least one message a publisher: {self.message_bytes * self.publishers}")
        return dataclasses.replace(self, order=topic.order)

    def cluster_config(self, name: str) -> ClusterConfig:
        """The cluster to run on. Raises `ConfigError`."""
        # Batches larger than usual need a larger limit; what the region has no room for is refused.
        batch_bytes_max = min(self.batch_bytes or 0, self.region_bytes // 16)
        if batch_bytes_max <= USUAL_BATCH_BYTES_MAX:
            batch_bytes_max = 0
        return load_config(name=name, brokers=self.brokers, region_bytes=self.region_bytes,
                           batch_bytes_max=batch_bytes_max, topic_count_max=TOPICS_MAX,
                           attach_slot_count=max(64, 2 * self.brokers * (self.publishers + 1)),
                           sequencer_lock=self.sequencer_lock, scanners=self.scanners, waiting=self.waiting,
                           thread_plan=self.thread_plan, memory=self.memory, profile=self.profile)

    def topic_config(self) -> TopicConfig:
        """The topic that is published to."""
        return TopicConfig(name=TOPIC, order=self.order, ack=self.ack, replication_factor=self.replication_factor)

    @property
    def messages(self) -> int:
        """Messages of all publishers together."""
        return self.total_bytes // self.message_bytes

    @property
    def framed_bytes(self) -> int:
        """What one message takes in a segment."""
        return FRAME_BYTES + (self.message_bytes + 7) // 8 * 8

    @property
    def batch_messages(self) -> int:
        """Messages of a full batch; for adaptive batches, of the smallest full one."""
        return max(1, (self.batch_bytes or ADAPTIVE_BATCH_BYTES_MIN) // self.framed_bytes)

    def round_messages(self) -> int:
        """Messages that one round may publish so that all of them can be read back."""
        numbers = layout_of(self.cluster_config("check")).numbers
        batch_bytes = (self.batch_messages * self.framed_bytes + 63) // 64 * 64
        # Every broker has segments that are not full, every attached publisher leases at each of them, and brokers that
        # run out at once ask for room at once.
        open_segments = self.brokers * (4 + 4 * self.publishers * -(-batch_bytes // numbers["segment_bytes"]))
        segments = max(numbers["segment_count"] - open_segments, numbers["segment_count"] // 8)
        by_segments = segments * numbers["segment_bytes"] // batch_bytes
        batches = min(by_segments, numbers["order_entry_count"])
        return max(self.publishers, int(ROUND_SHARE * batches) * self.batch_messages)

    def segment_messages(self) -> int:
        """Messages that fill every segment once."""
        numbers = layout_of(self.cluster_config("check")).numbers
        return int(numbers["segment_count"] * numbers["segment_bytes"] // self.framed_bytes)


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ConfigError(setting=f"{VARIABLES[name]} (--{name.replace('_', '-')})", value=repr(value), allowed=allowed)


def _number(low: int, high: int) -> Any:
    def parse(name: str, value: Any) -> int:
        allowed = f"a whole number from {low} to {high}"
        try:
            number = int(value)
        except (TypeError, ValueError):
            _refuse(name, value, allowed)
        if not low <= number <= high:
            _refuse(name, value, allowed)
        return number

    return parse


def _one_of(*numbers: int) -> Any:
    def parse(name: str, value: Any) -> int:
        if str(value) not in map(str, numbers):
            _refuse(name, value, f"one of {', '.join(map(str, numbers))}")
        return int(value)

    return parse


def _choice(*choices: str) -> Any:
    def parse(name: str, value: Any) -> str:
        if value not in choices:
            _refuse(name, value, ", ".join(choices))
        return str(value)

    return parse


def _size(name: str, value: Any) -> int:
    try:
        number = parse_bytes(value)
    except ConfigError as error:
        _refuse(name, value, str(error.details["allowed"]))
    if number < 1:
        _refuse(name, value, "1 byte or more")
    return number


def _batch_size(name: str, value: Any) -> int | None:
    return None if value == ADAPTIVE else _size(name, value)


_PARSERS: dict[str, Any] = {
    "transport": _choice(*TRANSPORTS), "brokers": _number(1, 64), "publishers": _number(1, PUBLISHERS_MAX),
    "message_bytes": _size, "total_bytes": _size, "batch_bytes": _batch_size, "order": _one_of(*ORDERS),
    "ack": _one_of(*ACKS), "replication_factor": _number(1, 64), "trials": _number(1, TRIALS_MAX),
    "sequencer_lock": _choice(*SEQUENCER_LOCKS), "waiting": _choice(*WAITINGS), "region_bytes": _size,
    "scanners": _number(1, 64), "thread_plan": _choice(*THREAD_PLANS), "network": _choice(*NETWORKS),
    "memory": _choice(*MEMORIES), "profile": lambda name, value: str(value),
}
