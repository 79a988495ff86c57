"""weights_id and kv_id against the committed vectors."""

import hashlib
import json
from pathlib import Path

import pytest
from vsprefill import identity

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
VECTORS = json.loads((GOLDEN / "identities.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["weights"], ids=lambda v: v["files"][0])
def test_weights_id(vector):
    assert identity.weights_id_of_files([GOLDEN / f for f in vector["files"]]) == vector["weights_id"]


def test_sharding_does_not_matter_but_dtype_does():
    single, shards, other = (v["weights_id"] for v in VECTORS["weights"])
    assert single == shards != other


@pytest.mark.parametrize("vector", VECTORS["kv"], ids=lambda v: v["kv_id"][:8])
def test_kv_id(vector):
    text = identity.kv_identity_json(vector["config"], vector["weights_id"], vector["kv_dtype"])
    assert text == vector["json"]
    assert hashlib.sha256(text.encode()).hexdigest() == vector["kv_id"]


def test_both_config_styles_mean_the_same(fixtures_dir):
    for name in ("llama", "llama-llama3", "llama-linear", "qwen3"):
        one, other = (identity.kv_id(fixtures_dir / n, "bfloat16") for n in (name, name + "-v4"))
        assert one == other, name
    assert identity.kv_id(fixtures_dir / "llama", "bfloat16") != identity.kv_id(fixtures_dir / "llama", "float32")
    assert identity.weights_id(fixtures_dir / "llama") == identity.weights_id(fixtures_dir / "llama-sharded")


def test_default_model(model_dir):
    expected = VECTORS["models"]["SmolLM2-135M-Instruct"]
    assert identity.weights_id(model_dir) == expected["weights_id"]
    for dtype in ("bfloat16", "float32"):
        assert identity.kv_id(model_dir, dtype) == expected["kv_id_" + dtype]


def test_what_cannot_be_identified_is_named(tmp_path):
    with pytest.raises(identity.IdentityError, match="longrope"):
        identity.rope_identity({"rope_scaling": {"type": "longrope", "factor": 2.0}})
    with pytest.raises(identity.IdentityError, match="float8"):
        identity.kv_identity_json({}, "", "float8")
    with pytest.raises(identity.IdentityError, match="neither"):
        identity.weights_id(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(identity.IdentityError, match="header of"):
        identity.weights_id(tmp_path)
