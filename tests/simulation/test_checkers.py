"""A checker is believed only after it has failed: every checker of the simulation on a history or memory with a planted breach."""

from collections.abc import Callable

import pytest

from sim.cluster.history import CHECKERS, Entry, History, Operation, Read, Violation, check
from sim.cluster.scenario import draw
from sim.cluster.witness import Breach, build_payload, payload_sender
from sim.cluster.world import World


def sound() -> History:
    """Two clients, three batches, one reader: nothing wrong."""
    log = [Entry(0, 1, 0, 2), Entry(2, 2, 0, 1), Entry(3, 1, 2, 1)]
    reads = [Read(index, entry.position, entry.count, (entry.client, entry.first)) for index, entry in enumerate(log)]
    operations = [Operation(1, 0, 2, 1, 10, "ok", 0, 50), Operation(2, 0, 1, 1, 11, "ok", 2, 60),
                  Operation(1, 2, 1, 1, 70, "ok", 3, 90)]
    return History(5, operations, log, {"reader": list(reads)}, list(reads), marks=[("epoch", 1), ("epoch", 1)],
                   cursors=[("reader", 1, 3), ("reader", 3, 3)], epochs=[(1, 1)], errors=[("the topic is gone", True)])


def lose(history: History) -> None:
    history.log.pop()


def twice(history: History) -> None:
    history.log.append(Entry(4, 1, 0, 2))


def swap(history: History) -> None:
    history.log[0], history.log[2] = Entry(0, 1, 1, 2), Entry(3, 1, 0, 1)


def hole(history: History) -> None:
    history.log[2] = Entry(4, 1, 2, 1)


def differ(history: History) -> None:
    history.reads["reader"][1] = Read(1, 2, 1, (1, 2))


def skip(history: History) -> None:
    del history.reads["reader"][1]


def overtake(history: History) -> None:
    # Client 2 sent after client 1 had its ack at position 0, and lies before it.
    history.log[:] = [Entry(0, 2, 0, 1), Entry(1, 1, 0, 2), Entry(3, 1, 2, 1)]
    history.operations[0].position, history.operations[1].position = 1, 0
    history.operations[1].invoked = 55


def invent(history: History) -> None:
    history.reads["reader"][1] = Read(1, 2, 1, None)


def fail_and_read(history: History) -> None:
    history.operations[1].outcome = "failed"


def misplace(history: History) -> None:
    history.operations[1].position = 3


def unreadable(history: History) -> None:
    history.final.pop()


BREACHES: list[tuple[str, Callable[[History], object]]] = [
    ("A1", lose), ("A1", misplace), ("A1", unreadable), ("U", twice), ("P", swap), ("T", hole), ("T", differ), ("T", skip),
    ("R", overtake), ("N", invent), ("N", fail_and_read),
    ("A2", lambda history: history.operations.append(Operation(1, 0, 2, 2, 1, "ok", 0, 5, replicas=1))),
    ("M", lambda history: history.marks.append(("epoch", 0))),
    ("Z", lambda history: history.log.extend([Entry(4, 2, 1, 1, epoch=3), Entry(5, 2, 2, 1, epoch=2)])),
    ("Z", lambda history: history.epochs.append((1, 2))),
    ("I", lambda history: history.errors.append(("order entry 3 is damaged", False))),
    ("B", lambda history: history.leftovers.append("slots 3 to 7 are still in use")),
    ("C", lambda history: history.cursors.append(("reader", 2, 3))),
    ("C", lambda history: history.cursors.append(("reader", 4, 3))),
]


def test_a_sound_history_passes() -> None:
    check(sound())


@pytest.mark.parametrize(("invariant", "plant"), BREACHES)
def test_each_checker_sees_its_breach(invariant: str, plant: Callable[[History], object]) -> None:
    history = sound()
    plant(history)
    with pytest.raises(Violation) as found:
        CHECKERS[invariant](history)
    assert found.value.invariant == invariant


def test_every_checker_was_seen_to_fail() -> None:
    assert {invariant for invariant, _ in BREACHES} == set(CHECKERS)


# ---- the witness, on damaged memory --------------------------------------------------------------------------------


@pytest.fixture
def world() -> World:
    """A run without faults, up to its end, whose memory can be damaged."""
    world = World(draw(3, kinds=frozenset()).smaller(order=5, batches=12, publishers=2, ring_slots=64, entries=64))
    world.run()
    assert world.witness.check_now() == Breach.BREACH_NONE
    return world


def entry_offset(world: World, index: int) -> int:
    return int(world.layout.offset_of("order_entry", 0, index))


