"""Where reading starts: from the beginning, the end, a position, or a time."""

import datetime
from typing import Any

from broker.errors import ConfigError

Start = str | int | datetime.datetime
ALLOWED = "\"beginning\", \"end\", a position from 0 on, or a datetime"
TEXT_ALLOWED = "beginning, end, a position from 0, a time (2026-11-21T10:00:00Z), or @SECONDS since 1970"


def check_start(start: Start) -> None:
    """Raise `ConfigError` unless reading can start there."""
    if start in ("beginning", "end") or isinstance(start, datetime.datetime) or (
            isinstance(start, int) and not isinstance(start, bool) and 0 <= start < 1 << 63):
        return
    raise ConfigError(setting="start", value=repr(start), allowed=ALLOWED)


def parse_start(text: str) -> Start:
    """A start as people write it; a time without a zone is local. Raises `ConfigError`."""
    if text in ("beginning", "end"):
        return text
    try:
        if text.isdecimal():
            start: Start = int(text)
        elif text.startswith("@"):
            start = datetime.datetime.fromtimestamp(float(text[1:]), datetime.UTC)
        else:
            start = datetime.datetime.fromisoformat(text)
        check_start(start)
    except (ValueError, OverflowError, OSError, ConfigError):
        raise ConfigError(setting="start", value=repr(text), allowed=TEXT_ALLOWED) from None
    return start


def fill_start(request: Any, start: Start) -> None:
    """Set the start of a request."""
    if isinstance(start, datetime.datetime):
        moment = start.astimezone(datetime.UTC)
        since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        request.published_ns = max(0, (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000)
    elif isinstance(start, int):
        request.position = start
    elif start == "end":
        request.end = True
    else:
        request.beginning = True
