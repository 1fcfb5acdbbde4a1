"""A chaos run: a real cluster under load and faults, and afterwards a verdict per invariant.

    cluster (brokers come again) ◄── faults, by a seed
       ▲ publish        │ read
    publishers        readers, one of them undisturbed (the auditor)
       └──── trails ────┴──► history ──► the simulation's checkers

Two topics: `fast` at ack level 1, `durable` at level 2 with two copies. At the end everything that was acknowledged on
`durable` has to come back from copies of the disks alone, into several kinds of clusters. A third one, `damaged`, is
judged by itself.
"""

import contextlib
import hashlib
import json
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.config import ClusterConfig, load_config
from broker.errors import CxlmqError
from broker.head import epoch_of, head_of
from broker.inspection import inspect_region, layout_of_head
from broker.region import Region, attach_region
from client.admin import Admin
from client.cluster import Cluster
from sim.chaos.beside import OtherClusters
from sim.chaos.clients import THREADS
from sim.chaos.damage import flip_bit, judge_damaged
from sim.chaos.disk import FaultyDisk
from sim.chaos.faults import WEIGHTS, Fault, Injector
from sim.chaos.garbage import send_garbage
from sim.chaos.pauses import Watchman
from sim.chaos.trail import Kind, read_trail
from sim.chaos.verdict import Trails, acks_of, judge, judge_recovered, reads_of, resume_seconds

TOPICS: dict[str, dict[str, int]] = {
    "fast": {"ack": 1, "replication_factor": 1}, "durable": {"ack": 2, "replication_factor": 2}}
DAMAGED = "damaged"                     # the region is damaged in this topic alone
PUBLISHERS, READERS = 2, 2              # of each topic, beside the auditor
GROUP = "readers"                       # of each topic, beside them, one member at a time
DELIVERY_SECONDS = 30.0
START_SECONDS = 60.0
SETTLE_SECONDS = 60.0
BASE_LINE_SECONDS = 30.0
LOOK_SECONDS = 0.05
MAY_BE_REFUSED = "a small region"
CODE_FOLDER = Path(__file__).resolve().parents[2]

Progress = Callable[[str], None]


@dataclass
class Settings:
    """What a run does."""

    seed: int
    seconds: float
    folder: Path
    brokers: int = 4
    kills: int | None = None            # end after so many
    mean_pause: float = 1.5             # between faults
    rate: float = 150.0                 # messages/s of each publisher
    region_bytes: int = 512 << 20
    damage: bool = True                 # flip bits of the region as well

    def cluster_config(self) -> ClusterConfig:
        """The cluster under test; its name leaves others alone."""
        return load_config(name=f"chaos-{secrets.token_hex(3)}", brokers=self.brokers, region_bytes=self.region_bytes,
                           data_directory=str(self.folder / "data"))


@dataclass
class Client:
    """One client process."""

    process: subprocess.Popen[bytes]
    topic: str
    what: str
    trail: Path
    disturbed: bool = True
    started: float = field(default_factory=time.time)


@dataclass
class Outcome:
    """What a run found."""

    broken: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    kills: int = 0
    begun_ns: int = 0
    ended_ns: int = 0
    messages: dict[str, int] = field(default_factory=dict)
    acks_ns: Any = None
    reads_ns: Any = None                # of the undisturbed readers
    resumed: list[float] = field(default_factory=list)
    pauses: list[tuple[int, int]] = field(default_factory=list)     # of the whole machine, monotonic ns

    @property
    def holds(self) -> bool:
        """Whether every invariant does."""
        return not any(self.broken.values())


