"""Fetches KV caches in threads: what is to be loaded, how it ended, and the threads that do it.

One load is one request's cache. Whatever happens it ends exactly once, with a LoadResult, and only when
nothing writes to its blocks any more.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from ..channels import TlsOptions
from ..client import PrefillClient, PrefillStream
from ..errors import DataLossError, ModelMismatchError, VsprefillError
from ..kv_cache import KvLayout, PrefillResult
from ..retry import NO_RETRY, RetryPolicy
from . import logger

if TYPE_CHECKING:  # it needs torch, this file does not
    from .paged import PagedDestination


@dataclass(frozen=True)
class LoadSpec:
    """A load, as the deciding half of a connector sends it to the half that owns the memory.

    request_id: the engine's. token_ids: up to and with the last token to load. start_token: the first to load.
    block_ids: of tokens from 0 on. endpoints: to be tried in this order.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start_token: int
    block_ids: tuple[int, ...]
    endpoints: tuple[str, ...]
    method: str
    parameters: Mapping[str, float]
    deadline_seconds: float
    expected_kv_id: str
    preset: str = ""


@dataclass(frozen=True)
class Try:
    """One attempt at one endpoint. failure: None if it went well. blame: it says something about the server."""

    endpoint: str
    failure: str | None
    code: str
    blame: bool


@dataclass
class LoadResult:
    """How a load ended. outcome: "loaded", "failed" or "cancelled". seconds: from its start here to its end.

    last_chunk_at: when the last KV chunk came, by time.monotonic, which all processes of a machine share; 0 if none.
    """

    request_id: str
    outcome: str
    tokens: int
    seconds: float
    bytes: int = 0
    method: str = ""
    density: float = 0.0
    server_seconds: float = 0.0  # in the queue and computing
    last_chunk_at: float = 0.0
    reason: str = ""
    tries: list[Try] = field(default_factory=list)
    bad_blocks: list[int] = field(default_factory=list)


class _Load:
    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.begin = time.monotonic()
        self.cancelled = threading.Event()
        self._lock = threading.Lock()
        self._stream: PrefillStream | None = None
        self.last_chunk_at = 0.0

    def cancel(self) -> None:
        with self._lock:
            self.cancelled.set()
            if self._stream is not None:
                self._stream.cancel()

    def run(self, stream: PrefillStream) -> PrefillResult:
        """Drains the stream; RequestCancelledError if the load was cancelled before or meanwhile."""
        with self._lock:
            self._stream = stream
            if self.cancelled.is_set():
                stream.cancel()
        try:
            for _ in stream.completed_layers():
                pass
        finally:
            with self._lock:
                self._stream = None
        assert stream.result is not None
        return stream.result


