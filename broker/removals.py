"""What was removed while this broker was away, or could not be removed: it looks after that while it runs."""

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from broker.replica_files import identity_of

if TYPE_CHECKING:
    from broker.node import BrokerNode

TRIM_SECONDS = 30.0
TURN_TOPICS = 64
_log = logging.getLogger("cxlmq")


class Removals:
    """What one broker has to remove. Nothing is removed here without a proof (broker/replica_folder.py)."""

    def __init__(self, node: "BrokerNode") -> None:
        self._node = node
        self._compared = False
        self._failed = False
        self._trim_at = 0.0

    async def look_after(self) -> None:
        """Forget what was deleted while this broker was away, and try again what a disk refused.

        Raises `BrokerUnavailable` while no head serves: it goes on with the next call.
        """
        try:
            await self._look_after_files()
            self._failed = False
        except OSError as error:
            if not self._failed:            # once: it is tried again until it works
                _log.error("files of deleted topics cannot be removed: %s", error)
            self._failed = True

    async def _look_after_files(self) -> None:
        folder = self._node.replica_folder
        if not self._compared:
            found = await asyncio.to_thread(folder.found)
            await asyncio.to_thread(folder.compare, found, self._node.topics.entries())
            self._compared = True
        if folder.unfinished:
            await asyncio.to_thread(folder.tend)
        if (now := time.monotonic()) >= self._trim_at:
            self._trim_at = now + TRIM_SECONDS
            await asyncio.to_thread(folder.trim, await self._reclaimed(await asyncio.to_thread(folder.found)))

    async def _reclaimed(self, found: set[str]) -> dict[str, int]:
        """Up to where the topics that have files here are reclaimed. Many topics: others have their turn in between."""
        reclaimed: dict[str, int] = {}
        for each in self._node.topics.entries():
            identity = identity_of(each.name, each.created_ns)
            if each.replication_factor > 1 and identity in found:
                reclaimed[identity] = self._node.topics.frontiers(each)["first_position"]
                if len(reclaimed) % TURN_TOPICS == 0:
                    await asyncio.sleep(0)
        return reclaimed
