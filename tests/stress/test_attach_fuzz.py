"""Attached clients that write garbage harm nobody: others' batches are ordered whole, and everything comes back."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from broker.layout import AttachState, ResultStatus
from broker.records import pack
from broker.stages.attach import AttachStage
from sim.cxl.memory import Role
from tests.manual_cluster import LEASE_NS, MIB, ManualCluster, encode_messages

ROUNDS = 1500
WORD = 1 << 64
NASTY = (0, 1, 7, 8, 63, 64, 65, 4095, 4096, 4097, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, WORD - 64, WORD - 1)
CLIENT_WORDS = {"heartbeat": 0, "using": 8, "retired": 16, "wanted": 24, "released": 40}


@dataclass
class Attached:
    """One client, which writes into its slot as a process would."""

    cluster: ManualCluster
    stage: AttachStage
    client: int
    broker: int
    slot: int = -1
    generation: int = 0
    epoch: int = 0
    session: Any = None
    submitted: int = 0
    sequence: int = 0
    using: int = 0
    used: int = 0
    sent: list[bytes] = field(default_factory=list)
    written: list[dict[str, int]] = field(default_factory=list)     # its descriptors, by number
    filled: dict[int, int] = field(default_factory=dict)            # by lease: bytes that were taken
    retired: int = 0                                                # leases that it gave back before

    def open(self, topic: Any) -> None:
        """The next epoch of its session, and a slot."""
        self.epoch += 1
        self.session = self.cluster.open_session(topic, self.client, self.epoch, self.broker)
        self.cluster.close_streams(self.session)
        found = self.stage.open(topic.number, topic.generation, self.session.slot, self.epoch, self.client, 1, 1, 1, 1)
        assert found is not None, "every slot that was given up is free again"
        self.slot, self.generation = found
        self.submitted = self.sequence = self.using = self.used = 0
        self.written, self.filled, self.retired = [], {}, 0
        self.word("heartbeat", 1)

    def close(self) -> None:
        """Give slot and session back."""
        assert self.stage.close_slot(self.slot, self.generation)
        for _ in range(100):
            self.cluster.clock.advance(60_000_000)
            self.cluster.settle()
            if not self.stage.is_taken(self.slot, self.generation):
                break
        else:
            raise AssertionError("the slot did not come back")
        self.cluster.close_session(self.session)
        self.slot = -1

    def at(self, place: str, *index: int) -> int:
        """Where something of its slot lies."""
        return int(self.cluster.layout.offset_of(place, self.slot, *index))

    def word(self, name: str, value: int) -> None:
        """Write one of its words."""
        self.cluster.memory.store_word(self.at("attach_client") + CLIENT_WORDS[name], value % WORD)

    @property
    def state(self) -> int:
        """Its slot's state."""
        return self.cluster.memory.load_word(self.at("attach_line")) & 0xFF

    def lease(self) -> tuple[int, int] | None:
        """Where the lease that it fills lies, and its size."""
        memory = self.cluster.memory
        if memory.load_word(self.at("attach_line") + 16) <= self.using:
            return None
        at = self.at("attach_lease", self.using)
        return memory.load_word(at), memory.load_word(at + 8)

    def descriptor(self, payload: bytes) -> dict[str, int] | None:
        """A good one, its payload written; None while there is no lease with room."""
        found = self.lease()
        if found and found[1] - self.used < len(payload):
            self.using, self.used = self.using + 1, 0
            self.word("using", self.using)
            self.word("retired", self.using)
            self.cluster.settle()
            found = self.lease()
        if found is None:
            return None
        self.cluster.memory.write_bytes(found[0] + self.used, payload)
        return {"payload_offset": found[0] + self.used, "payload_bytes": len(payload), "message_count": 1,
                "lease": self.using, "batch_sequence": self.sequence, "published_wall_ns": 1}

    def is_legal(self, fields: dict[str, int]) -> bool:
        """What a broker may take, said once more: within a lease that it gave and that was not retired, in order."""
        granted = self.cluster.memory.load_word(self.at("attach_line") + 16)
        if not self.retired <= fields["lease"] < granted:
            return False
        at = self.at("attach_lease", fields["lease"])
        begin, size = self.cluster.memory.load_word(at), self.cluster.memory.load_word(at + 8)
        first, nbytes = fields["payload_offset"], fields["payload_bytes"]
        return (begin + self.filled.get(fields["lease"], 0) <= first and first + nbytes <= begin + size and first % 64 == 0
                and nbytes > 0 and 0 < 8 * fields["message_count"] <= nbytes)

    def check_taken(self, before: int) -> None:
        """Every descriptor that was taken since then is legal."""
        for line in self.stage.open_slots():
            if line["number"] != self.slot:
                continue
            for number in range(before, line["taken"]):
                fields = self.written[number]
                assert self.is_legal(fields), f"took {fields}"
                begin = self.cluster.memory.load_word(self.at("attach_lease", fields["lease"]))
                self.filled[fields["lease"]] = fields["payload_offset"] + fields["payload_bytes"] - begin

    def look(self) -> int:
        """Descriptors that were taken until now; what is retired now may not be filled any more."""
        line = next(line for line in self.stage.open_slots() if line["number"] == self.slot)
        self.retired = self.cluster.memory.load_word(self.at("attach_line") + 16) - line["leases"]
        return int(line["taken"])

    def submit(self, fields: dict[str, int]) -> None:
        """Write the next descriptor."""
        self.written.append(fields)
        line = pack("Descriptor", commit=self.generation << 48 | self.submitted + 1, **fields)
        self.cluster.memory.write_line_bytes(self.at("attach_descriptor", self.submitted), line)
        self.submitted += 1
        self.sequence += 1
        self.used += (fields["payload_bytes"] + 63) // 64 * 64

    def publish(self, payload: bytes) -> None:
        """As an honest client does, until it is acked."""
        for _ in range(100):
            fields = self.descriptor(encode_messages([payload]))
            if fields is not None:
                break
            self.cluster.settle()
        else:
            raise AssertionError("no lease came")
        number = self.submitted
        self.submit(fields)
        self.cluster.settle()
        state = self.cluster.memory.load_word(self.at("attach_completion", number))
        assert state >> 40 & 0xFF == ResultStatus.RESULT_COMMITTED
        self.sent.append(payload)


