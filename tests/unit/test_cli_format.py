"""Formats as kcat's, splitting of inputs, and the round trip of both."""

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BadBatch, ConfigError, MessageTooBig
from client.cli.format import DEFAULT_FORMAT, compile_format, message_json
from client.cli.split import split_lines, split_prefixed, whole

PAYLOADS = [b"first", b"", b"\x00\xff%s\\n"]


@dataclass
class FakeBatch:
    """A received batch."""

    payloads: list[bytes] = field(default_factory=lambda: list(PAYLOADS))
    position: int = 40
    broker: int = 3
    timestamp_ns: int = 1_700_000_000_123_456_789

    def messages(self) -> list[bytes]:
        """The messages."""
        return list(self.payloads)


def rendered(text: str, batch: FakeBatch | None = None, limit: int | None = None, topic: str = "t") -> bytes:
    return compile_format(text, topic).render(batch or FakeBatch(), limit)[0]


# ---- formats -----------------------------------------------------------------------------------------------------


def test_default_is_one_message_a_line() -> None:
    assert rendered(DEFAULT_FORMAT) == b"first\n\n\x00\xff%s\\n\n"


@pytest.mark.parametrize(("text", "expected"), [
    ("%s", b"first" + b"\x00\xff%s\\n"),
    ("%S,", b"5,0,6,"),
    ("%o;", b"40;41;42;"),
    ("%t ", b"t t t "),
    ("%p", b"333"),
    ("%T ", b"1700000000123 " * 3),
    ("[%k%h]", b"[][][]"),
    ("%K", b"-1-1-1"),
    ("%%", b"%%%"),
    ("%%s", b"%s%s%s"),
    ("%o%%%S|", b"40%5|41%0|42%6|"),
    ("x", b"xxx"),
    ("", b""),
])
def test_fields(text: str, expected: bytes) -> None:
    assert rendered(text) == expected


@pytest.mark.parametrize(("text", "byte"), [
    (r"\n", b"\n"), (r"\r", b"\r"), (r"\t", b"\t"), (r"\0", b"\0"), (r"\\", b"\\"), (r"\x41", b"A"), (r"\xff", b"\xff"),
    (r"\xA", b"\n"), (r"\\n", b"\\n"), ("\n", b"\n"), (r"\x256", b"%6"), ("ä", "ä".encode()),
])
def test_escapes(text: str, byte: bytes) -> None:
    assert rendered(text, FakeBatch([b""])) == byte
    assert rendered(f"{text}%s{text}", FakeBatch([b"m"])) == byte + b"m" + byte
    assert rendered(f"%o{text}", FakeBatch([b"m"])) == b"40" + byte


def test_length_prefix_is_four_bytes_big_endian() -> None:
    assert rendered("%R%s") == b"".join(struct.pack(">I", len(each)) + each for each in PAYLOADS)


def test_topic_with_percent_is_data() -> None:
    assert rendered("%t%S", FakeBatch([b"a"]), topic="100%d") == b"100%d1"


@pytest.mark.parametrize("text", ["%z", "%", "abc%", r"\q", "\\", r"\xg", "%  s"])
def test_what_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not known.*allowed are"):
        compile_format(text)


@pytest.mark.parametrize("text", ["%s\\n", "%o %s\\n", "x"])
def test_limit(text: str) -> None:
    for limit in range(5):
        data, count = compile_format(text).render(FakeBatch(), limit)
        assert count == min(limit, 3)
        assert data == rendered(text, FakeBatch(PAYLOADS[:limit]))


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_fields_agree_with_one_message_at_a_time(payloads: list[bytes]) -> None:
    together = rendered(r"%o %S %R%s|%p%t\n", FakeBatch(payloads))
    single = b"".join(rendered(r"%o %S %R%s|%p%t\n", FakeBatch([payload], position))
                      for position, payload in enumerate(payloads, 40))
    assert together == single


def test_json_of_text_and_of_bytes() -> None:
    assert message_json("ä".encode(), 7, "t", 1, 5_000_000) == {
        "position": 7, "topic": "t", "broker": 1, "timestamp_ms": 5, "payload": "ä"}
    assert message_json(b"\xff", 7, "t", 1, 0)["payload_base64"] == "/w=="


# ---- inputs ------------------------------------------------------------------------------------------------------


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at:at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize(("data", "messages"), [
    (b"", []), (b"a", [b"a"]), (b"a\n", [b"a"]), (b"a\nb", [b"a", b"b"]), (b"\n\n", [b"", b""]),
    (b"a\r\nb\r\n", [b"a\r", b"b\r"]), (b"a\n\nb\n", [b"a", b"", b"b"]),
])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_lines(data: bytes, messages: list[bytes], size: int) -> None:
    assert [line for group in split_lines(pieces(data, size), bytearray()) for line in group] == messages


def test_kept_newlines_give_back_the_file() -> None:
    assert [line for group in split_lines([b"a\nb", b"\nc"], bytearray(), keep_newline=True) for line in group] == [
        b"a\n", b"b\n", b"c"]


def test_each_line_comes_as_soon_as_it_is_complete() -> None:
    groups = split_lines(iter([b"a\nb", b"c\n"]), bytearray())
    assert next(groups) == [b"a"]
    assert next(groups) == [b"bc"]


@given(st.lists(st.binary(max_size=30)), st.integers(1, 50), st.sampled_from([1, 2, 4, 8]),
       st.sampled_from(["little", "big"]))
def test_length_prefixed(messages: list[bytes], size: int, prefix_bytes: int, order: str) -> None:
    data = b"".join(len(each).to_bytes(prefix_bytes, order) + each for each in messages)
    found = [each for group in split_prefixed(pieces(data, size), bytearray(), prefix_bytes, order) for each in group]
    assert found == messages


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_what_format_writes_split_reads(payloads: list[bytes]) -> None:
    data = rendered("%R%s", FakeBatch(payloads))
    assert [each for group in split_prefixed([data], bytearray(), 4, "big") for each in group] == payloads


@pytest.mark.parametrize("data", [b"\x05\0\0\0abc", b"\x01\0"])
def test_truncated_input_is_refused(data: bytes) -> None:
    with pytest.raises(BadBatch, match="ends inside message 0"):
        list(split_prefixed([data], bytearray()))


def test_absurd_length_is_refused_at_once() -> None:
    with pytest.raises(MessageTooBig, match="length-prefixed"):
        list(split_prefixed([b"this is text, not frames"], bytearray()))


def test_whole_input_is_one_message() -> None:
    assert list(whole([b"a\n", b"b"], bytearray())) == [[b"a\nb"]]
    assert list(whole([], bytearray())) == [[b""]]
