"""`cxlmq cluster up|list|status|down`."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import click

from broker.errors import CxlmqError, PermissionDenied, RegionForeign, RegionMissing
from client.cli import common, output
from client.cli.common import (
    EXIT_FAILED,
    CommandExit,
    common_options,
    config_options,
    default_cluster,
    print_json,
    say,
    settings,
    target_options,
)

_DOWN_SECONDS = 20.0


@click.group()
def cluster() -> None:
    """Start, look at and stop a cluster on this machine."""


# ---- up ----------------------------------------------------------------------------------------------------------


@cluster.command()
@click.option("--recover", type=click.Path(file_okay=False), metavar="DIR", help=(
    "Rebuild topics and positions from the replicas in this data directory, after the memory was lost."))
@click.option("--fresh", is_flag=True, help="Set aside what an earlier cluster left in the data directory.")
@click.option("--detach", "-d", is_flag=True, help="Run in the background; return when every broker answers.")
@config_options
@common_options
def up(recover: str | None, fresh: bool, detach: bool, overrides: dict[str, Any]) -> None:
    """Start a cluster; Ctrl-C stops it and leaves nothing behind.

    Without --name, a second cluster is called default-2, and so on. Settings come from --config, then from CXLMQ_*
    variables (CXLMQ_BROKERS=2), then from options.

    \b
    Examples:
      cxlmq cluster up                                  four brokers, 1 GiB of shared memory
      cxlmq cluster up -d --brokers 2 --region-bytes 64MiB
      cxlmq cluster up --name lab --listen-host 0.0.0.0 --listen-port 7000 --security ~/lab-security
      cxlmq cluster up --recover /srv/frames            from the data directory of a cluster that was killed
    """
    from broker.config import load_config

    config = load_config(**overrides)
    exact_name = True if overrides["name"] else None
    if detach:
        from client.cluster import start_detached

        _tell_profile(config)
        values = start_detached(config, exact_name, recover, fresh)
        for note in values["notes"]:
            say(f"note: {note}")
        _print_cluster(values, detached=True)
        return
    _foreground(config, exact_name, recover, fresh)


def _foreground(config: Any, exact_name: bool | None, recover: str | None, fresh: bool) -> None:
    from client.cluster import Cluster, describe, interrupted_by_signals
    from client.coherence import tell_coherence

    stopped = False
    _tell_profile(config)
    running = Cluster(config, exact_name=exact_name, on_note=lambda text: say(f"note: {text}"), recover=recover,
                      fresh=fresh)
    with interrupted_by_signals():
        with running:
            try:
                _print_cluster(describe(running), detached=False)
                running.wait()
            except KeyboardInterrupt:       # the way to stop it: no failure
                say("stopping ...")
                stopped = True
        tell_coherence(running.name, running.config.folder.parent, say)
        if not stopped:
            raise CxlmqError("every broker has ended: see the notes above, and `cxlmq cluster up` to start again")


def _tell_profile(config: Any) -> None:
    from client.coherence import profile_report, profile_text

    if config.profile:
        say(f"profile: {profile_text(profile_report(config.profile))}")


def _print_cluster(values: dict[str, Any], detached: bool) -> None:
    name = values["name"]
    option = "" if name == default_cluster() else f" --cluster {name}"
    stop = f"cxlmq cluster down{'' if not option else ' ' + name}" if detached else "Ctrl-C"
    width = max(len(broker["tcp_address"]) for broker in values["brokers"])
    common.report(values, "\n".join([
        f"cluster {name!r} is up: {len(values['brokers'])} brokers, "
        f"{common.bytes_text(values['region_bytes'])} of shared memory\n",
        *_recovery_lines(values["recovery"]),
        *(f"  broker {broker['id']}  pid {broker['pid']:<8} {broker['tcp_address']:<{width}}  {broker['unix_address']}"
          for broker in values["brokers"]),
        f"\ntry:   cxlmq topic create greetings{option}",
        f"       echo hello | cxlmq produce greetings{option}",
        f"       cxlmq consume greetings{option}",
        f"       cxlmq cluster status{' ' + name if option else ''} --watch",
        f"stop:  {stop}\nlogs:  {values['folder']}"]))


def _recovery_lines(report: dict[str, Any] | None) -> list[str]:
    """What came back, and every range that did not."""
    if report is None:
        return []
    lines = [f"recovered from {report['folder']}:"]
    for topic in report["topics"]:
        lines.append(f"  topic {topic['name']!r}: {topic['messages']:,} messages, positions {topic['first_position']} "
                     f"to {topic['end_position']}, {topic['sessions']} sessions")
        if topic["in_memory_only"]:
            lines.append("    it had replication factor 1: all its messages were in memory, and are lost")
        lines += [f"    lost: positions {lost['first']} to {lost['end'] - 1} ({lost['reason']})"
                  for lost in topic["lost"]]
    lines += [f"  damaged: {each['path']} at byte {each['offset']}: {each['what']}" for each in report["damage"]]
    lines += [f"  group {each['group']!r} of topic {each['topic']!r}: position {each['position']}"
              for each in report["groups"]]
    lines += [f"  damaged: {text}" for text in report["damaged_groups"]]
    lines += [f"  not restored: {text}" for text in report["ignored"]]
    return [*lines, ""]


# ---- down --------------------------------------------------------------------------------------------------------


@cluster.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Stop all clusters of this user.")
@common_options
def down(name: str | None, every: bool) -> None:
    """Stop a cluster, in the background or in another terminal, and remove what it used.

    \b
    Examples:
      cxlmq cluster down
      cxlmq cluster down default-2
      cxlmq cluster down --all
    """
    from broker.region import find_regions
    from client.coherence import tell_coherence

    if every and name:
        raise click.UsageError("give a name or --all, not both")
    names = [each.name for each in find_regions() if each.live] if every else [name or default_cluster()]
    roots: dict[str, Path] = {}
    stopped: list[dict[str, str]] = []
    refused: dict[str, CxlmqError] = {}
    for each in names:
        try:
            roots[each] = _folder_of(each).parent
            stopped.append({"name": each, "how": _stop(each)})
        except CxlmqError as error:
            if not every:
                raise
            refused[each] = error           # the others are stopped all the same
    common.report({"stopped": stopped, "not_stopped": [{"name": each, "error": error.message}
                                                       for each, error in refused.items()]},
                  "\n".join(f"cluster {each['name']!r} {each['how']}" for each in stopped)
                  or ("" if refused else "no cluster runs"))
    for done in stopped:
        tell_coherence(done["name"], roots[done["name"]], say)
    if refused:
        raise CxlmqError(f"{len(refused)} of {len(names)} clusters are not stopped:" + "".join(
            f"\n  {each!r}: {error.message}" for each, error in refused.items()))


def _stop(name: str) -> str:
    """Stop one cluster; say how it went. Raises `RegionMissing` when there is none."""
    from client.claim import name_is_free
    from client.cluster import collect_leftovers, stop_cluster

    folder = _folder_of(name)
    supervised = stop_cluster(folder)
    if not supervised and not _signal_brokers(name):
        was_there = not _wait_until_gone(name, 0.0)
        if name in collect_leftovers(folder.parent) or (was_there and name_is_free(name, folder.parent)):
            return "was dead already; its leftovers are removed"
        raise RegionMissing(f"there is no cluster {name!r} to stop", region=name)
    if _wait_until_gone(name, _DOWN_SECONDS):
        return "is stopped"
    _signal_brokers(name, signal.SIGKILL)
    _wait_until_gone(name, 1.0)
    if name in collect_leftovers(folder.parent) or _wait_until_gone(name, 0.0):
        return "did not stop in time and was killed"
    raise CxlmqError(f"cluster {name!r} did not stop: see `cxlmq cluster status {name}`")


def _folder_of(name: str) -> Path:
    """The cluster's folder, as its region says; without a region, where it would be."""
    from broker.config import FOLDER_PREFIX, load_config, runtime_root
    from broker.region import attach_region

    try:
        with attach_region(name, writable=False) as region:
            return region.folder
    except CxlmqError:
        load_config(name=name)              # refuses names that would leave the folder
        return runtime_root() / f"{FOLDER_PREFIX}{name}"


