"""Synchronous client of vsprefill-server.

    with PrefillClient("127.0.0.1:50051", tokenizer="models/SmolLM2-135M-Instruct") as client:
        cache = client.prefill(text="...")            # whole cache, verified
        for layer in client.stream(token_ids=ids):    # or layer by layer, as each is complete
            ...

A client may be used by several threads; a PrefillStream by one.
"""

import queue
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from . import errors
from .kv_cache import KvAssembler, KvCache, KvLayout, Stats
from .v1 import kv_pb2, options_pb2, prefill_pb2, prefill_pb2_grpc

_KV_DTYPES = {None: kv_pb2.KV_DTYPE_UNSPECIFIED, "bfloat16": kv_pb2.KV_DTYPE_BFLOAT16,
              "float32": kv_pb2.KV_DTYPE_FLOAT32}
# One connection per channel, or stripes would share one.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.keepalive_time_ms", 60000)]


@dataclass
class Layer:
    """A complete layer, each array [kv_heads, tokens, head_dim]; see KvCache."""

    index: int
    keys: np.ndarray = field(repr=False)
    values: np.ndarray = field(repr=False)


@dataclass
class PushResult:
    """A prefill whose cache went to push targets, all of which verified it."""

    request_id: str
    first_token: int
    logits: np.ndarray | None
    stats: Stats
    targets: dict  # address -> payload bytes verified there


class PrefillStream:
    """Iterates over the layers of one request in the order in which they complete.

    Each layer's chunks were checked when it is yielded; the cache as a whole is verified when the
    iteration ends without an exception, and only then is `cache` set.
    """

    def __init__(self, stubs, request, timeout):
        self._request = request
        self._stubs = stubs
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._calls = [stubs[0].Prefill(request, timeout=timeout)]
        self._assembler = None
        self._first_token = None
        self._accepted = None
        self._dones = {}
        self.cache = None

    @property
    def first_token(self):
        """The first generated token once it has arrived, else None."""
        return self._first_token.token_id if self._first_token else None

    def cancel(self):
        """Ends the request on the server; the iterator raises RequestCancelledError."""
        for call in self._calls:
            call.cancel()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cancel()

    def __iter__(self):
        try:
            for stripe, event in self._events():
                kind = event.WhichOneof("event")
                if kind == "accepted":
                    self._on_accepted(stripe, event.accepted)
                elif self._accepted is None:
                    raise errors.DataLossError(f"stripe {stripe}: {kind} before accepted")
                elif kind == "kv":
                    index = event.kv.layer
                    if index % len(self._stubs) != stripe:
                        raise errors.DataLossError(f"layer {index} on stripe {stripe} of {len(self._stubs)}")
                    if self._assembler.add(event.kv):
                        yield Layer(index, self._assembler.keys[index], self._assembler.values[index])
                elif kind == "first_token":
                    self._first_token = event.first_token
                elif kind == "done":
                    self._dones[stripe] = event.done
            self._finish()
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None
        finally:
            self.cancel()

    def _events(self):
        """(stripe, event) of all streams. A single stream needs no threads."""
        first = self._calls[0]
        if len(self._stubs) == 1:
            for event in first:
                yield 0, event
            return
        events = queue.Queue(maxsize=64)
        stop = threading.Event()
        threads = []

        def put(item):
            while not stop.is_set():
                try:
                    events.put(item, timeout=0.1)
                    return
                except queue.Full:
                    pass

        def read(stripe, call):
            try:
                for event in call:
                    put((stripe, event))
                put((stripe, None))
            except grpc.RpcError as error:
                put((stripe, error))

        def start(stripe, call):
            threads.append(threading.Thread(target=read, args=(stripe, call), daemon=True))
            threads[-1].start()

        try:
            # The others can attach once the server knows the request: after its accepted event.
            event = next(first, None)
            if event is None:
                return
            yield 0, event
            start(0, first)
            for stripe in range(1, len(self._stubs)):
                left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.001)
                self._calls.append(self._stubs[stripe].Attach(
                    prefill_pb2.AttachRequest(request_id=self._request.request_id,
                                              attempt=self._request.attempt, stripe=stripe), timeout=left))
                start(stripe, self._calls[-1])
            open_streams = len(threads)
            while open_streams:
                stripe, item = events.get()
                if isinstance(item, grpc.RpcError):
                    raise item
                if item is None:
                    open_streams -= 1
                else:
                    yield stripe, item
        finally:
            stop.set()
            self.cancel()
            for thread in threads:
                thread.join()

    def _on_accepted(self, stripe, accepted):
        layout = KvLayout.from_proto(accepted.layout)
        if self._accepted is None:
            self._accepted = accepted
            wanted = self._request.expected_kv_id
            if wanted and layout.kv_id != wanted:
                raise errors.DataLossError(f"accepted with kv_id {layout.kv_id}, asked for {wanted}")
            if layout.prompt_tokens != len(self._request.token_ids):
                raise errors.DataLossError(f"accepted {layout.prompt_tokens} tokens of {len(self._request.token_ids)}")
            self._assembler = KvAssembler(layout)
        elif layout != self._assembler.layout:
            raise errors.DataLossError(f"stripe {stripe} has another layout: {layout}")

    def _finish(self):
        if self._accepted is None or set(self._dones) != set(range(len(self._stubs))):
            raise errors.DataLossError("the stream ended before its done event")
        if self._first_token is None:
            raise errors.DataLossError("the stream ended without a first token")
        self._assembler.verify(self._dones[0].manifest)
        self.cache = KvCache(
            request_id=self._request.request_id, layout=self._assembler.layout,
            token_ids=list(self._request.token_ids), method=self._accepted.method,
            first_token=self._first_token.token_id, logits=_logits(self._first_token),
            stats=Stats.from_proto(self._dones[0].stats), keys=self._assembler.keys,
            values=self._assembler.values)


