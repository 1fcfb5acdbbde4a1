"""The page memory-bank/dataStructures.md: the layout as people read it, made from the declarations."""

import re
from pathlib import Path

import numpy

from broker.coherence import WRITERS
from broker.layout import Layout, record_dtypes

LINE_BYTES = 64

_STRUCT = re.compile(r"cdef packed struct (\w+):(?:\s*#\s*(.*))?")
_MEMBER = re.compile(r"\s+\w+ (\w+)(?:\[\d+\])?(?:\s*#\s*(.*))?$")
_TYPES = {"u": "uint", "S": "text", "V": "bytes"}


def _comments() -> dict[tuple[str, str], str]:
    """The comments in the declarations: (record, field) -> text; the record's own under field ""."""
    root, found = Path(__file__).parent.parent, {}
    for path in (root / "broker/layout.pxd", root / "sim/cxl/memory.pxd"):
        record = ""
        for line in path.read_text().splitlines():
            if match := _STRUCT.match(line):
                record = match[1]
                found[record, ""] = match[2] or ""
            elif record and (match := _MEMBER.match(line)):
                found[record, match[1]] = match[2] or ""
            elif line.strip():
                record = ""
    return found


def data_structures_markdown(layout: Layout) -> str:
    """The page memory-bank/dataStructures.md: sections of this layout, then every record, field by field."""
    numbers, comments = layout.numbers, _comments()
    lines = [
        "# Data structures in the region", "",
        "Generated from broker/layout.pxd by `data_structures_markdown`; do not edit.", "",
        f"## Sections ({numbers['broker_count']} brokers, {numbers['topic_count_max']} topics, "
        f"{numbers['region_bytes'] >> 20} MiB, {numbers['segment_count']} segments of "
        f"{numbers['segment_bytes'] >> 10} KiB)", "",
        "| section | offset | bytes |", "|---|---:|---:|",
    ]
    for name, offset, nbytes in layout.sections:
        lines.append(f"| {name} | {offset} | {nbytes or numbers['region_bytes'] - offset} |")
    lines += ["", "## Tags", "",
              "A tag is `(generation << 48) | (sequence + 1) % 2^48`, a result's has 40 bits of it. It stands in the "
              "commit word (word 0) of a line that is "
              "reused, is stored last and loaded first. The generation tells a deleted topic's leftovers, the sequence "
              "another lap's; zeroed memory never matches, because sequence 0 is tagged 1.", "", "## Records"]
    for record, dtype in record_dtypes().items():
        lines += ["", f"### {record}", "", f"{_size_text(dtype.itemsize)}; writer: {WRITERS[record]}."]
        if (comment := comments.get((record, ""), "")) not in ("", f"writer: {WRITERS[record]}"):
            lines[-1] += f" Declared as: {comment}."
        lines += ["", "| field | offset | bytes | type | meaning |", "|---|---:|---:|---|---|"]
        for field, (kind, offset, *_) in (dtype.fields or {}).items():
            lines.append(f"| {field} | {offset} | {kind.itemsize} | {_type_text(kind)} | "
                         f"{comments.get((record, field), '')} |")
    return "\n".join(lines) + "\n"


def _size_text(nbytes: int) -> str:
    count = nbytes / LINE_BYTES
    return "1 line" if count == 1 else f"{count:g} lines" if count > 1 else f"{nbytes} bytes"


def _type_text(kind: numpy.dtype) -> str:
    base, shape = kind.base, kind.shape
    text = "text" if base.kind == "S" else f"{_TYPES[base.kind]}{base.itemsize * 8}"
    return f"{text} x {shape[0]}" if shape else text
