"""A destination of verified chunks in an engine's paged cache: blocks of one request, all layers."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import DataLossError
from ..kv_cache import Array, KvLayout
from .cache_writer import CacheWriter

_warnings_lock = threading.Lock()  # catch_warnings changes what is global


def require_finite(array: Array, what: str) -> None:
    """Raises DataLossError for NaN or infinity: in a cache they spread to whoever uses the block next.

    array: float32, or bfloat16 as uint16 bits.
    """
    bits, exponent = (array, 0x7F80) if array.dtype == np.uint16 else (array.view(np.uint32), 0x7F800000)
    if bits.size and int(np.bitwise_and(bits, bits.dtype.type(exponent)).max()) == exponent:
        raise DataLossError(f"{what}: NaN or infinity")


def to_tensor(array: Array) -> torch.Tensor:
    """The same memory as a tensor, bfloat16 where it holds bits of it. Not to be written to."""
    with _warnings_lock, warnings.catch_warnings():
        # Chunks are read-only views of received messages; torch has no such tensors and says so once.
        warnings.simplefilter("ignore", UserWarning)
        if array.dtype == np.uint16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


class PagedDestination:
    """Writes tokens [layout.start_token, layout.prompt_tokens) of each layer into their blocks.

    writers: one per layer. block_ids: of the whole prompt; block_ids[i] holds tokens [i*block_size, (i+1)*block_size).
    The rest of the last block, which nobody has written, is set to zero: leftovers there may be NaN, and
    attention multiplies what it masks. last_chunk_at: when the last chunk came (time.monotonic).
    """

    def __init__(self, layout: KvLayout, writers: Sequence[CacheWriter], block_ids: Sequence[int],
                 block_size: int) -> None:
        if len(writers) != layout.num_layers:
            raise DataLossError(f"{layout.num_layers} layers for a cache of {len(writers)}")
        needed = -(-layout.prompt_tokens // block_size)
        if len(block_ids) < needed:
            raise ValueError(f"{len(block_ids)} blocks of {block_size} tokens for {layout.prompt_tokens} tokens")
        self._writers = writers
        self.last_chunk_at = time.monotonic()
        blocks = torch.tensor(list(block_ids[:needed]), dtype=torch.int64)
        self._slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
        self._zero_rest(layout, needed * block_size)

    def _zero_rest(self, layout: KvLayout, end: int) -> None:
        if layout.prompt_tokens == end:
            return
        shape = (layout.num_kv_heads, end - layout.prompt_tokens, layout.head_dim)
        zeros = torch.zeros(shape, dtype=torch.bfloat16 if layout.dtype == "bfloat16" else torch.float32)
        for writer in self._writers:
            writer.write(zeros, zeros, self._slots[layout.prompt_tokens:end])

    def write(self, layer: int, token_begin: int, keys: Array, values: Array) -> None:
        self.last_chunk_at = time.monotonic()
        for name, array in (("keys", keys), ("values", values)):
            require_finite(array, f"{name} of layer {layer}, tokens from {token_begin}")
        slots = self._slots[token_begin:token_begin + keys.shape[1]]
        self._writers[layer].write(to_tensor(keys), to_tensor(values), slots)

    def synchronize(self) -> None:
        for writer in self._writers:
            writer.synchronize()
