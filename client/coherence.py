"""What a cluster on memory without coherence has to say: what its profile assumes, and what its checker found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from broker.coherence import CoherenceBroken, load, report_text
from broker.hardware import report_path
from sim.cxl.host import Device
from sim.cxl.profiles import load_profile


def profile_report(profile: str) -> dict[str, Any] | None:
    """Of a profile: its parameters, which of them are assumed, and what its delays take here, in ns; None without one.

    Delays are waited for by the clock, less what waiting for nothing takes; shorter ones take longer than they should.
    """
    if not profile:
        return None
    found = load_profile(profile)
    takes = {name: {"wanted_ns": round(getattr(found, name)), "takes_ns": Device.delay_accuracy(wait)}
             for name, wait in Device.waits(found).items() if getattr(found, name) > 0}
    return {**found.as_dict(), "label": found.label(), "delays": takes}


def profile_text(report: dict[str, Any] | None) -> str | None:
    """One line for people."""
    if report is None:
        return None
    delays = ", ".join(f"{name.removesuffix('_ns')} {each['wanted_ns']} takes {each['takes_ns']:.0f}"
                       for name, each in report["delays"].items())
    return f"{report['label']}; ns here: {delays}"


def tell_coherence(name: str, folder_root: Path, tell: Callable[[str], None]) -> None:
    """Tell what was found while the cluster ran; nothing when its memory was not checked.

    Raises `CoherenceBroken` for mistakes. The report stays where it says.
    """
    path = report_path(name, folder_root)
    report = load(path)
    if report is not None:
        tell(report_text(report) + f"\nreport: {path}")
        if report["reports"]:
            raise CoherenceBroken(count=len(report["reports"]), path=str(path))
