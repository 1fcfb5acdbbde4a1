"""What `cxlmq cluster status` shows: read from the region, with the processes' own figures beside it."""

import contextlib
import time
from typing import Any

import psutil

from broker.inspection import inspect_region, region_statistics
from broker.region import Region, attach_region
from broker.replica_watch import replaced_replicas
from client.cli import common, output
from client.restarts import endings_in
from sim.cxl.clock import SystemClock
from sim.cxl.region import host_identity

_SAMPLE_SECONDS = 0.2


class Sampler:
    """Looks at a region again and again; rates and processor use are between two looks."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._clock = SystemClock()
        self._before: dict[str, Any] | None = None
        self._taken = 0.0
        # Process ids of another container mean other processes here, or none.
        self._knows_processes = region.superblock["boot_id"] == host_identity()
        self._endings: dict[int, dict[str, Any]] = {}

    def sample(self) -> dict[str, Any]:
        """The cluster now, as JSON values; rates are None in the first look."""
        now = time.monotonic()
        inspected, statistics = inspect_region(self._region), region_statistics(self._region)
        self._endings = endings_in(self._region.folder)
        seconds = now - self._taken
        values = {
            "name": self._region.name, "epoch": inspected["control"]["epoch"],
            "head": inspected["control"]["sequencer_broker"],
            "region_bytes": self._region.superblock["region_bytes"],
            "age_seconds": round(time.time() - self._region.superblock["created_wall_ns"] / 1e9, 3),
            "brokers": [self._broker(each, statistics["brokers"][each["broker"]]) for each in inspected["brokers"]],
            "topics": [_topic(each, inspected["control"]["live_brokers"]) for each in inspected["topics"]],
            "sessions": sum(each["state"] == "open" for each in inspected["sessions"]),
            "readers": len(inspected["cursors"]),
            "pool": {key: inspected["pool"][key] for key in ("segments", "used", "free", "warm", "segment_bytes")},
        }
        _add_rates(values, self._before, seconds)
        self._before, self._taken = values, now
        return values

    def _broker(self, line: dict[str, Any], counters: dict[str, Any]) -> dict[str, Any]:
        age = (self._clock.now() - line["heartbeat_ns"]) / 1e6 if line["heartbeat_ns"] else None
        return {
            "id": line["broker"], "state": line["state"], "alive": line["alive"], "pid": line["pid"],
            "heartbeat_age_ms": None if age is None else round(age, 1),
            "tcp_address": line["tcp_address"], "unix_address": line["unix_address"],
            "messages_received": counters["messages_received"], "bytes_received": counters["bytes_received"],
            "bytes_delivered": counters["bytes_delivered"],
            **(_process(line["pid"]) if line["alive"] and self._knows_processes else _NO_PROCESS),
            **_ending(self._endings.get(line["broker"])),
        }


_NO_PROCESS = {"rss_bytes": None, "private_bytes": None, "cpu_seconds": None}


def _ending(found: dict[str, Any] | None) -> dict[str, Any]:
    """How often a broker's process ended and was started anew, how it ended last, and whether it was given up."""
    found = found or {}
    return {"endings": found.get("endings", 0), "last_ending": found.get("how"), "in_a_row": found.get("row", 0),
            "given_up": bool(found.get("given_up"))}


