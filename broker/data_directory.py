"""What a data directory has of an earlier cluster: nobody starts over it by mistake.

A cluster that begins anew may set it aside: everything moves to DIR/set-aside/<time>, where `--recover` finds it. A
move that was interrupted is called <time>.moving, and goes on with the next one.
"""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from broker.config import ClusterConfig
from broker.durable_files import make_folder, sync_folder
from broker.errors import ConfigError, DataDirectoryBusy, DataDirectoryUsed, RecoveryError
from broker.replica_files import DELETED_SUFFIX, MANIFESTS, SET_ASIDE, files_below, identity_in, names_of

TOPICS_SHOWN = 5
_POLL_SECONDS = 0.02
_MOVING = ".moving"


def topics_in(folder: Path) -> list[str]:
    """The topics that have replica files in a data directory, and were not deleted."""
    deleted = {path.name.removesuffix(DELETED_SUFFIX) for path in files_below(folder, DELETED_SUFFIX)}
    found = {identity_in(path.name) or path.name for path in files_below(folder, ".replica")} - deleted
    names = set()
    for identity in found:
        try:
            names.add(names_of(identity)[0])
        except ValueError:
            names.add(identity)                 # a file that somebody renamed
    return sorted(names)


def before_start(config: ClusterConfig, recover: bool, fresh: bool, note: Callable[[str], None]) -> None:
    """Look after an earlier cluster's data before a new one starts; `note` is told what the user should know.

    Raises `ConfigError`, `DataDirectoryUsed`, `RecoveryError`.
    """
    if recover and fresh:
        raise ConfigError("a cluster either recovers what its data directory has (recover), or sets it aside (fresh)",
                          setting="fresh", value="true", allowed="false with recover")
    if recover or config.data_directory is None:
        return
    if fresh and (moved := set_aside(Path(config.data_directory))):
        note(f"what {config.data_directory} had is set aside: --recover {moved} has it again")
    refuse_used(config)


def refuse_used(config: ClusterConfig) -> None:
    """Raise `DataDirectoryUsed` when a new cluster would begin over an earlier one's data."""
    if config.data_directory is None:
        return
    folder = Path(config.data_directory)
    topics = topics_in(folder)
    if topics or moving(folder):
        shown = ", ".join(repr(each) for each in topics[:TOPICS_SHOWN]) + (
            " ..." if len(topics) > TOPICS_SHOWN else "")
        raise DataDirectoryUsed(data_directory=str(folder), topics=topics[:TOPICS_SHOWN],
                                shown=shown or "set aside in part")


def moving(folder: Path) -> list[Path]:
    """Moves that were interrupted."""
    return sorted((folder / SET_ASIDE).glob(f"*{_MOVING}"))


def refuse_half_moved(folder: Path) -> None:
    """Raise `RecoveryError` when an interrupted `set_aside` has a part of the data."""
    for each in moving(folder):
        raise RecoveryError(folder=folder, reason=(
            f"a part of it lies in {each}, where an interrupted --fresh moved it: move its folders back to recover, or "
            "start with --fresh once more"))


def set_aside(folder: Path) -> Path | None:
    """Move an earlier cluster's data out of the way; where it is now, None when there was none.

    Raises `DataDirectoryBusy`, `RecoveryError`.
    """
    try:
        return _set_aside(folder)
    except OSError as error:
        raise RecoveryError(f"cannot set aside what {folder} has: {error.strerror or error}; start with --fresh again "
                            "when it can be moved", folder=folder, file=error.filename) from error


def lock_broker_folder(folder: Path, make: bool = False, wait_seconds: float = 0.0) -> int | None:
    """Take a broker's folder for this process, as long as the descriptor is open. Raises `DataDirectoryBusy`.

    None when it is not there, unless it is to be made, and where the disk cannot: what else it cannot do, replicas say.
    """
    deadline = time.monotonic() + wait_seconds
    try:
        while True:
            if make:
                make_folder(folder)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                    return descriptor
            except FileNotFoundError:
                pass                            # it was set aside just now
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise
                time.sleep(_POLL_SECONDS)
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except BlockingIOError:
        raise DataDirectoryBusy(data_directory=str(folder.parent)) from None
    except OSError:
        return None


def _set_aside(folder: Path) -> Path | None:
    locks = []
    try:
        for path in sorted(folder.glob("broker-*")):
            locks.append(lock_broker_folder(path))
        return _move(folder)
    finally:
        for lock in locks:
            if lock is not None:
                os.close(lock)


def _move(folder: Path) -> Path | None:
    # The manifests go last: as long as they are here, so is what they judge.
    parts = [path for path in (*sorted(folder.glob("broker-*")), folder / MANIFESTS) if path.is_dir()]
    unfinished = moving(folder)
    if not parts and not unfinished:
        return None
    now = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    target = unfinished[0] if unfinished else folder / SET_ASIDE / (now + _MOVING)
    make_folder(target)
    for path in parts:
        path.rename(target / path.name)
        sync_folder(target)
        sync_folder(folder)
    done = target.with_name(target.name.removesuffix(_MOVING))
    target.rename(done)
    sync_folder(done.parent)
    return done
