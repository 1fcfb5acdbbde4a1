"""A cluster on this machine: starts its broker processes, knows when they answer, and removes everything at the end.

    with Cluster(load_config(brokers=4)) as cluster:
        cluster.wait()                      # until Ctrl-C

    claim the name ──► spawn all brokers at once ──► all READY in the region ──► all answer on their sockets
                                       │
                                       └─ one ended: its error is raised here, typed, and nothing is left

The brokers die with their supervisor (PR_SET_PDEATHSIG), however it ends. That signal is bound to the thread that
spawned them: start a cluster in a thread that lives as long as the cluster.
"""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from broker import data_directory
from broker.config import ClusterConfig, layout_of, load_config, resolved
from broker.errors import CxlmqError, RegionForeign, from_code
from broker.layout import BrokerState
from broker.records import record_bytes, unpack
from broker.security import Guard, Security
from client.claim import Claim, claim_name, collect_leftovers, is_orphaned, remove_region, supervisor_of
from client.restarts import Endings, how
from sim.cxl import region as files
from sim.cxl.locks import SUPERVISOR
from sim.cxl.memory import MappedMemory

DEFAULT_NAME = "default"
FOUNDER = 0                             # makes the region
READY_SECONDS = 30.0
RECOVERY_SECONDS = 600.0                # for reading all replicas
RECOVERY_FILE = "recovery.json"         # written by the head into the cluster's folder
STOP_SECONDS = 10.0
DOWN_SECONDS = 2 * STOP_SECONDS         # what `stop_cluster` gives a supervisor before it kills
ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.005
_WATCH_SECONDS = 0.2
_KEEP_SECONDS = 0.05
_NAMES_MAX = 1000
_LOG_TAIL_BYTES = 4000
# Brokers run in the folder that holds our packages: `-m broker.node` then finds ours, and no folder of the user's that
# happens to be called "broker".
_CODE_FOLDER = Path(__file__).resolve().parent.parent

# The connection preface of HTTP/2 (RFC 9113, 3.4) with an empty SETTINGS frame; a server answers with its SETTINGS.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_FRAME_BYTES, _HTTP2_SETTINGS = 9, 4


class BrokerFailed(CxlmqError):
    """A broker process ended or did not become ready; details: broker, exit_code, log (its last lines)."""

    code = "broker-failed"
    status = "UNAVAILABLE"
    template = "broker {broker} ended with exit code {exit_code} before it was ready; it said:\n{log}"


class Addresses(NamedTuple):
    """Where a broker listens, as gRPC writes it."""

    tcp: str
    unix: str


