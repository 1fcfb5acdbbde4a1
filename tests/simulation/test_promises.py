"""What promises is counted: lines that run under seeds, and lines that do not, which are named."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from client.cli.main import run
from sim.cluster.promises import PROMISES, ROOT, Promise, lines_run, measured, ranges_text, shares
from sim.cluster.run import run_scenario
from sim.cluster.scenario import draw

STEPS = 1_000
PLANTED = '''"""Promises much."""

ALWAYS = [number for number in range(3)]


def settle(kept):
    """Say what became of it."""
    if kept:
        return "kept"
    lost = "lost"
    return lost.join(
        ALWAYS)


def never():
    return 1
'''


def planted(folder: Path) -> tuple[Promise, object]:
    (folder / "planted.py").write_text(PLANTED)
    spec = importlib.util.spec_from_file_location("planted", folder / "planted.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Promise("planted", "planted.py", "to be kept"), module


def test_a_line_that_does_not_run_is_listed(tmp_path: Path) -> None:
    promise, module = planted(tmp_path)
    answer, ran = lines_run(lambda: module.settle(True), ["planted.py"], tmp_path)      # type: ignore[attr-defined]
    assert answer == "kept"
    share, = shares([ran], [promise], tmp_path)
    # Neither what runs on import, nor docstrings; a statement of two lines is one.
    assert (share.lines, share.ran, share.missing) == (5, 2, [10, 11, 16])
    assert ranges_text(share.missing) == "10-11, 16"


def test_a_file_that_nothing_runs_is_listed_whole_and_runs_add_up(tmp_path: Path) -> None:
    promise, module = planted(tmp_path)
    share, = shares([], [promise], tmp_path)
    assert (share.lines, share.ran) == (5, 0)
    calls = [lambda: module.settle(True), module.never]                                 # type: ignore[attr-defined]
    share, = shares([lines_run(call, ["planted.py"], tmp_path)[1] for call in calls], [promise], tmp_path)
    assert share.missing == [10, 11]


def test_the_list_names_what_is_there_once_and_says_why() -> None:
    files = [each.file for each in PROMISES]
    assert len(set(files)) == len(files)
    assert not [file for file in files if not (ROOT / file).is_file()], "name the file where it is now"
    assert all(each.why for each in PROMISES)
    assert not [each.promise.file for each in shares([]) if each.lines == 0], "only lines in functions are counted"
    assert {each.subject for each in PROMISES} == {"client protocol", "tables", "disk", "head", "supervisor"}


def test_counting_lines_changes_no_run() -> None:
    for seed in range(2):
        counted, plain = measured(draw(seed, steps=STEPS)), run_scenario(draw(seed, steps=STEPS))
        assert (counted.trace_hash, counted.steps, counted.verdict) == (plain.trace_hash, plain.steps, plain.verdict)


@pytest.mark.parametrize("seeds", [["--seed", "1"], ["--seeds", "0..1", "--jobs", "2"]])
def test_the_command_says_by_file_what_ran(capsys: pytest.CaptureFixture[str], seeds: list[str]) -> None:
    assert run(["sim", *seeds, "--steps", str(STEPS), "--coverage", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["simulated_seconds"] > 0
    assert "faults" in summary
    found = summary["coverage"]
    by_name = {each["file"]: each for each in found["files"]}
    assert set(by_name) == {each.file for each in PROMISES}
    assert found["ran"] == sum(each["ran"] for each in found["files"])
    tables = by_name["broker/sessions.py"]
    assert 0 < tables["ran"] < tables["lines"]
    assert sum(last - first + 1 for first, last in tables["missing"]) == tables["lines"] - tables["ran"]
    assert run(["sim", *seeds, "--steps", str(STEPS), "--coverage"]) == 0
    said = capsys.readouterr().out
    assert "broker/sessions.py" in said
    assert "s simulated in" in said
    assert "lines that did not run" in said


def test_without_the_library_it_says_how_to_get_it(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "coverage", None)
    assert run(["sim", "--seed", "1", "--coverage"]) != 0
    assert "pip install 'cxlmq[dev]'" in capsys.readouterr().err


def test_the_command_that_replays_a_seed_has_the_options_that_it_ran_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sim", "--seeds", "0..3", "--hosts", "3", "--steps", "2000", "--mutant", "entry-not-flushed"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("replay one: cxlmq sim ")
    assert last.endswith(" --hosts 3 --steps 2000 --mutant entry-not-flushed")
    assert run(last.removeprefix("replay one: cxlmq ").split()) == 1
