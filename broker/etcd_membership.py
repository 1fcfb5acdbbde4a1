"""Membership on etcd, for clusters that span hosts: etcd says who is elected, not a look at local processes.

    lease (kept alive) ──► key brokers/K        who lives: `etcdctl get --prefix cxlmq/NAME/`
                      └──► key head             made by one transaction that wants it absent: the election
    watch on head ───────► it is gone: stand for election at once

As with every membership, safety does not depend on it: two that believe to be elected are decided by the control word
in the region. While etcd does not answer the head goes on, and nobody takes over.
"""

import base64
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from broker.config import parse_endpoints
from broker.errors import ConfigError, MembershipUnavailable
from broker.layout import Layout
from broker.membership import store_heartbeat
from sim.cxl.clock import Clock
from sim.cxl.memory import Memory

_log = logging.getLogger("cxlmq")

LEASE_SECONDS_MIN = 2                   # what etcd grants at least, with its default heartbeats
KEEPS_PER_LEASE = 4
ANSWER_SECONDS = 2.0
WATCH_AGAIN_SECONDS = 0.2


class Etcd:
    """The few calls that we need, to the first of several endpoints that answers."""

    def __init__(self, endpoints: str) -> None:
        try:
            import etcd3gw
            import requests
        except ImportError as error:
            raise ConfigError("membership 'etcd' needs a client library: run CXLMQ_EXTRAS=etcd "
                              "scripts/bootstrap.sh, or pip install etcd3gw",
                              setting="membership") from error
        self._failures = (etcd3gw.exceptions.Etcd3Exception, requests.exceptions.RequestException, OSError)
        self._endpoints = endpoints
        self._clients = [etcd3gw.client(host=host, port=port, protocol=scheme, timeout=ANSWER_SECONDS)
                         for scheme, host, port in parse_endpoints(endpoints)]
        for client in self._clients:
            client.session.trust_env = False    # no proxy of the shell's

    def call(self, what: Callable[[Any], Any]) -> Any:
        """`what(client)` of the first endpoint that answers. Raises `MembershipUnavailable`."""
        reason = ""
        for client in list(self._clients):
            try:
                return what(client)
            except self._failures as error:
                reason = reason or f"{type(error).__name__}: {error}"
                self._clients.append(self._clients.pop(0))      # the next one is asked first from now on
        raise MembershipUnavailable(endpoints=self._endpoints, reason=reason[:200])

    def events(self, key: str, quiet_seconds: float) -> Iterator[dict[str, Any]]:
        """Changes of a key from now on; ends when nothing came for so long. Raises `MembershipUnavailable`.

        The library's own watcher ends in silence when its connection does.
        """
        request = {"create_request": {"key": base64.b64encode(key.encode()).decode()}}
        response = self.call(lambda client: client.session.post(
            client.get_url("/watch"), json=request, stream=True, timeout=(ANSWER_SECONDS, quiet_seconds)))
        try:
            for line in response.iter_lines():
                yield from json.loads(line or b"{}").get("result", {}).get("events", ())
        except self._failures:
            return
        finally:
            response.close()


class EtcdMembership:
    """One broker's lease, and its part in the election. See `broker.membership.Membership`.

    `name` tells clusters and their runs apart. A thread keeps the lease; `beat` and `wanted` never wait for etcd.
    """

    def __init__(self, memory: Memory, layout: Layout, clock: Clock, broker: int, incarnation: int, name: str,
                 endpoints: str, lease_seconds: float) -> None:
        self._memory, self._layout, self._clock, self._broker = memory, layout, clock, broker
        self._etcd = Etcd(endpoints)
        self._head_key, self._own_key = f"cxlmq/{name}/head", f"cxlmq/{name}/brokers/{broker}"
        self._value = json.dumps({"broker": broker, "incarnation": incarnation})
        self.lease_seconds = max(LEASE_SECONDS_MIN, -(-int(lease_seconds * 1000) // 1000))
        self._lease: Any = None
        self._elected_until = 0.0
        self._look, self._closed = threading.Event(), threading.Event()
        self._silent = False
        self._keep()                    # an etcd that is not there is said when the broker starts
        self._threads = [threading.Thread(target=run, name=f"etcd-{run.__name__}", daemon=True)
                         for run in (self._keep_on, self._watch)]
        for thread in self._threads:
            thread.start()

    # ---- Membership -------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """The heartbeat in the region is for people: `cluster status` shows it."""
        store_heartbeat(self._memory, self._layout, self._broker, self._clock)

    def wanted(self) -> int | None:
        """The control word as it is, while etcd says that we are elected."""
        if time.monotonic() >= self._elected_until:
            return None
        return self._memory.load_word(self._layout.offset_of("control"))

    def close(self) -> None:
        """Give the lease back: the others see it at once."""
        self._closed.set()
        self._look.set()
        self._threads[0].join()
        self._elected_until = 0.0
        if self._lease is not None:
            try:
                self._etcd.call(lambda client: client.post(client.get_url("/lease/revoke"), json={"ID": self._lease}))
            except MembershipUnavailable as error:
                _log.warning("%s", error.message)       # it ends by itself

    # ---- its threads ------------------------------------------------------------------------------------------------

    def _keep_on(self) -> None:
        while not self._closed.is_set():
            self._look.wait(self.lease_seconds / KEEPS_PER_LEASE)
            self._look.clear()
            if self._closed.is_set():
                return
            try:
                self._keep()
                self._silent = False
            except MembershipUnavailable as error:
                if not self._silent:
                    _log.warning("%s", error.message)
                self._silent = True
            except Exception:
                _log.exception("membership")

    def _keep(self) -> None:
        """Renew the lease, or get another one; stand for election."""
        asked = time.monotonic()
        if self._lease is not None:
            answer = self._etcd.call(lambda client: client.post(client.get_url("/lease/keepalive"),
                                                                json={"ID": self._lease}))
            if int(answer["result"].get("TTL", 0)) <= 0:
                _log.warning("etcd has ended the lease of broker %d, which was silent for too long", self._broker)
                self._lease = None
        if self._lease is None:
            answer = self._etcd.call(lambda client: client.post(client.get_url("/lease/grant"),
                                                                json={"TTL": self.lease_seconds}))
            self._lease = answer["ID"]
            self._create(self._own_key)
        if self._create(self._head_key):
            self._elected_until = asked + self.lease_seconds

    def _create(self, key: str) -> bool:
        """Make a key that ends with our lease, unless it is there; whether it is ours now."""
        coded, value = (base64.b64encode(text.encode()).decode() for text in (key, self._value))
        answer = self._etcd.call(lambda client: client.transaction({
            "compare": [{"key": coded, "result": "EQUAL", "target": "CREATE", "create_revision": 0}],
            "success": [{"request_put": {"key": coded, "value": value, "lease": self._lease}}],
            "failure": [{"request_range": {"key": coded}}]}))
        if answer.get("succeeded"):
            return True
        found = answer["responses"][0]["response_range"].get("kvs", [{}])[0]
        return bool(found.get("lease") == self._lease)

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                for event in self._etcd.events(self._head_key, 4 * self.lease_seconds):
                    if event.get("type") == "DELETE":
                        self._look.set()
            except Exception as error:      # whatever it is: without a watch we stand for election a little later
                _log.debug("watching etcd: %s", error)
            self._closed.wait(WATCH_AGAIN_SECONDS)
