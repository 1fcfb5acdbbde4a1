"""Whatever happens to replica files: recovery takes nothing that was not written, names what it lacks, and raises typed errors
alone."""

import os
import random
import shutil
from pathlib import Path

import pytest

from broker.errors import CxlmqError, RecoveryError
from broker.recovery import Manifest, Range, RecoveryPlan, Runs, make_plan, read_manifests, write_manifest
from broker.replica_files import Record, find_files, read_records
from broker.verify import verify_replicas
from tests.manual_cluster import ManualCluster, decode_messages

SEEDS = 150


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, tuple[list[bytes], int]]]:
    """A folder of replicas, and what they hold: position -> (messages, batch sequence)."""
    folder = tmp_path_factory.mktemp("replicas")
    cluster = ManualCluster(brokers=3, folder=folder, replica_file_bytes=16 << 10, order_entry_count=256)
    session = cluster.open_session(cluster.create(replication_factor=2))
    for sequence in range(60):
        cluster.publish(session, sequence, [b"%d-%d" % (sequence, each) * (1 + sequence % 9) for each in range(3)],
                        broker=sequence % 3)
        cluster.settle()
    truth = {read.position: (read.messages, number) for number, read in enumerate(
        cluster.read(cluster.reader(session.topic)))}
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()
    return folder, truth


def payload_of(path: Path, offset: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def check(plan: RecoveryPlan, truth: dict[int, tuple[list[bytes], int]], end: int) -> None:
    """Everything is true, in its place or lost by name, and nothing is both."""
    for topic in plan.topics:
        position = topic.first_position
        parts = sorted([(each.record.position, each.record.end) for each in topic.batches]
                       + [(each.first, each.end) for each in topic.lost])
        for first, last in parts:
            assert first == position, "neither hole nor overlap"
            position = last
        assert position == topic.end_position <= end
        for batch in topic.batches:
            fields = batch.record.fields
            messages = decode_messages(payload_of(batch.path, batch.record.payload_offset, fields["payload_bytes"]))
            assert (messages, fields["batch_sequence"]) == truth[batch.record.position]


def harm(folder: Path, random_: random.Random) -> str:
    """Damage some file in some way; what was done."""
    path = random_.choice(sorted(folder.rglob("*.replica")))
    size = path.stat().st_size
    at = random_.randrange(size)
    how = random_.choice(["bit", "bit", "bit", "zeroes", "noise", "cut", "grown", "gone", "swapped"])
    if how == "cut":
        os.truncate(path, at)
    elif how == "gone":
        path.unlink()
    elif how == "swapped":
        other = random_.choice(sorted(folder.rglob("*.replica")))
        path.write_bytes(other.read_bytes())
    else:
        with path.open("r+b") as file:
            file.seek(size if how == "grown" else at)
            byte = file.read(1) or b"\0"
            file.seek(size if how == "grown" else at)
            file.write({"bit": bytes([byte[0] ^ 1 << random_.randrange(8)]), "zeroes": bytes(600),
                        "noise": random_.randbytes(600), "grown": random_.randbytes(900)}[how])
    return f"{how} at {at} of {path.name}"


def test_the_whole_is_read_back(written: tuple[Path, dict[int, tuple[list[bytes], int]]]) -> None:
    folder, truth = written
    plan = make_plan(folder)
    check(plan, truth, 180)
    (topic,) = plan.topics
    assert (len(topic.batches), topic.lost, plan.damage, topic.end_position) == (60, [], [], 180)
    assert [(each.client_id, each.epoch, each.expected) for each in topic.sessions] == [(7, 1, 60)]
    assert verify_replicas(folder) == []


@pytest.mark.parametrize("seed", range(SEEDS))
def test_damaged_files_give_nothing_wrong_and_no_surprise(
        written: tuple[Path, dict[int, tuple[list[bytes], int]]], tmp_path: Path, seed: int) -> None:
    folder, truth = written
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    random_ = random.Random(seed)
    done = [harm(copied, random_) for _ in range(random_.randrange(1, 4))]
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    try:
        check(make_plan(copied), truth, 180)
        verify_replicas(copied)
    except CxlmqError:
        pass
    except Exception as error:
        raise AssertionError(f"seed {seed}: {done}") from error
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_bit_anywhere_in_a_record_is_noticed(written: tuple[Path, dict[int, tuple[list[bytes], int]]],
                                               tmp_path: Path) -> None:
    folder, truth = written
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    file = find_files(copied)[0]
    path, data = file.path, file.path.read_bytes()
    record = next(each for each in read_records(file) if isinstance(each, Record) and each.end > each.position)
    for at in range(record.payload_offset - 128, record.payload_offset + min(40, record.fields["payload_bytes"])):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        plan = make_plan(copied)
        assert plan.damage, f"byte {at}"
        assert plan.topics[0].lost
        check(plan, truth, 180)


def test_runs_follow_one_another_by_their_manifests() -> None:
    runs = Runs([Manifest(1, 20, {"t": 100}, {"t": [(90, 100)]}), Manifest(2, 30, {"t": 150}, {})])
    assert [runs.end("t", run) for run in (10, 20, 30)] == [100, 150, None]
    assert runs.end("other", 10) is None
    assert runs.lost("t") == [(90, 100)]


def test_a_run_that_wrote_nothing_moves_the_end_of_the_log_back_nowhere(
        tmp_path: Path, written: tuple[Path, dict[int, tuple[list[bytes], int]]]) -> None:
    """What it would write below its begin counts as given up: the recovery behind the next one would drop that."""
    folder = tmp_path / "data"
    shutil.copytree(written[0], folder)
    (topic,) = make_plan(folder).topics
    end = topic.end_position
    topic.lost.append(Range(end, end + 5, "unsynced"))      # as a note said whose position was the end itself
    topic.end_position = end + 5
    write_manifest(folder, 5, [topic])
    (again,) = make_plan(folder).topics
    assert again.end_position == end + 5
    assert [(each.first, each.end, each.reason) for each in again.lost] == [(end, end + 5, "lost before")]
    write_manifest(folder, 6, [again])
    assert make_plan(folder).topics[0].end_position == end + 5


def test_what_an_ended_run_says_of_the_log_counts_up_to_its_end(tmp_path: Path) -> None:
    """A disk that was away at a recovery comes back: what it has behind the place where the next run began is not there."""
    cluster = ManualCluster(brokers=3, folder=tmp_path)
    session = cluster.open_session(cluster.create(replication_factor=2))
    for sequence in range(12):              # committed together: each record says how far all of them go
        cluster.publish(session, sequence, [b"x"])
    cluster.settle()
    for broker in cluster.brokers:
        assert broker.replication is not None
        broker.replication.close()
    (topic,) = make_plan(tmp_path).topics
    topic.end_position = topic.batches[5].record.end
    write_manifest(tmp_path, 5, [topic])
    (again,) = make_plan(tmp_path).topics
    assert (again.end_position, again.lost) == (topic.end_position, [])
    assert again.durable_position <= again.end_position
    assert again.batches[-1].record.end == again.end_position


def test_a_damaged_manifest_is_refused(tmp_path: Path, written: tuple[Path, dict[int, tuple[list[bytes], int]]]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written[0], folder)
    path = write_manifest(folder, 5, make_plan(folder).topics)
    assert [each.run_id for each in read_manifests(folder)] == [5]
    path.write_text(path.read_text()[:-4])
    with pytest.raises(RecoveryError, match="is damaged"):
        make_plan(folder)
