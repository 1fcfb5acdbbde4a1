"""The timeline of a chaos run: acks and deliveries per second, and the faults beside them."""

from pathlib import Path
from typing import Any

import numpy

from client.bench.report import new_figure
from sim.chaos.run import Outcome

_BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH = 100


def rates(outcome: Outcome, moments: Any, parts: int) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]":
    """How many of `moments` (monotonic ns) there are per second, in equal parts of the run."""
    edges = numpy.linspace(outcome.begun_ns, outcome.ended_ns, parts + 1)
    counts, _ = numpy.histogram(moments, edges)
    return counts / max(1e-9, (outcome.ended_ns - outcome.begun_ns) / parts / 1e9)


def timeline_text(outcome: Outcome, width: int = WIDTH) -> str:
    """Three lines: the head's deaths (H) and stops (s), other kills (k), and acks/s as blocks."""
    found = rates(outcome, outcome.acks_ns, width)
    highest = max(1.0, float(found.max()))
    line = "".join(_BLOCKS[round(each / highest * (len(_BLOCKS) - 1))] for each in found)
    marks = [[" "] * width, [" "] * width]
    span = max(1, outcome.ended_ns - outcome.begun_ns)
    for fault in outcome.faults:
        at = min(width - 1, max(0, int((fault.at_ns - outcome.begun_ns) / span * width)))
        if fault.what.endswith("head"):
            marks[0][at] = "H" if fault.what.startswith("kill") else "s"
        elif fault.what.startswith("kill"):
            marks[1][at] = "k"
    return "\n".join((f"head   {''.join(marks[0])}", f"kills  {''.join(marks[1])}",
                      f"acks/s {line}  at most {highest:,.0f}/s"))


def plot_timeline(path: Path, outcome: Outcome) -> bool:
    """The same as a picture; False where matplotlib is not installed (pip install 'cxlmq[plots]')."""
    seconds = (outcome.ended_ns - outcome.begun_ns) / 1e9
    parts = max(20, min(2000, int(seconds * 2)))
    figure = new_figure(14, 7)
    if figure is None:
        return False
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, moments, color in (("acks/s", outcome.acks_ns, "tab:blue"), ("read/s", outcome.reads_ns, "tab:green")):
        upper.plot(numpy.linspace(0, seconds, parts), rates(outcome, moments, parts), color=color, linewidth=1,
                   alpha=0.8, label=name)
    upper.set_ylabel("messages/s")
    upper.legend(loc="upper right", fontsize="small")
    kinds = sorted({fault.what for fault in outcome.faults})
    for row, kind in enumerate(kinds):
        for fault in outcome.faults:
            if fault.what == kind:
                begin = (fault.at_ns - outcome.begun_ns) / 1e9
                lasts = max(seconds / 500, (fault.until_ns - fault.at_ns) / 1e9 if fault.until_ns else 0.0)
                lower.barh(row, lasts, left=begin, height=0.8, color=f"C{row}")
    lower.set_yticks(range(len(kinds)), kinds)
    lower.set_xlabel("seconds")
    figure.savefig(path)
    return True
