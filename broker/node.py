"""One broker process: the region, the stages and their threads, the gRPC server, the heartbeat."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def _die_with_parent(arguments: list[str]) -> None:
    """End when the parent ends, from the first moment on: a parent that died meanwhile sends no signal."""
    if "--parent" not in arguments:
        return
    parent = int(arguments[arguments.index("--parent") + 1])
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    _die_with_parent(sys.argv)

from broker.grpc_options import apply_process_tuning

apply_process_tuning()                  # before anything imports grpc

import argparse
import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from broker.bank import Bank
from broker.config import ClusterConfig, make_folder
from broker.crash import arm, parse_crash_points
from broker.data_directory import lock_broker_folder, refuse_half_moved, refuse_used
from broker.doorbell import Doorbell
from broker.durable_files import write_whole
from broker.errors import BrokerUnavailable, CxlmqError, MemoryLost
from broker.groups import GroupTable, read_groups
from broker.head import HeadDoorbell, HeadView, say_restored
from broker.layout import BrokerState
from broker.leadership import Leadership
from broker.log import BrokerLog
from broker.membership import Membership, RegionMembership
from broker.notifier import Notifier
from broker.order_lock import LOCK_MODES
from broker.payload_places import limits_of
from broker.pipeline import WAITING, Pipeline
from broker.records import pack, unpack
from broker.recovery import RecoveryPlan, make_plan
from broker.region import Region, attach_region, create_region, too_small
from broker.replica_folder import ReplicaFolder
from broker.replica_watch import ReplicaWatch
from broker.segments import PoolLeader, make_pool
from broker.stages.ack import AckStage
from broker.stages.attach import AttachStage
from broker.stages.delegation import Delegation
from broker.stages.directory import Directory
from broker.stages.receiver import Receiver
from broker.stages.reclaim import Reclaim
from broker.stages.release import Release
from broker.stages.replication import Replication
from broker.stages.seat import Seat
from broker.stages.sequencer import Scanner
from broker.stages.stage import Stage
from broker.stages.takeover import Takeover
from broker.stages.watch import Watch
from broker.topics import TopicTable
from sim.cxl.clock import SystemClock
from sim.cxl.memory import Memory, MemoryFault, Role
from sim.cxl.region import TmpfsFull, process_start_time

_log = logging.getLogger("cxlmq")

FOUNDER = 0                         # makes the region; any broker may be head
REGION_WAIT_SECONDS = 20.0
STRANDED_NS = 500_000_000           # what was not flushed for so long when all threads had ended never would have been
RECOVERY_SECONDS = 600.0            # for reading all replicas; a region comes when that is done
WARM_BYTES_MAX = 512 << 20          # what one broker touches ahead of use
MAP_SECONDS = 0.5                    # how often it looks for segments that others have touched
MAP_FROM_BYTES = 8 << 20             # of payload that went through this process
DRAIN_SECONDS = 2.0                 # for what is ordered and not on the disk yet
LOOK_SECONDS = 0.5                  # how often it looks for attached clients that are gone
HEAD_WAIT_SECONDS = 30.0
LEAVE_SECONDS = 2 * DRAIN_SECONDS   # for brokers of a cluster that was killed, and which end by themselves
BEATS_MISSED = 5                    # a broker is not away before it has missed so many
PIPELINE_BELL, REPLICATION_BELL = 0, 1


class BrokerNode:
    """All of one broker but its gRPC server: what stages share, and the threads that run them."""

    def __init__(self, config: ClusterConfig, broker: int, region: Region, founder: bool = False) -> None:
        self.config = config
        self.broker = broker
        self.region = region
        self.layout = region.layout
        self.pid = os.getpid()
        # First of all: whoever sees a new incarnation knows by it that the process before is gone.
        region.hold_broker(broker)
        self.clock = SystemClock()
        self.notifier = Notifier()
        region.hardware.be_broker(broker, config.host_numbers())
        self.memory = self._door(Role.ROLE_BROKER)
        self._say_starting()
        count = self.layout.numbers["broker_count"]
        self.doorbells = [self._bell(b, PIPELINE_BELL) for b in range(count)]
        self.replication_bells = [self._bell(b, REPLICATION_BELL) for b in range(count)]
        self.receiver_door = self._door(Role.ROLE_RECEIVER)
        self.log = BrokerLog(self.receiver_door, self.layout,
                             make_pool(self.receiver_door, self.layout, broker), broker)
        self.log.first_slot = config.counters_start
        self.acks = AckStage(self._door(Role.ROLE_ACK), self.log, self.notifier)
        self.attach = AttachStage(self.receiver_door, self.log, self.acks, self.clock,
                                  int(config.session_lease_seconds * 1e9))
        self.watch = Watch(self._door(Role.ROLE_DELIVERY), self.layout, self.notifier)
        self.head_bell = HeadDoorbell(self._door(Role.ROLE_BROKER), self.layout)
        self.receiver = Receiver(self.receiver_door, self.log, self.acks, self.doorbells[broker], self.head_bell)
        self.delivery_door = self._door(Role.ROLE_DELIVERY)
        self.head = HeadView(self._door(Role.ROLE_BROKER), self.layout)
        self.bank = Bank(self._door(Role.ROLE_ADMIN), self.layout)      # for topics and groups, while we are head
        self.bank.resign()
        self.topics = TopicTable(self._door(Role.ROLE_ADMIN), self.layout, self.ring_all, self.bank,
                                 config.counters_start)
        self.pool_leader: PoolLeader | None = None
        self.replica_watch: ReplicaWatch | None = None
        self.groups: GroupTable | None = None           # the server's; it writes where we are head
        self.group_lease_ns = int(config.group_lease_seconds * 1e9)
        self.incarnation = self.memory.fetch_add_word(self.layout.offset_of("control") + 8, 1) + 1
        seat_door = self._door(Role.ROLE_SEQUENCER)
        self.seats = [Seat(seat_door, self.layout) for _ in range(config.scanners + 1)]
        self.pipelines = self._pipelines()
        self.leadership = Leadership(
            seat_door, self.layout, self._membership(founder), self.incarnation << 8 | broker + 1, self._is_gone,
            self.seats, self._new_takeover, self._sit_down, self._stand_up, self._attend)
        self._watchers = 0
        self.was_ready = False
        self._stop_warming = threading.Event()
        self._warmer: threading.Thread | None = None

    def _say_starting(self) -> None:
        """Whoever sees our lock must not take "ready", which a process before us has left there, for ours."""
        at = self.layout.offset_of("broker", self.broker)
        self.memory.store_word(at, BrokerState.BROKER_STARTING)
        self.memory.flush_range(at, 8)
        self.memory.store_fence()

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _door(self, role: int) -> Memory:
        return self.region.memory(role, self.layout.offset_of("role_statistics", self.broker, int(role)))

    def _bell(self, broker: int, which: int) -> Doorbell:
        return Doorbell(self._door(Role.ROLE_BROKER), self.layout.offset_of("doorbell", broker, which))

    def ring_all(self) -> None:
        """Wake every broker's threads."""
        for bell in (*self.doorbells, *self.replication_bells):
            bell.ring_now()

    def _pipelines(self) -> list[Pipeline]:
        """The thread plan: lists of stages, each run by one thread."""
        delegation = Delegation(self._door(Role.ROLE_DELEGATION), self.log, self.head_bell)
        release = Release(self._door(Role.ROLE_RECLAIM), self.log)
        directory = self.directory = Directory(self._door(Role.ROLE_BROKER), self.log)
        scanners, reclaim = self.seats[:-1], self.seats[-1]
        self.replica_folder = self._replica_folder()
        self.replication = Replication(self._door(Role.ROLE_REPLICATION), self.layout, self.broker,
                                       self.replica_folder, self.clock, self.doorbells,
                                       self.config.replica_file_bytes)
        if self.config.thread_plan == "staged":
            # The stages of the broker's own log stay together: what one of them does to a topic the others must not
            # meet half done.
            plan = [[directory, self.attach, delegation, release], [self.acks], [self.watch],
                    *([seat] for seat in self.seats)]
        else:
            plan = [[directory, self.attach, delegation, scanners[0], self.acks, self.watch, release, reclaim],
                    *([seat] for seat in scanners[1:])]
        yield_ns = WAITING[self.config.waiting]
        pipelines = [self._pipeline(f"pipeline-{i}", stages, self.doorbells[self.broker], yield_ns)
                     for i, stages in enumerate(plan)]
        # The disk is slower than any yield is worth.
        pipelines.append(self._pipeline("replication", [self.replication], self.replication_bells[self.broker], 0))
        return pipelines

    def _pipeline(self, name: str, stages: Iterable[Stage], bell: Doorbell, yield_ns: int) -> Pipeline:
        return Pipeline(name, list(stages), bell, self.log, yield_ns)

    # ---- head -------------------------------------------------------------------------------------------------------

    @property
    def is_head(self) -> bool:
        """Whether this broker is head now."""
        return self.leadership.serves

    def _membership(self, founder: bool) -> Membership:
        config = self.config
        if config.membership == "etcd":
            from broker.etcd_membership import EtcdMembership

            return EtcdMembership(self._door(Role.ROLE_BROKER), self.layout, self.clock, self.broker, self.incarnation,
                                  f"{config.name}/{self.region.run_id}", config.etcd_endpoints,
                                  config.head_lease_seconds)
        return RegionMembership(self._door(Role.ROLE_BROKER), self.layout, self.clock, self.broker,
                                int(self.config.head_lease_seconds * 1e9), self.is_dead, founder)

    def is_dead(self, broker: int) -> bool:
        """Whether no process is this broker."""
        return not self.region.broker_lives(broker)

    def _is_gone(self, owner: int) -> bool:
        """Whether the process with this incarnation << 8 | broker + 1 stores nothing any more."""
        broker = (owner & 0xFF) - 1
        return self.broker_line(broker)["incarnation"] != owner >> 8 or not self.region.broker_lives(broker)

    def _new_takeover(self) -> Takeover:
        if self.config.sequencer_lock == "semaphore":
            self.region.renew_semaphore()       # the last head may have ended, or stopped, while it held it
        return Takeover(self._door(Role.ROLE_ADMIN), self.layout, self.clock, self.broker,
                        LOCK_MODES[self.config.sequencer_lock], self.config.scanners,
                        semaphore_name="/" + self.region.semaphore_name, order_memory=self._door(Role.ROLE_SEQUENCER))

    def _sit_down(self, takeover: Takeover) -> list[Stage]:
        """What a head runs: scanners, then reclaim."""
        order, count = takeover.order, self.layout.numbers["broker_count"]
        scanners = []
        for number in range(self.config.scanners):
            brokers = [b for b in range(count) if b % self.config.scanners == number]
            scanner = Scanner(order, self._door(Role.ROLE_SEQUENCER), self.clock, number, brokers, self.doorbells,
                              self.replication_bells)
            takeover.prepare(scanner)
            scanners.append(scanner)
        if self.config.pool == "leader":
            self.pool_leader = PoolLeader(self._door(Role.ROLE_SEQUENCER), order.layout, self.broker)
        self.directory.lead(order, scanners)
        self.topics.lead(order.layout)
        grace_seconds = max(self.config.replica_grace_seconds, BEATS_MISSED * self.config.heartbeat_ms / 1000)
        self.replica_watch = ReplicaWatch(self._door(Role.ROLE_SEQUENCER), order.layout, self.clock,
                                          int(grace_seconds * 1e9))
        if self.groups is not None:
            self.groups.begin_term(self.group_lease_ns)
        self.ring_all()
        return [*scanners, Reclaim(self._door(Role.ROLE_RECLAIM), order, self.doorbells, self.pool_leader)]

    def _stand_up(self) -> None:
        self.bank.resign()
        self.directory.lead(None, [])
        self.pool_leader = self.replica_watch = None

    def _attend(self) -> None:
        """While we are head, see which brokers keep replicas."""
        changed = self.replica_watch.look() if self.replica_watch is not None else []
        for broker, back in changed:
            _log.warning("broker %d %s", broker, "is back and keeps its replicas again" if back else
                         "is away: others keep the replicas that it had")
        if changed:
            self.ring_all()

    def _replica_folder(self) -> ReplicaFolder:
        return ReplicaFolder(self.config.replica_folder(self.broker), self.broker, self.region.run_id, self.config.name,
                             self.layout.numbers["broker_count"], self.topics.entry_of,
                             catalogue=bool(self.config.data_directory), limits=limits_of(self.layout.numbers))

    # ---- life -------------------------------------------------------------------------------------------------------

    async def resume(self) -> None:
        """Wait for a head; then know the topics, and what an earlier process of this broker has left."""
        deadline = time.monotonic() + HEAD_WAIT_SECONDS
        self.attach.keep_leases()
        while not self._knows_the_past():
            if self.head.serving():
                deadline = time.monotonic() + HEAD_WAIT_SECONDS
            elif time.monotonic() > deadline:
                raise BrokerUnavailable(f"no broker became head within {HEAD_WAIT_SECONDS:.0f} s", address="head")
            await asyncio.sleep(0.002)

    def _knows_the_past(self) -> bool:
        """One look at the topics and at what is to be given back; False while a head falls or none serves."""
        self.directory.step_once()
        return self.directory.complete and self.log.sweep() >= 0

    def start(self) -> None:
        """Run the stages."""
        for pipeline in self.pipelines:
            pipeline.start()

    def start_warming(self) -> None:
        """Touch cold segments in the background, ahead of use."""
        self._warmer = threading.Thread(target=self._warm, name="warmer", daemon=True)
        self._warmer.start()

    def _warm(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        touched, size = 0, self.layout.numbers["segment_bytes"]
        pool = self.pool_leader or self.log
        while touched < WARM_BYTES_MAX and not self._stop_warming.is_set() and pool.warm_segment():
            touched += size
        # Segments wander between brokers: each is a page fault every 64 KiB until this process has it mapped.
        unmapped = list(range(self.layout.numbers["segment_count"]))
        while unmapped and not self._stop_warming.wait(MAP_SECONDS):
            if self._copies_payload():
                unmapped = [segment for segment in unmapped if not self.log.map_segment(segment)]

    def _copies_payload(self) -> bool:
        """Whether payload goes through this process's mapping; that of attached clients goes through theirs."""
        copied = (self.receiver_door.statistics_dict()["bytes_in"], self.delivery_door.statistics_dict()["bytes_out"])
        return sum(copied) >= MAP_FROM_BYTES

    def stop(self) -> None:
        """End the threads; memory stays as it is."""
        self._stop_warming.set()
        for pipeline in self.pipelines:
            pipeline.stop()
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.replication.step_once() and time.monotonic() < deadline:
            pass                            # an orderly end leaves nothing behind that could be on the disk
        self.replication.close()
        if self._warmer is not None:
            self._warmer.join()

    def write_line(self, state: int, tcp: str = "", unix: str = "") -> None:
        """Announce this broker in the broker table."""
        at = self.layout.offset_of("broker", self.broker)
        if tcp:
            address = self.layout.offset_of("broker_address", self.broker)
            self.memory.write_bytes(address, pack("BrokerAddress", tcp_address=tcp, unix_address=unix))
            self.memory.store_fence()
        line = unpack("BrokerLine", self.memory.read_line_bytes(at))
        line.update(state=state, pid=os.getpid(), start_time=process_start_time(), heartbeat_ns=self.clock.now(),
                    incarnation=self.incarnation)
        self.memory.write_line_bytes(at, pack("BrokerLine", **line))
        self.memory.flush_range(at, 64)
        self.memory.store_fence()

    def look_after_memory(self, idle_ns: int | None = None) -> None:
        """Let the checker look for what was stored and never flushed; raise `MemoryLost` when we are cut off."""
        try:
            self.memory.raise_fault()
        except MemoryFault as fault:
            raise MemoryLost(broker=self.broker, reason=str(fault)) from fault
        checker = self.region.hardware.checker
        if checker is not None:
            checker.find_stranded(idle_ns)

    def raise_if_failed(self) -> None:
        """Raise what a stage met and could not pass on: a broker without that stage would stand still in silence."""
        for pipeline in self.pipelines:
            pipeline.raise_failure()

    def gone_clients(self) -> list[tuple[int, int]]:
        """Slots (number, generation) of attached clients that left, never came, or whose process is dead."""
        return [(slot["number"], slot["generation"]) for slot in self.attach.open_slots()
                if slot["left"] or not self.region.client_lives(slot["presence"])]

    def bump(self, word: int) -> None:
        """Change a version word of this broker's line and wake the head."""
        at = self.layout.offset_of("broker", self.broker) + 8 * word
        self.memory.store_word(at, self.memory.load_word(at) + 1)
        self.memory.flush_range(at, 8)
        self.memory.store_fence()
        self.head_bell.ring_now()

    def watch_commits(self, change: int) -> None:
        """Count the subscribers here: the sequencer wakes a broker that has any."""
        self._watchers += change
        at = self.layout.offset_of("broker", self.broker) + 32
        self.memory.store_word(at, self._watchers)
        self.memory.flush_range(at, 8)
        self.memory.store_fence()

    def broker_line(self, broker: int) -> dict[str, Any]:
        """A broker's line, with its addresses."""
        at = self.layout.offset_of("broker", broker)
        self.memory.invalidate_range(at, 64)
        line = unpack("BrokerLine", self.memory.read_line_bytes(at))
        address = self.layout.offset_of("broker_address", broker)
        if line["state"] != BrokerState.BROKER_READY:       # it may be writing its addresses just now
            return {**line, "tcp_address": "", "unix_address": ""}
        self.memory.invalidate_range(address, 256)
        return {**line, **unpack("BrokerAddress", self.memory.read_bytes(address, 256))}

    def live_brokers(self) -> list[int]:
        """Brokers that are ready and whose process lives."""
        return [b for b in range(self.layout.numbers["broker_count"])
                if self.broker_line(b)["state"] == BrokerState.BROKER_READY and self.region.broker_lives(b)]


async def serve(node: BrokerNode, stop: asyncio.Event) -> None:
    """Run a broker until `stop` is set."""
    from broker.server import BrokerServer

    node.leadership.start(node.config.heartbeat_ms / 1000)
    server = None
    try:
        await node.resume()
        server = BrokerServer(node)
        node.start()
        tcp, unix = await server.start()
        node.write_line(BrokerState.BROKER_READY, tcp, unix)
        node.was_ready = True
        node.ring_all()
        node.start_warming()
        while not stop.is_set():
            node.log.note_cpu(time.process_time_ns())
            node.look_after_memory()
            node.raise_if_failed()
            server.raise_if_failed()
            for slot, generation in node.gone_clients():
                await server.close_attached(slot, generation)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK_SECONDS)
    finally:
        node.leadership.stop()
        node.write_line(BrokerState.BROKER_STOPPING)
        if server is not None:
            await server.stop()
        node.stop()
        node.write_line(BrokerState.BROKER_STOPPED)     # now it is true: nothing of this broker's runs
        with contextlib.suppress(MemoryLost):
            node.look_after_memory(idle_ns=STRANDED_NS)