def _logits(first_token):
    return np.array(first_token.logits, np.float32) if first_token.logits else None


class PrefillClient:
    """Calls one server. `tokenizer` (a model directory, or an object with encode(text)) allows text."""

    def __init__(self, target, *, tokenizer=None, credentials=None, stripes=1):
        if stripes < 1:
            raise ValueError(f"stripes {stripes} not >= 1")
        self._target = target
        self._credentials = credentials
        self._tokenizer = _load_tokenizer(tokenizer)
        self._stripes = stripes
        self._lock = threading.Lock()
        self._channels = []
        self._stubs = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Closes all connections; calls in flight are cancelled."""
        with self._lock:
            for channel in self._channels:
                channel.close()
            self._channels, self._stubs = [], []

    def stream(self, token_ids=None, *, text=None, request_id=None, attempt=0, method=None, parameters=None,
               kv_dtype=None, expected_kv_id="", start_token=0, stripes=None, want_logits=False, timeout=None):
        """Starts a prefill and returns a PrefillStream.

        token_ids or text: the prompt. method and parameters: default the server's. kv_dtype: "bfloat16"
        or "float32". start_token: do not send what the caller has. stripes: connections that share the
        transfer. timeout: seconds until DeadlineError, for the whole call.
        """
        request = self._request(token_ids, text, request_id, attempt, method, parameters, want_logits)
        if kv_dtype not in _KV_DTYPES:
            raise ValueError(f"kv_dtype {kv_dtype!r} not in bfloat16, float32")
        request.kv_dtype = _KV_DTYPES[kv_dtype]
        request.expected_kv_id = expected_kv_id
        request.start_token = start_token
        request.stripes = stripes or self._stripes
        return PrefillStream(self._get_stubs(request.stripes), request, timeout)

    def prefill(self, token_ids=None, **kwargs):
        """Returns the whole verified KvCache. Arguments as for stream()."""
        stream = self.stream(token_ids, **kwargs)
        for _ in stream:
            pass
        return stream.cache

    def push(self, targets, token_ids=None, *, text=None, request_id=None, attempt=0, method=None,
             parameters=None, want_logits=False, timeout=None):
        """Has the server push the cache to decode workers (addresses on its allow-list)."""
        request = self._request(token_ids, text, request_id, attempt, method, parameters, want_logits)
        request.push_targets.extend(targets)
        first_token = done = None
        try:
            for event in self._get_stubs(1)[0].Prefill(request, timeout=timeout):
                kind = event.WhichOneof("event")
                first_token = event.first_token if kind == "first_token" else first_token
                done = event.done if kind == "done" else done
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None
        if first_token is None or done is None:
            raise errors.DataLossError("the stream ended before its done event")
        bad = [f"{t.target}: code {t.code} {t.message}" for t in done.targets if t.code != 0]
        if bad or len(done.targets) != len(targets):
            raise errors.DataLossError("; ".join(bad) or f"{len(done.targets)} targets of {len(targets)} reported")
        return PushResult(request.request_id, first_token.token_id, _logits(first_token),
                          Stats.from_proto(done.stats), {t.target: t.bytes for t in done.targets})

    def model_info(self, timeout=10.0):
        """prefill_pb2.ModelInfo."""
        return self._unary("GetModelInfo", prefill_pb2.GetModelInfoRequest(), timeout)

    def load(self, timeout=10.0):
        """prefill_pb2.Load."""
        return self._unary("GetLoad", prefill_pb2.GetLoadRequest(), timeout)

    def _unary(self, name, request, timeout):
        try:
            return getattr(self._get_stubs(1)[0], name)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None

    def _request(self, token_ids, text, request_id, attempt, method, parameters, want_logits):
        if (token_ids is None) == (text is None):
            raise ValueError("give either token_ids or text")
        if text is not None:
            if self._tokenizer is None:
                raise ValueError("text needs a tokenizer: PrefillClient(..., tokenizer=MODEL_DIR)")
            encoded = self._tokenizer.encode(text)
            token_ids = getattr(encoded, "ids", encoded)
        return prefill_pb2.PrefillRequest(
            request_id=uuid.uuid4().hex if request_id is None else request_id, attempt=attempt,
            token_ids=[int(i) for i in token_ids],
            method=options_pb2.AttentionMethod(name=method or "", parameters=parameters or {}),
            want_logits=want_logits)

    def _get_stubs(self, count):
        with self._lock:
            while len(self._stubs) < count:
                if self._credentials is None:
                    channel = grpc.insecure_channel(self._target, options=_OPTIONS)
                else:
                    channel = grpc.secure_channel(self._target, self._credentials, options=_OPTIONS)
                self._channels.append(channel)
                self._stubs.append(prefill_pb2_grpc.PrefillServiceStub(channel))
            return self._stubs[:count]


def _load_tokenizer(tokenizer):
    if isinstance(tokenizer, (str, Path)):
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    return tokenizer
