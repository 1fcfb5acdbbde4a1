"""The region is lost with all hosts; what their disks have decides, and the product's own recovery fills a new region.

    loss ─► the life so far is judged ─► disks lose what was not synced ─► plan ─► check ─► restore ─► a new life
                                                                            └ against what the log had, and was promised

What is promised: what was acknowledged at level 2 is there, where it was; what is not there is named; nothing is there
that was not, and what is there of a client follows on what it had sent before.
"""

import os
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from broker.config import ClusterConfig, layout_of
from broker.errors import RecoveryError
from broker.head import say_restored
from broker.layout import Layout
from broker.recovery import RecoveredBatch, RecoveredTopic, RecoveryPlan, make_plan
from broker.recovery_check import check_limits
from broker.replica_files import path_descriptor
from broker.restore import restore
from sim.cluster.disks import PowerLost
from sim.cluster.ending import judge
from sim.cluster.hardware import HARDWARE, MappedHardware
from sim.cluster.history import NOBODY, Entry, Violation
from sim.cluster.scenario import KIB, LEASE_TICKS, Fault
from sim.cluster.witness import Witness, payload_sender
from sim.cxl.memory import Memory, Role

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

PROMISED = ("created_ns", "order", "ack", "replication_factor", "retention_bytes")
BEHIND_A_WRITE, CUT_STEPS = 0.5, 200        # how many hosts write before their power goes, and how long that takes
AWAY = 0.3                                  # how often a disk is away where files would be damaged
INTERRUPTED, CALLS_MAX = 0.3, 6             # how often a recovery is cut short, and after how many calls of its disk
RESUME_STEPS = 300                          # within so many steps all brokers of a new region look what there is
HEAD_STEPS = 30_000                         # and within so many one of them is head


class NewRegion:
    """What a recovery fills: a region without a file. The founder's cache is lost behind it: whatever it did not write
    back, others would never see."""

    def __init__(self, layout: Layout, hardware: MappedHardware, run_id: int) -> None:
        self.layout, self.hardware, self.run_id = layout, hardware, run_id

    def memory(self, role: int = Role.ROLE_ADMIN) -> Memory:
        """A door of host 0."""
        return self.hardware.door(0, int(role))


@dataclass(frozen=True)
class Lost:
    """What the log had when the region was lost."""

    entries: dict[int, Entry]               # by position, from what was reclaimed on
    end: int
    kept_from: int                          # position; what lies below was reclaimed
    damaged: bool                           # bits were flipped, or disks failed


def cut_power(world: "World", fault: Fault) -> None:
    """The power of all hosts goes: of some at once, of some between a write and its sync; then the region is lost."""
    random = world.scenario.random(f"loss at {fault.step} {world.scenario.schedule}")
    assert world.disks is not None
    for host in world.hosts:
        if host.powered and random.random() < BEHIND_A_WRITE:
            world.disks.cut_behind_a_write(host.number)
    world.at(world.step + random.randint(1, CUT_STEPS), lambda: lose_region(world, fault, random))


def lose_region(world: "World", fault: Fault, random: Random) -> None:
    """Lose the power of all hosts and the region; recover, as far as the disks allow. Raises `Violation`."""
    if world.arrive is not None:            # not again before somebody is head
        if not world.draining:
            world.at(world.step + CUT_STEPS, lambda: lose_region(world, fault, random))
        return
    _lose_hosts(world, random)
    for subscriber in world.subscribers:
        subscriber.empty()
    judge(world)
    assert world.disks is not None
    world.disks.lose_power(random)
    world.disks.bring_back()
    hit = []
    if fault.argument:
        hit = [world.disks.take_away(random)] if random.random() < AWAY else world.disks.flip_bits(random)
    world.note("disks", f"lose power; damaged or away: {', '.join(hit) or 'none'}")
    world.injected["file damaged or away"] += len(hit)
    world.damaged = world.damaged or bool(hit) or bool(world.disks.failed)
    lost = _what_there_was(world)
    plan = _plan(world, lost)
    if plan is None:
        return
    found = _check_topics(world, plan, lost)
    if found is None:
        return
    _check_plan(world, found, lost)
    _begin_again(world, plan, found, lost, random)


