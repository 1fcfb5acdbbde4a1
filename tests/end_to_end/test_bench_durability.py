"""`cxlmq bench durability` measures both sides in one run, says whether the bar is reached, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path


def test_it_measures_level_2_and_bare_files_in_turns(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "client.cli.main", "bench", "durability", "--bytes", "8MiB", "--batch-bytes", "64KiB",
         "--brokers", "2", "--runs", "2", "--folder", str(tmp_path), "--json", "-"],
        capture_output=True, text=True, timeout=100, check=False)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert len(found["rounds"]) == 2
    for each in found["rounds"]:
        assert each["ratio"] == each["gigabytes_per_second"] / each["bare_gigabytes_per_second"]
        assert each["bytes_per_sync"] > 0
    assert found["reached"] == (found["ratio"] >= 0.9)
    assert list(tmp_path.iterdir()) == []
