"""The library under its product's name: what it gives, whatever else lies where a program is started."""

import subprocess
import sys
from pathlib import Path

import pytest

import cxlmq
import cxlmq.errors
from broker.errors import ERRORS

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A program in a folder, as `python program.py` runs it: that folder comes first on the path."""
    (folder / "program.py").write_text(program)
    return subprocess.run([sys.executable, "program.py"], cwd=folder, text=True, capture_output=True, check=False, timeout=60,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)})


def test_every_error_and_the_version_are_there() -> None:
    assert cxlmq.__version__
    assert set(cxlmq.errors.__all__) == {each.__name__ for each in ERRORS.values()}
    for kind in ERRORS.values():
        assert getattr(cxlmq.errors, kind.__name__) is kind
    for name in cxlmq.__all__:
        assert getattr(cxlmq, name) is not None


@pytest.mark.parametrize("name", ["client", "broker", "sim"])
@pytest.mark.parametrize("form", ["folder", "package", "module"])
def test_folders_of_a_program_do_not_hide_ours(tmp_path: Path, name: str, form: str) -> None:
    if form == "module":
        (tmp_path / f"{name}.py").write_text("raise AssertionError('not ours')\n")
    else:
        (tmp_path / name).mkdir()
        if form == "package":
            (tmp_path / name / "__init__.py").write_text("raise AssertionError('not ours')\n")
    done = run(tmp_path, "from cxlmq import Admin, Publisher, Subscriber\nfrom cxlmq.errors import UnknownTopic, RegionMissing\n"
                         "try: Admin(cluster='no-such-cluster').list_topics()\nexcept RegionMissing: print('ours')\n")
    assert (done.returncode, done.stdout) == (0, "ours\n"), done.stderr


def test_a_module_that_took_the_name_before_is_named(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("")
    done = run(tmp_path, "import client\nimport cxlmq\n")
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert str(tmp_path / "client.py") in done.stderr
    assert "another name" in done.stderr