def garbage(dice: random.Random, good: dict[str, int]) -> dict[str, int]:
    """A descriptor with one or more fields wrong, or all of them."""
    sizes = {name: 32 if name in ("payload_bytes", "message_count") else 64 for name in good}
    wrong = dict(good)
    for name in dice.sample(sorted(good), dice.choice((1, 1, 1, 2, len(good)))):
        value = dice.choice((dice.choice(NASTY), dice.getrandbits(64), good[name] + dice.choice((-64, -1, 1, 64, 4096)),
                             good[name] + dice.choice(NASTY)))
        wrong[name] = value % (1 << sizes[name])
    return wrong


def harm(dice: random.Random, hostile: Attached) -> bool:
    """Do something that no client should; whether that was a descriptor."""
    good = hostile.descriptor(encode_messages([b"hostile" * dice.randrange(1, 40)]))
    if good is None or dice.random() < 0.15:
        hostile.word(dice.choice(sorted(CLIENT_WORDS)), dice.choice((dice.choice(NASTY), dice.getrandbits(64))))
        return False
    if dice.random() < 0.1:                 # the rest of the ring as well, commit words and all
        for _ in range(64):
            hostile.submit(garbage(dice, good))
        return True
    if dice.random() < 0.1 and hostile.written:         # again what was good once
        hostile.submit({**dice.choice(hostile.written[-30:]), "batch_sequence": hostile.sequence})
    else:
        hostile.submit(good if dice.random() < 0.5 else garbage(dice, good))
    return True