class Cluster:
    """Broker processes with one region, as a context manager.

    `exact_name`: refuse when the name is taken (`RegionForeign`); without it a cluster called "default" takes the next
    free of default-2, default-3 ... None means: exact unless the name is "default". `on_note` is told what the user
    should know (another name was taken, leftovers were removed, a broker ended). `recover` is the data directory of a
    cluster whose memory is gone: topics, positions and sessions are rebuilt from its replicas, `recovery` then says
    what was found and what was lost, and the cluster keeps its replicas there; `fresh` sets aside what is there.
    """

    def __init__(self, config: ClusterConfig | None = None, *, exact_name: bool | None = None,
                 ready_seconds: float = READY_SECONDS, stop_seconds: float = STOP_SECONDS,
                 on_note: Callable[[str], None] | None = None,
                 recover: str | os.PathLike[str] | None = None, fresh: bool = False) -> None:
        wanted = config or load_config()
        if recover is not None:
            wanted = msgspec.structs.replace(wanted, data_directory=resolved(recover, "recover"))
            ready_seconds = max(ready_seconds, RECOVERY_SECONDS)
        self._recover, self._fresh = recover is not None, fresh
        self.recovery: dict[str, Any] | None = None
        self.config: ClusterConfig = wanted
        self.notes: list[str] = []
        self._exact_name = self.config.name != DEFAULT_NAME if exact_name is None else exact_name
        self._ready_seconds = ready_seconds
        self._stop_seconds = stop_seconds
        self._on_note = on_note
        self._claim: Claim | None = None
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: dict[int, IO[bytes]] = {}
        self._addresses: dict[int, Addresses] = {}
        self._ended: set[int] = set()
        self._former: set[int] = set()              # process ids of brokers that were started anew
        self._table: BrokerTable | None = None      # holds the supervisor's lock on the region
        self._lives = Endings()                     # how they ended, and when they are started anew
        self._changing = threading.Lock()
        self._stopping, self._stopped = threading.Event(), threading.Event()
        self._keeper: threading.Thread | None = None
        self.endings: list[tuple[int, int]] = []    # (broker, exit code) of those that were started anew

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The cluster's name, as clients give it."""
        return self.config.name

    @property
    def processes(self) -> dict[int, int]:
        """Process ids of the running brokers, by broker id."""
        return {broker: child.pid for broker, child in self._children.items() if child.poll() is None}

    @property
    def addresses(self) -> dict[int, Addresses]:
        """Where the brokers listen, by broker id."""
        return dict(sorted(self._addresses.items()))

    @property
    def exit_codes(self) -> dict[int, int]:
        """Exit codes of brokers that have ended; minus the signal's number for a killed one."""
        return {broker: code for broker, child in self._children.items() if (code := child.poll()) is not None}

    def log_path(self, broker: int) -> Path:
        """Where a broker's standard error goes."""
        return self.config.folder / f"broker-{broker}.log"

    def _note(self, text: str) -> None:
        self.notes.append(text)
        if self._on_note is not None:
            self._on_note(text)

    @property
    def restarts(self) -> int:
        """How often brokers were started anew."""
        return len(self.endings)

    # ---- start ------------------------------------------------------------------------------------------------------

    def start(self) -> "Cluster":
        """Start all brokers; return when every one is ready and answers.

        Raises the error of the broker that could not start (`PortTaken`, `RegionTooSmall`, `TmpfsTooSmall` ...),
        `RegionForeign` when the name is taken, `BrokerFailed` for anything else. Nothing is left when it raises.
        """
        assert self._claim is None, "this cluster is started already"
        layout_of(self.config)              # a region that is too small is refused before anything exists
        Guard(self.config.security).check()
        self._collect_leftovers()
        self._take_name()
        try:
            data_directory.before_start(self.config, self._recover, self._fresh, self._note)
            for broker in range(self.config.brokers):
                self._spawn(broker)
            for broker, child in self._children.items():
                self._configure(broker, child)
            self._wait_until_ready(time.monotonic() + self._ready_seconds)
            if self._recover:
                self.recovery = json.loads((self.config.folder / RECOVERY_FILE).read_text())
            if self.config.restart:
                self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
                self._keeper.start()
        except BaseException:
            self.stop()
            raise
        return self

    def _collect_leftovers(self) -> None:
        """Remove what dead clusters have left."""
        for name in collect_leftovers(self.config.folder.parent):
            self._note(f"removed the leftovers of cluster {name!r}, whose processes are dead")

    def _take_name(self) -> None:
        wanted = self.config.name
        for name in (wanted, *(f"{wanted}-{number}" for number in range(2, _NAMES_MAX))):
            config = msgspec.structs.replace(self.config, name=name)
            self._claim = claim_name(config)
            if self._claim is not None:
                if name != wanted:
                    self._note(f"a cluster {wanted!r} runs already: this one is {name!r}")
                self.config = config
                return
            if self._exact_name:
                break
        raise RegionForeign.orphaned(wanted) if is_orphaned(self.config) else RegionForeign.taken(wanted)

    def _spawn(self, broker: int, again: bool = False) -> None:
        if not again:
            self._logs[broker] = open(self.log_path(broker), "w+b", buffering=0)  # noqa: SIM115
        log = self._logs[broker]
        same_run = ["--run-id", str(self._table.run_id)] if self._table else []
        self._children[broker] = subprocess.Popen(
            [sys.executable, "-m", "broker.node", "--id", str(broker), "--json-errors", "--parent", str(os.getpid()),
             *(["--join", *same_run] if again else ["--recover"] if self._recover else [])],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=_CODE_FOLDER,
            process_group=0)                # Ctrl-C in a terminal reaches the supervisor alone, which stops the rest
        self._lives.started(broker, time.monotonic())

    def _configure(self, broker: int, child: subprocess.Popen[bytes], config: ClusterConfig | None = None) -> None:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):      # it has ended: its error is found below
            child.stdin.write((config or self.config).to_json().encode())
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()

    def _wait_until_ready(self, deadline: float) -> None:
        waiting = set(self._children)
        while waiting:
            self._raise_if_ended()
            self._table = self._table or BrokerTable.open(self.config, self._children[FOUNDER].pid)
            for broker in sorted(waiting):
                if self._note_ready(broker):
                    waiting.discard(broker)
            if waiting and time.monotonic() > deadline:
                self._raise_late(min(waiting), "not ready")
            if waiting:
                time.sleep(_POLL_SECONDS)
        for broker, addresses in sorted(self._addresses.items()):
            for address in filter(None, addresses):
                if not answers(address, ANSWER_SECONDS, self.config.security):
                    self._raise_if_ended()
                    self._raise_late(broker, f"not answering at {address}")

    def _note_ready(self, broker: int) -> bool:
        """Whether a broker is ready; then we know where it listens."""
        addresses = self._table.ready(broker, self._children[broker].pid) if self._table else None
        if addresses is not None:
            self._addresses[broker] = addresses
            self._lives.ready(broker)
        return addresses is not None

    def _raise_if_ended(self) -> None:
        ended = self.exit_codes
        if ended:
            broker = min(ended)
            log = self._log_text(broker)
            raise _reported_error(log) or BrokerFailed(broker=broker, exit_code=ended[broker], log=log)

    def _raise_late(self, broker: int, what: str) -> None:
        log = self._log_text(broker)
        raise BrokerFailed(f"broker {broker} is {what} after {self._ready_seconds:.0f} s; it said:\n{log or 'nothing'}",
                           broker=broker, exit_code=None, log=log)

    def _log_text(self, broker: int) -> str:
        """The end of a broker's log, also when its folder has gone already."""
        descriptor = self._logs[broker].fileno()
        size = os.fstat(descriptor).st_size
        start = max(0, size - _LOG_TAIL_BYTES)
        return os.pread(descriptor, size - start, start).decode(errors="replace").strip()

    # ---- brokers that end -------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Start brokers anew that ended. In a thread that lives as long as they: they end with it."""
        while not self._stopping.wait(_KEEP_SECONDS):
            with self._changing:
                for broker, code in self.exit_codes.items():
                    if not self._stopping.is_set():
                        self._look_after(broker, code)
            for broker in list(self._children):
                self._note_ready(broker)
        while self.processes and not self._stopped.wait(_KEEP_SECONDS):
            pass

    def _look_after(self, broker: int, code: int) -> None:
        """A broker has ended: start it anew, when it is time; say so, and say so when it is given up."""
        now, before = time.monotonic(), self._lives.of(broker)
        if self._lives.ended(broker, code, now):
            text = f"broker {broker} {before.text()}"
            if reported := _reported_error(self._log_text(broker)):
                text = f"{text} ({reported.message})"
            if before.worth_a_note:
                self._note(text)
            with contextlib.suppress(OSError):      # a full disk is no reason to look after nobody
                os.write(self._logs[broker].fileno(), f"supervisor: {text}\n".encode())
            self._lives.save(self.config.folder)
        if before.due is not None and now >= before.due:
            try:
                self._start_again(broker, code)
            except OSError as error:
                self._note(f"broker {broker} cannot be started now ({error.strerror}): it is tried again")
                self._lives.postpone(broker, now)

    def _start_again(self, broker: int, code: int) -> None:
        former = self._children[broker].pid
        self._spawn(broker, again=True)
        self._former.add(former)
        # Where a test let it end, it would end again.
        self._configure(broker, self._children[broker], msgspec.structs.replace(self.config, crash_points=""))
        self.endings.append((broker, code))

    # ---- run and stop -----------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every broker has ended; False when the time is over first.

        Ctrl-C interrupts it as ever. A broker that ends alone is said; the others go on, and it is started anew unless
        `restart` is off.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._keeper is None:
                for broker, code in self.exit_codes.items():
                    if broker not in self._ended:
                        self._ended.add(broker)
                        self._note(f"broker {broker} ended {how(code)}")
                if len(self._ended) == len(self._children):
                    return True
            elif self._stopped.is_set():
                return True
            left = _WATCH_SECONDS if deadline is None else min(_WATCH_SECONDS, deadline - time.monotonic())
            if left <= 0:
                return False
            time.sleep(left)

    def kill(self, broker: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one broker. Raises `ProcessLookupError` when it does not run."""
        child = self._children.get(broker)
        if child is None or child.poll() is not None:
            raise ProcessLookupError(f"broker {broker} does not run")
        child.send_signal(number)

    def stop(self) -> None:
        """Stop all brokers and remove the region, its semaphore and the folder, whatever happened before."""
        with _signals_ignored():
            self._stopping.set()
            try:
                with self._changing:
                    if self._table is not None:     # from here on the last broker removes the region
                        self._table.locks.release(SUPERVISOR)
                    self._stop_processes()
            finally:
                self._stopped.set()
                if self._keeper is not None and self._keeper is not threading.current_thread():
                    self._keeper.join()
                self._remove()

    def _stop_processes(self) -> None:
        running = [child for child in self._children.values() if child.poll() is None]
        for child in running:
            child.terminate()
        deadline = time.monotonic() + self._stop_seconds
        for child in running:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._note(f"process {child.pid} did not stop within {self._stop_seconds:.0f} s and was killed")
                child.kill()
                child.wait()
        self._ended.update(self._children)

    def _remove(self) -> None:
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        if self._claim is None:
            return
        pids = self._former | {child.pid for child in self._children.values()}
        if remove_region(self.config, self._table.locks if self._table else None, pids):
            self._claim.release()
        else:                               # who runs there needs the folder
            self._note(f"the region of cluster {self.name!r} is kept: a broker that was started by hand runs there")
            self._claim.give_back()
        self._claim = self._table = None
        self._addresses.clear()

    def __enter__(self) -> "Cluster":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _reported_error(log: str) -> CxlmqError | None:
    """The error that a broker reported as a JSON line, if it did."""
    for line in reversed(log.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return _error_from(json.loads(line))
    return None


def _error_from(report: dict[str, Any]) -> CxlmqError:
    return from_code(str(report["error"]), str(report["message"]), **dict(report.get("details") or {}))


# ---- ready -------------------------------------------------------------------------------------------------------


class BrokerTable:
    """The broker table of a region that is being filled in, read without the tools of broker.region."""

    def __init__(self, config: ClusterConfig, mapping: files.RegionMapping, run_id: int) -> None:
        self._layout = layout_of(config)
        self._memory = MappedMemory(mapping)
        self.run_id = run_id
        self.locks = mapping.locks

    @classmethod
    def open(cls, config: ClusterConfig, owner_pid: int) -> "BrokerTable | None":
        """The table of the region that this very process created; None while there is none.

        Holds the supervisor's lock on it. Raises `RegionForeign` when somebody else does.
        """
        try:
            mapping = files.map_region_file(files.REGION_PREFIX + config.name, writable=False)
        except files.RegionFileError:
            return None
        if len(mapping) < record_bytes("Superblock"):
            return None
        superblock = unpack("Superblock", MappedMemory(mapping).read_bytes(0, record_bytes("Superblock")))
        if superblock["owner_pid"] != owner_pid:
            return None
        if not mapping.locks.take(SUPERVISOR):
            raise RegionForeign(region=config.name, reason="another supervisor looks after it")
        return cls(config, mapping, superblock["run_id"])

    def ready(self, broker: int, pid: int) -> Addresses | None:
        """Where a broker listens, once this process has announced itself there as ready."""
        at = self._layout.offset_of("broker", broker)
        if not self._memory.load_word(0):   # memory need not come as zeroes: tables are cleared before it is ready
            return None
        self._memory.invalidate_range(at, record_bytes("BrokerLine"))
        line = unpack("BrokerLine", self._memory.read_line_bytes(at))
        if line["state"] != BrokerState.BROKER_READY or line["pid"] != pid:
            return None
        at, count = self._layout.offset_of("broker_address", broker), record_bytes("BrokerAddress")
        self._memory.invalidate_range(at, count)
        address = unpack("BrokerAddress", self._memory.read_bytes(at, count))
        return Addresses(address["tcp_address"], address["unix_address"])


def answers(address: str, timeout: float, security: str | None = None) -> bool:
    """Whether a gRPC server answers at "host:port" or "unix:/path": it greets with an HTTP/2 SETTINGS frame."""
    try:
        with _connect(address, timeout, security) as connection:
            connection.sendall(_HTTP2_PREFACE)
            greeting = b""
            while len(greeting) < _HTTP2_FRAME_BYTES:
                received = connection.recv(_HTTP2_FRAME_BYTES - len(greeting))
                if not received:
                    return False
                greeting += received
            return greeting[3] == _HTTP2_SETTINGS
    except OSError:
        return False


def _connect(address: str, timeout: float, security: str | None) -> socket.socket:
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(address.removeprefix("unix:"))
        except BaseException:
            connection.close()
            raise
        return connection
    host, _, port = address.rpartition(":")
    plain = socket.create_connection((host.strip("[]"), int(port)), timeout)
    return _over_tls(plain, Security.load(security)) if security else plain


def _over_tls(plain: socket.socket, security: Security) -> socket.socket:
    """TLS as a client of our CA. Which name the certificate has is for those to check who reach the broker by it."""
    context = ssl.create_default_context(cafile=security.ca)
    context.check_hostname = False
    context.load_cert_chain(security.certificate, security.key)
    context.set_alpn_protocols(["h2"])
    try:
        return context.wrap_socket(plain)
    except OSError:
        plain.close()
        raise


# ---- signals -----------------------------------------------------------------------------------------------------

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _handlers(handler: Any, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield                               # Python gives signals to the main thread only
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, signal.SIG_DFL if each is None else each)


def _signals_ignored() -> contextlib.AbstractContextManager[None]:
    """Nothing interrupts the clean-up: it is bounded by its own time-outs."""
    return _handlers(signal.SIG_IGN, _ENDING)


def interrupted_by_signals() -> contextlib.AbstractContextManager[None]:
    """SIGTERM and SIGHUP interrupt like Ctrl-C (`KeyboardInterrupt`), so that `with Cluster()` cleans up."""
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    return _handlers(interrupt, _ENDING)


# ---- a supervisor in the background ------------------------------------------------------------------------------


def describe(cluster: Cluster) -> dict[str, Any]:
    """A running cluster as JSON values."""
    processes = cluster.processes
    return {
        "name": cluster.name, "supervisor": os.getpid(), "folder": str(cluster.config.folder),
        "region_bytes": cluster.config.region_bytes, "notes": cluster.notes, "recovery": cluster.recovery,
        "brokers": [{"id": broker, "pid": processes.get(broker), "tcp_address": addresses.tcp,
                     "unix_address": addresses.unix} for broker, addresses in sorted(cluster.addresses.items())],
    }


def start_detached(config: ClusterConfig, exact_name: bool | None = None,
                   recover: str | None = None, fresh: bool = False) -> dict[str, Any]:
    """Start a cluster whose supervisor outlives this process; return `describe` of it once it is ready.

    Stop it with `stop_cluster(name)`. Raises what `Cluster.start` raises.
    """
    request = json.dumps({"config": json.loads(config.to_json()), "exact_name": exact_name,
                          "recover": recover and resolved(recover, "recover"), "fresh": fresh})
    _fill_standard_streams()
    with subprocess.Popen([sys.executable, "-m", "client.cluster"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=_CODE_FOLDER, start_new_session=True) as supervisor:
        assert supervisor.stdin
        assert supervisor.stdout
        assert supervisor.stderr
        try:
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.write(request.encode())
                supervisor.stdin.close()
            answer = supervisor.stdout.readline()
            if not answer:
                said = supervisor.stderr.read().decode(errors="replace")
                raise BrokerFailed(f"the supervisor ended before the cluster was ready; it said:\n{said}", log=said)
        except BaseException:
            supervisor.terminate()
            supervisor.wait()
            raise
        values: dict[str, Any] = json.loads(answer)
        if "error" in values:
            supervisor.wait()
            raise _error_from(values)
        supervisor.returncode = 0           # it goes on without us: there is nothing to wait for
    return values


def _fill_standard_streams() -> None:
    """Open what is closed of the first three descriptors: a pipe that took such a number would be taken for it."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def supervise() -> int:
    """The supervisor in the background: a request on standard input, one line of answer, then it looks after it."""
    request = json.loads(sys.stdin.read())
    config = ClusterConfig.from_json(json.dumps(request.pop("config")))
    with interrupted_by_signals():
        try:
            with Cluster(config, **request) as cluster:
                print(json.dumps(describe(cluster)), flush=True)
                _leave_terminal(cluster.config.folder / "supervisor.log")
                cluster.wait()
        except CxlmqError as error:
            print(json.dumps({"error": error.code, "message": error.message, "details": error.details}, default=str))
            return 1
        except KeyboardInterrupt:
            return 0
    return 1                                # every broker has ended though nobody asked for it


def _leave_terminal(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    nothing = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, nothing), (1, descriptor), (2, descriptor)):
        os.dup2(source, target)
    os.close(descriptor)
    os.close(nothing)


def stop_cluster(folder: Path, timeout: float = DOWN_SECONDS) -> bool:
    """Stop the supervisor of the cluster with this folder; False when none runs. It stops its brokers.

    A supervisor that does not end in time is killed; its brokers then end by themselves. Raises `RegionForeign` when
    its process cannot be reached from here.
    """
    supervisor = supervisor_of(folder)
    if supervisor is None:
        return False
    if supervisor.boot_id != files.host_identity():     # its process id means another process here
        raise RegionForeign(f"the supervisor of the cluster in {folder} runs in another process-id namespace "
                            "(a container): stop the cluster there, or stop the container", region=folder.name,
                            reason="supervised elsewhere")
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor.pid, number)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not supervisor.alive:
                return True
            time.sleep(_POLL_SECONDS)
    return True


if __name__ == "__main__":
    sys.exit(supervise())
