"""cxlmq: a message broker whose brokers share CXL memory. The client library under its product's name."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).parent.parent


def _load_own(name: str) -> None:
    """Our package of this name, whatever lies in the folder from which a program is started.

    Our packages have common names still: Python would look into that folder first. Once they are loaded, everything in
    them is found.
    """
    folder = _ROOT / name
    loaded = sys.modules.get(name)
    if loaded is None:
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = loaded = module_from_spec(spec)
        spec.loader.exec_module(loaded)
    elif str(folder) not in (str(Path(each).absolute()) for each in getattr(loaded, "__path__", ())):
        where = getattr(loaded, "__file__", None) or getattr(loaded, "__path__", None)
        raise ImportError(f"cxlmq has a package {name!r} of its own, and {where} was imported by that name: use cxlmq "
                          "in another process, or give yours another name", name="cxlmq")


for _name in ("sim", "broker", "client"):
    _load_own(_name)

from client import (  # noqa: E402
    Admin,
    AsyncAdmin,
    AsyncPublisher,
    AsyncSubscriber,
    Delivery,
    Message,
    Publisher,
    Receipt,
    ReceivedBatch,
    Subscriber,
)
from cxlmq import errors as errors  # noqa: E402

__all__ = ["Admin", "AsyncAdmin", "AsyncPublisher", "AsyncSubscriber", "Delivery", "Message", "Publisher", "Receipt",
           "ReceivedBatch", "Subscriber", "errors"]
