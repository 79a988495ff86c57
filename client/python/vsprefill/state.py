"""What the synchronous and the asyncio client have in common: what they hold, not how they wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .channels import Connection
from .kv_cache import KvCache, PrefillResult
from .requests import load_tokenizer, make_request
from .retry import RetryPolicy
from .session import MakeDestination, PrefillSession
from .v1 import prefill_pb2

Metadata = Sequence[tuple[str, str]]


class StreamState:
    """One try of a request: its calls (stripe 0 first) and what has arrived. Not thread-safe by itself."""

    def __init__(self, connections: list[Connection], request: prefill_pb2.PrefillRequest, timeout: float | None,
                 metadata: Metadata, make_destination: MakeDestination | None = None) -> None:
        self._request = request
        self._connections = connections
        self._metadata = metadata
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._session = PrefillSession(request, make_destination)
        self._calls: list[Any] = [connections[0].prefill(request, timeout=timeout, metadata=metadata)]
        self.result: PrefillResult | None = None

    @property
    def cache(self) -> KvCache | None:
        """The verified cache, None before the iteration has ended well."""
        return self.result if isinstance(self.result, KvCache) else None

    @property
    def first_token(self) -> int | None:
        """The first generated token once it has arrived, else None."""
        return self._session.first_token

    def _attach(self, stripe: int) -> Any:
        """Starts the call of another stripe, with what is left of the deadline."""
        left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.001)
        request = prefill_pb2.AttachRequest(request_id=self._request.request_id, attempt=self._request.attempt,
                                            stripe=stripe)
        call = self._connections[stripe].attach(request, timeout=left, metadata=self._metadata)
        self._calls.append(call)
        return call


class ClientState:
    """Settings of a client and its connections, opened when they are needed. Not thread-safe by itself."""

    def __init__(self, connect: Callable[[], Connection], tokenizer: Any, metadata: Metadata, stripes: int,
                 retry: RetryPolicy) -> None:
        if stripes < 1:
            raise ValueError(f"stripes {stripes} not >= 1")
        self._connect = connect
        self._tokenizer = load_tokenizer(tokenizer)
        self._metadata = tuple(metadata)
        self._stripes = stripes
        self._retry = retry
        self._open: list[Connection] = []

    def _request(self, token_ids: Iterable[int] | None, arguments: dict[str, Any]) -> prefill_pb2.PrefillRequest:
        return make_request(self._tokenizer, token_ids, **{"stripes": self._stripes, **arguments})

    def _connections(self, count: int) -> list[Connection]:
        while len(self._open) < count:
            self._open.append(self._connect())
        return self._open[:count]
