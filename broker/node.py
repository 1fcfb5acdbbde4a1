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
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from broker.config import ClusterConfig, make_folder
from broker.doorbell import Doorbell
from broker.errors import CxlmqError, MemoryLost, RegionForeign
from broker.head import HeadView
from broker.layout import BrokerState
from broker.log import BrokerLog
from broker.notifier import Notifier
from broker.order_lock import LOCK_MODES
from broker.pipeline import WAITING, Pipeline
from broker.records import pack, unpack
from broker.region import Region, attach_region, create_region
from broker.replica_files import ReplicaFolder
from broker.segments import PoolLeader, make_pool
from broker.stages.ack import AckStage
from broker.stages.attach import AttachStage
from broker.stages.delegation import Delegation
from broker.stages.directory import Directory
from broker.stages.receiver import Receiver
from broker.stages.reclaim import Reclaim
from broker.stages.release import Release
from broker.stages.replication import Replication
from broker.stages.sequencer import OrderState, Scanner
from broker.stages.stage import Stage
from broker.stages.watch import Watch
from broker.topics import TopicTable
from sim.cxl.clock import SystemClock
from sim.cxl.memory import Memory, MemoryFault, Role
from sim.cxl.region import host_identity, process_alive, process_start_time

HEAD = 0
REGION_WAIT_SECONDS = 20.0
STRANDED_NS = 500_000_000           # what was not flushed for so long when all threads had ended never would have been
RECOVERY_SECONDS = 600.0            # for reading all replicas; a region comes when that is done
WARM_BYTES_MAX = 512 << 20          # what one broker touches ahead of use
MAP_SECONDS = 0.5                    # how often it looks for segments that others have touched
DRAIN_SECONDS = 2.0                 # for what is ordered and not on the disk yet
PIPELINE_BELL, REPLICATION_BELL = 0, 1


