"""What publishers ask a broker for: sessions, opened and resumed and closed, and the streams and slots under them.

The gRPC adapter and the simulation call the same methods with the same requests. There is no I/O here: what has to wait
for the head waits on the event loop that it runs on.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from broker.config import check_ack
from broker.errors import AttachSlotsFull, BadRequest, SessionFenced, SessionUnknown, StreamTableFull
from broker.layout import SessionState
from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader
from broker.sessions import EARLIER_MAX, UNKNOWN_POSITION
from broker.stages.sequencer import SESSION_WINDOW
from broker.topics import TopicEntry

if TYPE_CHECKING:
    from broker.assembly import Assembly


class SessionService:
    """Sessions of one broker. Everything may raise `BrokerUnavailable` while a new head takes over."""

    def __init__(self, broker: "Assembly") -> None:
        self._broker, self._settings = broker, broker.settings

    def topic_of(self, request: pb.OpenSessionRequest | pb.PublishOpen) -> TopicEntry:
        """The topic that a request is about. Raises as `TopicTable.find_seen`, and for a level that it cannot give."""
        entry = self._broker.topics.find_seen(request.topic, request.seen, self._settings.run_id)
        check_ack(entry.name, request.ack, entry.replication_factor)
        return entry

    # ---- sessions ---------------------------------------------------------------------------------------------------

    async def open(self, request: pb.OpenSessionRequest) -> pb.Session:
        """Open a session; with `resume_epoch`, say what of that earlier one is in the log.

        Raises `SessionTableFull`, `SessionFenced`, `BadRequest`, and as `topic_of`.
        """
        entry = self.topic_of(request)
        if request.client_id == 0:              # in the region it says that no client publishes there
            raise BadRequest(reason="a publisher needs a client_id above 0")
        if len(request.earlier) > EARLIER_MAX or any(
                not each.first <= each.end <= each.first + SESSION_WINDOW for each in request.earlier):
            raise BadRequest(reason=f"at most {EARLIER_MAX} earlier sessions, with {SESSION_WINDOW} batches each, are "
                                    "looked for")
        sessions, key = self._broker.sessions, entry.generation << 16 | entry.number
        only_if_found = sessions.only_if_found(request.client_id, key, request.resume_epoch)
        opened = await sessions.open(request.client_id, request.session_epoch, key, request.ack)
        try:
            return await self._described(entry, request, opened, only_if_found)
        except BaseException:               # also when the publisher goes away while it is looked for
            sessions.give_up(opened["slot"])
            raise

    async def _described(self, entry: TopicEntry, request: pb.OpenSessionRequest, opened: dict[str, int],
                         only_if_found: range) -> pb.Session:
        numbers = self._broker.layout.numbers
        session = pb.Session(
            session_slot=opened["slot"], session_epoch=request.session_epoch, topic_number=entry.number,
            topic_generation=entry.generation, order=entry.order, window=SESSION_WINDOW,
            message_bytes_max=numbers["message_bytes_max"], batch_bytes_max=numbers["batch_bytes_max"],
            high_water=opened["predecessor_expected"], replication_factor=entry.replication_factor,
            lease_ms=self._settings.session_lease_ns // 1_000_000,
            topic=pb.TopicIdentity(run_id=self._settings.run_id, created_ns=entry.created_ns))
        if request.resume_epoch:
            session.high_water, positions = await self._resumed(entry, request, opened, only_if_found)
            session.positions.extend(positions)
            bound = self._broker.sessions.resumed_position(
                request.client_id, entry.generation << 16 | entry.number, request.resume_epoch)
            session.resumed_position = self._broker.topics.frontiers(entry)["end_position"] if bound is None else bound
        if request.earlier:
            session.earlier_positions.extend(await self._earlier(entry, request))
            session.first_position = self._broker.topics.frontiers(entry)["first_position"]
        return session

    async def _earlier(self, entry: TopicEntry, request: pb.OpenSessionRequest) -> list[int]:
        """Where batches of the client's sessions before the earlier one are, in the log of this run."""
        key, found = entry.generation << 16 | entry.number, list[int]()
        reader = OrderReader(self._broker.delivery_door, self._broker.layout, entry.number, entry.generation)
        for each in request.earlier:
            found += await self._broker.sessions.positions(reader, request.client_id, key, each.session_epoch,
                                                           range(each.first, each.end))
        return found

    async def _resumed(self, entry: TopicEntry, request: pb.OpenSessionRequest, opened: dict[str, int],
                       only_if_found: range) -> tuple[int, list[int]]:
        """Where the client's earlier session ended, and where its batches lie from `resume_from` on."""
        sessions, key = self._broker.sessions, entry.generation << 16 | entry.number
        high_water: int | None = opened["predecessor_expected"]
        if opened["predecessor_epoch"] != request.resume_epoch:
            # Sessions that the client never heard of lie between.
            high_water = sessions.committed(request.client_id, key, request.resume_epoch)
        reader = OrderReader(self._broker.delivery_door, self._broker.layout, entry.number, entry.generation)
        end = request.resume_from + SESSION_WINDOW
        if high_water is not None and entry.order == 5:
            end = min(end, high_water)      # with other orders, batches beyond a gap may be there as well
        positions = await sessions.positions(reader, request.client_id, key, request.resume_epoch,
                                             range(request.resume_from, end), only_if_found)
        while positions and positions[-1] == UNKNOWN_POSITION:
            positions.pop()
        return (request.resume_from if high_water is None else high_water), positions

    def levels(self, entry: TopicEntry) -> pb.Topic:
        """How far a topic's levels have come: what a publisher that waits for one of them looks at."""
        frontiers = self._broker.topics.frontiers(entry)
        durable, failed_from, failed = self._broker.topics.durability(entry)
        end = frontiers["end_position"]
        return pb.Topic(run_id=self._settings.run_id, first_position=frontiers["first_position"], end_position=end,
                        committed_batches=frontiers["committed_batches"], committed_bytes=frontiers["committed_bytes"],
                        durable_position=min(durable, end), failed_position=failed_from, failed_replica=failed)

    def check(self, opened: pb.PublishOpen) -> TopicEntry:
        """The topic of a session that a stream or slot is asked for. Raises `SessionUnknown`, also when it is somebody
        else's, `SessionFenced` when it is not open any more, and as `topic_of`."""
        entry = self.topic_of(opened)
        if opened.session_slot >= self._broker.layout.numbers["session_count_max"]:
            raise SessionUnknown(session=opened.session_slot)
        line = self._broker.sessions.line(opened.session_slot)
        if (line["client_id"] != opened.client_id or line["session_epoch"] != opened.session_epoch
                or line["topic"] != entry.generation << 16 | entry.number):
            raise SessionUnknown(session=opened.session_slot)
        progress = self._broker.sessions.progress(opened.session_slot)
        if progress["state"] & 0xFF != SessionState.SESSION_OPEN:
            raise SessionFenced(reason="its lease ended, or a newer one was opened", committed=progress["expected"])
        if line["found_from"] < line["found_end"]:      # the sequencer would take what was lost for duplicates
            raise SessionFenced(reason="the cluster was recovered, and batches were lost: the next session says which",
                                committed=progress["expected"])
        return entry

    async def close(self, request: pb.CloseSessionRequest,
                    allow: Callable[[TopicEntry], None] = lambda _: None) -> None:
        """End a session, if it is the one that the request means. `allow` may raise, given its topic."""
        sessions = self._broker.sessions
        line = sessions.line(request.session_slot) if (
            request.session_slot < self._broker.layout.numbers["session_count_max"]) else {}
        if line.get("client_id") == request.client_id and line["session_epoch"] == request.session_epoch:
            for entry in self._broker.topics.entries():
                if entry.generation << 16 | entry.number == line["topic"]:
                    allow(entry)
            await sessions.close(request.session_slot)

    # ---- streams and slots ------------------------------------------------------------------------------------------

    def open_stream(self, opened: pb.PublishOpen) -> tuple[TopicEntry, int]:
        """The topic and the number of a new stream of a session. Raises `StreamTableFull`, and as `check`."""
        entry = self.check(opened)
        try:
            number = self._broker.acks.open_stream(entry.number, entry.generation, opened.ack, entry.replication_factor)
        except RuntimeError as error:
            raise StreamTableFull(broker=self._broker.broker) from error
        self._broker.sessions.attach(opened.session_slot)
        return entry, number

    def close_stream(self, opened: pb.PublishOpen, number: int) -> None:
        """The stream ended."""
        self._broker.sessions.detach(opened.session_slot)
        self._broker.acks.close_stream(number)

    def attach(self, request: pb.AttachPublisherRequest, principal: int = 0) -> pb.Attachment:
        """A slot for an attached publisher. Raises `AttachSlotsFull`, and as `check`."""
        opened, broker = request.open, self._broker
        entry = self.check(opened)
        found = broker.attach.open(entry.number, entry.generation, opened.session_slot, opened.session_epoch,
                                   opened.client_id, opened.ack, entry.replication_factor, request.pid,
                                   request.presence, principal)
        if found is None:
            raise AttachSlotsFull(broker=broker.broker)
        broker.attached_clients.add_publisher(found[0], opened.session_slot)
        return pb.Attachment(slot=found[0], generation=found[1], region=self._settings.cluster,
                             run_id=self._settings.run_id, topic_number=entry.number,
                             topic_generation=entry.generation, doorbell=broker.broker)
