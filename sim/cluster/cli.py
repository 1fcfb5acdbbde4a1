"""`cxlmq sim`: a whole cluster under a seed, in one process."""

import os
import re
from typing import Any

import click

from broker.errors import ConfigError
from client.cli.common import EXIT_FAILED, CommandExit, common_options, console, make_table, print_json, say, settings
from sim.cluster.hardware import HARDWARE
from sim.cluster.run import Verdict, run_scenario, run_seeds
from sim.cluster.scenario import FAULT_KINDS, STEPS, draw

HOSTS_MAX = 16
SHOWN_FAILURES = 5


def _seeds(text: str) -> range:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(setting="seeds", value=repr(text), allowed="A..B with A not above B, both included")
    return range(int(match[1]), int(match[2]) + 1)


def _faults(text: str) -> frozenset[str]:
    kinds = frozenset(FAULT_KINDS) if text == "all" else frozenset(each for each in text.split(",") if each)
    kinds -= {"none"}
    if unknown := kinds - set(FAULT_KINDS):
        raise ConfigError(setting="faults", value=repr(",".join(sorted(unknown))),
                          allowed=f"none, all, or some of {', '.join(FAULT_KINDS)} with commas between")
    return kinds


@click.command()
@click.option("--seed", type=click.IntRange(min=0), help="Run this seed.")
@click.option("--seeds", metavar="A..B", help="Run all seeds from A to B, over several cores.")
@click.option("--hosts", type=click.IntRange(1, HOSTS_MAX), default=4, show_default=True,
              help="Hosts with one broker each; host 0 is the head.")
@click.option("--steps", type=click.IntRange(100), default=STEPS, show_default=True,
              help="Steps of stages with traffic and faults; draining comes after them.")
@click.option("--faults", default="all", show_default=True, metavar="KIND,...",
              help="What may go wrong: crash, evict, stall, torn, net; or all, none.")
@click.option("--memory", type=click.Choice(sorted(HARDWARE)), default=sorted(HARDWARE)[-1], show_default=True,
              help="Whether hosts have caches of their own that are not coherent.")
@click.option("--jobs", type=click.IntRange(1), help="Processes for --seeds [one a core].")
@common_options
def sim(seed: int | None, seeds: str | None, hosts: int, steps: int, faults: str, memory: str,
        jobs: int | None) -> None:
    """Run a whole cluster in one process: deterministic, with faults, checked after every step.

    The stages are those of the broker processes. Clients publish, retry, reopen and read; a seed decides who steps next
    and what goes wrong. A failing seed fails again, to the byte.

    \b
    Examples:
      cxlmq sim --seed 123
      cxlmq sim --seed 123 --faults crash,stall --steps 50000 --json
      cxlmq sim --seeds 0..999

    Exit code 1 when an invariant does not hold.
    """
    options: dict[str, Any] = {"hosts": hosts, "steps": steps, "kinds": _faults(faults), "memory": memory}
    if (seed is None) == (seeds is None):
        raise click.UsageError("give --seed or --seeds")
    if seed is not None:
        _one(seed, options)
    else:
        assert seeds is not None
        _many(_seeds(seeds), jobs or os.cpu_count() or 1, options)


def _one(seed: int, options: dict[str, Any]) -> None:
    verdict = run_scenario(draw(seed, **options))
    if settings().as_json:
        print_json(verdict.to_json())
    else:
        click.echo(f"seed {verdict.seed}: {verdict.verdict}, {verdict.steps:,} steps, {verdict.batches:,} batches in "
                   f"the log, trace hash {verdict.trace_hash}")
        if verdict.failed:
            click.echo(_reason(verdict))
    if verdict.failed:
        raise CommandExit(EXIT_FAILED)


def _reason(verdict: Verdict) -> str:
    return f"seed {verdict.seed}: invariant {verdict.invariant} does not hold: {verdict.text}" if (
        verdict.verdict == "violation") else f"seed {verdict.seed}: {verdict.text}"


def _many(seeds: range, jobs: int, options: dict[str, Any]) -> None:
    from rich.progress import Progress

    verdicts: list[Verdict] = []
    with Progress(console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("seeds", total=len(seeds))
        for verdict in run_seeds(seeds, min(jobs, len(seeds)), **options):
            verdicts.append(verdict)
            progress.advance(task)
            if verdict.failed:
                say(_reason(verdict).splitlines()[0])
    failed = [verdict for verdict in verdicts if verdict.failed]
    steps, seconds = sum(each.steps for each in verdicts), sum(each.seconds for each in verdicts)
    if settings().as_json:
        print_json({"seeds": len(verdicts), "failed": [each.to_json() for each in failed], "steps": steps,
                    "batches": sum(each.batches for each in verdicts), "steps_per_second_and_core": steps / seconds})
    else:
        console().print(make_table("", (">seeds", ">failed", ">steps", ">batches ordered", ">steps/s and core"), [(
            f"{len(verdicts):,}", len(failed), f"{steps:,}", f"{sum(each.batches for each in verdicts):,}",
            f"{steps / seconds:,.0f}")]))
        if failed:
            click.echo("replay one: cxlmq sim --seed " + str(failed[0].seed))
    if failed:
        raise CommandExit(EXIT_FAILED)
