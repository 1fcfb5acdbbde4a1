"""`cxlmq region inspect|verify|gc|layout`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from client.cli import common, output
from client.cli.common import (
    EXIT_FAILED,
    CommandExit,
    common_options,
    config_options,
    default_cluster,
    print_json,
    settings,
)


@click.group()
def region() -> None:
    """Look into shared memory, and remove what dead clusters left."""


# ---- inspect -----------------------------------------------------------------------------------------------------


@region.command()
@click.argument("name", required=False)
@common_options
def inspect(name: str | None) -> None:
    """Show everything that a cluster's region holds, of a running or a dead cluster.

    --json prints every record and counter; without it, the most useful.

    \b
    Examples:
      cxlmq region inspect
      cxlmq region inspect lab --json | jq .statistics.sequencer
    """
    from broker.inspection import inspect_region, region_statistics
    from broker.region import attach_region

    with attach_region(name or default_cluster(), writable=False) as attached:
        values = {**inspect_region(attached), "statistics": region_statistics(attached)}
    if settings().as_json:
        print_json(values)
    else:
        for part in _parts(values):
            common.console().print(part)


def _parts(values: dict[str, Any]) -> list[Any]:
    superblock, control, pool = values["superblock"], values["control"], values["pool"]
    parts: list[Any] = [
        f"region {values['name']}: {common.bytes_text(superblock['region_bytes'])}, layout version "
        f"{superblock['version']}, run {superblock['run_id']:x}, created by process {superblock['owner_pid']}\n"
        f"sequencer: broker {control['sequencer_broker']}, epoch {control['epoch']}, {control['scanners']} scanners\n"
        f"pool: {pool['strategy']}, {pool['used']} of {pool['segments']} segments of "
        f"{common.bytes_text(pool['segment_bytes'])} used, {pool['warm']} warm",
        common.make_table("brokers", (">broker", "state", "alive", ">pid", "address"), [
            (each["broker"], each["state"], "yes" if each["alive"] else "no", each["pid"], each["tcp_address"])
            for each in values["brokers"]]),
    ]
    for topic in values["topics"]:
        parts.append(_frontiers(topic))
    parts += [_listing("sessions", values["sessions"], ("session", "state", "client_id", "topic", "expected", "held")),
              _listing("readers", values["cursors"], ("cursor", "name", "state", "topic", "index", "position", "pid")),
              _listing("attached clients", values["attached"],
                       ("slot", "broker", "state", "topic", "session", "leases", "pid")),
              _listing("groups", values["groups"], ("group", "topic", "state", "position", "lag", "holder")),
              _accesses(values["statistics"])]
    return [part for part in parts if part is not None]


def _frontiers(topic: dict[str, Any]) -> Any:
    """Invariant: reclaimed <= committed <= ordered <= delegated, in one line a broker."""
    rows = [(each["broker"], each["delegated"], each["scanned"], each["reclaimed"], each["written"],
             each["ordered"], " ".join(f"{replica['replica']}:{replica['replicated_position']}"
                                       for replica in each["replicas"]) or "-") for each in topic["brokers"]]
    title = (f"topic {topic['name']!r} (number {topic['topic']}, generation {topic['generation']}, {topic['state']}): "
             f"positions {topic['reclaimed_position']} to {topic['committed_position']}, held back by "
             f"{topic['holder']}")
    return common.make_table(title, (">broker", ">delegated", ">scanned", ">freed", ">written",
                                     ">ordered", "replicas"), rows)


def _listing(title: str, found: list[dict[str, Any]], keys: tuple[str, ...]) -> Any:
    if not found:
        return None
    return common.make_table(title, keys, ([each.get(key, "-") for key in keys] for each in found))


def _accesses(statistics: dict[str, Any]) -> Any:
    keys = tuple(statistics["total"])
    rows = [(role, *(f"{counters[key]:,}" for key in keys)) for role, counters in statistics["roles"].items()
            if any(counters.values())]
    return common.make_table("accesses to memory, by role", ("role", *(">" + key for key in keys)), rows)


# ---- verify ------------------------------------------------------------------------------------------------------


@region.command()
@click.argument("what", required=False, metavar="[NAME|PATH]")
@click.option("--replicas", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Check the replica files below this data directory, too.")
@common_options
def verify(what: str | None, replicas: Path | None) -> None:
    """Check every record of a region, live or dead, and of replica files, and name each damaged range.

    Nothing is changed or removed. Without a name or path, --replicas checks files alone. The exit code is 1 when
    something is damaged; what an interrupted write left at the end of a file, and was never promised, is a "tail".

    \b
    Examples:
      cxlmq region verify
      cxlmq region verify /dev/shm/cxlmq-lab --json
      cxlmq region verify --replicas /srv/frames
    """
    from broker.config import resolved
    from broker.verify import verify_region, verify_replicas

    found = []
    if what is not None or replicas is None:
        mapping, where, live = _mapped(what or default_cluster())
        found += verify_region(mapping, where, live)
    if replicas is not None:
        found += verify_replicas(Path(resolved(replicas, "replicas")))
    damaged = [each for each in found if each.kind == "damage"]
    if settings().as_json:
        print_json({"damaged": bool(damaged), "findings": [asdict(each) for each in found]})
    else:
        for each in found:
            output.line(each.text())
        output.line(f"{len(damaged)} damaged ranges" if damaged else "nothing is damaged")
    if damaged:
        raise CommandExit(EXIT_FAILED)


def _mapped(what: str) -> tuple[Any, str, bool]:
    """The mapping of a region by name or path, where it is, and whether somebody may be writing to it."""
    from broker.errors import PermissionDenied, RegionForeign, RegionMissing
    from broker.region import find_regions
    from sim.cxl.region import (
        REGION_PREFIX,
        SHARED_MEMORY_FOLDER,
        RegionFileDenied,
        RegionFileError,
        RegionFileMissing,
        map_path,
    )

    path = Path(what) if "/" in what else Path(SHARED_MEMORY_FOLDER) / (REGION_PREFIX + what)
    name = path.name.removeprefix(REGION_PREFIX)
    try:
        mapping = map_path(path)
    except RegionFileMissing as error:
        raise RegionMissing(region=what) from error
    except RegionFileDenied as error:
        raise PermissionDenied(what=f"region {what}") from error
    except (RegionFileError, OSError) as error:
        raise RegionForeign(region=what, reason=str(error)) from error
    live = path.parent == Path(SHARED_MEMORY_FOLDER) and any(each.live for each in find_regions() if each.name == name)
    return mapping, str(path), live


# ---- gc ----------------------------------------------------------------------------------------------------------


@region.command()
@click.option("--dry-run", "-n", is_flag=True, help="Only say what would be removed.")
@common_options
def gc(dry_run: bool) -> None:
    """Remove the regions, semaphores and folders of clusters whose processes are all dead.

    A cluster that may be alive is never touched. `cxlmq cluster up` does the same when it starts.

    \b
    Examples:
      cxlmq region gc --dry-run
      cxlmq region gc
    """
    from broker.region import find_regions
    from client.cluster import collect_leftovers

    before = find_regions()
    removed = collect_leftovers(dry_run=dry_run)
    kept = [each for each in before if each.name not in removed]
    verb = "would remove" if dry_run else "removed"
    lines = [f"{verb} {name} ({_size(before, name)})" for name in removed]
    lines += [f"kept {each.name} ({common.bytes_text(each.bytes)}): {each.reason}" for each in kept]
    common.report({"dry_run": dry_run, "removed": removed, "kept": [asdict(each) for each in kept]},
                  "\n".join(lines) or "there are no regions")


def _size(regions: list[Any], name: str) -> str:
    return next((common.bytes_text(each.bytes) for each in regions if each.name == name), "only its folder")


# ---- layout ------------------------------------------------------------------------------------------------------


@region.command()
@click.option("--output", "-o", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write into this file.")
@config_options
@common_options
def layout(file: Path | None, overrides: dict[str, Any]) -> None:
    """Print where every record lies in a region of these settings, as Markdown.

    \b
    Examples:
      cxlmq region layout --output memory-bank/dataStructures.md
      cxlmq region layout --brokers 2 --region-bytes 64MiB
    """
    from broker.config import layout_of, load_config
    from broker.layout_page import data_structures_markdown

    computed = layout_of(load_config(**overrides))
    text = data_structures_markdown(computed)
    if file is not None:
        file.write_text(text)
        common.say(f"written: {file}")
    elif settings().as_json:
        sections = [{"section": name, "offset": offset, "bytes": nbytes or computed.numbers["region_bytes"] - offset}
                    for name, offset, nbytes in computed.sections]
        print_json({"numbers": computed.numbers, "sections": sections, "markdown": text})
    else:
        output.line(text.rstrip("\n"))
