#!/usr/bin/env python3
"""Writes a Hugging Face directory with random weights in the shape of a known model, for timing only.

The indexer is random too (its weights_id fits), so that the cost of VSPrefill is the real one while its
selection means nothing: force the budget, e.g. --set threshold=0 --set max_density=0.05, and say so.

  bench/make_random_model.py --shape llama-3.1-8b --out /tmp/llama-8b
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "client/python/vsprefill"))
import identity  # noqa: E402  (the file alone: no protobuf needed here)

SHAPES = {
    "llama-3.1-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=8192),
    ),
    "tiny": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=1000, max_position_embeddings=4096, rope_theta=10000.0, rope_scaling=None,
    ),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--indexer_hidden", type=int, default=1024)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where random numbers are made")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    torch.manual_seed(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rms_norm_eps=1e-5,
        torch_dtype="bfloat16", tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        bos_token_id=0, eos_token_id=1, **shape,
    )  # fmt: skip
    (arguments.out / "config.json").write_text(json.dumps(config, indent=1))

    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head

    def random_matrix(rows, columns):
        return (torch.randn(rows, columns, device=arguments.device, dtype=torch.bfloat16) * columns**-0.5).cpu()

    layers = shape["num_hidden_layers"]
    weight_map = {}
    for layer in range(-1, layers):
        if layer < 0:
            tensors = {
                "model.embed_tokens.weight": random_matrix(shape["vocab_size"], hidden),
                "lm_head.weight": random_matrix(shape["vocab_size"], hidden),
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            }
        else:
            prefix = f"model.layers.{layer}."
            sizes = dict(
                [("self_attn.q_proj", (q, hidden)), ("self_attn.k_proj", (kv, hidden)),
                 ("self_attn.v_proj", (kv, hidden)), ("self_attn.o_proj", (hidden, q)),
                 ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)),
                 ("mlp.down_proj", (hidden, inner))]
            )  # fmt: skip
            tensors = {f"{prefix}{name}.weight": random_matrix(*size) for name, size in sizes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        name = f"model-{layer + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, arguments.out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        print(f"\rmake_random_model: {layer + 2} of {layers + 1} files", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))

    groups, width = shape["num_key_value_heads"], arguments.indexer_hidden
    indexer = {}
    for layer in range(layers):
        prefix = f"layers.{layer}."
        indexer[prefix + "w1"] = (torch.randn(groups, width, 2 * head) * (2 * head) ** -0.5).to(torch.bfloat16)
        indexer[prefix + "b1"] = torch.zeros(groups, width)
        indexer[prefix + "w2"] = torch.randn(groups, 2, width) * width**-0.5
        indexer[prefix + "b2"] = torch.zeros(groups, 2)
        indexer[prefix + "slash_prior"] = torch.zeros(groups, 128)
    save_file(
        indexer, arguments.out / "indexer.safetensors",
        metadata=dict(format="vsprefill-indexer-1", weights_id=identity.weights_id(arguments.out), hidden=str(width)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
