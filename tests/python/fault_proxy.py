"""A gRPC proxy before a real vsprefill-server that spoils Prefill streams in a chosen way."""

import struct
import threading
from concurrent import futures

import grpc
import xxhash
from vsprefill.v1 import prefill_pb2

_PREFILL = "/vsprefill.v1.PrefillService/Prefill"


def corrupt(event, number):
    """One bit of the fifth chunk."""
    if number == 5:
        event.kv.payload = event.kv.payload[:-1] + bytes([event.kv.payload[-1] ^ 1])
    return event


def not_a_number(event, number):
    """NaN in the fifth chunk, with the checksum that belongs to it: a server that computes wrong."""
    if number == 5:
        payload = bytearray(event.kv.payload)
        payload[-4:] = b"\xff\xff\xff\xff"
        event.kv.payload = bytes(payload)
        event.kv.checksum = xxhash.xxh3_64_intdigest(event.kv.payload)
    return event


def another_model(event, number):
    """The accepted layout names another model, though the handshake was right."""
    if event.WhichOneof("event") == "accepted":
        event.accepted.layout.kv_id = "0" * 64
    return event


def cut(event, number):
    """The stream breaks after the fifth chunk."""
    if number == 6:
        raise ConnectionResetError
    return event


def lose(event, number):
    """The fifth chunk does not come."""
    return None if number == 5 else event


class WrongValues:
    """Other values of layer 15, with checksums and manifest that agree: nothing on the wire can tell."""

    def __init__(self):
        self._records = {}

    def __call__(self, event, number):
        if event.HasField("kv") and event.kv.layer == 15:
            half = len(event.kv.payload) // 2
            event.kv.payload = event.kv.payload[half:] + event.kv.payload[:half]  # V for K, K for V
            event.kv.checksum = xxhash.xxh3_64_intdigest(event.kv.payload)
            self._records[event.kv.token_begin] = (event.kv.token_end, event.kv.checksum)
        elif event.HasField("done"):
            digest = xxhash.xxh3_64()
            for begin, (end, checksum) in sorted(self._records.items()):
                digest.update(struct.pack("<QQQ", begin, end, checksum))
            event.done.manifest.layers[15].checksum = digest.intdigest()
        return event


class FaultProxy(grpc.GenericRpcHandler):
    """`fault`: a function of (event, number of the chunk from 1) or None. `stall_after`: chunks before the stream
    stands still until the call ends; `stalled` is set then."""

    def __init__(self, target):
        self.fault, self.stall_after = None, None
        self.stalled, self.ended = threading.Event(), threading.Event()
        self.info = None  # replaces GetModelInfo's answer
        self._channel = grpc.insecure_channel(target)
        self._server = grpc.server(futures.ThreadPoolExecutor(32), handlers=[self])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *_):
        self._server.stop(0).wait()
        self._channel.close()

    def clear(self):
        self.fault = self.stall_after = self.info = None
        self.stalled.clear()
        self.ended.clear()

    def service(self, details):
        method = details.method
        if method == _PREFILL:
            return grpc.unary_stream_rpc_method_handler(self._prefill)
        relay = self._channel.unary_unary(method)

        def call(request, context):
            if self.info is not None and method.endswith("GetModelInfo"):
                return self.info.SerializeToString()
            try:
                return relay(request, timeout=context.time_remaining())
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return grpc.unary_unary_rpc_method_handler(call)

    def _prefill(self, request, context):
        upstream = self._channel.unary_stream(_PREFILL)(request, timeout=context.time_remaining())
        over = threading.Event()
        context.add_callback(lambda: (upstream.cancel(), over.set(), self.ended.set()))
        chunks = 0
        try:
            for message in upstream:
                event = prefill_pb2.PrefillEvent.FromString(message)
                chunks += event.HasField("kv")
                if self.stall_after is not None and chunks > self.stall_after:
                    self.stalled.set()
                    over.wait(60)
                    return
                if self.fault is not None:
                    changed = self.fault(event, chunks if event.HasField("kv") else 0)
                    if changed is None:
                        continue
                    message = changed.SerializeToString()
                yield message
        except ConnectionResetError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
        except grpc.RpcError as error:
            if context.is_active():
                context.abort(error.code(), error.details())
