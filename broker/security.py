"""Who may call a broker, and what for: certificates, tokens, and rights per topic. Knows no gRPC.

    security.toml ──► paths of CA, certificate, key, principals, token        (no secret is in a configuration)
    TCP: mutual TLS and a token      unix socket: a token; the folder is the owner's alone      health: neither

A token is 32 random bytes; the principals' file keeps its SHA-256 only. It travels as `authorization: Bearer TOKEN`,
over TLS or a unix socket and nothing else.
"""

import hashlib
import hmac
import json
import os
import secrets
import time
import tomllib
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from broker.errors import ConfigError, NotAllowed, Unauthenticated

SECURITY_FILE = "security.toml"
TOKEN_KEY = "authorization"
_BEARER = "Bearer "
TOKEN_BYTES = 32
RIGHTS = ("publish", "subscribe", "admin")
RELOAD_SECONDS = 1.0                    # how soon a changed principals' file counts
_PATHS = ("ca", "certificate", "key", "principals", "token")
_PRIVATE = ("key", "principals", "token")


def _refuse(value: object, allowed: str) -> ConfigError:
    return ConfigError(setting="security", value=str(value), allowed=allowed)


@dataclass(frozen=True)
class Security:
    """What a security file names. `principals` is for brokers; `token` is how this process shows who it is."""

    ca: Path
    certificate: Path
    key: Path
    principals: Path | None = None
    token: Path | None = None

    @classmethod
    def load(cls, path: str | Path) -> "Security":
        """Read a security file, or that of a folder. Raises `ConfigError`, also for a secret that others can read."""
        path = Path(os.path.expanduser(path))
        file = path / SECURITY_FILE if path.is_dir() else path
        if not file.exists():
            raise _refuse(path, "a folder made by `cxlmq security init`, or a TOML file with a [security] table")
        table = _toml(file).get("security")
        if not isinstance(table, dict):
            raise _refuse(file, "a folder made by `cxlmq security init`, or a TOML file with a [security] table")
        if unknown := table.keys() - set(_PATHS):
            raise _refuse(f"{file} with {', '.join(sorted(unknown))}", f"the names {', '.join(_PATHS)}")
        paths = {name: file.parent / os.path.expanduser(str(value)) for name, value in table.items()}
        if missing := {"ca", "certificate", "key"} - paths.keys():
            raise _refuse(f"{file} without {', '.join(sorted(missing))}", "ca, certificate and key have to be named")
        for name, each in paths.items():
            _check_file(each, private=name in _PRIVATE)
        return cls(**paths)

    def own_token(self) -> str | None:
        """The secret token of this process; None without one."""
        return None if self.token is None else self.token.read_text().strip()

    def own_metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries to say who we are. Only over TLS or a unix socket."""
        token = self.own_token()
        return () if token is None else ((TOKEN_KEY, _BEARER + token),)


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise _refuse(file, f"a file that can be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise _refuse(file, "a TOML file") from None        # its text may hold what nobody should see


def _check_file(file: Path, private: bool) -> None:
    try:
        mode = file.stat().st_mode
        file.open("rb").close()
    except OSError as error:
        raise _refuse(file, f"a file that can be read ({error.strerror})") from error
    if private and mode & 0o077:
        raise _refuse(file, f"a file that its owner alone can read: `chmod 600 {file}`")


# ---- who somebody is, and may do ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Principal:
    """Somebody with rights. Each right is a tuple of topic names, in which * stands for anything."""

    name: str
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    token_sha256: str = field(default="", repr=False)

    @property
    def number(self) -> int:
        """The name as 64 bits, for records in the region: the same after every restart."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")

    def may(self, right: str, topic: str) -> bool:
        """Whether the right covers a topic."""
        return any(fnmatchcase(topic, pattern) for pattern in getattr(self, right))

    def require(self, rights: Iterable[str], topic: str) -> None:
        """Raise `NotAllowed` unless one of the rights covers the topic."""
        rights = tuple(rights)
        if not any(self.may(right, topic) for right in rights):
            raise NotAllowed(principal=self.name, right=" or ".join(rights), topic=topic)


