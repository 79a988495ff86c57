"""The prefill servers an engine may use: which are fit, and which one has least to do.

A thread per endpoint asks for its model once (again after each loss) and for its load all the time. Loads
that were sent and how they ended are told by the owner. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from ..client import PrefillClient
from ..errors import VsprefillError
from ..v1 import prefill_pb2
from . import logger
from .breaker import CircuitBreaker
from .config import Attention, ConnectorConfig, RequestOptions
from .fingerprint import Fingerprint

_POLL_TIMEOUT_SECONDS = 2.0
_POLLS_LOST = 2  # a busy machine may answer one late
_HANDSHAKE_SECONDS = 60.0


class _Asks(Protocol):
    def model_info(self, timeout: float = ...) -> prefill_pb2.ModelInfo: ...
    def load(self, timeout: float = ...) -> prefill_pb2.Load: ...
    def close(self) -> None: ...


@dataclass
class _Endpoint:
    address: str
    breaker: CircuitBreaker
    client: _Asks
    problem: str | None = "not asked yet"  # None: fit
    load: prefill_pb2.Load = field(default_factory=prefill_pb2.Load)
    max_prompt_tokens: int = 0
    methods: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)  # parameter -> (min, max)
    handshake_at: float | None = None
    lost_polls: int = 0
    own_tokens: int = 0  # of loads that this engine has under way


class EndpointPool:
    """See above. connect: makes a client of an address; tests pass fakes."""

    def __init__(self, config: ConnectorConfig, fingerprint: Fingerprint,
                 connect: Callable[[str], _Asks] | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        connect = connect or (lambda address: PrefillClient(address, tls=config.tls))
        self._fingerprint = fingerprint
        self._poll_seconds = config.poll_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._endpoints = {a: _Endpoint(a, CircuitBreaker(config.breaker_failures, config.breaker_seconds, clock),
                                        connect(a)) for a in config.endpoints}
        self._threads: list[threading.Thread] = []

    def start(self, wait_seconds: float = _POLL_TIMEOUT_SECONDS) -> None:
        """Starts polling; returns when every endpoint was asked once, or after wait_seconds."""
        asked = [threading.Event() for _ in self._endpoints]
        for endpoint, event in zip(self._endpoints.values(), asked, strict=True):
            thread = threading.Thread(target=self._poll_forever, args=(endpoint, event), daemon=True,
                                      name=f"vsprefill-poll-{endpoint.address}")
            thread.start()
            self._threads.append(thread)
        until = time.monotonic() + wait_seconds
        for event in asked:
            event.wait(max(until - time.monotonic(), 0))

    def close(self) -> None:
        """Ends the threads. Engines give little time for it, so calls under way are cancelled."""
        self._stop.set()
        for endpoint in self._endpoints.values():
            endpoint.client.close()
        for thread in self._threads:
            thread.join(1.0)

    def ranked(self, prompt_tokens: int, options: RequestOptions) -> list[str]:
        """Addresses that may take such a prompt now, the one that would be done first in front. Changes nothing."""
        with self._lock:
            fit = [e for e in self._chosen(options) if not self._unfit(e, prompt_tokens, options)]
            rates = [e.load.tokens_per_second for e in fit if e.load.tokens_per_second > 0]
            usual = sum(rates) / len(rates) if rates else 1.0  # of a server that has computed nothing yet

            def burden(e: _Endpoint) -> tuple[float, int]:
                # What we sent may be in its figures already, or not yet. A running request's tokens are in none.
                seconds = max(e.load.waiting_tokens, e.own_tokens) / (e.load.tokens_per_second or usual)
                return seconds, e.load.requests_running

            return [e.address for e in sorted(fit, key=burden)]

    def why_none(self, prompt_tokens: int, options: RequestOptions) -> str:
        """One line for people: what is wrong with each endpoint."""
        with self._lock:
            return "; ".join(f"{e.address}: {self._unfit(e, prompt_tokens, options) or 'fit'}"
                             for e in self._chosen(options))

    def begin(self, address: str, tokens: int) -> None:
        """A load goes to this endpoint."""
        with self._lock:
            self._endpoints[address].own_tokens += tokens
            self._endpoints[address].breaker.begin()

    def end(self, address: str, tokens: int) -> None:
        """The load that began with these tokens is over, however."""
        with self._lock:
            self._endpoints[address].own_tokens -= tokens

    def record(self, address: str, failure: str | None, blame: bool) -> None:
        """How a try ended. failure: None if well. blame: whether it says something about the server."""
        with self._lock:
            endpoint = self._endpoints[address]
            before = endpoint.breaker.state
            if failure is None:
                endpoint.breaker.succeed()
            elif blame:
                endpoint.breaker.fail()
            else:
                endpoint.breaker.forget()
            after = endpoint.breaker.state
        if before == "closed" and after == "open":
            logger.error("prefill server %s is out of use for a while: %s", address, failure)
        elif before != "closed" and after == "closed":
            logger.info("prefill server %s is in use again", address)

    def _chosen(self, options: RequestOptions) -> list[_Endpoint]:
        return [e for e in self._endpoints.values() if options.endpoint in (None, e.address)]

    def _unfit(self, endpoint: _Endpoint, prompt_tokens: int, options: RequestOptions) -> str | None:
        """Why not this one, None if it is fit. Caller holds the lock."""
        if endpoint.problem is not None:
            return endpoint.problem
        if not endpoint.breaker.allows():
            return f"circuit breaker {endpoint.breaker.state} after failed loads"
        if why := _cannot(endpoint.methods, options.attention):
            return why
        load = endpoint.load
        if load.draining:
            return "draining"
        if endpoint.max_prompt_tokens and prompt_tokens > endpoint.max_prompt_tokens:
            return f"takes prompts of at most {endpoint.max_prompt_tokens} tokens"
        if load.max_waiting_requests and load.requests_waiting >= load.max_waiting_requests:
            return f"queue full ({load.requests_waiting} requests)"
        if load.max_waiting_tokens and load.waiting_tokens + prompt_tokens > load.max_waiting_tokens:
            return f"queue full ({load.waiting_tokens} of {load.max_waiting_tokens} tokens)"
        return None

    def _poll_forever(self, endpoint: _Endpoint, asked: threading.Event) -> None:
        while not self._stop.is_set():
            try:
                self.poll(endpoint.address)
            except Exception:  # a bug here would leave an endpoint as it last was, for ever
                logger.exception("polling prefill server %s", endpoint.address)
            asked.set()
            self._stop.wait(self._poll_seconds)

    def poll(self, address: str) -> None:
        """Asks one endpoint once. The threads do; tests call it themselves."""
        endpoint = self._endpoints[address]
        info: prefill_pb2.ModelInfo | None = None
        try:
            now = self._clock()
            due = endpoint.handshake_at is None or now - endpoint.handshake_at >= _HANDSHAKE_SECONDS
            if due:
                info = endpoint.client.model_info(timeout=_POLL_TIMEOUT_SECONDS)
            load = endpoint.client.load(timeout=_POLL_TIMEOUT_SECONDS)
        except VsprefillError as error:
            if not self._stop.is_set():
                self._lost(endpoint, error)
            return
        except ValueError:
            if self._stop.is_set():  # the channel was closed under the call
                return
            raise
        with self._lock:
            before = endpoint.problem
            endpoint.lost_polls = 0
            endpoint.load = load
            if info is not None:
                difference = self._fingerprint.difference(info)
                endpoint.problem = f"refused, another model: {difference}" if difference else None
                endpoint.max_prompt_tokens = info.max_prompt_tokens
                endpoint.methods = {m.name: {p.name: (p.min, p.max) for p in m.parameters} for m in info.methods}
                endpoint.handshake_at = now
            after = endpoint.problem
        if after != before:
            if after is None:
                logger.info("prefill server %s is fit for use", address)
            else:
                logger.error("prefill server %s %s", address, after)

    def _lost(self, endpoint: _Endpoint, error: VsprefillError) -> None:
        with self._lock:
            endpoint.lost_polls += 1
            if error.code != grpc.StatusCode.UNAVAILABLE and endpoint.lost_polls < _POLLS_LOST:
                return
            before, endpoint.problem = endpoint.problem, f"not reachable ({error.code.name})"
            endpoint.handshake_at = None  # what comes back may be another server
            after = endpoint.problem
        if after != before:
            logger.warning("prefill server %s is %s", endpoint.address, after)


def _cannot(methods: dict[str, dict[str, tuple[float, float]]], attention: Attention) -> str | None:
    """Why a server with these methods would refuse this attention. Without a name the server's default decides."""
    if not methods or not attention.method:
        return None
    if attention.method not in methods:
        return f"method {attention.method!r} is not one of {', '.join(sorted(methods))}"
    known = methods[attention.method]
    for name, value in attention.parameters.items():
        if name not in known:
            return f"{attention.method} has no parameter {name!r}, only {', '.join(sorted(known)) or 'none'}"
        low, high = known[name]
        if not low <= value <= high:
            return f"{name} {value:g} is not in [{low:g}, {high:g}]"
    return None
