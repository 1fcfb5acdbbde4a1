"""Subscribers of the simulated cluster: the library's reading (`client.subscribing`), in simulated time.

    act: answers of calls ─► what came by the stream ─► lost places ─► taking, seeking    commands ─► calls, streams

A stream is first in first out; it may be slow, it may break, and then nobody knows what the broker had sent on it. All
that is given out is held against the log, and has to be the message that comes next.
"""

import bisect
import struct
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from broker.errors import BrokerUnavailable, CxlmqError, DamagedData, PositionLost, RangeLost, UnknownTopic
from broker.proto import cxlmq_pb2 as pb
from broker.reader import OrderReader, ReadError
from client.brokers import BrokerAddress
from client.buffer import BatchBuffer
from client.received import parse_response
from client.subscribing.commands import AskBrokers, AskPlace, Follow, GoOn, Leave, Place, Renew
from client.subscribing.reading import Reading, State
from client.subscribing.search import ELSEWHERE, Search
from sim.cluster.history import NOBODY, Read, Violation
from sim.cluster.publishers import ANSWER_STEPS
from sim.cluster.witness import build_payload

if TYPE_CHECKING:
    from sim.cluster.world import Host, World

RECONNECT_STEPS = 100                       # between two tries to come back
UNDER_WAY = 4                               # frames on their way to a reader: gRPC's window
BUFFER_BYTES = 4_000
# How often a reader seeks, a stream breaks, an answer is lost, a call is cancelled.
SEEK, CUT, REFUSE, GIVE_UP = 0.004, 0.003, 0.05, 0.004


