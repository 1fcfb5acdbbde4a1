"""Whatever publishers, brokers and schedule do, the log is one order in which each session is a gap-free prefix.

Invariants (see reference/faults.md): U each message at most once, P a gap-free prefix, T all readers see the same,
N nothing that nobody sent, M nothing goes back.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.layout import ResultStatus, SessionState
from broker.stages.receiver import RECEIVED
from tests.manual_cluster import SECOND, ManualCluster, Session

BROKERS, CLIENTS = 3, 3
IN_LOG = (ResultStatus.RESULT_COMMITTED, ResultStatus.RESULT_DUPLICATE)


@dataclass
class Client:
    """A publisher: what it submitted, and the number that each of it has in the current session."""

    session: Session
    submitted: int = 0
    first: int = 0                      # number of the submission that the session calls 0
    acked: set[int] = field(default_factory=set)

    def message(self, sequence: int) -> bytes:
        return f"{self.session.client}:{self.first + sequence}".encode()


class Traffic(RuleBasedStateMachine):
    """Publishers that lose, repeat and reorder batches; stages that run in any order; two readers."""

    @initialize(lock=st.sampled_from(("atomic", "mutex")), scanners=st.integers(1, BROKERS),
                pool=st.sampled_from(("atomic", "partitioned", "leader")), order=st.sampled_from((5, 5, 2)))
    def start(self, lock: str, scanners: int, pool: str, order: int) -> None:
        self.cluster = ManualCluster(brokers=BROKERS, lock=lock, scanners=scanners, pool=pool, order_entry_count=32,
                                     session_count_max=48)
        self.topic = self.cluster.create(order=order)
        self.order = order
        self.clients = [Client(self.cluster.open_session(self.topic, client=client + 1, broker=client % BROKERS))
                        for client in range(CLIENTS)]
        self.readers = [self.cluster.reader(self.topic) for _ in range(2)]
        self.cursors = [self.cluster.open_cursor(self.topic, broker=broker)[0] for broker in range(2)]
        self.logs: list[list[bytes]] = [[], []]

    def transmit(self, client: Client, sequence: int, broker: int) -> bool:
        return self.cluster.publish(client.session, sequence, [client.message(sequence)], broker=broker) == RECEIVED

    @rule(who=st.integers(0, CLIENTS - 1), broker=st.integers(0, BROKERS - 1), lost=st.booleans())
    def submit(self, who: int, broker: int, lost: bool) -> None:
        client = self.clients[who]
        client.submitted += 1
        if not lost:
            self.transmit(client, client.submitted - client.first - 1, broker)

    @rule(who=st.integers(0, CLIENTS - 1), broker=st.integers(0, BROKERS - 1), back=st.integers(0, 12))
    def retransmit(self, who: int, broker: int, back: int) -> None:
        client = self.clients[who]
        sequence = client.submitted - client.first - 1 - back
        if sequence >= 0:
            self.transmit(client, sequence, broker)

    @rule(stage=st.integers(0, 1 << 16), times=st.integers(1, 3))
    def step(self, stage: int, times: int) -> None:
        for _ in range(times):
            self.cluster.stages[stage % len(self.cluster.stages)].step_once()

    @rule()
    def settle(self) -> None:
        self.cluster.settle()

    @rule(milliseconds=st.integers(1, 1000))
    def wait(self, milliseconds: int) -> None:
        self.cluster.clock.advance(milliseconds * 1_000_000)

    @rule(which=st.integers(0, 1))
    def read(self, which: int) -> None:
        for each in self.cluster.read(self.readers[which]):
            assert each.position == len(self.logs[which])
            self.logs[which] += each.messages
        self.cluster.brokers[which].cursors.move(self.cursors[which], self.readers[which].index)

    @rule(who=st.integers(0, CLIENTS - 1), broker=st.integers(0, BROKERS - 1))
    def take_acks(self, who: int, broker: int) -> None:
        client = self.clients[who]
        for ack in self.cluster.take_acks(client.session, broker):
            if ack.status in IN_LOG:
                client.acked.add(client.first + ack.sequence)

    @precondition(lambda self: self.order == 5)
    @rule(who=st.integers(0, CLIENTS - 1), broker=st.integers(0, BROKERS - 1))
    def reopen(self, who: int, broker: int) -> None:
        client = self.clients[who]
        old = client.session
        if old.epoch >= 4:
            return                      # places for sessions are few
        client.session = self.cluster.open_session(self.topic, old.client, old.epoch + 1, broker)
        self.cluster.close_streams(old)
        client.first += client.session.predecessor_expected

    @invariant()
    def nothing_goes_back(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        self._deliver_everything()
        for which in range(2):
            self.read(which)
        assert self.logs[0] == self.logs[1], "all readers see the same order"
        for client in self.clients:
            number = client.session.client
            own = [int(message.split(b":")[1]) for message in self.logs[0] if message.startswith(b"%d:" % number)]
            if self.order == 5:
                assert own == list(range(client.submitted))
            else:
                assert sorted(own) == list(range(client.submitted))
            assert client.acked <= set(own)
        assert len(self.logs[0]) == sum(client.submitted for client in self.clients)
        assert self.cluster.counters()["held_now"] == 0

    def _deliver_everything(self) -> None:
        """Nobody lost anything for good: every publisher repeats what it has no answer for."""
        for client in self.clients:
            for sequence in range(client.submitted - client.first):
                for _ in range(20):
                    for which in range(2):
                        self.read(which)
                    self.cluster.settle()
                    if self.transmit(client, sequence, sequence % BROKERS):
                        break
                    self.cluster.clock.advance(SECOND // 10)
            state = self.cluster.order.session_state(client.session.slot)
            assert state["state"] == SessionState.SESSION_OPEN
        for _ in range(4):
            self.cluster.settle()
            for which in range(2):
                self.read(which)
        self.cluster.check_invariants()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
