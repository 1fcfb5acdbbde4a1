"""Where reading starts: from the beginning, the end, a position, or a time."""

import datetime
from typing import Any

from broker.errors import ConfigError
from client.arguments import as_count

Start = str | int | datetime.datetime
ALLOWED = ("\"beginning\", \"end\", a position from 0 on, a datetime before 2554, or such a time as text "
           "(2026-11-21T10:00:00Z, or @SECONDS since 1970)")
TEXT_ALLOWED = "beginning, end, a position from 0, a time before 2554 (2026-11-21T10:00:00Z), or @SECONDS since 1970"
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
NS_END = 1 << 64                        # times are counted in ns since 1970, in 64 bits


def as_start(start: Any) -> Start:
    """A start as it is asked for: "beginning", "end", an int, or a datetime. Raises `ConfigError`."""
    try:
        if isinstance(start, str):
            return _from_text(start)
        if isinstance(start, datetime.datetime):
            _ns_of(start)
            return start
        return as_count("start", start, 0)
    except (ValueError, OverflowError, OSError, ConfigError):
        raise ConfigError(setting="start", value=repr(start), allowed=ALLOWED) from None


def check_start(start: Any) -> None:
    """Raise `ConfigError` unless reading can start there."""
    as_start(start)


def parse_start(text: str) -> Start:
    """A start as people write it; a time without a zone is local. Raises `ConfigError`."""
    try:
        return _from_text(text)
    except (ValueError, OverflowError, OSError, ConfigError):
        raise ConfigError(setting="start", value=repr(text), allowed=TEXT_ALLOWED) from None


def _from_text(text: str) -> Start:
    if text in ("beginning", "end"):
        return text
    if text.isdecimal():
        return as_count("start", int(text), 0)
    if text.startswith("@"):
        moment = datetime.datetime.fromtimestamp(float(text[1:]), datetime.UTC)
    else:
        moment = datetime.datetime.fromisoformat(text)
    _ns_of(moment)
    return moment


def _ns_of(moment: datetime.datetime) -> int:
    """Since 1970; what was before is 0, as nothing was published then. Raises `ValueError` when it does not fit."""
    try:
        since = moment.astimezone(datetime.UTC) - EPOCH
    except (OverflowError, ValueError, OSError):        # where no zone can move it: in the years 1 and 9999
        since = moment.replace(tzinfo=datetime.UTC) - EPOCH
    ns = max(0, (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000)
    if ns >= NS_END:
        raise ValueError("later than can be counted")
    return ns


def fill_start(request: Any, start: Start) -> None:
    """Set the start of a request."""
    start = as_start(start)
    if isinstance(start, datetime.datetime):
        request.published_ns = _ns_of(start)
    elif isinstance(start, int):
        request.position = start
    elif start == "end":
        request.end = True
    else:
        request.beginning = True
