"""A packer that threads share: nothing is lost, mixed or overtaken, wherever one of them loses the GIL to another."""

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

from broker.errors import ClosedError, MessageTooBig
from client.batch import Batch, Delivery, Packer
from client.turn import Safeguard, leave_out
from tests.logical_threads import Baton
from tests.manual_cluster import decode_messages

MESSAGE_MAX = 1 << 20
SEEDS = range(25)
SIZES = (16, 24, 200, 5000, 33_000, 40_000)     # from 32 KiB on, a copy releases the GIL


@pytest.fixture(autouse=True)
def all_safeguards() -> Iterator[None]:
    """Whatever a test leaves out is there again."""
    yield
    leave_out(Safeguard.SAFEGUARD_NONE)


class Owner:
    """A publisher as far as a packer knows it."""

    def __init__(self, baton: Baton, target: int) -> None:
        self.baton = baton
        self.batches: list[Batch] = []
        self.closed = False
        self.packer = Packer(self, self.take, target, MESSAGE_MAX)

    def take(self) -> None:
        """What is packed goes; while it is taken and kept, others may run."""
        self.baton.point()
        self.packer.take_to(self.batches)
        self.baton.point()

    def make_room(self, nbytes: int) -> None:
        """The policy waits for room."""
        self.raise_if_closed()
        for _ in range(self.baton.random.randrange(3)):
            self.baton.point()

    def raise_if_closed(self) -> None:
        """Raise what ended it."""
        if self.closed:
            raise ClosedError(what="the publisher")

    def too_big(self, nbytes: int) -> None:
        """Refuse."""
        raise MessageTooBig(message_bytes=nbytes, message_bytes_max=MESSAGE_MAX)


