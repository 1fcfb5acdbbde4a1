from typing import Any

KINDS: tuple[str, ...]

def run_pass(mapping: Any, source: Any, kind: str, offset: int, nbytes: int,
             start_at_ns: int = 0) -> tuple[int, int, int]: ...
