"""A flame graph from `perf script`, for machines that have perf and nothing that draws.

    perf script -i perf.data | python -m client.bench.flamegraph > flamegraph.svg

Each box is a function, as wide as the share of samples that it was on the stack; its callers are below it. Hovering
shows the name and the share.
"""

import hashlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

WIDTH, ROW, CHARACTER = 1200, 17, 6.5
# Boxes narrower than this many pixels say nothing.
WIDTH_MIN = 0.5
_FRAME = re.compile(r"\s+[0-9a-f]+ (.+?)(?:\+0x[0-9a-f]+)? \(")


@dataclass
class Frame:
    """A function on the stack, with what it calls."""

    name: str
    samples: int = 0
    children: dict[str, "Frame"] = field(default_factory=dict)

    def add(self, stack: list[str]) -> None:
        """Count one sample whose frames, outermost first, are `stack`."""
        frame = self
        frame.samples += 1
        for name in stack:
            frame = frame.children.setdefault(name, Frame(name))
            frame.samples += 1

    def depth(self) -> int:
        """Rows that the deepest stack takes."""
        return 1 + max((child.depth() for child in self.children.values()), default=0)


def parse(lines: Iterable[str]) -> Frame:
    """All samples of `perf script`: a line with the command, then a frame a line, then an empty line."""
    root, command, stack = Frame("all"), "", list[str]()
    for line in [*lines, ""]:
        frame = _FRAME.match(line)
        if frame:
            stack.append(frame[1])
        elif line.strip():
            command = line.split()[0]
        elif command:
            root.add([command, *reversed(stack)])
            command, stack = "", []
    return root


def draw(root: Frame) -> str:
    """The graph as SVG."""
    height = (root.depth() + 1) * ROW
    boxes = "\n".join(_boxes(root, 0.0, 0, WIDTH / max(1, root.samples), height, root.samples))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="monospace" '
            f'font-size="11">\n{boxes}\n</svg>\n')


def _boxes(frame: Frame, left: float, row: int, scale: float, height: int, total: int) -> Iterable[str]:
    width = frame.samples * scale
    if width < WIDTH_MIN:
        return
    top, name = height - (row + 1) * ROW, escape(frame.name)
    shown = escape(frame.name[:max(0, int(width / CHARACTER) - 1)])
    hue = 20 + hashlib.blake2b(frame.name.encode(), digest_size=1).digest()[0] % 35
    yield (f'<g><title>{name}: {frame.samples} samples, {frame.samples / max(1, total):.1%}</title>'
           f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 1}" fill="hsl({hue},80%,65%)"/>'
           f'<text x="{left + 2:.1f}" y="{top + 12}">{shown}</text></g>')
    for child in sorted(frame.children.values(), key=lambda each: each.name):
        yield from _boxes(child, left, row + 1, scale, height, total)
        left += child.samples * scale


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    sys.stdout.write(draw(parse(sys.stdin)))
