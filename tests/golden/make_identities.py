#!/usr/bin/env python3
"""Writes the committed test vectors of weights_id and kv_id that C++ and Python must both meet.

tests/golden/identity_{single,shard_1,shard_2,f32}.safetensors: small tensors (one above the sampling
limit of 4096 bytes, an empty and a scalar one), the first three the same tensors in one file and in two.
tests/golden/identities.json:
  weights: [{files, weights_id}]
  kv:      [{config, weights_id, kv_dtype, json, kv_id}], config as in config.json
  models:  {"SmolLM2-135M-Instruct": {weights_id, kv_id_bfloat16, kv_id_float32}}
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "client/python"))

from vsprefill import identity

SHAPE = dict(hidden_size=384, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=4,
             max_position_embeddings=1024)
CONFIGS = [
    dict(SHAPE, rope_theta=10000.0, rope_scaling=None, torch_dtype="bfloat16"),
    dict(SHAPE, rope_parameters=dict(rope_type="default", rope_theta=10000.0), dtype="bfloat16"),
    dict(SHAPE, head_dim=128, rope_theta=1000000.0),
    dict(SHAPE, rope_theta=123456.789),
    dict(SHAPE, rope_theta=10000.0, rope_scaling=dict(type="linear", factor=2.5)),
    dict(SHAPE, rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                                     high_freq_factor=4.0, original_max_position_embeddings=64)),
    dict(SHAPE, rope_theta=1e6, rope_scaling=dict(rope_type="yarn", factor=4.0,
                                                  original_max_position_embeddings=256)),
    dict(SHAPE, rope_theta=1e4, rope_scaling=dict(rope_type="yarn", factor=8.0, attention_factor=1.25,
                                                  beta_fast=16, beta_slow=2, truncate=False,
                                                  original_max_position_embeddings=128)),
    dict(SHAPE, rope_theta=1e4, rope_scaling=dict(rope_type="yarn", factor=8.0, mscale=0.707,
                                                  mscale_all_dim=1.0,
                                                  original_max_position_embeddings=128)),
    {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"},
]


def make_files():
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "model.norm.weight": torch.rand(48, generator=generator).to(torch.bfloat16),
        "model.layers.10.w": torch.rand(16, 24, generator=generator).to(torch.bfloat16),
        "model.layers.2.w": torch.rand(40, 64, generator=generator).to(torch.bfloat16),
        "model.limit": torch.rand(2048, generator=generator).to(torch.float16),
        "model.scalar": torch.tensor(0.5),
        "model.empty": torch.zeros(0, 3),
    }
    save_file(tensors, HERE / "identity_single.safetensors", metadata={"format": "pt"})
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, HERE / f"identity_shard_{i}.safetensors")
    save_file({"model.layers.2.w": tensors["model.layers.2.w"].float()}, HERE / "identity_f32.safetensors")


def main():
    make_files()
    groups = [["identity_single.safetensors"], ["identity_shard_1.safetensors", "identity_shard_2.safetensors"],
              ["identity_f32.safetensors"]]
    weights = [{"files": g, "weights_id": identity.weights_id_of_files([HERE / f for f in g])} for g in groups]
    kv = []
    for config in CONFIGS:
        for dtype in ("bfloat16", "float32"):
            text = identity.kv_identity_json(config, weights[0]["weights_id"], dtype)
            kv.append({"config": config, "weights_id": weights[0]["weights_id"], "kv_dtype": dtype, "json": text,
                       "kv_id": hashlib.sha256(text.encode()).hexdigest()})
    model = ROOT / "models/SmolLM2-135M-Instruct"
    own = identity.weights_id(model)
    models = {model.name: {"weights_id": own, **{f"kv_id_{d}": identity.kv_id(model, d, own)
                                                 for d in ("bfloat16", "float32")}}}
    value = {"weights": weights, "kv": kv, "models": models}
    (HERE / "identities.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