def _plan_recovery(config: ClusterConfig) -> RecoveryPlan:
    """What the data directory has, if a cluster with these settings can hold it. Raises `RecoveryError`."""
    from broker.recovery_check import check_limits

    assert config.data_directory
    folder = Path(config.data_directory)
    refuse_half_moved(folder)
    plan = make_plan(folder)
    groups, _ = read_groups(folder, {(topic.name, topic.options["created_ns"]) for topic in plan.topics})
    check_limits(config, plan, len(groups))
    return plan


def _recover(config: ClusterConfig, region: Region, plan: RecoveryPlan) -> None:
    """Fill the new region from the replicas in the data directory, before anybody else attaches to it."""
    from broker.group_service import RECOVERY_FILE
    from broker.restore import restore

    report = restore(region, plan, int(config.session_lease_seconds * 1e9))
    epoch = max((batch.record.fields["epoch"] for topic in plan.topics for batch in topic.batches), default=1)
    say_restored(region.memory(), region.layout, max(1, epoch))
    write_whole(config.folder / RECOVERY_FILE, json.dumps(report).encode())


def run_broker(config: ClusterConfig, broker: int, recover: bool = False, join: bool = False,
               run_id: int | None = None) -> None:
    """Run one broker until SIGTERM or SIGINT. Raises `CxlmqError` when it cannot start.

    Broker 0 makes the region, unless it is to `join` one; with `recover` it fills it from the replicas in the data
    directory first. `run_id`: join this run of the cluster and no other.

    Whoever leaves last at an orderly end removes the region. One that fails removes only what it has made itself and
    nobody has ever used: what others have written may be in no other place.
    """
    make_folder(config)
    founder = broker == FOUNDER and not join
    # Held as long as this process lives. It is made only when nothing is refused any more: a refusal changes nothing.
    held = lock_broker_folder(config.replica_folder(broker), wait_seconds=LEAVE_SECONDS) if (
        config.data_directory) else None
    if founder:
        if not recover:
            refuse_used(config)
        plan = _plan_recovery(config) if recover else None
        region = create_region(config, prepare=lambda created: _recover(config, created, plan) if plan else None)
    else:
        region = attach_region(config.name, run_id=run_id, folder_root=Path(config.runtime_directory),
                               timeout_seconds=RECOVERY_SECONDS if recover else REGION_WAIT_SECONDS)
    node, ended = None, False
    try:
        if config.data_directory and held is None:
            lock_broker_folder(config.replica_folder(broker), make=True)
        node = BrokerNode(config, broker, region, founder)
        arm(*parse_crash_points(config.crash_points).get(broker, ("", 1, False)))
        node.write_line(BrokerState.BROKER_STARTING)
        asyncio.run(_run_until_signal(node))
        ended = True
    except TmpfsFull as error:              # of what the model of a memory keeps beside the region
        raise too_small(config.name, error) from None
    finally:
        if ended or (founder and (node is None or not node.was_ready)):
            region.leave()
        region.close()