class Loader:
    """max_loads threads that take loads in order. Methods may be called from one thread; only wait and close block.

    make_destination(layout, block_ids): where a load's chunks go; called in a loading thread.
    """

    def __init__(self, make_destination: Callable[[KvLayout, tuple[int, ...]], PagedDestination], *, block_size: int,
                 max_loads: int, max_attempts: int, stripes: int, tls: TlsOptions | None = None,
                 unpin: bool = False) -> None:
        self._make_destination = make_destination
        self._block_size = block_size
        self._policy = RetryPolicy(max_attempts=max_attempts)
        self._stripes = stripes
        self._tls = tls
        self._unpin = unpin
        self._clients: dict[str, PrefillClient] = {}
        self._clients_lock = threading.Lock()
        self._waiting: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._loads: dict[str, _Load] = {}
        self._news = threading.Event()  # a result is there
        self._threads = [threading.Thread(target=self._work, daemon=True, name=f"vsprefill-load-{i}")
                         for i in range(max_loads)]
        for thread in self._threads:
            thread.start()

    def start(self, spec: LoadSpec) -> None:
        load = self._loads[spec.request_id] = _Load(spec)
        self._waiting.put(load)

    def cancel(self, request_id: str) -> None:
        """The load will end soon, as cancelled if it has not ended yet. Unknown and ended ones are ignored."""
        load = self._loads.get(request_id)
        if load is not None:
            load.cancel()

    def finished(self) -> list[LoadResult]:
        """Loads that have ended since the last call, each once."""
        self._news.clear()  # before looking, so that none is missed
        results: list[LoadResult] = []
        while True:
            try:
                result = self._results.get_nowait()
            except queue.Empty:
                return results
            del self._loads[result.request_id]
            results.append(result)

    def wait(self, seconds: float) -> None:
        """Until a load has ended, at most so long; at once where none is under way."""
        if self._loads:
            self._news.wait(seconds)

    def close(self, timeout: float = 5.0) -> None:
        """Cancels everything and joins the threads."""
        for load in list(self._loads.values()):
            load.cancel()
        for _ in self._threads:
            self._waiting.put(None)
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        with self._clients_lock:
            for client in self._clients.values():
                client.close()
            self._clients = {}

    def _work(self) -> None:
        if self._unpin:
            # vLLM pins its worker to one core before threads start, and they inherit it. The process that started
            # the worker is not pinned: what it may use is what taskset or a container left to the engine.
            try:
                os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
            except (AttributeError, OSError) as error:
                logger.debug("I/O thread keeps its CPU affinity: %s", error)
        while (load := self._waiting.get()) is not None:
            try:
                result = self._load(load)
            except Exception as error:  # a bug here must not leave the engine waiting for ever
                logger.exception("load of request %s failed unexpectedly", load.spec.request_id)
                result = self._end(load, "failed", reason=f"{type(error).__name__}: {error}")
            self._results.put(result)
            self._news.set()

    def _load(self, load: _Load) -> LoadResult:
        spec = load.spec
        prefill_id = f"vllm-{uuid.uuid4().hex}"  # engine ids need not be unique between engines
        tries: list[Try] = []
        while True:
            endpoint = spec.endpoints[len(tries) % len(spec.endpoints)]
            left = load.begin + spec.deadline_seconds - time.monotonic()
            if load.cancelled.is_set():
                return self._end(load, "cancelled", tries=tries)
            if left <= 0:
                return self._end(load, "failed", tries=tries, reason=f"the deadline of {spec.deadline_seconds:g} s "
                                 "passed before a try could begin")
            try:
                result = self._try(load, endpoint, prefill_id, len(tries), left)
            except VsprefillError as error:
                if load.cancelled.is_set():  # so this is no failure of the server's
                    tries.append(Try(endpoint, "cancelled", error.code.name, blame=False))
                    return self._end(load, "cancelled", tries=tries)
                tries.append(Try(endpoint, str(error), error.code.name, blame=_blames_server(error)))
                left = load.begin + spec.deadline_seconds - time.monotonic()
                pause = self._policy.pause(len(tries), error, left)
                if pause is None:
                    return self._end(load, "failed", tries=tries, reason=str(error))
                if spec.endpoints[len(tries) % len(spec.endpoints)] != endpoint:
                    pause = 0  # another server need not be spared
                if load.cancelled.wait(pause):
                    return self._end(load, "cancelled", tries=tries)
                continue
            tries.append(Try(endpoint, None, "OK", blame=True))
            return self._end(load, "loaded", tries=tries, result=result)

    def _try(self, load: _Load, endpoint: str, prefill_id: str, attempt: int, left: float) -> PrefillResult:
        spec = load.spec
        made: list[PagedDestination] = []

        def make(layout: KvLayout) -> PagedDestination:
            made.append(self._make_destination(layout, spec.block_ids))
            return made[-1]

        stream = self._client(endpoint).stream_into(
            make, spec.token_ids, timeout=left, request_id=prefill_id, attempt=attempt, method=spec.method,
            parameters=spec.parameters, preset=spec.preset, expected_kv_id=spec.expected_kv_id,
            start_token=spec.start_token)
        try:
            return load.run(stream)
        finally:
            for destination in made:
                destination.synchronize()  # also after a failure: nothing may be written to blocks given back
                load.last_chunk_at = destination.last_chunk_at

    def _client(self, endpoint: str) -> PrefillClient:
        with self._clients_lock:
            if endpoint not in self._clients:
                self._clients[endpoint] = PrefillClient(endpoint, tls=self._tls, stripes=self._stripes, retry=NO_RETRY)
            return self._clients[endpoint]

    def _end(self, load: _Load, outcome: str, *, tries: list[Try] | None = None, reason: str = "",
             result: PrefillResult | None = None) -> LoadResult:
        spec = load.spec
        end = LoadResult(spec.request_id, outcome, len(spec.token_ids) - spec.start_token,
                         time.monotonic() - load.begin, reason=reason, tries=tries or [])
        if result is not None:
            end.bytes, end.method, end.density = result.received_bytes, result.method, result.stats.density
            end.server_seconds = result.stats.queue_seconds + result.stats.compute_seconds
            end.last_chunk_at = load.last_chunk_at
        elif outcome == "failed":
            last = -(-len(spec.token_ids) // self._block_size)
            end.bad_blocks = list(spec.block_ids[spec.start_token // self._block_size:last])
            logger.warning("load of request %s failed after %d tries: %s", spec.request_id, len(end.tries), reason)
        return end


def _blames_server(error: VsprefillError) -> bool:
    """Whether the next load is likely to fail there too. A full queue or a wrong request is no such sign."""
    return isinstance(error, (DataLossError, ModelMismatchError)) or error.code in (
        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNAUTHENTICATED)
