"""Synchronous client of vsprefill-server.

    with PrefillClient("127.0.0.1:8470", tokenizer="models/SmolLM2-135M-Instruct") as client:
        cache = client.prefill(text="...")            # whole cache, verified
        for layer in client.stream(token_ids=ids):    # or layer by layer, as each is complete
            ...

A client may be used by several threads; a PrefillStream by one (but cancel() by any).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from . import errors
from .channels import Connection, TlsOptions
from .kv_cache import KvCache, PrefillResult
from .requests import PushAnswer, PushResult
from .retry import RetryPolicy, Tries
from .session import Layer, MakeDestination
from .state import ClientState, Metadata, StreamState
from .v1 import prefill_pb2

T = TypeVar("T")


class PrefillStream(StreamState):
    """Iterates over the layers of one request in the order in which they complete.

    Each layer's chunks were checked when it is yielded; the cache as a whole is verified when the
    iteration ends without an exception, and only then is `cache` set. It can be iterated once.
    """

    def __init__(self, connections: list[Connection], request: prefill_pb2.PrefillRequest, timeout: float | None,
                 metadata: Metadata, make_destination: MakeDestination | None = None) -> None:
        super().__init__(connections, request, timeout, metadata, make_destination)
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the request on the server; the iterator raises RequestCancelledError. From any thread."""
        with self._lock:
            self._cancelled = True
            for call in self._calls:
                call.cancel()

    def __enter__(self) -> PrefillStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Layer]:
        for index in self.completed_layers():
            yield self._session.layer(index)

    def completed_layers(self) -> Iterator[int]:
        """The same iteration by layer number, for callers with a destination of their own."""
        try:
            yield from self._single() if len(self._connections) == 1 else self._striped()
            self.result = self._session.finish()
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None
        finally:
            self.cancel()

    def _single(self) -> Iterator[int]:
        for message in self._calls[0]:
            layer = self._session.feed(0, message)
            if layer is not None:
                yield layer

    def _striped(self) -> Iterator[int]:
        """One thread per stripe checks and copies; this one hands out layers."""
        done: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        threads: list[threading.Thread] = []

        def read(stripe: int, call: Any) -> None:
            try:
                for message in call:
                    layer = self._session.feed(stripe, message)
                    if layer is not None:
                        done.put(layer)
                done.put(None)
            except BaseException as error:
                done.put(error)

        def start(stripe: int, call: Any) -> None:
            threads.append(threading.Thread(target=read, args=(stripe, call), daemon=True))
            threads[-1].start()

        try:
            # The others can attach once the server knows the request: after its accepted event.
            first = next(self._calls[0], None)
            if first is None:
                return
            self._session.feed(0, first)
            start(0, self._calls[0])
            for stripe in range(1, len(self._connections)):
                start(stripe, self._attach(stripe))
            running = len(threads)
            while running:
                item = done.get()
                if isinstance(item, BaseException):
                    raise self._cause(item)
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            self.cancel()
            for thread in threads:
                thread.join()

    def _attach(self, stripe: int) -> Any:
        with self._lock:
            if self._cancelled:
                raise errors.RequestCancelledError("cancelled by this client", grpc.StatusCode.CANCELLED)
            return super()._attach(stripe)

    def _cause(self, error: BaseException) -> BaseException:
        """NOT_FOUND of a stripe that attached too late says less than the status that ended the request."""
        if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.NOT_FOUND and self._calls[0].done():
            if self._calls[0].code() != grpc.StatusCode.OK:
                return self._calls[0]  # a call is its own RpcError
        return error


