"""A slice of chaos: every kind of fault at real processes, and a verdict per invariant. `pytest --chaos 2:7` for longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sim.chaos.disk import FaultyDisk
from sim.chaos.faults import WEIGHTS

ROOT = Path(__file__).parents[2]
INVARIANTS = {"A1", "A2", "B", "C", "F", "G", "I", "M", "N", "P", "R", "T", "U", "V", "Z"}
BESIDE_SECONDS = 400.0          # starting, coming to rest, recovering


@pytest.mark.timeout(3600)
def test_no_invariant_breaks_under_all_faults(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    minutes, _, seed = pytestconfig.getoption("--chaos").partition(":")
    said = subprocess.run(
        [sys.executable, "-m", "client.cli.main", "chaos", "--minutes", minutes, "--seed", seed or "1", "--pause", "0.8",
         "--results", str(tmp_path), "--json"], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=60 * float(minutes) + BESIDE_SECONDS)
    assert said.stdout, said.stderr
    found = json.loads(said.stdout)
    # V is about seconds: the command judges it, a test on a machine that others share does not.
    broken = {name: text for name, text in found["broken"].items() if name != "V"}
    assert broken == {} and said.returncode == (1 if found["broken"] else 0), f"{found}\n{said.stderr[-2000:]}"
    assert set(found["invariants"]) == INVARIANTS
    with FaultyDisk(tmp_path) as disk:
        due = set(WEIGHTS) - (set() if disk.works else {"disk"})
    assert due <= set(found["faults"]), "each kind of fault comes once before chance decides"
    assert found["kills"] >= 10
    assert all(count > 100 for count in found["messages_acknowledged"].values())
    assert (tmp_path / "timeline.png").exists() == _has_matplotlib()


def _has_matplotlib() -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    return bool(matplotlib)
