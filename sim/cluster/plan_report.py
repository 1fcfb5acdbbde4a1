"""`cxlmq sim --plan`: the predicted curve as a table, as bars, as a picture, and beside real runs."""

import os
from collections.abc import Sequence
from typing import Any

import click

from client.bench.report import bar_chart, new_figure
from client.cli.common import console, make_table, print_json, say, settings
from sim.cluster.devices import device_names, find_device
from sim.cluster.plan import Costs, Point, compare, curve, measure_costs, to_json
from sim.cxl.profiles import Profile


def show_plan(profile: str, message_bytes: int, batch_bytes: int, compares: bool, plot: str | None) -> None:
    """Measure what steps cost here, predict, compare, and print."""
    device = find_device(profile) if profile else None
    cores = os.cpu_count() or 1
    costs = measure_costs(batch_bytes=batch_bytes, progress=say)
    points = curve(costs, device, message_bytes, batch_bytes, cores=None if device else cores)
    compared = compare(costs, batch_bytes, cores, progress=say) if compares else []
    if plot is not None and not plot_curve(plot, points, device):
        say("no picture: matplotlib is not installed (pip install 'cxlmq[plots]')")
    if settings().as_json:
        print_json({"profile": profile or "this machine", "message_bytes": message_bytes, "batch_bytes": batch_bytes,
                    "assumed": list(device.assumed) if device else [], "ns_per_batch": costs.per_batch,
                    "packing_ns_per_byte": costs.packing, "points": to_json(points), "compared": compared})
        return
    _print(costs, points, compared, device, cores)


def _print(costs: Costs, points: Sequence[Point], compared: Sequence[dict[str, Any]], device: Profile | None,
           cores: int) -> None:
    steps = ", ".join(f"{name} {nanoseconds:,.0f}" for name, nanoseconds in costs.per_batch.items())
    click.echo(f"measured here, ns per batch: {steps}")
    if device is None:
        click.echo(f"device: this machine's memory, all hosts on its {cores} cores")
    else:
        assumed = f"; ASSUMED, not published: {', '.join(device.assumed)}" if device.assumed else ""
        click.echo(f"device: {device.name}: load {device.load_ns:g} ns, of a peer's line {device.peer_load_ns:g}, "
                   f"flush {device.flush_ns:g}, fence {device.fence_ns:g}; read {device.read_gb_s:g}, write "
                   f"{device.write_gb_s:g} GB/s ({'; '.join(device.sources)}){assumed}")
    console().print(make_table("", (">hosts", ">GB/s", ">batches/s", ">latency us", "bottleneck", ">busy"), [
        (point.hosts, f"{point.gbps:,.2f}", f"{point.batches_per_second:,.0f}", f"{point.latency_us:,.0f}",
         point.bottleneck, f"{point.utilization[point.bottleneck]:.0%}") for point in points]))
    click.echo(bar_chart([(f"{point.hosts:>2} hosts ({point.bottleneck})", point.gbps) for point in points]))
    if compared:
        click.echo("\nPredicted beside a real run of 4 brokers and one attached publisher on this machine:")
        console().print(make_table("", (">message bytes", ">predicted GB/s", ">measured GB/s", ">error"), [
            (f"{row['message_bytes']:,}", f"{row['predicted_gbps']:.2f}", f"{row['measured_gbps']:.2f}",
             f"{row['error']:+.0%}") for row in compared]))
        load = os.getloadavg()[0]
        if load > cores + 1:
            click.echo(f"The machine is busy (load {load:.1f} on {cores} cores): the errors say little.")
    click.echo(f"devices: {', '.join(device_names())}; without --profile, this machine")


def plot_curve(path: str, points: Sequence[Point], device: Profile | None) -> bool:
    """A picture of throughput and latency over hosts, the bottleneck at each point; False without matplotlib."""
    figure = new_figure(9, 5)
    if figure is None:
        return False
    axes = figure.add_subplot()
    hosts = [point.hosts for point in points]
    axes.plot(hosts, [point.gbps for point in points], "o-", color="#1f6f8b")
    for point in points:
        axes.annotate(point.bottleneck, (point.hosts, point.gbps), textcoords="offset points", xytext=(0, 8),
                      ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(hosts, [str(count) for count in hosts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("hosts")
    axes.set_ylabel("GB/s", color="#1f6f8b")
    other = axes.twinx()
    other.plot(hosts, [point.latency_us for point in points], "s--", color="#c06030")
    other.set_ylabel("submit to ack, us", color="#c06030")
    other.set_ylim(bottom=0)
    axes.set_title(f"predicted for {device.name if device else 'this machine'}")
    figure.savefig(path, dpi=120)
    return True