def _signal_brokers(name: str, number: int = signal.SIGTERM) -> bool:
    """Signal a cluster's brokers, for one that has no supervisor; False when none runs."""
    from broker.inspection import inspect_region
    from broker.region import attach_region
    from sim.cxl.region import host_identity

    try:
        with attach_region(name, writable=False) as region:
            pids = [each["pid"] for each in inspect_region(region)["brokers"] if each["pid"] and each["alive"]]
            here = region.superblock["boot_id"] == host_identity()
    except CxlmqError:
        return False
    if pids and not here:                   # they mean other processes here
        raise RegionForeign(f"the brokers of cluster {name!r} run in another process-id namespace (a container): stop "
                            "them there, or stop the container", region=name, reason="runs elsewhere")
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        except PermissionError:
            raise PermissionDenied(f"cluster {name!r} belongs to another user, who can stop it") from None
    return bool(pids)


def _wait_until_gone(name: str, seconds: float) -> bool:
    """Whether the region goes within this time."""
    from sim.cxl.region import REGION_PREFIX, RegionFileMissing, region_file

    deadline = time.monotonic() + seconds
    while True:
        try:
            region_file(REGION_PREFIX + name)
        except RegionFileMissing:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)


# ---- list --------------------------------------------------------------------------------------------------------


