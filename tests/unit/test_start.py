"""Starts of reading: what people write is what is asked for, to the microsecond, and the rest is refused."""

import datetime
from typing import Any

import pytest

from broker.errors import ConfigError
from broker.proto import cxlmq_pb2 as pb
from client.start import check_start, fill_start, parse_start


@pytest.mark.parametrize(("text", "field", "value"), [
    ("beginning", "beginning", True), ("end", "end", True), ("0", "position", 0), ("123", "position", 123),
    ("@0", "published_ns", 0), ("@1795255200", "published_ns", 1795255200 * 10**9),
    ("@1795255200.25", "published_ns", 1795255200 * 10**9 + 250_000_000),
    ("2026-11-21T10:00:00Z", "published_ns", 1795255200 * 10**9),
    ("2026-11-21T11:00:00+01:00", "published_ns", 1795255200 * 10**9),
    ("2026-11-21T10:00:00.000123Z", "published_ns", 1795255200 * 10**9 + 123_000),
    ("1960-01-01T00:00:00Z", "published_ns", 0),
])
def test_what_people_write_is_what_is_asked_for(text: str, field: str, value: Any) -> None:
    for request in (pb.SubscribeRequest(), pb.JoinGroupRequest(), pb.ResetGroupRequest()):
        fill_start(request, parse_start(text))
        assert (request.WhichOneof("start"), getattr(request, field)) == (field, value)


def test_a_time_without_a_zone_is_local() -> None:
    found = parse_start("2026-11-21T10:00:00")
    assert isinstance(found, datetime.datetime)
    request = pb.SubscribeRequest()
    fill_start(request, found)
    assert request.published_ns == int(datetime.datetime(2026, 11, 21, 10).timestamp()) * 10**9


@pytest.mark.parametrize("text", ["", "begin", "-1", "1.5", "@", "@x", "@1e40", "2026-13-01", "yesterday", "9" * 30])
def test_what_is_no_start_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_start(text)


@pytest.mark.parametrize("start", [None, True, 1.5, -1, "here", b"end", 1 << 63])
def test_what_is_no_start_in_a_program_is_refused(start: Any) -> None:
    with pytest.raises(ConfigError):
        check_start(start)
