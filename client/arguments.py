"""What users give the library, checked in the form in which it is used; the same for every transport."""

import math
import numbers
import operator
from typing import Any

from broker.errors import ConfigError

WAIT_SECONDS_MAX = 1e9                  # more is for ever: operating systems count no further


def as_count(setting: str, value: Any, least: int = 1, most: int = (1 << 63) - 1) -> int:
    """A whole number of any kind of integer. Raises `ConfigError`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise ConfigError(setting=setting, value=repr(value), allowed=f"a whole number from {least} to {most}")
    return number


def as_seconds(setting: str, value: Any) -> float | None:
    """A time to wait; None is for ever, and so is infinity; what is over already is 0. Raises `ConfigError`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise ConfigError(setting=setting, value=repr(value), allowed="None, or seconds")
    seconds = float(value)
    return None if seconds > WAIT_SECONDS_MAX else max(0.0, seconds)
