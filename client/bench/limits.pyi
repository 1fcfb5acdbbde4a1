from typing import Any

KINDS: tuple[str, ...]
COPIES: dict[str, int]
CHOSEN: str

def run_pass(mapping: Any, source: Any, kind: str, offset: int, nbytes: int, start_at_ns: int = 0,
             piece_bytes: int = 0) -> tuple[int, int, int]: ...
def add_up(data: Any) -> int: ...