async def _run_until_signal(node: BrokerNode) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(node, stop)


def _report(error: CxlmqError, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": error.code, "message": error.message, "details": error.details}, default=str),
              file=sys.stderr)
    else:
        print(f"error: {error.message} ({error.code})", file=sys.stderr)


def _say_what_is_lost() -> None:
    """An exception that no caller can be given (a callback, a thread, a destructor) goes to the log, with its place."""
    def unraisable(lost: Any) -> None:
        _log.error("lost exception in %r", lost.object, exc_info=(lost.exc_type, lost.exc_value, lost.exc_traceback))

    def in_thread(lost: Any) -> None:
        name = lost.thread.name if lost.thread is not None else "a thread"
        _log.error("lost exception in %s", name, exc_info=(lost.exc_type, lost.exc_value, lost.exc_traceback))

    sys.unraisablehook, threading.excepthook = unraisable, in_thread


def main(arguments: list[str] | None = None, read: Callable[[], str] = sys.stdin.read) -> int:
    """`python -m broker.node --id K`: the configuration comes as JSON on standard input."""
    parser = argparse.ArgumentParser(prog="broker.node", description=main.__doc__)
    parser.add_argument("--id", type=int, required=True, help="number of this broker")
    parser.add_argument("--parent", type=int, help="process that this broker ends with")
    parser.add_argument("--join", action="store_true", help="attach to the region that is there, also as broker 0")
    parser.add_argument("--run-id", type=int, help="with --join: the run of the cluster that it is to be")
    parser.add_argument("--recover", action="store_true", help="rebuild from the replicas in data_directory")
    parser.add_argument("--json-errors", action="store_true", help="print an error as one JSON line")
    options = parser.parse_args(arguments)
    # Of ours alone: what clients do wrong is no news, and grpc would tell of every broken call.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _log.addHandler(handler)
    _say_what_is_lost()
    try:
        run_broker(ClusterConfig.from_json(read()), options.id, options.recover, options.join, options.run_id)
    except CxlmqError as error:
        _report(error, options.json_errors)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
