"""The wall clocks of all brokers jump by an hour under traffic: leases are no matter of the time of day."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.cluster import Cluster
from cxlmq import Admin, Publisher, Subscriber
from tests.end_to_end.conftest import small_config
from tests.end_to_end.test_failover import epoch_of

SOURCE = Path(__file__).with_name("faulty_clock.c")
HOURS = (1, -1, 2, 0)
SECONDS = 20.0


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that sets the clock of every process that is started from here on, in seconds beside the true time."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C compiler to build the library that makes clocks jump")
    library, control = tmp_path / "faulty_clock.so", tmp_path / "offset"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    control.write_text("0")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAULTY_CLOCK", str(control))
    return control


def test_the_clock_of_a_process_jumps(jump: Path) -> None:
    def seen() -> float:
        return float(subprocess.run([sys.executable, "-c", "import time; print(time.time())"], capture_output=True,
                                    text=True, check=True).stdout)

    before = seen()
    jump.write_text("3600")
    assert 3600 <= seen() - before < 3660


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_clocks_that_jump_fence_nobody_and_replace_no_head(
        jump: Path, monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    events: list[object] = []
    with Cluster(small_config(brokers=3, session_lease_seconds=2.0, group_lease_seconds=2.0)) as cluster, \
            Admin(cluster=cluster.name) as admin:
        monkeypatch.undo()
        admin.create_topic("t", ack=2, replication_factor=2)
        epoch = epoch_of(cluster)
        with Publisher("t", cluster=cluster.name, transport=transport, on_event=events.append) as publisher, \
                Subscriber("t", cluster=cluster.name, transport=transport, group="g", start="beginning") as subscriber:
            found = []
            for hours in HOURS:
                jump.write_text(str(3600 * hours))
                for number in range(30):
                    publisher.publish(b"%d %d" % (hours, number)).result(SECONDS)
                found += [message.payload for message in subscriber.fetch(30, timeout=SECONDS)]
                while len(found) % 30:
                    found += [message.payload for message in subscriber.fetch(30, timeout=SECONDS)]
                subscriber.commit()
        assert found == [b"%d %d" % (hours, number) for hours in HOURS for number in range(30)]
        assert epoch_of(cluster) == epoch
        assert events == [] and cluster.restarts == 0
