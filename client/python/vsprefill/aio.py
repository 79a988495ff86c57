"""Asyncio client of vsprefill-server: the same calls as client.PrefillClient, awaited.

    async with AsyncPrefillClient("127.0.0.1:8470") as client:
        cache = await client.prefill(ids, timeout=30)
        async for layer in client.stream(ids):
            ...

Checking and copying a chunk (at most 4 MiB, about a millisecond) runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio

from . import errors
from .channels import Connection, TlsOptions
from .kv_cache import KvCache, PrefillResult
from .requests import PushAnswer, PushResult
from .retry import RetryPolicy, Tries
from .session import Layer, MakeDestination
from .state import ClientState, Metadata, StreamState
from .v1 import prefill_pb2

T = TypeVar("T")


class AsyncPrefillStream(StreamState):
    """As client.PrefillStream, with `async for`. Cancelling the task that iterates cancels the request."""

    def cancel(self) -> None:
        """Ends the request on the server; the iterator raises RequestCancelledError."""
        for call in self._calls:
            call.cancel()

    async def __aenter__(self) -> AsyncPrefillStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncGenerator[Layer, None]:
        # aclosing: an iteration that is left early cancels the request now, not when garbage is collected.
        async with aclosing(self.completed_layers()) as indices:
            async for index in indices:
                yield self._session.layer(index)

    async def completed_layers(self) -> AsyncGenerator[int, None]:
        """The same iteration by layer number, for callers with a destination of their own."""
        try:
            if len(self._connections) == 1:
                async for message in self._calls[0]:
                    layer = self._session.feed(0, message)
                    if layer is not None:
                        yield layer
            else:
                async with aclosing(self._striped()) as layers:
                    async for layer in layers:
                        yield layer
            self.result = self._session.finish()
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from None
        except asyncio.CancelledError:
            # grpc.aio raises it for call.cancel() too; only a cancelled task may see it as such.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise errors.RequestCancelledError("cancelled by this client", grpc.StatusCode.CANCELLED) from None
        finally:
            self.cancel()

    async def _striped(self) -> AsyncGenerator[int, None]:
        done: asyncio.Queue[int | BaseException | None] = asyncio.Queue()

        async def read(stripe: int, messages: AsyncIterator[bytes]) -> None:
            try:
                async for message in messages:
                    layer = self._session.feed(stripe, message)
                    if layer is not None:
                        done.put_nowait(layer)
                done.put_nowait(None)
            except BaseException as error:
                done.put_nowait(error)

        tasks: list[asyncio.Task[None]] = []
        try:
            messages = aiter(self._calls[0])
            first = await anext(messages, None)
            if first is None:
                return
            self._session.feed(0, first)
            tasks.append(asyncio.create_task(read(0, messages)))
            for stripe in range(1, len(self._connections)):
                tasks.append(asyncio.create_task(read(stripe, aiter(self._attach(stripe)))))
            running = len(tasks)
            while running:
                item = await done.get()
                if isinstance(item, BaseException):
                    raise await self._cause(item)
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            self.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _cause(self, error: BaseException) -> BaseException:
        """NOT_FOUND of a stripe that attached too late says less than the status that ended the request."""
        first = self._calls[0]
        late = isinstance(error, grpc.aio.AioRpcError) and error.code() == grpc.StatusCode.NOT_FOUND and first.done()
        if late and await first.code() != grpc.StatusCode.OK:
            return grpc.aio.AioRpcError(await first.code(), await first.initial_metadata(),
                                        await first.trailing_metadata(), await first.details())
        return error


class AsyncPrefillClient(ClientState):
    """Arguments and methods as client.PrefillClient; use it on one event loop."""

    def __init__(self, target: str, *, tokenizer: Any = None, tls: TlsOptions | None = None,
                 credentials: grpc.ChannelCredentials | None = None, metadata: Metadata = (), stripes: int = 1,
                 retry: RetryPolicy = RetryPolicy()) -> None:
        super().__init__(lambda: Connection(target, tls, credentials, asyncio=True), tokenizer, metadata, stripes,
                         retry)

    async def __aenter__(self) -> AsyncPrefillClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections; calls in flight are cancelled."""
        connections, self._open = self._open, []
        for connection in connections:
            await connection.channel.close()

    def stream(self, token_ids: Iterable[int] | None = None, *, timeout: float | None = None, **arguments: Any
               ) -> AsyncPrefillStream:
        """Starts one try of a prefill; arguments as client.PrefillClient.stream."""
        return self._stream(self._request(token_ids, arguments), timeout, None)

    def stream_into(self, make_destination: MakeDestination, token_ids: Iterable[int] | None = None, *,
                    timeout: float | None = None, **arguments: Any) -> AsyncPrefillStream:
        """As client.PrefillClient.stream_into."""
        return self._stream(self._request(token_ids, arguments), timeout, make_destination)

    async def prefill(self, token_ids: Iterable[int] | None = None, *, timeout: float | None = None,
                      **arguments: Any) -> KvCache:
        """The whole verified KvCache; arguments as client.PrefillClient.prefill."""
        result = await self._prefill(None, token_ids, timeout, arguments)
        assert isinstance(result, KvCache)
        return result

    async def prefill_into(self, make_destination: MakeDestination, token_ids: Iterable[int] | None = None, *,
                           timeout: float | None = None, **arguments: Any) -> PrefillResult:
        """As client.PrefillClient.prefill_into."""
        return await self._prefill(make_destination, token_ids, timeout, arguments)

    async def push(self, targets: Sequence[str], token_ids: Iterable[int] | None = None, *,
                   timeout: float | None = None, **arguments: Any) -> PushResult:
        """As client.PrefillClient.push."""
        request = self._request(token_ids, {**arguments, "push_targets": targets, "stripes": 1})

        async def once(left: float | None) -> PushResult:
            answer = PushAnswer(request)
            try:
                async for message in self._connections(1)[0].prefill(request, timeout=left, metadata=self._metadata):
                    answer.feed(message)
            except grpc.aio.AioRpcError as error:
                raise errors.from_rpc_error(error) from None
            return answer.finish()

        return await self._with_retries(request, timeout, once)

    async def model_info(self, timeout: float = 10.0) -> prefill_pb2.ModelInfo:
        return await self._unary("get_model_info", prefill_pb2.GetModelInfoRequest(), timeout)

    async def load(self, timeout: float = 10.0) -> prefill_pb2.Load:
        return await self._unary("get_load", prefill_pb2.GetLoadRequest(), timeout)

    def _stream(self, request: prefill_pb2.PrefillRequest, timeout: float | None,
                make_destination: MakeDestination | None) -> AsyncPrefillStream:
        return AsyncPrefillStream(self._connections(request.stripes), request, timeout, self._metadata,
                                  make_destination)

    async def _prefill(self, make_destination: MakeDestination | None, token_ids: Iterable[int] | None,
                       timeout: float | None, arguments: dict[str, Any]) -> PrefillResult:
        request = self._request(token_ids, arguments)

        async def once(left: float | None) -> PrefillResult:
            stream = self._stream(request, left, make_destination)
            async for _ in stream.completed_layers():
                pass
            assert stream.result is not None
            return stream.result

        return await self._with_retries(request, timeout, once)

    async def _with_retries(self, request: prefill_pb2.PrefillRequest, timeout: float | None,
                            once: Callable[[float | None], Awaitable[T]]) -> T:
        tries = Tries(self._retry, timeout)
        while True:
            try:
                return await once(tries.timeout())
            except errors.VsprefillError as error:
                pause = tries.pause(error)
                if pause is None:
                    raise
                await asyncio.sleep(pause)
                request.attempt += 1

    async def _unary(self, method: str, request: Any, timeout: float) -> Any:
        try:
            return await getattr(self._connections(1)[0], method)(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from None