def _lose_hosts(world: "World", random: Random) -> None:
    for host in world.hosts:
        if host.powered:
            world.hardware.crash(host.number, random.choice(world.scenario.policies))
            host.lose_power()
        host.powered, host.booting, host.gone = False, False, True
    if world.witness.check_now():
        raise Violation(*world.witness.describe())


def _what_there_was(world: "World") -> Lost:
    log = world.log()
    reclaimed = world.witness.frontiers(world.topic.number)["reclaimed"]
    end = log[-1].position + log[-1].count if log else 0
    return Lost({each.position: each for each in log}, end,
                log[reclaimed].position if reclaimed < len(log) else end, world.damaged)


# ---- the plan ------------------------------------------------------------------------------------------------------


def _acknowledged(world: "World", lost: Lost, level: int) -> list[tuple[Entry, Any]]:
    """What was acknowledged at this level at least, and was not reclaimed."""
    where = {(each.client, each.first): each for each in lost.entries.values()}
    return [(where[key], each) for each in world.history.operations
            if each.outcome == "ok" and each.level >= level and (key := (each.client, each.first)) in where
            and where[key].position >= lost.kept_from]


def _plan(world: "World", lost: Lost) -> RecoveryPlan | None:
    """The product's plan; None when there is nothing to recover from, or what all depends on is damaged."""
    assert world.disks is not None
    try:
        return make_plan(world.disks.folder)
    except RecoveryError as error:
        world.note("recovery", f"refused: {error.details.get('file') and 'a file is damaged'}")
        if not lost.damaged and (world.losses or _acknowledged(world, lost, 2)):
            raise Violation("A2", f"nothing was damaged, and there is no recovery: {error}") from None
        return None


def _check_topics(world: "World", plan: RecoveryPlan, lost: Lost) -> RecoveredTopic | None:
    """Deleted topics stay deleted, ours is there."""
    found = {topic.name: topic for topic in plan.topics}
    if "earlier" in found and not lost.damaged:
        raise Violation("N", "a topic whose deletion was answered is there again")
    topic = found.get(world.topic.name)
    if topic is None and not lost.damaged:
        raise Violation("A2", "the topic is not there, and its creation was answered")
    if topic is not None and any(topic.options[key] != getattr(world.topic, key) for key in PROMISED):
        raise Violation("I", f"the topic comes back as {topic.options}, it was {world.topic}")
    if topic is None or len(found) > 1:
        return None                         # nobody's life goes on in a region without it
    return topic


def _check_plan(world: "World", topic: RecoveredTopic, lost: Lost) -> None:
    """What is restored was there, what is not restored is named, and both cover the log."""
    if topic.first_position > lost.kept_from:
        raise Violation("A2", f"the plan takes what is below {topic.first_position} for reclaimed; kept was everything "
                              f"from {lost.kept_from} on")
    parts = [(each.record.position, each.record.end) for each in topic.batches]
    parts += [(each.first, each.end) for each in topic.lost]
    position = topic.first_position
    for first, end in sorted(parts):
        if first != position:
            raise Violation("I", f"the plan has {first} to {end - 1} behind {position - 1}: what lies between is "
                                 "neither there nor named")
        position = end
    if position != topic.end_position or topic.end_position > lost.end:
        raise Violation("M", f"the plan ends at {position}, new messages go to {topic.end_position}; the log had ended "
                             f"at {lost.end}")
    for batch in topic.batches:
        _check_batch(batch, lost)
    restored = {each.record.position for each in topic.batches}
    for entry, operation in _acknowledged(world, lost, 2):
        if entry.position not in restored and entry.position >= topic.first_position and not lost.damaged:
            raise Violation("A2", f"message {entry.first} of client {entry.client} was acknowledged at level 2 at step "
                                  f"{operation.settled}, and no disk has it: position {entry.position}")
        if entry.position >= topic.end_position and not lost.damaged:
            raise Violation("M", f"new messages go to {topic.end_position}, and {entry.position} was acknowledged at "
                                 "level 2")
    for each in topic.lost:
        if each.reason in ("damaged", "missing") and each.first >= lost.kept_from and not lost.damaged:
            raise Violation("I", f"the plan calls {each.first} to {each.end - 1} {each.reason}, and no file was "
                                 "damaged")