class BrokerNode:
    """All of one broker but its gRPC server: what stages share, and the threads that run them."""

    def __init__(self, config: ClusterConfig, broker: int, region: Region) -> None:
        self.config = config
        self.broker = broker
        self.region = region
        self.layout = region.layout
        self.is_head = broker == HEAD
        self.pid = os.getpid()
        self.host = host_identity()
        self.clock = SystemClock()
        self.notifier = Notifier()
        region.hardware.be_broker(broker, config.host_numbers())
        self.memory = self._door(Role.ROLE_BROKER)
        count = self.layout.numbers["broker_count"]
        self.doorbells = [self._bell(b, PIPELINE_BELL) for b in range(count)]
        self.replication_bells = [self._bell(b, REPLICATION_BELL) for b in range(count)]
        receiver_door = self._door(Role.ROLE_RECEIVER)
        self.log = BrokerLog(receiver_door, self.layout, make_pool(receiver_door, self.layout, broker), broker)
        self.acks = AckStage(self._door(Role.ROLE_ACK), self.log, self.notifier)
        self.attach = AttachStage(receiver_door, self.log, self.acks, self.clock,
                                  int(config.session_lease_seconds * 1e9))
        self.watch = Watch(self._door(Role.ROLE_DELIVERY), self.layout, self.notifier)
        self.receiver = Receiver(receiver_door, self.log, self.acks, self.doorbells[broker], self.doorbells[HEAD])
        self.delivery_door = self._door(Role.ROLE_DELIVERY)
        self.head = HeadView(self._door(Role.ROLE_BROKER), self.layout)
        self.topics = TopicTable(self._door(Role.ROLE_ADMIN), self.layout, self.ring_all)
        self.scanners: list[Scanner] = []
        self.order: OrderState | None = None
        self.pool_leader: PoolLeader | None = None
        self.pipelines = self._pipelines()
        self._watchers = 0
        self._stop_warming = threading.Event()
        self._warmer: threading.Thread | None = None

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
        delegation = Delegation(self._door(Role.ROLE_DELEGATION), self.log, self.doorbells[HEAD])
        release = Release(self._door(Role.ROLE_RECLAIM), self.log)
        head_stages = self._head_stages() if self.is_head else []
        directory = Directory(self._door(Role.ROLE_BROKER), self.log, self.order, self.scanners)
        self.replication = Replication(self._door(Role.ROLE_REPLICATION), self.layout, self.broker,
                                       self._replica_folder(), self.clock, self.doorbells,
                                       self.config.replica_file_bytes)
        if self.config.thread_plan == "staged":
            # The stages of the broker's own log stay together: what one of them does to a topic the others must not
            # meet half done.
            plan = [[directory, self.attach, delegation, release], [self.acks], [self.watch],
                    *([stage] for stage in head_stages)]
        else:
            first, others = head_stages[:1], head_stages[1:]
            extra = [[stage] for stage in others if isinstance(stage, Scanner)]
            plan = [[directory, self.attach, delegation, *first, self.acks, self.watch, release,
                     *(stage for stage in others if not isinstance(stage, Scanner))], *extra]
        yield_ns = WAITING[self.config.waiting]
        pipelines = [self._pipeline(f"pipeline-{i}", stages, self.doorbells[self.broker], yield_ns)
                     for i, stages in enumerate(plan)]
        # The disk is slower than any yield is worth.
        pipelines.append(self._pipeline("replication", [self.replication], self.replication_bells[self.broker], 0))
        return pipelines

    def _pipeline(self, name: str, stages: Iterable[Stage], bell: Doorbell, yield_ns: int) -> Pipeline:
        return Pipeline(name, list(stages), bell, self.log, yield_ns)

    def _head_stages(self) -> list[Stage]:
        """Scanners first, then reclaim."""
        config, count = self.config, self.layout.numbers["broker_count"]
        self.order = OrderState(self._door(Role.ROLE_SEQUENCER), self.layout, self.broker,
                                LOCK_MODES[config.sequencer_lock], config.scanners,
                                semaphore_name="/" + self.region.semaphore_name)
        for number in range(config.scanners):
            brokers = [b for b in range(count) if b % config.scanners == number]
            self.scanners.append(Scanner(self.order, self._door(Role.ROLE_SEQUENCER), self.clock, number, brokers,
                                         self.doorbells, self.replication_bells))
        if config.pool == "leader":
            self.pool_leader = PoolLeader(self._door(Role.ROLE_SEQUENCER), self.layout, self.broker)
        return [*self.scanners,
                Reclaim(self._door(Role.ROLE_RECLAIM), self.order, self.doorbells, self.pool_leader)]

    def _replica_folder(self) -> ReplicaFolder:
        return ReplicaFolder(self.config.replica_folder(self.broker), self.broker, self.region.run_id, self.config.name,
                             self.layout.numbers["broker_count"], self.topics.entry_of,
                             catalogue=bool(self.config.data_directory))

    # ---- life -------------------------------------------------------------------------------------------------------

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
            unmapped = [segment for segment in unmapped if not self.log.map_segment(segment)]

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
        line.update(state=state, pid=os.getpid(), start_time=process_start_time(), heartbeat_ns=self.clock.now())
        self.memory.write_line_bytes(at, pack("BrokerLine", **line))
        self.memory.flush_range(at, 64)
        self.memory.store_fence()

    def beat(self) -> None:
        """Say that this broker is alive, and how much processor time it has used."""
        at = self.layout.offset_of("broker", self.broker) + 24
        self.memory.store_word(at, self.clock.now())
        self.memory.flush_range(at, 8)
        self.memory.store_fence()
        self.log.note_cpu(time.process_time_ns())

    def look_after_memory(self, idle_ns: int | None = None) -> None:
        """Let the checker look for what was stored and never flushed; raise `MemoryLost` when we are cut off."""
        try:
            self.memory.raise_fault()
        except MemoryFault as fault:
            raise MemoryLost(broker=self.broker, reason=str(fault)) from fault
        checker = self.region.hardware.checker
        if checker is not None:
            checker.find_stranded(idle_ns)

    def gone_clients(self) -> list[tuple[int, int]]:
        """Slots (number, generation) of attached clients that left, never came, or whose process is dead."""
        return [(slot["number"], slot["generation"]) for slot in self.attach.open_slots()
                if slot["left"] or not process_alive(slot["pid"], slot["start_time"], self.host)]

    def bump(self, word: int) -> None:
        """Change a version word of this broker's line and wake the head."""
        at = self.layout.offset_of("broker", self.broker) + 8 * word
        self.memory.store_word(at, self.memory.load_word(at) + 1)
        self.memory.flush_range(at, 8)
        self.memory.store_fence()
        self.doorbells[HEAD].ring_now()

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
        """Brokers that are ready and whose process runs on this machine."""
        boot = host_identity()
        return [b for b in range(self.layout.numbers["broker_count"])
                if (line := self.broker_line(b))["state"] == BrokerState.BROKER_READY
                and process_alive(line["pid"], line["start_time"], boot)]


