"""The deciding half of a connector: which prompts are loaded from where, under which salt.

Lives in the engine's scheduler and only looks at attributes of its request objects (those of vLLM's Request).
Nothing here may raise because of what a caller sent: an exception would end the engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import logger, stats
from .config import ConfigError, ConnectorConfig, RequestOptions
from .loads import LoadResult, LoadSpec

PARAMS_KEY = "vsprefill"  # in a request's kv_transfer_params, and in what is returned


class Pool(Protocol):
    def ranked(self, prompt_tokens: int, options: RequestOptions) -> list[str]: ...
    def why_none(self, prompt_tokens: int, options: RequestOptions) -> str: ...
    def begin(self, address: str, tokens: int) -> None: ...
    def end(self, address: str, tokens: int) -> None: ...
    def record(self, address: str, failure: str | None, blame: bool) -> None: ...


@dataclass
class LoadMetadata:
    """What one step tells the half that owns the memory."""

    loads: list[LoadSpec] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)


@dataclass
class _Plan:
    options: RequestOptions | None  # None: computed here
    local: tuple[str, str] = ("", "")  # (label, explanation) of why it is or was computed here
    computed: int = 0  # tokens of a local prefix hit, when last asked
    spec: LoadSpec | None = None  # its load, once begun: there is one per request
    result: LoadResult | None = None
    handover_seconds: float = 0.0  # from the load's last chunk until this half knew
    salted: bool = False


class SchedulerHalf:
    """Called by the engine's scheduler thread only."""

    def __init__(self, config: ConnectorConfig, pool: Pool, kv_id: str) -> None:
        self._config = config
        self._pool = pool
        self._kv_id = kv_id
        self._plans: dict[str, _Plan] = {}
        self._loading: dict[str, _Plan] = {}  # also those whose request has ended meanwhile
        self._metadata = LoadMetadata()
        self._stats = stats.empty()

    def add(self, request: Any) -> None:
        """A request has come. Decides whether it may be loaded, and salts it where its KV will be sparse.

        The salt must be there before the engine looks into its prefix cache for the request.
        """
        try:
            plan = self._plan(request)
        except Exception:
            logger.exception("request %s is computed here", request.request_id)
            plan = _Plan(None, ("parameters", "kv_transfer_params could not be read"))
        self._plans[request.request_id] = plan
        if plan.options is not None and not plan.options.attention.exact:
            plan.salted = _salt(request, plan.options.attention.salt)
            if not plan.salted:
                plan.options, plan.local = None, ("salt", "the engine's prefix cache cannot be salted for sparse KV")

    def matched(self, request: Any, num_computed: int) -> int:
        """How many tokens behind the local hit of num_computed will be loaded. May be asked often."""
        plan = self._plans.get(request.request_id)
        if plan is None or plan.options is None or plan.spec is not None:
            return 0  # one load per request: after a failure or a preemption the engine computes
        rest = request.num_prompt_tokens - num_computed
        if rest < self._config.min_prompt_tokens:
            plan.local = ("short", f"{rest} tokens to compute, fewer than {self._config.min_prompt_tokens}")
            return 0
        if not self._pool.ranked(request.num_prompt_tokens, plan.options):
            plan.local = ("endpoint", self._pool.why_none(request.num_prompt_tokens, plan.options))
            return 0
        plan.computed = num_computed
        return int(rest)

    def allocated(self, request: Any, block_ids: Sequence[int], num_external: int) -> None:
        """The engine has made room. Begins the load of num_external tokens."""
        plan = self._plans.get(request.request_id)
        if num_external <= 0 or plan is None or plan.options is None or plan.spec is not None:
            return
        options, end = plan.options, plan.computed + num_external
        endpoints = self._pool.ranked(end, options)
        if not endpoints:  # lost since it was promised: let the load fail the ordinary way
            endpoints = [options.endpoint or self._config.endpoints[0]]
        plan.spec = LoadSpec(
            request_id=request.request_id, token_ids=tuple(request.prompt_token_ids[:end]), start_token=plan.computed,
            block_ids=tuple(block_ids), endpoints=tuple(endpoints), method=options.attention.method,
            parameters=dict(options.attention.parameters), deadline_seconds=options.deadline_seconds,
            expected_kv_id=self._kv_id, preset=options.attention.preset)
        plan.local = ("", "")
        self._pool.begin(endpoints[0], end)
        self._loading[request.request_id] = plan
        self._metadata.loads.append(plan.spec)

    def take_metadata(self) -> LoadMetadata:
        metadata, self._metadata = self._metadata, LoadMetadata()
        return metadata

    def ended(self, results: Sequence[LoadResult]) -> None:
        """Loads have ended."""
        for result in results:
            plan = self._loading.pop(result.request_id, None)
            if plan is None or plan.spec is None:
                continue
            plan.result = result
            if result.outcome == "loaded":
                plan.handover_seconds = time.monotonic() - result.last_chunk_at
                self._stats["handovers"].append(plan.handover_seconds)
            self._pool.end(plan.spec.endpoints[0], len(plan.spec.token_ids))
            if not result.tries:
                self._pool.record(plan.spec.endpoints[0], result.reason or "not tried", blame=False)
            for attempt in result.tries:
                # A deadline that a caller chose short says nothing about the server.
                hasty = attempt.code == "DEADLINE_EXCEEDED" and (
                    plan.spec.deadline_seconds < self._config.deadline_seconds)
                self._pool.record(attempt.endpoint, attempt.failure, attempt.blame and not hasty)

    def finished(self, request: Any) -> dict[str, Any] | None:
        """A request has ended. Returns what its caller is told, if it asked."""
        plan = self._plans.pop(request.request_id, None)
        if plan is None:
            return None
        if request.request_id in self._loading:
            self._metadata.cancels.append(request.request_id)
        if plan.spec is None and plan.local[0]:
            stats.count(self._stats, "local", plan.local[0])
        params = request.kv_transfer_params
        if not isinstance(params, dict) or PARAMS_KEY not in params:
            return None
        return {PARAMS_KEY: _outcome(plan)}

    def take_stats(self) -> stats.Data:
        data, self._stats = self._stats, stats.empty()
        return data

    def _plan(self, request: Any) -> _Plan:
        params = request.kv_transfer_params
        try:
            if params is not None and not isinstance(params, dict):
                raise ConfigError("kv_transfer_params is not an object")
            options = self._config.for_request((params or {}).get(PARAMS_KEY))
        except ConfigError as error:
            logger.warning("request %s is computed here: %s", request.request_id, error)
            return _Plan(None, ("parameters", str(error)))
        if options is None:
            return _Plan(None, ("off", "not asked for" if params is None else "switched off for this request"))
        why = _unsuitable(request)
        if why:
            return _Plan(None, ("unsuitable", why))
        if request.num_prompt_tokens < self._config.min_prompt_tokens:
            return _Plan(None, ("short", f"{request.num_prompt_tokens} tokens, fewer than "
                                         f"{self._config.min_prompt_tokens}"))
        return _Plan(options)


