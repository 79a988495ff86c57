"""The half of a connector that owns the memory: cache tensors in, loads started, ended ones reported.

Called by the engine's worker thread only, once per step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import torch

from ..errors import ModelMismatchError
from ..kv_cache import KvLayout
from . import logger, stats
from .cache_writer import CacheWriter, CpuPackedWriter, StridedWriter
from .config import ConnectorConfig
from .fingerprint import Fingerprint
from .layouts import LayoutError, probe
from .loads import Loader, LoadResult
from .paged import PagedDestination
from .scheduler import LoadMetadata

_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def in_layer_order(names: list[str], num_layers: int) -> list[str]:
    """Names of attention layers ("model.layers.7.self_attn.attn") by number. Raises LayoutError.

    Anything beyond the model's own layers (a draft model's, say) has KV that no prefill server computes.
    """
    numbered: dict[int, str] = {}
    for name in names:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if len(numbers) != 1 or int(numbers[0]) in numbered:
            raise LayoutError(f"cache of layer {name!r}: expected one per layer, with its number in the name")
        numbered[int(numbers[0])] = name
    if sorted(numbered) != list(range(num_layers)):
        raise LayoutError(f"caches of {len(numbered)} layers for a model of {num_layers}: models with other layers "
                          "(hybrid, or with a draft model) are not supported")
    return [numbered[i] for i in range(num_layers)]


class WorkerHalf:
    """block_size, blocks: the engine's. cpu_op, isa_of(layer name): vLLM's packing op and what it needs on CPUs."""

    def __init__(self, config: ConnectorConfig, fingerprint: Fingerprint, *, blocks: int, block_size: int,
                 cpu_op: Callable[..., None] | None = None, isa_of: Callable[[str], str] | None = None) -> None:
        self._config = config
        self._fingerprint = fingerprint
        self._blocks = blocks
        self._block_size = block_size
        self._cpu_op = cpu_op
        self._isa_of = isa_of
        self._writers: list[CacheWriter] = []
        self._loader: Loader | None = None
        self._bad_blocks: set[int] = set()
        self._results: list[LoadResult] = []
        self._stats = stats.empty()

    def register(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Takes the cache tensors, by layer name, and starts the threads. Raises LayoutError."""
        fingerprint = self._fingerprint
        names = in_layer_order(list(caches), fingerprint.num_layers)
        cuda = caches[names[0]].device.type == "cuda"
        stream = torch.cuda.Stream() if cuda else None
        self._writers = [self._writer(name, caches[name], stream) for name in names]
        self._loader = Loader(
            self._destination, block_size=self._block_size, max_loads=self._config.max_loads,
            max_attempts=self._config.max_attempts, stripes=self._config.stripes, tls=self._config.tls,
            unpin=self._config.unpin_io)
        first = caches[names[0]]
        logger.info("%d layers of KV cache %s, %s, written by %s", len(names), tuple(first.shape), first.dtype,
                    type(self._writers[0]).__name__)

    def step(self, metadata: LoadMetadata, idle: bool = False) -> None:
        """Starts and cancels loads. Never raises because of a load.

        idle: the engine computes nothing in this step and would only ask again at once. Then this waits
        idle_wait_seconds, or until a load has ended, instead of taking a core from the prefill server next door.
        """
        assert self._loader is not None, "caches were not registered"
        for request_id in metadata.cancels:
            self._loader.cancel(request_id)
        for spec in metadata.loads:
            self._loader.start(spec)
        if idle:
            self._loader.wait(self._config.idle_wait_seconds)

    def finished(self) -> tuple[set[str], set[str]]:
        """(ids of all loads that have ended, ids of those that failed), each once. Fixes what bad_blocks says."""
        results = self._loader.finished() if self._loader else []
        self._results.extend(results)
        for result in results:
            stats.record(self._stats, result)
            self._bad_blocks.update(result.bad_blocks)
        return {r.request_id for r in results}, {r.request_id for r in results if r.outcome == "failed"}

    def bad_blocks(self) -> set[int]:
        """Blocks that failed loads left without content, since the last call."""
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def take_results(self) -> list[LoadResult]:
        """For the deciding half."""
        results, self._results = self._results, []
        return results

    def take_stats(self) -> stats.Data:
        data, self._stats = self._stats, stats.empty()
        return data

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _writer(self, name: str, cache: torch.Tensor, stream: Any) -> CacheWriter:
        fingerprint = self._fingerprint
        if cache.dtype != _TORCH_DTYPES[fingerprint.dtype]:
            raise LayoutError(f"cache of layer {name} is {cache.dtype}, prefill servers send {fingerprint.dtype}")
        layout = probe(tuple(cache.shape), blocks=self._blocks, block_size=self._block_size,
                       heads=fingerprint.num_kv_heads, dim=fingerprint.head_dim, named=self._config.layout)
        if cache.device.type != "cpu":
            return StridedWriter(cache, layout, stream)
        if self._cpu_op is None or self._isa_of is None:
            raise LayoutError(f"cache of layer {name} is on the CPU and this vLLM has no cpu_attn_reshape_and_cache")
        return CpuPackedWriter(cache, layout, self._cpu_op, self._isa_of(name))

    def _destination(self, layout: KvLayout, block_ids: tuple[int, ...]) -> PagedDestination:
        difference = self._fingerprint.check_layout(layout)
        if difference:
            raise ModelMismatchError(difference, grpc.StatusCode.FAILED_PRECONDITION)
        return PagedDestination(layout, self._writers, block_ids, self._block_size)