def change(world: World, offset: int, by: int = 1) -> None:
    truth = world.hardware.truth
    truth.store_word(offset, (truth.load_word(offset) + by) % (1 << 64))


def see(world: World) -> int:
    found = world.witness.check_now()
    invariant, text = world.witness.describe()
    assert invariant and text
    world.close()
    return int(found)


def test_a_frontier_over_an_entry_that_is_not_there(world: World) -> None:
    change(world, world.layout.offset_of("topic_order", 0))
    assert see(world) == Breach.BREACH_ENTRY_MISSING


@pytest.mark.parametrize("place", ["topic_order", "topic_reclaim"])
def test_a_frontier_that_goes_back(world: World, place: str) -> None:
    offset = world.layout.offset_of(place, 0)
    if place == "topic_reclaim":
        change(world, offset, 2)
        assert world.witness.check_now() == Breach.BREACH_NONE
    change(world, offset, -1)
    assert see(world) == Breach.BREACH_BACK


def test_reclaimed_beyond_committed(world: World) -> None:
    change(world, world.layout.offset_of("topic_reclaim", 0), 1000)
    assert see(world) == Breach.BREACH_BOUNDS


def test_scanned_beyond_delegated(world: World) -> None:
    change(world, world.layout.offset_of("offset_sequencer", 0, 1), 1000)
    assert see(world) == Breach.BREACH_BOUNDS


def test_delegated_beyond_what_was_published(world: World) -> None:
    layout, truth = world.layout, world.hardware.truth
    frontier = layout.offset_of("offset_broker", 0, 2)
    slot = truth.load_word(frontier)
    truth.store_word(layout.offset_of("ring", 0, 2, slot % layout.numbers["ring_slot_count"]),
                     world.topic.generation << 48 | slot + 1)
    change(world, frontier)
    assert see(world) == Breach.BREACH_BOUNDS


@pytest.mark.parametrize(("by", "breach"), [(1, Breach.BREACH_HEADER_MISSING), (1000, Breach.BREACH_RING)])
def test_a_delegated_frontier_over_headers_that_are_not_there(world: World, by: int, breach: Breach) -> None:
    change(world, world.layout.offset_of("offset_broker", 0, 2), by)
    assert see(world) == breach


def test_a_high_water_mark_that_goes_back(world: World) -> None:
    layout = world.layout
    slot = next(slot for slot in range(layout.numbers["session_count_max"])
                if world.hardware.truth.load_word(layout.offset_of("session_progress", slot) + 8))
    change(world, layout.offset_of("session_progress", slot) + 8, -1)
    assert see(world) == Breach.BREACH_BACK


def test_a_flipped_bit_in_a_payload(world: World) -> None:
    change(world, world.hardware.truth.load_word(entry_offset(world, 3) + 16) + 24, 256)
    assert see(world) == Breach.BREACH_CHANGED


def test_a_flipped_bit_in_an_order_entry(world: World) -> None:
    change(world, entry_offset(world, 4) + 8)
    assert see(world) == Breach.BREACH_CHANGED


def append(world: World, source: int, **changes: int) -> None:
    """Commit one more entry, a copy of entry `source` with some words changed."""
    truth, layout = world.hardware.truth, world.layout
    order = layout.offset_of("topic_order", 0)
    index, position = truth.load_word(order), truth.load_word(order + 8)
    at, start = entry_offset(world, index), entry_offset(world, source)
    for word in range(8):
        truth.store_word(at + 8 * word, truth.load_word(start + 8 * word))
    truth.store_word(at, truth.load_word(start) + index - source)
    truth.store_word(at + 8, position + changes.get("position", 0))
    truth.store_word(at + 48, truth.load_word(at + 48) - (changes.get("epoch", 0) << 48))
    truth.store_word(order, index + 1)


def test_a_batch_that_is_there_twice(world: World) -> None:
    append(world, 0)
    assert see(world) == Breach.BREACH_TWICE


def test_a_hole_between_positions(world: World) -> None:
    append(world, 0, position=1)
    assert see(world) == Breach.BREACH_POSITION


def test_an_entry_of_an_old_epoch(world: World) -> None:
    append(world, 0, epoch=1)
    assert see(world) == Breach.BREACH_EPOCH


def test_payloads_say_who_sent_them() -> None:
    payload = build_payload(3, 70, 4)
    assert payload_sender(payload, 4) == (3, 70)
    for at in range(len(payload)):
        broken = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1:]
        sender = payload_sender(broken, 4)
        # The zeroes that fill a message up to 8 bytes are nobody's.
        assert sender is None or payload[at] == 0
