"""Opening the session of a publisher, over whatever transport its batches then go."""

from collections import deque
from collections.abc import Sequence

from broker.errors import BrokerUnavailable, ConfigError, CxlmqError, SessionFenced, TopicError
from broker.proto import cxlmq_pb2 as pb
from client.connection import BrokerAddress, Connection
from client.transport import rendezvous

OPEN_SECONDS = 5.0                      # a broker that has not opened it by then is left for another one


async def open_session(connection: Connection, brokers: Sequence[BrokerAddress], topic: str, client_id: int, ack: int,
                       epoch: int, resume_from: int) -> tuple[pb.Session, str]:
    """Open the epoch after `epoch` (0: this publisher had none) at the first broker that takes it; and its address.

    Every try has an epoch of its own: a session that was opened, but whose answer was lost, must not fence ours.
    Raises `SessionFenced` when a later publisher of this client id has taken over.
    """
    error: CxlmqError = BrokerUnavailable(address="the cluster")
    wanted, candidates = epoch, deque(rendezvous(brokers, client_id, epoch))
    while candidates:
        wanted += 1
        request = pb.OpenSessionRequest(topic=topic, client_id=client_id, session_epoch=wanted, ack=ack,
                                        resume_from=resume_from, resume_epoch=epoch)
        try:
            session = await connection.unary(candidates[0].target, "Admin/OpenSession", request, pb.Session,
                                             timeout=OPEN_SECONDS)
            return session, candidates[0].target
        except SessionFenced as fenced:
            if epoch:
                raise
            wanted = max(wanted, int(str(fenced.details.get("newest_epoch", 0))))   # we are the later one: fence it
        except (TopicError, ConfigError):
            raise
        except CxlmqError as failed:
            error = failed
            candidates.popleft()
    raise error
