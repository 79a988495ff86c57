"""A prompt's KV cache on the client: assembled from chunks, verified, then read-only by convention.

Wire format: docs/kv_wire_format.md. A chunk is one layer and token range; its payload is K then V,
each [kv_heads, tokens, head_dim]. Nothing here needs torch; bfloat16 is held as numpy.uint16 bits.
"""

import struct
from dataclasses import dataclass, field

import numpy as np
import xxhash

from .errors import DataLossError
from .v1 import kv_pb2

_DTYPES = {
    kv_pb2.KV_DTYPE_BFLOAT16: ("bfloat16", np.dtype("<u2")),
    kv_pb2.KV_DTYPE_FLOAT32: ("float32", np.dtype("<f4")),
}


@dataclass(frozen=True)
class KvLayout:
    """Shape of the cache. `dtype` is "bfloat16" or "float32"; tokens [start_token, prompt_tokens) are sent."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    kv_id: str
    prompt_tokens: int
    start_token: int

    @property
    def tokens(self):
        """Tokens that the server sends."""
        return self.prompt_tokens - self.start_token

    @property
    def storage(self):
        """numpy dtype of the arrays: uint16 (bits of bfloat16) or float32."""
        return np.dtype("<u2") if self.dtype == "bfloat16" else np.dtype("<f4")

    @classmethod
    def from_proto(cls, proto):
        if proto.dtype not in _DTYPES:
            raise DataLossError(f"layout with KV dtype {proto.dtype}, expected one of {sorted(_DTYPES)}")
        layout = cls(proto.num_layers, proto.num_kv_heads, proto.head_dim, _DTYPES[proto.dtype][0],
                     proto.kv_id, proto.prompt_tokens, proto.start_token)
        if layout.start_token > layout.prompt_tokens:
            raise DataLossError(f"layout with start_token {layout.start_token} > {layout.prompt_tokens} tokens")
        return layout


@dataclass(frozen=True)
class Stats:
    """Where the time went, in seconds on the server, and how sparse the attention was."""

    queue_seconds: float
    compute_seconds: float
    ttft_seconds: float
    exposed_transfer_seconds: float
    index_seconds: float
    density: float
    cost_ratio: float
    layer_group_density: tuple
    kv_bytes: int

    @classmethod
    def from_proto(cls, p):
        return cls(p.queue_seconds, p.compute_seconds, p.ttft_seconds, p.exposed_transfer_seconds,
                   p.index_seconds, p.density, p.cost_ratio, tuple(p.layer_group_density), p.kv_bytes)


def bfloat16_to_float32(bits):
    """float32 values of an array of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass
class KvCache:
    """Keys (after RoPE) and values of every layer, each [kv_heads, tokens, head_dim]."""

    request_id: str
    layout: KvLayout
    token_ids: list
    method: str
    first_token: int
    logits: np.ndarray | None  # float32 [vocab] of the last position, if asked for
    stats: Stats
    keys: list = field(repr=False)
    values: list = field(repr=False)

    def float32(self, layer):
        """(K, V) of a layer as float32 arrays."""
        k, v = self.keys[layer], self.values[layer]
        if self.layout.dtype == "bfloat16":
            k, v = bfloat16_to_float32(k), bfloat16_to_float32(v)
        return k, v

    def to_dynamic_cache(self, config, **kwargs):
        """A transformers DynamicCache; see vsprefill.huggingface.to_dynamic_cache."""
        from .huggingface import to_dynamic_cache

        return to_dynamic_cache(self, config, **kwargs)

    def generate_inputs(self, config, **kwargs):
        """Keyword arguments for model.generate; see vsprefill.huggingface.generate_inputs."""
        from .huggingface import generate_inputs

        return generate_inputs(self, config, **kwargs)


class KvAssembler:
    """Puts chunks of one request (all stripes) in place and verifies them. Not thread-safe."""

    def __init__(self, layout):
        self.layout = layout
        shape = (layout.num_kv_heads, layout.tokens, layout.head_dim)
        self.keys = [np.empty(shape, layout.storage) for _ in range(layout.num_layers)]
        self.values = [np.empty(shape, layout.storage) for _ in range(layout.num_layers)]
        self._records = [{} for _ in range(layout.num_layers)]  # token_begin -> (token_end, checksum)
        self._tokens = [0] * layout.num_layers
        self._bytes = [0] * layout.num_layers

    def add(self, chunk):
        """Takes a kv_pb2.KvChunk; returns True if it completes its layer. Raises DataLossError."""
        layout, begin, end = self.layout, chunk.token_begin, chunk.token_end
        what = f"chunk of layer {chunk.layer}, tokens [{begin}, {end})"
        if chunk.layer >= layout.num_layers:
            raise DataLossError(f"{what}: the model has {layout.num_layers} layers")
        if not layout.start_token <= begin < end <= layout.prompt_tokens:
            raise DataLossError(f"{what}: not in [{layout.start_token}, {layout.prompt_tokens})")
        shape = (2, layout.num_kv_heads, end - begin, layout.head_dim)
        size = int(np.prod(shape)) * layout.storage.itemsize
        if len(chunk.payload) != size:
            raise DataLossError(f"{what}: {len(chunk.payload)} bytes, expected {size}")
        if xxhash.xxh3_64_intdigest(chunk.payload) != chunk.checksum:
            raise DataLossError(f"{what}: checksum does not match")
        records = self._records[chunk.layer]
        if any(begin < other_end and other < end for other, (other_end, _) in records.items()):
            raise DataLossError(f"{what}: overlaps another chunk")
        k, v = np.frombuffer(chunk.payload, layout.storage).reshape(shape)
        at = slice(begin - layout.start_token, end - layout.start_token)
        self.keys[chunk.layer][:, at] = k
        self.values[chunk.layer][:, at] = v
        records[begin] = (end, chunk.checksum)
        self._tokens[chunk.layer] += end - begin
        self._bytes[chunk.layer] += size
        return self._tokens[chunk.layer] == layout.tokens

    def verify(self, manifest):
        """Compares what arrived with the manifest of every layer. Raises DataLossError."""
        layout = self.layout
        if [m.layer for m in manifest.layers] != list(range(layout.num_layers)):
            raise DataLossError(f"manifest of {len(manifest.layers)} layers, expected 0..{layout.num_layers - 1}")
        for expected in manifest.layers:
            records = sorted(self._records[expected.layer].items())
            digest = xxhash.xxh3_64()
            for begin, (end, checksum) in records:
                digest.update(struct.pack("<QQQ", begin, end, checksum))
            have = (self._tokens[expected.layer], len(records), self._bytes[expected.layer], digest.intdigest())
            want = (expected.tokens, expected.chunks, expected.bytes, expected.checksum)
            if have != want or have[0] != layout.tokens:
                raise DataLossError(f"layer {expected.layer}: (tokens, chunks, bytes, checksum) {have}, "
                                    f"manifest {want}, the prompt needs {layout.tokens} tokens")
        if manifest.bytes != sum(self._bytes):
            raise DataLossError(f"{sum(self._bytes)} bytes arrived, the manifest says {manifest.bytes}")