@pytest.mark.parametrize("seed", range(4))
def test_garbage_of_every_kind_fences_its_writer_and_touches_nobody_else(seed: int) -> None:
    dice = random.Random(seed)
    cluster = ManualCluster(brokers=2, attach_slot_count=12, session_count_max=64, region_bytes=2 * MIB)
    stages = [AttachStage(cluster.door(broker.number, Role.ROLE_RECEIVER), broker.log, broker.acks, cluster.clock, LEASE_NS)
              for broker in cluster.brokers]
    cluster.stages[0:0] = stages
    topic = cluster.create()
    free = cluster.free_segments()
    honest = [Attached(cluster, stages[broker], 100 + broker, broker) for broker in range(2)]
    hostile = [Attached(cluster, stages[broker % 2], 200 + broker, broker % 2) for broker in range(3)]
    for each in (*honest, *hostile):
        each.open(topic)
    cluster.settle()
    descriptors = fenced = 0
    for number in range(ROUNDS):
        villain = dice.choice(hostile)
        before = villain.look()
        descriptors += harm(dice, villain)
        villain.stage.step_once()
        villain.check_taken(before)
        if dice.random() < 0.7:
            cluster.clock.advance(dice.choice((1, 60_000_000)))
            cluster.settle()
        if number % 10 == 0:
            dice.choice(honest).publish(b"%d-%d" % (seed, number) * dice.randrange(1, 30))
        if villain.state == AttachState.ATTACH_FENCED:
            fenced += 1
            cluster.settle()
            progress = cluster.record("SessionProgressLine", "session_progress", villain.session.slot)
            assert progress["state"] & 0xFF != 1, "its session is fenced with it"
            villain.close()
            villain.open(topic)
        for each in honest:
            each.word("heartbeat", number + 2)
            assert each.state == AttachState.ATTACH_OPEN
    cluster.settle()
    cluster.check_invariants()
    assert descriptors > ROUNDS // 2
    assert fenced > ROUNDS // 8
    entries = cluster.entries(topic)
    for each in honest:
        mine = [cluster.memory.read_bytes(entry["payload_offset"], entry["payload_bytes"]) for entry in entries
                if entry["client_id"] == each.client]
        assert mine == [encode_messages([payload]) for payload in each.sent[len(each.sent) - len(mine):]]
        assert mine
    for each in (*honest, *hostile):
        each.close()
    cluster.delete()
    cluster.settle()
    assert cluster.free_segments() == free, "every segment came back"


def test_a_bad_descriptor_that_comes_while_the_ring_is_full_fences_its_session() -> None:
    cluster = ManualCluster(brokers=1, attach_slot_count=4, region_bytes=2 * MIB, ring_slot_count=16)
    stage = AttachStage(cluster.door(0, Role.ROLE_RECEIVER), cluster.brokers[0].log, cluster.brokers[0].acks,
                        cluster.clock, LEASE_NS)
    topic = cluster.create()
    client = Attached(cluster, stage, 1, 0)
    client.open(topic)
    stage.step_once()                       # its leases; from here on nothing but the attach stage runs
    for _ in range(16):
        fields = client.descriptor(encode_messages([b"fills the ring"]))
        assert fields is not None
        client.submit(fields)
        stage.step_once()
    fields = client.descriptor(encode_messages([b"one too many"]))
    assert fields is not None
    client.submit({**fields, "payload_offset": fields["payload_offset"] + 8})
    stage.step_once()
    assert client.state == AttachState.ATTACH_FENCED
    cluster.stages.insert(0, stage)
    cluster.settle()
    progress = cluster.record("SessionProgressLine", "session_progress", client.session.slot)
    assert progress["state"] & 0xFF != 1
    assert progress["expected"] == 16, "what came before is in the log"
    client.close()