async def serve(node: BrokerNode, stop: asyncio.Event) -> None:
    """Run a broker until `stop` is set."""
    from broker.server import BrokerServer

    server = BrokerServer(node)
    node.start()
    try:
        tcp, unix = await server.start()
        node.write_line(BrokerState.BROKER_READY, tcp, unix)
        node.ring_all()
        node.start_warming()
        while not stop.is_set():
            node.beat()
            node.look_after_memory()
            for slot, generation in node.gone_clients():
                await server.close_attached(slot, generation)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), node.config.heartbeat_ms / 1000)
    finally:
        node.write_line(BrokerState.BROKER_STOPPED)
        await server.stop()
        node.stop()
        with contextlib.suppress(MemoryLost):
            node.look_after_memory(idle_ns=STRANDED_NS)


def _others_alive(region: Region, broker: int) -> bool:
    memory, boot = region.memory(), host_identity()
    for other in range(region.layout.numbers["broker_count"]):
        at = region.layout.offset_of("broker", other)
        memory.invalidate_range(at, 64)
        line = unpack("BrokerLine", memory.read_line_bytes(at))
        if other != broker and line["pid"] and line["state"] != BrokerState.BROKER_STOPPED and process_alive(
                line["pid"], line["start_time"], boot):
            return True
    return False


def _check_place(region: Region, broker: int) -> None:
    memory = region.memory()
    at = region.layout.offset_of("broker", broker)
    memory.invalidate_range(at, 64)
    line = unpack("BrokerLine", memory.read_line_bytes(at))
    if line["pid"] and line["state"] != BrokerState.BROKER_STOPPED and process_alive(
            line["pid"], line["start_time"], host_identity()):
        raise RegionForeign(f"broker {broker} of cluster {region.name} runs already (process {line['pid']}): "
                            "choose another --id", region=region.name, reason="broker runs")
    if line["pid"]:
        raise RegionForeign(f"broker {broker} of cluster {region.name} ran in this region before: "
                            "start the whole cluster anew", region=region.name, reason="broker ran")


def _recover(config: ClusterConfig, region: Region) -> None:
    """Fill the new region from the replicas in the data directory, before anybody else attaches to it."""
    from broker.recovery import make_plan
    from broker.restore import restore
    from broker.server import RECOVERY_FILE

    assert config.data_directory
    report = restore(region, make_plan(Path(config.data_directory)), int(config.session_lease_seconds * 1e9))
    (config.folder / RECOVERY_FILE).write_text(json.dumps(report))


def run_broker(config: ClusterConfig, broker: int, recover: bool = False) -> None:
    """Run one broker until SIGTERM or SIGINT. Raises `CxlmqError` when it cannot start.

    With `recover` the head fills the region from the replicas in the data directory first.
    """
    make_folder(config)
    if broker == HEAD:
        region = create_region(config, prepare=lambda created: _recover(config, created) if recover else None)
    else:
        region = attach_region(config.name, timeout_seconds=RECOVERY_SECONDS if recover else REGION_WAIT_SECONDS,
                               folder_root=Path(config.runtime_directory))
        _check_place(region, broker)
    try:
        node = BrokerNode(config, broker, region)
        node.write_line(BrokerState.BROKER_STARTING)
        asyncio.run(_run_until_signal(node))
    finally:
        if not _others_alive(region, broker):
            region.unlink()
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


def main(arguments: list[str] | None = None, read: Callable[[], str] = sys.stdin.read) -> int:
    """`python -m broker.node --id K`: the configuration comes as JSON on standard input."""
    parser = argparse.ArgumentParser(prog="broker.node", description=main.__doc__)
    parser.add_argument("--id", type=int, required=True, help="number of this broker, 0 is the head")
    parser.add_argument("--parent", type=int, help="process that this broker ends with")
    parser.add_argument("--recover", action="store_true", help="rebuild from the replicas in data_directory")
    parser.add_argument("--json-errors", action="store_true", help="print an error as one JSON line")
    options = parser.parse_args(arguments)
    try:
        run_broker(ClusterConfig.from_json(read()), options.id, options.recover)
    except CxlmqError as error:
        _report(error, options.json_errors)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
