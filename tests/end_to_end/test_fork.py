"""A process that forks while its clients are open: the child's copies are closed and harm nobody, the parent's go on."""

import subprocess
import sys
from pathlib import Path

import pytest

from client.cluster import Cluster
from cxlmq import Admin, Publisher
from tests.end_to_end.library_support import inspected

ROOT = Path(__file__).parents[2]
PROGRAM = """
import gc, os, sys
from cxlmq import Publisher, Subscriber
from client.errors import ClosedError

topic, cluster, transport, leaves_by = sys.argv[1:]
with Publisher(topic, cluster=cluster, transport=transport, linger_ms=2000) as publisher, \\
        Subscriber(topic, cluster=cluster, transport=transport) as subscriber:
    publisher.publish(b"before").result(20)
    views = subscriber.fetch_batches(20)
    held = [bytes(each) for batch in views for each in batch.messages()]
    unsent = publisher.publish(b"packed")
    child = os.fork()
    if child == 0:
        told = 0
        for use in (lambda: publisher.publish(b"of the child"), lambda: publisher.publish_many([b"too"]),
                    lambda: publisher.flush(1), lambda: subscriber.fetch(1, timeout=0.1), lambda: subscriber.seek(0)):
            try:
                use()
            except ClosedError as error:
                assert "forked" in error.message
                told += 1
        del views
        gc.collect()
        publisher.close()
        subscriber.close()
        if leaves_by == "os._exit":
            os._exit(told)
        sys.exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    assert held == [b"before"] == [bytes(each) for batch in views for each in batch.messages()]
    print(*(len(open(f"/proc/self/{name}").read()) > 0 for name in ("maps",)), flush=True)
    sys.stdin.readline()                # the test looks at the region
    unsent.result(20)
    publisher.publish(b"after").result(20)
    found = []
    while b"after" not in found:
        found += [bytes(each.payload) for each in subscriber.fetch(1000, timeout=20)]
    assert [each for each in found if each] == [b"packed", b"after"], found
"""


@pytest.mark.parametrize("leaves_by", ["os._exit", "sys.exit"])
@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_child_cannot_use_its_parents_clients_and_the_parent_goes_on(
        cluster: Cluster, topic: str, transport: str, leaves_by: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, topic, cluster.name, transport, leaves_by], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n" or process.communicate()[1] == ""
        if transport == "attached":
            with Publisher(topic, cluster=cluster.name, transport="grpc") as other:
                for _ in range(200):    # brokers look at their slots meanwhile
                    other.publish(b"").result(20)
            cursors = [each["index"] for each in inspected(cluster.name)["cursors"] if each["name"] == ""]
            assert cursors == [0], "the views that ended in the child are held by the parent"
        said = process.communicate("\n", timeout=60)[1]
        assert process.returncode == 0, said
