"""Batches of an ended session that are in the log: settled when their own level is reached, not by being there.

    session opened anew ─► in the log, below some position ─► a look at the topic's frontiers ─► settled, refused, or
                                                              looked at again, until the delivery time-out

The frontier of level 1 is what is committed, that of level 2 what is on the disks (`Topic` in cxlmq.proto).
"""

from collections.abc import Callable
from dataclasses import dataclass

from broker.errors import CxlmqError, DeliveryTimeout, replica_failed
from broker.proto import cxlmq_pb2 as pb
from client.batch import Batch


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


class Awaited:
    """What is in the log and waits for its level. Changed on the client loop; `clear` may come from any thread."""

    def __init__(self) -> None:
        self._places: list[_Place] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, batch: Batch, position: int | None, session: pb.Session) -> None:
        """A batch that the new session says is in the log of the ended one."""
        end = session.resumed_position if position is None else position + batch.count
        self._places.append(_Place(batch, position, end, session.topic.run_id))

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
            return Outcome(each.batch, None, DeliveryTimeout(
                "the cluster was recovered before the message was acknowledged: it may be in the log or not; read the "
                "topic, or publish again"))
        if (topic.durable_position if level == 2 else topic.end_position) >= each.end:
            return Outcome(each.batch, each.position, None)
        if level == 2 and topic.failed_position < each.end:
            return Outcome(each.batch, None, replica_failed(topic.failed_replica))
        return None
