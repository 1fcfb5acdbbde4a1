"""Why a broker cannot listen where it should: gRPC says only that it cannot."""

import errno
import os
import socket

from broker.config import host_and_port
from broker.errors import ConfigError, CxlmqError, PortTaken


def why_not_bound(host: str, port: int) -> CxlmqError:
    """The typed error for an address that could not be bound: taken, or none of this machine's."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return ConfigError(f"listen_host {host!r} is not known here ({error.strerror}): use a name or an address of "
                           "this machine", setting="listen_host", value=repr(host))
    for family, kind, protocol, _, place in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return ConfigError(f"nobody can listen at {host_and_port(host, port)} here "
                                   f"({os.strerror(error.errno or 0)}): use another listen_host or listen_port",
                                   setting="listen_host", value=repr(host))
    return PortTaken(address=host_and_port(host, port))
