"""Brokers as clients name them, and the order in which everybody would choose them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BrokerAddress:
    """A broker as clients reach it: `target` is what a channel is opened to."""

    id: int
    target: str


def rendezvous(brokers: Sequence[BrokerAddress], client_id: int, number: int) -> list[BrokerAddress]:
    """The brokers in the order of their hash with (client, number): everyone computes the same choice."""
    def weight(broker: BrokerAddress) -> bytes:
        return hashlib.blake2b(f"{client_id}:{number}:{broker.id}".encode(), digest_size=8).digest()

    return sorted(brokers, key=weight, reverse=True)
