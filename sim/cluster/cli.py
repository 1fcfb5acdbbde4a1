"""`cxlmq sim`: a whole cluster under a seed, in one process."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import click

from broker.errors import ConfigError
from client.cli.common import (
    EXIT_FAILED,
    SIZE,
    CommandExit,
    common_options,
    console,
    make_table,
    print_json,
    say,
    settings,
)
from client.cli.output import line
from sim.cluster.devices import find_device
from sim.cluster.diagram import describe, explain
from sim.cluster.hardware import HARDWARE
from sim.cluster.mutants import BY_NAME, MUTANTS, RULED_OUT, planted_bugs_markdown
from sim.cluster.plan_report import show_plan
from sim.cluster.promises import check_available, measured, ranges_text, shares
from sim.cluster.run import COHERENCE, Verdict, hunt, run_scenario, run_seeds
from sim.cluster.scenario import FAULT_KINDS, STEPS, Scenario, draw
from sim.cluster.shrink import shrink
from sim.cluster.world import remove_leftovers

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
              help="What may go wrong: hosts crash, lines are evicted early, hosts stall, lines reach memory torn, the "
                   "net delays and loses, the region is lost with all hosts (loss), disks fail or hold damage (disk): "
                   f"{', '.join(FAULT_KINDS)}; or all, none.")
@click.option("--memory", type=click.Choice(list(HARDWARE)), default="noncoherent", show_default=True,
              help="Coherent, hosts with caches that are not coherent, or these under the coherence checker, whose "
                   "findings count as failures.")
@click.option("--mutant", metavar="NAME", help="Plant this bug; --mutants lists them.")
@click.option("--mutants", is_flag=True, help="Plant every bug in turn, and say which seed sees it.")
@click.option("--output", type=click.Path(dir_okay=False), metavar="FILE",
              help="With --mutants: write the page of planted bugs there, without running anything.")
@click.option("--shrink/--no-shrink", "shrinks", default=True, help="Make a failing run small and draw it [shrink].")
@click.option("--profile", metavar="DEVICE", default="", help="Latencies and bandwidths of a device; see --plan.")
@click.option("--plan", is_flag=True, help="Predict throughput and latency for 1 to 64 hosts.")
@click.option("--message-bytes", type=SIZE, default=1024, metavar="SIZE", help="With --plan: size of a message [1KiB].")
@click.option("--batch-bytes", type=SIZE, default=1 << 20, metavar="SIZE", help="With --plan: size of a batch [1MiB].")
@click.option("--compare/--no-compare", "compares", default=True,
              help="With --plan: beside real runs of 4 brokers on this machine, for three message sizes [compare].")
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE.png", help="With --plan: a picture of it.")
@click.option("--jobs", type=click.IntRange(1), help="Processes for --seeds [one a core].")
@click.option("--coverage", is_flag=True,
              help="Say of each file that promises something how many of its lines ran, and which did not.")
@common_options
def sim(seed: int | None, seeds: str | None, hosts: int, steps: int, faults: str, memory: str, mutant: str | None,
        mutants: bool, output: str | None, shrinks: bool, profile: str, plan: bool, message_bytes: int,
        batch_bytes: int, compares: bool, plot: str | None, jobs: int | None, coverage: bool) -> None:
    """Run a whole cluster in one process: deterministic, with faults, checked after every step.

    The stages are those of the broker processes. Clients publish, retry, reopen and read; a seed decides who steps next
    and what goes wrong. A failing seed fails again, to the byte.

    \b
    Examples:
      cxlmq sim --seed 123
      cxlmq sim --seed 123 --faults crash,stall --steps 50000 --json
      cxlmq sim --seeds 0..999
      cxlmq sim --seeds 0..199 --coverage
      cxlmq sim --seed 1 --mutant entry-not-flushed
      cxlmq sim --seed 0 --mutant result-not-flushed --faults none --memory checked
      cxlmq sim --mutants
      cxlmq sim --plan --profile cxl-switch-xconn --plot curve.png

    Exit code 1 when an invariant does not hold.
    """
    remove_leftovers()
    if mutants:
        _all_mutants(output)
        return
    if profile:
        find_device(profile)
    if plan:
        show_plan(profile, message_bytes, batch_bytes, compares, plot)
        return
    options: dict[str, Any] = {"hosts": hosts, "steps": steps, "kinds": _faults(faults), "memory": memory,
                               "mutant": _known_mutant(mutant), "profile": profile}
    if (seed is None) == (seeds is None):
        raise click.UsageError("give --seed, --seeds, --mutants or --plan")
    if coverage:
        check_available()
    if seed is not None:
        _one(draw(seed, **options), shrinks, coverage)
    else:
        assert seeds is not None
        _many(_seeds(seeds), jobs or os.cpu_count() or 1, options, coverage)


def _known_mutant(name: str | None) -> str:
    if name and name not in BY_NAME:
        raise ConfigError(setting="mutant", value=repr(name), allowed=f"one of {', '.join(BY_NAME)}")
    return name or ""


def _one(scenario: Scenario, shrinks: bool, coverage: bool) -> None:
    verdict = measured(scenario) if coverage else run_scenario(scenario)
    if settings().as_json:
        print_json(verdict.to_json() | _coverage_json([verdict], coverage))
    else:
        line(f"seed {verdict.seed}: {verdict.verdict}, {verdict.steps:,} steps, {verdict.batches:,} batches in "
                   f"the log, trace hash {verdict.trace_hash}")
        if verdict.failed:
            line(_reason(verdict))
            if shrinks:
                _show_smallest(scenario, verdict)
        else:
            _say_times(verdict.simulated_seconds, verdict.seconds, Counter(verdict.faults))
        if coverage:
            _show_coverage([verdict])
    if verdict.failed:
        raise CommandExit(EXIT_FAILED)


def _show_smallest(scenario: Scenario, verdict: Verdict) -> None:
    """Make a failing run small, and draw its end."""
    say("making it smaller ...")
    smallest, found = shrink(scenario, verdict)
    picture, again = explain(smallest)
    assert again.trace_hash == found.trace_hash, "the same run fails in the same way"
    line(f"\nThe smallest run that fails so, {found.steps:,} steps:\n{describe(smallest)}\n\n{picture}\n\n"
               f"{_reason(found)}")


def _all_mutants(output: str | None) -> None:
    """Hunt every planted bug, or write the page that lists them."""
    if output is not None:
        Path(output).write_text(planted_bugs_markdown())
        return
    rows, missed = [], []
    for mutant in MUTANTS:
        found = hunt(mutant)
        missed += [mutant.name] if found is None else []
        rows.append({"class": mutant.number, "mutant": mutant.name, "what": mutant.what,
                     "invariant": found.invariant if found else None, "seeds": found.seed + 1 if found else None,
                     "tests": list(mutant.tests)})
        if not settings().as_json:
            say(f"{mutant.name}: {'NOT CAUGHT' if found is None else f'{found.invariant}, {found.seed + 1} seeds'}")
    if settings().as_json:
        print_json({"mutants": rows, "ruled_out": RULED_OUT, "missed": missed})
    else:
        console().print(make_table("", (">class", "mutant", "what is wrong", "seen by", ">within seeds", "tests"), [
            (row["class"], row["mutant"], row["what"], row["invariant"] or "nothing", row["seeds"] or "-",
             ", ".join(Path(each).stem for each in mutant.tests) or "-")
            for row, mutant in zip(rows, MUTANTS, strict=True)]))
        for number, why in RULED_OUT.items():
            line(f"class {number}: {why}")
    if missed:
        raise CommandExit(EXIT_FAILED)


def _reason(verdict: Verdict) -> str:
    if verdict.invariant == COHERENCE:
        return f"seed {verdict.seed}: the coherence checker reports:\n{verdict.text}"
    return f"seed {verdict.seed}: invariant {verdict.invariant} does not hold: {verdict.text}" if (
        verdict.verdict == "violation") else f"seed {verdict.seed}: {verdict.text}"


def _say_times(simulated: float, seconds: float, faults: Counter[str]) -> None:
    line(f"{simulated:,.1f} s simulated in {seconds:,.1f} s of a core: {simulated / seconds:,.3g} to 1")
    line("faults: " + (", ".join(f"{what} {count:,}" for what, count in sorted(faults.items())) or "none"))


def _coverage_json(verdicts: list[Verdict], coverage: bool) -> dict[str, Any]:
    if not coverage:
        return {}
    found = shares(each.ran for each in verdicts)
    return {"coverage": {"lines": sum(each.lines for each in found), "ran": sum(each.ran for each in found),
                         "files": [each.to_json() for each in found]}}


def _show_coverage(verdicts: list[Verdict]) -> None:
    """How much of what promises ran, by file, and the lines that did not."""
    found = shares(each.ran for each in verdicts)

    def percent(ran: int, lines: int) -> str:
        return f"{ran / max(lines, 1):.0%}"

    rows = [(each.promise.subject, each.promise.file, f"{each.lines:,}", percent(each.ran, each.lines),
             each.promise.why) for each in found]
    ran, lines = sum(each.ran for each in found), sum(each.lines for each in found)
    console().print(make_table("", ("subject", "file", ">lines", ">ran", "what it promises"),
                               [*rows, ("all", "", f"{lines:,}", percent(ran, lines), "")]))
    line("lines that did not run:")
    for each in found:
        if each.missing:
            line(f"  {each.promise.file}: {ranges_text(each.missing) if each.ran else 'all'}")


def _command(seed: int) -> str:
    """What runs this seed as it ran here."""
    context = click.get_current_context()
    given = [f" --{each} {context.params[each]}" for each in ("hosts", "steps", "faults", "memory", "mutant")
             if context.get_parameter_source(each) is not click.core.ParameterSource.DEFAULT]
    return f"cxlmq sim --seed {seed}{''.join(given)}"


def _many(seeds: range, jobs: int, options: dict[str, Any], coverage: bool) -> None:
    from rich.progress import Progress

    verdicts: list[Verdict] = []
    with Progress(console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("seeds", total=len(seeds))
        for verdict in run_seeds(seeds, min(jobs, len(seeds)), measured if coverage else run_scenario, **options):
            verdicts.append(verdict)
            progress.advance(task)
            if verdict.failed:
                say(_reason(verdict).splitlines()[0])
    failed = [verdict for verdict in verdicts if verdict.failed]
    steps, seconds = sum(each.steps for each in verdicts), sum(each.seconds for each in verdicts)
    simulated = sum(each.simulated_seconds for each in verdicts)
    faults = sum((Counter(each.faults) for each in verdicts), Counter[str]())
    if settings().as_json:
        print_json({"seeds": len(verdicts), "failed": [each.to_json() for each in failed], "steps": steps,
                    "batches": sum(each.batches for each in verdicts), "steps_per_second_and_core": steps / seconds,
                    "simulated_seconds": simulated, "simulated_per_real_second": simulated / seconds,
                    "faults": dict(sorted(faults.items()))} | _coverage_json(verdicts, coverage))
    else:
        console().print(make_table("", (">seeds", ">failed", ">steps", ">batches ordered", ">steps/s and core"), [(
            f"{len(verdicts):,}", len(failed), f"{steps:,}", f"{sum(each.batches for each in verdicts):,}",
            f"{steps / seconds:,.0f}")]))
        _say_times(simulated, seconds, faults)
        if coverage:
            _show_coverage(verdicts)
        if failed:
            line(f"replay one: {_command(failed[0].seed)}")
    if failed:
        raise CommandExit(EXIT_FAILED)
