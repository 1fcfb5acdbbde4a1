"""Whether a cluster with these settings can hold everything that a recovery plan has; if not, the settings that can.

Looked at before anything exists: a refusal leaves every file, and the shared memory, as they were.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec

from broker.config import MIB, ClusterConfig, chosen_settings, layout_of
from broker.errors import ConfigError, RecoveryError, RegionTooSmall
from broker.layout import Layout
from broker.payload_places import LOST_COUNT_MAX, NoRoom, Placement
from broker.recovery import RecoveredBatch, RecoveryPlan
from broker.replica_files import path_descriptor
from broker.wire import payload_status
from sim.cxl.memory import MappedMemory
from sim.cxl.region import private_mapping

REGION_BYTES_MAX = 1 << 46
ORDER_ENTRY_COUNT_MAX = 32768
MESSAGE_HEADER_BYTES = 8


def check_limits(config: ClusterConfig, plan: RecoveryPlan, group_count: int = 0) -> None:
    """Raise `RecoveryError`, with the settings that can hold everything as `settings`, unless these can."""
    said, settings = [], dict[str, int]()
    for setting, value, what in _needs(config, plan, group_count):
        said.append(f"{what}, and {setting} is {getattr(config, setting)}")
        settings[setting] = value
    if not settings and _holds(config, plan):
        return
    if not said:
        said.append(f"the messages do not fit into a region of {config.region_bytes} bytes (region_bytes)")
    region_bytes = _region_bytes(config, plan, settings, group_count)
    if region_bytes != config.region_bytes:
        settings["region_bytes"] = region_bytes
    text = ", ".join(f"{setting} = {value}" for setting, value in settings.items())
    raise RecoveryError(folder=plan.folder, settings=settings, reason=(
        f"{'; '.join(said)}. Start it with {text}. Nothing was changed"))


def _needs(config: ClusterConfig, plan: RecoveryPlan, group_count: int) -> Iterator[tuple[str, int, str]]:
    """(setting, the value that it must have at least, why) for each one that is too small by itself."""
    factor = max((topic.options["replication_factor"] for topic in plan.topics), default=1)
    if factor > config.brokers:
        yield "brokers", factor, f"a topic has replication factor {factor}"
    if len(plan.topics) > config.topic_count_max:
        yield "topic_count_max", len(plan.topics), f"there are {len(plan.topics)} topics"
    if group_count > config.group_count_max:
        yield "group_count_max", group_count, f"there are {group_count} consumer groups"
    every = [batch for topic in plan.topics for batch in topic.batches]
    message = _largest_message(every, config.message_bytes_max)
    if message > config.message_bytes_max:
        yield "message_bytes_max", message, f"there is a message of {message} bytes"
    batch = max((each.record.fields["payload_bytes"] for each in every), default=0)
    if batch > max(config.batch_bytes_max, max(message, config.message_bytes_max) + 64):
        yield "batch_bytes_max", batch, f"there is a batch of {batch} bytes"
    yield from _order_entries(config, plan)


def _order_entries(config: ClusterConfig, plan: RecoveryPlan) -> Iterator[tuple[str, int, str]]:
    limits = plan.limits
    if (limits.get("order_entry_count", 1 << 62) <= config.order_entry_count
            and config.segment_bytes <= limits.get("segment_bytes", 0) and config.brokers <= limits["broker_count"]):
        return                                  # what the last region could not hold either, a large one may drop
    most = max((len(topic.batches) + 2 + sum(-(-(each.end - each.first) // LOST_COUNT_MAX) for each in topic.lost)
                for topic in plan.topics), default=0)
    wanted = 1 << (-(-most * 4 // 3) - 1).bit_length() if most > 1 else 0
    if config.order_entry_count < wanted <= ORDER_ENTRY_COUNT_MAX:
        yield "order_entry_count", wanted, f"a topic has {most} batches"


def _largest_message(batches: list[RecoveredBatch], limit: int) -> int:
    """The size of the largest message, or `limit` when none is larger."""
    for batch in batches:
        if batch.record.fields["payload_bytes"] - MESSAGE_HEADER_BYTES <= limit:
            continue
        with path_descriptor(batch.path) as descriptor:
            payload = os.pread(descriptor, batch.record.fields["payload_bytes"], batch.record.payload_offset)
        while (status := payload_status(payload, batch.record.fields["message_count"], limit)) > 0:
            limit = status
    return limit


def _holds(config: ClusterConfig, plan: RecoveryPlan) -> bool:
    """Whether the payload has room, by placing it into a region that is only thought of."""
    try:
        layout: Layout = layout_of(config)
    except RegionTooSmall:
        return False
    if any(len(topic.batches) for topic in plan.topics):
        try:
            memory = MappedMemory(private_mapping(layout.numbers["segments"]))  # without the segments themselves
            Placement(memory, layout, plan.limits).place([replace(topic) for topic in plan.topics])
        except (NoRoom, OSError):               # or its tables alone are more than this machine has
            return False
    return True


def _region_bytes(config: ClusterConfig, plan: RecoveryPlan, settings: dict[str, int], group_count: int) -> int:
    """The size of a region that holds everything with these settings, whether the others stay or follow the size."""
    chosen = _chosen(config)
    payload = sum(each.record.fields["payload_bytes"] for topic in plan.topics for each in topic.batches)
    region_bytes = config.region_bytes
    while region_bytes < REGION_BYTES_MAX:
        others = [settings, {**dict.fromkeys(chosen, 0), **settings}]
        if region_bytes >= payload and all(
                _works(config, plan, {**each, "region_bytes": region_bytes}, group_count) for each in others):
            return region_bytes
        region_bytes = (max(region_bytes + region_bytes // 4, payload) + MIB) // MIB * MIB
    raise RecoveryError(folder=plan.folder, reason=(
        "no region can hold what is there with these settings: leave out the settings of sizes, so that they follow "
        "the size of the region"))


def _chosen(config: ClusterConfig) -> list[str]:
    """The settings that are as they would have been chosen: with another size they are chosen anew."""
    size, brokers, pool = config.region_bytes, config.brokers, config.pool
    topics = config.topic_count_max
    if topics == chosen_settings(size, 0, brokers, pool)["topic_count_max"]:
        topics = 0
    return [setting for setting, value in chosen_settings(size, topics, brokers, pool).items()
            if getattr(config, setting) == value and not (topics and setting == "topic_count_max")]


def _works(config: ClusterConfig, plan: RecoveryPlan, settings: dict[str, Any], group_count: int) -> bool:
    try:
        other = msgspec.structs.replace(config, **settings)
    except ConfigError:
        return False
    return not list(_needs(other, plan, group_count)) and _holds(other, plan)
