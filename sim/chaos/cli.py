"""`cxlmq chaos`: a real cluster under load and faults."""

import secrets
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy

from client.cli.common import EXIT_FAILED, CommandExit, common_options, console, make_table, print_json, say, settings
from client.cli.output import line
from sim.chaos.run import ChaosRun, Outcome, Settings
from sim.chaos.timeline import plot_timeline, timeline_text
from sim.chaos.verdict import MEANINGS


@click.command()
@click.option("--minutes", type=click.FloatRange(0.05), default=2.0, show_default=True, help="How long faults go on.")
@click.option("--seed", type=click.IntRange(0), help="Decides which faults come when [a random one].")
@click.option("--kills", type=click.IntRange(1), help="End after so many kills, if that comes first.")
@click.option("--brokers", type=click.IntRange(2, 16), default=4, show_default=True, help="Brokers of the cluster.")
@click.option("--pause", type=click.FloatRange(0.05), default=1.5, show_default=True,
              help="Seconds between two faults, on average.")
@click.option("--rate", type=click.FloatRange(1), default=150.0, show_default=True,
              help="Messages/s of each of the four publishers.")
@click.option("--damage/--no-damage", default=True, show_default=True, help="Flip bits of the region (see above).")
@click.option("--results", type=click.Path(file_okay=False), metavar="FOLDER",
              help="Keep trails, logs, disks and the picture there [a temporary folder, kept when something breaks].")
@common_options
def chaos(minutes: float, seed: int | None, kills: int | None, brokers: int, pause: float, rate: float,
          damage: bool, results: str | None) -> None:
    """Run a cluster under load and faults, and judge every invariant.

    Brokers, the head, publishers and readers are killed and stopped, disks fail, memory is damaged, garbage is sent.
    Afterwards the history of everything that was sent, acknowledged and read is checked, and level 2 by recovering
    from the disks.

    Damage flips bits in the order entries of a topic of its own, which is judged by itself: what memory has lost
    cannot be acknowledged and readable as well, but nobody may fall, no other topic may notice, and its readers get
    true messages or a typed error, and go on.

    \b
    Examples:
      cxlmq chaos
      cxlmq chaos --minutes 30 --kills 1000 --pause 1.2 --seed 7 --results chaos-7
      cxlmq chaos --minutes 1 --json

    Exit code 1 when an invariant is broken; the seed is printed.
    """
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    folder = Path(results or tempfile.mkdtemp(prefix="cxlmq-chaos-")).absolute()
    say(f"seed {seed}; trails and logs in {folder}")
    outcome = ChaosRun(Settings(seed, minutes * 60, folder, brokers, kills, pause, rate, damage=damage), say).run()
    plot_timeline(folder / "timeline.png", outcome)
    values = _values(seed, outcome, folder)
    if settings().as_json:
        print_json(values)
    else:
        _show(outcome, values)
    if not outcome.holds:
        say(f"an invariant is broken with seed {seed}; trails, logs and disks are in {folder}")
        raise CommandExit(EXIT_FAILED)
    if results is None:
        shutil.rmtree(folder, ignore_errors=True)


def _values(seed: int, outcome: Outcome, folder: Path) -> dict[str, Any]:
    resumed = outcome.resumed
    return {
        "seed": seed, "verdict": "ok" if outcome.holds else "broken", "broken": {
            name: text for name, text in outcome.broken.items() if text},
        "invariants": sorted(outcome.broken), "meanings": MEANINGS, "kills": outcome.kills,
        "faults": dict(Counter(fault.what for fault in outcome.faults)),
        "seconds": (outcome.ended_ns - outcome.begun_ns) / 1e9, "messages_acknowledged": outcome.messages,
        "resume_seconds": {"count": len(resumed), "p50": _percentile(resumed, 50), "p99": _percentile(resumed, 99)},
        "machine_stood_still_seconds": sum(end - begin for begin, end in outcome.pauses) / 1e9, "folder": str(folder),
    }


def _percentile(values: list[float], which: float) -> float | None:
    return float(numpy.percentile(values, which)) if values else None


def _show(outcome: Outcome, values: dict[str, Any]) -> None:
    line(timeline_text(outcome))
    faults = ", ".join(f"{count} {what}" for what, count in sorted(values["faults"].items()))
    line(f"{outcome.kills} kills; {faults}")
    resumed = values["resume_seconds"]
    if resumed["count"]:
        line(f"acks resumed after a head's death: p50 {resumed['p50']:.2f} s, p99 {resumed['p99']:.2f} s")
    if outcome.pauses:
        line(f"the machine stood still for {values['machine_stood_still_seconds']:.1f} s, which is not counted")
    acknowledged = ", ".join(f"{count:,} on {topic}" for topic, count in values["messages_acknowledged"].items())
    line(f"{acknowledged} acknowledged")
    console().print(make_table("", ("invariant", "what must hold", "verdict"), [
        (name, MEANINGS[name], text or "holds") for name, text in sorted(outcome.broken.items())]))
