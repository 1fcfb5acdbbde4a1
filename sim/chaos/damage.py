"""Damage of the region that allows a fair verdict: one bit of an order entry of a topic that is there for this.

What a flipped bit of memory destroys cannot be acknowledged and readable as well: level 1 promises nothing then. What
can be judged: no broker falls, no other topic notices, and readers get true messages or a typed error, and go on.
"""

import random
from pathlib import Path

from broker.layout import Layout
from sim.chaos.trail import Kind, read_trail
from sim.cxl.memory import Memory

RECENT = 64             # how far behind the end damage lies: where readers are, or will be when they begin anew
_COMMITTED_INDEX_AT = 0
_ENTRY_BYTES = 64


def flip_bit(memory: Memory, layout: Layout, topic: int, chance: random.Random) -> str:
    """Flip one bit of an order entry of a topic; where that was, empty text: there is no entry yet.

    `layout` has the bank of the head.
    """
    committed = memory.load_word(layout.offset_of("topic_order", topic) + _COMMITTED_INDEX_AT)
    if committed == 0:
        return ""
    index = chance.randrange(max(0, committed - RECENT), committed)
    entry, bit = index % layout.numbers["order_entry_count"], chance.randrange(8 * _ENTRY_BYTES)
    at = layout.offset_of("order_entry", topic, entry) + bit // 64 * 8
    memory.store_word(at, memory.load_word(at) ^ 1 << bit % 64)
    return f"order entry {index}, bit {bit}"


def judge_damaged(reader: Path, end: int, reached: int) -> list[str]:
    """What is wrong with what a reader of the damaged topic saw."""
    wrong = [f"{reader.name} read at position {event.position} what nobody sent, and was not told of damage"
             for event in read_trail(reader) if event.kind == Kind.FOREIGN][:1]
    if reached < end:
        wrong.append(f"{reader.name} did not go on behind the damage: it came to {reached} of {end}")
    return wrong
