"""What the connector tells vLLM's log and its /metrics: vllm:vsprefill_*."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .connector import stats

_SECONDS = [.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 50, 100, 200]
_BYTES = [float(4 ** i) for i in range(8, 18)]  # 64 KiB to 16 GiB


@dataclass
class VSPrefillStats(KVConnectorStats):
    """data: as stats.empty() describes."""

    data: dict[str, Any] = field(default_factory=stats.empty)

    def reset(self) -> None:
        self.data = stats.empty()

    def aggregate(self, other: KVConnectorStats) -> VSPrefillStats:
        stats.add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return stats.summary(self.data)

    def is_empty(self) -> bool:
        return stats.is_empty(self.data)


class VSPrefillPromMetrics(KVConnectorPromMetrics):
    """Every series carries vLLM's own labels (model_name, engine) and the ones named here."""

    def __init__(self, vllm_config: Any, metric_types: dict[Any, Any], labelnames: list[str],
                 per_engine_labelvalues: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def histogram(name: str, what: str, buckets: list[float]) -> Any:
            return self._histogram_cls(name=f"vllm:vsprefill_{name}", documentation=what, buckets=buckets,
                                       labelnames=labelnames)

        def counter(name: str, what: str, *extra: str) -> Any:
            return self._counter_cls(name=f"vllm:vsprefill_{name}", documentation=what,
                                     labelnames=[*labelnames, *extra])

        self._load_seconds = histogram("load_seconds", "Load of a KV cache: from its start to its last byte.", _SECONDS)
        self._server_seconds = histogram(
            "server_seconds", "The prefill server's part of a load: in its queue and computing.", _SECONDS)
        self._handover_seconds = histogram(
            "handover_seconds", "From a load's last chunk until the scheduler can run its request.", _SECONDS)
        self._load_bytes = histogram("load_bytes", "KV bytes of a load.", _BYTES)
        self._loaded_tokens = counter("loaded_tokens", "Prompt tokens whose KV was loaded.")
        self._outcomes = counter("loads", "Loads by how they ended: loaded, failed, cancelled.", "outcome")
        self._tries = counter("tries", "Tries of loads by endpoint and gRPC code.", "endpoint", "code")
        self._local = counter(
            "local_prefills", "Prompts that the engine computed itself, by why: off, short, endpoint, parameters, "
            "unsuitable, salt.", "reason")

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for seconds, server_seconds, size, tokens in transfer_stats_data["loads"]:
            self._load_seconds.labels(*labels).observe(seconds)
            self._server_seconds.labels(*labels).observe(server_seconds)
            self._load_bytes.labels(*labels).observe(size)
            self._loaded_tokens.labels(*labels).inc(tokens)
        for seconds in transfer_stats_data["handovers"]:
            self._handover_seconds.labels(*labels).observe(seconds)
        for outcome, count in transfer_stats_data["outcomes"].items():
            self._outcomes.labels(*labels, outcome).inc(count)
        for key, count in transfer_stats_data["tries"].items():
            self._tries.labels(*labels, *key.split(" ")).inc(count)
        for reason, count in transfer_stats_data["local"].items():
            self._local.labels(*labels, reason).inc(count)
