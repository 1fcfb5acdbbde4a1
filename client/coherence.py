"""After a cluster on checked memory has stopped: its checker's report is shown, and mistakes are an error."""

from collections.abc import Callable
from pathlib import Path

from broker.coherence import CoherenceBroken, load, report_text
from broker.hardware import report_path


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