@lru_cache(maxsize=4096)
def messages_of(client: int, first: int, count: int) -> tuple[bytes, ...]:
    """What a client sent in one batch."""
    payload, at, out = build_payload(client, first, count), 0, []
    for _ in range(count):
        (nbytes,) = struct.unpack_from("<I", payload, at)
        out.append(payload[at + 8:at + 8 + nbytes])
        at += 8 + -(-nbytes // 8) * 8
    return tuple(out)


class Stream:
    """A subscription at one host, as its server keeps it, with what is under way to the reader."""

    def __init__(self, subscriber: "Subscriber", host: "Host", request: pb.SubscribeRequest) -> None:
        self.subscriber, self.host, self.world = subscriber, host, subscriber.world
        self.request, self.incarnation, self.losses = request, host.incarnation, self.world.losses
        subscriber.streams += 1
        self.name = f"{subscriber.name} stream {subscriber.streams}"
        self.down: deque[tuple[int, Any]] = deque()         # due, frame or error
        self.broken = False
        self.cursor = -1
        self.reader: OrderReader | None = None
        self.frame_bytes = subscriber.random.choice((200, 2000, 20000))
        self.told = host.call(self._open())
        host.connections.append(self)

    async def _open(self) -> pb.Attachment:
        try:
            return await self._placed()
        except ReadError as error:
            raise self.host.assembly.reading_service.read_error(self.request, error) from error

    async def _placed(self) -> pb.Attachment:
        service = self.host.assembly.reading_service
        entry = service.topic_of(self.request)
        cursor, reader = await service.place(self.request, entry, (self.subscriber.number + 1, 0), copies=True)
        try:
            told = service.described(entry, reader)
            if self.broken:
                raise BrokerUnavailable(address="a stream that broke")
        except BaseException:
            self.host.cursors.close(cursor)
            raise
        self.cursor, self.reader = cursor, reader
        return told

    def serve(self) -> None:
        """The broker's side: send what is there, until the reader has not taken enough of it."""
        reader, host = self.reader, self.host
        while reader is not None and not self.broken and len(self.down) < UNDER_WAY:
            try:
                frame = reader.read_frame(self.frame_bytes)
            except ReadError as error:
                try:
                    self._send(host.assembly.reading_service.read_error(self.request, error))
                except BrokerUnavailable as none:
                    self._send(none)
                self._end()
                return
            if not frame or host.control.dead:
                return
            self._send(frame)
            committed = reader.frontiers()["committed_index"]
            self.world.history.cursors.append((self.name, reader.index, committed))
            host.cursors.move(self.cursor, reader.index)

    def _send(self, item: Any) -> None:
        due = self.world.step + self.world.delay()
        self.down.append((max(due, self.down[-1][0] if self.down else 0), item))

    def _end(self) -> None:
        """The broker's handler ends; what it sent is under way still."""
        if self.reader is not None and self.host.powered and self.host.incarnation == self.incarnation:
            self.host.cursors.close(self.cursor)
        self.reader = None
        if self in self.host.connections:
            self.host.connections.remove(self)

    def cut(self) -> None:
        """Nothing passes any more; the broker notices as well."""
        self.broken = True
        self.down.clear()
        if not self.told.done() and self.host.powered and self.host.incarnation == self.incarnation:
            self.told.cancel()
        self._end()


class Subscriber:
    """Reads one topic over streams, by all calls that the library has; it seeks, and goes on at other brokers."""

    def __init__(self, world: "World", number: int, topic: Any) -> None:
        self.world, self.number, self.topic = world, number, topic
        self.random = world.scenario.random(f"subscriber {number}")
        self.name = f"reader {number}"
        self.reads: list[Read] = []
        self.reading = self._new_reading(self.random.randrange(64))
        self.search: Search | None = None
        self.answer: Callable[[], None] | None = None
        self.answer_at = 0
        self.asked: Any = None                  # what a broker was asked for, and by when it has to answer
        self.asked_until = 0
        self.next_return = 0
        self.claimed: list[tuple[int, int, list[Any]]] = []     # turn, position before, batches
        self.late: list[tuple[Place, bytes]] = []   # from streams that were left
        self.expected = 0                       # position of the message that has to be given out next
        self.former: CxlmqError | None = None   # why nothing came any more, in a region that is lost
        self.runs = self.streams = 0            # how often reading began elsewhere, and was asked for

    def _new_reading(self, turn: int) -> Reading:
        return Reading(self.topic.name, "beginning", None, turn, BatchBuffer())

    def end(self) -> None:
        """The run is over."""

    def empty(self) -> None:
        """Give out all that has come: from now on another log is there to hold it against."""
        self.late, self.former = [], self.reading.failure
        for claim in list(self.claimed):
            self._end_claim(*claim)
        if self.reading.buffer.batches:
            self._take_apart(self._event(lambda: self.reading.take(lambda buffer: buffer.take_messages(1 << 30))))

    def meet(self, topic: Any) -> None:
        """The region is another one, and the topic has another place there."""
        self.topic = topic
        self._begin_history()

    def _hear_late(self) -> None:
        late, self.late = self.late, []
        for place, frame in late:
            self._receive(place, frame)

    # ---- what the client does ---------------------------------------------------------------------------------------

    def act(self) -> None:
        """What the client does when it comes to run."""
        self._hear_late()
        self._hear_answers()
        if self.reading.is_open:
            self._hear()
        state, random = self.reading.state, self.random
        if state is State.NEW and self.search is None:
            self._begin(self.reading.open())
        elif state is State.RETURNING and self.search is None and self.world.step >= self.next_return:
            self.next_return = self.world.step + RECONNECT_STEPS
            if (search := self.reading.come_back()) is not None:
                self._begin(search)
        elif self.reading.is_open and not self.world.draining and self.search is None and random.random() < SEEK:
            self._seek()
        if self.reading.is_open:
            self._take_something()

    def _event(self, event: Callable[[], Any]) -> Any:
        """Something comes to the reading; what it wants done is done, and what always holds is looked at."""
        answer = event()
        commands = self.reading.commands
        while commands:
            self._do(commands.popleft())
        self._look_at_invariants()
        return answer

    def _look_at_invariants(self) -> None:
        try:
            self.reading.invariants()
        except AssertionError as error:
            raise Violation("T", f"{self.name}: {error}") from error

    def _do(self, command: Any) -> None:
        match command:
            case Follow(place):
                self._follow(place)
            case GoOn(former, place):
                self.world.note(self.name, f"goes on at {place.way.host.number}")
                self._retire(former)
            case Leave(place):
                self._leave(place)

    def _follow(self, place: Place) -> None:
        """It reads elsewhere from now on."""
        start = self.reading.start
        self.expected = start if isinstance(start, int) else place.position
        self.world.note(self.name, f"reads at {place.way.host.number} from {self.expected} on")
        self._begin_history()

    def _begin_history(self) -> None:
        self.runs += 1
        self.reads = self.world.history.reads.setdefault(f"{self.name} run {self.runs}", [])

    def _leave(self, place: Place) -> None:
        """Let go of a stream. What it has brought already may be taken from it later still."""
        frames = [item for due, item in place.way.down if due <= self.world.step and isinstance(item, bytes)]
        place.way.cut()
        for frame in frames:
            self.late.append((place, frame))

    def _retire(self, place: Place) -> None:
        place.way.cut()

    def _seek(self) -> None:
        end = self._end_of_log()
        start = self.random.choice(("beginning", "end", self.random.randint(0, end), end + self.random.randint(0, 5)))
        self.world.injected["reader sought"] += 1
        self._begin(self._event(lambda: self.reading.seek(start)))

    # ---- searching --------------------------------------------------------------------------------------------------

    def _begin(self, search: Search) -> None:
        self.search = search
        self._ask()

    def _ask(self) -> None:
        """Ask for what the search wants now; its answer comes later."""
        search = self.search
        assert search is not None
        match search.wants:
            case Renew():
                self._later(search.renewed)
            case AskBrokers():
                live = [BrokerAddress(host.number, f"host {host.number}") for host in self.world.hosts if host.powered]
                if self.world.strikes("answer lost", self.random, REFUSE) or not live:
                    self._later(lambda: search.refused(BrokerUnavailable(address="the cluster")))
                else:
                    self._later(lambda: search.brokers_known(live))
            case AskPlace(broker, request):
                host = self.world.hosts[broker.id]
                if host.powered:
                    self.asked, self.asked_until = self._ask_host(host, request), self.world.step + ANSWER_STEPS
                else:
                    self._later(lambda: search.refused(BrokerUnavailable(address=broker.target)))
            case None:
                self.search = None

    def _ask_host(self, host: "Host", request: pb.SubscribeRequest) -> Any:
        return Stream(self, host, request)

    def _later(self, answer: Callable[[], None]) -> None:
        self.answer, self.answer_at = answer, self.world.step + self.world.delay()

    def _hear_answers(self) -> None:
        answer, search = self.answer, self.search
        if answer is not None and self.world.step >= self.answer_at:
            self.answer = None
            self._event(answer)
            self._ask()
        elif self.asked is not None and search is not None:
            self._hear_of_place(search, self.asked)
        if self.search is not None and self.world.strikes("search given up", self.random, GIVE_UP):
            self._give_up(self.search)

    def _give_up(self, search: Search) -> None:
        """Whoever waited for it was cancelled. What a broker granted all the same is not read."""
        asked, self.search, self.asked, self.answer = self.asked, None, None, None
        self._event(lambda: self.reading.give_up(search))
        if asked is not None and asked.told.done() and not asked.told.cancelled() and asked.told.exception() is None:
            self._arrived(search, asked, asked.told.result())
            if self.reading.place is not None and self.reading.place.way is asked:
                raise Violation("T", f"{self.name} goes on where a seek that was given up would have led it")
        if asked is not None:
            asked.cut()

    def _hear_of_place(self, search: Search, asked: Any) -> None:
        """The answer to the call for a place, or none in time."""
        error: BaseException | None = BrokerUnavailable(address=f"host {asked.host.number}")
        if not asked.told.done():
            if self.world.step <= self.asked_until and not asked.broken:
                return
        elif not asked.told.cancelled():
            error = asked.told.exception()
            if isinstance(error, TimeoutError):
                error = BrokerUnavailable(address=f"host {asked.host.number}")
        if error is None and self.world.strikes("search given up", self.random, REFUSE):
            self._give_up(search)           # just when its answer comes
            return
        gone = asked.host is not self.world.hosts[asked.host.number]       # with its region
        lost = error is None and (gone or self.world.strikes("answer lost", self.random, REFUSE))
        self.asked = None
        if isinstance(error, UnknownTopic):
            raise Violation("T", f"host {asked.host.number} does not know the topic {self.topic.name!r}")
        if error is not None and not isinstance(error, CxlmqError):
            raise error
        if error is not None or lost:
            asked.cut()
            refusal = error or BrokerUnavailable(address="an answer that was lost")
            self._event(lambda: search.refused(refusal))
            self._judge(search)
        else:
            told = asked.told.result()
            if told.topic_generation != self.topic.generation:
                raise Violation("T", f"host {asked.host.number} knows generation {told.topic_generation} of the topic, "
                                     f"it is {self.topic.generation}")
            self._arrived(search, asked, told)
        self._ask()

    def _judge(self, search: Search) -> None:
        """What ended a search may only be an outage, or what was reclaimed meanwhile."""
        error = search.error
        if error is not None and not isinstance(error, ELSEWHERE):
            position = error.details.get("position")
            due = isinstance(error, PositionLost) and isinstance(position, int) and position < self._first_kept()
            due = due or self._lost_range(error) is not None
            self.world.history.errors.append((f"{self.name} on its way: {error}", due))

    def _arrived(self, search: Search, way: Any, told: pb.Attachment) -> None:
        place = Place(told.position, told.first_position, told.end_position,
                      pb.TopicIdentity(run_id=told.run_id, created_ns=told.created_ns), way)
        if not self._event(lambda: search.granted(place)):
            way.cut()

    # ---- what comes -------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Take in what the stream has brought; notice that it broke."""
        place = self.reading.place
        if place is None or self.reading.state is not State.READING:
            return
        stream: Stream = place.way
        if stream.losses != self.world.losses:      # its handler had ended before: what was under way is lost as well
            stream.cut()
        if not stream.broken and self.world.strikes("stream cut", self.random, CUT):
            stream.cut()
        if stream.broken:
            self._event(lambda: self.reading.lost(place))
            return
        while stream.down and stream.down[0][0] <= self.world.step and self.reading.buffer.nbytes <= BUFFER_BYTES:
            item = stream.down.popleft()[1]
            if isinstance(item, bytes):
                self._receive(place, item)
            else:
                self._event(partial(self.reading.lost, place, item))
                stream.cut()

    def _receive(self, place: Place, frame: bytes) -> None:
        try:
            batches = parse_response(frame, self.topic.name)
        except CxlmqError as error:         # what came is damaged
            self._event(partial(self.reading.fail, error))
        else:
            self._event(partial(self.reading.received, place, batches))

    # ---- taking -----------------------------------------------------------------------------------------------------

    def _take_something(self) -> None:
        """By one of the ways that the library has: messages, batches, one by one, or claimed and put back."""
        if self.claimed:
            if self.random.random() < 0.3 or self.world.draining:
                self._end_claim(*self.claimed[0])
            return
        way = self.random.choice(("messages", "message", "ahead", "batches", "claim", "nothing"))
        if self.world.draining and way in ("claim", "nothing"):
            way = "messages"
        if way == "nothing":
            return
        count = self.random.choice((1, 3, 50))
        takes: dict[str, Callable[[BatchBuffer], list[Any]]] = {
            "messages": lambda buffer: buffer.take_messages(count), "message": BatchBuffer.take_message,
            "ahead": lambda buffer: [ahead] if (ahead := buffer.next_ahead()) is not None else buffer.take_message(),
            "batches": BatchBuffer.take_batches, "claim": BatchBuffer.claim}
        before = self.reading.position()
        try:
            found = self._event(lambda: self.reading.take(takes[way]))
        except CxlmqError as error:
            self._told(error)
            return
        if way == "claim":
            self.claimed = [(self.reading.buffer.turn, before, found)] if found else []
            return
        self._take_apart(found if way != "batches" else self._taken_apart(found))

    def _end_claim(self, turn: int, before: int, found: list[Any]) -> None:
        """What was claimed some time ago is given out, or put back; it may be of a place that was left."""
        buffer, elsewhere = self.reading.buffer, turn != self.reading.buffer.turn
        self.claimed = []
        if self.random.random() < 0.5:
            buffer.put_back(found, turn)
            self._look_at_invariants()
            if not elsewhere and self.reading.position() != before:
                raise Violation("T", f"{self.name} put back what it had claimed at {before}, and is at "
                                     f"{self.reading.position()}")
        else:
            buffer.gave(found[-1].position + found[-1].count, turn)
            if not elsewhere:
                self._take_apart(self._taken_apart(found))

    def _take_apart(self, found: list[Any]) -> None:
        for message in found:
            self._given(message.position, bytes(message.payload))
        if found:
            self._gave(found)
        self._look_at_invariants()

    def _taken_apart(self, batches: list[Any]) -> list[Any]:
        try:
            return [message for batch in batches for message in batch.to_messages()]
        except DamagedData as error:
            raise Violation("N", f"{self.name} was given at {self.expected} what nobody sent: {error}") from error

    def _gave(self, found: list[Any]) -> None:
        """The user has these messages."""

    def _entry(self, index: int) -> dict[str, int]:
        """An order entry, as the log has it."""
        witness = self.world.witness
        if index >= witness.frontiers(self.topic.number)["committed"] and witness.check_now(False):
            raise Violation(*witness.describe())
        try:
            entry: dict[str, int] = witness.entry(self.topic.number, index)
        except IndexError:
            raise Violation("T", f"{self.name} was given what lies at order entry {index}, before it was committed"
                            ) from None
        return entry

    def _given(self, position: int, payload: bytes) -> None:
        """A message was given out: it has to be the next one, and what the log has there."""
        if position != self.expected:
            raise Violation("T", f"{self.name} was given position {position}, {self.expected} was due")
        self.expected += 1
        last = self.reads[-1] if self.reads else None
        if last is None or position >= last.position + last.count:
            index = last.index + 1 if last is not None else self._index_of(position)
            entry = self._entry(index)
            read = Read(index, entry["position"], entry["count"], (entry["client"], entry["first"]))
            self.world.note(self.name, f"read entry {index}")
            self.reads.append(read)
            last = read
        assert last.sender is not None
        if not 0 <= position - last.position < last.count:
            raise Violation("T", f"{self.name} was given position {position}, and the log has {last} there")
        if messages_of(*last.sender, last.count)[position - last.position] != payload:
            raise Violation("N", f"{self.name} read at position {position} what its client never sent: the log has "
                                 f"{last.sender} there")

    def _index_of(self, position: int) -> int:
        """The order entry that holds a position."""
        committed = self.world.witness.frontiers(self.topic.number)["committed"]
        return bisect.bisect_right(range(committed), position, key=lambda each: self._entry(each)["position"]) - 1

    def _first_kept(self) -> int:
        """The first position that is not reclaimed."""
        self.world.witness.check_now(False)
        frontiers = self.world.witness.frontiers(self.topic.number)
        if frontiers["reclaimed"] < frontiers["committed"]:
            return self._entry(frontiers["reclaimed"])["position"]
        return self._end_of_log()

    def _end_of_log(self) -> int:
        committed = self.world.witness.frontiers(self.topic.number)["committed"]
        last = self._entry(committed - 1) if committed else {"position": self.world.first_position, "count": 0}
        return last["position"] + last["count"]

    @property
    def behind(self) -> int:
        """How many messages it was not given yet; 0 when it waits for those that are to come."""
        return max(0, self._end_of_log() - self.expected)

    def _told(self, error: CxlmqError) -> None:
        """Nothing comes any more, and why: that may only be so when what comes next is reclaimed."""
        if self.search is not None:
            return
        if error is self.former:            # that log is not there any more
            self._begin(self._event(lambda: self.reading.seek("beginning")))
            return
        at, lost = self.reading.position(), self._lost_range(error)
        due = (isinstance(error, PositionLost) and at < self._first_kept()) if lost is None else (
            lost[0] <= at <= lost[1])
        self.world.history.errors.append((f"{self.name} at {at}: {error}", due))
        self.world.injected["reader passed over"] += due
        start = "beginning" if lost is None or lost[2] < self._first_kept() else lost[2]
        self._begin(self._event(lambda: self.reading.seek(start)))

    def _lost_range(self, error: CxlmqError) -> tuple[int, int, int] | None:
        """The first and the end of what a recovery has named as lost, or what is left of the log falls short of what a
        reader had come to, and where it goes on; None: nothing was lost."""
        first, end = error.details.get("first"), error.details.get("end")
        if not isinstance(error, RangeLost) or not isinstance(first, int) or not isinstance(end, int):
            return None
        if first >= self.world.restored_end:
            return (first, end, first) if self.world.losses and first <= self._end_of_log() else None
        if (index := self._index_of(first)) < 0:
            return None
        entry = self._entry(index)
        known = (entry["client"], entry["position"], entry["position"] + entry["count"])
        return (first, end, end) if known == (NOBODY, first, end) else None
