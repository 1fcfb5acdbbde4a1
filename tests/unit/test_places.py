"""Places in a topic as people write them are checked in the form in which they are asked for."""

import datetime

import click
import pytest

from client.cli.common import DURATION, MILLISECONDS
from client.cli.places import Last, PlaceType


@pytest.mark.parametrize("text", [
    "9999-12-31T00:00:00Z", "2600-01-01T00:00:00Z", "2554-07-22T00:00:00Z", "@1e11", "@nan", "@inf", "@-1e40", "@", "1y", "-5m", "--5",
    "-", "", "-1.5", str(1 << 63), "9" * 40, "9" * 40 + "d", "1e400s", "-" + "9" * 30, "yesterday", "5 parsecs"])
def test_what_cannot_be_asked_for_is_refused_with_what_can(text: str) -> None:
    with pytest.raises(click.BadParameter, match="allowed are beginning, end"):
        PlaceType().convert(text, None, None)


@pytest.mark.parametrize(("text", "place"), [
    ("beginning", "beginning"), ("end", "end"), ("0", 0), (str((1 << 63) - 1), (1 << 63) - 1), ("-10", Last(10)), ("-0", Last(0)),
    ("@0", datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)),
    ("2554-07-21T00:00:00Z", datetime.datetime(2554, 7, 21, tzinfo=datetime.UTC))])
def test_what_people_write_is_what_is_asked_for(text: str, place: object) -> None:
    assert PlaceType().convert(text, None, None) == place


@pytest.mark.parametrize(("text", "seconds"), [
    ("30s", 30), ("5m", 300), ("1.5h", 5400), ("2 d", 172800), ("200ms", 0.2), ("0s", 0)])
def test_ago_is_before_now(text: str, seconds: float) -> None:
    before = datetime.datetime.now(datetime.UTC)
    found = PlaceType().convert(text, None, None)
    after = datetime.datetime.now(datetime.UTC)
    ago = datetime.timedelta(seconds=seconds)
    assert isinstance(found, datetime.datetime)
    assert before - ago <= found <= after - ago


@pytest.mark.parametrize(("text", "milliseconds"), [
    ("1", 1), ("0", 0), ("0.5", 0.5), ("5ms", 5), ("100us", 0.1), ("1s", 1000), ("2 s", 2000), (5, 5)])
def test_a_linger_without_a_unit_is_in_the_librarys(text: object, milliseconds: float) -> None:
    assert MILLISECONDS.convert(text, None, None) == pytest.approx(milliseconds)


@pytest.mark.parametrize("text", ["", "nan", "inf", "-1", "1y", "ms", "1 2"])
def test_what_is_no_time_is_refused(text: str) -> None:
    for kind in (MILLISECONDS, DURATION):
        with pytest.raises(click.BadParameter, match="is no time"):
            kind.convert(text, None, None)