class ChaosRun:
    """See the module. It is the `Target` of its faults."""

    def __init__(self, settings: Settings, progress: Progress = lambda _: None) -> None:
        self._settings = settings
        self._progress = progress
        self._chance = random.Random(settings.seed ^ 0x5EED)
        self._clients: list[Client] = []
        self._trails = {topic: Trails([], [], settings.folder / f"{topic}-auditor", settings.folder / f"{topic}-last",
                                      options["ack"]) for topic, options in TOPICS.items()}
        self._damaged = settings.folder / DAMAGED
        self._damaged_number = 0
        self._next_client = 1
        self._epochs: list[tuple[int, int]] = []    # when which epoch was seen first
        self._wrong_i: list[str] = []
        self._kept_from = 0             # the first position of `durable` that was kept when faults ended
        self._others = OtherClusters()
        self._cluster: Cluster
        self._region: Region
        self._disk: FaultyDisk

    # ---- the target of faults ---------------------------------------------------------------------------------------

    def brokers(self) -> dict[int, int]:
        """Broker processes that live: pids by number."""
        return self._cluster.processes

    def head(self) -> int | None:
        """The broker that is head now."""
        return head_of(self._control())

    def _control(self) -> int:
        return self._region.memory().load_word(self._region.layout.offset_of("control"))

    def publishers(self) -> list[int]:
        """Publisher processes that have begun."""
        return self._begun("publish")

    def readers(self) -> list[int]:
        """Reader processes that have begun and may be disturbed."""
        return self._begun("read")

    def _begun(self, what: str) -> list[int]:
        return [each.process.pid for each in self._clients if each.what == what and each.disturbed
                and each.process.poll() is None and each.trail.exists() and each.trail.stat().st_mtime > each.started]

    def fail_disks(self, *rules: str) -> bool:
        """Let the brokers' disks fail, without rules no more; False when that cannot be done here."""
        return self._disk.fail(*rules)

    def send_garbage(self, chance: random.Random) -> None:
        """Nonsense to a broker: to a method of the service, or to its socket."""
        addresses = [each.unix for each in self._cluster.addresses.values() if each.unix]
        if addresses:
            send_garbage(chance.choice(addresses), chance.getrandbits(64))

    def damage(self, chance: random.Random) -> str:
        """Flip one bit of the region; where, empty text: nowhere yet."""
        return flip_bit(self._region.memory(), layout_of_head(self._region), self._damaged_number, chance)

    def start_other(self) -> bool:
        """Another cluster beside this one, for a moment; False while the last one is still there."""
        return self._others.start()

    # ---- clients ----------------------------------------------------------------------------------------------------

    def _start(self, what: str, topic: str, trail: Path, disturbed: bool = True, **settings: Any) -> Client:
        arguments = json.dumps({"trail": str(trail), "topic": topic, "cluster": self._cluster.name, **settings})
        log = (self._settings.folder / f"{trail.name}.log").open("ab")
        with log:
            process = subprocess.Popen([sys.executable, "-m", "sim.chaos.clients", what, arguments], cwd=CODE_FOLDER,
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        client = Client(process, topic, what, trail, disturbed)
        self._clients.append(client)
        return client

    def _start_publisher(self, topic: str, disturbed: bool = True) -> None:
        number, self._next_client = self._next_client, self._next_client + THREADS
        trail = self._settings.folder / f"{topic}-publisher-{number}"
        options = TOPICS.get(topic, TOPICS["fast"])
        if topic in TOPICS:
            self._trails[topic].publishers.append(trail)
        self._start("publish", topic, trail, disturbed, client=number, ack=options["ack"],
                    rate=self._settings.rate, transport=self._chance.choice(("grpc", "auto")),
                    delivery_timeout=DELIVERY_SECONDS)

    def _start_reader(self, topic: str, trail: Path, disturbed: bool = True) -> None:
        group = GROUP if topic in TOPICS and trail in self._trails[topic].groups else ""
        position = 0
        for event in read_trail(trail):
            if event.kind in (Kind.READ, Kind.FOREIGN):
                position = event.position + 1
            elif event.kind == Kind.GAP:
                position = event.position
        transport = self._chance.choice(("grpc", "auto")) if disturbed else "grpc"
        self._start("read", topic, trail, disturbed, start=position, transport=transport, group=group)

    def _replace_ended(self) -> None:
        """Clients that were killed, or are done, are followed by others."""
        for client in [each for each in self._clients if each.process.poll() is not None]:
            self._clients.remove(client)
            if client.what == "publish":
                self._start_publisher(client.topic, client.disturbed)
            else:
                self._start_reader(client.topic, client.trail, client.disturbed)

    def _end(self, what: str) -> list[str]:
        """Ask clients of a kind to end; what went wrong with that."""
        ending = [each for each in self._clients if each.what == what]
        for client in ending:
            client.process.send_signal(signal.SIGTERM)
        deadline, wrong = time.monotonic() + SETTLE_SECONDS, []
        for client in ending:
            try:
                client.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                wrong.append(f"{client.trail.name} did not end within {SETTLE_SECONDS:.0f} s")
                client.process.kill()
                client.process.wait()
            self._clients.remove(client)
        return wrong

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """All of it. Raises `CxlmqError` when the cluster cannot be started."""
        self._settings.folder.mkdir(parents=True, exist_ok=True)
        outcome = Outcome()
        with Watchman(outcome.pauses), FaultyDisk(self._settings.folder) as self._disk, self._cluster_running():
            for topic in TOPICS:
                for _ in range(PUBLISHERS):
                    self._start_publisher(topic)
                self._start_reader(topic, self._trails[topic].auditor, disturbed=False)
                for number in range(READERS):
                    trail = self._settings.folder / f"{topic}-reader-{number}"
                    self._trails[topic].readers.append(trail)
                    self._start_reader(topic, trail)
                trail = self._settings.folder / f"{topic}-group"
                self._trails[topic].groups.append(trail)
                self._start_reader(topic, trail)
            # One publisher is left alone: when nothing is acknowledged, it is the brokers' silence.
            self._start_publisher("fast", disturbed=False)
            self._start_publisher(DAMAGED, disturbed=False)
            self._start_reader(DAMAGED, self._damaged, disturbed=False)
            self._disturb(outcome)
            wrong = self._finish(outcome)
        (self._settings.folder / "faults.json").write_text(json.dumps([vars(fault) for fault in outcome.faults]))
        wrong_a2 = self._recover()
        outcome.broken = judge(self._trails, outcome.faults, outcome.begun_ns, outcome.ended_ns, wrong,
                               self._epochs, outcome.pauses)
        outcome.broken["A2"] = wrong_a2
        outcome.broken["I"] = outcome.broken["I"] or "; ".join(self._wrong_i)
        outcome.acks_ns = acks_of(self._trails.values())
        outcome.reads_ns = reads_of(self._trails.values())
        outcome.resumed = resume_seconds(outcome.acks_ns, outcome.faults, pauses=outcome.pauses)
        outcome.messages = {topic: sum(event.kind == Kind.ACKED for path in trails.publishers
                                       for event in read_trail(path)) for topic, trails in self._trails.items()}
        return outcome

    @contextlib.contextmanager
    def _cluster_running(self) -> Iterator[None]:
        with Cluster(self._settings.cluster_config(), exact_name=True) as self._cluster:
            self._region = attach_region(self._cluster.name)
            try:
                with Admin(cluster=self._cluster.name) as admin:
                    for topic, options in TOPICS.items():
                        admin.create_topic(topic, ack=options["ack"], replication_factor=options["replication_factor"])
                    self._damaged_number = int(admin.create_topic(DAMAGED)["number"])
                yield
            finally:
                for client in self._clients:
                    client.process.kill()
                    client.process.wait()
                for broker in range(self._settings.brokers):    # also of a run that could not be ended
                    shutil.copy(self._cluster.log_path(broker), self._settings.folder)
                self._region.close()

    def _disturb(self, outcome: Outcome) -> None:
        settings = self._settings
        weights = {kind: weight for kind, weight in WEIGHTS.items() if settings.damage or kind != "damage"}
        injector = Injector(self, settings.seed, weights)
        publishers = len(TOPICS) * PUBLISHERS
        _wait(lambda: len(self.publishers()) == publishers and bool(acks_of(self._trails.values()).size), START_SECONDS)
        outcome.begun_ns = time.monotonic_ns()
        until, due, told = time.monotonic() + settings.seconds, time.monotonic(), 0.0
        while (time.monotonic() < until or injector.owes) and (
                settings.kills is None or injector.kills() < settings.kills):
            injector.let_go()
            self._note_epoch()
            self._replace_ended()
            if time.monotonic() >= due:
                injector.inject()
                due = time.monotonic() + injector.next_pause(settings.mean_pause)
            if time.monotonic() >= told:
                left = max(0.0, until - time.monotonic())
                self._progress(f"{injector.kills()} kills, {len(injector.done)} faults, {left:.0f} s left")
                told = time.monotonic() + 5.0
            time.sleep(LOOK_SECONDS)
        injector.let_go(all_of_them=True)
        outcome.ended_ns = time.monotonic_ns()
        outcome.faults, outcome.kills = injector.done, injector.kills()

    def _note_epoch(self) -> None:
        epoch = epoch_of(self._control())
        if not self._epochs or epoch != self._epochs[-1][1]:
            self._epochs.append((time.monotonic_ns(), epoch))

    def _fallen(self, outcome: Outcome) -> list[str]:
        """Brokers that ended, and nobody had killed them."""
        killed = sum(fault.what in ("kill broker", "kill head") for fault in outcome.faults)
        killed += sum(fault.whom.count(",") + 1 for fault in outcome.faults if fault.what == "kill all")
        endings = [*self._cluster.endings, *self._cluster.exit_codes.items()]
        fell = [f"broker {broker} ended with exit code {code}" for broker, code in endings if code != -signal.SIGKILL]
        if len(endings) - len(fell) > killed:
            fell.append(f"{len(endings) - len(fell)} brokers were killed, {killed} of them by this run")
        return fell

    def _finish(self, outcome: Outcome) -> list[str]:
        """Let everything come to rest; what does not. Then read all that is kept, and look for what is left over."""
        self._progress("coming to rest")
        wrong = [] if _wait(self._all_serve, SETTLE_SECONDS) else [
            f"{SETTLE_SECONDS:.0f} s after the last fault not all brokers serve"]
        wrong += self._others.end() + self._fallen(outcome) + self._end("publish")
        with Admin(cluster=self._cluster.name) as admin:
            found = {topic: admin.describe_topic(topic) for topic in (*TOPICS, DAMAGED)}
        ends = {topic: int(each["end_position"]) for topic, each in found.items()}
        self._kept_from = int(found["durable"]["first_position"])
        for topic, trails in self._trails.items():
            self._start_reader(topic, trails.last, disturbed=False)
            for trail in (trails.auditor, trails.last):
                if not _wait_for_position(trail, ends[topic]):
                    wrong.append(f"{trail.name} came to {_read_to(trail)} of {ends[topic]}")
        _wait_for_position(self._damaged, ends[DAMAGED])
        self._wrong_i = judge_damaged(self._damaged, ends[DAMAGED], _read_to(self._damaged))
        wrong += self._end("read")
        shutil.copytree(self._settings.folder / "data", self._settings.folder / "disks", dirs_exist_ok=True)
        with Admin(cluster=self._cluster.name) as admin:
            for topic in (*TOPICS, DAMAGED):
                admin.delete_topic(topic)
        _wait(lambda: not self._left_over(), BASE_LINE_SECONDS)
        return wrong + self._left_over()

    def _all_serve(self) -> bool:
        """Whether every broker is ready: one whose process was just started answers nobody yet."""
        ready = {each["broker"]: each["pid"] for each in inspect_region(self._region)["brokers"]
                 if each["state"] == "ready"}
        return len(ready) == self._settings.brokers and ready == self._cluster.processes

    def _left_over(self) -> list[str]:
        found = inspect_region(self._region)
        left = []
        if found["pool"]["used"]:
            left.append(f"{found['pool']['used']} segments are in use, and there is no topic")
        if found["cursors"]:
            left.append(f"{len(found['cursors'])} cursors are open, and there is no reader")
        if found["attached"]:
            left.append(f"{len(found['attached'])} slots of attached clients are in use, and there is none")
        return left

    # ---- level 2 ----------------------------------------------------------------------------------------------------

    def _recover(self) -> str:
        """Rebuild clusters of several kinds from copies of the disks alone; what is wrong, empty text: nothing."""
        acked = {(event.client, event.number): event.position for path in self._trails["durable"].publishers
                 for event in read_trail(path) if event.kind == Kind.ACKED}
        wrong = []
        for what, settings in self._recoveries():
            self._progress(f"recovering from the disks: {what}")
            disks = self._settings.folder / f"disks-{what.replace(' ', '-')}"
            shutil.copytree(self._settings.folder / "disks", disks)
            found = self._recover_into(disks, load_config(name=self._cluster.name, **settings), acked)
            wrong += [f"{what}: {found}"] if found else []
        return "; ".join(wrong)

    def _recoveries(self) -> list[tuple[str, dict[str, Any]]]:
        """Settings of the clusters that are made of the disks. The last may be refused, and then changes nothing."""
        config = self._settings.cluster_config()
        # Recovery fills three quarters of an order index at most: all that was kept has to fit.
        room = {"region_bytes": 2 * config.region_bytes, "order_entry_count": 2 * config.order_entry_count}
        return [("the same", {"brokers": config.brokers, **room}),
                ("one broker more", {"brokers": config.brokers + 1, **room}),
                ("fewer brokers", {"brokers": 2, **room}),
                (MAY_BE_REFUSED, {"brokers": config.brokers, "region_bytes": config.region_bytes // 16})]

    def _recover_into(self, disks: Path, config: ClusterConfig, acked: dict[tuple[int, int], int]) -> str:
        before = _digests(disks)
        trail = disks.with_suffix(".reader")
        try:
            with Cluster(config, exact_name=True, recover=disks) as self._cluster:
                with Admin(cluster=self._cluster.name) as admin:
                    end = int(admin.describe_topic("durable")["end_position"])
                self._start_reader("durable", trail, disturbed=False)
                reached = _wait_for_position(trail, end)
                self._end("read")
        except CxlmqError as error:
            if not disks.name.endswith(MAY_BE_REFUSED.replace(" ", "-")):
                return f"no cluster could be recovered: {error.message}"
            return "" if _digests(disks) == before else "it was refused, and the disks were changed"
        there = {(event.client, event.number): event.position for event in read_trail(trail)
                 if event.kind == Kind.READ}
        if not reached:
            return f"the recovered topic could be read to {_read_to(trail)} of {end}"
        return judge_recovered(acked, there, self._kept_from)


def _digests(folder: Path) -> dict[str, str]:
    """What a folder holds, by name."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def _read_to(trail: Path) -> int:
    """The position behind the last message of a trail."""
    last = -1
    for event in read_trail(trail):
        if event.kind in (Kind.READ, Kind.FOREIGN, Kind.DAMAGED):
            last = event.position
    return last + 1


def _wait_for_position(trail: Path, position: int) -> bool:
    return _wait(lambda: _read_to(trail) >= position, SETTLE_SECONDS)


def _wait(until: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
