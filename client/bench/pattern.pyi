from typing import Any

import numpy
from numpy.typing import NDArray

STAMP_BYTES: int
CHUNK_BYTES: int

def fill(rows: NDArray[numpy.uint8], publisher: int, first_sequence: int, period: int = 0) -> None: ...
def restamp(rows: NDArray[numpy.uint8], publisher: int, first_sequence: int) -> None: ...

class Difference(Exception):
    reason: str
    position: int
    publisher: int | None
    sequence: int | None
    byte_index: int | None
    def __init__(self, reason: str, position: int, publisher: int | None = None, sequence: int | None = None,
                 byte_index: int | None = None) -> None: ...

class Verifier:
    message_bytes: int
    period: int
    publishers: int
    ordered: bool
    position: int
    messages: int
    verified_bytes: int
    def __init__(self, publishers: int, message_bytes: int, ordered: bool = True, period: int = 0,
                 position: int = 0) -> None: ...
    @property
    def missing(self) -> int: ...
    def expect(self, publisher: int, count: int) -> None: ...
    def check(self, payload: Any, count: int, position: int) -> int: ...
    def finish(self) -> None: ...
