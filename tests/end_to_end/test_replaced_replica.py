"""A replica whose broker dies is kept by another broker: level 2 and the region go on, and the cluster says who does it."""

from broker.inspection import inspect_region
from broker.region import attach_region
from client.admin import Admin
from client.cli.status import Sampler
from client.cluster import Cluster
from client.publisher import Publisher
from client.subscriber import Subscriber
from tests.end_to_end.conftest import small_config, traces

KIB = 1 << 10


def replicas(name: str) -> dict[int, dict[int, int]]:
    """source -> replica -> position that it has."""
    with attach_region(name, writable=False) as region:
        (topic,) = inspect_region(region)["topics"]
    return {each["broker"]: {line["replica"]: line["replicated_position"] for line in each["replicas"]}
            for each in topic["brokers"]}


def test_level_two_and_the_region_go_on_without_a_replica_that_died() -> None:
    config = small_config(brokers=3, restart=False, replica_grace_seconds=1.0)
    with Cluster(config) as cluster:
        with Admin(cluster=cluster.name) as admin:
            admin.create_topic("t", ack=1, replication_factor=2)
            with Publisher("t", cluster=cluster.name, transport="grpc", ack=2) as publisher:
                assert publisher.publish(b"first").result(30).level == 2
            (victim,) = replicas(cluster.name)[0]
            assert victim != 0
            cluster.kill(victim)
            with Publisher("t", cluster=cluster.name, transport="grpc", ack=2) as publisher:
                assert publisher.publish(b"second").result(60).level == 2
            other = 3 - victim
            assert replicas(cluster.name)[0][other] == 2
            assert any(f"broker {victim} is away: broker {other} keeps what comes by broker 0" in note
                       for note in admin.describe_topic("t")["degraded"])
        with attach_region(cluster.name, writable=False) as region:
            (topic,) = Sampler(region).sample()["topics"]
        assert any(f"broker {other} keeps what comes by broker 0" in note for note in topic["notes"])
        with Publisher("t", cluster=cluster.name, transport="grpc", ack=2) as publisher:
            last = [publisher.publish(bytes(64 * KIB)) for _ in range(1_600)][-1]       # 100 MiB through 64 MiB
            assert last.result(120).position == 1_601
        with Subscriber("t", cluster=cluster.name, start="beginning", transport="grpc") as subscriber:
            first = subscriber.get_next(30)
            assert first is not None
            assert first.position > 2
    assert traces(cluster.name) == []
