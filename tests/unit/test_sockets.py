"""Before a client talks to a socket it knows whose it is."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import check_socket
from broker.errors import PermissionDenied


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A socket that somebody listens at."""
    folder = tmp_path / "f"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        yield folder / "s"


def test_ours_is_talked_to(path: Path) -> None:
    check_socket(f"unix:{path}")
    check_socket(f"unix:{path}-that-is-not-there")
    path.parent.chmod(0o755)
    check_socket(f"unix:{path}")
    path.parent.chmod(0o1777)               # as /tmp: nobody can take away what is ours
    check_socket(f"unix:{path}")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_where_others_can_put_theirs_it_is_not(path: Path, mode: int) -> None:
    path.parent.chmod(mode)
    with pytest.raises(PermissionDenied, match="chmod go-w"):
        check_socket(f"unix:{path}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["socket", "folder"])
def test_that_of_another_user_is_not(path: Path, what: str) -> None:
    os.chown(path if what == "socket" else path.parent, 65534, 65534)
    with pytest.raises(PermissionDenied, match="65534"):
        check_socket(f"unix:{path}")


def test_what_is_no_socket_is_not(path: Path) -> None:
    link = path.parent / "link"
    link.symlink_to(path)
    (path.parent / "file").write_text("")
    for each in (link, path.parent / "file"):
        with pytest.raises(PermissionDenied, match="no socket"):
            check_socket(f"unix:{each}")
