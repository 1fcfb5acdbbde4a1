"""Other clusters that come and go beside the one under test: they start, collect leftovers, and stop."""

import secrets
import subprocess
import sys
import threading
from pathlib import Path

CODE_FOLDER = Path(__file__).resolve().parents[2]
COMMAND_SECONDS = 120.0


class OtherClusters:
    """One at a time, in the background."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._wrong: list[str] = []

    def start(self) -> bool:
        """Begin with one; False while the last one is still there."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self._thread = threading.Thread(target=self._come_and_go, name="another cluster", daemon=True)
        self._thread.start()
        return True

    def _come_and_go(self) -> None:
        name = f"chaos-beside-{secrets.token_hex(3)}"
        self._run("cluster", "up", "--detach", "--name", name, "--brokers", "1", "--region-bytes", "16MiB")
        self._run("region", "gc")
        self._run("cluster", "down", name)

    def _run(self, *arguments: str) -> None:
        try:
            done = subprocess.run([sys.executable, "-m", "client.cli.main", *arguments], cwd=CODE_FOLDER, check=False,
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            self._wrong.append(f"`cxlmq {' '.join(arguments)}` beside it did not end")
            return
        if done.returncode:
            self._wrong.append(f"`cxlmq {' '.join(arguments)}` beside it ended with {done.returncode}: {done.stderr}")

    def end(self) -> list[str]:
        """Wait for the last one; what went wrong with any."""
        if self._thread is not None:
            self._thread.join(3 * COMMAND_SECONDS)
        return self._wrong