@cluster.command("list")
@common_options
def list_() -> None:
    """List the clusters of this user on this machine, with what dead ones have left.

    \b
    Examples:
      cxlmq cluster list
      cxlmq cluster list --json | jq -r '.[] | select(.live) | .name'
    """
    from broker.region import find_regions

    found = [_summary(each) for each in sorted(find_regions(), key=lambda each: each.name)]
    if settings().as_json:
        print_json(found)
    elif found:
        common.console().print(common.make_table("", ("name", "state", ">brokers", ">head", ">topics", ">memory"), [
            (each["name"], "up" if each["live"] else f"dead ({each['reason']})", _or_dash(each["brokers"]),
             _or_dash(each["head"]), _or_dash(each["topics"]), common.bytes_text(each["region_bytes"]))
            for each in found]))
    else:
        output.line("there are no clusters: `cxlmq cluster up` starts one")


def _summary(found: Any) -> dict[str, Any]:
    """What a region says of its cluster; None for what a damaged one does not."""
    from broker.inspection import inspect_region
    from broker.region import attach_region

    values: dict[str, Any] = {"name": found.name, "live": found.live, "reason": found.reason,
                              "region_bytes": found.bytes, "brokers": None, "head": None, "topics": None}
    try:
        with attach_region(found.name, writable=False) as region:
            inspected = inspect_region(region)
    except CxlmqError:
        return values
    alive = sum(each["alive"] for each in inspected["brokers"])
    return values | {"brokers": f"{alive} of {len(inspected['brokers'])}", "topics": len(inspected["topics"]),
                     "head": inspected["control"]["sequencer_broker"] if alive else None}


def _or_dash(value: object) -> object:
    return "-" if value is None else value


# ---- status ------------------------------------------------------------------------------------------------------


@cluster.command()
@click.argument("name", required=False)
@click.option("--watch", "-w", is_flag=True, help="Repeat, with rates, until Ctrl-C.")
@click.option("--interval", type=common.DURATION, default="1s", show_default=True, help="Between two looks.")
@target_options
def status(name: str | None, watch: bool, interval: float, target: common.Target) -> None:
    """Show brokers, topics and memory of a cluster, alive or dead.

    It reads the shared memory and asks nobody, so it works when no broker answers. With --bootstrap it asks a broker.
    The exit code is 1 when a broker is not running.

    \b
    Examples:
      cxlmq cluster status
      cxlmq cluster status lab --watch
      cxlmq cluster status --json | jq '.topics[].end_position'
    """
    from client.cli import status as view

    if target.bootstrap:
        healthy = view.remote(target)
    elif watch:
        healthy = view.watch(name or target.cluster, interval)
    else:
        healthy = view.once(name or target.cluster)
    if not healthy:
        raise CommandExit(EXIT_FAILED)
