"""Batches of an ended session that are in the log: settled when their own level is reached, not by being there.

    session opened anew ─► in the log, below some position ─► a look at the topic's frontiers ─► settled, refused, or
                                                              looked at again, until the delivery time-out

After a recovery the frontiers of another run count, and only for what its log still has: the next session is asked.
The frontier of level 1 is what is committed, that of level 2 what is on the disks (`Topic` in cxlmq.proto).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from broker.errors import CxlmqError, DeliveryTimeout, MessageLost, replica_failed
from broker.proto import cxlmq_pb2 as pb
from broker.sessions import EARLIER_MAX, LOST_POSITION, UNKNOWN_POSITION, UNPLACED_POSITION, UNSURE_POSITION
from client.batch import Batch


def recovered_meanwhile() -> DeliveryTimeout:
    """The error of a message of which nobody knows any more whether a recovery kept it."""
    return DeliveryTimeout("the cluster was recovered before the message was acknowledged: it may be in the log or "
                           "not; read the topic, or publish again")


MOST = 256                              # batches of one session that are looked for: its window


@dataclass(frozen=True)
class Outcome:
    """What became of a batch; `error` None: it reached its level."""

    batch: Batch
    position: int | None            # None: in the log, and nobody knows where
    error: CxlmqError | None


@dataclass(frozen=True)
class _Place:
    batch: Batch
    position: int | None
    end: int                        # of the part of the log that has it
    run_id: int                     # in which that was so
    epoch: int                      # of its session
    sequence: int                   # there


class Awaited:
    """What is in the log and waits for its level. Changed on the client loop; `clear` may come from any thread."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._places: list[_Place] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, batch: Batch, position: int | None, session: pb.Session, epoch: int, sequence: int) -> None:
        """A batch that the new session says is in the log of the ended one, under that epoch and sequence."""
        end = session.resumed_position if position is None else position + batch.count
        self._places.append(_Place(batch, position, end, session.topic.run_id, epoch, sequence))

    def earlier(self) -> list[pb.EarlierBatches]:
        """What the next session is to be asked for: a recovery may have lost what was in the log."""
        sequences: dict[int, list[int]] = {}
        for each in list(self._places):
            sequences.setdefault(each.epoch, []).append(each.sequence)
        return [pb.EarlierBatches(session_epoch=epoch, first=min(found), end=min(max(found) + 1, min(found) + MOST))
                for epoch, found in sorted(sequences.items())[-EARLIER_MAX:]]

    def looked_up(self, asked: Sequence[pb.EarlierBatches], session: pb.Session) -> list[Outcome]:
        """A new session says where they are. In another run of the cluster that counts, and what it lost is taken."""
        keys = [(each.session_epoch, sequence) for each in asked for sequence in range(each.first, each.end)]
        found = dict(zip(keys, session.earlier_positions, strict=False))

        def is_lost(each: _Place) -> bool:
            at = found.get((each.epoch, each.sequence))
            return each.run_id != session.topic.run_id and at is not None and (at == LOST_POSITION or (
                # A batch keeps its position: what is not there, where nothing was reclaimed, is nowhere.
                at in (UNKNOWN_POSITION, UNSURE_POSITION) and each.position is not None
                and each.position >= session.first_position))

        lost = self._take(lambda each: Outcome(each.batch, None, MessageLost(topic=self._topic))
                          if is_lost(each) else None)
        self._places = [self._moved(each, found.get((each.epoch, each.sequence), UNKNOWN_POSITION), session)
                        for each in self._places]
        return lost

    @staticmethod
    def _moved(each: _Place, at: int, session: pb.Session) -> _Place:
        if each.run_id == session.topic.run_id or at in (UNKNOWN_POSITION, UNSURE_POSITION):
            return each                     # of the others nothing is known
        if at == UNPLACED_POSITION:
            return replace(each, run_id=session.topic.run_id)
        return replace(each, run_id=session.topic.run_id, position=at, end=at + each.batch.count)

    def decided(self, topic: pb.Topic) -> list[Outcome]:
        """Take what has reached its level by now, and what cannot any more."""
        return self._take(lambda each: self._outcome(each, topic))

    def overdue(self, now: float, timeout: float) -> list[Outcome]:
        """Take what did not reach its level in time."""
        return self._take(lambda each: None if each.batch.deadline > now else Outcome(
            each.batch, None, DeliveryTimeout(
                f"the message is in the log, and level {each.batch.level} was not reached within {timeout} s",
                timeout_seconds=timeout)))

    def batches(self) -> list[Batch]:
        """What waits."""
        return [each.batch for each in self._places]

    def clear(self) -> None:
        """Forget all: somebody else settles them."""
        self._places.clear()

    def _take(self, outcome: Callable[[_Place], Outcome | None]) -> list[Outcome]:
        found = [(each, outcome(each)) for each in list(self._places)]
        self._places = [each for each, decided in found if decided is None]
        return [decided for _, decided in found if decided is not None]

    @staticmethod
    def _outcome(each: _Place, topic: pb.Topic) -> Outcome | None:
        level = each.batch.level
        if topic.run_id != each.run_id:
            return Outcome(each.batch, None, recovered_meanwhile())
        if (topic.durable_position if level == 2 else topic.end_position) >= each.end:
            return Outcome(each.batch, each.position, None)
        if level == 2 and topic.failed_position < each.end:
            return Outcome(each.batch, None, replica_failed(topic.failed_replica))
        return None
