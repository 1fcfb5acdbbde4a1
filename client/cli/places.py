"""Places in a topic as people write them: --from of `consume`, --to of `group reset`."""

import datetime
import re
from dataclasses import dataclass
from typing import Any

import click

from client.cli.common import Target
from client.start import Start, fill_start, parse_start

METAVAR = "beginning|end|POSITION|-N|TIME|AGO"
HELP = ("a time is 2026-11-21T10:00:00Z or @SECONDS since 1970, AGO is 30s, 5m, 2h or 1d, and -N is N messages before "
        "the end.")
_ALLOWED = ("beginning, end, a position from 0, -N (messages before the end), a time up to 2554 (2026-11-21T10:00:00Z, "
            "or @SECONDS since 1970), or how long ago (30s, 5m, 2h, 1d)")
_LAST = re.compile(r"-(\d{1,18})")
_AGO = re.compile(r"\d+(\.\d+)?\s*[A-Za-z]+")


@dataclass(frozen=True)
class Last:
    """So many messages before the end."""

    count: int


class PlaceType(click.ParamType):
    """A start as the library takes it, or `Last`."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Start | Last:
        """Checked in the form in which it is asked for."""
        from broker.errors import ConfigError
        from broker.proto import cxlmq_pb2 as pb

        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        if match := _LAST.fullmatch(value):
            return Last(int(match[1]))
        try:
            start: Start = _ago(value) if _AGO.fullmatch(value) else parse_start(value)
            fill_start(pb.SubscribeRequest(), start)
        except (ConfigError, ValueError, OverflowError):
            self.fail(f"{value!r} is no place in a topic: allowed are {_ALLOWED}", param, ctx)
        return start


def _ago(text: str) -> datetime.datetime:
    from broker.config import parse_duration

    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=parse_duration(text))


def settled(place: Start | Last, topic: str, target: Target) -> Start:
    """The start that a place is now."""
    if not isinstance(place, Last):
        return place
    found = bounds(topic, target)
    return max(found["first_position"], found["end_position"] - place.count)


def bounds(topic: str, target: Target) -> dict[str, Any]:
    """What the topic has: first_position, end_position and the rest of its description."""
    from client.admin import Admin

    with Admin(**target.arguments) as admin:
        return admin.describe_topic(topic)
