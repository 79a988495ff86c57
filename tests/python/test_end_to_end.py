"""A remote dense prefill decodes like transformers.generate, token for token (float32, CPU).

Ten real prompts of 1 to 7,000 tokens; expected tokens: tests/golden/make_expected_tokens.py. Two ways:
the decode worker vsprefill-decode, and transformers with a DynamicCache filled by the Python client.
"""

import json
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import vsprefill
from servers import ROOT, binary, start_server
from vsprefill import identity
from vsprefill.connector.config import SERVER_PRESETS

sys.path.insert(0, str(ROOT / "deploy/local"))

NEW_TOKENS = 64
EXPECTED_FILE = ROOT / "models/expected_tokens.json"
NUM_PROMPTS = 10
LONG = {8, 9}  # 6,608 and 7,000 tokens


def numbers():
    return [pytest.param(i, marks=[pytest.mark.long] if i in LONG else []) for i in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def prompts():
    values = json.loads(EXPECTED_FILE.read_text())["prompts"]
    assert len(values) == NUM_PROMPTS
    assert len(values[0]["ids"]) == 1 and len(values[-1]["ids"]) == 7000
    return values


@pytest.fixture(scope="module")
def server(model_dir):
    with start_server(model_dir, "--dtype", "fp32", "--method", "dense", "--chunk_tokens", "1024") as running:
        yield running


@pytest.fixture(scope="module")
def model(model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.mark.parametrize("i", numbers())
def test_decode_worker(server, prompts, model_dir, tmp_path, i):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(prompts[i]["ids"]))
    done = subprocess.run([binary("vsprefill-decode"), "--model", str(model_dir), "--prefill", server.address,
                           "--ids", str(ids), "--max_new_tokens", str(NEW_TOKENS), "--dtype", "fp32",
                           "--device", "cpu", "--method", "dense", "--json"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == prompts[i]["tokens"]


@pytest.mark.parametrize("i", numbers())
def test_dynamic_cache(server, prompts, model, model_dir, i):
    prompt = prompts[i]
    with vsprefill.PrefillClient(server.address) as client:
        kv = client.prefill(prompt["ids"], method="dense", timeout=600, stripes=1 + i % 3,
                            expected_kv_id=identity.kv_id(model_dir, "float32"))
    tokens = [kv.first_token]
    if kv.first_token != model.config.eos_token_id:
        out = model.generate(**kv.generate_inputs(model.config), max_new_tokens=NEW_TOKENS - 1, do_sample=False)
        tokens = out[0, len(prompt["ids"]):].tolist()
    assert tokens == prompt["tokens"]


def test_dynamic_cache_cropped(server, prompts, model):
    """The other way around the exact-length trap: one token fewer in the cache, the prompt's own ids."""
    import torch

    prompt = prompts[5]
    with vsprefill.PrefillClient(server.address) as client:
        kv = client.prefill(prompt["ids"], method="dense", timeout=600)
    ids = torch.tensor([prompt["ids"]])
    cache = kv.to_dynamic_cache(model.config, tokens=len(prompt["ids"]) - 1)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                         max_new_tokens=NEW_TOKENS, do_sample=False)
    assert out[0, len(prompt["ids"]):].tolist() == prompt["tokens"]


def test_cache_equals_transformers(server, model_dir, fixtures_dir):
    from safetensors.numpy import load_file

    expected = load_file(fixtures_dir / "smollm2/expected.safetensors")
    ids = expected["ids"].tolist()
    with vsprefill.PrefillClient(server.address) as client:
        kv = client.prefill(ids, method="dense", want_logits=True, timeout=600)
        tail = client.prefill(ids, method="dense", start_token=500, timeout=600)
    for layer in range(kv.layout.num_layers):
        k, v = kv.float32(layer)
        np.testing.assert_allclose(k, expected[f"layers.{layer}.k"], atol=1e-3, rtol=0)
        np.testing.assert_allclose(v, expected[f"layers.{layer}.v"], atol=1e-3, rtol=0)
        np.testing.assert_array_equal(tail.keys[layer], kv.keys[layer][:, 500:])
        np.testing.assert_array_equal(tail.values[layer], kv.values[layer][:, 500:])
    np.testing.assert_allclose(kv.logits, expected["logits"][0], atol=1e-3, rtol=0)
    assert kv.first_token == int(np.argmax(expected["logits"][0]))
    with pytest.raises(ValueError, match="start_token"):
        tail.to_dynamic_cache(None)


def test_errors_of_a_real_server(server):
    with vsprefill.PrefillClient(server.address) as client:
        with pytest.raises(vsprefill.InvalidRequestError):
            client.prefill([])
        with pytest.raises(vsprefill.InvalidRequestError, match="99999999"):
            client.prefill([99999999])
        with pytest.raises(vsprefill.InvalidRequestError):
            client.prefill([1, 2], start_token=2)
        with pytest.raises(vsprefill.InvalidRequestError, match="nonsense"):
            client.prefill([1, 2], method="nonsense")
        with pytest.raises(vsprefill.ModelMismatchError):
            client.prefill([1, 2], expected_kv_id="0" * 64)
        with pytest.raises(vsprefill.PushDeniedError):
            client.push(["127.0.0.1:1"], [1, 2])
        assert client.prefill([1, 2]).layout.tokens == 2


def test_model_info_and_metrics(server, model_dir):
    with vsprefill.PrefillClient(server.address) as client:
        client.prefill([1, 2, 3])
        info = client.model_info()
        load = client.load()
    assert info.weights_id == identity.weights_id(model_dir)
    assert info.layout.kv_id == identity.kv_id(model_dir, "float32")
    assert load.kv_pool_used_bytes == 0
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as response:
        assert "vsprefill_time_to_first_token_seconds_count" in response.read().decode()


def test_the_card_was_measured_with_this_default(server):
    """The figures that demo, needle test and speed table print belong to the parameters that are shipped."""
    import default_card

    with vsprefill.PrefillClient(server.address) as client:
        method = next(m for m in client.model_info().methods if m.name == "vsprefill")
    assert default_card.load()["parameters"] == {p.name: p.default_value for p in method.parameters}
    assert default_card.lines(8000)[0].startswith("8,000 tokens: density 0.1")


def test_presets(server, prompts):
    ids = prompts[7]["ids"][:2048]  # fewer would be computed densely
    with vsprefill.PrefillClient(server.address) as client:
        presets = {p.name: p for p in client.model_info().presets}
        assert tuple(presets) == SERVER_PRESETS
        densities = []
        for name, preset in presets.items():
            assert (preset.method, dict(preset.parameters).keys()) == ("vsprefill", {"threshold"})
            assert 0 < preset.perplexity_change_median < preset.perplexity_change_worst
            assert 0 < preset.perplexity_change_mean < preset.perplexity_change_worst
            kv = client.prefill(ids, preset=name)
            assert kv.method == "vsprefill" and kv.method_parameters["threshold"] == preset.parameters["threshold"]
            assert kv.stats.dense_fallback_layers < kv.layout.num_layers
            densities.append(kv.stats.density)
        assert 1 > densities[0] > densities[1] > densities[2] > 0
        own = client.prefill(ids, preset="fast", parameters={"threshold": 2.8})
        assert own.stats.density == densities[1]
        pure = client.prefill(ids, preset="safe", parameters={"dense_fallback": 0})
        assert pure.stats.dense_fallback_layers == 0 and pure.stats.density <= densities[0]
        with pytest.raises(vsprefill.InvalidRequestError, match="safe, balanced, fast"):
            client.prefill(ids, preset="turbo")
        with pytest.raises(vsprefill.InvalidRequestError, match='"vsprefill" or none'):
            client.prefill(ids, preset="fast", method="dense")


def test_an_index_that_keeps_everything_is_not_run(server, prompts):
    def counted():
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return float(next(x for x in lines if x.startswith("vsprefill_dense_fallback_layers_total{")).split()[-1])

    ids, before = prompts[7]["ids"][:2048], counted()
    with vsprefill.PrefillClient(server.address) as client:
        fallen = client.prefill(ids, method="vsprefill", parameters={"threshold": 0})
        forced = client.prefill(ids, method="vsprefill", parameters={"threshold": 0, "dense_fallback": 0})
        dense = client.prefill(ids, method="dense")
    # The last layer computes the prompt's last row alone, which is dense in any case.
    assert fallen.stats.dense_fallback_layers == fallen.layout.num_layers - 1
    assert counted() - before == fallen.stats.dense_fallback_layers
    assert forced.stats.dense_fallback_layers == 0
    assert fallen.stats.density == forced.stats.density == 1
    assert fallen.stats.cost_ratio == dense.stats.cost_ratio
    for layer in range(fallen.layout.num_layers):
        np.testing.assert_array_equal(fallen.keys[layer], dense.keys[layer])


def test_chat_template_equals_transformers(model_dir):
    from prompt import chat_ids
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for text in ("What is the capital of France?", "  Two\n\nlines, 12345 and €.\n"):
        text_ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                 tokenize=False)
        assert chat_ids(model_dir, text) == tokenizer(text_ids).input_ids
