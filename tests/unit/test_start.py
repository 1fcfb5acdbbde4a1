"""Starts of reading: what people write is what is asked for, to the microsecond, and the rest is refused."""

import datetime
from typing import Any

import numpy
import pytest

from broker.errors import ConfigError
from broker.proto import cxlmq_pb2 as pb
from client.arguments import as_count, as_seconds
from client.start import as_start, check_start, fill_start, parse_start


@pytest.mark.parametrize(("text", "field", "value"), [
    ("beginning", "beginning", True), ("end", "end", True), ("0", "position", 0), ("123", "position", 123),
    ("@0", "published_ns", 0), ("@1795255200", "published_ns", 1795255200 * 10**9),
    ("@1795255200.25", "published_ns", 1795255200 * 10**9 + 250_000_000),
    ("2026-11-21T10:00:00Z", "published_ns", 1795255200 * 10**9),
    ("2026-11-21T11:00:00+01:00", "published_ns", 1795255200 * 10**9),
    ("2026-11-21T10:00:00.000123Z", "published_ns", 1795255200 * 10**9 + 123_000),
    ("1960-01-01T00:00:00Z", "published_ns", 0), ("0001-01-01T00:00:00", "published_ns", 0),
    ("0001-01-01T00:00:00+14:00", "published_ns", 0), ("@-1", "published_ns", 0),
    ("2554-07-21T23:34:33.709551Z", "published_ns", 2**64 - 616),
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


@pytest.mark.parametrize("text", ["", "begin", "-1", "1.5", "@", "@x", "@1e40", "2026-13-01", "yesterday", "9" * 30,
                                  "9999-12-31T00:00:00Z", "2600-01-01T00:00:00Z", "@1e11", "@inf", "@nan",
                                  "9999-12-31T23:59:59-14:00", "9999-12-31T23:59:59", "2554-07-21T23:34:33.709552Z"])
def test_what_is_no_start_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_start(text)


@pytest.mark.parametrize("start", [None, True, 1.5, -1, "here", b"end", 1 << 63, numpy.int64(-1), numpy.bool_(True),
                                   numpy.float64(1), [1], datetime.date(2026, 1, 1),
                                   datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC), datetime.datetime.max])
def test_what_is_no_start_in_a_program_is_refused(start: Any) -> None:
    with pytest.raises(ConfigError):
        check_start(start)


@pytest.mark.parametrize(("start", "found"), [
    (numpy.int64(5), 5), (numpy.uint64(2**63 - 1), 2**63 - 1), (numpy.uint8(0), 0), ("17", 17), ("end", "end"),
    ("2026-11-21T10:00:00Z", datetime.datetime(2026, 11, 21, 10, tzinfo=datetime.UTC)),
    ("@1795255200", datetime.datetime(2026, 11, 21, 10, tzinfo=datetime.UTC)),
])
def test_programs_say_it_as_people_do(start: Any, found: Any) -> None:
    assert as_start(start) == found
    assert type(as_start(start)) is type(found)
    with_it, without = pb.ResetGroupRequest(), pb.ResetGroupRequest()
    fill_start(with_it, start)
    fill_start(without, found)
    assert with_it == without


@pytest.mark.parametrize("count", [0, -1, 2.5, 1.0, None, True, "3", numpy.float64(2), float("nan"), 1 << 63])
def test_what_is_no_count_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match="n cannot be"):
        as_count("n", count)


def test_times_to_wait() -> None:
    assert [as_seconds("timeout", each) for each in (None, float("inf"), 1e300, 0, -3, 2.5, numpy.float32(0.5), 7)] == [
        None, None, None, 0.0, 0.0, 2.5, 0.5, 7.0]
    for wrong in (float("nan"), "1", True, [1], numpy.float64("nan"), 1j):
        with pytest.raises(ConfigError, match="timeout cannot be"):
            as_seconds("timeout", wrong)
