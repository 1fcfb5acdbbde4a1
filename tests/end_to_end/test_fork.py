"""A process that forks while its clients are open: the child is refused at once and harms nobody, the parent goes on."""

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
                assert "forked" in error.message and "spawn" in error.message
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


BUSY_PARENT = """
import asyncio, atexit, gc, multiprocessing, os, sys, threading, time
from cxlmq import Admin, AsyncAdmin, AsyncPublisher, AsyncSubscriber, Publisher, Subscriber
from client.errors import ForkedProcess

topic, cluster, transport, way, ends = sys.argv[1:]
options = {"cluster": cluster, "transport": transport}
stop, published = threading.Event(), [[], []]


def refused(use):
    try:
        use()
    except ForkedProcess as error:
        assert "spawn" in error.message
        return
    raise AssertionError(f"{use} was not refused")


async def wait_for(delivery):
    await delivery


def child(publisher, unsettled, publish, admin):
    began = time.monotonic()
    for new in (lambda: Publisher(topic, **options), lambda: AsyncPublisher(topic, **options),
                lambda: Subscriber(topic, **options), lambda: AsyncSubscriber(topic, **options),
                lambda: Admin(cluster=cluster), lambda: AsyncAdmin(cluster=cluster),
                lambda: Publisher(topic, cluster=cluster)):
        refused(new)
    refused(lambda: unsettled.result(20))
    refused(lambda: unsettled.exception(20))
    refused(lambda: asyncio.run(wait_for(unsettled)))
    refused(lambda: publish(b"of the child"))
    refused(lambda: publisher.publish(bytes(50_000)))
    refused(lambda: publisher.flush(20))
    refused(publisher.statistics)
    refused(admin.list_topics)
    publisher.close()
    admin.close()
    gc.collect()
    if (grandchild := os.fork()) == 0:
        refused(lambda: Admin(cluster=cluster))
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 7
    assert time.monotonic() - began < 10, "at once"


def pump(thread):
    number = 0
    while not stop.is_set():
        nbytes = 40_000 if number % 200 == 0 else 100
        message = (b"%d-%d." % (thread, number)).ljust(nbytes, b".")
        published[thread].append((message, publisher.publish(message)))
        number += 1
        if number % 10 == 0:
            time.sleep(0.001)               # what is published fits into the region: it is read at the end


with Publisher(topic, linger_ms=500, **options) as publisher, Publisher(topic, linger_ms=60_000, **options) as quiet, \\
        Admin(cluster=cluster) as admin:
    unsettled, publish = quiet.publish(b"unsettled"), quiet.publish
    publish_here = publisher.publish
    threads = [threading.Thread(target=pump, args=(thread,)) for thread in range(2)]
    for each in threads:
        each.start()
    for _ in range(4):
        time.sleep(0.02)
        if way == "multiprocessing":
            process = multiprocessing.get_context("fork").Process(target=child, args=(quiet, unsettled, publish, admin))
            process.start()
            process.join(60)
            assert process.exitcode == 0, process.exitcode
            continue
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                refused(lambda: publish_here(b"of the child"))
                child(quiet, unsettled, publish, admin)
                code = 0
            finally:
                if ends == "os._exit":
                    os._exit(code)
            atexit.register(lambda: sys.stdout.write("bye "))
            sys.exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    stop.set()
    for each in threads:
        each.join()
    publisher.flush()
    assert unsettled.result(20).position is not None
    assert all(delivery.exception() is None for each in published for _, delivery in each)
    wanted, found = sum(map(len, published)) + 1, []
    with Subscriber(topic, **options) as subscriber:
        while len(found) < wanted:
            some = subscriber.fetch(1000, timeout=20)
            assert some, f"{len(found)} of {wanted}"
            found += [bytes(each.payload) for each in some]
    for thread, each in enumerate(published):
        assert [message for message in found if message.startswith(b"%d-" % thread)] == [message for message, _ in each]
    assert len(found) == wanted
"""


@pytest.mark.parametrize(("way", "ends"), [("fork", "os._exit"), ("fork", "sys.exit"), ("multiprocessing", "")])
@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_child_is_refused_at_once_while_its_parent_publishes(
        cluster: Cluster, topic: str, transport: str, way: str, ends: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
    found = subprocess.run([sys.executable, "-c", BUSY_PARENT, topic, cluster.name, transport, way, ends], cwd=ROOT,
                           text=True, capture_output=True, timeout=180, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stderr == "", "nothing is printed and lost"


UNUSED_PARENT = """
import os, sys
from cxlmq import Publisher
topic, cluster, transport = sys.argv[1:]
child = os.fork()
with Publisher(topic, cluster=cluster, transport=transport) as publisher:
    publisher.publish(b"mine").result(20)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_who_forks_before_using_the_library_may_use_it_in_both(cluster: Cluster, topic: str, transport: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
    found = subprocess.run([sys.executable, "-c", UNUSED_PARENT, topic, cluster.name, transport], cwd=ROOT, text=True,
                           capture_output=True, timeout=120, check=False)
    assert (found.returncode, found.stderr) == (0, "")


FORKS_IN_A_CALLBACK = """
import os, sys, time
from cxlmq import Publisher
topic, cluster, transport = sys.argv[1:]
children = []


def fork(delivery):
    if not children:
        children.append(os.fork())      # and the child goes on where the library's thread was


with Publisher(topic, cluster=cluster, transport=transport, on_delivery=fork) as publisher:
    publisher.publish(b"first")
    deadline = time.monotonic() + 30
    while not children and time.monotonic() < deadline:
        time.sleep(0.01)
    while os.waitpid(children[0], os.WNOHANG)[0] == 0:
        assert time.monotonic() < deadline, "the child went on"
        publisher.publish(b"more").result(20)
        time.sleep(0.01)
    publisher.publish(b"last").result(20)
"""


@pytest.mark.parametrize("transport", ["grpc", "attached"])
def test_a_child_that_is_forked_in_a_callback_ends(cluster: Cluster, topic: str, transport: str) -> None:
    with Admin(cluster=cluster.name) as admin:
        admin.create_topic(topic)
    found = subprocess.run([sys.executable, "-c", FORKS_IN_A_CALLBACK, topic, cluster.name, transport], cwd=ROOT,
                           text=True, capture_output=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
