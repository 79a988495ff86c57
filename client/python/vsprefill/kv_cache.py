"""A prompt's KV cache as the client hands it out: shape, figures, arrays.

Nothing here needs torch; bfloat16 is held as numpy.uint16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import DataLossError
from .v1 import kv_pb2, prefill_pb2

if TYPE_CHECKING:
    import transformers

Array = npt.NDArray[Any]

_DTYPES = {kv_pb2.KV_DTYPE_BFLOAT16: "bfloat16", kv_pb2.KV_DTYPE_FLOAT32: "float32"}
_MAX_MESSAGE_BYTES = 4 << 20
_MAX_LAYERS = 4096


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
    def tokens(self) -> int:
        """Tokens that the server sends."""
        return self.prompt_tokens - self.start_token

    @property
    def storage(self) -> np.dtype[Any]:
        """numpy dtype of the arrays: uint16 (bits of bfloat16) or float32."""
        return np.dtype("<u2") if self.dtype == "bfloat16" else np.dtype("<f4")

    @property
    def token_bytes(self) -> int:
        """Payload bytes of one token of one layer, K and V."""
        return 2 * self.num_kv_heads * self.head_dim * self.storage.itemsize

    @classmethod
    def from_proto(cls, proto: kv_pb2.KvLayout) -> KvLayout:
        """Raises DataLossError for a shape that no server can mean: nothing is allocated on a peer's word."""
        if proto.dtype not in _DTYPES:
            raise DataLossError(f"layout with KV dtype {proto.dtype}, expected one of {sorted(_DTYPES)}")
        layout = cls(proto.num_layers, proto.num_kv_heads, proto.head_dim, _DTYPES[proto.dtype],
                     proto.kv_id, proto.prompt_tokens, proto.start_token)
        if layout.start_token > layout.prompt_tokens:
            raise DataLossError(f"layout with start_token {layout.start_token} > {layout.prompt_tokens} tokens")
        if not 0 < layout.num_layers <= _MAX_LAYERS:
            raise DataLossError(f"layout with {layout.num_layers} layers, not in [1, {_MAX_LAYERS}]")
        if not 0 < layout.token_bytes <= _MAX_MESSAGE_BYTES:
            raise DataLossError(f"layout with {layout.num_kv_heads} KV heads of {layout.head_dim}: a token of a layer "
                                f"has {layout.token_bytes} bytes, not in [1, {_MAX_MESSAGE_BYTES}]")
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
    layer_group_density: tuple[float, ...]
    kv_bytes: int
    dense_fallback_layers: int = 0  # dense, at least in part, because their index would have been slower

    @classmethod
    def from_proto(cls, p: prefill_pb2.PrefillStats) -> Stats:
        return cls(p.queue_seconds, p.compute_seconds, p.ttft_seconds, p.exposed_transfer_seconds,
                   p.index_seconds, p.density, p.cost_ratio, tuple(p.layer_group_density), p.kv_bytes,
                   p.dense_fallback_layers)


def bfloat16_to_float32(bits: Array) -> npt.NDArray[np.float32]:
    """float32 values of an array of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Destination(Protocol):
    """Where verified chunks go. Called by one thread per stripe; a layer comes on one stripe only."""

    def write(self, layer: int, token_begin: int, keys: Array, values: Array) -> None:
        """Takes tokens [token_begin, token_begin + n) of a layer.

        keys (after RoPE), values: read-only [kv_heads, n, head_dim] in KvLayout.storage; they borrow the received
        message, so copy what is to stay. token_begin counts from the prompt's first token. An exception ends the
        prefill and reaches its caller.
        """


class ArrayDestination:
    """The default: one array per layer, [kv_heads, tokens, head_dim], token 0 is KvLayout.start_token."""

    def __init__(self, layout: KvLayout) -> None:
        self._start = layout.start_token
        # One block for all: numpy asks for huge pages then, and first touches of small ones cost as much as the copy.
        shape = (layout.num_layers, 2, layout.num_kv_heads, layout.tokens, layout.head_dim)
        block = np.empty(shape, layout.storage)
        self.keys, self.values = list(block[:, 0]), list(block[:, 1])

    def write(self, layer: int, token_begin: int, keys: Array, values: Array) -> None:
        at = slice(token_begin - self._start, token_begin - self._start + keys.shape[1])
        self.keys[layer][:, at] = keys
        self.values[layer][:, at] = values


@dataclass
class PrefillResult:
    """A prefill whose cache arrived whole and verified, wherever it was written."""

    request_id: str
    attempt: int
    layout: KvLayout
    method: str  # as the server resolved it
    method_parameters: dict[str, float]
    first_token: int  # greedy
    logits: npt.NDArray[np.float32] | None  # [vocab] of the last position, if asked for
    stats: Stats
    received_bytes: int


@dataclass
class KvCache(PrefillResult):
    """Keys (after RoPE) and values of every layer, each [kv_heads, tokens, head_dim]. Read-only by convention."""

    token_ids: list[int] = field(repr=False)
    keys: list[Array] = field(repr=False)
    values: list[Array] = field(repr=False)

    def float32(self, layer: int) -> tuple[Array, Array]:
        """(K, V) of a layer as float32 arrays."""
        k, v = self.keys[layer], self.values[layer]
        if self.layout.dtype == "bfloat16":
            k, v = bfloat16_to_float32(k), bfloat16_to_float32(v)
        return k, v

    def to_dynamic_cache(self, config: Any, **kwargs: Any) -> transformers.DynamicCache:
        """A transformers DynamicCache; see vsprefill.huggingface.to_dynamic_cache."""
        from .huggingface import to_dynamic_cache

        return to_dynamic_cache(self, config, **kwargs)

    def generate_inputs(self, config: Any, **kwargs: Any) -> dict[str, Any]:
        """Keyword arguments for model.generate; see vsprefill.huggingface.generate_inputs."""
        from .huggingface import generate_inputs

        return generate_inputs(self, config, **kwargs)
