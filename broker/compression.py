"""Compressed batches: a `PublishRequest` that holds another one, compressed. Whoever inflates says how much it takes.

gRPC's own compression is refused by brokers: it inflates a message before anybody may judge who sent it, and how much.
"""

import zlib

from google.protobuf.message import DecodeError

from broker.errors import BadBatch, MessageTooBig
from broker.proto import cxlmq_pb2 as pb

# Window bits, which choose the format: zlib calls them so.
_FORMATS = {"gzip": 31, "deflate": 15}
_EITHER = 47
COMPRESSIONS = (None, *_FORMATS)
# The first byte of a PublishRequest whose first field is `compressed`.
_MARK = pb.PublishRequest(compressed=b"x").SerializeToString()[:1]


def compressed(frame: bytes, kind: str) -> bytes:
    """A batch's frame as it travels compressed."""
    worker = zlib.compressobj(wbits=_FORMATS[kind])
    return pb.PublishRequest(compressed=worker.compress(frame) + worker.flush()).SerializeToString()


def is_compressed(frame: bytes) -> bool:
    """Whether a frame holds another one."""
    return frame[:1] == _MARK


def inflated(frame: bytes, bytes_max: int) -> bytes:
    """The frame within; never more than `bytes_max` are held. Raises `MessageTooBig` and `BadBatch`."""
    worker = zlib.decompressobj(wbits=_EITHER)
    try:
        data = worker.decompress(pb.PublishRequest.FromString(frame).compressed, bytes_max)
    except (DecodeError, zlib.error) as error:
        raise BadBatch(reason="it is compressed, and damaged") from error
    if worker.eof and not worker.unused_data:
        return data
    if worker.unconsumed_tail or len(data) >= bytes_max:
        raise MessageTooBig(f"a compressed batch is too big: at most {bytes_max} bytes may come of it",
                            message_bytes_max=bytes_max)
    raise BadBatch(reason="it is compressed, and not whole" if not worker.eof else "more follows than is compressed")
