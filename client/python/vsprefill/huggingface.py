"""Hands a KvCache to Hugging Face transformers (5.17 or newer) for generation.

The cache given to generate() must be shorter than the ids by at least one: with an exact-length cache
transformers feeds the whole prompt again and the tokens are silently wrong. So either append the first
token (the server computed it; generate_inputs does so), or crop the cache and let the last prompt
token be computed again.
"""

import numpy as np


def _tensor(array, dtype_name, device, dtype):
    import torch

    if dtype_name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.unsqueeze(0).to(device=device, dtype=dtype or tensor.dtype)


def to_dynamic_cache(kv, config, *, device="cpu", dtype=None, tokens=None):
    """A DynamicCache of a KvCache, batch size 1.

    config: the model's transformers config. dtype: torch dtype, default the KV dtype.
    tokens: keep only the first `tokens` positions; len(prompt) - 1 lets generate() take the prompt's ids.
    """
    from transformers import DynamicCache

    layout = kv.layout
    if layout.start_token != 0:
        raise ValueError(f"tokens before {layout.start_token} are missing (start_token): no complete cache")
    if config.num_hidden_layers != layout.num_layers:
        raise ValueError(f"config has {config.num_hidden_layers} layers, the cache {layout.num_layers}")
    tokens = layout.tokens if tokens is None else tokens
    if not 0 <= tokens <= layout.tokens:
        raise ValueError(f"tokens {tokens} not in [0, {layout.tokens}]")
    cache = DynamicCache(config=config)
    for layer in range(layout.num_layers):
        k, v = (_tensor(a[layer], layout.dtype, device, dtype)[:, :, :tokens] for a in (kv.keys, kv.values))
        cache.update(k, v, layer)
    return cache


def generate_inputs(kv, config, *, device="cpu", dtype=None):
    """input_ids (prompt and the server's first token), attention_mask and past_key_values for generate().

    The first token is part of the ids, so ask for one new token fewer.
    """
    import torch

    ids = torch.tensor([[*kv.token_ids, kv.first_token]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "past_key_values": to_dynamic_cache(kv, config, device=device, dtype=dtype)}
