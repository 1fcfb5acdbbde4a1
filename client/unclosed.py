"""Publishers that nobody closed: what they published is sent all the same, and what could not be sent is said.

    opened ─► noted ─► closed ─► forgotten
                │ the last reference goes, or close() is cancelled: flushed and closed in the background
                │ the interpreter ends: flushed and closed, each within its delivery time-out, and waited for

What was not delivered is counted on stderr: nobody else will tell. But for a cancelled close(), with a ResourceWarning.
In a forked child there is nothing to send: it is the parent's.
"""

import asyncio
import atexit
import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future

from broker.errors import CxlmqError
from client.engine import FLUSH_GRACE_SECONDS, Engine
from client.fork import is_child

CLOSE_SECONDS = 10.0                    # for giving back slots and sessions, beyond the delivery time-out
LOOK_SECONDS = 0.005

_open: dict[Engine, str] = {}           # and their topics
_finishing: "dict[Engine, Future[None]]" = {}


def note(engine: Engine) -> None:
    """A publisher was opened."""
    _open[engine] = engine.topic


def forget(engine: Engine) -> None:
    """It was closed."""
    _open.pop(engine, None)


def dropped(engine: Engine) -> None:
    """The last reference to a publisher went. Called by the collector: any thread, and nothing may wait."""
    if _open.pop(engine, None) is None or is_child():
        return
    _finishing[engine] = engine.client_loop.submit(_finish(engine, "when the publisher was dropped"))
    _warn(engine)


def go_on(engine: Engine) -> None:
    """Whoever closed a publisher gave up waiting: what was published is sent all the same."""
    if _open.pop(engine, None) is not None:
        _finishing[engine] = engine.client_loop.submit(_finish(engine, "after close() was cancelled"))


async def finished(engine: Engine) -> bool:
    """On the client loop: wait for what goes on after a cancelled close(), if anything does."""
    future = _finishing.get(engine)
    if future is not None:
        await asyncio.shield(asyncio.wrap_future(future))
    return future is not None


def _warn(engine: Engine) -> None:
    warnings.warn(f"the publisher of topic {engine.topic!r} was never closed: use it in a `with` block, or call "
                  "close()", ResourceWarning, stacklevel=3)


async def _finish(engine: Engine, when: str) -> None:
    """On the client loop: flush, close, and say what was not delivered."""
    before, error = engine.statistics()["failed"], ""
    try:
        done, until = engine.flushed(), time.monotonic() + limit_of(engine)
        while not done() and time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS)
    except CxlmqError as failed:
        error = failed.message
    finally:
        await engine.close()
        _finishing.pop(engine, None)
        _say(engine.topic, engine.statistics()["failed"] - before, when, error or engine.why_failed())


def limit_of(engine: Engine) -> float:
    """How long flushing a publisher may take, seconds."""
    return engine.delivery_timeout + FLUSH_GRACE_SECONDS


@contextlib.contextmanager
def counted_when_interrupted(engine: Engine) -> Iterator[None]:
    """Around closing: when somebody cannot wait for it (Ctrl-C), what was given up is said."""
    before = engine.statistics()["failed"]
    try:
        yield
    except Exception:
        raise                               # of which the caller hears
    except BaseException:
        given_up = engine.statistics()["failed"] - before + engine.undecided()
        _say(engine.topic, given_up, "when close() was interrupted", "there was no time for them")
        raise


def _say(topic: str, count: int, when: str, why: str) -> None:
    if count > 0:
        sys.stderr.write(f"cxlmq: {count} messages to topic {topic} were not delivered {when}: {why}\n")


def _at_exit() -> None:
    """The interpreter ends; the client loop still runs."""
    ending = dict(_finishing)
    if is_child():
        return
    unclosed = list(_open)
    for engine in unclosed:
        _open.pop(engine, None)
        ending[engine] = engine.client_loop.submit(_finish(engine, "when the program ended"))
    if not ending:
        return
    try:
        futures.wait(ending.values(), max(map(limit_of, ending)) + CLOSE_SECONDS)
    finally:                                # also when somebody cannot wait so long (Ctrl-C)
        for engine, future in ending.items():
            if not future.done():
                _say(engine.topic, engine.undecided(), "when the program ended", "there was no time for them")
        for engine in unclosed:
            _warn(engine)


def _in_child() -> None:
    _open.clear()
    _finishing.clear()


os.register_at_fork(after_in_child=_in_child)
atexit.register(_at_exit)
