"""KV connector for vLLM 0.32 and later: prompts are prefilled by vsprefill-server, decoded here.

    python -m vllm.entrypoints.openai.api_server --model DIR --kv-transfer-config '{
        "kv_connector": "VSPrefillConnector", "kv_connector_module_path": "vsprefill.vllm_connector",
        "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"endpoints": ["127.0.0.1:8470"]}}'

This file only adapts: vLLM's hooks on one side, vsprefill.connector on the other. vLLM makes one object in the
scheduler's process and one in the worker's; they share nothing but the metadata of each step. What differs
between versions is found by looking for the attribute, not by version. Guide: docs/decode_with_vllm.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (KVConnectorBase_V1, KVConnectorMetadata,
                                                               KVConnectorRole, KVConnectorWorkerMetadata)

from .connector.config import ConfigError, ConnectorConfig
from .connector.endpoints import EndpointPool
from .connector.fingerprint import Fingerprint
from .connector.loads import LoadResult
from .connector.scheduler import LoadMetadata, SchedulerHalf
from .vllm_metrics import VSPrefillPromMetrics, VSPrefillStats

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
except ImportError:  # older: get_finished and get_block_ids_with_load_errors say it all
    KVConnectorTransferResults = None


@dataclass
class VSPrefillMetadata(KVConnectorMetadata):
    """Scheduler to worker, every step."""

    step: LoadMetadata = field(default_factory=LoadMetadata)


@dataclass
class VSPrefillWorkerMetadata(KVConnectorWorkerMetadata):
    """Worker to scheduler: loads that ended in this step."""

    results: list[LoadResult] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> VSPrefillWorkerMetadata:
        return VSPrefillWorkerMetadata([*self.results, *other.results])


def model_fingerprint(vllm_config: Any, kv_id: str) -> Fingerprint:
    """What KV this engine needs. Raises ConfigError, naming the setting, for engines that are not supported."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size",
                 "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise ConfigError(f"{name} {getattr(parallel, name)}: VSPrefillConnector supports 1 only")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype {dtype}: prefill servers send bfloat16 or float32 (--dtype)")
    if str(cache.cache_dtype) not in ("auto", dtype):
        raise ConfigError(f"kv_cache_dtype {cache.cache_dtype}: VSPrefillConnector supports auto only, here {dtype}")
    if getattr(model, "quantization", None):
        raise ConfigError(f"quantization {model.quantization}: prefill servers compute with the unquantised weights")
    if getattr(model, "use_mla", False):
        raise ConfigError("multi-head latent attention: prefill servers send K and V of each head")
    path = Path(model.model)
    if not path.is_dir() and not kv_id:
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    config = getattr(model, "hf_text_config", None) or model.hf_config
    return Fingerprint.of_model(path, config.to_dict(), dtype, kv_id)


def check_cache_groups(kv_cache_config: Any) -> int:
    """The engine's block size. Raises ConfigError for models whose layers do not all keep all tokens."""
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(g.kv_cache_spec).__name__ for g in groups})
    if len(groups) != 1 or kinds != ["FullAttentionSpec"]:
        raise ConfigError(f"KV cache groups {', '.join(kinds)}: VSPrefillConnector supports models whose layers all "
                          "have full attention (no hybrid, sliding-window or state-space layers)")
    if getattr(groups[0].kv_cache_spec, "sliding_window", None):
        raise ConfigError("sliding-window attention: VSPrefillConnector supports full attention only")
    return int(groups[0].kv_cache_spec.block_size)


class VSPrefillConnector(KVConnectorBase_V1):
    """See the module. Raises ConfigError (a ValueError) at start for settings and models it cannot serve."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_role == "kv_producer":
            raise ConfigError("kv_role kv_producer: VSPrefillConnector only receives; use kv_consumer")
        config = ConnectorConfig.parse(transfer.kv_connector_extra_config)
        fingerprint = model_fingerprint(vllm_config, config.kv_id)
        block_size = check_cache_groups(kv_cache_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: Any = None
        self._pool: EndpointPool | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._pool = EndpointPool(config, fingerprint)
            self._pool.start()
            self._scheduler = SchedulerHalf(config, self._pool, fingerprint.kv_id)
        else:
            from .connector.worker import WorkerHalf  # torch, only where it is needed

            self._worker = WorkerHalf(config, fingerprint, blocks=kv_cache_config.num_blocks, block_size=block_size,
                                      cpu_op=_cpu_op(), isa_of=_isa_of(vllm_config))

    # Scheduler half.

    def on_new_request(self, request: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        assert self._scheduler is not None
        tokens = self._scheduler.matched(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        if num_external_tokens > 0:  # 0: the second call, when the load is done
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> VSPrefillMetadata:
        assert self._scheduler is not None
        return VSPrefillMetadata(self._scheduler.take_metadata())

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        metadata = connector_output.kv_connector_worker_meta
        if isinstance(metadata, VSPrefillWorkerMetadata):
            self._scheduler.ended(metadata.results)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return False, self._scheduler.finished(request)

    # Worker half.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        if isinstance(metadata, VSPrefillMetadata):
            # Without attention metadata there is no forward pass: everybody waits for KV.
            self._worker.step(metadata.step, idle=getattr(forward_context, "attn_metadata", ()) is None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass  # a request runs only after its load has ended

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass  # receives only

    def wait_for_save(self) -> None:
        pass

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        ended, _ = self._worker.finished()
        return None, ended or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        # Failed loads are named by their blocks, not in failed_recving: a local prefix hit before them stays valid.
        ended, _ = self._worker.finished()
        return KVConnectorTransferResults(finished_recving=ended)

    def get_block_ids_with_load_errors(self) -> set[int]:
        # The runner asks after get_transfer_results in the same step, so ids and blocks go together.
        blocks: set[int] = self._worker.bad_blocks()
        return blocks

    def build_connector_worker_meta(self) -> VSPrefillWorkerMetadata | None:
        results = self._worker.take_results()
        return VSPrefillWorkerMetadata(results) if results else None

    # Both.

    def get_kv_connector_stats(self) -> VSPrefillStats | None:
        half = self._scheduler or self._worker
        collected = VSPrefillStats(half.take_stats())
        return None if collected.is_empty() else collected

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._pool is not None:
            self._pool.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> VSPrefillStats:
        return VSPrefillStats(data) if data is not None else VSPrefillStats()

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, metric_types: dict[Any, Any], labelnames: list[str],
                           per_engine_labelvalues: dict[int, list[object]]) -> VSPrefillPromMetrics:
        return VSPrefillPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


if KVConnectorTransferResults is None:
    del VSPrefillConnector.get_transfer_results


def _cpu_op() -> Callable[..., None] | None:
    """vLLM's op that packs K for its CPU attention kernels."""
    from vllm import _custom_ops

    op: Callable[..., None] | None = getattr(_custom_ops, "cpu_attn_reshape_and_cache", None)
    return op


def _isa_of(vllm_config: Any) -> Callable[[str], str]:
    """The instruction set that a layer's CPU attention packs for: what its implementation says, never a guess."""

    def isa(layer_name: str) -> str:
        layer = vllm_config.compilation_config.static_forward_context[layer_name]
        for holder in (layer, getattr(layer, "impl", None)):
            found = getattr(holder, "isa", None)
            if isinstance(found, str):
                return found
        raise ConfigError(f"layer {layer_name}: no isa on {type(layer).__name__} or its implementation; its KV cannot "
                          "be packed")

    return isa
