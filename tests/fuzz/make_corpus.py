#!/usr/bin/env python3
"""Writes the seeds of the fuzz corpora below tests/fuzz/corpus (deterministic)."""

import json
import math
import struct
from pathlib import Path

import xxhash

HERE = Path(__file__).resolve().parent / "corpus"


def safetensors(entries, metadata=None, header_bytes=None, data=None):
    """entries: (name, dtype, shape, begin, end)."""
    header = {} if metadata is None else {"__metadata__": metadata}
    size = 0
    for name, dtype, shape, begin, end in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        size = max(size, end)
    text = json.dumps(header, separators=(",", ":")).encode()
    length = len(text) if header_bytes is None else header_bytes
    body = bytes(i % 251 for i in range(min(size, 1 << 16))) if data is None else data
    return struct.pack("<Q", length) + text + body


def packed(tensors, metadata=None, **kwargs):
    entries, offset = [], 0
    for name, dtype, shape in tensors:
        count = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "BOOL": 1}[dtype]
        for size in shape:
            count *= size
        entries.append((name, dtype, shape, offset, offset + count))
        offset += count
    return safetensors(entries, metadata, **kwargs)


def indexer(hidden=4, layers=2, groups=2, head_dim=16, weights_id="a" * 64, **kwargs):
    tensors = []
    for i in range(layers):
        tensors += [(f"layers.{i}.w1", "BF16", [groups, hidden, 2 * head_dim]),
                    (f"layers.{i}.b1", "F32", [groups, hidden]),
                    (f"layers.{i}.w2", "F32", [groups, 2, hidden]),
                    (f"layers.{i}.b2", "F32", [groups, 2]),
                    (f"layers.{i}.slash_prior", "F32", [groups, 128])]
    tensors.append(("threshold_scale", "F32", [layers, groups]))
    metadata = {"format": "vsprefill-indexer-1", "weights_id": weights_id, "hidden": str(hidden)}
    size = sum(math.prod(t[2]) * (2 if t[1] == "BF16" else 4) for t in tensors)
    return packed(tensors, metadata, data=bytes(size), **kwargs)


def gate(gate_dim=4, layers=2, heads=4, groups=2, head_dim=8, named_dim=None, weights_id="a" * 64):
    tensors = []
    for i in range(layers):
        tensors += [(f"layers.{i}.wq", "BF16", [heads, gate_dim, head_dim]),
                    (f"layers.{i}.wk", "BF16", [groups, gate_dim, 3 * head_dim])]
    metadata = {"format": "vsprefill-seer-gate-1", "weights_id": weights_id,
                "gate_dim": str(gate_dim) if named_dim is None else named_dim}
    return packed(tensors, metadata, data=bytes(sum(2 * math.prod(t[2]) for t in tensors)))


LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64, intermediate_size=128,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
             max_position_embeddings=512, rms_norm_eps=1e-5, hidden_act="silu", eos_token_id=[1, 2])
QWEN3 = dict(LLAMA, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32,
             layer_types=["full_attention"] * 2, use_sliding_window=False, sliding_window=None)
QWEN2 = dict(LLAMA, architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=True,
             sliding_window=4096, max_window_layers=2)