EVERYBODY = Principal("everybody", ("*",), ("*",), ("*",))          # while security is off
CALLER: ContextVar[Principal] = ContextVar("caller", default=EVERYBODY)      # of the call that is being served


def new_token() -> str:
    """A token to give to somebody, once."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def token_hash(token: str) -> str:
    """What is kept of a token. It is as random as its hash is long: no salt or slow hash would add anything."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_principals(file: Path) -> dict[str, Principal]:
    """The principals of a file, by name. Raises `ConfigError`."""
    found = {}
    for name, table in _toml(file).items():
        if not isinstance(table, dict) or table.keys() - {*RIGHTS, "token_sha256"}:
            raise _refuse(f"[{name}] of {file}", f"a table with token_sha256, {', '.join(RIGHTS)}")
        digest = table.get("token_sha256")
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise _refuse(f"token_sha256 of [{name}] in {file}", "the SHA-256 of a token in 64 hexadecimal digits")
        rights = {right: table.get(right, []) for right in RIGHTS}
        for right, topics in rights.items():
            if not isinstance(topics, list) or not all(isinstance(each, str) for each in topics):
                raise _refuse(f"{right} of [{name}] in {file}", "a list of topic names; * stands for anything")
        found[name] = Principal(name, token_sha256=digest, **{right: tuple(each) for right, each in rights.items()})
    return found


def write_principals(file: Path, principals: Iterable[Principal]) -> None:
    """Replace a file of principals, readable by its owner alone."""
    lines = []
    for each in principals:
        lines += [f"[{json.dumps(each.name)}]", f'token_sha256 = "{each.token_sha256}"']
        lines += [f"{right} = {json.dumps(getattr(each, right))}" for right in RIGHTS]
        lines.append("")
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as out:
        out.write("\n".join(lines))
    fresh.replace(file)


class Guard:
    """Tells who calls. Without security it is everybody, who may do everything."""

    def __init__(self, path: str | Path | None) -> None:
        self.security = Security.load(path) if path else None
        if self.security is not None and self.security.principals is None:
            raise _refuse(path, "for a broker, a security file that names principals")
        self._principals: tuple[Principal, ...] = ()
        self._version: tuple[int, ...] = ()
        self._look_at = 0.0

    def caller(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Principal:
        """The principal whose token came with a call. Raises `Unauthenticated`."""
        if self.security is None:
            return EVERYBODY
        given = [value for key, value in metadata or () if key == TOKEN_KEY]
        if len(given) != 1 or not isinstance(given[0], str) or not given[0].startswith(_BEARER):
            raise Unauthenticated(reason="no token came with the call")
        digest = token_hash(given[0][len(_BEARER):])
        found: Principal | None = None
        for each in self._known():          # all of them: how long it takes tells nothing
            if hmac.compare_digest(each.token_sha256, digest):
                found = each
        if found is None:
            raise Unauthenticated(reason="no principal has this token")
        return found

    def _known(self) -> tuple[Principal, ...]:
        """The principals, read again when their file changed. One that became unreadable lets nobody in."""
        assert self.security is not None
        assert self.security.principals is not None
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + RELOAD_SECONDS
            try:
                stat = self.security.principals.stat()
                version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if version != self._version:
                    self._principals = tuple(read_principals(self.security.principals).values())
                    self._version = version
            except (OSError, ConfigError):
                self._principals, self._version = (), ()
        return self._principals

    def own_metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What our calls to other brokers carry."""
        return self.security.own_metadata() if self.security is not None else None

    def check(self) -> None:
        """Read everything once, so that what is wrong is said before anything starts. Raises `ConfigError`."""
        if self.security is not None and self.security.principals is not None:
            read_principals(self.security.principals)
            if not self.security.own_token():
                raise _refuse(self.security.token or "no token", "a token with which brokers call one another")
