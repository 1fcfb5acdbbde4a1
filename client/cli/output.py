"""Everything a command prints goes through here: data to standard output, remarks and errors to standard error.

Data that cannot be written is an error that names the output. Remarks that cannot be written are left out. What a
command has changed is changed, whether or not it can say so: `report` never makes a failure of it.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from broker.errors import CxlmqError, shortened

INPUT, OUTPUT, ERRORS = range(3)
_closed: set[int] = set()


class OutputFailed(CxlmqError):
    """Standard output cannot be written; details: reason."""

    code: ClassVar[str] = "output"
    template = "standard output cannot be written ({reason}): give it a file, a pipe or a terminal that takes it"


class OutputClosed(Exception):
    """Whoever read the output has enough (`| head`): no failure."""


class _Guarded:
    """A standard stream that says typed what became of a write. None: this process was started without it."""

    def __init__(self, stream: Any, number: int) -> None:
        self._number = number
        self._broken: BaseException | None = None if stream is not None else OSError(errno.EBADF, "it is closed")
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether somebody looks."""
        return self._broken is None and not self._stream.closed and bool(self._stream.isatty())

    def write(self, text: str) -> int:
        """All of a text, as the stream does."""
        self._judged(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Until it is written."""
        if self._broken is None:
            self._judged(self._stream.flush)

    def write_bytes(self, data: bytes) -> None:
        """All of the bytes, at once and behind what was written before."""
        self.flush()
        self._judged(lambda: _write_all(self._stream.fileno(), data))

    def _judged(self, act: Callable[[], object]) -> None:
        try:
            if self._broken is not None:
                raise self._broken
            act()
        except (OSError, ValueError) as error:          # ValueError: closed by this process
            if self._broken is None:
                self._broken = error
                self._discard()
            if self._number == OUTPUT and isinstance(error, BrokenPipeError):
                raise OutputClosed from None
            if self._number == OUTPUT:
                raise OutputFailed(reason=getattr(error, "strerror", None) or str(error)) from None

    def _discard(self) -> None:
        """What is still buffered goes nowhere: the interpreter would try once more when it ends, and complain."""
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)


def _write_all(descriptor: int, data: bytes, write: Callable[[int, memoryview], int] = os.write) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[write(descriptor, rest):]


def open_standard_streams() -> None:
    """Where a standard stream was closed before we started, the next file would take its number, and get its data."""
    for number in (INPUT, OUTPUT, ERRORS):
        try:
            os.fstat(number)
        except OSError:
            _closed.add(number)
            os.open(os.devnull, os.O_RDWR)              # the lowest number that is free: this one


def has_input() -> bool:
    """Whether this process was started with a standard input."""
    return INPUT not in _closed


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Both streams are guarded within."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Guarded(before[0], OUTPUT), _Guarded(before[1], ERRORS)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


# ---- what commands call -------------------------------------------------------------------------------------------


def line(text: str = "") -> None:
    """A line of data."""
    print(text)


def print_json(value: Any) -> None:
    """One JSON document on one line."""
    print(json.dumps(value, default=str))


def write_bytes(data: bytes) -> None:
    """Data as it is."""
    sys.stdout.write_bytes(data)  # type: ignore[union-attr]


def say(text: str) -> None:
    """A remark for people, so that it never mixes with data."""
    print(text, file=sys.stderr, flush=True)


def report(as_json: bool, values: Any, text: str) -> None:
    """Tell what was changed. It is changed, so that this cannot fail any more."""
    try:
        print_json(values) if as_json else print(text)
        sys.stdout.flush()
    except OutputFailed as error:
        say(f"note: it is done; {error.message}: {shortened(text)}")
    except OutputClosed:
        pass