def _process(pid: int) -> dict[str, Any]:
    """Memory and processor time; the region's pages are shared and count in `rss_bytes` alone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        memory, times = process.memory_info(), process.cpu_times()
        return {"rss_bytes": memory.rss, "private_bytes": memory.rss - memory.shared,
                "cpu_seconds": times.user + times.system}
    return _NO_PROCESS


def _topic(topic: dict[str, Any], live: int) -> dict[str, Any]:
    def position_of(source: int, replica: int) -> int:
        lines = [each for each in topic["brokers"][source]["replicas"] if each["replica"] == replica]
        return sum(int(each["replicated_position"]) for each in lines if each["generation"] == topic["generation"])

    return {
        "notes": replaced_replicas(topic["topic"], topic["generation"], topic["replication_factor"], live,
                                   len(topic["brokers"]), position_of),
        "name": topic["name"], "state": topic["state"], "order": topic["order"], "ack": topic["ack"],
        "replication_factor": topic["replication_factor"],
        "first_position": topic["reclaimed_position"], "end_position": topic["committed_position"],
        "committed_batches": topic["committed_index"], "committed_bytes": topic["committed_bytes"],
        "written": sum(each["written"] for each in topic["brokers"]),
        "ordered": sum(each["ordered"] for each in topic["brokers"]),
        "holder": topic["holder"],
    }


def _add_rates(values: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> None:
    brokers = {each["id"]: each for each in before["brokers"]} if before else {}
    for broker in values["brokers"]:
        old = brokers.get(broker["id"], _NO_PROCESS)["cpu_seconds"]
        known = old is not None and broker["cpu_seconds"] is not None
        broker["cpu_percent"] = round((broker["cpu_seconds"] - old) / seconds * 100, 1) if known else None
    topics = {each["name"]: each for each in before["topics"]} if before else {}
    for topic in values["topics"]:
        old = topics.get(topic["name"])
        for key, source in (("messages_per_second", "end_position"), ("bytes_per_second", "committed_bytes")):
            topic[key] = max(0.0, round((topic[source] - old[source]) / seconds, 1)) if old else None


def _healthy(values: dict[str, Any]) -> bool:
    return all(broker["alive"] and broker["state"] == "ready" for broker in values["brokers"])


# ---- views -------------------------------------------------------------------------------------------------------


def once(name: str) -> bool:
    """One look, long enough for the use of the processors; whether every broker is well."""
    with attach_region(name, writable=False) as region:
        sampler = Sampler(region)
        sampler.sample()
        time.sleep(_SAMPLE_SECONDS)
        values = sampler.sample()
    if common.settings().as_json:
        common.print_json(values)
    else:
        common.console().print(_render(values))
    return _healthy(values)


def watch(name: str, interval: float) -> bool:
    """Look until Ctrl-C, or until the cluster is gone."""
    from rich.live import Live

    with attach_region(name, writable=False) as region:
        sampler = Sampler(region)
        if common.settings().as_json:
            while _is_there(name):
                common.print_json(sampler.sample())
                time.sleep(interval)
            return True
        console = common.console()
        with Live(_render(sampler.sample()), console=console, auto_refresh=False) as live:
            while _is_there(name):
                time.sleep(interval)
                live.update(_render(sampler.sample()), refresh=True)
    output.line(f"cluster {name!r} has gone")
    return True


def _is_there(name: str) -> bool:
    from sim.cxl.region import REGION_PREFIX, RegionFileMissing, region_file

    try:
        region_file(REGION_PREFIX + name)
    except RegionFileMissing:
        return False
    return True


def remote(target: common.Target) -> bool:
    """What a broker tells about its cluster."""
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        values = {**admin.describe_cluster(), "topics": admin.list_topics()}
    if common.settings().as_json:
        common.print_json(values)
    else:
        rows = [(_named(each["id"], values["head"]), each["state"], each["pid"], each["heartbeat_age_ms"],
                 each["tcp_address"]) for each in values["brokers"]]
        shown = common.console()
        title = f"cluster {values['name']}, head {values['head']}, epoch {values['epoch']}"
        shown.print(common.make_table(title,
                                       (">broker", "state", ">pid", ">heartbeat ms", "address"), rows))
        if values["topics"]:
            shown.print(common.make_table("topics", ("name", ">first", ">end"), [
                (each["name"], each["first_position"], each["end_position"]) for each in values["topics"]]))
    return all(str(each["state"]).lower().endswith("ready") for each in values["brokers"])


def _render(values: dict[str, Any]) -> Any:
    from rich.console import Group

    pool = values["pool"]
    brokers = common.make_table(
        f"cluster {values['name']}: up {values['age_seconds']:.0f} s, head {values['head']}, "
        f"epoch {values['epoch']}, memory {common.bytes_text(pool['used'] * pool['segment_bytes'])} used of "
        f"{common.bytes_text(pool['segments'] * pool['segment_bytes'])}, {values['sessions']} publisher sessions, "
        f"{values['readers']} readers",
        (">broker", "state", ">pid", ">heartbeat", ">CPU", ">memory", ">messages in", "address"),
        [_broker_row(each, values["head"]) for each in values["brokers"]])
    ended = [_ending_text(each) for each in values["brokers"] if each["endings"]]
    topics = common.make_table(
        "topics", ("name", ">order", ">ack", ">RF", ">first", ">end", ">bytes", ">messages/s", ">MB/s", "held by"),
        [_topic_row(each) for each in values["topics"]]) if values["topics"] else "no topics"
    notes = [f"topic {each['name']}: {note}" for each in values["topics"] for note in each["notes"]]
    return Group(brokers, *ended, topics, *notes)


def _ending_text(broker: dict[str, Any]) -> str:
    times = "once" if broker["endings"] == 1 else f"{broker['endings']} times"
    row = f", {broker['in_a_row']} times in a row like this" if broker["in_a_row"] > 1 else ""
    then = "; it is not started any more: see its log" if broker["given_up"] else ""
    return f"broker {broker['id']} has ended {times}, last {broker['last_ending']}{row}{then}"


def _named(broker: int, head: int) -> str:
    return f"{broker} (head)" if broker == head else str(broker)


def _broker_row(broker: dict[str, Any], head: int) -> tuple[object, ...]:
    alive = broker["alive"]
    state = broker["state"] if alive or broker["state"] in ("absent", "stopped") else f"dead (was {broker['state']})"
    age, cpu, memory = broker["heartbeat_age_ms"], broker["cpu_percent"], broker["private_bytes"]
    return (_named(broker["id"], head), state, broker["pid"] or "-", "-" if age is None else f"{age:.0f} ms",
            "-" if cpu is None else f"{cpu:.0f} %", "-" if memory is None else common.bytes_text(memory),
            f"{broker['messages_received']:,}", broker["tcp_address"] or "-")


def _topic_row(topic: dict[str, Any]) -> tuple[object, ...]:
    rate, speed = topic["messages_per_second"], topic["bytes_per_second"]
    return (topic["name"] if topic["state"] == "active" else f"{topic['name']} ({topic['state']})", topic["order"],
            topic["ack"], topic["replication_factor"], topic["first_position"], topic["end_position"],
            common.bytes_text(topic["committed_bytes"]), "-" if rate is None else f"{rate:,.0f}",
            "-" if speed is None else f"{speed / 1e6:.1f}", topic["holder"])
