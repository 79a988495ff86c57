"""weights_id and kv_id: the two identities of a model, computed as the C++ server computes them.

weights_id names the weights however they are sharded; an indexer is bound to it. kv_id names the KV
cache that a server makes (weights, shape, rope, KV dtype); the handshake compares it.
Test vectors: tests/golden/identities.json. Definition: docs/identities.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SAMPLED_ABOVE_BYTES = 4096
SAMPLES = 64
SAMPLE_BYTES = 64


class IdentityError(ValueError):
    """A model directory whose identity cannot be computed."""


def safetensors_files(model_dir: str | Path) -> list[Path]:
    """The weight files of a Hugging Face directory, in sorted order."""
    model_dir = Path(model_dir)
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(model_dir / name for name in names)
    single = model_dir / "model.safetensors"
    if not single.exists():
        raise IdentityError(f"{model_dir} holds neither {single.name} nor {index.name}")
    return [single]


def _headers(files: Iterable[Path]) -> Iterator[tuple[str, str, list[int], Path, int, int]]:
    """Yields (name, dtype, shape, file, offset of the data, bytes) of every tensor."""
    for path in files:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size - 8:
                raise IdentityError(f"{path}: header of {size} bytes in a file of {path.stat().st_size}")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, entry["dtype"], entry["shape"], path, 8 + size + begin, end - begin


def weights_id_of_files(files: Iterable[str | Path]) -> str:
    """SHA-256 (hex) over the tensors, sorted by the bytes of their names; see docs/identities.md."""
    tensors = sorted(_headers([Path(f) for f in files]), key=lambda t: t[0].encode())
    digest = hashlib.sha256()
    for name, dtype, shape, path, offset, size in tensors:
        digest.update(name.encode() + b"\0" + dtype.encode() + b"\0")
        digest.update(",".join(str(n) for n in shape).encode() + b"\0")
        with open(path, "rb") as file:
            if size <= SAMPLED_ABOVE_BYTES:
                file.seek(offset)
                digest.update(file.read(size))
                continue
            for i in range(SAMPLES):
                file.seek(offset + i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def weights_id(model_dir: str | Path) -> str:
    """weights_id of a Hugging Face model directory."""
    return weights_id_of_files(safetensors_files(model_dir))


def _number(value: Any) -> str:
    return "%.17g" % float(value)


def _yarn_mscale(scale: float, mscale: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def rope_identity(config: Mapping[str, Any]) -> dict[str, str]:
    """The rope part of kv_id: every value that changes keys, as strings. `config` is config.json."""
    parameters: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    rope = {"type": kind, "theta": _number(theta)}
    if kind == "default":
        return rope
    if kind not in ("linear", "llama3", "yarn"):
        raise IdentityError(f"rope type {kind!r} not in default, linear, llama3, yarn")
    factor = float(parameters["factor"])
    rope["factor"] = _number(factor)
    if kind == "linear":
        return rope
    original: Any = parameters.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    rope["original_max_position_embeddings"] = str(int(original))
    if kind == "llama3":
        rope["low_freq_factor"] = _number(parameters["low_freq_factor"])
        rope["high_freq_factor"] = _number(parameters["high_freq_factor"])
        return rope
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
        else:
            attention_factor = _yarn_mscale(factor)
    rope["attention_factor"] = _number(attention_factor)
    rope["beta_fast"] = _number(parameters.get("beta_fast") or 32)
    rope["beta_slow"] = _number(parameters.get("beta_slow") or 1)
    rope["truncate"] = "true" if parameters.get("truncate", True) else "false"
    return rope


def kv_identity_json(config: Mapping[str, Any], weights: str, kv_dtype: str) -> str:
    """The canonical JSON that kv_id hashes. kv_dtype: "bfloat16" or "float32"."""
    if kv_dtype not in ("bfloat16", "float32"):
        raise IdentityError(f"KV dtype {kv_dtype!r} not in bfloat16, float32")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    value = {
        "head_dim": head_dim,
        "kv_dtype": kv_dtype,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "layers": config["num_hidden_layers"],
        "rope": rope_identity(config),
        "weights_id": weights,
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def kv_id(model_dir: str | Path, kv_dtype: str, weights: str | None = None) -> str:
    """kv_id of a model directory; `weights` is its weights_id where the caller has it already."""
    config = json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8"))
    text = kv_identity_json(config, weights or weights_id(model_dir), kv_dtype)
    return hashlib.sha256(text.encode()).hexdigest()
