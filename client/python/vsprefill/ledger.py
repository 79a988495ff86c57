"""Which chunks of a cache have arrived, and whether they are all of it. Holds no KV data."""

from __future__ import annotations

import bisect
import struct

import numpy as np
import xxhash

from .errors import DataLossError
from .kv_cache import Array, KvLayout
from .v1 import kv_pb2
from .wire import Chunk


class _LayerRecords:
    """Records (token_begin, token_end, checksum) of one layer's chunks, in token order."""

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.checksums: list[int] = []
        self.tokens = 0

    def add(self, begin: int, end: int, checksum: int) -> bool:
        """False if a token is there already."""
        at = bisect.bisect_left(self.begins, begin)
        if (at > 0 and self.ends[at - 1] > begin) or (at < len(self.begins) and self.begins[at] < end):
            return False
        self.begins.insert(at, begin)
        self.ends.insert(at, end)
        self.checksums.insert(at, checksum)
        self.tokens += end - begin
        return True

    def digest(self) -> int:
        digest = xxhash.xxh3_64()
        for record in zip(self.begins, self.ends, self.checksums, strict=True):
            digest.update(struct.pack("<QQQ", *record))
        return digest.intdigest()


class ChunkLedger:
    """Checks chunks as they come and the whole against the manifest.

    Two threads may call `check` and `record` at once for different layers.
    """

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self._layers = [_LayerRecords() for _ in range(layout.num_layers)]

    @property
    def received_bytes(self) -> int:
        return sum(layer.tokens for layer in self._layers) * self.layout.token_bytes

    def check(self, chunk: Chunk) -> tuple[Array, Array]:
        """(keys, values) of a chunk that fits and whose checksum is right, each [kv_heads, n, head_dim], borrowed.

        Raises DataLossError, naming layer and tokens.
        """
        layout, begin, end = self.layout, chunk.token_begin, chunk.token_end
        what = f"chunk of layer {chunk.layer}, tokens [{begin}, {end})"
        if chunk.layer >= layout.num_layers:
            raise DataLossError(f"{what}: the model has {layout.num_layers} layers")
        if not layout.start_token <= begin < end <= layout.prompt_tokens:
            raise DataLossError(f"{what}: not in [{layout.start_token}, {layout.prompt_tokens})")
        size = (end - begin) * layout.token_bytes
        if len(chunk.payload) != size:
            raise DataLossError(f"{what}: {len(chunk.payload)} bytes, expected {size}")
        if xxhash.xxh3_64_intdigest(chunk.payload) != chunk.checksum:
            raise DataLossError(f"{what}: checksum does not match")
        kv = np.frombuffer(chunk.payload, layout.storage)
        keys, values = kv.reshape(2, layout.num_kv_heads, end - begin, layout.head_dim)
        return keys, values

    def record(self, chunk: Chunk) -> bool:
        """Notes a checked chunk; True if it completes its layer. Raises DataLossError for tokens that are there."""
        layer = self._layers[chunk.layer]
        if not layer.add(chunk.token_begin, chunk.token_end, chunk.checksum):
            raise DataLossError(f"chunk of layer {chunk.layer}, tokens [{chunk.token_begin}, {chunk.token_end}): "
                                "overlaps another chunk")
        return layer.tokens == self.layout.tokens

    def verify(self, manifest: kv_pb2.KvManifest) -> None:
        """Compares what arrived with the manifest of every layer. Raises DataLossError."""
        layout = self.layout
        if [m.layer for m in manifest.layers] != list(range(layout.num_layers)):
            raise DataLossError(f"manifest of {len(manifest.layers)} layers, expected 0..{layout.num_layers - 1}")
        for expected, have in zip(manifest.layers, self._layers, strict=True):
            arrived = (have.tokens, len(have.begins), have.tokens * layout.token_bytes, have.digest())
            wanted = (expected.tokens, expected.chunks, expected.bytes, expected.checksum)
            if arrived != wanted or have.tokens != layout.tokens:
                raise DataLossError(f"layer {expected.layer}: (tokens, chunks, bytes, checksum) {arrived}, "
                                    f"manifest {wanted}, the prompt needs {layout.tokens} tokens")
        if manifest.bytes != self.received_bytes:
            raise DataLossError(f"{self.received_bytes} bytes arrived, the manifest says {manifest.bytes}")
