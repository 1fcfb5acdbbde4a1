"""The end of a run: draining, and what must hold when all is quiet."""

from collections import defaultdict
from typing import TYPE_CHECKING

from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader, ReadError, ReadStatus
from broker.replica_files import Damage, ReplicaFile, find_files, read_records
from sim.cluster.history import NOBODY, Read, Violation, check, check_a2
from sim.cluster.scenario import LEASE_TICKS
from sim.cluster.witness import payload_sender

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

DRAIN_STEPS = 60_000                        # within so many steps after the last fault everything has its answer
REOPENINGS = 8                              # of one client, of what was under way and of answers that came late
QUIET_STEPS = 2 * LEASE_TICKS            # a session whose publisher died is fenced within that


def drain(world: "World") -> None:
    """Let everything that is under way come to its end."""
    world.draining = True
    world.unreliable = False
    until = world.step + DRAIN_STEPS
    epochs = [publisher.epoch for publisher in world.publishers]
    if not any(host.powered for host in world.hosts) and world.arrive is None:
        return
    while world.step < until:
        world.advance(world.step + 500)
        if world.arrive is None and all(publisher.finished for publisher in world.publishers) and not any(
                reader.behind for reader in world.subscribers):
            break
    world.advance(world.step + QUIET_STEPS)
    for publisher, epoch in zip(world.publishers, epochs, strict=True):
        if world.recovers and publisher.epoch > epoch + REOPENINGS:
            world.history.leftovers.append(f"after the last fault the session of client {publisher.client} ended again "
                                           f"and again: epochs {epoch} to {publisher.epoch}")
    waiting = ", ".join(f"{reader.name} ({reader.reading.state.value}) at {reader.expected}, {reader.behind} behind"
                        for reader in world.subscribers if reader.behind)
    if waiting and world.recovers:
        world.history.leftovers.append(f"{DRAIN_STEPS} steps after the last fault not given out: {waiting}")
    late = [publisher for publisher in world.publishers if not publisher.finished]
    if late and world.recovers:
        states = ", ".join(f"client {each.client} ({each.state}: {len(each.operations)} without an outcome, "
                           f"{len(each.session.pending)} not sent)" for each in late)
        world.history.leftovers.append(f"{DRAIN_STEPS} steps after the last fault without an answer: {states}")


def judge(world: "World") -> None:
    """Fill the history in, and run every checker on it. Raises `Violation`."""
    history, topic = world.history, world.topic
    if world.witness.check_now():
        raise Violation(*world.witness.describe())
    history.log = world.log()
    live = [host for host in world.hosts if host.powered]
    history.replicated = replicated(world)
    if not world.witness.has_head():
        history.reclaimed_index = len(history.log)      # nobody to say what counts: the next head would
        check(history)
        return
    if live:
        for host in live:
            _read_all(world, host)
        _check_counts(world)
    history.reclaimed_index = OrderReader(world.hardware.truth, world.layout, topic.number, topic.generation
                                          ).frontiers()["reclaimed_index"]
    if not live:
        history.final = world_reads(world)
    check(history)


def world_reads(world: "World") -> list[Read]:
    """What a reader past all caches gets: everything that is kept."""
    topic = world.topic
    reader = OrderReader(world.hardware.truth, world.layout, topic.number, topic.generation)
    reader.move_to(reader.frontiers()["reclaimed_index"])
    return _frames(world, reader)


def _frames(world: "World", reader: OrderReader) -> list[Read]:
    found = list[Read]()
    index = reader.index
    while True:
        try:
            if not (frame := reader.read_frame(64 << 10)):
                return found
        except ReadError as error:
            if not pass_lost(world, error):
                raise
            reader.move_to(index := reader.index + 1)
            continue
        found += world.reads_of(index, pb.SubscribeResponse.FromString(frame).batches, payload_sender)
        index = reader.index


def pass_lost(world: "World", error: ReadError) -> bool:
    """Whether a reader was told of a range that a recovery has named as lost."""
    if error.status != ReadStatus.READ_GONE:
        return False
    entry = world.witness.entry(world.topic.number, error.index)
    if (error.first, error.end) != (entry["position"], entry["position"] + entry["count"]):
        raise Violation("I", f"{error}, and lost are {entry['position']} to {entry['position'] + entry['count'] - 1}")
    return entry["client"] == NOBODY


def _read_all(world: "World", host: "Host") -> None:
    """A last reader at a host: it sees everything that is kept, and the same as all others."""
    topic, history = world.topic, world.history
    reader = OrderReader(host.delivery_door, world.layout, topic.number, topic.generation)
    reader.move_to(reader.frontiers()["reclaimed_index"])
    try:
        history.final = _frames(world, reader)
    except ReadError as error:
        history.errors.append((f"the last reader at host {host.number}: {error}", False))
    history.reads[f"the last reader at host {host.number}"] = history.final


def _check_counts(world: "World") -> None:
    """When all is quiet, counters say what is there, and rings are empty."""
    topic, leftovers = world.topic, world.history.leftovers
    if not world.recovers:
        return
    for host in world.hosts:
        counts = world.witness.counts(topic.number, host.number)
        if counts["ordered"] != counts["in_log"]:
            leftovers.append(f"broker {host.number}: {counts['in_log']} messages in the log, its line says "
                             f"{counts['ordered']} are ordered")
        if not host.powered:
            continue
        log = host.log.topic_state(topic.number)
        if log["tail"] != log["head"]:
            leftovers.append(f"broker {host.number}: slots {log['tail']} to {log['head']} are still in use")


def check_disks(world: "World") -> None:
    """What is acknowledged at level 2 by now is on its disks now: later they catch up, or others take their place."""
    history = world.history
    told = len(history.errors)
    history.replicated = replicated(world)
    del history.errors[told:]               # damage is judged in the end
    check_a2(history)


def replicated(world: "World") -> dict[tuple[int, int], int]:
    """How many disks have each batch (client, number of its first message), by the replica files themselves."""
    disks: dict[tuple[int, int], set[int]] = defaultdict(set)
    if world.scenario.loses:                # what is reclaimed need not be on a disk any more
        for entry in (*world.history.before, *world.log()[:world.witness.frontiers(world.topic.number)["reclaimed"]]):
            disks[entry.client, entry.first].update(range(world.scenario.hosts))
    for host in world.hosts if world.disks is not None else ():
        for file in find_files(world.replica_folder(host.number)):
            data = file.path.read_bytes()
            for record in read_records(file):
                if isinstance(record, Damage):
                    world.history.errors.append((f"{file.path.name}: {record.what}",
                                                 not host.powered or not _is_sound(world, file)))
                elif record.fields["message_count"]:
                    payload = data[record.payload_offset:record.payload_offset + record.fields["payload_bytes"]]
                    sender = payload_sender(payload, record.fields["message_count"])
                    if sender is None:
                        raise Violation("N", f"{file.path.name} holds at position {record.position} what nobody sent")
                    if file.run_id != world.settings.run_id and (record.position, sender) not in world.restored:
                        continue            # a recovery gave it up
                    disks[sender].add(host.number)
    return {sender: len(hosts) for sender, hosts in disks.items()}


def _is_sound(world: "World", file: ReplicaFile) -> bool:
    """Whether there is no reason for damage in a file: it is of this run, and no disk has failed."""
    assert world.disks is not None
    return file.run_id == world.settings.run_id and not world.disks.failed
