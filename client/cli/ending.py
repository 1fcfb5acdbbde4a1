"""How a command is ended from outside: Ctrl-C, SIGTERM and SIGHUP alike. What the parent has us ignore is ignored."""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Somebody wants the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells give it."""
        return 128 + self.number


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {}
    try:
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                with contextlib.suppress(ValueError):       # not in the main thread: nobody is told there
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, signal.SIG_DFL if each is None else each)


def interrupting() -> contextlib.AbstractContextManager[None]:
    """Whatever runs within is interrupted by `Stopped`, and cleans up."""
    def interrupt(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    return _handled(interrupt)


class Gently(contextlib.AbstractContextManager["Gently"]):
    """The first signal ends the waiting for input and nothing else; the next one interrupts whatever runs.

    What is `held` is not interrupted within, but as soon as it is done: what was read is counted before anything ends.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self._on_first = on_first
        self._first: int | None = None
        self._last: int | None = None       # came while nothing could be interrupted
        self._is_held = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Gently":
        self._bell, self._ring = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stack.callback(os.close, self._bell)
        self._stack.callback(os.close, self._ring)
        self._stack.enter_context(_handled(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._first is None:
            self._first = number
            os.write(self._ring, b"x")
            self._on_first()
        elif self._is_held:
            self._last = number
        else:
            raise Stopped(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is done within is done whole; it waits for nothing but `wait_for_input`."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._last is not None:
            raise Stopped(self._last)

    def wait_for_input(self, descriptor: int) -> None:
        """Until there is something to read, or the end of it. Raises `Stopped`."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        poll.poll()
        if self._first is not None:
            raise Stopped(self._first)
