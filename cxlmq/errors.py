"""The errors that the library raises, all below `CxlmqError`: a code, a message that says what to do, and details."""

from broker.errors import *  # noqa: F403
from broker.errors import ERRORS

__all__ = sorted(each.__name__ for each in ERRORS.values())  # noqa: PLE0605
