"""Records read many at once, as numpy arrays. Apart from records.py: what starts fast imports no numpy."""

from typing import Any

import numpy
from numpy.typing import NDArray

from broker.layout import Layout, record_dtypes
from sim.cxl.memory import Memory

DTYPES: dict[str, numpy.dtype] = record_dtypes()


def read_table(memory: Memory, record: str, offset: int, count: int, stride: int = 0) -> NDArray[Any]:
    """`count` records, `stride` bytes apart, read through the door in one copy."""
    dtype = DTYPES[record]
    stride = stride or dtype.itemsize
    nbytes = (count - 1) * stride + dtype.itemsize
    memory.invalidate_range(offset, nbytes)
    return numpy.ndarray((count,), dtype, buffer=memory.read_bytes(offset, nbytes), strides=(stride,))


def read_indexed(memory: Memory, layout: Layout, record: str, place: str, count: int, *before: int) -> NDArray[Any]:
    """The records at `layout.offset_of(place, *before, i)` for i below `count`."""
    first = layout.offset_of(place, *before, 0)
    return read_table(memory, record, first, count, layout.offset_of(place, *before, 1) - first)


def read_one(memory: Memory, layout: Layout, record: str, place: str, *index: int) -> dict[str, Any]:
    """One record as Python values."""
    return decoded(read_table(memory, record, layout.offset_of(place, *index), 1)[0])


def decoded(row: Any) -> dict[str, Any]:
    """A record as Python values: integers, text, lists; without what is reserved."""
    values = {name: row[name].item() if row[name].ndim == 0 else row[name].tolist()
              for name in row.dtype.names if name != "reserved"}
    return {name: value.decode(errors="replace") if isinstance(value, bytes) else value
            for name, value in values.items()}
