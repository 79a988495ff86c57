"""bench/replay_transformer.cc: the server without compute still speaks for the model, and the comparison runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import vsprefill
from conftest import ROOT
from servers import BIN, binary, start_server
from vsprefill import identity


@pytest.mark.parametrize("dtype,name", [("bf16", "bfloat16"), ("fp32", "float32")])
def test_replay_server_sends_a_whole_finite_cache_of_the_model(model_dir, dtype, name):
    ids = list(range(3000))  # two chunks per layer
    with start_server(model_dir, "--dtype", dtype, program="replay-server") as server:
        with vsprefill.PrefillClient(server.address) as client:
            first = client.prefill(ids, expected_kv_id=identity.kv_id(model_dir, name), timeout=120)
            again = client.prefill(ids, stripes=2, timeout=120)
            other = client.prefill(ids[:500], timeout=120)
    assert (first.layout.dtype, first.layout.tokens, other.layout.tokens, first.first_token) == (name, 3000, 500, 0)
    for layer in range(first.layout.num_layers):
        keys, values = first.float32(layer)
        assert np.abs(keys).max() <= 2 and np.abs(values).max() <= 2 and keys.std() > 0.5
        assert np.array_equal(first.keys[layer], again.keys[layer])
        assert np.array_equal(first.values[layer], again.values[layer])


@pytest.mark.long
def test_client_compare(model_dir, tmp_path):
    binary("client_bench")
    done = subprocess.run([sys.executable, ROOT / "bench/client_compare.py", "--tokens", "500", "--stripes", "1,2",
                           "--runs", "2", "--bin", BIN, "--model", model_dir, "--json", tmp_path / "out.json"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    token_bytes = 30 * 2 * 3 * 64 * 2
    assert [(r["bytes"], r["stripes"], len(r["runs"])) for r in rows] == [(500 * token_bytes, 1, 2),
                                                                         (500 * token_bytes, 2, 2)]
