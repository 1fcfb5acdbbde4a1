"""Disks of the simulated hosts: what a loss of power leaves of them, and how they fail.

The product writes real files in memory, through `broker.disk`; here is noted what it synced:

    write ─► in the file, and nowhere else      sync of a file ─► so many bytes of it are durable
    create, rename, remove ─► seen at once      sync of a folder ─► these names of it are durable

When the power goes, each file and each name for itself is as it was synced, as it was seen, or torn between the two.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from random import Random

from broker.replica_record import SUPERBLOCK_BYTES

SECTOR_BYTES = 512
RECOVERIES = "recoveries"
FLIPS_MAX = 3


class PowerLost(Exception):
    """The power went in the middle of a recovery."""


class Disks:
    """The disks of one cluster, below `root`. `is_dead` says whether a host has no power: what it writes then is not
    there; `cut_off` takes its power. `unsynced` is a planted bug: "sync" (of replicas) or "names" are left out."""

    def __init__(self, root: Path, is_dead: Callable[[int], bool], cut_off: Callable[[int], None],
                 unsynced: str = "") -> None:
        self.folder, self._synced_files = root / "data", root / "synced"
        self.folder.mkdir()
        self._away = root / "away"
        self._synced_files.mkdir()
        self._away.mkdir()
        self._is_dead, self._cut_off, self._unsynced = is_dead, cut_off, unsynced
        self._bytes: dict[int, int] = {}                        # inode -> bytes that are durable
        self._names: dict[str, dict[str, int]] = {}             # folder -> name -> inode, durable
        self._failing: dict[int, tuple[str, int]] = {}          # host -> what fails, how often
        self._armed: set[int] = set()       # hosts whose power goes behind their next write
        self._dark: set[int] = set()        # and those whose went so
        self.failed = 0                     # calls that a fault has met
        self.calls_left = -1                # below 0: the power stays; else it goes when so many calls are made

    # ---- what the product does --------------------------------------------------------------------------------------

    def wrote(self, descriptor: int, offset: int, nbytes: int) -> int:
        """A write has taken place: how many bytes of it there are, below 0 an error number."""
        self._spend()
        host = self._host_of(os.readlink(f"/proc/self/fd/{descriptor}"))
        if self._has_no_power(host):
            os.ftruncate(descriptor, offset)
            return -errno.EIO
        if host in self._armed:
            self._armed.discard(host)
            self._dark.add(host)
            self._cut_off(host)
        if self._fails(host, "full"):
            os.ftruncate(descriptor, offset + nbytes // 2)
            return nbytes // 2 or -errno.ENOSPC
        if self._fails(host, "write"):
            os.ftruncate(descriptor, offset)
            return -errno.EIO
        return nbytes

    def synced(self, descriptor: int) -> int:
        """A file or a folder is to be durable: 0, or an error number."""
        self._spend()
        found, path = os.fstat(descriptor), os.readlink(f"/proc/self/fd/{descriptor}")
        host = self._host_of(path)
        if self._has_no_power(host) or self._fails(host, "sync"):
            return errno.EIO
        if stat.S_ISDIR(found.st_mode):
            if self._unsynced != "names":
                self._keep_names(Path(path))
        elif self._unsynced != "sync" or not path.endswith(".replica"):
            self._bytes[found.st_ino] = found.st_size
        return 0

    def _has_no_power(self, host: int) -> bool:
        return host >= 0 and (host in self._dark or self._is_dead(host))

    def _spend(self) -> None:
        if self.calls_left == 0:
            raise PowerLost
        self.calls_left -= self.calls_left > 0

    def _host_of(self, path: str) -> int:
        """Whose disk it is; -1 of what belongs to the cluster."""
        name = Path(path).relative_to(self.folder).parts[:1] if path.startswith(str(self.folder)) else ()
        return int(name[0].removeprefix("broker-")) if name and name[0].startswith("broker-") else -1

    def _keep_names(self, folder: Path) -> None:
        names = self._names[str(folder)] = {each.name: each.inode() for each in os.scandir(folder)}
        for name, inode in names.items():
            kept = self._synced_files / str(inode)
            if not kept.exists() and (folder / name).is_file():
                os.link(folder / name, kept)                    # it may come back when it is removed and that is lost

    # ---- faults -----------------------------------------------------------------------------------------------------

    def fail(self, host: int, what: str, times: int) -> None:
        """The next calls of this kind at a host's disk fail: "write", "sync", or the disk is "full"."""
        self._failing[host] = what, times

    def _fails(self, host: int, what: str) -> bool:
        kind, times = self._failing.get(host, ("", 0))
        if kind != what or not times:
            return False
        self._failing[host] = kind, times - 1
        self.failed += 1
        return True

    def cut_behind_a_write(self, host: int) -> None:
        """Let the host's power go when it has written next, before it can sync that."""
        self._armed.add(host)

    def switch_on(self, host: int) -> None:
        """The host has power again."""
        self._dark.discard(host)

    def take_away(self, random: Random) -> str:
        """One host's disk cannot be reached for a while; which."""
        chosen = random.choice(sorted(self.folder.glob("broker-*")) or [self.folder / "broker-0"])
        if chosen.is_dir():
            chosen.rename(self._away / chosen.name)
        return chosen.name

    def bring_back(self) -> None:
        """Disks that could not be reached are there again, with what their hosts have written elsewhere meanwhile."""
        for folder in sorted(self._away.iterdir()):
            (self.folder / folder.name).mkdir(exist_ok=True)
            for path in folder.iterdir():
                if not (self.folder / folder.name / path.name).exists():
                    path.rename(self.folder / folder.name / path.name)
            shutil.rmtree(folder)
        self._settle()

    def _settle(self) -> None:
        """What is there now is durable."""
        for folder in (self.folder, *(each for each in self.folder.iterdir() if each.is_dir())):
            self._keep_names(folder)
        for path in self.folder.rglob("*"):
            if path.is_file():
                self._bytes[path.stat().st_ino] = path.stat().st_size

    def lose_power(self, random: Random) -> None:
        """Every host's power goes. What is there afterwards is durable."""
        for folder in (self.folder, *sorted(each for each in self.folder.iterdir() if each.is_dir())):
            if folder.is_dir():
                self._lose_names(folder, random)
        for path in sorted(each for each in self.folder.rglob("*") if each.is_file()):
            self._lose_bytes(path, random)
        self._failing.clear()
        self._armed.clear()
        self._dark.clear()
        self._settle()

    def _lose_names(self, folder: Path, random: Random) -> None:
        durable = self._names.get(str(folder), {})
        seen = {each.name: each.inode() for each in os.scandir(folder)}
        for name in sorted({*durable, *seen}):
            before, path = durable.get(name), folder / name
            if before == seen.get(name) or random.random() < 0.5:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if before is not None and (self._synced_files / str(before)).exists():
                os.link(self._synced_files / str(before), path)

    def _lose_bytes(self, path: Path, random: Random) -> None:
        found = path.stat()
        durable = min(self._bytes.get(found.st_ino, 0), found.st_size)
        fate = random.choice(("lost", "zeroes", "torn", "kept")) if durable < found.st_size else "kept"
        with path.open("r+b") as file:
            if fate == "lost":
                file.truncate(durable)
            for at in range(durable, found.st_size, SECTOR_BYTES) if fate in ("zeroes", "torn") else ():
                if fate == "zeroes" or random.random() < 0.5:
                    file.seek(at)
                    file.write(bytes(min(SECTOR_BYTES, found.st_size - at)))

    def flip_bits(self, random: Random) -> list[str]:
        """Damage files of one host's disk, or what recoveries wrote down; of which kinds those are that were hit."""
        folders = sorted(each for each in self.folder.iterdir() if each.is_dir() and any(each.iterdir()))
        if not folders:
            return []
        chosen = sorted(each for each in random.choice(folders).iterdir() if each.stat().st_size)
        hit = []
        for path in random.sample(chosen, min(len(chosen), random.randint(1, FLIPS_MAX))):
            with path.open("r+b") as file:
                size = path.stat().st_size      # in its head, anywhere, or in a replica's records
                first, end = random.choice(((0, min(64, size)), (0, size), (min(SUPERBLOCK_BYTES, size - 1), size)))
                at = random.randrange(first, end)
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << random.randrange(8)]))
            hit.append(path.suffix)
        return hit
