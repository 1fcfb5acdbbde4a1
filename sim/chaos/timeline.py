"""The timeline of a chaos run: acks per second, and the faults above them."""

from pathlib import Path

import numpy

from sim.chaos.run import Outcome

_BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH = 100


def rates(outcome: Outcome, parts: int) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]":
    """Acks/s in equal parts of the run."""
    edges = numpy.linspace(outcome.begun_ns, outcome.ended_ns, parts + 1)
    counts, _ = numpy.histogram(outcome.acks_ns, edges)
    return counts / max(1e-9, (outcome.ended_ns - outcome.begun_ns) / parts / 1e9)


def timeline_text(outcome: Outcome, width: int = WIDTH) -> str:
    """Three lines: the head's deaths (H) and stops (s), other kills (k), and acks/s as blocks."""
    found = rates(outcome, width)
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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    seconds = (outcome.ended_ns - outcome.begun_ns) / 1e9
    parts = max(20, min(2000, int(seconds * 2)))
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(numpy.linspace(0, seconds, parts), rates(outcome, parts), color="tab:blue", linewidth=1)
    axes.set_xlabel("seconds")
    axes.set_ylabel("acks/s")
    colors = {"kill head": "tab:red", "stop head": "tab:orange", "kill broker": "tab:purple", "disk": "tab:brown"}
    for kind, color in colors.items():
        times = [(fault.at_ns - outcome.begun_ns) / 1e9 for fault in outcome.faults if fault.what == kind]
        for number, at in enumerate(times):
            axes.axvline(at, color=color, linewidth=0.7, alpha=0.6, label=kind if number == 0 else None)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path)
    return True
