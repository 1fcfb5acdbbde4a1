"""Errors reach the user as what they were: same class, same message, same details, over gRPC and between processes."""

import json
import pickle
import string

import pytest

from broker import errors
from broker.errors import (
    DETAILS_KEY,
    ERROR_KEY,
    ERRORS,
    STATUS_ERRORS,
    CxlmqError,
    MessageTooBig,
    PoolFull,
    PositionLost,
    UnknownTopic,
    from_code,
    from_metadata,
    from_status,
    status_of,
    to_metadata,
)
from broker.records import fitted

GRPC_STATUSES = {
    "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
def test_every_error_survives_the_way_over_grpc(kind: type[CxlmqError]) -> None:
    sent = kind("what went wrong, and what to do: äöü", holder="replica 2", first_available=17)
    metadata = to_metadata(sent)
    assert all(value.isascii() for _, value in metadata), "gRPC metadata must be ASCII"
    received = from_metadata(status_of(sent), sent.message, metadata)
    assert type(received) is kind
    assert (received.code, received.message, received.details) == (sent.code, sent.message, sent.details)


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
def test_every_error_survives_pickling(kind: type[CxlmqError]) -> None:
    sent = kind(holder="x", message="a detail may be called like this", code=3)
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is kind
    assert (received.message, received.details) == (sent.message, sent.details)


def test_codes_are_unique_and_statuses_are_grpc_names() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, CxlmqError)]
    assert len({each.code for each in kinds}) == len(kinds) == len(ERRORS)
    assert {each.status for each in kinds} <= GRPC_STATUSES
    assert set(STATUS_ERRORS) <= GRPC_STATUSES


def test_a_bare_status_gives_an_error_of_that_status() -> None:
    for status, kind in STATUS_ERRORS.items():
        error = from_status(status, "text")
        assert type(error) is kind
        assert error.message == "text"
    assert type(from_status("UNIMPLEMENTED", "text")) is CxlmqError
    assert type(from_metadata("NOT_FOUND", "text", None)) is UnknownTopic


def test_details_are_attributes_and_fill_the_message() -> None:
    assert PoolFull(holder="replica 2").holder == "replica 2"
    assert "replica 2" in str(PoolFull(holder="replica 2"))
    assert PositionLost(position=3, first_available=17).first_available == 17
    assert str(MessageTooBig(message_bytes=20, message_bytes_max=10)).startswith("a message of 20 bytes is too big: at")
    with pytest.raises(AttributeError):
        _ = PoolFull(holder="x").nothing


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
def test_a_message_never_fails_for_want_of_a_detail(kind: type[CxlmqError]) -> None:
    fields = [name for _, name, _, _ in string.Formatter().parse(kind.template) if name]
    assert str(kind())
    assert all(field.isidentifier() for field in fields)


def test_a_code_of_a_newer_version_keeps_its_code_and_message() -> None:
    error = from_code("from-the-future", "do this", number=1)
    assert type(error) is CxlmqError
    assert (error.message, error.unknown_code, error.number) == ("do this", "from-the-future", 1)


@pytest.mark.parametrize("details", ["no json", "[1]", "3", b'{"holder": "x"}'])
def test_damaged_details_do_not_hide_the_error(details: str | bytes) -> None:
    metadata = [(ERROR_KEY, b"pool-full"), ("other", b"\xff"), (DETAILS_KEY, details)]
    assert type(from_metadata("RESOURCE_EXHAUSTED", "text", metadata)) is PoolFull


def test_an_error_that_is_not_ours_is_internal() -> None:
    assert status_of(ValueError("x")) == "INTERNAL"
    assert from_metadata("INTERNAL", "x", to_metadata(ValueError("x"))).code == "internal"


def test_what_somebody_sends_is_told_back_short() -> None:
    for text in ("x" * 100_000, "ä" * 100_000, "\U0001f600" * 100_000):
        metadata = dict(to_metadata(errors.BadTopicName(topic=text)))
        assert sum(len(each) for each in metadata.values()) < 2000
        assert json.loads(metadata["cxlmq-details"])["topic"].startswith(text[:100])


@pytest.mark.parametrize(("text", "fitting"), [
    ("", ""), ("short", "short"), ("x" * 10, "x" * 10), ("x" * 11, "x" * 7 + "..."), ("ü" * 6, "ü" * 3 + "..."), ("ü" * 5, "ü" * 5)])
def test_a_text_that_is_cut_to_fit_says_so(text: str, fitting: str) -> None:
    assert fitted(text, 10) == fitting
    assert len(fitted(text, 10).encode()) <= 10
