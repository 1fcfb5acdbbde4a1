"""A disk that fails when it is told to: a small library that is preloaded into the brokers (faulty_disk.c)."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("faulty_disk.c")


class FaultyDisk:
    """Preloads the library into every process that is started meanwhile. Without a C compiler no disk fails."""

    def __init__(self, folder: Path) -> None:
        self._library = folder / "faulty_disk.so"
        self._control = folder / "faulty_disk.rules"
        self.works = False

    def __enter__(self) -> "FaultyDisk":
        compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
        if compiler is not None:
            built = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), str(SOURCE), "-ldl",
                                    "-lpthread"], capture_output=True, check=False)
            self.works = built.returncode == 0
        if self.works:
            self._control.write_text("")
            os.environ["FAULTY_DISK"], os.environ["LD_PRELOAD"] = str(self._control), str(self._library)
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("FAULTY_DISK", "LD_PRELOAD") if self.works else ():
            with contextlib.suppress(KeyError):
                del os.environ[name]

    def fail(self, *rules: str) -> bool:
        """Rules as in faulty_disk.c, in place of those before; without any all disks are well.

        False where nothing was preloaded.
        """
        if self.works:
            writing = self._control.with_suffix(".new")
            writing.write_text("".join(rule + "\n" for rule in rules))
            writing.replace(self._control)
        return self.works