def message(thread: int, number: int, nbytes: int) -> bytes:
    """One that says whose it is in every part of it."""
    return (struct.pack("<QQ", thread, number) * (nbytes // 16 + 1))[:max(16, nbytes)]


def publish_some(publisher: Any, thread: int, count: int, dice: random.Random,
                 note: Callable[[bytes, Delivery | None], None], pause: Callable[[], None] = lambda: None) -> None:
    """Publish `count` messages in all the ways there are; `note` each with its delivery, None where it has none."""
    number = 0
    while number < count:
        pause()
        nbytes = dice.choice(SIZES)
        some = [message(thread, number + k, nbytes) for k in range(min(dice.randrange(1, 5), count - number))]
        way = dice.randrange(3)
        if way == 0:
            for each in some:
                note(each, publisher.append(each))
        else:
            rows = numpy.frombuffer(b"".join(some), numpy.uint8).reshape(len(some), -1)
            last = publisher.append_many(iter(some)) if way == 1 else publisher.append_array(rows)
            for each in some[:-1]:
                note(each, None)
            note(some[-1], last)
        number += len(some)


def unpacked(batch: Batch) -> list[bytes]:
    """A batch's messages."""
    batch.seal(7)
    return decode_messages(batch.frame[-batch.nbytes:])


def run(seed: int, threads: int = 3, count: int = 12) -> None:
    """Let threads publish while another one takes what lingers; check every byte."""
    baton = Baton(seed)
    owner = Owner(baton, baton.random.choice((256, 20_000, 100_000)))
    noted: list[tuple[bytes, Delivery | None]] = []
    working = [True] * threads

    def work(thread: int) -> None:
        try:
            publish_some(owner.packer, thread, count, random.Random(seed * 100 + thread),
                         lambda each, delivery: noted.append((each, delivery)))
        finally:
            working[thread] = False

    def linger() -> None:
        while any(working):
            owner.take()

    baton.run(*(lambda thread=thread: work(thread) for thread in range(threads)), linger)
    owner.packer.take_to(owner.batches)
    found = {id(batch): unpacked(batch) for batch in owner.batches}
    everything = [each for batch in owner.batches for each in found[id(batch)]]
    assert sorted(everything) == sorted(each for each, _ in noted)
    for thread in range(threads):
        numbers = [struct.unpack_from("<QQ", each)[1] for each in everything if each.startswith(struct.pack("<Q", thread))]
        assert numbers == list(range(count)), f"the order of thread {thread}"
    for each, delivery in noted:
        assert delivery is None or found[id(delivery.batch)][delivery.index] == each, "its delivery is another's"
    assert owner.packer.messages == threads * count


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_share_a_packer_lose_mix_and_overtake_nothing(seed: int) -> None:
    run(seed)


@pytest.mark.parametrize("safeguard", [Safeguard.SAFEGUARD_TURN, Safeguard.SAFEGUARD_LOOK_AGAIN])
def test_each_safeguard_is_missed(safeguard: Safeguard) -> None:
    leave_out(safeguard)
    assert any(fails(seed) for seed in range(100)), "no seed needs it"


def fails(seed: int) -> bool:
    """Whether this seed's run goes wrong."""
    try:
        run(seed)
    except Exception:
        return True
    return False


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_goes_into_a_packer_that_has_ended(seed: int) -> None:
    # Whoever was told that its message is packed finds it in what was there at the end.
    baton = Baton(seed)
    owner = Owner(baton, 20_000)
    packed: list[bytes] = []
    refused: list[ClosedError] = []

    def work(thread: int) -> None:
        try:
            publish_some(owner.packer, thread, 40, random.Random(seed * 100 + thread), lambda each, _: packed.append(each))
        except ClosedError as error:
            refused.append(error)

    def close() -> None:
        for _ in range(baton.random.randrange(60)):
            baton.point()
        owner.closed = True
        owner.packer.end()
        owner.packer.take_to(owner.batches)

    baton.run(lambda: work(0), lambda: work(1), close)
    there = {each for batch in owner.batches for each in unpacked(batch)}
    assert set(packed) <= there
    assert owner.packer.take() is None
    if refused:
        with pytest.raises(ClosedError):
            owner.packer.append(b"late")


# ---- callbacks -----------------------------------------------------------------------------------------------------


def settle_while_callbacks_are_added(seed: int) -> None:
    """Each callback is called once, whenever it was added."""
    baton = Baton(seed)
    owner = Owner(baton, 1000)
    deliveries = [owner.packer.append(b"%d" % k) for k in range(3)]
    batch = owner.packer.take()
    called: list[tuple[int, Delivery]] = []

    def add(thread: int) -> None:
        for delivery in deliveries:
            delivery.add_done_callback(lambda each, thread=thread: called.append((thread, each)))

    def settle() -> None:
        baton.point()
        batch.settle(0, 1, 0, False, None)

    baton.run(lambda: add(0), lambda: add(1), settle, settle)
    assert sorted(called, key=lambda each: (each[0], each[1].index)) == [
        (thread, delivery) for thread in range(2) for delivery in deliveries]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_callback_that_is_added_while_the_batch_settles_is_called_once(seed: int) -> None:
    settle_while_callbacks_are_added(seed)


def test_looking_and_adding_in_two_steps_is_noticed() -> None:
    leave_out(Safeguard.SAFEGUARD_CALLBACK_ONCE)
    failed = 0
    for seed in range(100):
        try:
            settle_while_callbacks_are_added(seed)
        except AssertionError:
            failed += 1
    assert failed


def test_a_callback_that_is_interrupted_stops_no_other_and_is_heard_of() -> None:
    owner = Owner(Baton(0), 1000)
    delivery = owner.packer.append(b"m")
    called: list[Delivery] = []

    def interrupt(_: Delivery) -> None:
        raise KeyboardInterrupt

    delivery.add_done_callback(interrupt)
    delivery.add_done_callback(called.append)
    with pytest.raises(KeyboardInterrupt):
        owner.packer.take().settle(0, 1, 0, False, None)
    assert called == [delivery]
