"""The errors that the library raises; see broker/errors.py for what each means."""

from broker.errors import *  # noqa: F403
from broker.errors import CxlmqError as CxlmqError
