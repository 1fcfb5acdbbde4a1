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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker.assembly import Assembly, Door, Settings, TopicOf
from broker.config import ClusterConfig, make_folder
from broker.crash import arm, parse_crash_points
from broker.data_directory import lock_broker_folder, refuse_half_moved, refuse_used
from broker.durable_files import write_whole
from broker.errors import BrokerUnavailable, CxlmqError, MemoryLost
from broker.groups import read_groups
from broker.head import say_restored
from broker.layout import BrokerState
from broker.leadership import Leadership
from broker.membership import Membership, RegionMembership
from broker.payload_places import limits_of
from broker.pipeline import WAITING, Pipeline
from broker.recovery import RecoveryPlan, make_plan
from broker.region import Region, attach_region, create_region, too_small
from broker.replica_folder import ReplicaFolder
from broker.stages.seat import Seat
from broker.stages.takeover import Takeover
from sim.cxl.clock import SystemClock
from sim.cxl.memory import MemoryFault, Role
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


class BrokerNode(Assembly):
    """All of one broker but its gRPC server: its stages, the threads that run them, and what makes it head."""

    def __init__(self, config: ClusterConfig, broker: int, region: Region, founder: bool = False) -> None:
        self.config, self.region, self.pid = config, region, os.getpid()
        region.hold_broker(broker)
        region.hardware.be_broker(broker, config.host_numbers())
        super().__init__(region.layout, broker, self._open_door(broker), SystemClock(), self._settings(),
                         disk=self._make_folder, lives=region.client_lives)
        seat_door = self.door(Role.ROLE_SEQUENCER)
        self.seats = {name: Seat(seat_door, self.layout) for name in (
            *(f"scanner {number}" for number in range(config.scanners)), "reclaim")}
        self.pipelines = self._pipelines()
        self.leadership = Leadership(self, self._membership(founder), self._is_gone, list(self.seats.values()),
                                     self._begin_takeover)
        self.was_ready = False
        self._stop_warming = threading.Event()
        self._warmer: threading.Thread | None = None

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _open_door(self, broker: int) -> Door:
        return lambda role: self.region.memory(
            role, self.region.layout.offset_of("role_statistics", broker, int(role)))

    def _settings(self) -> Settings:
        config = self.config
        grace_seconds = max(config.replica_grace_seconds, BEATS_MISSED * config.heartbeat_ms / 1000)
        return Settings(
            session_lease_ns=int(config.session_lease_seconds * 1e9), replica_grace_ns=int(grace_seconds * 1e9),
            group_lease_ns=int(config.group_lease_seconds * 1e9), scanners=config.scanners, lock=config.sequencer_lock,
            semaphore="/" + self.region.semaphore_name, replica_file_bytes=config.replica_file_bytes,
            counters_start=config.counters_start, pid=self.pid, cluster=self.region.name, run_id=self.region.run_id)

    def _make_folder(self, topic_of: TopicOf) -> ReplicaFolder:
        numbers = self.region.layout.numbers
        return ReplicaFolder(self.config.replica_folder(self.broker), self.broker, self.region.run_id, self.config.name,
                             numbers["broker_count"], topic_of, catalogue=bool(self.config.data_directory),
                             limits=limits_of(numbers))

    def _pipelines(self) -> list[Pipeline]:
        """One for each thread."""
        yield_ns = WAITING[self.config.waiting]
        pipelines = [Pipeline(f"pipeline-{i}", stages, self.doorbells[self.broker], self.log, yield_ns)
                     for i, stages in enumerate(self.threads(self.config.thread_plan, self.seats))]
        # The disk is slower than any yield is worth.
        pipelines.append(Pipeline("replication", [self.replication], self.replication_bells[self.broker], self.log, 0))
        return pipelines

    # ---- head -------------------------------------------------------------------------------------------------------

    @property
    def is_head(self) -> bool:
        """Whether this broker is head now."""
        return self.leadership.serves

    def _membership(self, founder: bool) -> Membership:
        config = self.config
        if config.membership == "etcd":
            from broker.etcd_membership import EtcdMembership

            return EtcdMembership(self.door(Role.ROLE_BROKER), self.layout, self.clock, self.broker, self.incarnation,
                                  f"{config.name}/{self.region.run_id}", config.etcd_endpoints,
                                  config.head_lease_seconds)
        return RegionMembership(self.door(Role.ROLE_BROKER), self.layout, self.clock, self.broker,
                                int(self.config.head_lease_seconds * 1e9), self.is_dead, founder)

    def is_dead(self, broker: int) -> bool:
        """Whether no process is this broker."""
        return not self.region.broker_lives(broker)

    def _is_gone(self, owner: int) -> bool:
        """Whether the process with this incarnation << 8 | broker + 1 stores nothing any more."""
        broker = (owner & 0xFF) - 1
        return self.broker_line(broker)["incarnation"] != owner >> 8 or not self.region.broker_lives(broker)

    def _begin_takeover(self) -> Takeover:
        if self.config.sequencer_lock == "semaphore":
            self.region.renew_semaphore()       # the last head may have ended, or stopped, while it held it
        return self.new_takeover()

    # ---- life -------------------------------------------------------------------------------------------------------

    async def resume(self) -> None:
        """Wait for a head; then know the topics, and what an earlier process of this broker has left."""
        deadline = time.monotonic() + HEAD_WAIT_SECONDS
        self.attach.keep_leases()
        while not self.learn():
            if self.head.serving():
                deadline = time.monotonic() + HEAD_WAIT_SECONDS
            elif time.monotonic() > deadline:
                raise BrokerUnavailable(f"no broker became head within {HEAD_WAIT_SECONDS:.0f} s", address="head")
            await asyncio.sleep(0.002)

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
        pool = (self.leading and self.leading.pool_leader) or self.log
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
        assert self.replication is not None
        while self.replication.step_once() and time.monotonic() < deadline:
            pass                            # an orderly end leaves nothing behind that could be on the disk
        self.replication.close()
        if self._warmer is not None:
            self._warmer.join()

    def write_line(self, state: int, tcp: str = "", unix: str = "") -> None:
        """Announce this broker in the broker table."""
        self.line.say(state, os.getpid(), process_start_time(), tcp, unix)

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

    def broker_line(self, broker: int) -> dict[str, Any]:
        """A broker's line, with its addresses."""
        return self.line.read(broker)

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
            node.attached_clients.tend()
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