def _check_batch(batch: RecoveredBatch, lost: Lost) -> None:
    """A batch is the one that was at its position."""
    fields, position = batch.record.fields, batch.record.position
    with path_descriptor(batch.path) as descriptor:
        payload = os.pread(descriptor, fields["payload_bytes"], batch.record.payload_offset)
    sender, entry = payload_sender(payload, fields["message_count"]), lost.entries.get(position)
    if sender is None or entry is None or (sender, fields["message_count"]) != (
            (entry.client, entry.first), entry.count):
        raise Violation("N", f"the plan has {sender} at position {position} from {batch.path.name}; the log had "
                             f"{entry}")


# ---- the new region ------------------------------------------------------------------------------------------------


def _config(world: "World", plan: RecoveryPlan, random: Random) -> ClusterConfig:
    """Settings for the new region: some others than those of the one that is lost, but such as can hold the plan."""
    scenario, disks, numbers = world.scenario, world.disks, world.layout.numbers
    assert disks is not None
    config = ClusterConfig(
        name="simulated", brokers=scenario.hosts, topic_count_max=numbers["topic_count_max"],
        region_bytes=scenario.region_bytes * random.choice((1, 1, 2)), ring_slot_count=random.choice((16, 64)),
        order_entry_count=random.choice((scenario.entries, 64, 256)), session_count_max=8 * scenario.hosts,
        cursor_count_max=4 * scenario.hosts, segment_bytes=random.choice((4 * KIB, 16 * KIB)),
        message_bytes_max=8 * KIB, batch_bytes_max=16 * KIB, attach_slot_count=0, scanners=scenario.scanners,
        pool=random.choice(("atomic", "partitioned", "leader")), data_directory=str(disks.folder))
    try:
        check_limits(config, plan)
    except RecoveryError as error:
        world.note("recovery", f"asked for {error.settings}")
        config = msgspec.structs.replace(config, **error.settings)
        try:
            check_limits(config, plan)
        except RecoveryError as again:
            raise Violation("I", f"the settings that recovery asked for do not hold the plan: {again}") from None
    return config


def _restore(world: "World", plan: RecoveryPlan, layout: Layout, random: Random) -> MappedHardware:
    """A region that the product has filled."""
    scenario = world.scenario
    hosts = len(world.hosts)
    hardware = HARDWARE[scenario.memory](layout, hosts, random, "evict" in scenario.kinds)
    region = NewRegion(layout, hardware, world.settings.run_id)
    restore(region, plan, LEASE_TICKS * scenario.tick_ns, world.clock)
    epoch = max((each.record.fields["epoch"] for topic in plan.topics for each in topic.batches), default=1)
    say_restored(region.memory(), layout, max(1, epoch))
    hardware.crash(0, "lost")
    hardware.restart(0)
    return hardware


def _interrupt(world: "World", plan: RecoveryPlan, config: ClusterConfig, random: Random) -> RecoveryPlan:
    """Let the power go in the middle of a recovery, too; the plan that there is then."""
    disks = world.disks
    assert disks is not None
    disks.calls_left = random.randrange(CALLS_MAX)
    try:
        _restore(world, plan, layout_of(config), random)
    except PowerLost:
        world.injected["power lost in a recovery"] += 1
    disks.calls_left = -1
    disks.lose_power(random)
    again = make_plan(disks.folder)
    for one, other in zip([_said(each) for each in plan.topics], [_said(each) for each in again.topics], strict=True):
        if one != other:
            raise Violation("A2", "a recovery that was cut short changed what the next one finds: "
                                  f"{[pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]}")
    return again


def _said(topic: RecoveredTopic) -> tuple[Any, ...]:
    """What a plan says of a topic: why something is lost may be told otherwise, when it was given up before."""
    return (topic.name, topic.first_position, topic.end_position, [each.record.position for each in topic.batches],
            [(each.first, each.end) for each in topic.lost],
            [(each.client_id, each.epoch, each.expected, each.in_log) for each in topic.sessions])