def _unsuitable(request: Any) -> str:
    """Why a prefill of this request's token ids alone is not what it needs; "" if it is."""
    if getattr(request, "pooling_params", None) is not None:
        return "pooling"
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        return "prompt given as embeddings"
    if getattr(request, "mm_features", None):
        return "multimodal input"
    if getattr(request, "lora_request", None) is not None:
        return "LoRA adapter"
    if getattr(request, "skip_reading_prefix_cache", False):
        return "prompt log-probabilities, or no prefix cache wanted: every position must be computed"
    if getattr(request, "resumable", False):
        return "input that is still streaming in"
    return ""


def _salt(request: Any, salt: str) -> bool:
    """Puts `salt` into the request's cache salt, so that only requests with the same one share its blocks.

    The hashes of its blocks were made when it came; they are made anew. False where the engine has no such thing.
    """
    if not hasattr(request, "cache_salt"):
        return False
    before = list(getattr(request, "block_hashes", ()))
    own = request.cache_salt
    request.cache_salt = f"{own}|{salt}" if own else salt
    if not before:
        # No full block or no prefix cache: nothing was hashed. Later hashes use the salt.
        return hasattr(request, "block_hashes")
    if not hasattr(request, "update_block_hashes"):
        request.cache_salt = own
        return False
    request.block_hashes.clear()
    request.update_block_hashes()
    if len(request.block_hashes) != len(before) or request.block_hashes[0] == before[0]:
        request.cache_salt = own
        request.block_hashes[:] = before
        return False
    return True


def _outcome(plan: _Plan) -> dict[str, Any]:
    if plan.spec is None:
        return {"source": "local", "reason": plan.local[1]}
    result = plan.result
    if result is None or result.outcome != "loaded":
        return {"source": "local", "reason": f"load {result.outcome}: {result.reason}" if result else "load not ended"}
    return {"source": "remote", "endpoint": result.tries[-1].endpoint, "method": result.method,
            "start_token": plan.spec.start_token, "tokens": result.tokens, "bytes": result.bytes,
            "seconds": round(result.seconds, 6), "server_seconds": round(result.server_seconds, 6),
            "handover_seconds": round(plan.handover_seconds, 6), "density": round(result.density, 6),
            "salted": plan.salted}
