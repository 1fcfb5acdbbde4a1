"""What users give a publisher is checked in the form in which it is used, the same for every transport, before anything opens."""

import math
from typing import Any

import numpy
import pytest

from broker.errors import ClosedError, ConfigError
from client.publisher import AsyncPublisher, Publisher

KINDS = [Publisher, AsyncPublisher]
TRANSPORTS = ["auto", "grpc", "attached"]


async def coroutine(_: object) -> None:
    """No callback: nobody would await it."""


WRONG: list[tuple[str, Any]] = [
    *[(name, value) for name in ("on_delivery", "on_event") for value in (5, "print", coroutine)],
    *[("delivery_timeout", value) for value in (0, -1, math.nan, math.inf, -math.inf, 1e300, "3", None, True, 1j)],
    *[("linger_ms", value) for value in (-1, math.nan, math.inf, "3", None, False)],
    *[(name, value) for name in ("batch_bytes", "batch_bytes_min", "batch_bytes_max", "buffer_bytes", "in_flight")
      for value in (0, -1, 2.5, "3", True, 1 << 64, math.nan)],
    *[("ack", value) for value in (-1, 3, 1.5, "1", True)],
    *[("client_id", value) for value in (0, -1, 1 << 64, "me", 2.5)],
    ("in_flight", 129), ("when_full", "wait"), ("transport", "tcp"), ("compression", "zip"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda each: repr(each)[:20])
def test_a_wrong_option_is_refused_with_what_is_allowed(kind: type, name: str, value: object) -> None:
    for transport in TRANSPORTS:
        with pytest.raises(ConfigError) as refused:
            kind("t", **{"transport": transport, name: value})
        assert refused.value.setting == name
        assert refused.value.allowed


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_any_kind_are_taken(kind: type) -> None:
    made = kind("t", ack=numpy.uint8(1), client_id=numpy.uint64((1 << 64) - 1), batch_bytes=numpy.int32(4096),
                buffer_bytes=numpy.int64(1 << 20), in_flight=numpy.int16(3), linger_ms=numpy.float32(0.5),
                delivery_timeout=numpy.int64(7))
    engine = made._engine
    assert [type(each) for each in (engine.ack, engine.session.client_id, engine.in_flight)] == [int, int, int]
    assert (engine.ack, engine.session.client_id, engine.delivery_timeout) == (1, (1 << 64) - 1, 7.0)


@pytest.mark.parametrize("timeout", [math.nan, "3", True, 1j])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_time_to_wait_is_checked(transport: str, timeout: Any) -> None:
    with pytest.raises(ConfigError):
        Publisher("t", transport=transport)._engine.limit(timeout)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_waiting_for_ever_is_waiting_until_everything_has_to_be_settled(transport: str) -> None:
    engine = Publisher("t", transport=transport, delivery_timeout=3.0)._engine
    assert engine.limit(None) == engine.limit(math.inf) == engine.limit(1e300) > 3.0
    assert [engine.limit(each) for each in (0, -5, 2, numpy.float64(0.5))] == [0.0, 0.0, 2.0, 0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_publishing_before_opening_is_an_error_that_says_so(kind: type) -> None:
    with pytest.raises(ClosedError, match="not open"):
        _ = kind("t")._engine.front
