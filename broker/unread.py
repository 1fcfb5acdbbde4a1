"""What of a topic can be read from a position on: neither reclaimed nor lost at a recovery."""

from typing import Any

import numpy

from broker.layout import LOST_BROKER_NUMBER, record_dtypes


def lost_from(position: int, first: int, end: int, entries: Any = None, generation: int = 0) -> int:
    """How many messages from `position` up to `end` cannot be read, when `first` is the first that is kept.

    `entries` are the bytes of the topic's order index, if a recovery may have put lost ranges into it.
    """
    begin = min(max(position, first), end)
    lost = max(0, begin - position)
    if entries is not None:
        index = numpy.frombuffer(entries, record_dtypes()["OrderEntry"])
        gone = index[(index["broker"] == LOST_BROKER_NUMBER) & (index["payload_bytes"] == 0)
                     & (index["commit"] >> numpy.uint64(48) == generation)]
        starts = gone["position"].astype(numpy.int64)
        ends = starts + gone["message_count"]
        lost += int(numpy.maximum(0, numpy.minimum(ends, end) - numpy.maximum(starts, begin)).sum())
    return lost
