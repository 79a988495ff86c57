"""AsyncPrefillClient behind the interface of PrefillClient, so that one set of tests runs both."""

import asyncio

import vsprefill


class BlockingStream:
    def __init__(self, loop, stream):
        self._loop, self._stream = loop, stream

    cache = property(lambda self: self._stream.cache)
    first_token = property(lambda self: self._stream.first_token)

    def cancel(self):
        self._stream.cancel()

    def __iter__(self):
        layers = self._stream.__aiter__()
        try:
            while True:
                try:
                    yield self._loop.run_until_complete(anext(layers))
                except StopAsyncIteration:
                    return
        finally:
            self._loop.run_until_complete(layers.aclose())


class BlockingAsyncClient:
    """Every call runs a private event loop until it is done."""

    def __init__(self, target, **arguments):
        self._loop = asyncio.new_event_loop()

        async def make():
            return vsprefill.AsyncPrefillClient(target, **arguments)

        self._client = self._loop.run_until_complete(make())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._loop.run_until_complete(self._client.close())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def stream(self, *args, **kwargs):
        async def make():
            return self._client.stream(*args, **kwargs)

        return BlockingStream(self._loop, self._loop.run_until_complete(make()))

    def __getattr__(self, name):
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._loop.run_until_complete(method(*args, **kwargs))
