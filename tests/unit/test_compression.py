"""Compressed batches come out as they went in, and nothing that is sent makes a broker hold more than it allows."""

import gzip
import tracemalloc
import zlib

import pytest

from broker.compression import compressed, inflated, is_compressed
from broker.errors import BadBatch, CxlmqError, MessageTooBig
from broker.proto import cxlmq_pb2 as pb

LIMIT = 1 << 20


@pytest.mark.parametrize("kind", ["gzip", "deflate"])
@pytest.mark.parametrize("nbytes", [0, 1, 1000, LIMIT - 64])
def test_what_is_compressed_comes_out_as_it_was(kind: str, nbytes: int) -> None:
    frame = pb.PublishRequest(batch_sequence=7, message_count=1, payload=bytes(nbytes)).SerializeToString()
    assert not is_compressed(frame)
    travels = compressed(frame, kind)
    assert is_compressed(travels)
    assert inflated(travels, LIMIT) == frame


@pytest.mark.parametrize("over", [1, 1 << 20, 200 << 20])
def test_a_bomb_is_refused_before_it_goes_off(over: int) -> None:
    bomb = pb.PublishRequest(compressed=gzip.compress(bytes(LIMIT + over), 1)).SerializeToString()
    tracemalloc.start()
    with pytest.raises(MessageTooBig, match=str(LIMIT)):
        inflated(bomb, LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * LIMIT


@pytest.mark.parametrize("data", [b"", b"x", zlib.compress(b"data")[:-3], zlib.compress(b"data") + b"more",
                                  zlib.compress(bytes(range(256)))[:200]])
def test_what_is_damaged_is_refused(data: bytes) -> None:
    with pytest.raises(CxlmqError) as raised:
        inflated(pb.PublishRequest(compressed=data).SerializeToString() or b"\x72\x00", LIMIT)
    assert isinstance(raised.value, BadBatch)


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(BadBatch):
        inflated(b"\x72\xff\xff\xff\xff\xff", LIMIT)
