"""Writes keys and values of one layer into an engine's paged cache.

A slot numbers a token's place: engine block id * engine block size + offset in the block. Tensors whose blocks
are smaller than the engine's have the same slots. Writers hold no state that changes; two threads may write to
different slots at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .layouts import LayoutError, PagedLayout


class CacheWriter(Protocol):
    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """keys, values: [heads, tokens, dim], of the cache's dtype, in host memory. slots: int64 [tokens]."""

    def synchronize(self) -> None:
        """Returns when everything that was written can be read by the engine."""


class StridedWriter:
    """Plain memory: assigns through views of whatever strides. On a GPU the copies run on a stream of their own."""

    def __init__(self, cache: torch.Tensor, layout: PagedLayout, stream: Any = None) -> None:
        dim = cache.shape[-1] // 2
        if layout.kind == "kv_blocks":
            self._keys, self._values = cache[0], cache[1]
        elif layout.kind == "blocks_kv":
            self._keys, self._values = cache[:, 0], cache[:, 1]
        elif layout.kind == "packed":
            self._keys, self._values = (half.permute(0, 2, 1, 3) for half in (cache[..., :dim], cache[..., dim:]))
        else:
            raise LayoutError(f"layout {layout.kind} is not written through views")
        # Both [blocks, block_size, heads, dim].
        self._block_size = layout.block_size
        self._stream = stream

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        if self._stream is None:
            self._assign(keys, values, slots)
        else:
            with torch.cuda.stream(self._stream):
                self._assign(keys, values, slots)

    def _assign(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        device = self._keys.device
        slots = slots.to(device)
        block, offset = slots // self._block_size, slots % self._block_size
        self._keys[block, offset] = keys.to(device).transpose(0, 1)
        self._values[block, offset] = values.to(device).transpose(0, 1)

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class CpuPackedWriter:
    """vLLM on CPUs: its attention kernels want K packed for their instruction set, so its own op has to write.

    op: vLLM's cpu_attn_reshape_and_cache. isa: the name that the layer's attention uses; another one is accepted
    by the op and gives other bytes, so it is never guessed.
    """

    def __init__(self, cache: torch.Tensor, layout: PagedLayout, op: Callable[..., None], isa: str) -> None:
        if layout.kind == "packed":
            blocks, heads, block_size, twice = cache.shape
            # The kernels read each head's block as block_size rows of K, then block_size rows of V.
            self._keys, self._values = cache.view(blocks, heads, 2 * block_size, twice // 2).chunk(2, dim=2)
        elif layout.kind == "kv_blocks_heads":
            self._keys, self._values = cache[0], cache[1]
        else:
            raise LayoutError(f"layout {layout.kind} is not one of vLLM's CPU kernels")
        self._op = op
        self._isa = isa
        names = list(inspect.signature(op).parameters)
        expected = ["key", "value", "key_cache", "value_cache", "slot_mapping", "isa"]
        if names[:6] != expected:
            raise LayoutError(f"cpu_attn_reshape_and_cache takes {names}, expected it to begin with {expected}")

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        if keys.dtype != self._keys.dtype:  # the op would take it and write garbage
            raise LayoutError(f"keys of {keys.dtype} into a cache of {self._keys.dtype}")
        self._op(keys.transpose(0, 1), values.transpose(0, 1), self._keys, self._values, slots, self._isa)

    def synchronize(self) -> None:
        pass