class PrefillClient(ClientState):
    """Calls one server.

    target: HOST:PORT. tokenizer: a model directory, or an object with encode(text); allows text instead of ids.
    tls or credentials: for a server behind TLS. metadata: sent with every call, e.g. an authorization header.
    stripes: connections that share each transfer, unless the call says otherwise. retry: prefill() and push()
    send a request that failed for a passing reason again, each time with the next attempt number;
    RetryPolicy(max_attempts=1) turns that off.
    """

    def __init__(self, target: str, *, tokenizer: Any = None, tls: TlsOptions | None = None,
                 credentials: grpc.ChannelCredentials | None = None, metadata: Metadata = (), stripes: int = 1,
                 retry: RetryPolicy = RetryPolicy()) -> None:
        super().__init__(lambda: Connection(target, tls, credentials, asyncio=False), tokenizer, metadata, stripes,
                         retry)
        self._lock = threading.Lock()

    def __enter__(self) -> PrefillClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections; calls in flight are cancelled."""
        with self._lock:
            for connection in self._open:
                connection.channel.close()
            self._open = []

    def stream(self, token_ids: Iterable[int] | None = None, *, timeout: float | None = None, **arguments: Any
               ) -> PrefillStream:
        """Starts one try of a prefill and returns a PrefillStream. Nothing is sent again.

        token_ids or text: the prompt. request_id: default random; attempt: higher than that of an earlier try with
        the same id. method, parameters: attention, default the server's. preset: "safe", "balanced" or "fast" in place
        of a method (model_info().presets: what each costs); parameters go before its own. kv_dtype: "bfloat16" or
        "float32". expected_kv_id: refuse a server with another model or dtype (vsprefill.identity.kv_id). start_token:
        do not send what the caller has. stripes: connections that share the transfer. want_logits: float32 logits of
        the last position. timeout: seconds until DeadlineError, for the whole call.
        """
        return self._stream(self._request(token_ids, arguments), timeout, None)

    def stream_into(self, make_destination: MakeDestination, token_ids: Iterable[int] | None = None, *,
                    timeout: float | None = None, **arguments: Any) -> PrefillStream:
        """As stream(), with chunks written to make_destination(layout): iterate over completed_layers()."""
        return self._stream(self._request(token_ids, arguments), timeout, make_destination)

    def prefill(self, token_ids: Iterable[int] | None = None, *, timeout: float | None = None, **arguments: Any
                ) -> KvCache:
        """The whole verified KvCache. Arguments as for stream(); `timeout` covers all tries and pauses."""
        result = self._prefill(None, token_ids, timeout, arguments)
        assert isinstance(result, KvCache)
        return result

    def prefill_into(self, make_destination: MakeDestination, token_ids: Iterable[int] | None = None, *,
                     timeout: float | None = None, **arguments: Any) -> PrefillResult:
        """As prefill(), with every verified chunk written to make_destination(layout) instead of arrays.

        make_destination is called anew for each try. The destination's content is undefined until this returns.
        """
        return self._prefill(make_destination, token_ids, timeout, arguments)

    def push(self, targets: Sequence[str], token_ids: Iterable[int] | None = None, *, timeout: float | None = None,
             **arguments: Any) -> PushResult:
        """Has the server push the cache to decode workers (addresses on its allow-list). Arguments as prefill()."""
        request = self._request(token_ids, {**arguments, "push_targets": targets, "stripes": 1})

        def once(left: float | None) -> PushResult:
            answer = PushAnswer(request)
            try:
                for message in self._connections(1)[0].prefill(request, timeout=left, metadata=self._metadata):
                    answer.feed(message)
            except grpc.RpcError as error:
                raise errors.from_rpc_error(error) from None
            return answer.finish()

        return self._with_retries(request, timeout, once)

    def model_info(self, timeout: float = 10.0) -> prefill_pb2.ModelInfo:
        """What the server serves: model, identity, limits, attention methods."""
        return self._unary("get_model_info", prefill_pb2.GetModelInfoRequest(), timeout)

    def load(self, timeout: float = 10.0) -> prefill_pb2.Load:
        """What the server has to do, and the memory it uses for it."""
        return self._unary("get_load", prefill_pb2.GetLoadRequest(), timeout)

    def _stream(self, request: prefill_pb2.PrefillRequest, timeout: float | None,
                make_destination: MakeDestination | None) -> PrefillStream:
        return PrefillStream(self._connections(request.stripes), request, timeout, self._metadata, make_destination)

    def _prefill(self, make_destination: MakeDestination | None, token_ids: Iterable[int] | None,
                 timeout: float | None, arguments: dict[str, Any]) -> PrefillResult:
        request = self._request(token_ids, arguments)

        def once(left: float | None) -> PrefillResult:
            stream = self._stream(request, left, make_destination)
            for _ in stream.completed_layers():
                pass
            assert stream.result is not None
            return stream.result

        return self._with_retries(request, timeout, once)

    def _with_retries(self, request: prefill_pb2.PrefillRequest, timeout: float | None,
                      once: Callable[[float | None], T]) -> T:
        tries = Tries(self._retry, timeout)
        while True:
            try:
                return once(tries.timeout())
            except errors.VsprefillError as error:
                pause = tries.pause(error)
                if pause is None:
                    raise
                time.sleep(pause)
                request.attempt += 1

    def _unary(self, method: str, request: Any, timeout: float) -> Any:
        try:
            return getattr(self._connections(1)[0], method)(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None

    def _connections(self, count: int) -> list[Connection]:
        with self._lock:
            return super()._connections(count)
