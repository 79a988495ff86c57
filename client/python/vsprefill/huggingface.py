"""Hands a KvCache to Hugging Face transformers (5.17 or newer) for generation.

The cache given to generate() must be shorter than the ids by at least one: with an exact-length cache
transformers feeds the whole prompt again and the tokens are silently wrong. So either append the first
token (the server computed it, greedily; generate_inputs does so), or crop the cache and let the last prompt
token be computed again (first_token=False; right for sampling).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    import transformers

    from .kv_cache import Array, KvCache


def _tensor(array: Array, dtype_name: str, device: Any, dtype: torch.dtype | None) -> torch.Tensor:
    import torch

    if dtype_name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.unsqueeze(0).to(device=device, dtype=dtype or tensor.dtype)


def _check(kv: KvCache, config: Any) -> None:
    """Raises ValueError, naming both values, where the cache cannot be one of this model."""
    layout = kv.layout
    if layout.start_token != 0:
        raise ValueError(f"tokens before {layout.start_token} are missing (start_token): no complete cache")
    heads = config.num_attention_heads
    for name, have, want in (
        ("layers", layout.num_layers, config.num_hidden_layers),
        ("KV heads", layout.num_kv_heads, getattr(config, "num_key_value_heads", None) or heads),
        ("head_dim", layout.head_dim, getattr(config, "head_dim", None) or config.hidden_size // heads),
    ):
        if have != want:
            raise ValueError(f"config has {name} {want}, the cache {have}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"layer types {sorted(kinds)}: only full_attention caches can be filled")


def to_dynamic_cache(kv: KvCache, config: Any, *, device: Any = "cpu", dtype: torch.dtype | None = None,
                     tokens: int | None = None) -> transformers.DynamicCache:
    """A DynamicCache of a KvCache, batch size 1.

    config: the model's transformers config. dtype: torch dtype, default the KV dtype.
    tokens: keep only the first `tokens` positions; len(prompt) - 1 lets generate() take the prompt's ids.
    Raises ValueError for a cache of another shape or without its beginning.
    """
    from transformers import DynamicCache

    _check(kv, config)
    layout = kv.layout
    tokens = layout.tokens if tokens is None else tokens
    if not 0 <= tokens <= layout.tokens:
        raise ValueError(f"tokens {tokens} not in [0, {layout.tokens}]")
    cache = DynamicCache(config=config)
    for layer in range(layout.num_layers):
        k, v = (_tensor(a[layer], layout.dtype, device, dtype)[:, :, :tokens] for a in (kv.keys, kv.values))
        cache.update(k, v, layer)
    return cache


def generate_inputs(kv: KvCache, config: Any, *, first_token: bool = True, device: Any = "cpu",
                    dtype: torch.dtype | None = None) -> dict[str, Any]:
    """input_ids, attention_mask and past_key_values for model.generate().

    first_token: append the server's greedy token to the ids, so ask for one new token fewer. False: the prompt
    alone, whose last position the model computes again; for sampling, and for a prompt of two tokens or more.
    """
    import torch

    ids = [*kv.token_ids, kv.first_token] if first_token else list(kv.token_ids)
    if len(ids) < 2:
        raise ValueError("a prompt of one token has no cache to start from without its first token")
    cache = to_dynamic_cache(kv, config, device=device, dtype=dtype, tokens=len(ids) - 1)
    input_ids = torch.tensor([ids], device=device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "past_key_values": cache}


def generate(model: Any, kv: KvCache, *, max_new_tokens: int, **kwargs: Any) -> list[int]:
    """The new tokens (the server's first token included, EOS too) that `model` decodes from the cache.

    Greedy unless kwargs (those of model.generate) say do_sample=True, in which case the model computes and
    samples the first token itself.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} not >= 1")
    sample = bool(kwargs.setdefault("do_sample", False))
    placement = {"device": model.device, "dtype": model.dtype}
    prompt = len(kv.token_ids)
    if sample:
        out = model.generate(**generate_inputs(kv, model.config, first_token=False, **placement),
                             max_new_tokens=max_new_tokens, **kwargs)
        return [int(t) for t in out[0, prompt:]]
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, (list, tuple)) else [eos])
    if max_new_tokens == 1 or kv.first_token in ends:
        return [kv.first_token]
    out = model.generate(**generate_inputs(kv, model.config, **placement), max_new_tokens=max_new_tokens - 1, **kwargs)
    return [int(t) for t in out[0, prompt:]]
