"""Device profiles: published latencies and bandwidths, composed along a path, and what of them is assumed.

    "cxl-direct"                    one device
    "cxl-direct+link-x8+switch"     a path: latencies add, the smallest bandwidth wins
    "cxl-direct,fence_ns=400"       a parameter given by the user
"""

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PARAMETERS = ("load_ns", "peer_load_ns", "flush_ns", "fence_ns", "read_gb_s", "write_gb_s")
_LATENCIES = ("load_ns", "peer_load_ns", "fence_ns")


class ProfileError(ValueError):
    """No such profile, or a parameter that makes no sense; the message says which there are."""


@dataclass(frozen=True)
class Profile:
    """What memory costs. `assumed` and `given` name the parameters that no source states."""

    name: str
    load_ns: float
    peer_load_ns: float
    flush_ns: float
    fence_ns: float
    read_gb_s: float
    write_gb_s: float
    sources: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    extra: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Name, parameters, where they come from."""
        return {"name": self.name, **{each: getattr(self, each) for each in PARAMETERS}, **self.extra,
                "sources": list(self.sources), "assumed": list(self.assumed), "given": list(self.given)}

    def label(self) -> str:
        """The name with what is assumed, as reports print it."""
        return self.name + (f" (assumed: {', '.join(self.assumed)})" if self.assumed else "")


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "profiles.toml").read_text())


def profile_names() -> list[str]:
    """Names of the devices and parts of paths that are known."""
    return [name for name in _tables() if name != "assumed"]


def load_profile(text: str) -> Profile:
    """The profile that a name, a path of names, and given parameters describe. Raises `ProfileError`."""
    path, *given_texts = text.split(",")
    given = dict(_given(each) for each in given_texts)
    parts = []
    for name in path.split("+"):
        if name not in profile_names():
            raise ProfileError(f"there is no profile {name!r}: there are {', '.join(profile_names())}; paths are "
                               "joined by '+', parameters follow as ',fence_ns=400'")
        parts.append(_tables()[name])
    values: dict[str, float] = {}
    for each in PARAMETERS:
        known = [part[each] for part in parts if each in part]
        if each in _LATENCIES and known and (each != "load_ns" or len(known) == len(parts)):
            values[each] = float(sum(known))
        elif known:
            values[each] = float(min(known) if each.endswith("gb_s") else sum(known))
    values.update(given)
    assumed = tuple(each for each in PARAMETERS if each not in values)
    for each in assumed:
        default = _tables()["assumed"][each]
        values[each] = float(values["load_ns"] if default == "load_ns" else default)
    extra = {key: float(value) for part in parts for key, value in part.items()
             if key not in PARAMETERS and key != "source"}
    return Profile(text, **values, sources=tuple(part["source"] for part in parts), assumed=assumed,
                   given=tuple(given), extra=extra)


def _given(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if name not in PARAMETERS or (number <= 0 and not (name.endswith("_ns") and number == 0)):
        raise ProfileError(f"{text!r} is no parameter of a profile: NAME=NUMBER with one of {', '.join(PARAMETERS)}")
    return name, number