CONFIG = {
    "llama_v4": dict(LLAMA, rope_theta=10000.0, rope_scaling=None, torch_dtype="bfloat16"),
    "llama_v5": dict(LLAMA, rope_parameters=dict(rope_type="default", rope_theta=1e5), dtype="bfloat16"),
    "llama3": dict(LLAMA, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                            high_freq_factor=4.0, original_max_position_embeddings=128)),
    "linear": dict(LLAMA, rope_scaling=dict(type="linear", factor=2.0)),
    "yarn": dict(LLAMA, rope_scaling=dict(type="yarn", factor=None, beta_fast=32, beta_slow=1, mscale=1.0,
                                          mscale_all_dim=0.5, truncate=False,
                                          original_max_position_embeddings=128)),
    "qwen3": QWEN3,
    "qwen2_window": QWEN2,
    "quantised": dict(LLAMA, quantization_config=dict(quant_method="gptq")),
    "longrope": dict(LLAMA, rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=[1.0])),
    "huge": dict(LLAMA, hidden_size=2**63, vocab_size=2**64 - 1, num_hidden_layers=1e300),
    "wrong_types": dict(LLAMA, hidden_size="64", architectures={}, eos_token_id={"a": []}),
}
SAFETENSORS = {
    "empty": safetensors([]),
    "two": packed([("a", "F32", [2, 3]), ("b", "BF16", [4])], {"format": "pt"}),
    "half_and_scalar": packed([("h", "F16", [5]), ("s", "F32", []), ("z", "F32", [0, 3])]),
    "integers": packed([("i", "I64", [2]), ("o", "BOOL", [3])]),
    "large": packed([("w", "BF16", [60, 60])]),
    "header_2_63": packed([("a", "F32", [2])], header_bytes=2**63),
    "header_past_end": packed([("a", "F32", [2])], header_bytes=1000),
    "overlap": safetensors([("a", "F32", [2], 0, 8), ("b", "F32", [2], 4, 12)]),
    "hole": safetensors([("a", "F32", [1], 0, 4), ("b", "F32", [1], 8, 12)]),
    "reversed": safetensors([("a", "F32", [1], 8, 4)]),
    "overflow": safetensors([("a", "F32", [2**32, 2**32], 0, 4)]),
    "wrong_dtype": safetensors([("a", "F31", [1], 0, 4)]),
    "truncated": packed([("a", "F32", [64])])[:-17],
    "duplicate": struct.pack("<Q", 111) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                 b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   ' + bytes(4),
    "deep": struct.pack("<Q", 4000) + b'{"a":' * 800,
    "metadata": safetensors([], {"a": "b\n\x7f", "\x00": ""}),
}
INDEXER = {
    "good": indexer(),
    "wide": indexer(hidden=32),
    "one_layer": indexer(layers=1),
    "three_layers": indexer(layers=3),
    "other_heads": indexer(head_dim=32),
    "strange_id": indexer(weights_id="line\nbreak\x01"),
    "no_metadata": packed([("layers.0.w1", "BF16", [2, 4, 32])]),
    "truncated": indexer()[:-100],
}
GATE = {
    "good": gate(),
    "wide": gate(gate_dim=16),
    "one_layer": gate(layers=1),
    "three_layers": gate(layers=3),
    "other_heads": gate(heads=2),
    "odd_dim": gate(gate_dim=3),
    "strange_dim": gate(named_dim="4\n"),
    "huge_dim": gate(named_dim="99999999999999999999"),
    "strange_id": gate(weights_id="line\nbreak\x01"),
    "an_indexer": indexer(),
    "truncated": gate()[:-100],
}


def varint(value):
    out = b""
    while value > 0x7f:
        out += bytes([value & 0x7f | 0x80])
        value >>= 7
    return out + bytes([value])


def kv_message(layer, begin, end, payload=None, checksum=None, tail=b""):
    """A PrefillEvent with a KV chunk, for the cache of kv_chunk_fuzz.cc: 8 bytes a token and layer."""
    payload = bytes((layer + i) % 64 for i in range(8 * (end - begin))) if payload is None else payload
    checksum = xxhash.xxh3_64_intdigest(payload) if checksum is None else checksum
    body = (b"\x08" + varint(layer) + b"\x10" + varint(begin) + b"\x18" + varint(end)
            + b"\x21" + struct.pack("<Q", checksum) + tail + b"\x7a" + varint(len(payload)) + payload)
    return b"\x12" + varint(len(body)) + body


def messages(*parts):
    return b"".join(struct.pack("<H", len(m)) + m for m in parts)


WHOLE = [kv_message(0, 1, 4), kv_message(1, 1, 4), kv_message(1, 4, 6), kv_message(0, 4, 6)]
KV_CHUNKS = {
    "whole": messages(*WHOLE),
    "overlap": messages(*WHOLE, kv_message(0, 3, 5)),
    "checksum": messages(kv_message(0, 1, 6, checksum=1)),
    "short": messages(kv_message(0, 1, 6, payload=b"x" * 39)),
    "layer": messages(kv_message(2, 1, 6), kv_message(1 << 40, 1, 6)),
    "range": messages(kv_message(0, 0, 2), kv_message(0, 5, 7), kv_message(0, 2**63 - 1, 2**63 - 1)),
    "unknown": messages(kv_message(0, 1, 6, tail=b"\xa0\x06\x05")),
    "two": messages(WHOLE[0] + WHOLE[1], b"\x1a\x02\x08\x07", b"", b"\x12"),
}
IDS = {
    "plain": b"[1, 2, 3]\n", "space": b" [\n0 ,\t2147483647\r\n] ", "empty": b"[]",
    "float": b"[1.5]", "negative": b"[-1]", "large": b"[99999999999999999999]", "text": b'["\x01\xff"]',
    "nested": b"[[1]]", "zero": b"[01]", "behind": b"[1] 2",
}


def main():
    for kind, seeds in (("config", {k: json.dumps(v).encode() for k, v in CONFIG.items()}),
                        ("safetensors", SAFETENSORS), ("indexer", INDEXER), ("seer_gate", GATE),
                        ("kv_chunk", KV_CHUNKS), ("ids", IDS)):
        folder = HERE / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (folder / f"seed_{name}").write_bytes(data)
    (HERE / "config" / "seed_generation").write_bytes(
        json.dumps(LLAMA).encode() + b"\0" + b'{"eos_token_id": [7, 8]}')


if __name__ == "__main__":
    main()