def _begin_again(world: "World", plan: RecoveryPlan, topic: RecoveredTopic, lost: Lost, random: Random) -> None:
    """Restore, and let hosts and clients live there."""
    world.losses += 1
    world.lost_at = world.step
    world.settings = replace(world.settings, run_id=world.settings.run_id + 1)
    config = _config(world, plan, random)
    if random.random() < INTERRUPTED:
        plan = _interrupt(world, plan, config, random)
        topic = next(each for each in plan.topics if each.name == topic.name)
        world.settings = replace(world.settings, run_id=world.settings.run_id + 1)
    layout = layout_of(config)
    hardware = _restore(world, plan, layout, random)
    world.note("recovery", f"{len(topic.batches)} batches from {topic.first_position} on, new ones to "
                           f"{topic.end_position}; lost: {[(each.first, each.end) for each in topic.lost]}")
    for host in world.hosts:
        host.assembly.close()
    _account(world, topic, lost)
    world.layout, world.hardware = layout, hardware
    _look(world, topic)
    _start_hosts(world, random)


def _account(world: "World", topic: RecoveredTopic, lost: Lost) -> None:
    """What the history is from here on: what was reclaimed, what is lost."""
    history = world.history
    restored = {each.record.position for each in topic.batches}
    history.before += [each for each in lost.entries.values()
                       if each.position < topic.first_position and each.client != NOBODY]
    gone = [each for each in lost.entries.values() if each.client != NOBODY
            and each.position >= topic.first_position and each.position not in restored]
    world.restored = {(position, (lost.entries[position].client, lost.entries[position].first))
                      for position in restored}
    told = {(each.client, each.first) for each in history.operations if each.settled >= 0}
    below = [(each.first, each.end) for each in topic.lost if each.reason != "unsynced"]
    for entry in gone:
        numbers = [(entry.client, number) for number in range(entry.first, entry.first + entry.count)]
        world.named.update(numbers)
        if (entry.client, entry.first) in told or any(first <= entry.position < end for first, end in below):
            history.lost.update(numbers)
    if lost.damaged:                        # there may be fewer disks by now that have it
        for operation in history.operations:
            operation.replicas = 0 if operation.outcome == "ok" else operation.replicas
    history.final = []
    history.reads.clear()
    history.cursors.clear()
    history.epochs.clear()
    history.errors.clear()
    history.marks = [each for each in history.marks if each[0].startswith("epoch of client")]


def _look(world: "World", topic: RecoveredTopic) -> None:
    """A witness of the new region, which knows what was before."""
    history, due = world.history, dict[int, int]()
    for entry in history.before:
        due[entry.client] = max(due.get(entry.client, 0), entry.first + entry.count)
    numbers = 3 * max(world.scenario.batches, 10) + 3
    witness = Witness(world.hardware.truth, world.layout, world.scenario.publishers + 2, numbers)
    witness.gives_up = world.witness.gives_up
    world.first_position, world.restored_end = topic.first_position, topic.end_position
    world.restored_entries = world.hardware.truth.load_word(world.layout.offset_of("topic_order", 0))
    witness.recovered(0, topic.first_position, world.restored_entries, due, history.lost, world.witness.hash)
    world.witness = witness
    world.schedule.look_at(witness)


def _start_hosts(world: "World", random: Random) -> None:
    """Start all brokers; one of them takes over, and each goes on when it knows what there is."""
    world.hosts = world.new_hosts()
    for host in world.hosts:
        host.start()
        host.powered, host.booting = False, True
        world.at(world.step + random.randint(1, RESUME_STEPS), host.learn)
    losses = world.losses
    world.arrive = lambda host: _arrive(world, host)
    world.at(world.step + HEAD_STEPS, lambda: _require_head(world, losses))
    world.allow()


def _require_head(world: "World", losses: int) -> None:
    if world.arrive is not None and world.losses == losses:
        raise Violation("B", f"nobody is head {HEAD_STEPS} steps after a recovery")


def _arrive(world: "World", host: "Host") -> None:
    """A head serves, and the first host knows what there is: it is what the plan said. Clients come."""
    world.arrive = None
    world.topic = host.assembly.topics.find(world.topic.name)
    if world.witness.check_now():
        raise Violation(*world.witness.describe())
    log = world.log()
    if {(each.position, (each.client, each.first)) for each in log if each.client != NOBODY} != world.restored:
        raise Violation("A2", "the new region has not what the plan said")
    for publisher in world.publishers:
        publisher.meet(world.topic)
    for subscriber in world.subscribers:
        subscriber.meet(world.topic)
