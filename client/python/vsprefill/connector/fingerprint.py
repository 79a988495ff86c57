"""Does a server's KV belong to the engine's model? Says in one line what does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import identity
from ..kv_cache import KvLayout
from ..v1 import kv_pb2, prefill_pb2

_DTYPES = {kv_pb2.KV_DTYPE_BFLOAT16: "bfloat16", kv_pb2.KV_DTYPE_FLOAT32: "float32"}


@dataclass(frozen=True)
class Fingerprint:
    """The engine's side. dtype: "bfloat16" or "float32". weights_id: "" where only kv_id is known."""

    kv_id: str
    weights_id: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of_model(cls, model_dir: str | Path, config: Mapping[str, Any], dtype: str, kv_id: str = "") -> Fingerprint:
        """config: as the engine uses it (config.json with overrides). kv_id: skips the files.

        Raises identity.IdentityError where model and dtype have no identity (docs/identities.md).
        """
        heads = config["num_attention_heads"]
        shape = {"num_layers": config["num_hidden_layers"],
                 "num_kv_heads": config.get("num_key_value_heads") or heads,
                 "head_dim": config.get("head_dim") or config["hidden_size"] // heads, "dtype": dtype}
        if kv_id:
            return cls(kv_id=kv_id, weights_id="", **shape)
        weights = identity.weights_id(model_dir)
        text = identity.kv_identity_json(config, weights, dtype)
        assert json.loads(text)["weights_id"] == weights
        return cls(kv_id=hashlib.sha256(text.encode()).hexdigest(), weights_id=weights, **shape)

    def difference(self, info: prefill_pb2.ModelInfo) -> str | None:
        """What a server's model has otherwise, in one line; None: the same KV."""
        layout = info.layout
        parts = [f"{name} {theirs} there, {ours} here" for name, theirs, ours in (
            ("layers", layout.num_layers, self.num_layers),
            ("KV heads", layout.num_kv_heads, self.num_kv_heads),
            ("head_dim", layout.head_dim, self.head_dim),
            ("KV dtype", _DTYPES.get(layout.dtype, str(layout.dtype)), self.dtype),
        ) if theirs != ours]
        if self.weights_id and info.weights_id != self.weights_id:
            parts.append(f"weights {info.weights_id[:12] or 'unnamed'} there, {self.weights_id[:12]} here")
        if not parts and layout.kv_id != self.kv_id:
            parts.append(f"{'rope' if self.weights_id else 'weights or rope'}: kv_id {layout.kv_id[:12] or 'none'} "
                         f"there, {self.kv_id[:12]} here")
        return "; ".join(parts) or None

    def check_layout(self, layout: KvLayout) -> str | None:
        """As difference(), for the layout that a prefill was accepted with."""
        ours = (self.num_layers, self.num_kv_heads, self.head_dim, self.dtype, self.kv_id)
        theirs = (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.dtype, layout.kv_id)
        return None if ours == theirs else f"layout {theirs}, expected {ours}"
