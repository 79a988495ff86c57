"""A PrefillService in this process that streams made-up KV, whole or torn in a chosen way."""

import struct
import threading
from concurrent import futures

import grpc
import numpy as np
import xxhash

from vsprefill.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

LAYERS, HEADS, HEAD_DIM, CHUNK = 4, 2, 8, 16
FIRST_TOKEN = 42
STORAGE = {kv_pb2.KV_DTYPE_BFLOAT16: np.dtype("<u2"), kv_pb2.KV_DTYPE_FLOAT32: np.dtype("<f4")}


def make_kv(layer, tokens, dtype):
    """(K, V) of a layer, each [HEADS, tokens, HEAD_DIM]; a function of the layer only."""
    rng = np.random.default_rng(layer)
    values = rng.standard_normal((2, HEADS, tokens, HEAD_DIM)).astype(np.float32)
    if dtype == kv_pb2.KV_DTYPE_BFLOAT16:
        return (values.view(np.uint32) >> 16).astype("<u2")
    return values


class FakeServer(prefill_pb2_grpc.PrefillServiceServicer):
    """`fault(events)` may change the list of events of the main stream, `error` ends calls with a status.

    `failures`: (code, message, pushback or None) of the first calls, one each; later calls succeed. `tls`: server
    credentials. `model_info`, `load_info`: what the unary calls answer.
    """

    def __init__(self, fault=None, error=None, never_end=False, failures=(), tls=None, address="127.0.0.1:0"):
        self.fault, self.error, self.never_end = fault, error, never_end
        self.failures = list(failures)
        self.model_info = prefill_pb2.ModelInfo(model_name="fake", vocab_size=99)
        self.load_info = prefill_pb2.Load(requests_waiting=3)
        self.metadata = []
        self.requests = []
        self.cancelled = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, self._server)
        port = self._server.add_secure_port(address, tls) if tls else self._server.add_insecure_port(address)
        self.address = f"127.0.0.1:{port}"

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *_):
        self._server.stop(0).wait()

    def events(self, request, stripe):
        dtype = request.kv_dtype or kv_pb2.KV_DTYPE_BFLOAT16
        stripes = max(request.stripes, 1)
        tokens, start = len(request.token_ids), request.start_token
        layout = kv_pb2.KvLayout(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM, dtype=dtype,
                                 kv_id="id", prompt_tokens=tokens, start_token=start, chunk_tokens=CHUNK)
        events = [prefill_pb2.PrefillEvent(accepted=prefill_pb2.Accepted(
            layout=layout, stripe=stripe, stripes=stripes, method=request.method.name or "dense"))]
        manifest = kv_pb2.KvManifest()
        for layer in range(LAYERS):
            kv = make_kv(layer, tokens, dtype)
            entry = manifest.layers.add(layer=layer, tokens=tokens - start)
            digest = xxhash.xxh3_64()
            for begin in range(start, tokens, CHUNK):
                end = min(begin + CHUNK, tokens)
                payload = kv[:, :, begin:end].tobytes()
                checksum = xxhash.xxh3_64_intdigest(payload)
                digest.update(struct.pack("<QQQ", begin, end, checksum))
                entry.chunks += 1
                entry.bytes += len(payload)
                manifest.bytes += len(payload)
                if layer % stripes == stripe:
                    events.append(prefill_pb2.PrefillEvent(kv=kv_pb2.KvChunk(
                        layer=layer, token_begin=begin, token_end=end, checksum=checksum, payload=payload)))
            entry.checksum = digest.intdigest()
        if stripe == 0:
            events.append(prefill_pb2.PrefillEvent(first_token=prefill_pb2.FirstToken(
                token_id=FIRST_TOKEN, logits=[0.5, 1.5] if request.want_logits else [])))
        done = prefill_pb2.Done(manifest=manifest)
        done.stats.density = 0.25
        done.stats.layer_group_density.extend([0.1, 0.2, 0.3, 0.4])
        for target in request.push_targets:
            done.targets.add(target=target, bytes=7)
        events.append(prefill_pb2.PrefillEvent(done=done))
        return events

    def Prefill(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.never_end:
            context.add_callback(self.cancelled.set)
        error = self.failures.pop(0) if self.failures else self.error
        if error is not None:
            code, message, pushback = error
            if pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(pushback)),))
            context.abort(code, message)
        events = self.events(request, 0)
        yield from self.fault(events) if self.fault else events
        if self.never_end:
            self.cancelled.wait(20)

    def Attach(self, request, context):
        for known in self.requests:
            if (known.request_id, known.attempt) == (request.request_id, request.attempt):
                yield from self.events(known, request.stripe)
                return
        context.abort(grpc.StatusCode.NOT_FOUND, f"no request {request.request_id!r} in flight")

    def GetModelInfo(self, request, context):
        return self.model_info

    def GetLoad(self, request, context):
        return self.load_info
